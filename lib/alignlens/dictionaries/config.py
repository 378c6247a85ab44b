"""How a dictionary is trained."""

from dataclasses import dataclass

from alignlens.core.errors import DictionaryError


@dataclass(frozen=True)
class Config:
    """How a dictionary is trained.

    width : latents. k : mean number of latents that fire a row.
    activation : "batchtopk", or "l1" (ReLU with a penalty of ``l1`` x code x sum of decoder norms, Lindsey et al.
        2024).
    shared : share of latents that have one and the same decoder row in all streams, trained by the sum of gradients.
    epochs, batch_size : how often each row is seen, and how many at once. steps : stop after so many.
    learning_rate : of Adam, with a linear rise over ``warmup`` and a linear fall over the last ``decay`` of the steps.
    aux_weight, aux_k, dead_after : latents silent for ``dead_after`` rows, at most ``aux_k`` a row, learn to rebuild
        what the others leave (Gao et al., arXiv 2406.04093).
    reseed : how often, between a quarter and three quarters of the training, latents that hardly fire start again from
        directions that the error's rows share (see ``reseeding``).
    refit : rounds, at the end, of least squares: the codes of each row on the latents that fire there, then the
        decoder. An encoder's codes are blurred by the other latents of the row; these are not, so angles and norms
        come out several times more exactly, at the same error.
    seed : of the initial weights and the order of rows.
    published : the published study's autoencoder (arXiv 2606.09850, SAELens' BatchTopK): raw inputs, decoder rows of
        norm 0.1 left free, threshold as a running mean of the smallest kept code; see ``published``.
    """

    width: int = 512
    k: float = 16
    activation: str = "batchtopk"
    l1: float = 0.0
    shared: float = 0.0
    epochs: float = 8
    batch_size: int = 512
    steps: int | None = None
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.3
    aux_weight: float = 0.3
    aux_k: int = 128
    dead_after: int = 5000
    reseed: int = 4
    refit: int = 2
    seed: int = 0
    published: bool = False


def published(d: int, *, width: int = 16_384, k: float = 64, **changes) -> Config:
    """The published study's autoencoder of a stream with d dimensions (arXiv 2606.09850).

    Adam 3e-4, constant after 100 of about 2,000 steps of 1,024 rows, auxiliary loss 1.0 over d / 2 dead latents.
    """
    values = {
        "batch_size": 1024, "learning_rate": 3e-4, "warmup": 0.05, "decay": 0.0, "epochs": 1, "aux_weight": 1.0,
        "aux_k": max(1, d // 2), "dead_after": 1_024_000, "reseed": 0, "refit": 0, "seed": 42, "published": True,
    }  # fmt: skip
    return Config(width=width, k=k, **(values | changes))


def check(c: Config, rows: int, shapes: dict) -> None:
    """Raise DictionaryError for settings out of range for so many rows and streams of these shapes."""
    least = min(c.learning_rate, c.epochs, c.batch_size, 1 if c.steps is None else c.steps)
    alike = len(shapes) > 1 and len(set(shapes.values())) == 1
    problems = {
        "activation must be batchtopk or l1": c.activation not in ("batchtopk", "l1"),
        f"k {c.k} must lie between 0 and width {c.width}": not 0 < c.k <= c.width,
        f"{rows} rows cannot fill a batch of {c.batch_size}: give more, or a smaller batch_size": rows < c.batch_size,
        "learning_rate, epochs, batch_size and steps must be positive": least <= 0,
        "shared, warmup and decay must lie between 0 and 1": not all(
            0 <= x <= 1 for x in (c.shared, c.warmup, c.decay)
        ),
        f"shared must be 0 for one stream, or streams of different shapes {shapes}": c.shared and not alike,
    }
    if found := [words for words, wrong in problems.items() if wrong]:
        raise DictionaryError(f"dictionary config: {'; '.join(found)}")
