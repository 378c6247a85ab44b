"""Training the published crosscoder, and how well it rebuilds."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from alignlens.core.errors import DictionaryError
from alignlens.dictionaries.model import STREAMS, join


@dataclass(frozen=True)
class Config:
    """How a crosscoder is trained; the defaults are the published values."""

    width_factor: int = 8  # latents per dimension
    width: int | None = None  # number of latents; overrides width_factor
    topk: int = 400  # topk // 2 latents from each stream make the mask
    forced_share: float = 0.06  # share of latents whose aligned decoder row is a copy of the base row
    cross_weight: float = 0.4
    l1: float = 1e-3
    l1_forced: float = 5e-5
    learning_rate: float = 3e-4
    weight_decay: float = 1e-5
    warmup: float = 0.05  # share of the steps, then cosine to zero
    epochs: int = 4
    steps: int | None = None  # stop after so many; 0 leaves the dictionary untrained, as a control
    batch_size: int = 32
    clip: float = 1.0  # norm of the gradient
    validation_share: float = 0.1  # rows drawn at random: copies of a prompt may fall on both sides
    seed: int = 42


class Weights(NamedTuple):
    encoders: torch.Tensor  # [s, l, d, w]
    biases: torch.Tensor  # [s, l, w]
    decoders: torch.Tensor  # [s, l, w, d]


@dataclass(frozen=True, eq=False)
class Sparc:
    """A crosscoder. Axis 0 of the weights is the stream (base, aligned), axis 1 the layer, 1 of them or a window."""

    encoders: np.ndarray  # float32 [2, layers, d, width]
    biases: np.ndarray  # float32 [2, layers, width]; decoders have none
    decoders: np.ndarray  # float32 [2, layers, width, d]; a row is a decoder column of the paper
    forced: np.ndarray  # bool [width], latents whose aligned decoder row is a copy of the base row
    config: Config
    history: pd.DataFrame = field(default_factory=pd.DataFrame)  # one row an epoch and split, see `train`

    @torch.no_grad()
    def batches(self, streams, size: int):
        """Rows [s, n, l, d], codes [s, n, l, w] and rows rebuilt, batch by batch."""
        layers, d = self.encoders.shape[1:3]
        weights = Weights(*map(torch.from_numpy, (self.encoders, self.biases, self.decoders)))
        for x in stack(streams, (layers, d) if np.ndim(streams["base"]) == 3 else (d,)).split(size, dim=1):
            z = encode(weights, x, self.config.topk)
            yield x, z, decode(weights, z)


def stack(streams, shape: tuple | None = None) -> torch.Tensor:
    """Streams base and aligned, checked, as one float32 tensor [s, n, l, d]; shape : that a row must have."""
    base = streams.get("base") if isinstance(streams, dict) else None
    arrays = join(streams, dict.fromkeys(STREAMS, shape or np.shape(base)[1:])).arrays
    x = torch.from_numpy(np.stack([np.asarray(a, np.float32) for a in arrays]))
    return x if x.ndim == 4 else x[:, :, None]


def train(streams, config: Config | None = None, *, device: str = "cpu") -> Sparc:
    """Train a crosscoder on {"base": x, "aligned": y}, float [rows, d] or [rows, layers, d], rows paired, unscaled.

    Loss = MSE of each stream from its own codes + cross_weight * MSE from the other stream's codes + l1 * L1 of the
    free latents + l1_forced * L1 of the forced ones (see `loss`). AdamW, linear warm-up, cosine; the last, smaller
    batch of an epoch is dropped. Equal seeds give equal bits on one machine. `history` has two rows an epoch, split
    train (means over the steps taken) and validation, with `loss`'s parts and the published numbers of `quality`.
    Raises DictionaryError for streams or a config that do not fit, and if the loss stops being finite."""
    config, x = config or Config(), stack(streams)
    _, rows, layers, d = x.shape
    width = config.width_factor * d if config.width is None else config.width
    c, validation = config, int(rows * config.validation_share)
    left, shares = rows - validation, (c.forced_share, c.validation_share, c.warmup)
    problems = {
        f"topk is {c.topk} for {width} latents: choose from 2 to {width}": not 2 <= c.topk <= width,
        "forced_share, validation_share and warmup lie from 0 to below 1": not all(0 <= s < 1 for s in shares),
        f"{left} rows for training fill no batch of {c.batch_size}": not 1 <= c.batch_size <= left,
        "epochs go from 1, steps from 0": c.epochs < 1 or (c.steps is not None and c.steps < 0),
    }
    if found := [words for words, wrong in problems.items() if wrong]:
        raise DictionaryError(f"sparc config: {'; '.join(found)}")
    draw = torch.Generator().manual_seed(config.seed)
    weights, forced = start(layers, d, width, config.forced_share, draw)
    weights, forced = Weights(*(w.to(device).requires_grad_() for w in weights)), forced.to(device)
    held_out, training = torch.randperm(rows, generator=draw).tensor_split([validation])
    per_epoch = len(training) // config.batch_size
    total = min(per_epoch * config.epochs, 2**62 if config.steps is None else config.steps)
    optimizer, history = torch.optim.AdamW(weights, config.learning_rate, weight_decay=config.weight_decay), []
    for step in range(total):
        epoch, part = divmod(step, per_epoch)
        if part == 0:
            batches, log = training[torch.randperm(len(training), generator=draw)].split(config.batch_size), []
        optimizer.param_groups[0]["lr"] = rate(step, total, config)
        log.append(_visit(weights, x[:, batches[part]].to(device), forced, config, optimizer))
        if step + 1 in (total, (epoch + 1) * per_epoch):
            parts = held_out.split(config.batch_size) if len(held_out) else ()
            splits = {"train": log, "validation": [_visit(weights, x[:, r].to(device), forced, config) for r in parts]}
            now = {"epoch": epoch + 1, "step": step + 1}
            history += [now | {"split": name} | _mean(numbers) for name, numbers in splits.items() if numbers]
            if not np.isfinite([row["total"] for row in history]).all():
                cure = f"lower learning_rate ({config.learning_rate}), or scale both streams down"
                raise DictionaryError(f"the loss is not finite in epoch {epoch + 1}: {cure}")
    return Sparc(*(w.detach().cpu().numpy() for w in weights), forced.cpu().numpy(), config, pd.DataFrame(history))


def start(layers: int, d: int, width: int, forced_share: float, draw: torch.Generator) -> tuple[Weights, torch.Tensor]:
    """Kaiming-uniform weights (gain sqrt 2 for encoders, 1 for decoders), zero biases, forced latents at random."""
    plan = ((d, width), math.sqrt(6 / d)), ((width, d), math.sqrt(3 / width))
    encoders, decoders = (bound * (2 * torch.rand(2, layers, *shape, generator=draw) - 1) for shape, bound in plan)
    forced = torch.zeros(width, dtype=torch.bool)
    forced[torch.randperm(width, generator=draw)[: int(width * forced_share)]] = True
    decoders[1, :, forced] = decoders[0, :, forced]
    return Weights(encoders, torch.zeros(2, layers, width), decoders), forced


def encode(weights: Weights, x: torch.Tensor, topk: int) -> torch.Tensor:
    """[s, n, l, d] -> [s, n, l, w]: relu of the pre-activations h where the mask is on. One mask for both streams and
    all layers: the topk // 2 largest layer means of h of each stream, united."""
    h = torch.einsum("snld,sldw->snlw", x, weights.encoders) + weights.biases[:, None]
    top = h.mean(2).topk(topk // 2, dim=-1).indices
    mask = torch.zeros_like(h[:, :, 0]).scatter_(-1, top, 1).amax(0)
    return h.relu() * mask[None, :, None]


def decode(weights: Weights, z: torch.Tensor) -> torch.Tensor:
    return torch.einsum("snlw,slwd->snld", z, weights.decoders)


def loss(weights: Weights, x: torch.Tensor, forced: torch.Tensor, config: Config) -> tuple:
    """The loss and its parts on a batch [s, n, l, d], the codes and the reconstruction. MSE averages over rows, layers
    and dimensions and is summed over streams. L1 = mean over rows of sum_w z_w * norm_w: z_w is averaged over streams
    and layers, norm_w summed over both."""
    z = encode(weights, x, config.topk)
    rebuilt = decode(weights, z)
    mse = {"self": (x - rebuilt).square(), "cross": (x - decode(weights, z.flip(0))).square()}
    parts = {name: error.mean((1, 2, 3)).sum() for name, error in mse.items()}
    l1 = z.mean((0, 2)) * weights.decoders.norm(dim=-1).sum((0, 1))
    parts["sparsity"] = (l1 @ torch.where(forced, config.l1_forced, config.l1).to(l1)).mean()
    parts["total"] = parts["self"] + config.cross_weight * parts["cross"] + parts["sparsity"]
    return parts, z, rebuilt


def _visit(weights: Weights, batch: torch.Tensor, forced: torch.Tensor, config: Config, optimizer=None) -> dict:
    """The numbers of one batch; with an optimizer, also one step on it."""
    with torch.set_grad_enabled(optimizer is not None):
        parts, z, rebuilt = loss(weights, batch, forced, config)
    if optimizer is not None:
        optimizer.zero_grad()
        parts["total"].backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        with torch.no_grad():
            weights.decoders[1, :, forced] = weights.decoders[0, :, forced]
    return {name: value.item() for name, value in parts.items()} | _numbers(batch, z.detach(), rebuilt.detach())


def rate(step: int, total: int, config: Config) -> float:
    """Learning rate: linear from zero over the warm-up, then half a cosine to zero."""
    warmup = int(total * config.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return config.learning_rate * step / warmup if step < warmup else config.learning_rate * fall


def _numbers(x: torch.Tensor, z: torch.Tensor, rebuilt: torch.Tensor) -> dict[str, float]:
    """The published numbers of one batch."""
    variance = x.var((1, 3), correction=1 if x.shape[2] == 1 else 0)  # as published: n in a window
    fve = (1 - (x - rebuilt).square().mean((1, 3)) / (variance + 1e-8)).mean(1)
    numbers = _per_stream("fve", fve) | _per_stream("l0", (z > 0).sum(-1).float().mean((1, 2)))
    return numbers | {"dead": 1 - float((z > 0).any(2).any(1).any(0).float().mean())}


def _per_stream(name: str, values) -> dict[str, float]:
    base, aligned = map(float, values)
    return {name: (base + aligned) / 2, f"{name}_base": base, f"{name}_aligned": aligned}


def _mean(log: list[dict]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in log])) for name in log[0]}


def quality(sparc: Sparc, streams) -> dict[str, float]:
    """How well a crosscoder rebuilds rows, by the published formulas and by ours; pass held-out rows.

    fve_published: 1 - MSE / one variance over rows and dimensions together, per batch and layer, averaged; differences
    between dimension means count as variance. r2: 1 - squared error / squares about the mean of each dimension, over
    all rows, averaged over layers; NaN where nothing varies. l0: latents that fire per row (and layer). These are the
    mean of both streams and come with `_base` and `_aligned`. dead_published: share of latents silent in both streams
    within a batch, averaged; dead_share: over all rows."""
    log, error, fired = [], 0, 0
    for batch, z, rebuilt in sparc.batches(streams, sparc.config.batch_size):
        log.append(_numbers(batch, z, rebuilt))
        error = error + (batch - rebuilt).double().square().sum((1, 3))
        fired = fired | (z > 0).any(2).any(1).any(0)
    x = stack(streams)
    spread = x.double().var(1, correction=0).sum(-1) * x.shape[1]
    means = {name.replace("fve", "fve_published"): value for name, value in _mean(log).items()}
    means["dead_published"] = means.pop("dead")
    r2 = torch.where(spread > 0, 1 - error / spread, torch.nan).mean(1)
    return means | _per_stream("r2", r2) | {"dead_share": 1 - float(fired.float().mean())}
