"""TransformerLens bridges of transformers models, and hooks on their residual streams."""

import contextlib
import copy

import numpy as np
import torch

from alignlens.core.errors import ActivationError


def hook_name(layer: int) -> str:
    """Where the residual stream after a block is read, in TransformerLens's names."""
    return f"blocks.{layer}.hook_resid_post"


def bridge(model, *, own: bool = False):
    """A TransformerLens bridge of a transformers causal model, checked against the model itself.

    Bridging changes a model in place: a copy is bridged unless ``own`` says that nobody needs the model afterwards.
    Logits and residual streams of a small batch must agree with the model's own within 1e-4 of their largest value
    (float32; 5e-2 in half precision). Attention becomes eager, so that its hooks fire. Raises ActivationError for an
    unmerged adapter, an architecture without a bridge, or a bridge that disagrees."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module  # noqa: PLC0415  takes seconds

    if hasattr(model, "peft_config"):
        raise ActivationError("the model carries an unmerged adapter: call merge_and_unload() and pass the result")
    name, model = type(model).__name__, (model if own else copy.deepcopy(model)).eval()
    ids = torch.arange(16, device=model.device).reshape(2, 8) * 7919 + 13
    ids %= model.get_input_embeddings().weight.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    try:
        model.set_attn_implementation("eager")
        bridged = build_bridge_from_module(model, name, hf_config=model.config)
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise ActivationError(f"TransformerLens cannot bridge a {name}: {error}") from error
    # transformers gives the last stream only after the final norm, so the logits stand for it.
    inner = range(model.config.get_text_config().num_hidden_layers - 1)
    with torch.inference_mode(), taking(bridged, inner, lambda stream: stream) as streams:
        logits = bridged(ids, attention_mask=mask, use_cache=False)
    checks = {hook_name(layer): (streams.get(layer), expected.hidden_states[layer + 1]) for layer in inner}
    allowed = 1e-4 if torch.finfo(model.dtype).bits >= 32 else 5e-2
    for what, (ours, theirs) in (checks | {"logits": (logits, expected.logits)}).items():
        if ours is None or ours.shape != theirs.shape:
            raise ActivationError(f"the bridge of {name} gives {what} of another shape than transformers")
        # A damaged model is reported where its activations are read; here NaN agrees with NaN.
        ours, theirs = (torch.nan_to_num(value[mask.bool()].double()) for value in (ours, theirs))
        off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
        if off > allowed:
            raise ActivationError(f"the bridge of {name} differs from transformers at {what} by {off:.2g} of its scale")
    return bridged


def ready(model, sequences, layers, *, own: bool = False):
    """The model's bridge (or the model, if it is one), in evaluation mode, and the layers as a list of block indices.

    layers : "all", one or several, negative from the end. ActivationError for others and for token ids it cannot hold.
    """
    source = getattr(model, "original_model", model)
    longest, limit = max(map(len, sequences)), source.config.get_text_config().max_position_embeddings
    if longest > limit:
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
