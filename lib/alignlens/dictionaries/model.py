"""Streams side by side, checked once and read in pieces; settings; a trained dictionary and its files."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.sparse import csr_array, vstack

from alignlens.core.errors import DictionaryError
from alignlens.core.store import write_arrays, write_json

ARRAYS = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold")
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


@dataclass(frozen=True)
class Config:
    """How a dictionary is trained; silent latents are revived by an auxiliary loss (Gao et al., arXiv 2406.04093)."""

    width: int = 512  # latents
    k: float = 16  # mean number of latents that fire a row
    activation: str = "batchtopk"  # or "l1": ReLU with penalty l1 x code x sum of decoder norms (Lindsey et al. 2024)
    l1: float = 0.0
    shared: float = 0.0  # share of latents with one decoder row for all streams, trained by the sum of gradients
    epochs: float = 8  # how often each row is seen
    batch_size: int = 512
    steps: int | None = None  # stop after so many
    learning_rate: float = 3e-3  # of Adam; rises linearly over `warmup`, falls over the last `decay` of the steps
    warmup: float = 0.02
    decay: float = 0.3
    aux_weight: float = 0.3  # of the auxiliary loss: silent latents learn to rebuild what the others leave
    aux_k: int = 128  # silent latents a row, at most
    dead_after: int = 5000  # rows without firing after which a latent is silent
    reseed: int = 4  # times, in the middle half of training, that latents which hardly fire start again
    refit: int = 2  # rounds of least squares at the end: decoder angles and norms several times more exact
    seed: int = 0  # of the initial weights and the order of rows
    published: bool = False  # the published study's autoencoder, see `published`


def published(d: int, *, width: int = 16_384, k: float = 64, **changes) -> Config:
    """The published study's autoencoder of a stream with d dimensions (arXiv 2606.09850, SAELens' BatchTopK). Raw
    inputs, decoder rows of norm 0.1 left free, threshold a running mean of the smallest kept code; Adam 3e-4 after a
    warm-up of 100 of about 2,000 steps of 1,024 rows; auxiliary loss 1.0 over d / 2 dead latents."""
    values = {
        "batch_size": 1024, "learning_rate": 3e-4, "warmup": 0.05, "decay": 0.0, "epochs": 1, "aux_weight": 1.0,
        "aux_k": max(1, d // 2), "dead_after": 1_024_000, "reseed": 0, "refit": 0, "seed": 42, "published": True,
    }  # fmt: skip
    return Config(width=width, k=k, **(values | changes))


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A trained dictionary, in the streams' own units: the scale that training used is folded into the float32 weights.
    A code is what the encoder gives where it exceeds the threshold, else 0. Joined decoder rows have norm 1."""

    encoder: np.ndarray  # [D, w]
    encoder_bias: np.ndarray  # [w]
    decoder: np.ndarray  # [w, D]
    decoder_bias: np.ndarray  # [D]
    threshold: np.ndarray  # [w]
    shapes: dict[str, tuple[int, ...]]  # stream -> (d,) or (layers, d)
    config: Config
    history: pd.DataFrame = field(default_factory=pd.DataFrame)  # one row a log step
    facts: dict = field(default_factory=dict)  # where it was trained (hook names, model fingerprints), see `load`

    @property
    def width(self) -> int:
        return len(self.threshold)

    def codes(self, streams) -> csr_array:
        """Codes, sparse float32 [rows, width]. They depend on their own row only, so batches may be cut anywhere."""
        return vstack([self.code(x) for x in join(streams, self.shapes).chunks()], format="csr")

    def code(self, x: torch.Tensor) -> csr_array:
        """Codes [n, width] of joined rows [n, D]."""
        pre = torch.addmm(torch.from_numpy(self.encoder_bias), x, torch.from_numpy(self.encoder))
        places = torch.nonzero((pre > torch.from_numpy(self.threshold)) & (pre > 0)).T.numpy()
        return csr_array((pre.numpy()[*places], tuple(places)), shape=pre.shape)

    def decode(self, codes) -> np.ndarray:
        """Joined rows, float32 [n, D], rebuilt from codes [n, width], dense or sparse."""
        return (codes @ self.decoder + self.decoder_bias).astype(np.float32)

    def reconstruct(self, streams) -> dict[str, np.ndarray]:
        """Each stream as the dictionary rebuilds it: float32 of its shape."""
        return self.split(self.decode(self.codes(streams)))

    def split(self, joined: np.ndarray) -> dict[str, np.ndarray]:
        """[..., D] -> stream -> [..., (layers,) d]."""
        parts = np.split(joined, np.cumsum([math.prod(s) for s in self.shapes.values()])[:-1], axis=-1)
        return {n: p.reshape(*p.shape[:-1], *s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def rows(self) -> dict[str, np.ndarray]:
        """Decoder rows: stream -> float32 [width, (layers,) d]."""
        return self.split(self.decoder)

    def save(self, folder: str | Path, *, half: bool = False) -> None:
        """Write dictionary.safetensors and dictionary.json into an existing folder; half : large weights in float16,
        codes then differ in the third digit. Raises DictionaryError for a weight too large for float16."""
        small = ("encoder", "decoder") if half else ()
        arrays = {name: getattr(self, name).astype(np.float16 if name in small else np.float32) for name in ARRAYS}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise DictionaryError("a weight is too large for float16: save with half=False")
        write_arrays(Path(folder) / "dictionary.safetensors", arrays)
        words = {"shapes": self.shapes, "config": self.config, "facts": self.facts}
        write_json(Path(folder) / "dictionary.json", words | {"history": self.history.to_dict("list")})

    @classmethod
    def load(cls, folder: str | Path, *, expect: dict | None = None) -> "Dictionary":
        """Read what ``save`` wrote; expect : facts that must agree, such as {"hook": "blocks.3.hook_resid_post"}.
        Raises DictionaryError for missing or damaged files, and for facts that differ, naming both values."""
        try:
            arrays = {n: a.float().numpy() for n, a in load_file(Path(folder) / "dictionary.safetensors").items()}
            words = json.loads((Path(folder) / "dictionary.json").read_text(encoding="utf-8"))
            words["shapes"] = {name: tuple(shape) for name, shape in words["shapes"].items()}
            words |= {"config": Config(**words["config"]), "history": pd.DataFrame(words["history"])}
            found = cls(**arrays, **words)
        except (OSError, ValueError, SafetensorError, AttributeError, KeyError, TypeError) as error:
            raise DictionaryError(f"{folder} holds no readable dictionary of this version: {error!r}") from error
        check_facts(found.facts, expect or {}, folder)
        return found


def check_facts(facts: dict, expect: dict, where) -> None:
    """Raise DictionaryError unless every expected fact is there and equal."""
    for name, value in expect.items():
        if facts.get(name) != value:
            told = f"trained with {name} {facts.get(name)!r}, not {value!r}: read it there, or train one here"
            raise DictionaryError(f"the dictionary in {where} was {told}")
