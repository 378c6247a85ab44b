"""Dictionaries of sparse latents over named streams: one stream is a sparse autoencoder, two are a crosscoder.

A dictionary writes the streams of one token as a sparse sum of latents. All streams share the code; each has its own
decoder row per latent, so the length and direction of a latent's rows say in which stream it lives. A stream is
[rows, d], or [rows, layers, d] for a window of layers, whose latents then live in several layers. Inside, shapes are
written with n rows, D all dimensions of all streams, w latents (width).
"""

from alignlens.dictionaries.config import Config, published
from alignlens.dictionaries.evaluating import evaluate, match
from alignlens.dictionaries.labels import CUTS, LABELS, Cuts, classify, label
from alignlens.dictionaries.model import Dictionary, check_facts
from alignlens.dictionaries.streams import STREAMS, unit
from alignlens.dictionaries.training import train

__all__ = [
    "CUTS", "LABELS", "STREAMS", "Config", "Cuts", "Dictionary", "check_facts", "classify", "evaluate", "label",
    "match", "published", "train", "unit",
]  # fmt: skip
