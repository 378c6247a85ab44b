"""Residual streams of preference pairs, read through TransformerLens.

One vector per response and layer: the residual stream after a block (``blocks.{i}.hook_resid_post``) at one position.
Only that vector is kept while the model runs, so memory is bounded by the batch and by the result itself.
"""

import contextlib
import copy
import inspect
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file

from alignlens.errors import ActivationError
from alignlens.preferences import Formatter, collate
from alignlens.store import write_arrays, write_json

POSITIONS = ("last", "mean", "prompt")
MEMORY_LIMIT = 4 * 2**30  # bytes of result above which it is kept in a temporary file instead of memory
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # share of the largest value, bridge against transformers
HALF_TOLERANCE = 5e-2


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
        if layer not in self.layers:
            raise ActivationError(f"layer {layer} was not read; these were: {self.layers}")
        place = self.layers.index(layer)
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
        except (OSError, ValueError) as error:
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
    if missing := [name for name in ("prompt", "chosen", "rejected", "prompt_id") if name not in pairs.columns]:
        raise ActivationError(f"pairs have no column {missing[0]!r}; preferences.load_pairs makes all that are needed")
    if formatter is not None and max_length is not None:
        raise ActivationError("give max_length or a formatter, which has its own, not both")
    formatter = formatter or Formatter(tokenizer, max_length=max_length)
    encoded = formatter.encode_pairs(pairs)
    rows, prompt_id = np.flatnonzero(encoded.kept), pairs["prompt_id"].to_numpy(str)[encoded.kept]
    sequences, starts, places = _unique_sequences(encoded, position)
    bridged = _ready(model, sequences, device, own)
    device = bridged.original_model.get_input_embeddings().weight.device
    layers = _check_layers(layers, bridged.cfg.n_layers)

    # By causality the prompt's stream does not depend on the response: it is read once and shared by both sides.
    out = _allocate((len(places), len(layers), bridged.cfg.d_model))
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # too large a batch fails at once
    members = pd.Series(places).groupby(places).indices  # sequence -> its rows of the result
    stop = max(layers) + 1
    options = {"return_type": None, "use_cache": False}
    if stop < bridged.cfg.n_layers:
        options["stop_at_layer"] = stop
    elif "logits_to_keep" in inspect.signature(bridged.original_model.forward).parameters:
        options["logits_to_keep"] = 1  # the head is the largest product of a small model, and nobody reads it
    picker = _Picker(position, device)
    steps = _progress(range(0, len(order), batch_size), progress, f"{out.nbytes / 1e6:,.1f} MB of streams")
    training = bridged.training
    bridged.eval()
    try:
        with torch.inference_mode(), _taking(bridged, layers, picker.take) as found:
            for first in steps:
                batch = order[first : first + batch_size]
                ids, mask = collate([sequences[i] for i in batch], formatter.pad_id, padding_side)
                picker.aim(mask, [starts[i] for i in batch])
                bridged(ids.to(device), attention_mask=mask.to(device), **options)
                values = torch.stack([found[layer] for layer in layers], dim=1).cpu().numpy()
                targets = [members[i] for i in batch]
                if not np.isfinite(values).all():
                    _refuse(values, layers, [rows[target[0] % len(rows)] for target in targets], pairs)
                out[np.concatenate(targets)] = values.repeat([len(target) for target in targets], axis=0)
    except torch.cuda.OutOfMemoryError as error:
        raise ActivationError(f"out of GPU memory with batch_size={batch_size}: halve it") from error
    finally:
        bridged.train(training)
    report = dict(encoded.report) | {"sequences": 2 * len(rows), "sequences_read": len(sequences)}
    chosen, rejected = out[: len(rows)], out[-len(rows) :]
    return Activations(chosen, rejected, layers, prompt_id, position, encoded.kept, report)


def _unique_sequences(encoded, position):
    """Distinct token lists, where their wanted part starts, and the list that each row of the result is read from."""
    found, places = {}, []
    sides = [encoded.chosen_ids, encoded.rejected_ids] if position != "prompt" else [[[]] * len(encoded.prompt_ids)]
    for side in sides:
        for prompt, response in zip(encoded.prompt_ids, side, strict=True):
            ids = (*prompt, *response)
            start = len(prompt) if position == "mean" else len(ids) - 1
            places.append(found.setdefault((ids, start), len(found)))
    return [list(ids) for ids, _ in found], [start for _, start in found], np.array(places)


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


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    if 4 * np.prod(shape) <= MEMORY_LIMIT:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the nameless file until the array is gone
        return np.memmap(file, np.float32, "w+", shape=shape)


def _progress(steps, shown: bool, words: str):
    if not shown:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc=words, unit="batch", leave=False)


class _Picker:
    """Takes the wanted position out of a batch's stream, so that the stream itself need not be kept."""

    def __init__(self, position: str, device):
        self.mean, self.device = position == "mean", device

    def aim(self, mask, starts) -> None:
        """Choose the tokens of each row of a batch from its start on, counted in its own tokens."""
        own_index = mask.cumsum(1) - 1  # does not depend on the padding side
        tokens = (own_index >= torch.tensor(starts)[:, None]) & mask.bool()
        self.index = tokens.int().argmax(1).to(self.device)
        self.tokens = tokens.to(self.device)

    def take(self, stream):
        """float32 [batch, d_model]."""
        stream = stream.to(self.device)
        if not self.mean:
            return stream[torch.arange(len(stream), device=self.device), self.index].float()
        # Padding may hold anything, NaN included: it is left out, not multiplied by zero.
        kept = torch.where(self.tokens[..., None], stream.float(), 0.0)
        return kept.sum(1) / self.tokens.sum(1, keepdim=True)


def _refuse(values, layers, rows, pairs):
    """Say where a batch [batch, layers, d_model] first goes wrong; rows are those of its sequences in the pairs."""
    bad = ~np.isfinite(values).all(-1)
    layer, wrong = min((layer, wrong.tolist()) for layer, wrong in zip(layers, bad.T, strict=True) if wrong.any())
    row = min(row for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong)
    raise ActivationError(
        f"NaN or infinite activations after block {layer} in {sum(wrong)} of {len(rows)} sequences of a batch, such as "
        f"row {row} (prompt_id {pairs['prompt_id'].iloc[row]}): check the weights, or run in float32 or bfloat16 "
        "instead of float16"
    )
