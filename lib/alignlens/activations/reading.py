"""One vector per response and layer, or one per response token and layer."""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignlens.activations.bridging import ready
from alignlens.activations.running import Sequences, check_finite, evaluating
from alignlens.core.errors import ActivationError
from alignlens.core.store import write_arrays, write_json
from alignlens.preferences import Encoded, Formatter

POSITIONS = ("last", "mean", "prompt")
HALF_LIMIT = 3e4  # streams of tokens are kept in float16 (which ends at 65504) while all are below this
CHUNK_BYTES = 2**26  # what is held in memory at once of streams that may lie on disk
MEMORY_LIMIT = 4 * 2**30  # bytes of result above which it is kept in a temporary file instead of memory


def allocate(shape: tuple[int, ...], dtype=np.float32, folder: str | Path | None = None) -> np.ndarray:
    """An array in memory; in a file without a name if it is large, or in a folder if one is given."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    if folder is None and size <= MEMORY_LIMIT:
        return np.empty(shape, dtype)
    # A full disk would otherwise end the process while it writes into the map.
    if size > (free := shutil.disk_usage(folder or tempfile.gettempdir()).free):
        sizes = f"{size / 1e9:,.1f} GB of streams do not fit on the disk, which has {free / 1e9:,.1f} GB free"
        raise ActivationError(f"{sizes}: ask for fewer layers, or set a limit")
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps the nameless file until the array is gone
        return np.memmap(file, dtype, "w+", shape=shape)


def load(folder: str | Path, name: str) -> dict:
    """The contents of NAME.safetensors, mapped, and NAME.json."""
    try:  # as torch's, which stay on disk until they are used; numpy's would be loaded
        arrays = {key: tensor.numpy() for key, tensor in load_file(Path(folder) / f"{name}.safetensors").items()}
        facts = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ActivationError(f"{folder} holds no readable {name}: {error}") from error
    return arrays | facts | {"prompt_id": np.array(facts["prompt_id"], dtype=str)}


def place_of(layer: int, layers: list[int]) -> int:
    if layer not in layers:
        raise ActivationError(f"layer {layer} was not read; these were: {layers}")
    return layers.index(layer)


@dataclass
class Activations:
    """Residual streams of pairs at one position.

    chosen, rejected : float32 [pairs, layers, d_model]; prompt_id : str [pairs]; both in input order
    layers : block indices, 0 being the stream after the first block
    position : last (the end-of-turn token of the response), mean (over the response's tokens, its end included) or
        prompt (the last prompt token, where chosen and rejected are the same by causality)
    kept : bool [input rows]; report : how many rows were dropped and why, and what was read"""

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
        arrays = ("chosen", "kept") if self.position == "prompt" else ("chosen", "kept", "rejected")
        write_arrays(Path(folder) / "activations.safetensors", {name: getattr(self, name) for name in arrays})
        facts = ("position", "layers", "report", "prompt_id")
        write_json(Path(folder) / "activations.json", {name: getattr(self, name) for name in facts})

    @classmethod
    def load(cls, folder: str | Path) -> "Activations":
        """Read what ``save`` wrote. ActivationError if its two files are missing or damaged."""
        found = load(folder, "activations")
        return cls(**{"rejected": found["chosen"]} | found)


@dataclass
class Tokens:
    """Residual streams at the response tokens of pairs: the end-of-turn token belongs to them, the prompt does not.

    streams : float16, or float32 where a value reaches 3e4 [tokens, layers, d_model], by row, side and place; in memory
        or mapped from a file; layers : block indices, 0 being the stream after the first block
    token_id, row, side (int8), place : int32 [tokens]: the token, its pair among the kept, 0 chosen or 1 rejected, and
        its position in the response, from 0. What several rows share is read once and stands in the first of them.
    prompt_id : str [kept pairs]; kept : bool [input rows]
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
        """Map what ``read_tokens`` wrote into a folder. ActivationError if its two files are missing or damaged."""
        return cls(**load(folder, "tokens"))


def estimate(pairs: int, layers: int, d_model: int) -> int:
    """Bytes of the result: chosen and rejected in float32."""
    return 2 * 4 * pairs * layers * d_model


def encode(tokenizer, pairs, formatter, max_length) -> tuple[Formatter, Encoded]:
    if formatter is not None and max_length is not None:
        raise ActivationError("give max_length or a formatter, which has its own, not both")
    formatter = formatter or Formatter(tokenizer, max_length=max_length)
    return formatter, formatter.encode_pairs(pairs)


def read(
    model, tokenizer, pairs: pd.DataFrame | Encoded, *, layers="all", position: str = "last", batch_size: int = 32,
    max_length: int | None = None, own: bool = False, formatter: Formatter | None = None,
) -> Activations:  # fmt: skip
    """Residual streams of (prompt, chosen) and (prompt, rejected) after each block, at one position.

    model : a transformers causal model (a copy is bridged, or itself with ``own``) or a bridge (its hooks stay).
    pairs : DataFrame[prompt, chosen, rejected, prompt_id], whose rows that cannot be formatted or are longer than
        ``max_length`` tokens are dropped and counted (nothing is cut), or ``preferences.Encoded``.
    layers : "all" or block indices, negative from the end; batch_size : changes the speed, not the result.
    formatter : the format the model was trained with, if it is not the tokenizer's default (instead of ``max_length``).
    Returns float32 whatever the model's precision. Raises ActivationError for unknown layers or positions, sequences
    that the model cannot hold, another model's tokenizer, a lack of GPU memory, and NaN or infinite activations (with
    layer, row and prompt_id); PreferenceError if no pair can be formatted."""
    if position not in POSITIONS:
        raise ActivationError(f"position={position!r}: choose one of {', '.join(POSITIONS)}")
    formatter, encoded = encode(tokenizer, pairs, formatter, max_length)
    sides = [encoded.chosen_ids, encoded.rejected_ids] if position != "prompt" else [[[]] * len(encoded)]
    sequences = Sequences.of(encoded.prompt_ids * len(sides), sum(sides, []), lead=0 if position == "mean" else None)
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


def read_tokens(
    model, tokenizer, pairs: pd.DataFrame | Encoded, *, layers="all", batch_size: int = 32, limit: int | None = None,
    folder: str | Path | None = None, max_length: int | None = None, own: bool = False,
    formatter: Formatter | None = None,
) -> Tokens:  # fmt: skip
    """Residual streams after each block at every response token of the chosen and the rejected answers.

    model, tokenizer, pairs, layers, max_length, own, formatter : as for ``read``.
    batch_size : changes the speed and the memory (a batch's streams of all layers), not the result.
    limit : at most this many tokens. Whole pairs are taken in their order, up to the first that would exceed it: the
        same for every model of a family, since only the pairs and their format count.
    folder : an existing folder for tokens.safetensors and tokens.json. The streams then go straight to disk.
    Raises what ``read`` raises, and ActivationError if the first pair is over ``limit`` or the disk too small."""
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
    write_arrays(Path(folder) / "tokens.safetensors", index | {"streams": streams})
    write_json(Path(folder) / "tokens.json", facts)
    return Tokens.load(folder)


def high_norm(x: np.ndarray, factor: float = 10.0) -> np.ndarray:
    """Tokens whose norm is above ``factor`` times the median norm, in any layer: bool [tokens].

    x : [tokens, (layers,) d_model], in memory or mapped from disk; ActivationError if not finite. Such tokens (a text's
    first ones, some line breaks) carry little meaning and would govern a dictionary's loss: report and leave them out.
    """
    step = max(1, CHUNK_BYTES * len(x) // x.nbytes)
    parts = (x[start : start + step].astype(np.float32) for start in range(0, len(x), step))
    norms = np.concatenate([np.linalg.norm(part, axis=-1) for part in parts])  # float16 squares would overflow
    if not np.isfinite(norms).all():
        raise ActivationError(f"NaN or infinite streams, first at token {np.argwhere(~np.isfinite(norms))[0, 0]}")
    return (norms > factor * np.median(norms, axis=0)).reshape(len(x), -1).any(axis=1)
