"""The published crosscoder (SPARC, arXiv 2606.09850), kept to its formulas beside our own in `dictionaries`.

Two streams of activations, base and aligned, [rows, d] or [rows, layers, d], with an encoder and a decoder per stream
and layer and one mask of latents for all. `published` numbers follow the formulas; what we measure instead has its own
name (`r2`, `dead_share`) or the switch `corrected=True`. Not kept: bf16 autocast (all float32) and checkpoints. Shapes
below: s streams (base, aligned), n rows, l layers, d dimensions, w latents (width)."""

from alignlens.dictionaries import STREAMS
from alignlens.published.sparc.training import Config, Sparc, quality, train

from alignlens.published.sparc.reading import (  # isort: skip
    CLASSES, FIXED, SHARED, classify, feature_sharing_ratio, labels, shared_geometry, superposition,
)  # fmt: skip

__all__ = [
    "CLASSES", "FIXED", "SHARED", "STREAMS", "Config", "Sparc", "classify", "feature_sharing_ratio", "labels",
    "quality", "shared_geometry", "superposition", "train",
]  # fmt: skip
