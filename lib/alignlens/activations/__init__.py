"""Residual streams of preference pairs, read through TransformerLens after a block (``blocks.{i}.hook_resid_post``).

``read`` takes one vector per response, ``read_tokens`` one per response token; ``spliced_loss`` puts others in their
place. ``ready`` gives the bridge, ``Sequences`` batches, a ``Batch`` streams, logits and scores, ``replacing`` a hook.
"""

from alignlens.activations.bridging import bridge, hook_name, ready, replacing
from alignlens.activations.reading import POSITIONS, Activations, Tokens, estimate, high_norm, read, read_tokens
from alignlens.activations.running import Batch, Sequences, evaluating, spliced_loss

__all__ = [
    "POSITIONS", "Activations", "Batch", "Sequences", "Tokens", "bridge", "estimate", "evaluating",
    "high_norm", "hook_name", "read", "read_tokens", "ready", "replacing", "spliced_loss",
]  # fmt: skip
