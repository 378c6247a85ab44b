"""One vector per response and layer."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from alignlens.activations.bridging import ready
from alignlens.activations.running import Sequences, check_finite, evaluating
from alignlens.activations.storage import allocate, load, place_of, write
from alignlens.core.errors import ActivationError
from alignlens.preferences import Encoded, Formatter

POSITIONS = ("last", "mean", "prompt")


@dataclass
class Activations:
    """Residual streams of pairs at one position.

    chosen, rejected : float32 [pairs, layers, d_model], the pairs in input order without the dropped ones
    layers : block indices; 0 is the stream after the first block
    prompt_id : str [pairs]
    position : last (the end-of-turn token of the response), mean (over the response's tokens, its end included) or
        prompt (the last prompt token, where chosen and rejected are the same by causality)
    kept : bool [input rows]; report : how many rows were dropped and why, and what was read
    """

    chosen: np.ndarray
    rejected: np.ndarray
    layers: list[int]
    prompt_id: np.ndarray
    position: str
    kept: np.ndarray
    report: dict = field(default_factory=dict)

    @property
    def difference(self) -> np.ndarray:
        """chosen - rejected: float32 [pairs, layers, d_model]."""
        return self.chosen - self.rejected

    def at(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected) after one block: float32 [pairs, d_model] each. ActivationError if it was not read."""
        place = place_of(layer, self.layers)
        return self.chosen[:, place], self.rejected[:, place]

    def save(self, folder: str | Path) -> None:
        """Write activations.safetensors and activations.json into an existing folder."""
        arrays = {"chosen": self.chosen, "kept": self.kept}
        if self.position != "prompt":
            arrays["rejected"] = self.rejected
        facts = {name: getattr(self, name) for name in ("position", "layers", "report", "prompt_id")}
        write(folder, "activations", arrays, facts)

    @classmethod
    def load(cls, folder: str | Path) -> "Activations":
        """Read what ``save`` wrote. ActivationError if its two files are missing or damaged."""
        found = load(folder, "activations")
        return cls(**{"rejected": found["chosen"]} | found)


def estimate(pairs: int, layers: int, d_model: int) -> int:
    """Bytes of the result: chosen and rejected in float32."""
    return 2 * 4 * pairs * layers * d_model


def encode(tokenizer, pairs, formatter, max_length) -> tuple[Formatter, Encoded]:
    """The formatter, by default the tokenizer's, and the encoded pairs."""
    if formatter is not None and max_length is not None:
        raise ActivationError("give max_length or a formatter, which has its own, not both")
    formatter = formatter or Formatter(tokenizer, max_length=max_length)
    return formatter, formatter.encode_pairs(pairs)


def read(
    model, tokenizer, pairs: pd.DataFrame | Encoded, *, layers="all", position: str = "last", batch_size: int = 32,
    max_length: int | None = None, own: bool = False, formatter: Formatter | None = None,
) -> Activations:  # fmt: skip
    """Residual streams of (prompt, chosen) and (prompt, rejected) after each block, at one position.

    Parameters
    ----------
    model : a transformers causal model (a copy is bridged, see ``own``), or a TransformerLens bridge (its hooks stay).
    pairs : DataFrame[prompt, chosen, rejected, prompt_id], whose rows that cannot be formatted are dropped and counted,
        or ``preferences.Encoded``.
    layers : "all" or block indices (negative ones count from the end).
    position : last | mean | prompt, see ``Activations``.
    batch_size : changes the speed, not the result.
    max_length : pairs with a longer prompt and response, in tokens, are dropped and counted; nothing is cut.
    own : the model may be changed in place, which saves the copy.
    formatter : the format the model was trained with, if it is not the tokenizer's default (instead of ``max_length``).

    Returns
    -------
    ``Activations``, float32 whatever the model's precision. Texts that are the same are read once.

    Raises
    ------
    ActivationError for unknown layers or positions, sequences that the model cannot hold, a tokenizer that is not the
    model's, a lack of GPU memory, and NaN or infinite activations (with layer, row and prompt_id); PreferenceError if
    no pair can be formatted.
    """
    if position not in POSITIONS:
        raise ActivationError(f"position={position!r}: choose one of {', '.join(POSITIONS)}")
    formatter, encoded = encode(tokenizer, pairs, formatter, max_length)
    # By causality the prompt's stream does not depend on the response: it is read once and shared by both sides.
    sides = [encoded.chosen_ids, encoded.rejected_ids] if position != "prompt" else [[[]] * len(encoded)]
    lead = 0 if position == "mean" else None
    sequences = Sequences.of(encoded.prompt_ids * len(sides), sum(sides, []), lead=lead)
    bridged, layers = ready(model, sequences.ids, layers, own=own)
    out = allocate((len(sequences.place), len(layers), bridged.cfg.d_model))
    members = pd.Series(sequences.place).groupby(sequences.place).indices  # sequence -> its rows of the result
    rows = sequences.first % len(encoded)
    with evaluating(batch_size):
        for batch in sequences.batches(batch_size, formatter.pad_id):
            values = batch.streams(bridged, layers, mean=position == "mean").cpu().numpy()
            check_finite(values, layers, rows[batch.rows], encoded, "sequences")
            for i, value in zip(batch.rows, values, strict=True):
                out[members[i]] = value
    report = dict(encoded.report) | {"sequences": 2 * len(encoded), "sequences_read": len(sequences.ids)}
    chosen, rejected = out[: len(encoded)], out[-len(encoded) :]
    return Activations(chosen, rejected, layers, encoded.prompt_id, position, encoded.kept, report)
