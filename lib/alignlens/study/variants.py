"""What a study is made of: models by name, and where their weights come from."""

from __future__ import annotations

from dataclasses import dataclass

TEXTS = ["prompt", "chosen", "rejected"]


@dataclass(frozen=True, order=True)
class Variant:
    """One model of a study: a family, a method, a control, "base" or "random" (a null), and a seed."""

    family: str
    method: str
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.family}-base" if self.method == "base" else f"{self.family}-{self.method}-seed{self.seed}"

    @property
    def base(self) -> Variant:
        return Variant(self.family, "base")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what Transformers loads, and an adapter on top if any."""

    model: str
    adapter: str | None = None
