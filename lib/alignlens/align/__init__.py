"""Alignment: six methods and two controls from one parent, one data set, one format and one LoRA shape, on TRL.

A run ends at its last step, or once its *dose* (mean KL per response to the base, on held-out prompts) reaches the
target, whichever the recipe says. Checked every few steps: dose, response length, and held-out log-probabilities of
chosen and rejected answers."""

from alignlens.align.monitor import Monitor
from alignlens.align.recipe import DEFAULTS, ONLINE, PUBLISHED, Recipe, published
from alignlens.align.training import Limits, answerable, limits, train, train_reward

__all__ = [
    "DEFAULTS", "Limits", "Monitor", "ONLINE", "PUBLISHED", "Recipe", "answerable", "limits", "published", "train",
    "train_reward",
]  # fmt: skip
