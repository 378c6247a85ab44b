"""Stages that make models: tiny bases, reward models, variants, and the random direction that is a null."""

import dataclasses

import numpy as np
import pandas as pd

from alignlens import align, behavior, models
from alignlens.core.errors import AlignError
from alignlens.core.settings import METHODS
from alignlens.core.store import content_hash
from alignlens.preferences import tinyworld
from alignlens.study.stages import Stage, Variant

PRETRAINING = ("layers", "d_model", "vocab_size", "pretrain_steps", "pretrain_batch", "pretrain_rate")
RECIPE = (
    "batch_size", "micro_batch_size", "max_length", "response_tokens", "lora_rank", "stop", "dose", "check_every",
    "check_prompts",
)  # fmt: skip


class Base(Stage):
    """A tiny base, trained from scratch on the tiny world's text."""

    name, group, ships, after, fields = "base", "bases", True, (), PRETRAINING

    def wanted(self, s):
        return [(f,) for f, base in s.preset.families.items() if base.startswith("tiny:")]

    def label(self, s, family):
        return f"{family}-base"

    def made_from(self, s, family):
        # Held-out prompts are kept out of the pretraining text as well, so the split is one of its inputs.
        held_out = content_hash(sorted(s.split("measure").prompt)) if s.tiny_world else "none"
        architecture = s.preset.families[family].removeprefix("tiny:")
        return {"held out": held_out}, {"architecture": architecture, "seed": 0}

    def make(self, s, folder, family):
        p, held_out = s.preset, s.split("measure").prompt if s.tiny_world else ()
        text = tinyworld.corpus(min(100_000, p.pretrain_steps * p.pretrain_batch), exclude=held_out)
        return models.pretrain(
            folder, p.families[family].removeprefix("tiny:"), list(zip(text.prompt, text.response, strict=True)),
            layers=p.layers, d_model=p.d_model, vocab_size=p.vocab_size, steps=p.pretrain_steps,
            batch_size=p.pretrain_batch, learning_rate=p.pretrain_rate, seed=0,
        )  # fmt: skip


class Reward(Stage):
    """A reward model trained on the reward split; ``extra["accuracy"]`` is on held-out prompts of that split."""

    name, kind, group, title, ships, after = "reward_model", "reward", "rewards", "reward model", True, ("base",)
    resumes = True

    def wanted(self, s):
        return [(f, seed) for f in s.families for seed in s.preset.seeds] if s.needs_reward_model else []

    def label(self, s, family, seed):
        return f"{family}-reward-seed{seed}"

    def made_from(self, s, family, seed):
        keys = {"base": s.weights(Variant(family, "base")), "pairs": s.split_key("reward")}
        return keys, dataclasses.asdict(recipe(s, "reward", seed))

    def make(self, s, folder, family, seed):
        base, kept = s.source(Variant(family, "base")).model, s.working(self.name, family, seed)
        pairs, own = s.split("reward"), recipe(s, "reward", seed)
        return align.train_reward(folder, base, pairs, own, resumable=kept, **s.placed)


class Trained(Stage):
    """A trained adapter with its curves (``table("curves.parquet")``) and its dose (``extra``)."""

    name, group, ships, after = "variant", "variants", True, ("base", "reward_model")
    resumes = True

    def wanted(self, s):
        trained = [v for v in s.variants(base=False) if not s.checkpoint(v.family, v.method)]
        slowest_first = {"ppo": 0, "grpo": 1}
        return [(v,) for v in sorted(trained, key=lambda v: (slowest_first.get(v.method, 2), v))]

    def made_from(self, s, variant):
        keys = {"base": s.weights(variant.base), "pairs": s.split_key("train"), "heldout": s.split_key("reward")}
        if variant.method in align.ONLINE:
            learned = s.preset.reward == "model"
            keys["reward"] = s.key("reward_model", variant.family, variant.seed) if learned else "true utility"
        return keys, dataclasses.asdict(recipe(s, variant.method, variant.seed))

    def make(self, s, folder, variant):
        if s.preset.variants == "load":
            cure = "use variants 'auto' to train it, or name it in checkpoints"
            missing = "is neither stored nor given as a checkpoint, and variants is 'load'"
            raise AlignError(f"variant {variant.label} {missing}; {cure}")
        base, reward = s.source(variant.base).model, None
        if variant.method in align.ONLINE:
            learned = s.preset.reward == "model"
            reward = _load_reward(s, variant.family, variant.seed) if learned else _true_utility
        pairs, own = (s.split("train"), s.split("reward")), recipe(s, variant.method, variant.seed)
        options = {"reward": reward, "resumable": s.working(self.name, variant), **s.placed}
        return align.train(folder, base, *pairs, own, **options)


class RandomDirection(Stage):
    """The null of a comparison: an adapter of random direction, each module's update as large as a variant's."""

    name, group, title, ships = "random", "dictionaries", "random direction", True

    def wanted(self, s):
        return [(second,) for name, _, second in s.comparisons() if name == "random"]

    def made_from(self, s, variant):
        pattern = s.pattern(variant.family)
        if pattern is None:
            needed = "needs a variant with a LoRA adapter as its pattern: merged checkpoints have none"
            raise AlignError(f"a random direction for {variant.family} {needed}")
        return {"pattern": s.weights(pattern)}, {"seed": variant.seed}

    def make(self, s, folder, variant):
        return models.random_adapter(s.source(s.pattern(variant.family)).adapter, folder, seed=variant.seed)


def recipe(s, method: str, seed: int) -> align.Recipe:
    """The training recipe of a method (or "reward") under a study's preset."""
    p = s.preset
    made = align.Recipe(
        method=method, learning_rate=p.learning_rates[method], lora_alpha=2 * p.lora_rank, seed=seed,
        steps=p.reward_steps if method == "reward" else p.steps, **{name: getattr(p, name) for name in RECIPE},
    )  # fmt: skip
    if p.recipe == "published" and method in METHODS:
        made = align.published(made, len(s.split("train")))
    return made


def _true_utility(prompts, responses) -> np.ndarray:
    return tinyworld.score(list(prompts), list(responses)).utility.to_numpy()


def judge(s, family: str) -> behavior.Judge | None:
    """Who scores samples: the tiny world's true utility, else the family's reward model (seed 0), else nobody.

    Where variants are trained against reward models, tiny-world samples also get that model's ``reward``."""
    format, model = s.format(family), _load_reward(s, family, 0) if s.needs_reward_model else None

    def reward(prompts, responses):
        ids = [format.encode(p, r or " ") for p, r in zip(prompts, responses, strict=True)]
        return models.rewards(model, [p for p, _ in ids], [r for _, r in ids], pad_id=format.pad_id)

    def utility(prompts, responses):
        table = tinyworld.score(prompts, responses).rename(columns={"utility": "score"})
        return table.assign(reward=reward(prompts, responses)) if model else table

    if s.tiny_world:
        return behavior.Judge("true utility", utility)
    return behavior.Judge("reward model", lambda p, r: pd.DataFrame({"score": reward(p, r)})) if model else None


def _load_reward(s, family: str, seed: int):
    base = s.source(Variant(family, "base")).model
    return models.load_reward(base, s.reward_model(family, seed).path, **s.placed)
