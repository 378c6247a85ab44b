"""Residual streams of preference pairs, read through TransformerLens: after a block (``blocks.{i}.hook_resid_post``).

``read`` takes one vector per response and layer, ``read_tokens`` one per response token and layer; nothing else is kept
while the model runs, so memory is bounded by the batch and by the result itself. ``spliced_loss`` puts other streams in
their place and measures what that does to the model's predictions. For other experiments: ``ready`` gives the bridge,
``Sequences`` the batches, a ``Batch`` its streams, logits and scores, ``replacing`` a hook.
"""

from alignlens.activations.bridging import bridge, hook_name, ready, replacing
from alignlens.activations.reading import POSITIONS, Activations, estimate, read
from alignlens.activations.running import Batch, Sequences, evaluating
from alignlens.activations.splicing import spliced_loss
from alignlens.activations.tokens import Tokens, high_norm, read_tokens

__all__ = [
    "POSITIONS", "Activations", "Batch", "Sequences", "Tokens", "bridge", "estimate", "evaluating",
    "high_norm", "hook_name", "read", "read_tokens", "ready", "replacing", "spliced_loss",
]  # fmt: skip
