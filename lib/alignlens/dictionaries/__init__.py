"""Dictionaries of sparse latents over named streams: one stream is a sparse autoencoder, two are a crosscoder.

All streams share the code of a token; each has its own decoder row per latent, so the length and direction of a
latent's rows say in which stream it lives. A stream is [rows, d], or [rows, layers, d] for a window of layers, whose
latents then live in several layers. Shapes below: n rows, D all dimensions of all streams, w latents (width)."""

from alignlens.dictionaries.evaluating import CUTS, LABELS, Cuts, classify, evaluate, label, match
from alignlens.dictionaries.model import STREAMS, Config, Dictionary, check_facts, published, unit
from alignlens.dictionaries.training import train

__all__ = [
    "CUTS", "LABELS", "STREAMS", "Config", "Cuts", "Dictionary", "check_facts", "classify", "evaluate", "label",
    "match", "published", "train", "unit",
]  # fmt: skip
