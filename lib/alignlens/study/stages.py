"""What a study is made of: its models, where they come from, and the versions of the stages that make its artifacts."""

from __future__ import annotations

from dataclasses import dataclass

# Raised by hand when the results of a stage change.
VERSIONS = {
    "base": 1, "reward": 1, "variant": 1, "activations": 1, "behavior": 1, "probes": 1, "random": 1, "tokens": 1,
    "dictionary": 1, "latents": 1, "published_crosscoder": 1, "published_sae": 1, "calibration": 1,
    "geometry": 1, "dose": 2, "causal": 1,
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Variant:
    """One model of a study: a family, a method, a control or "base", and a seed."""

    family: str
    method: str
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.family}-base" if self.method == "base" else f"{self.family}-{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what Transformers loads, an adapter on top if any, and the hash of both."""

    model: str
    adapter: str | None
    key: str
