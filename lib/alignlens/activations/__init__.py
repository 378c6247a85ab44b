"""Residual streams of preference pairs, read through TransformerLens: after a block (``blocks.{i}.hook_resid_post``).

``read`` takes one vector per response and layer, ``read_tokens`` one per response token and layer; nothing else is kept
while the model runs, so memory is bounded by the batch and by the result itself. ``spliced_loss`` puts other streams in
their place and measures what that does to the model's predictions.
"""

import contextlib
import copy
import inspect
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from alignlens.core.errors import ActivationError
from alignlens.core.store import write_arrays, write_json
from alignlens.preferences import Formatter, collate

POSITIONS = ("last", "mean", "prompt")
MEMORY_LIMIT = 4 * 2**30  # bytes of result above which it is kept in a temporary file instead of memory
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # share of the largest value, bridge against transformers
HALF_TOLERANCE = 5e-2
HALF_LIMIT = 3e4  # streams of tokens are kept in float16 (which ends at 65504) while all are below this
CHUNK_BYTES = 2**26  # what is held in memory at once of an array that may lie on disk
SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "int32": "I32", "int8": "I8", "bool": "BOOL"}


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
        place = _place_of(layer, self.layers)
        return self.chosen[:, place], self.rejected[:, place]

    def save(self, folder: str | Path) -> None:
        """Write activations.safetensors and activations.json into an existing folder."""
        arrays = {"chosen": self.chosen, "kept": self.kept}
        if self.position != "prompt":
            arrays["rejected"] = self.rejected
        write_arrays(Path(folder) / "activations.safetensors", arrays)
        facts = {"position": self.position, "layers": self.layers, "report": self.report}
        write_json(Path(folder) / "activations.json", facts | {"prompt_id": self.prompt_id})

    @classmethod
    def load(cls, folder: str | Path) -> "Activations":
        """Read what ``save`` wrote. ActivationError if its two files are missing or do not fit each other."""
        try:
            arrays = load_file(Path(folder) / "activations.safetensors")
            facts = json.loads((Path(folder) / "activations.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise ActivationError(f"{folder} holds no readable activations: {error}") from error
        facts["prompt_id"] = np.array(facts["prompt_id"], dtype=str)
        found = cls(rejected=arrays.pop("rejected", arrays["chosen"]), **arrays, **facts)
        expected = (int(found.kept.sum()), len(found.layers), found.chosen.shape[-1])
        if not found.chosen.shape == found.rejected.shape == expected or len(found.prompt_id) != expected[0]:
            raise ActivationError(f"{folder}: arrays of shape {found.chosen.shape}, but its facts say {expected}")
        return found


def estimate(pairs: int, layers: int, d_model: int) -> int:
    """Bytes of the result: chosen and rejected in float32."""
    return 2 * 4 * pairs * layers * d_model


@dataclass
class Tokens:
    """Residual streams at the response tokens of pairs: the end-of-turn token belongs to them, the prompt does not.

    streams : float16, or float32 where a value reaches 3e4 [tokens, layers, d_model], by row, side and place; in memory
        or mapped from a file, read-only
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
        return self.streams[:, _place_of(layer, self.layers)]

    def save(self, folder: str | Path) -> None:
        """Write tokens.safetensors and tokens.json into an existing folder, a piece at a time."""
        filling = _Filling(self.streams.shape, self._index(), folder, self.streams.dtype)
        with filling:
            filling.copy(self.streams)
            filling.keep()
        self._save_facts(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokens":
        """Map what ``save`` wrote: the streams stay on disk until they are used.

        ActivationError if its two files are missing, damaged or do not fit each other.
        """
        path = Path(folder) / "tokens.safetensors"
        try:
            with safe_open(path, "np") as file:
                index = {name: file.get_tensor(name) for name in ("token_id", "row", "side", "place", "kept")}
            streams = _map_streams(path, "r")
            facts = json.loads((Path(folder) / "tokens.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise ActivationError(f"{folder} holds no readable tokens: {error}") from error
        facts["prompt_id"] = np.array(facts["prompt_id"], dtype=str)
        found = cls(streams, **index, **facts)
        lengths = {len(array) for array in (streams, found.token_id, found.row, found.side, found.place)}
        if len(lengths) > 1 or streams.shape[1] != len(found.layers) or found.kept.sum() != len(found.prompt_id):
            raise ActivationError(
                f"{folder}: streams of shape {streams.shape} do not fit {len(found.token_id)} tokens, "
                f"{len(found.layers)} layers and {len(found.prompt_id)} prompts: read the tokens again"
            )
        return found

    def _index(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("token_id", "row", "side", "place", "kept")}

    def _save_facts(self, folder) -> None:
        facts = {"layers": self.layers, "report": self.report, "prompt_id": self.prompt_id}
        write_json(Path(folder) / "tokens.json", facts)


def high_norm(x: np.ndarray, factor: float = 10.0) -> np.ndarray:
    """Tokens whose norm is above ``factor`` times the median norm, in any layer: bool [tokens].

    x : [tokens, d_model] or [tokens, layers, d_model], in memory or mapped from disk. Such tokens (the first ones of a
    text, some line breaks) carry little meaning and would govern a dictionary's loss: leave them out and report them.
    ActivationError for NaN or infinite values.
    """
    # float32: squares of float16 values overflow
    norms = np.concatenate([np.linalg.norm(x[part].astype(np.float32), axis=-1) for part in _pieces(x)])
    if not np.isfinite(norms).all():
        raise ActivationError(f"NaN or infinite streams, first at token {np.argwhere(~np.isfinite(norms))[0, 0]}")
    return (norms > factor * np.median(norms, axis=0)).reshape(len(x), -1).any(axis=1)


def _place_of(layer: int, layers: list[int]) -> int:
    if layer not in layers:
        raise ActivationError(f"layer {layer} was not read; these were: {layers}")
    return layers.index(layer)


# Files larger than memory --------------------------------------------------------------------------------------------


def _pieces(array):
    """Slices of the first axis that hold about CHUNK_BYTES each."""
    step = max(1, CHUNK_BYTES * len(array) // max(1, array.nbytes))
    return [slice(start, start + step) for start in range(0, len(array), step)]


def _map_streams(path: Path, mode: str) -> np.memmap:
    """The array ``streams`` of a safetensors file: 8 bytes of header length, a JSON header, the arrays."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        facts = json.loads(file.read(length)).get("streams")
    if facts is None:
        raise ValueError(f"{path.name} holds no streams")
    dtype = {stored: ours for ours, stored in SAFETENSORS_DTYPE.items()}[facts["dtype"]]
    return np.memmap(path, dtype, mode, offset=8 + length + facts["data_offsets"][0], shape=tuple(facts["shape"]))


def _create(path: Path, shape: tuple[int, ...], dtype, index: dict[str, np.ndarray]) -> np.memmap:
    """A safetensors file of the index with room for streams of this shape, which are returned as a writable map."""
    kinds = {name: (array.dtype, array.shape) for name, array in index.items()} | {"streams": (np.dtype(dtype), shape)}
    header, end = {}, 0
    for name, (kind, extent) in sorted(kinds.items(), key=lambda item: -item[1][0].itemsize):  # so each is aligned
        start, end = end, end + kind.itemsize * math.prod(extent)
        facts = {"dtype": SAFETENSORS_DTYPE[kind.name], "shape": list(extent), "data_offsets": [start, end]}
        header[name] = facts
    if not path.parent.is_dir():
        raise ActivationError(f"the folder {path.parent} does not exist: make it first")
    path.unlink(missing_ok=True)  # a new file, not the old one's bytes: somebody may still map that one
    # A full disk would otherwise end the process while it writes into the map.
    if end > (free := shutil.disk_usage(path.parent).free):
        raise ActivationError(
            f"{end / 1e9:,.1f} GB of streams do not fit into {path.parent}, which has {free / 1e9:,.1f} GB free: ask "
            "for fewer layers, or set a limit"
        )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in index.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(array.tobytes())
        file.truncate(8 + len(text) + end)
    return _map_streams(path, "r+")


class _Filling:
    """Streams [tokens, layers, d_model] while they are filled, in memory or in a file of the folder.

    Begins in float16 and goes on in float32 from the first value that needs it. The file has another name until
    ``keep``; without that it is gone when the block ends.
    """

    def __init__(self, shape, index, folder=None, dtype=np.float16):
        self.shape, self.index = shape, index
        self.path = None if folder is None else Path(folder) / "tokens.safetensors.part"
        self.streams = self._make(dtype)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _make(self, dtype):
        if self.path is None:
            return _allocate(self.shape, dtype)
        return _create(self.path, self.shape, dtype, self.index)

    def write(self, start: int, values: np.ndarray) -> None:
        """Put float32 [some tokens, layers, d_model] in their place."""
        if self.streams.dtype == np.float16 and np.abs(values).max() >= HALF_LIMIT:
            narrow, self.streams = self.streams, self._make(np.float32)
            self.copy(narrow)
        self.streams[start : start + len(values)] = values

    def copy(self, streams: np.ndarray) -> None:
        for part in _pieces(streams):
            self.streams[part] = streams[part]

    def keep(self) -> None:
        """Give the finished file its name."""
        self.streams.flush()
        os.replace(self.path, self.path.with_suffix(""))


# Bridging ------------------------------------------------------------------------------------------------------------


def hook_name(layer: int) -> str:
    """Where the residual stream after a block is read, in TransformerLens's names."""
    return f"blocks.{layer}.hook_resid_post"


def bridge(model, tokenizer=None, *, own: bool = False):
    """A TransformerLens bridge of a transformers causal model, checked against the model itself.

    Bridging changes a model in place, so a copy is bridged unless ``own`` says that nobody needs the model afterwards.
    tokenizer: only for TransformerLens's text helpers, and only one loaded from a folder or the hub; ids need none.
    Logits and residual streams of a small fixed batch, with a padded row, must agree with the model's own within 1e-4
    of their largest value (float32; 5e-2 in half precision). Attention becomes eager, so that its hooks fire.
    Raises ActivationError for an unmerged adapter, an architecture without a bridge, or a bridge that disagrees.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    if hasattr(model, "peft_config"):
        raise ActivationError("the model carries an unmerged adapter: call merge_and_unload() and pass the result")
    name = type(model).__name__
    model = (model if own else copy.deepcopy(model)).eval()
    size, vocabulary = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(16, device=model.device).reshape(2, 8) * 7919 + 13) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    try:
        model.set_attn_implementation("eager")
        bridged = build_bridge_from_module(model, name, hf_config=model.config, tokenizer=tokenizer)
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise ActivationError(f"TransformerLens cannot bridge a {name}: {error}") from error
    if (bridged.cfg.n_layers, bridged.cfg.d_model) != (size.num_hidden_layers, size.hidden_size):
        raise ActivationError(f"the bridge of {name} has {bridged.cfg.n_layers} layers × {bridged.cfg.d_model}")

    everything = list(range(bridged.cfg.n_layers))
    with torch.inference_mode(), _taking(bridged, everything, lambda stream: stream) as streams:
        logits = bridged(ids, attention_mask=mask, use_cache=False)
    # transformers gives the last stream only after the final norm, so the logits stand for it.
    checks = {hook_name(layer): (streams.get(layer), expected.hidden_states[layer + 1]) for layer in everything[:-1]}
    checks["logits"] = (logits, expected.logits)
    for what, (ours, theirs) in checks.items():
        if ours is None or ours.shape != theirs.shape:
            raise ActivationError(f"the bridge of {name} gives {what} of another shape than transformers")
        # A damaged model is reported where its activations are read; here NaN agrees with NaN.
        ours, theirs = (torch.nan_to_num(value[mask.bool()].double()) for value in (ours, theirs))
        off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
        if off > TOLERANCE.get(model.dtype, HALF_TOLERANCE):
            raise ActivationError(f"the bridge of {name} differs from transformers at {what} by {off:.2g} of its scale")
    return bridged


@contextlib.contextmanager
def _taking(bridged, layers, take):
    """A dict that holds ``take(stream)`` of each layer after a forward pass; the streams themselves are not kept."""
    found = {}

    def hook_for(layer):
        def hook(stream, hook):
            found[layer] = take(stream)

        return hook

    with bridged.hooks(fwd_hooks=[(hook_name(layer), hook_for(layer)) for layer in layers]):
        yield found


# Reading -------------------------------------------------------------------------------------------------------------


def read(
    model,
    tokenizer,
    pairs: pd.DataFrame,
    *,
    layers="all",
    position: str = "last",
    batch_size: int = 32,
    max_length: int | None = None,
    padding_side: str = "right",
    device=None,
    progress: bool = False,
    own: bool = False,
    formatter: Formatter | None = None,
) -> Activations:
    """Residual streams of (prompt, chosen) and (prompt, rejected) after each block, at one position.

    Parameters
    ----------
    model : a transformers causal model (a copy is bridged, see ``own``), or a TransformerLens bridge (its hooks stay).
    pairs : DataFrame[prompt, chosen, rejected, prompt_id]; rows that cannot be formatted are dropped and counted.
    layers : "all" or block indices (negative ones count from the end).
    position : last | mean | prompt, see ``Activations``.
    batch_size, padding_side : change the speed, not the result.
    max_length : pairs with a longer prompt and response, in tokens, are dropped and counted; nothing is cut.
    device : where to run; by default where the model is. progress : show a bar with the size of the result.
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
    formatter, encoded = _encode(tokenizer, pairs, formatter, max_length)
    rows, prompt_id = np.flatnonzero(encoded.kept), encoded.prompt_id
    # By causality the prompt's stream does not depend on the response: it is read once and shared by both sides.
    sides = [encoded.chosen_ids, encoded.rejected_ids] if position != "prompt" else [[[]] * len(rows)]
    sequences, starts, places = _unique_sequences(encoded.prompt_ids, sides, position)
    bridged = _ready(model, sequences, device, own)
    layers = _check_layers(layers, bridged.cfg.n_layers)
    out = _allocate((len(places), len(layers), bridged.cfg.d_model))
    members = pd.Series(places).groupby(places).indices  # sequence -> its rows of the result

    def write(batch, values):
        targets = [members[i] for i in batch]
        if not np.isfinite(values).all():
            _refuse(values, layers, [rows[target[0] % len(rows)] for target in targets], pairs)
        out[np.concatenate(targets)] = values.repeat([len(target) for target in targets], axis=0)

    _run(
        bridged, layers, sequences, starts, position, write, batch_size=batch_size, pad_id=formatter.pad_id,
        padding_side=padding_side, shown=out.nbytes if progress else None,
    )  # fmt: skip
    report = dict(encoded.report) | {"sequences": 2 * len(rows), "sequences_read": len(sequences)}
    chosen, rejected = out[: len(rows)], out[-len(rows) :]
    return Activations(chosen, rejected, layers, prompt_id, position, encoded.kept, report)


def read_tokens(
    model,
    tokenizer,
    pairs: pd.DataFrame,
    *,
    layers="all",
    batch_size: int = 32,
    limit: int | None = None,
    folder: str | Path | None = None,
    device=None,
    own: bool = False,
    formatter: Formatter | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
    progress: bool = False,
) -> Tokens:
    """Residual streams after each block at every response token of the chosen and the rejected answers.

    Parameters
    ----------
    model, tokenizer, pairs, layers, device, own, formatter, max_length, progress : as for ``read``.
    batch_size, padding_side : change the speed and the memory (a batch's streams of all layers), not the result.
    limit : at most this many tokens. Whole pairs are taken in their order, up to the first that would exceed it: the
        same for every model of a family, since only the pairs and their format count.
    folder : an existing folder for the files that ``Tokens.save`` writes. The streams then go straight to disk.

    Returns
    -------
    ``Tokens``. A response that several rows share (with its prompt) is read and returned once.

    Raises
    ------
    What ``read`` raises; ActivationError if the first pair is over ``limit`` or the streams do not fit on the disk.
    """
    formatter, encoded = _encode(tokenizer, pairs, formatter, max_length)
    sequences, starts, row, side = _distinct_responses(encoded, ("chosen", "rejected"))
    sizes = np.array([len(ids) - start for ids, start in zip(sequences, starts, strict=True)])
    taken = _rows_within(limit, row, sizes, len(encoded))
    within = np.searchsorted(row, taken)  # of the sequences, which come in the order of rows
    sequences, starts, row, side, sizes = (x[:within] for x in (sequences, starts, row, side, sizes))
    bridged = _ready(model, sequences, device, own)
    layers = _check_layers(layers, bridged.cfg.n_layers)

    rows = np.flatnonzero(encoded.kept)[:taken]
    index = _token_index(sequences, starts, row, side) | {"kept": np.isin(np.arange(len(encoded.kept)), rows)}
    ends = sizes.cumsum()
    filling = _Filling((int(ends[-1]), len(layers), bridged.cfg.d_model), index, folder)

    def write(batch, values):
        if not np.isfinite(values).all():
            _refuse(values, layers, rows[row[batch]].repeat(sizes[batch]), pairs, "tokens")
        for i, part in zip(batch, np.split(values, sizes[batch].cumsum()[:-1]), strict=True):
            filling.write(ends[i] - sizes[i], part)

    with filling:
        _run(
            bridged, layers, sequences, starts, "every", write, batch_size=batch_size, pad_id=formatter.pad_id,
            padding_side=padding_side, shown=filling.streams.nbytes if progress else None,
        )  # fmt: skip
        if folder is not None:
            filling.keep()
    streams = filling.streams
    report = dict(encoded.report) | {
        "kept": taken, "beyond_limit": len(encoded) - taken, "tokens": len(streams), "sequences": len(sequences),
        "bytes": streams.nbytes, "dtype": streams.dtype.name,
    }  # fmt: skip
    found = Tokens(streams, layers, prompt_id=encoded.prompt_id[:taken], report=report, **index)
    if folder is None:
        return found
    found._save_facts(folder)
    return Tokens.load(folder)


def _encode(tokenizer, pairs, formatter, max_length=None):
    """The formatter and the encoded pairs."""
    if not hasattr(pairs, "prompt_ids") and (missing := [n for n in ("prompt", "chosen", "rejected", "prompt_id") if n not in pairs.columns]):
        raise ActivationError(f"pairs have no column {missing[0]!r}; preferences.load_pairs makes all that are needed")
    if formatter is not None and max_length is not None:
        raise ActivationError("give max_length or a formatter, which has its own, not both")
    formatter = formatter or Formatter(tokenizer, max_length=max_length)
    return formatter, formatter.encode_pairs(pairs)


def _unique_sequences(prompts, sides, position):
    """Distinct token lists, where their wanted part starts, and the list that each row of each side is read from.

    The wanted part is the last token (position last or prompt) or the whole response (mean or every).
    """
    found, places = {}, []
    for side in sides:
        for prompt, response in zip(prompts, side, strict=True):
            ids = (*prompt, *response)
            start = len(ids) - 1 if position in ("last", "prompt") else len(prompt)
            places.append(found.setdefault((ids, start), len(found)))
    return [list(ids) for ids, _ in found], [start for _, start in found], np.array(places)


def _distinct_responses(encoded, sides):
    """Distinct sequences of prompt and response, their responses' starts, and the first row and side of each.

    In the order of rows and sides: two lists, two int arrays.
    """
    responses = [getattr(encoded, f"{side}_ids") for side in sides]
    sequences, starts, places = _unique_sequences(encoded.prompt_ids, responses, "every")
    found, first = np.unique(places.reshape(len(sides), -1).T, return_index=True)
    order = found[first.argsort()]
    row, side = np.divmod(np.sort(first), len(sides))
    return [sequences[i] for i in order], [starts[i] for i in order], row, side


def _token_index(sequences, starts, row, side) -> dict[str, np.ndarray]:
    """token_id, row, side and place of each response token."""
    responses = [ids[start:] for ids, start in zip(sequences, starts, strict=True)]
    sizes = [len(ids) for ids in responses]
    return {
        "token_id": np.concatenate(responses).astype(np.int32),
        "row": row.repeat(sizes).astype(np.int32),
        "side": side.repeat(sizes).astype(np.int8),
        "place": np.concatenate([np.arange(size) for size in sizes]).astype(np.int32),
    }


def _rows_within(limit, row, sizes, n_rows: int) -> int:
    """How many pairs come before the first whose new tokens exceed the limit; row and sizes are those of sequences."""
    if limit is None:
        return n_rows
    tokens = np.bincount(row, sizes, minlength=n_rows).cumsum()
    taken = int(np.searchsorted(tokens, limit, side="right"))
    if not taken:
        raise ActivationError(f"limit={limit}: the first pair alone has {tokens[0]:.0f} response tokens; raise it")
    return taken


def _run(bridged, layers, sequences, starts, position, write, *, batch_size, pad_id, padding_side, shown) -> None:
    """Run the sequences batch by batch; ``shown`` is the size of the result in bytes for a progress bar, or None.

    write(batch, values) gets int [batch], the sequences, and float32 [batch, layers, d_model], or for the position
    "every" [their tokens, layers, d_model].
    """
    device = _device(bridged)
    picker, options = _Picker(position, device), _only_streams(bridged, layers)
    with _evaluating([bridged], batch_size), _taking(bridged, layers, picker.take) as found:
        for batch in _progress(_batches(sequences, batch_size), shown):
            ids, mask = collate([sequences[i] for i in batch], pad_id, padding_side)
            picker.aim(mask, [starts[i] for i in batch])
            bridged(ids.to(device), attention_mask=mask.to(device), **options)
            write(batch, torch.stack([found[layer] for layer in layers], dim=1).cpu().numpy())


def _batches(sequences, batch_size: int) -> list[np.ndarray]:
    order = np.array(sorted(range(len(sequences)), key=lambda i: -len(sequences[i])))  # too large a batch fails at once
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _device(bridged):
    """Where token ids go in; later blocks of a split model may be elsewhere."""
    return bridged.original_model.get_input_embeddings().weight.device


def _only_streams(bridged, layers) -> dict:
    """Options of a forward pass that goes no further than the layers need."""
    options = {"return_type": None, "use_cache": False}
    if (stop := max(layers) + 1) < bridged.cfg.n_layers:
        options["stop_at_layer"] = stop
    elif "logits_to_keep" in inspect.signature(bridged.original_model.forward).parameters:
        options["logits_to_keep"] = 1  # the head is the largest product of a small model, and nobody reads it
    return options


@contextlib.contextmanager
def _evaluating(models, batch_size: int):
    """No gradients, no dropout; afterwards the models are as they were."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise ActivationError(f"out of GPU memory with batch_size={batch_size}: halve it") from error
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def _ready(model, sequences, device, own):
    """A bridge on the device that can hold the sequences."""
    from transformer_lens.model_bridge import TransformerBridge

    source = model.original_model if isinstance(model, TransformerBridge) else model
    longest, limit = max(map(len, sequences)), source.config.get_text_config().max_position_embeddings
    if longest > limit:
        raise ActivationError(f"a sequence has {longest} tokens, the model takes {limit}: set max_length={limit}")
    highest, rows = max(map(max, sequences)), source.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ActivationError(f"token {highest} is beyond the model's {rows} embeddings: this is not its tokenizer")
    if not isinstance(model, TransformerBridge):
        model = bridge((model if own else copy.deepcopy(model)).to(device or source.device), own=True)
    return model if device is None else model.to(device)


def _check_layers(layers, n_layers: int) -> list[int]:
    asked = range(n_layers) if isinstance(layers, str) and layers == "all" else layers
    asked = [asked] if isinstance(asked, int) else asked
    if isinstance(asked, str) or not len(asked):
        raise ActivationError(f"layers={layers!r}: give 'all' or block indices")
    found = [int(layer) + n_layers * (layer < 0) for layer in asked]
    if len(set(found)) < len(found) or not all(0 <= layer < n_layers for layer in found):
        raise ActivationError(f"layers={layers!r}: give distinct block indices from 0 to {n_layers - 1}")
    return found


def _allocate(shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    if np.dtype(dtype).itemsize * math.prod(shape) <= MEMORY_LIMIT:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the nameless file until the array is gone
        return np.memmap(file, dtype, "w+", shape=shape)


def _progress(steps, size: int | None):
    if size is None:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc=f"{size / 1e6:,.1f} MB of streams", unit="batch", leave=False)


def _wanted_tokens(mask, starts):
    """The tokens of each row of a batch from its start on, counted in its own tokens: bool [batch, longest]."""
    own_index = mask.cumsum(1) - 1  # does not depend on the padding side
    return (own_index >= torch.tensor(starts)[:, None]) & mask.bool()


class _Picker:
    """Takes the wanted position out of a batch's stream, so that the stream itself need not be kept."""

    def __init__(self, position: str, device):
        self.position, self.device = position, device

    def aim(self, mask, starts) -> None:
        """Choose the tokens of each row of a batch."""
        tokens = _wanted_tokens(mask, starts)
        self.index = tokens.int().argmax(1).to(self.device)
        self.tokens = tokens.to(self.device)

    def take(self, stream):
        """float32 [batch, d_model]; for the position "every" [wanted tokens, d_model], row by row."""
        stream = stream.to(self.device)
        if self.position == "every":
            return stream[self.tokens].float()
        if self.position != "mean":
            return stream[torch.arange(len(stream), device=self.device), self.index].float()
        # Padding may hold anything, NaN included: it is left out, not multiplied by zero.
        kept = torch.where(self.tokens[..., None], stream.float(), 0.0)
        return kept.sum(1) / self.tokens.sum(1, keepdim=True)


def _refuse(values, layers, rows, pairs, unit="sequences"):
    """Say where a batch [batch, layers, d_model] first goes wrong; rows are those of its units in the pairs."""
    bad = ~np.isfinite(values).all(-1)
    layer, wrong = min((layer, wrong.tolist()) for layer, wrong in zip(layers, bad.T, strict=True) if wrong.any())
    row = min(row for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong)
    raise ActivationError(
        f"NaN or infinite activations after block {layer} in {sum(wrong)} of {len(rows)} {unit} of a batch, such as "
        f"row {row} (prompt_id {pairs['prompt_id'].iloc[row]}): check the weights, or run in float32 or bfloat16 "
        "instead of float16"
    )


# Splicing ------------------------------------------------------------------------------------------------------------


def spliced_loss(
    models: dict,
    formatter: Formatter,
    pairs: pd.DataFrame,
    layer: int,
    replacements: dict,
    *,
    batch_size: int = 32,
    sides=("chosen",),
    padding_side: str = "right",
) -> pd.DataFrame:
    """Next-token cross-entropy over response tokens when the residual stream after a block is replaced there.

    Only response tokens are replaced, and only predictions made from them are counted: the stream at response token i
    predicts token i + 1, so the end-of-turn token predicts nothing. The prompt's streams stay the model's own.

    Parameters
    ----------
    models : name -> TransformerLens bridge (``bridge``). All read the same token ids.
    layer : block index; the stream after it is replaced.
    replacements : name -> function, or None for the clean run. The function gets the clean streams at the same response
        tokens of all models, {model: float32 [tokens, d_model]}, and returns a dict of the same shapes. It must treat
        each token by itself: which tokens come together depends on the batch.
    sides : whose responses are read: chosen, rejected or both.
    batch_size, padding_side : change the speed, not the result.

    Returns
    -------
    DataFrame, one row a replacement, model and distinct response of two tokens or more, in the order of the pairs:
    replacement, model, prompt_id, tokens (predictions counted), loss (their mean, nats).

    Raises
    ------
    ActivationError for an unknown layer or side, sequences that a model cannot hold, a lack of GPU memory, a
    replacement of another shape, and NaN or infinite streams or losses; PreferenceError if no pair can be formatted.
    """
    if not sides or not set(sides) <= {"chosen", "rejected"}:
        raise ActivationError(f"sides={sides!r}: give 'chosen', 'rejected' or both, in a list")
    _, encoded = _encode(None, pairs, formatter)
    sequences, starts, row, _ = _distinct_responses(encoded, sides)
    counts = np.array([len(ids) - start - 1 for ids, start in zip(sequences, starts, strict=True)])
    rows = np.flatnonzero(encoded.kept)[row]
    models = {name: _ready(model, sequences, None, False) for name, model in models.items()}
    layers = {name: _check_layers([layer], model.cfg.n_layers)[0] for name, model in models.items()}

    losses = np.empty((len(replacements), len(models), len(sequences)))
    with _evaluating(list(models.values()), batch_size):
        for batch in _batches(sequences, batch_size):
            ids, mask = collate([sequences[i] for i in batch], formatter.pad_id, padding_side)
            tokens = _wanted_tokens(mask, [starts[i] for i in batch])
            clean = {name: _streams_at(model, layers[name], ids, mask, tokens) for name, model in models.items()}
            for name, streams in clean.items():
                if not torch.isfinite(streams).all():
                    values, at = streams[:, None].cpu().numpy(), rows[batch].repeat(counts[batch] + 1)
                    _refuse(values, [layers[name]], at, pairs, f"tokens of {name}")
            for number, (what, replace) in enumerate(replacements.items()):
                made = {} if replace is None else _replace(what, replace, clean)
                for place, (name, model) in enumerate(models.items()):
                    loss = _response_loss(model, layers[name], ids, mask, tokens, made.get(name))
                    losses[number, place, batch] = loss
    predicting = counts > 0
    prompt_id = pairs["prompt_id"].to_numpy(str)[rows[predicting]]
    return _loss_table(losses[..., predicting], list(replacements), list(models), prompt_id, counts[predicting])


def _loss_table(losses, replacements, models, prompt_id, counts) -> pd.DataFrame:
    """One row for each of the losses [replacements, models, sequences]; refuses those that are not finite."""
    replacement, model, sequence = np.indices(losses.shape).reshape(3, -1)
    table = pd.DataFrame(
        {
            "replacement": np.array(replacements, dtype=object)[replacement],
            "model": np.array(models, dtype=object)[model],
            "prompt_id": prompt_id[sequence],
            "tokens": counts[sequence],
            "loss": losses.ravel(),
        }
    )
    if len(bad := table[~np.isfinite(table.loss)]):
        replacement, model, prompt, _, loss = bad.iloc[0]
        raise ActivationError(
            f"the loss of model {model!r} under replacement {replacement!r} is {loss} at prompt_id {prompt} "
            f"({len(bad)} of {len(table)} losses are not finite): check the weights after the replaced block"
        )
    return table


def _streams_at(bridged, layer: int, ids, mask, tokens):
    """The clean streams after a block: float32 [tokens, d_model]."""
    device = _device(bridged)
    with _taking(bridged, [layer], lambda stream: stream[tokens.to(stream.device)].float()) as found:
        bridged(ids.to(device), attention_mask=mask.to(device), **_only_streams(bridged, [layer]))
    return found[layer]


def _replace(what: str, replace, clean: dict) -> dict:
    """What a replacement makes of the clean streams, checked."""
    made = replace({name: streams.clone() for name, streams in clean.items()})  # it may work in place
    expected = {name: tuple(streams.shape) for name, streams in clean.items()}
    shapes = {name: tuple(value.shape) for name, value in made.items()} if isinstance(made, dict) else type(made)
    if shapes != expected:
        raise ActivationError(f"replacement {what!r} gave {shapes}, not {expected}: return one tensor for each model")
    for name, streams in made.items():
        if not torch.isfinite(streams).all():
            raise ActivationError(f"replacement {what!r} gave NaN or infinite streams for model {name!r}")
    return made


def _response_loss(bridged, layer: int, ids, mask, tokens, streams=None) -> np.ndarray:
    """Mean nats of the predictions made from response tokens, their streams replaced if given: float64 [batch]."""

    def splice(stream, hook):
        stream = stream.clone()
        stream[tokens.to(stream.device)] = streams.to(stream)
        return stream

    device = _device(bridged)
    # The bridge's start_at_layer computes the blocks before it all the same, so nothing is lost by a whole pass.
    with bridged.hooks(fwd_hooks=[] if streams is None else [(hook_name(layer), splice)]):
        logits = bridged(ids.to(device), attention_mask=mask.to(device), use_cache=False)
    counted = tokens[:, :-1] & tokens[:, 1:]
    made, targets = (x[counted.to(x.device)] for x in (logits[:, :-1], ids[:, 1:].to(logits.device)))
    nats = torch.nn.functional.cross_entropy(made.float(), targets, reduction="none")
    sums = torch.zeros(counted.shape, dtype=torch.float64)
    sums[counted] = nats.cpu().double()
    return (sums.sum(1) / counted.sum(1)).numpy()
