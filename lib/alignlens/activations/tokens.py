"""One vector per response token and layer."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from alignlens.activations.bridging import ready
from alignlens.activations.reading import encode
from alignlens.activations.running import Sequences, check_finite, evaluating
from alignlens.activations.storage import allocate, load, place_of, write
from alignlens.core.errors import ActivationError
from alignlens.preferences import Encoded, Formatter

HALF_LIMIT = 3e4  # streams of tokens are kept in float16 (which ends at 65504) while all are below this
CHUNK_BYTES = 2**26  # what is held in memory at once of streams that may lie on disk


@dataclass
class Tokens:
    """Residual streams at the response tokens of pairs: the end-of-turn token belongs to them, the prompt does not.

    streams : float16, or float32 where a value reaches 3e4 [tokens, layers, d_model], by row, side and place; in memory
        or mapped from a file
    layers : block indices; 0 is the stream after the first block
    token_id : int32 [tokens], the token that the stream belongs to
    row : int32 [tokens], its pair, counted in the kept pairs; side : int8 [tokens], 0 chosen, 1 rejected. A response
        that several rows share stands once, in the first of them.
    place : int32 [tokens], its position in the response, the first being 0
    prompt_id : str [kept pairs]
    kept : bool [input rows]
    report : how many pairs were dropped and why, tokens, sequences (distinct responses), bytes and dtype of ``streams``
    """

    streams: np.ndarray
    layers: list[int]
    token_id: np.ndarray
    row: np.ndarray
    side: np.ndarray
    place: np.ndarray
    prompt_id: np.ndarray
    kept: np.ndarray
    report: dict = field(default_factory=dict)

    def at(self, layer: int) -> np.ndarray:
        """Streams after one block: a view [tokens, d_model]. ActivationError if it was not read."""
        return self.streams[:, place_of(layer, self.layers)]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokens":
        """Map what ``read_tokens`` wrote into a folder: the streams stay on disk until they are used.

        ActivationError if its two files are missing or damaged.
        """
        return cls(**load(folder, "tokens"))


def high_norm(x: np.ndarray, factor: float = 10.0) -> np.ndarray:
    """Tokens whose norm is above ``factor`` times the median norm, in any layer: bool [tokens].

    x : [tokens, d_model] or [tokens, layers, d_model], in memory or mapped from disk. Such tokens (the first ones of a
    text, some line breaks) carry little meaning and would govern a dictionary's loss: leave them out and report them.
    ActivationError for NaN or infinite values.
    """
    step = max(1, CHUNK_BYTES * len(x) // x.nbytes)
    parts = (x[start : start + step].astype(np.float32) for start in range(0, len(x), step))
    norms = np.concatenate([np.linalg.norm(part, axis=-1) for part in parts])  # float16 squares would overflow
    if not np.isfinite(norms).all():
        raise ActivationError(f"NaN or infinite streams, first at token {np.argwhere(~np.isfinite(norms))[0, 0]}")
    return (norms > factor * np.median(norms, axis=0)).reshape(len(x), -1).any(axis=1)


def read_tokens(
    model, tokenizer, pairs: pd.DataFrame | Encoded, *, layers="all", batch_size: int = 32, limit: int | None = None,
    folder: str | Path | None = None, max_length: int | None = None, own: bool = False,
    formatter: Formatter | None = None,
) -> Tokens:  # fmt: skip
    """Residual streams after each block at every response token of the chosen and the rejected answers.

    Parameters
    ----------
    model, tokenizer, pairs, layers, max_length, own, formatter : as for ``read``.
    batch_size : changes the speed and the memory (a batch's streams of all layers), not the result.
    limit : at most this many tokens. Whole pairs are taken in their order, up to the first that would exceed it: the
        same for every model of a family, since only the pairs and their format count.
    folder : an existing folder for tokens.safetensors and tokens.json. The streams then go straight to disk.

    Returns
    -------
    ``Tokens``. A response that several rows share (with its prompt) is read and returned once.

    Raises
    ------
    What ``read`` raises; ActivationError if the first pair is over ``limit`` or the streams do not fit on the disk.
    """
    formatter, encoded = encode(tokenizer, pairs, formatter, max_length)
    prompts = [ids for ids in encoded.prompt_ids for _ in range(2)]
    answers = [ids for both in zip(encoded.chosen_ids, encoded.rejected_ids, strict=True) for ids in both]
    sequences, taken = Sequences.of(prompts, answers), len(encoded)
    if limit is not None:
        tokens = np.bincount(sequences.first // 2, sequences.sizes, minlength=taken).cumsum()
        taken = int(np.searchsorted(tokens, limit, side="right"))
        if not taken:
            raise ActivationError(f"limit={limit}: the first pair alone has {tokens[0]:.0f} response tokens; raise it")
        sequences = Sequences.of(prompts[: 2 * taken], answers[: 2 * taken])
    bridged, layers = ready(model, sequences.ids, layers, own=own)

    (row, side), sizes = np.divmod(sequences.first, 2), sequences.sizes
    index = {
        "token_id": np.concatenate([ids[-n:] for ids, n in zip(sequences.ids, sizes, strict=True)], dtype=np.int32),
        "row": row.repeat(sizes).astype(np.int32),
        "side": side.repeat(sizes).astype(np.int8),
        "place": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        "kept": encoded.kept & (encoded.kept.cumsum() <= taken),
    }
    ends, shape = sizes.cumsum(), (int(sizes.sum()), len(layers), bridged.cfg.d_model)
    streams = allocate(shape, np.float16, folder)
    with evaluating(batch_size):
        for batch in sequences.batches(batch_size, formatter.pad_id):
            values, own_sizes = batch.streams(bridged, layers).cpu().numpy(), sizes[batch.rows]
            check_finite(values, layers, row[batch.rows].repeat(own_sizes), encoded, "tokens")
            if streams.dtype == np.float16 and np.abs(values).max() >= HALF_LIMIT:
                narrow, streams = streams, allocate(shape, np.float32, folder)
                streams[:] = narrow
            for i, part in zip(batch.rows, np.split(values, own_sizes.cumsum()[:-1]), strict=True):
                streams[ends[i] - sizes[i] : ends[i]] = part
    report = dict(encoded.report) | {
        "kept": taken, "beyond_limit": len(encoded) - taken, "tokens": len(streams), "sequences": len(sequences.ids),
        "bytes": streams.nbytes, "dtype": streams.dtype.name,
    }  # fmt: skip
    facts = {"layers": layers, "report": report, "prompt_id": encoded.prompt_id[:taken]}
    if folder is None:
        return Tokens(streams, **facts, **index)
    write(folder, "tokens", index | {"streams": streams}, facts)
    return Tokens.load(folder)
