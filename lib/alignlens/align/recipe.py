"""Recipes: all that a training run depends on besides its base, its pairs and its reward; ours and the published."""

import math
from dataclasses import dataclass, field, replace

from alignlens.core.errors import AlignError
from alignlens.core.settings import CONTROLS, METHODS

ONLINE = ("ppo", "grpo")  # those that sample and need a reward

# What arXiv 2606.09850 trained with. It has no ORPO recipe in any file, so there is none here either.
PUBLISHED = {
    "dpo": {"learning_rate": 5e-7, "batch_size": 32, "max_length": 512, "options": {"beta": 0.1}},
    "kto": {"learning_rate": 5e-7, "batch_size": 32, "max_length": 512, "options": {"beta": 0.1}},
    "simpo": {"learning_rate": 5e-7, "batch_size": 32, "max_length": 1024, "options": {
        "beta": 2.0, "simpo_gamma": 1.0, "warmup_steps": 0.03, "max_grad_norm": 1.0}},
    "grpo": {"learning_rate": 1e-6, "batch_size": 32, "response_tokens": 256, "options": {"beta": 0.0,
        "num_generations": 4, "temperature": 0.8, "top_p": 0.9, "loss_type": "dr_grpo", "scale_rewards": "none"}},
    "ppo": {"learning_rate": 3e-6, "batch_size": 8, "response_tokens": 53, "options": {
        "kl_coef": 0.05, "num_ppo_epochs": 1, "missing_eos_penalty": 1.0}},
}  # fmt: skip

DEFAULTS = {
    "ppo": {"kl_coef": 0.02, "num_ppo_epochs": 2, "missing_eos_penalty": 1.0}, "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0}, "orpo": {"beta": 1.0}, "grpo": {"beta": 0.0, "num_generations": 8},
    "kto": {"beta": 0.1}, "shuffled": {"beta": 0.1},
}  # fmt: skip

POSITIVE = ("learning_rate", "steps", "response_tokens", "lora_rank", "dose", "check_every", "check_prompts")


@dataclass(frozen=True)
class Recipe:
    """All that a training run depends on besides its base, its pairs and its reward.

    learning_rate : of the adapter, constant after the warm-up. steps : optimiser steps at most. batch_size : pairs a
    step; for ppo and grpo, sampled responses. micro_batch_size : rows in memory at once (None: the whole batch).
    max_length : tokens of prompt and response; longer pairs are left out and counted, never cut. response_tokens :
    longest sampled response. stop : "dose" ends at ``dose`` nats of mean KL per response (between two checks, weights
    are interpolated to land on it), "last" at the last step. check_every, check_prompts : how often, and on how many
    held-out prompts, dose and curves are measured. options : of the method's TRL config (``DEFAULTS`` lists ours)."""

    method: str
    learning_rate: float
    steps: int
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_length: int = 512
    response_tokens: int = 64
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    stop: str = "dose"
    dose: float = 2.0
    check_every: int = 5
    check_prompts: int = 64
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        names, size, micro = (*METHODS, *CONTROLS), self.batch_size, self.micro
        uneven = micro < (2 if self.method == "kto" else 1) or size % micro
        group = self.all_options.get("num_generations", 1)
        small = [name for name in POSITIVE if getattr(self, name) <= 0]
        problems = {
            f"it is unknown; choose from {', '.join(names)}": self.method not in (*names, "reward"),
            f"stop is {self.stop!r}; choose 'dose' or 'last'": self.stop not in ("dose", "last"),
            f"{' and '.join(small)} must be positive": small,
            f"batch_size {size} must be a multiple of micro_batch_size {micro}, and that over 0 (kto's over 1)": uneven,
            f"batch_size {size} must be a multiple of num_generations {group}": size % group,
        }
        if problem := next((problem for problem, found in problems.items() if found), None):
            raise AlignError(f"method {self.method!r}: {problem}")

    @property
    def micro(self) -> int:
        """Rows in memory at once."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def all_options(self) -> dict:
        return DEFAULTS.get(self.method, {}) | self.options


def published(recipe: Recipe, n_pairs: int) -> Recipe:
    """The same run with the published settings: r 16, alpha 32, dropout 0.05, one epoch, no stop at a dose.

    Raises AlignError for a method that has none."""
    if recipe.method not in PUBLISHED:
        raise AlignError(f"no recipe for {recipe.method} is published; load its checkpoint, or use recipe: study")
    own = PUBLISHED[recipe.method]
    steps = math.ceil(n_pairs / own["batch_size"])
    return replace(recipe, steps=steps, lora_rank=16, lora_alpha=32, lora_dropout=0.05, stop="last", **own)
