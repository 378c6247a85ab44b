"""Dictionaries of sparse latents over named streams: one stream is a sparse autoencoder, two are a crosscoder.

A dictionary writes the streams of one token as a sparse sum of latents. All streams share the code; each has its own
decoder row per latent, so the length and direction of a latent's rows say in which stream it lives. A stream is
[rows, d], or [rows, layers, d] for a window of layers, whose latents then live in several layers.

Training is BatchTopK (Bussmann et al., arXiv 2412.06410; for crosscoders Minder et al., arXiv 2504.02922): the k x rows
largest codes of a batch are kept. The kept codes are a few percent of all, so only the encoder's product is dense; the
decoder and every gradient are computed on the kept codes alone, in closed form.

Inside, shapes are written with n rows, D all dimensions of all streams, w latents (width).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from alignlens.core.errors import DictionaryError
from alignlens.core.store import write_arrays, write_json

STREAMS = ("base", "aligned")
LARGE, SMALL = ("encoder", "decoder"), ("encoder_bias", "decoder_bias", "threshold")
CHUNK = 4096  # rows read at once outside training
IN_MEMORY = 2 * 2**30  # bytes of training rows above which they stay where they are and are gathered batch by batch


@dataclass(frozen=True)
class Config:
    """How a dictionary is trained.

    width : latents. k : mean number of latents that fire a row.
    activation : "batchtopk", or "l1" (ReLU with a penalty of ``l1`` x code x sum of decoder norms, Lindsey et al.
    2024).
    shared : share of latents that have one and the same decoder row in all streams, trained by the sum of gradients.
    epochs, batch_size : how often each row is seen, and how many at once. steps : stop after so many.
    learning_rate : of Adam, with a linear rise over ``warmup`` and a linear fall over the last ``decay`` of the steps.
    aux_weight, aux_k, dead_after : latents silent for ``dead_after`` rows, at most ``aux_k`` a row, learn to rebuild
        what the others leave (Gao et al., arXiv 2406.04093).
    reseed : how often, between a quarter and three quarters of the training, latents that hardly fire start again from
        directions that the error's rows share (see ``_shared_directions``).
    refit : rounds, at the end, of least squares: the codes of each row on the latents that fire there, then the
    decoder.
        An encoder's codes are blurred by the other latents of the row; these are not, so angles and norms come out
        several times more exactly, at the same error.
    seed : of the initial weights and the order of rows.
    published : the published study's autoencoder (arXiv 2606.09850, SAELens' BatchTopK): raw inputs, decoder rows of
        norm 0.1 left free, threshold as a running mean of the smallest kept code; see ``published``.
    """

    width: int = 512
    k: float = 16
    activation: str = "batchtopk"
    l1: float = 0.0
    shared: float = 0.0
    epochs: float = 8
    batch_size: int = 512
    steps: int | None = None
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.3
    aux_weight: float = 0.3
    aux_k: int = 128
    dead_after: int = 5000
    reseed: int = 4
    refit: int = 2
    seed: int = 0
    published: bool = False


def published(d: int, *, width: int = 16_384, k: float = 64, **changes) -> Config:
    """The published study's autoencoder of a stream with d dimensions (arXiv 2606.09850).

    Adam 3e-4, constant after 100 of about 2,000 steps of 1,024 rows, auxiliary loss 1.0 over d / 2 dead latents.
    """
    values = {
        "batch_size": 1024, "learning_rate": 3e-4, "warmup": 0.05, "decay": 0.0, "epochs": 1, "aux_weight": 1.0,
        "aux_k": max(1, d // 2), "dead_after": 1_024_000, "reseed": 0,
        "refit": 0, "seed": 42, "published": True,
    }  # fmt: skip
    return Config(width=width, k=k, **(values | changes))


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

    def encode(self, streams) -> np.ndarray:
        """Codes, float32 [rows, width]. They depend on their own row only, so batches may be cut anywhere."""
        return self.codes(streams).toarray()

    def codes(self, streams) -> csr_array:
        """Codes as a sparse matrix [rows, width]: what a wide dictionary over many rows needs."""
        joined = _joined(streams, self.shapes)
        parts = [self._code(joined.read(slice(i, i + CHUNK))) for i in range(0, len(joined), CHUNK)]
        values, columns, counts = (np.concatenate(part) for part in zip(*parts, strict=True))
        starts = np.concatenate([[0], np.cumsum(counts)])
        return csr_array((values, columns, starts), shape=(len(joined), self.width))

    def _code(self, x: torch.Tensor):
        pre = torch.addmm(torch.from_numpy(self.encoder_bias), x, torch.from_numpy(self.encoder))
        rows, columns = torch.nonzero((pre > torch.from_numpy(self.threshold)) & (pre > 0), as_tuple=True)
        counts = torch.bincount(rows, minlength=len(x))
        return pre[rows, columns].numpy(), columns.numpy().astype(np.int32), counts.numpy()

    def decode(self, codes) -> dict[str, np.ndarray]:
        """Streams rebuilt from codes [rows, width], dense or sparse: float32 of the streams' shapes."""
        return self._split((codes @ self.decoder + self.decoder_bias).astype(np.float32))

    def reconstruct(self, streams) -> dict[str, np.ndarray]:
        """Each stream as the dictionary rebuilds it: float32 of its shape."""
        return self.decode(self.codes(streams))

    def _split(self, joined: np.ndarray) -> dict[str, np.ndarray]:
        """[..., D] -> stream -> [..., (layers,) d]."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = np.split(joined, ends[:-1], axis=-1)
        return {n: p.reshape(*p.shape[:-1], *s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def rows(self) -> dict[str, np.ndarray]:
        """Decoder rows: stream -> float32 [width, (layers,) d]."""
        return self._split(self.decoder)

    def save(self, folder: str | Path, *, half: bool = False) -> None:
        """Write dictionary.safetensors and dictionary.json into an existing folder.

        half : store encoder and decoder in float16 (biases and thresholds stay float32): half the size, and codes that
        differ in the third digit. Raises DictionaryError if a weight does not fit into float16.
        """
        arrays = {name: getattr(self, name) for name in (*LARGE, *SMALL)}
        if half:
            arrays |= {name: arrays[name].astype(np.float16) for name in LARGE}
            if not all(np.isfinite(arrays[name]).all() for name in LARGE):
                raise DictionaryError("a weight is too large for float16: save with half=False")
        write_arrays(Path(folder) / "dictionary.safetensors", arrays)
        words = {"shapes": self.shapes, "config": self.config, "facts": self.facts}
        write_json(Path(folder) / "dictionary.json", words | {"history": self.history.to_dict("list")})

    @classmethod
    def load(cls, folder: str | Path, *, expect: dict | None = None) -> Dictionary:
        """Read what ``save`` wrote.

        expect : facts that must agree, such as {"hook": "blocks.3.hook_resid_post", "models": {...}}: a dictionary
        read at another hook or on another model gives codes that mean nothing.
        Raises DictionaryError for missing or damaged files, and for facts that differ, naming both values.
        """
        try:
            arrays = {n: a.float().numpy() for n, a in load_file(Path(folder) / "dictionary.safetensors").items()}
            words = json.loads((Path(folder) / "dictionary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise DictionaryError(f"{folder} holds no readable dictionary: {error}") from error
        try:
            shapes = {name: tuple(shape) for name, shape in words["shapes"].items()}
            rest = {"config": Config(**words["config"]), "history": pd.DataFrame(words["history"])}
            found = cls(**arrays, shapes=shapes, **rest, facts=words["facts"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DictionaryError(f"{folder} holds no dictionary of this version: {error!r}") from error
        check_facts(found.facts, expect or {}, folder)
        return found


def check_facts(facts: dict, expect: dict, where) -> None:
    """Raise DictionaryError unless every expected fact is there and equal."""
    for name, value in expect.items():
        if facts.get(name) != value:
            raise DictionaryError(
                f"the dictionary in {where} was trained with {name} {facts.get(name)!r}, not {value!r}: "
                "read it there, or train one here"
            )


# Reading streams -----------------------------------------------------------------------------------------------------


class _Joined:
    """Streams side by side, [rows, D], read in pieces: arrays on disk stay there."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def read(self, which) -> torch.Tensor:
        """float32 [rows, D] of a slice or of indices."""
        parts = [np.asarray(a[which], np.float32).reshape(-1, math.prod(a.shape[1:])) for a in self.arrays]
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))


def _joined(streams, shapes: dict | None = None) -> _Joined:
    if not isinstance(streams, dict) or not streams:
        raise DictionaryError('streams must map names to arrays, such as {"base": x, "aligned": y}')
    if shapes is not None and list(streams) != list(shapes):
        if set(streams) != set(shapes):
            raise DictionaryError(f"streams are {', '.join(streams)}; this dictionary reads {', '.join(shapes)}")
        streams = {name: streams[name] for name in shapes}
    first = next(iter(streams))
    for name, x in streams.items():
        if getattr(x, "ndim", 0) not in (2, 3) or 0 in x.shape:
            raise DictionaryError(f"stream {name!r} has shape {np.shape(x)}; give [rows, d] or [rows, layers, d]")
        if len(x) != len(streams[first]):
            raise DictionaryError(
                f"stream {name!r} has {len(x)} rows, {first!r} has {len(streams[first])}: "
                "row i must be the same token in all streams"
            )
        if shapes is not None and tuple(x.shape[1:]) != tuple(shapes[name]):
            raise DictionaryError(f"stream {name!r} has rows of shape {x.shape[1:]}, not {tuple(shapes[name])}")
        for start in range(0, len(x), CHUNK):
            part = np.asarray(x[start : start + CHUNK])
            wrong = ~np.isfinite(part).reshape(len(part), -1).all(1)
            if wrong.any():
                raise DictionaryError(
                    f"stream {name!r} holds NaN or infinite values in row {start + int(wrong.argmax())}: "
                    "leave such tokens out, or check the model"
                )
    return _Joined(list(streams.values()))


def _moments(joined: _Joined) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square about it of each dimension, float64 [D]."""
    first = joined.read(slice(0, CHUNK)).double().mean(0)  # shifts the sums, so that large means cost no digits
    total, square = torch.zeros_like(first), torch.zeros_like(first)
    for start in range(0, len(joined), CHUNK):
        x = joined.read(slice(start, start + CHUNK)).double() - first
        total += x.sum(0)
        square += x.square().sum(0)
    mean = total / len(joined)
    return mean + first, (square / len(joined) - mean.square()).clamp(min=0)


# Training ------------------------------------------------------------------------------------------------------------


def train(
    streams,
    config: Config | None = None,
    *,
    facts: dict | None = None,
    device: str = "cpu",
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Dictionary:
    """Train a dictionary on named streams.

    Parameters
    ----------
    streams : name -> [rows, d] or [rows, layers, d], row i the same token in all; float16 or float32, memory-mapped
        arrays are read batch by batch. {"base": x} is a sparse autoencoder, {"base": x, "aligned": y} a crosscoder.
    facts : kept with the dictionary, for ``Dictionary.load`` to check.
    checkpoint : a file in which an interrupted training finds its state again; removed at the end. The result is the
        same to the bit as without interruption.

    Raises
    ------
    DictionaryError for streams that do not fit each other, hold NaN, or are fewer rows than a batch; for settings out
    of range; and if training diverges.
    """
    config = config or Config()
    joined = _joined(streams)
    shapes = {name: tuple(x.shape[1:]) for name, x in streams.items()}
    _check(config, len(joined), shapes)
    mean, variance = _moments(joined)
    sizes = [d for shape in shapes.values() for d in [shape[-1]] * (1 if len(shape) == 1 else shape[0])]
    if config.published:
        mean, scale = torch.zeros_like(mean), torch.ones_like(mean)
    else:  # every stream and layer gets the same energy, or the layer with the largest norm would be all that counts
        energy = [part.sum().sqrt() for part in variance.split(sizes)]
        energy = [e if e > 0 else torch.ones_like(e) for e in energy]  # constant: rounding must not be blown up
        scale = torch.cat([e.expand(size) for e, size in zip(energy, sizes, strict=True)])
    rows = _Rows(joined, mean.float(), scale.float(), device)
    trainer = _Trainer(rows, shapes, config, device)
    trainer.run(progress, Path(checkpoint) if checkpoint else None)
    return _finish(trainer, rows, shapes, config, facts or {})


def _check(config: Config, rows: int, shapes: dict) -> None:
    problems = {
        "activation must be batchtopk or l1": config.activation not in ("batchtopk", "l1"),
        f"k {config.k} must lie between 0 and width {config.width}": not 0 < config.k <= config.width,
        f"{rows} rows cannot fill a batch of {config.batch_size}: give more rows or a smaller batch_size": rows
        < config.batch_size,
        "learning_rate, epochs, batch_size and steps must be positive": min(
            config.learning_rate, config.epochs, config.batch_size, 1 if config.steps is None else config.steps
        )
        <= 0,
        "shared must lie between 0 and 1, and be 0 for one stream": not 0 <= config.shared <= 1
        or (config.shared and len(shapes) == 1),
        f"shared must be 0 for streams of different shapes {shapes}": config.shared and len(set(shapes.values())) > 1,
        "warmup and decay must lie between 0 and 1": not (0 <= config.warmup <= 1 and 0 <= config.decay <= 1),
    }
    for words, wrong in problems.items():
        if wrong:
            raise DictionaryError(f"dictionary config: {words}")


class _Rows:
    """Centred and scaled training rows, in memory if they fit; batches in an order that each epoch draws anew."""

    def __init__(self, joined: _Joined, mean, scale, device: str):
        self.joined, self.mean, self.scale, self.device = joined, mean, scale, device
        self.held = None
        if 4 * len(joined) * len(mean) <= IN_MEMORY:
            self.held = (joined.read(slice(None)) - mean) / scale

    def __len__(self) -> int:
        return len(self.joined)

    def order(self, epoch: int, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return torch.randperm(len(self), generator=draw)

    def take(self, which: torch.Tensor) -> torch.Tensor:
        x = self.held[which] if self.held is not None else (self.joined.read(which.numpy()) - self.mean) / self.scale
        return x.to(self.device)


class _Codes:
    """Kept codes of a batch: row, column and value of each, ordered by row."""

    def __init__(self, rows, columns, values, shape):
        self.rows, self.columns, self.values, self.shape = rows, columns, values, shape

    @property
    def dense(self) -> bool:
        """Whether so many codes are kept that plain matrices are faster, as with the L1 penalty."""
        return len(self.values) > 0.1 * math.prod(self.shape)

    def matrix(self, values=None) -> torch.Tensor:
        """[n, w] of the codes, or of other values at their places, sparse unless ``dense``."""
        values = self.values if values is None else values
        if self.dense:
            return torch.zeros(self.shape, device=values.device).index_put_((self.rows, self.columns), values)
        return _csr(self.rows, self.columns, values, self.shape)

    def along(self, gradient: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
        """Products of each code's row of ``gradient`` [n, D] and its latent's decoder row: [codes]."""
        if self.dense:
            return (gradient @ decoder.T)[self.rows, self.columns]
        return (gradient[self.rows] * decoder[self.columns]).sum(1)

    def transposed(self, values=None) -> torch.Tensor:
        """[w, n], sparse unless ``dense``."""
        values = self.values if values is None else values
        if self.dense:
            return self.matrix(values).T
        order = torch.argsort(self.columns, stable=True)
        return _csr(self.columns[order], self.rows[order], values[order], self.shape[::-1])


def _csr(rows, columns, values, shape) -> torch.Tensor:
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():  # torch says once a process that such tensors are in beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


class _Trainer:
    """Weights, optimiser and counters of one training; ``step`` is the whole algorithm."""

    def __init__(self, rows: _Rows, shapes, config: Config, device: str):
        self.rows, self.config, self.device = rows, config, device
        self.sizes = [math.prod(shape) for shape in shapes.values()]
        draw = torch.Generator().manual_seed(config.seed)
        # All streams start with the same decoder row: what differs afterwards, the data made differ.
        same = len(set(self.sizes)) == 1
        start = [torch.randn(config.width, size, generator=draw) for size in (self.sizes[:1] if same else self.sizes)]
        decoder = torch.cat(start * len(self.sizes) if same else start, dim=1)
        decoder /= decoder.norm(dim=1, keepdim=True) / (0.1 if config.published else 1.0)
        self.decoder = decoder.to(device)
        self.encoder = self.decoder.clone()  # [w, D]: a latent's row is contiguous, as the sparse gradients want it
        self.encoder_bias = torch.zeros(config.width, device=device)
        self.decoder_bias = torch.zeros(decoder.shape[1], device=device)
        self.silent = torch.zeros(config.width, dtype=torch.int64, device=device)
        self.threshold, self.at, self.log = 0.0, 0, []
        done = np.linspace(0.25, 0.75, config.reseed) if config.reseed > 1 else np.full(config.reseed, 0.5)
        self.tied = round(config.shared * config.width)
        batches = len(rows) // config.batch_size
        self.batches, self.steps = batches, min(config.steps or 2**62, max(1, round(config.epochs * batches)))
        self.reseed_at = {max(1, int(share * self.steps)) for share in done}
        names = ("encoder", "decoder", "encoder_bias", "decoder_bias")
        self.weights = [getattr(self, name).requires_grad_() for name in names]
        self.optimizer = torch.optim.Adam(self.weights, lr=config.learning_rate, fused=True)

    @torch.no_grad()
    def run(self, progress: bool, checkpoint: Path | None) -> None:
        if checkpoint and checkpoint.exists():
            self._resume(checkpoint)
        order, every = None, max(1, self.steps // 50)
        bar = _progress(self.steps, self.at, progress)
        while self.at < self.steps:
            epoch, place = divmod(self.at, self.batches)
            if order is None or place == 0:
                order = self.rows.order(epoch, self.config.seed)
            size = self.config.batch_size
            if self.at in self.reseed_at:
                self._reseed(order)
            found = self.step(self.rows.take(order[place * size : (place + 1) * size]))
            if self.at % every == 0 or self.at == self.steps - 1:
                if not math.isfinite(found["loss"]):
                    raise DictionaryError(
                        f"training diverged at step {self.at} (learning_rate {self.config.learning_rate}): lower it"
                    )
                self.log.append({"step": self.at, **found})
                if checkpoint and self.at % (10 * every) == 0 and self.at:
                    self.at += 1
                    self._keep(checkpoint)
                    self.at -= 1
            self.at += 1
            bar.update()
        bar.close()
        if checkpoint:
            checkpoint.unlink(missing_ok=True)
            _beside(checkpoint).unlink(missing_ok=True)

    def step(self, x: torch.Tensor) -> dict:
        """One batch: keep the largest codes, follow the gradient of the squared error at them. Returns the losses."""
        config, n = self.config, len(x)
        rise = min(1.0, (self.at + 1) / (config.warmup * self.steps + 1))
        fall = min(1.0, (self.steps - self.at) / (config.decay * self.steps)) if config.decay else 1.0
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * rise * fall

        # As in SAELens, the published autoencoder takes the decoder's bias off its input.
        seen = x - self.decoder_bias if config.published else x
        pre = torch.addmm(self.encoder_bias, seen, self.encoder.T)
        codes = self._keep_largest(pre)
        error = x - self.decoder_bias - codes.matrix() @ self.decoder
        gradient = error * (-2.0 / n)
        to_code = codes.along(gradient, self.decoder)
        self.decoder.grad = codes.transposed() @ gradient
        if config.activation == "l1":
            to_code = self._penalise(codes, to_code, n)
        self.encoder.grad = codes.transposed(to_code) @ seen
        self.encoder_bias.grad = torch.zeros_like(self.encoder_bias).index_add_(0, codes.columns, to_code)
        self.decoder_bias.grad = gradient.sum(0)

        self.silent += n
        self.silent[codes.columns] = 0
        if config.aux_weight:
            self._revive(seen, pre, error)
        if config.published:  # the bias that was taken off the input, for both losses
            self.decoder_bias.grad -= self.encoder_bias.grad @ self.encoder
        self._project()
        self.optimizer.step()
        if not config.published:
            self.decoder /= self.decoder.norm(dim=1, keepdim=True)
        dead = int((self.silent > config.dead_after).sum())
        return {"loss": float(error.square().sum(1).mean()), "l0": len(codes.values) / n, "dead": dead}

    def _keep_largest(self, pre: torch.Tensor) -> _Codes:
        """The k x n largest positive codes of the batch; all positive ones with the L1 penalty."""
        wanted = int(self.config.k * len(pre))
        weigh = self.decoder.norm(dim=1) if self.config.published else None  # else the rows have norm 1
        score = pre * weigh if weigh is not None else pre
        # Most codes lie far below the last threshold: looking at the others alone saves sorting the whole batch.
        rows, columns = torch.nonzero(score > 0.6 * self.threshold, as_tuple=True)
        if self.config.activation == "batchtopk":
            if len(rows) < wanted:
                rows, columns = torch.nonzero(score > 0, as_tuple=True)
            values = score[rows, columns]
            if len(values) > wanted:
                cut = values.kthvalue(len(values) - wanted).values
                rows, columns = rows[values > cut], columns[values > cut]
                smallest = float(cut)
            else:
                smallest = 0.0
            self.threshold = 0.99 * self.threshold + 0.01 * smallest if self.config.published and self.at else smallest
        return _Codes(rows, columns, pre[rows, columns], tuple(pre.shape))

    def _penalise(self, codes: _Codes, to_code, n: int):
        """Gradient of l1 x code x (sum of the streams' decoder norms): shrinks codes, favours exclusive latents."""
        parts = self.decoder.split(self.sizes, dim=1)
        norms = torch.stack([part.norm(dim=1) for part in parts], dim=1)
        mean_code = torch.zeros_like(self.encoder_bias).index_add_(0, codes.columns, codes.values) / n
        direction = torch.cat([p / m.clamp(min=1e-6)[:, None] for p, m in zip(parts, norms.T, strict=True)], dim=1)
        weight = self.config.l1 * min(1.0, (self.at + 1) / (0.2 * self.steps))
        self.decoder.grad += weight * mean_code[:, None] * direction
        return to_code + weight / n * norms.sum(1)[codes.columns]

    def _revive(self, seen, pre, error) -> None:
        """Add the gradient of the auxiliary loss: dead latents rebuild the error that the live ones leave."""
        dead = torch.nonzero(self.silent > self.config.dead_after)[:, 0]
        if not len(dead):
            return
        count = min(self.config.aux_k, len(dead))
        weight = self.config.aux_weight
        if self.config.published:
            weight *= min(1.0, len(dead) / self.config.aux_k)
        values, places = pre[:, dead].topk(count, dim=1)
        codes = torch.zeros(len(pre), len(dead), device=self.device).scatter_(1, places, values.relu())
        gradient = (error - codes @ self.decoder[dead]) * (-2.0 * weight / len(pre))
        to_code = (gradient @ self.decoder[dead].T) * (codes > 0)
        self.decoder.grad.index_add_(0, dead, codes.T @ gradient)
        self.encoder.grad.index_add_(0, dead, to_code.T @ seen)
        self.encoder_bias.grad.index_add_(0, dead, to_code.sum(0))

    def _reseed(self, order: torch.Tensor) -> None:
        """Start latents that hardly fire again where the others leave a common error."""
        x = self.rows.take(order[:RESEED_ROWS])
        pre = torch.addmm(self.encoder_bias, x, self.encoder.T)
        rows, columns = torch.nonzero(pre > max(self.threshold, 1e-9), as_tuple=True)
        codes = _Codes(rows, columns, pre[rows, columns], tuple(pre.shape))
        del pre
        fired = torch.bincount(columns, minlength=self.config.width)
        free = torch.nonzero(fired[self.tied :] < RARE)[:MOST, 0] + self.tied
        if not len(free):
            return
        error = x - self.decoder_bias
        error -= _on_support(error, codes, self.decoder).matrix() @ self.decoder
        if not 0 < float(error.square().sum()) < math.inf:  # nothing is left to explain, or the training diverged
            return
        draw = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.at)
        found = _shared_directions(error, len(free), draw)
        # The same direction twice, or one that a live latent has already, would only be split.
        known = self.decoder[fired >= RARE]
        alike = (found @ torch.cat([known, found]).T) > TWIN
        alike[:, len(known) :] = torch.tril(alike[:, len(known) :], -1)
        found = found[~alike.any(1)]
        free = free[: len(found)]
        self.encoder[free] = self.decoder[free] = found
        # They begin by firing on the rows that lie furthest along them, not on every row that leans their way.
        if len(found):
            along = x @ found.T
            self.encoder_bias[free] = self.threshold - along.kthvalue(max(1, len(x) - SHARING), dim=0).values
        self.silent[free] = 0
        for weight in self.weights[:3]:
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][moment][free] = 0

    def _project(self) -> None:
        if self.tied:  # designated shared latents: one row for all streams, moved by the sum of its gradients
            tied = self.decoder.grad[: self.tied]
            tied[:] = sum(tied.split(self.sizes, dim=1)).repeat(1, len(self.sizes))
        if not self.config.published:  # no step along the row: its length is the code's business
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad -= along * self.decoder

    # Checkpoints: plain tensors, so no pickle is needed.

    def _keep(self, path: Path) -> None:
        state = {"silent": self.silent, "seen": self._seen()}
        for i, weight in enumerate(self.weights):
            found = self.optimizer.state[weight]
            state[f"{i}.weight"] = weight.detach()
            state |= {f"{i}.first": found["exp_avg"], f"{i}.second": found["exp_avg_sq"]}
        words = {"at": self.at, "threshold": self.threshold, "log": self.log, "config": dataclasses.asdict(self.config)}
        beside = _beside(path)
        save_file({n: t.contiguous() for n, t in state.items()}, beside, metadata={"state": json.dumps(words)})
        beside.replace(path)

    def _seen(self) -> torch.Tensor:
        """A few training rows, by which a checkpoint knows its data."""
        return self.rows.take(self.rows.order(-3, self.config.seed)[:16])

    def _resume(self, path: Path) -> None:
        from safetensors import safe_open

        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                words = json.loads(file.metadata()["state"])
                state = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, TypeError, KeyError, SafetensorError):
            path.unlink()  # half a checkpoint is worth nothing; training starts over
            return
        if words["config"] != dataclasses.asdict(self.config) or not torch.equal(state["seen"], self._seen()):
            raise DictionaryError(f"the checkpoint {path} belongs to another training: delete it")
        self.at, self.threshold, self.log = words["at"], words["threshold"], words["log"]
        self.silent = state["silent"]
        for i, weight in enumerate(self.weights):
            weight.copy_(state[f"{i}.weight"])
            moments = {"exp_avg": state[f"{i}.first"], "exp_avg_sq": state[f"{i}.second"]}
            self.optimizer.state[weight] = moments | {"step": torch.tensor(float(self.at), device=self.device)}


def _beside(path: Path) -> Path:
    """Where a checkpoint is written before it is renamed into its place."""
    return path.with_name(path.name + ".part")


RESEED_ROWS = 32_768
RARE = 5  # firings in RESEED_ROWS below which a latent is free to start again: about the density that reads as dead
TWIN = 0.8  # cosine
MOST = 1024  # latents started again at once
SHARING = 50  # rows that must have a direction in common before a latent starts from it


def _on_support(target: torch.Tensor, codes: _Codes, decoder: torch.Tensor, rounds: int = 15) -> _Codes:
    """Codes that rebuild each row best with the latents that fire on it, by projected gradient steps.

    target [n, D] : rows without the decoder's bias; decoder rows have norm 1.
    """
    out = torch.empty_like(codes.values)
    places = torch.searchsorted(codes.rows, torch.arange(0, len(target) + 512, 512, device=codes.rows.device))
    for i, (first, last) in enumerate(itertools.pairwise(places.tolist())):  # small pieces stay in the cache
        x, columns = target[512 * i : 512 * (i + 1)], codes.columns[first:last]
        rows, values = codes.rows[first:last] - 512 * i, codes.values[first:last]
        latents = decoder[columns]
        for _ in range(rounds):
            error = x - _csr(rows, columns, values, (len(x), len(decoder))) @ decoder
            # Below 1 because latents that fire together overlap; 15 such steps leave under 1 % of what is to be gained.
            values = (values + 0.7 * (error[rows] * latents).sum(1)).clamp(min=0)
        out[first:last] = values
    return _Codes(codes.rows, codes.columns, out, codes.shape)


def _shared_directions(error: torch.Tensor, count: int, draw: torch.Generator, rounds: int = 10):
    """Unit directions [count, D] along which some rows of the error lie far out: candidates for missing latents.

    From single rows, drawn by their energy, by power iteration over the ``SHARING`` rows that lie furthest along each
    direction: a sparse direction is a fixed point of that step, a mixture is not.
    """
    energy = error.square().sum(1).cpu()
    few = count > int((energy > 0).sum())
    start = torch.multinomial(energy, count, replacement=few, generator=draw)
    found = error[start]
    found = found / found.norm(dim=1, keepdim=True).clamp(min=1e-12)
    for part in range(0, count, 256):
        v = found[part : part + 256]
        for _ in range(rounds):
            along = (error @ v.T).relu()
            along *= along > along.kthvalue(max(1, len(along) - SHARING), dim=0).values
            v = along.T @ error
            v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-12)
        found[part : part + 256] = v
    return found


def _progress(steps: int, done: int, shown: bool):
    from tqdm.auto import tqdm

    return tqdm(total=steps, initial=done, desc="dictionary", unit="step", leave=False, disable=not shown)


CALIBRATION_ROWS = 65_536


@torch.no_grad()
def _finish(trainer: _Trainer, rows: _Rows, shapes, config: Config, facts: dict) -> Dictionary:
    """Calibrate the threshold, refit the decoder, fold centre and scale into the weights."""
    encoder, decoder = trainer.encoder.detach().cpu(), trainer.decoder.detach().cpu()
    encoder_bias, decoder_bias = trainer.encoder_bias.detach().cpu(), trainer.decoder_bias.detach().cpu()
    mean, scale = rows.mean, rows.scale
    # One fixed threshold must fire as often as the batches' own did; the rows are a sample in a fixed order.
    sample = rows.order(-1, config.seed)[:CALIBRATION_ROWS]
    bias = encoder_bias - encoder @ decoder_bias if config.published else encoder_bias
    threshold = trainer.threshold
    if config.activation == "batchtopk" and not config.published:
        threshold = _threshold(rows, sample, encoder, bias, config.k)
    # Fold: code(x) with x in its own units, and a decoder whose rows have norm 1 there.
    norms = (decoder * scale).norm(dim=1).clamp(min=1e-12)
    weigh = decoder.norm(dim=1).clamp(min=1e-12) if config.published else torch.ones(config.width)
    folded = Dictionary(
        encoder=((encoder / scale) * norms[:, None]).T.contiguous().numpy(),
        encoder_bias=((bias - (encoder / scale) @ mean) * norms).numpy(),
        decoder=((decoder * scale) / norms[:, None]).numpy(),
        decoder_bias=(decoder_bias * scale + mean).numpy(),
        threshold=(threshold / weigh * norms).numpy(),
        shapes=shapes,
        config=config,
        history=pd.DataFrame(trainer.log),
        facts=facts,
    )
    return _refit(folded, rows.joined, scale, rows.order(-2, config.seed), config.refit) if config.refit else folded


def _threshold(rows: _Rows, sample, encoder, bias, k: float) -> float:
    """The value above which k codes a row lie, over the sampled rows."""
    wanted, kept = int(k * len(sample)), torch.empty(0)
    for part in sample.split(CHUNK):
        pre = torch.addmm(bias, rows.take(part).cpu(), encoder.T).flatten()
        kept = torch.cat([kept, pre[pre > (kept.min() if len(kept) == wanted else 0)]])
        if len(kept) > wanted:
            kept = kept.topk(wanted, sorted=False).values
    return float(kept.min()) if len(kept) == wanted else 0.0


def _refit(dictionary: Dictionary, joined: _Joined, scale, order: torch.Tensor, rounds: int) -> Dictionary:
    """Decoder rows that rebuild a sample of rows best, codes being solved for on the latents that fire.

    A ridge towards the trained rows decides what the data leave open: how latents that fire together share a direction.
    Where most is left open (few rows for the width, codes far from sparse) the result would rebuild worse than the
    trained rows, by the codes as the encoder gives them: then these stay. facts["refit"] says which it was.
    """
    w = dictionary.width
    sample = np.sort(order[: min(REFIT_ROWS_A_LATENT * w, REFIT_ROWS)].numpy())
    decoder, bias = (torch.from_numpy(a.copy()) for a in (dictionary.decoder, dictionary.decoder_bias))
    for _ in range(rounds):
        unit = decoder / scale  # codes are solved for in training's units, where each stream and layer counts the same
        norms = unit.norm(dim=1).clamp(min=1e-12)
        gram, product = np.zeros((w + 1, w + 1)), np.zeros((w + 1, decoder.shape[1]))
        for start in range(0, len(sample), CHUNK):
            x = joined.read(sample[start : start + CHUNK])
            values, columns, counts = (torch.from_numpy(part) for part in dictionary._code(x))
            places = torch.repeat_interleave(torch.arange(len(x)), counts)
            columns = columns.long()
            codes = _Codes(places, columns, values * norms[columns], (len(x), w))
            codes = _on_support((x - bias) / scale, codes, unit / norms[:, None])
            at = (codes.rows.numpy(), codes.columns.numpy())
            matrix = csr_array((codes.values.double().numpy(), at), codes.shape)
            gram[:w, :w] += (matrix.T @ matrix).toarray()
            gram[w, :w] += matrix.sum(0)
            gram[w, w] += len(x)
            product[:w] += matrix.T @ x.double().numpy()
            product[w] += x.double().sum(0).numpy()
        gram[:w, w] = gram[w, :w]
        live = np.flatnonzero(np.diag(gram)[:w] > 0)
        solve = np.append(live, w)
        inner = gram[np.ix_(solve, solve)]
        ridge = RIDGE * np.diag(inner)[:-1].mean()
        inner[np.diag_indices(len(live))] += ridge
        before = (decoder / norms[:, None]).numpy()[live]  # a row as a code of training's units is multiplied with
        before = np.vstack([ridge * before, np.zeros((1, decoder.shape[1]))])
        solved = np.linalg.solve(inner, product[solve] + before)
        rows = solved[:-1] / np.maximum(np.linalg.norm(solved[:-1], axis=1, keepdims=True), 1e-12)
        decoder[live], bias = torch.from_numpy(rows).float(), torch.from_numpy(solved[-1]).float()
    # Rows keep norm 1 in training's units, where streams and layers count the same; in their own the codes take it up.
    stretch = (torch.from_numpy(dictionary.decoder) / scale).norm(dim=1) / (decoder / scale).norm(dim=1)
    codes = {name: getattr(dictionary, name) * stretch.numpy() for name in ("encoder", "encoder_bias", "threshold")}
    found = dataclasses.replace(dictionary, decoder=decoder.numpy(), decoder_bias=bias.numpy(), **codes)
    x = joined.read(sample[:CHUNK])
    before, after = (_energy_left(d, x, scale) for d in (dictionary, found))
    better = after <= WORSE * before
    return dataclasses.replace(found if better else dictionary, facts=dictionary.facts | {"refit": bool(better)})


def _energy_left(dictionary: Dictionary, x: torch.Tensor, scale) -> float:
    """Squared error of rows [n, D] in training's units."""
    values, columns, counts = dictionary._code(x)
    codes = csr_array((values, columns, np.concatenate([[0], np.cumsum(counts)])), shape=(len(x), dictionary.width))
    rebuilt = torch.from_numpy((codes @ dictionary.decoder + dictionary.decoder_bias).astype(np.float32))
    return float(((x - rebuilt) / scale).square().sum())


WORSE = 1.05  # error after refitting over error before, above which the trained rows stay
REFIT_ROWS = 98_304  # at most
RIDGE = 0.1  # of the mean code energy of a latent
REFIT_ROWS_A_LATENT = 64  # enough that a latent's row is the mean of many firings


# Measuring -----------------------------------------------------------------------------------------------------------


def evaluate(dictionary: Dictionary, streams) -> dict:
    """How well a dictionary rebuilds held-out streams, over all rows at once.

    Returns
    -------
    dict of floats. r2 : 1 - squared error / squared deviation from the per-dimension mean of these rows, so a constant
    scores 0 (the published measure divides by one scalar variance and lets a constant score high); cosine : mean cosine
    of a row and its reconstruction; l2_ratio : mean ratio of their norms; each also per stream (``r2_base`` ...), the
    plain ones being means over streams. l0 : mean latents that fire a row. dead_share : latents that fire on no row.
    """
    joined = _joined(streams, dictionary.shapes)
    mean, variance = _moments(joined)
    sums = {name: dict.fromkeys(("error", "cosine", "ratio"), 0.0) for name in dictionary.shapes}
    fired, active = np.zeros(dictionary.width, bool), 0
    for start in range(0, len(joined), CHUNK):
        x = joined.read(slice(start, start + CHUNK))
        values, columns, counts = dictionary._code(x)
        codes = csr_array((values, columns, np.concatenate([[0], np.cumsum(counts)])), shape=(len(x), dictionary.width))
        fired[columns] = True
        active += len(values)
        rebuilt = dictionary.decode(codes)
        for name, real in dictionary._split(x.numpy()).items():
            a, b = (v.reshape(len(x), -1).astype(np.float64) for v in (real, rebuilt[name]))
            long, short = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
            sums[name]["error"] += np.square(a - b).sum()
            sums[name]["cosine"] += ((a * b).sum(1) / np.maximum(long * short, 1e-12)).sum()
            sums[name]["ratio"] += (short / np.maximum(long, 1e-12)).sum()
    spread = {n: float(v.sum()) for n, v in dictionary._split(variance.numpy()).items()}
    n, out = len(joined), {}
    for name, found in sums.items():
        out[f"r2_{name}"] = 1 - found["error"] / max(n * spread[name], 1e-12)
        out[f"cosine_{name}"], out[f"l2_ratio_{name}"] = found["cosine"] / n, found["ratio"] / n
    for what in ("r2", "cosine", "l2_ratio"):
        out[what] = float(np.mean([out[f"{what}_{name}"] for name in dictionary.shapes]))
    return {**{k: float(v) for k, v in out.items()}, "l0": active / n, "dead_share": float(1 - fired.mean())}


def match(first: Dictionary, second: Dictionary, *, alive=None) -> pd.DataFrame:
    """One-to-one pairing of two dictionaries' latents by the cosine of their decoder rows (Hungarian matching).

    alive : (bool [width], bool [width]), which latents take part; by default all. Streams are joined, each scaled to
    the first dictionary's mean row norm, so no stream outweighs another. Returns latent, partner, cosine, by cosine.
    Raises DictionaryError if the dictionaries read streams of other shapes.
    """
    if first.shapes != second.shapes:
        shapes = f"{first.shapes} and {second.shapes}"
        raise DictionaryError(f"dictionaries read {shapes}: only equal streams can be matched")
    alive = alive or (np.ones(first.width, bool), np.ones(second.width, bool))
    both = [{n: r.reshape(len(r), -1) for n, r in d.rows().items()} for d in (first, second)]
    size = {name: max(np.linalg.norm(r, axis=1).mean(), 1e-12) for name, r in both[0].items()}
    joined = [np.concatenate([r[name] / size[name] for name in size], axis=1) for r in both]
    rows = [r[keep] for r, keep in zip(joined, alive, strict=True)]
    units = [r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-12) for r in rows]
    cosine = units[0] @ units[1].T
    i, j = linear_sum_assignment(-cosine)
    indices = [np.flatnonzero(keep) for keep in alive]
    table = pd.DataFrame({"latent": indices[0][i], "partner": indices[1][j], "cosine": cosine[i, j].astype(float)})
    return table.sort_values("cosine", ascending=False, ignore_index=True)


# Reading a crosscoder ------------------------------------------------------------------------------------------------

LABELS = ("dead", "base_only", "aligned_only", "shared_same", "shared_rotated", "shared_attenuated")


@dataclass(frozen=True)
class Cuts:
    """Where labels begin: one set for all runs, fixed before any was read.

    dead : a latent that fires on a smaller share of rows (or fewer than ``few`` of them) is dead: too rare to read.
    exclusive : rho below it is base_only, above 1 - it aligned_only (a norm ratio of 4), if latent scaling agrees.
    scaling : nu of the other stream must lie below it, or that stream does hold the latent and it is no exclusive one.
    rotated : degrees between the two decoder rows from which a shared latent counts as rotated.
    attenuated : norm ratio (of the weaker to the stronger) below which it counts as attenuated.
    """

    dead: float = 1e-4
    few: int = 10
    exclusive: float = 0.2
    scaling: float = 0.5
    rotated: float = 20.0
    attenuated: float = 0.8


CUTS = Cuts()


def classify(dictionary: Dictionary, streams, *, cuts: Cuts = CUTS) -> pd.DataFrame:
    """Which latents base and aligned share, and how; one row a latent of a crosscoder on streams base and aligned.

    Returns
    -------
    DataFrame, one row a latent. rho : |aligned row| / (|base row| + |aligned row|); theta : cosine of the two rows, and
    ``degrees``, its angle; ratio : |aligned row| / |base row|; density : share of rows on which the latent fires.
    nu_base, nu_aligned : latent scaling (Minder et al., arXiv 2504.02922): how much of the latent, read along the
    *other* stream's row, stands in this stream all the same, relative to the other stream: the larger of ``_error``
    (what the reconstruction left out) and ``_reconstruction`` (what other latents write instead). Near 0 for a latent
    that this stream truly lacks, near 1 where the latent was only not written. label : see ``LABELS`` and ``Cuts``;
    rotation is asked before attenuation. attrs["cuts"] holds the cuts.

    A window's norms are taken over all its layers. Raises DictionaryError if the streams are not base and aligned.
    """
    if set(dictionary.shapes) != set(STREAMS) or len(set(dictionary.shapes.values())) > 1:
        raise DictionaryError(
            f"classify compares the streams base and aligned; this dictionary reads {', '.join(dictionary.shapes)}"
        )
    joined = _joined(streams, dictionary.shapes)
    rows = {name: r.reshape(dictionary.width, -1).astype(np.float64) for name, r in dictionary.rows().items()}
    norm = {name: np.linalg.norm(r, axis=1) for name, r in rows.items()}
    both = np.maximum(norm["base"] * norm["aligned"], 1e-24)
    theta = np.clip((rows["base"] * rows["aligned"]).sum(1) / both, -1, 1)
    fired, nu = _latent_scaling(dictionary, joined, rows)
    table = pd.DataFrame(
        {
            "latent": np.arange(dictionary.width),
            "rho": norm["aligned"] / np.maximum(norm["base"] + norm["aligned"], 1e-24),
            "theta": theta,
            "degrees": np.degrees(np.arccos(theta)),
            "ratio": norm["aligned"] / np.maximum(norm["base"], 1e-12),
            "density": fired / len(joined),
            **nu,
        }
    )
    table["label"] = label(table, len(joined), cuts)
    table.attrs["cuts"] = dataclasses.asdict(cuts)
    return table


def label(table: pd.DataFrame, n_rows: int, cuts: Cuts = CUTS) -> np.ndarray:
    """Labels [latents] of a ``classify`` table under any cuts: what a sensitivity analysis varies."""
    weaker = np.minimum(table.ratio, 1 / table.ratio.clip(lower=1e-12))
    rules = {
        "dead": (table.density < cuts.dead) | (table.density * n_rows < cuts.few),
        "base_only": (table.rho < cuts.exclusive) & (table.nu_aligned < cuts.scaling),
        "aligned_only": (table.rho > 1 - cuts.exclusive) & (table.nu_base < cuts.scaling),
        # A row too short to be read has no direction: an exclusive-looking latent that scaling contradicts is
        # attenuated.
        "shared_rotated": (table.degrees > cuts.rotated) & table.rho.between(cuts.exclusive, 1 - cuts.exclusive),
        "shared_attenuated": weaker < cuts.attenuated,
    }
    return np.select(list(rules.values()), list(rules), "shared_same")


def _latent_scaling(dictionary: Dictionary, joined: _Joined, rows: dict) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(rows on which each latent fires, name -> nu [width]), from sums over rows in one pass.

    For a latent with codes f and a unit row u, beta of a target Y [n, d] is f'Y u / f'f: the multiple of f u that
    explains Y best. Targets: the stream's error with this latent left out of its reconstruction, and the centred
    reconstruction itself. nu is the beta of the tested stream over that of the other, u being the other's row.
    """
    w = dictionary.width
    fired, energy, total = np.zeros(w), np.zeros(w), np.zeros(w)
    sums = {(name, what): np.zeros_like(r) for name, r in rows.items() for what in ("error", "reconstruction")}
    bias = {name: b.reshape(-1).astype(np.float64) for name, b in dictionary._split(dictionary.decoder_bias).items()}
    for start in range(0, len(joined), CHUNK):
        x = joined.read(slice(start, start + CHUNK))
        values, columns, counts = dictionary._code(x)
        values = values.astype(np.float64)
        codes = csr_array((values, columns, np.concatenate([[0], np.cumsum(counts)])), shape=(len(x), w))
        fired += np.bincount(columns, minlength=w)
        energy += np.bincount(columns, weights=values**2, minlength=w)
        total += np.bincount(columns, weights=values, minlength=w)
        for name, real in dictionary._split(x.numpy()).items():
            rebuilt = codes @ rows[name]
            sums[name, "error"] += codes.T @ (real.reshape(len(x), -1) - rebuilt - bias[name])
            sums[name, "reconstruction"] += codes.T @ rebuilt
    for name, r in rows.items():  # latents that merely fire at the same time by chance share no covariance
        sums[name, "reconstruction"] -= np.outer(total, total @ r) / len(joined)
    energy = np.maximum(energy, 1e-12)
    nu = {}
    for name, other in (STREAMS, STREAMS[::-1]):
        unit = rows[other] / np.maximum(np.linalg.norm(rows[other], axis=1, keepdims=True), 1e-12)
        for what in ("error", "reconstruction"):
            beta = {stream: (sums[stream, what] * unit).sum(1) / energy for stream in STREAMS}
            if what == "error":
                beta = {stream: value + (rows[stream] * unit).sum(1) for stream, value in beta.items()}
            below = np.where(np.abs(beta[other]) < 1e-9, np.nan, beta[other])
            nu[f"nu_{name}_{what}"] = np.where(fired > 0, beta[name] / below, np.nan)
        nu[f"nu_{name}"] = np.fmax(nu[f"nu_{name}_error"], nu[f"nu_{name}_reconstruction"])
    return fired, nu
