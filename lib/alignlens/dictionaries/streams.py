"""Streams side by side: checked once, then read in pieces, so that arrays on disk stay there."""

import math

import numpy as np
import torch

from alignlens.core.errors import DictionaryError

STREAMS = ("base", "aligned")
CHUNK = 4096  # rows read at once outside training


class Joined:
    """Streams side by side, [rows, D]."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def read(self, which) -> torch.Tensor:
        """float32 [rows, D] of a slice or of indices."""
        parts = [np.asarray(a[which], np.float32).reshape(-1, math.prod(a.shape[1:])) for a in self.arrays]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def chunks(self, which: np.ndarray | None = None):
        """All rows, or those of the given indices, piece by piece."""
        which = np.arange(len(self)) if which is None else which
        for start in range(0, len(which), CHUNK):
            yield self.read(which[start : start + CHUNK])


def join(streams, shapes: dict | None = None) -> Joined:
    """Checked streams in the order of ``shapes``, those that a dictionary reads. Raises DictionaryError."""
    if not isinstance(streams, dict) or not streams:
        raise DictionaryError('streams must map names to arrays, such as {"base": x, "aligned": y}')
    if set(streams) != set(shapes or streams):
        raise DictionaryError(f"streams are {', '.join(streams)}; this dictionary reads {', '.join(shapes)}")
    streams = {name: streams[name] for name in shapes or streams}
    first = next(iter(streams))
    for name, x in streams.items():
        if getattr(x, "ndim", 0) not in (2, 3) or 0 in x.shape:
            problem = f"has shape {np.shape(x)}; give [rows, d] or [rows, layers, d]"
        elif len(x) != len(streams[first]):
            problem = f"has {len(x)} rows, {first!r} has {len(streams[first])}: row i must be one token in all streams"
        elif shapes and tuple(x.shape[1:]) != tuple(shapes[name]):
            problem = f"has rows of shape {tuple(x.shape[1:])}, not {tuple(shapes[name])}"
        elif len(wrong := np.flatnonzero(~np.concatenate([p.isfinite().all(1) for p in Joined([x]).chunks()]))):
            problem = f"holds NaN or infinite values in row {wrong[0]}: leave such tokens out, or check the model"
        else:
            continue
        raise DictionaryError(f"stream {name!r} {problem}")
    return Joined(list(streams.values()))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [..., d] at norm 1; rows of zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def moments(joined: Joined) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square about it of each dimension, float64 [D]."""
    first = joined.read(slice(0, CHUNK)).double().mean(0)  # shifts the sums, so that large means cost no digits
    total, square = torch.zeros_like(first), torch.zeros_like(first)
    for x in (chunk.double() - first for chunk in joined.chunks()):
        total += x.sum(0)
        square += x.square().sum(0)
    mean = total / len(joined)
    return mean + first, (square / len(joined) - mean.square()).clamp(min=0)
