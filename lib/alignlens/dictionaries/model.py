"""A trained dictionary: codes, reconstructions, files."""

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
from alignlens.dictionaries.config import Config
from alignlens.dictionaries.streams import join

ARRAYS = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold")


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A trained dictionary, in the streams' own units: the scale that training used is folded into the weights.

    encoder [D, w], encoder_bias [w], decoder [w, D], decoder_bias [D], threshold [w] : float32. A code is what the
    encoder gives where it exceeds the threshold, else 0; with all streams joined, decoder rows have norm 1.
    shapes : stream -> (d,) or (layers, d). config. history : one row a log step. facts : where it was trained (hook
    names, model fingerprints), checked by ``load``.
    """

    encoder: np.ndarray
    encoder_bias: np.ndarray
    decoder: np.ndarray
    decoder_bias: np.ndarray
    threshold: np.ndarray
    shapes: dict[str, tuple[int, ...]]
    config: Config
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    facts: dict = field(default_factory=dict)

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
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = np.split(joined, ends[:-1], axis=-1)
        return {n: p.reshape(*p.shape[:-1], *s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def rows(self) -> dict[str, np.ndarray]:
        """Decoder rows: stream -> float32 [width, (layers,) d]."""
        return self.split(self.decoder)

    def save(self, folder: str | Path, *, half: bool = False) -> None:
        """Write dictionary.safetensors and dictionary.json into an existing folder.

        half : store encoder and decoder in float16 (biases and thresholds stay float32): half the size, and codes that
        differ in the third digit. Raises DictionaryError if a weight does not fit into float16.
        """
        small = ("encoder", "decoder") if half else ()
        arrays = {name: getattr(self, name).astype(np.float16 if name in small else np.float32) for name in ARRAYS}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise DictionaryError("a weight is too large for float16: save with half=False")
        write_arrays(Path(folder) / "dictionary.safetensors", arrays)
        words = {"shapes": self.shapes, "config": self.config, "facts": self.facts}
        write_json(Path(folder) / "dictionary.json", words | {"history": self.history.to_dict("list")})

    @classmethod
    def load(cls, folder: str | Path, *, expect: dict | None = None) -> "Dictionary":
        """Read what ``save`` wrote.

        expect : facts that must agree, such as {"hook": "blocks.3.hook_resid_post", "models": {...}}: a dictionary
        read at another hook or on another model gives codes that mean nothing.
        Raises DictionaryError for missing or damaged files, and for facts that differ, naming both values.
        """
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
