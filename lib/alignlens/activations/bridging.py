"""TransformerLens bridges of transformers models, and hooks on their residual streams."""

import contextlib
import copy

import numpy as np
import torch

from alignlens.core.errors import ActivationError

SHORT, LONGEST = 32, 600  # tokens that a bridge is checked on; beyond a sliding window, if that takes no more
ALLOWED = 1e-3, 1e-2  # difference of a bridge, of what a block adds in each dimension: float32, half precision
NATIVE = 1e-4, 0.1  # difference of the logits between the model's own and eager attention, of their size


def hook_name(layer: int) -> str:
    """Where the residual stream after a block is read, in TransformerLens's names."""
    return f"blocks.{layer}.hook_resid_post"


def bridge(model, *, own: bool = False):
    """A TransformerLens bridge of a transformers causal model, checked against the model itself.

    A copy is bridged, with eager attention so that its hooks fire, unless ``own`` says that nobody needs the model
    afterwards. On a few tokens, and beyond a sliding window, what each block adds to each dimension, and each logit,
    must be what the eager model gives, to ``ALLOWED`` of its size and rounding; the eager model must agree with the
    given one. Raises ActivationError otherwise, for an unmerged adapter and for an architecture without a bridge."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module  # noqa: PLC0415  takes seconds

    if hasattr(model, "peft_config"):
        raise ActivationError("the model carries an unmerged adapter: call merge_and_unload() and pass the result")
    name, model = type(model).__name__, (model if own else copy.deepcopy(model)).eval()
    batches = _batches(model)
    try:
        given = [_own_streams(model, *batch) for batch in batches]
        model.set_attn_implementation("eager")
        expected = [_own_streams(model, *batch) for batch in batches]
        bridged = build_bridge_from_module(model, name, hf_config=model.config)
        ours = [_streams(bridged, *batch) for batch in batches]
    except Exception as error:  # each architecture's adapter fails in its own way
        raise ActivationError(f"TransformerLens cannot bridge a {name}: {error}") from error
    half = torch.finfo(model.dtype).bits < 32
    for native, eager, mine in zip(given, expected, ours, strict=True):
        off = float((eager["logits"] - native["logits"]).norm() / native["logits"].norm().clamp(min=1e-9))
        if off > NATIVE[half]:
            raise ActivationError(f"the logits of {name} differ between its own and eager attention by {off:.2g}")
        if wrong := _difference(mine, eager, ALLOWED[half], torch.finfo(model.dtype).eps):
            raise ActivationError(f"the bridge of {name} differs from transformers at {wrong}")
    return bridged


def _batches(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and masks to compare on: two sequences, one of them padded, and one beyond a sliding window."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or LONGEST
    sizes, window = [(2, min(SHORT, context))], getattr(config, "sliding_window", None)
    if window and SHORT < window + 16 <= min(LONGEST, context):
        sizes.append((1, window + 16))
    made, rows = [], model.get_input_embeddings().weight.shape[0]
    for shape in sizes:
        ids = (torch.arange(shape[0] * shape[1], device=model.device).reshape(shape) * 7919 + 13) % rows
        mask = torch.ones_like(ids)
        mask[1:, shape[1] * 2 // 3 :] = 0
        made.append((ids, mask))
    return made


def _own_streams(model, ids, mask) -> dict[str, torch.Tensor]:
    """The model's own streams into its first and after each block but the last, and logits: [tokens, dimensions].

    transformers gives the last stream only after the final norm, so the logits stand for it."""
    with torch.inference_mode():
        found = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    names = ["embed", *map(hook_name, range(model.config.get_text_config().num_hidden_layers - 1))]
    streams = dict(zip(names, found.hidden_states, strict=False))
    return _comparable(streams | {"logits": found.logits}, mask)


def _streams(bridged, ids, mask) -> dict[str, torch.Tensor]:
    """The same through a bridge, but for the streams into its first block."""
    layers = range(bridged.cfg.n_layers - 1)
    with torch.inference_mode(), taking(bridged, layers, lambda stream: stream) as streams:
        logits = bridged(ids, attention_mask=mask, use_cache=False)
    return _comparable({hook_name(layer): stream for layer, stream in streams.items()} | {"logits": logits}, mask)


def _comparable(found: dict, mask) -> dict[str, torch.Tensor]:
    """At the last tokens, without padding. A damaged model is reported where it is read; here NaN agrees with NaN."""
    return {name: torch.nan_to_num(values[mask.bool()][-SHORT:].float()) for name, values in found.items()}


def _difference(ours: dict, theirs: dict, share: float, rounding: float) -> str | None:
    """Where two runs differ in any dimension, by root mean squares over tokens: by more than a share of what the block
    adds (of what the logits vary), and twice the rounding of the stream."""
    before = mine = theirs.pop("embed")
    for name, their in theirs.items():
        our = ours.get(name)
        if our is None or our.shape != their.shape:
            return f"{name}, which has another shape"
        if name == "logits":
            before = mine = their.mean(0)
        values = (our - mine) - (their - before), their - before, their
        off, added, whole = (value.square().mean(0).sqrt() for value in values)
        excess, at = (off - share * added - 2 * rounding * whole).max(0)
        if excess > 1e-9:
            return f"{name} by {off[at] / added[at]:.2g} of its scale in dimension {at}"
        before, mine = their, our
    return None


def ready(model, sequences, layers, *, own: bool = False):
    """The model's bridge (or the model, if it is one), in evaluation mode, and the layers as a list of block indices.

    layers : "all", one or several, negative from the end. ActivationError for others and for token ids it cannot hold.
    """
    source = getattr(model, "original_model", model)
    longest, limit = max(map(len, sequences)), getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:  # ALiBi has no limit
        raise ActivationError(f"a sequence has {longest} tokens, the model takes {limit}: set max_length={limit}")
    highest, rows = max(map(max, sequences)), source.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ActivationError(f"token {highest} is beyond the model's {rows} embeddings: this is not its tokenizer")
    bridged = (bridge(model, own=own) if source is model else model).eval()
    count = bridged.cfg.n_layers
    asked = range(count) if isinstance(layers, str) and layers == "all" else np.ravel(layers).tolist()
    found = [layer + count * (layer < 0) for layer in asked if isinstance(layer, int)]
    if not found or len(set(found)) < len(asked) or not set(found) <= set(range(count)):
        raise ActivationError(f"layers={layers!r}: give 'all' or distinct block indices from 0 to {count - 1}")
    return bridged, found


@contextlib.contextmanager
def taking(bridged, layers, take):
    """A dict that holds ``take(stream)`` of each layer after a forward pass; the streams themselves are not kept."""
    found = {}

    def keep(stream, hook):
        found[hook.layer()] = take(stream)

    with bridged.hooks(fwd_hooks=[(hook_name(layer), keep) for layer in layers]):
        yield found


def replacing(layer: int, at, replace):
    """A forward hook: after a block the stream becomes replace(float32 [..., d_model]) at [batch, place] indices."""

    def change(stream, hook):
        stream = stream.clone()
        stream[at] = replace(stream[at].float()).to(stream)
        return stream

    return hook_name(layer), change
