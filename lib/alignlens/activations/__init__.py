"""Residual streams of preference pairs, read through TransformerLens after a block (``blocks.{i}.hook_resid_post``).

``read`` takes one vector per response and layer, ``read_tokens`` one per response token; nothing else is kept while the
model runs. ``spliced_loss`` puts other streams in their place. For other experiments: ``ready`` gives the bridge,
``Sequences`` the batches, a ``Batch`` its streams, logits and scores, ``replacing`` a hook.
"""

from alignlens.activations.bridging import bridge, hook_name, ready, replacing
from alignlens.activations.reading import POSITIONS, Activations, Tokens, estimate, high_norm, read, read_tokens
from alignlens.activations.running import Batch, Sequences, evaluating, spliced_loss

__all__ = [
    "POSITIONS", "Activations", "Batch", "Sequences", "Tokens", "bridge", "estimate", "evaluating",
    "high_norm", "hook_name", "read", "read_tokens", "ready", "replacing", "spliced_loss",
]  # fmt: skip
