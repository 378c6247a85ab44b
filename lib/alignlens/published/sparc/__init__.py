"""The published crosscoder (SPARC), kept to its formulas beside our own dictionary in `dictionaries`.

A crosscoder reads two streams of activations, base and aligned, with one encoder each, switches the same latents on in
both, and writes each stream back with its own decoder. Comparing the two decoder rows of a latent (rho: whose is
longer; theta: do they point the same way) gives its class. Source of everything here unless a docstring says otherwise:
arXiv 2606.09850. `published` numbers follow its formulas; what we measure instead has its own name (`r2`, `dead_share`)
or the switch `corrected=True`. Not kept: bf16 autocast (all float32) and checkpoints.

Streams are [rows, d] (one layer) or [rows, layers, d] (a window: an encoder and a decoder per layer, one mask).
Inside, shapes are written with s streams (base, aligned), n rows, l layers, d dimensions, w latents (width).
"""

from alignlens.dictionaries import STREAMS
from alignlens.published.sparc.classes import CLASSES, FIXED, SHARED, classify, feature_sharing_ratio, labels
from alignlens.published.sparc.relations import shared_geometry, superposition
from alignlens.published.sparc.training import Config, Sparc, quality, train

__all__ = [
    "CLASSES", "FIXED", "SHARED", "STREAMS", "Config", "Sparc", "classify", "feature_sharing_ratio", "labels",
    "quality", "shared_geometry", "superposition", "train",
]  # fmt: skip
