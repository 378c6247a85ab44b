"""The published crosscoder (SPARC), kept to its formulas beside our own dictionary in `dictionaries`.

A crosscoder reads two streams of activations, base and aligned, with one encoder each, switches the same latents on in
both, and writes each stream back with its own decoder. Comparing the two decoder rows of a latent (rho: whose is
longer; theta: do they point the same way) gives its class. Source of everything here unless a docstring says otherwise:
arXiv 2606.09850. `published` numbers follow its formulas; what we measure instead has its own name (`r2`, `dead_share`)
or the switch `corrected=True`. Not kept: bf16 autocast (all float32) and checkpoints.

Arrays are [rows, d] (one layer) or [rows, layers, d] (a window: an encoder and a decoder per layer, one mask).
Inside, shapes are written with s streams (base, aligned), n rows, l layers, d dimensions, w latents (width).
"""

import itertools
import math
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from sklearn.metrics import r2_score
from sklearn.mixture import GaussianMixture

from alignlens.core.errors import DictionaryError

STREAMS = ("base", "aligned")
SHARED = ("shared_aligned", "shared_redirected", "shared_intermediate", "shared_attenuated")
EXCLUSIVE = ("base_only", "aligned_only")
CLASSES = (*EXCLUSIVE, *SHARED, "other")
FIXED = {"base_only": 0.15, "aligned_only": 0.85, "shared_low": 0.35, "shared_high": 0.65}
"""The published fixed cuts on rho: used where no mixture can be fitted, or with `classify(fixed=True)`."""

_CHUNK = 256  # rows encoded at once outside training
_PINV = ("singular_mean", "singular_std", "condition", "angle_degrees")
_PROCRUSTES = ("residual", "unrotated", "null_mean", "null_low", "p")


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


PUBLISHED = Config()


@dataclass(frozen=True, eq=False)
class Sparc:
    """A crosscoder. Axis 0 of the weights is the stream: base, aligned. Windows have a layer axis after it."""

    encoders: np.ndarray  # float32 [2, d, width] or [2, layers, d, width]
    biases: np.ndarray  # float32 [2, width] or [2, layers, width]; decoders have none
    decoders: np.ndarray  # float32 [2, width, d] or [2, layers, width, d]; a row is a decoder column of the paper
    forced: np.ndarray  # bool [width], latents whose aligned decoder row is a copy of the base row
    config: Config
    history: pd.DataFrame = field(default_factory=pd.DataFrame)  # one row an epoch and split, see `train`

    def encode(self, streams) -> dict[str, np.ndarray]:
        """Codes of both streams, float32 [rows, width] or [rows, layers, width]; one mask needs both streams."""
        x = _stack(streams, self)
        with torch.no_grad():
            codes = torch.cat([_encode(self._weights, part, self.config.topk) for part in x.split(_CHUNK, dim=1)], 1)
        return self._unstack(codes)

    def decode(self, codes) -> dict[str, np.ndarray]:
        """Each stream rebuilt from its own codes, in the shape of the streams; swap the two codes to cross."""
        z = _stack(codes, self, feature="width")
        with torch.no_grad():
            rebuilt = torch.cat([_decode(self._weights, part) for part in z.split(_CHUNK, dim=1)], 1)
        return self._unstack(rebuilt)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but config and history, by name, as safetensors stores it."""
        return {name: getattr(self, name) for name in ("encoders", "biases", "decoders", "forced")}

    @classmethod
    def from_arrays(cls, arrays, config: Config, history: pd.DataFrame | None = None) -> "Sparc":
        """The inverse of `arrays`. Raises DictionaryError if an array is missing or the shapes do not fit together."""
        names = ("encoders", "biases", "decoders", "forced")
        if not set(names) <= set(arrays):
            raise DictionaryError(f"Arrays are {sorted(arrays)}: pass the {list(names)} of Sparc.arrays().")
        kept = {name: np.asarray(arrays[name], bool if name == "forced" else np.float32) for name in names}
        *lead, d, width = kept["encoders"].shape
        fitting = {"encoders": (*lead, d, width), "biases": (*lead, width), "decoders": (*lead, width, d)}
        found = {name: array.shape for name, array in kept.items()}
        if len(lead) not in (1, 2) or lead[0] != 2 or found != fitting | {"forced": (width,)}:
            raise DictionaryError(f"Arrays of shapes {found} make no crosscoder: pass those of one Sparc.arrays().")
        return cls(**kept, config=config, history=pd.DataFrame() if history is None else history)

    @property
    def windowed(self) -> bool:
        """Whether streams have a layer axis."""
        return self.encoders.ndim == 4

    @property
    def _weights(self) -> "_Weights":
        parts = (self.encoders, self.biases, self.decoders)
        return _Weights(*(torch.from_numpy(part if self.windowed else part[:, None]) for part in parts))

    def _unstack(self, values: torch.Tensor) -> dict[str, np.ndarray]:
        values = values if self.windowed else values.squeeze(2)
        return dict(zip(STREAMS, values.numpy(), strict=True))


# --- Train --------------------------------------------------------------------------------------------------------


def train(streams, config: Config = PUBLISHED, *, progress: bool = False, device: str = "cpu") -> Sparc:
    """Train a crosscoder on {"base": x, "aligned": y}, float [rows, d] or [rows, layers, d], rows paired, unscaled.

    Loss = MSE of each stream from its own codes + cross_weight * MSE from the other stream's codes + l1 * L1 of the
    free latents + l1_forced * L1 of the forced ones (see `_loss`). AdamW, linear warm-up, cosine; the last, smaller
    batch of an epoch is dropped. Equal seeds give equal bits on one machine; the caller's random state is not touched.

    `history` has two rows an epoch, split train (means over the steps taken) and validation: step, total, self, cross,
    sparsity, fve, fve_base, fve_aligned, dead, l0, l0_base, l0_aligned, as `quality` defines the published ones.
    Raises DictionaryError for streams or a config that do not fit, and if the loss stops being finite.
    """
    x = _stack(streams)
    windowed = np.ndim(streams["base"]) == 3
    _, rows, layers, d = x.shape
    width = _check_config(config, rows, d)
    draw = torch.Generator().manual_seed(config.seed)
    weights, forced = _start(layers, d, width, config.forced_share, draw)
    weights, forced = _Weights(*(w.to(device).requires_grad_() for w in weights)), forced.to(device)
    order = torch.randperm(rows, generator=draw)
    held_out = order[: int(rows * config.validation_share)]
    training = order[len(held_out) :]
    per_epoch = len(training) // config.batch_size
    total = per_epoch * config.epochs
    total = total if config.steps is None else min(total, config.steps)
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    history = []
    for step in _progress(range(total), progress):
        epoch, part = divmod(step, per_epoch)
        if part == 0:
            batches, log = training[torch.randperm(len(training), generator=draw)].split(config.batch_size), []
        optimizer.param_groups[0]["lr"] = _rate(step, total, config)
        log.append(_visit(weights, x[:, batches[part]].to(device), forced, config, optimizer))
        if step + 1 in (total, (epoch + 1) * per_epoch):
            now = {"epoch": epoch + 1, "step": step + 1}
            history.append(now | {"split": "train"} | _mean(log))
            _check_loss(history[-1], x, config)
            log = [_visit(weights, x[:, r].to(device), forced, config) for r in held_out.split(config.batch_size)]
            history += [now | {"split": "validation"} | _mean(log)] if len(held_out) else []
    arrays = [w.detach().cpu().numpy() for w in weights]
    return Sparc(*(w if windowed else w[:, 0] for w in arrays), forced.cpu().numpy(), config, pd.DataFrame(history))


class _Weights(NamedTuple):
    encoders: torch.Tensor  # [s, l, d, w]
    biases: torch.Tensor  # [s, l, w]
    decoders: torch.Tensor  # [s, l, w, d]


def _start(layers: int, d: int, width: int, forced_share: float, draw: torch.Generator) -> tuple:
    """Kaiming-uniform weights (gain sqrt 2 for encoders, 1 for decoders), zero biases, forced latents at random."""

    def uniform(*shape, bound):
        return bound * (2 * torch.rand(shape, generator=draw) - 1)

    encoders = uniform(2, layers, d, width, bound=math.sqrt(6 / d))
    decoders = uniform(2, layers, width, d, bound=math.sqrt(3 / width))
    forced = torch.zeros(width, dtype=torch.bool)
    forced[torch.randperm(width, generator=draw)[: int(width * forced_share)]] = True
    weights = _Weights(encoders, torch.zeros(2, layers, width), decoders)
    _share(weights, forced)
    return weights, forced


def _share(weights: _Weights, forced: torch.Tensor) -> None:
    """Overwrite the aligned decoder rows of the forced latents by the base rows."""
    with torch.no_grad():
        weights.decoders[1, :, forced] = weights.decoders[0, :, forced]


def _encode(weights: _Weights, x: torch.Tensor, topk: int) -> torch.Tensor:
    """[s, n, l, d] -> [s, n, l, w]: relu of the pre-activations h where the mask is on.

    The mask is one for both streams and all layers: the topk // 2 largest layer means of h of each stream, united.
    """
    h = torch.einsum("snld,sldw->snlw", x, weights.encoders) + weights.biases[:, None]
    top = h.mean(2).topk(topk // 2, dim=-1).indices
    mask = torch.zeros_like(h[:, :, 0]).scatter_(-1, top, 1).amax(0)
    return h.relu() * mask[None, :, None]


def _decode(weights: _Weights, z: torch.Tensor) -> torch.Tensor:
    return torch.einsum("snlw,slwd->snld", z, weights.decoders)


def _loss(weights: _Weights, x: torch.Tensor, forced: torch.Tensor, config: Config) -> tuple:
    """The loss and its parts on a batch [s, n, l, d], the codes and the reconstruction.

    MSE averages over rows, layers and dimensions and is summed over streams. L1 of latents = mean over rows of
    sum_w z_w * norm_w: z_w is averaged over streams and layers, norm_w summed over both.
    """
    z = _encode(weights, x, config.topk)
    rebuilt = _decode(weights, z)
    mse = {"self": (x - rebuilt).square(), "cross": (x - _decode(weights, z.flip(0))).square()}
    parts = {name: error.mean((1, 2, 3)).sum() for name, error in mse.items()}
    l1 = z.mean((0, 2)) * weights.decoders.norm(dim=-1).sum((0, 1))
    parts["sparsity"] = (l1 @ torch.where(forced, config.l1_forced, config.l1).to(l1)).mean()
    parts["total"] = parts["self"] + config.cross_weight * parts["cross"] + parts["sparsity"]
    return parts, z, rebuilt


def _visit(weights: _Weights, batch: torch.Tensor, forced: torch.Tensor, config: Config, optimizer=None) -> dict:
    """The numbers of one batch; with an optimizer, also one step on it."""
    with torch.set_grad_enabled(optimizer is not None):
        parts, z, rebuilt = _loss(weights, batch, forced, config)
    if optimizer is not None:
        optimizer.zero_grad()
        parts["total"].backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        _share(weights, forced)
    parts = {name: value.item() for name, value in parts.items()}
    return parts | _numbers(batch, z.detach(), rebuilt.detach())


def _rate(step: int, total: int, config: Config) -> float:
    """Learning rate: linear from zero over the warm-up, then half a cosine to zero."""
    warmup = int(total * config.warmup)
    if step < warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _numbers(x: torch.Tensor, z: torch.Tensor, rebuilt: torch.Tensor) -> dict[str, float]:
    """The published numbers of one batch."""
    # As published, one layer divides by n - 1 and a window by n.
    variance = x.var((1, 3), correction=1 if x.shape[2] == 1 else 0)
    fve = (1 - (x - rebuilt).square().mean((1, 3)) / (variance + 1e-8)).mean(1)
    fires = z > 0
    numbers = _per_stream("fve", fve) | _per_stream("l0", fires.sum(-1).float().mean((1, 2)))
    return numbers | {"dead": 1 - float(fires.any(2).any(1).any(0).float().mean())}


def _per_stream(name: str, values) -> dict[str, float]:
    base, aligned = (float(value) for value in values)
    return {name: (base + aligned) / 2, f"{name}_base": base, f"{name}_aligned": aligned}


def _mean(log: list[dict]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in log])) for name in log[0]}


def _progress(steps, shown: bool):
    if not shown:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc="published crosscoder", unit="step", leave=False)


# --- Measure ------------------------------------------------------------------------------------------------------


def quality(sparc: Sparc, streams) -> dict[str, float]:
    """How well a crosscoder rebuilds rows, by the published formulas and by ours; pass held-out rows.

    fve_published   1 - MSE / one variance over rows and dimensions together, per batch (config.batch_size), averaged;
                    in a window per layer, averaged. Differences between dimension means count as variance.
    r2              1 - squared error / squares about the mean of each dimension, over all rows: predicting the mean
                    scores 0. In a window per layer, averaged. NaN where nothing varies.
    dead_published  share of latents silent in both streams within a batch, averaged over batches
    dead_share      share silent over all rows
    l0              latents that fire per row (and layer)

    fve_published, r2 and l0 are the mean of both streams and come with `_base` and `_aligned`.
    """
    x, weights = _stack(streams, sparc), sparc._weights
    log, error, fired = [], 0, 0
    with torch.no_grad():
        for batch in x.split(sparc.config.batch_size, dim=1):
            z = _encode(weights, batch, sparc.config.topk)
            rebuilt = _decode(weights, z)
            log.append(_numbers(batch, z, rebuilt))
            error = error + (batch - rebuilt).double().square().sum((1, 3))
            fired = fired | (z > 0).any(2).any(1).any(0)
    spread = x.double().var(1, correction=0).sum(-1) * x.shape[1]
    means = {name.replace("fve", "fve_published"): value for name, value in _mean(log).items()}
    means["dead_published"] = means.pop("dead")
    r2 = torch.where(spread > 0, 1 - error / spread, torch.nan).mean(1)
    return means | _per_stream("r2", r2) | {"dead_share": 1 - float(fired.float().mean())}


def classify(sparc: Sparc, streams=None, *, fixed: bool = False, thresholds: dict | None = None) -> pd.DataFrame:
    """The published classes: one row a latent.

    rho = |aligned| / (|base| + |aligned|) of the decoder rows, theta = their cosine, norm_base, norm_aligned, forced,
    label: base_only | aligned_only | shared_aligned | shared_redirected | shared_intermediate | shared_attenuated |
    other. With `streams` also density_base/_aligned (share of rows where it fires) and cf_base, cf_aligned,
    cf_shift = aligned - base (mean code; published as "counterfactual sensitivity", without an intervention).
    In a window norms are summed and theta averaged over layers, and entropy (of the layer norms, 1 = even), persistent
    (entropy >= 0.6), min_abs_theta and drifting (min_abs_theta < 0.5) are added.

    The cuts on rho adapt to each dictionary, so counts of two dictionaries compare only under one set: `fixed=True`
    (FIXED), or `thresholds` (keys as FIXED, e.g. another table's), which has precedence. `attrs["thresholds"]` holds
    the cuts used, `attrs["components"]` the number of mixture components behind them (None: no mixture).
    """
    base, aligned = _decoders(sparc)
    norms = np.linalg.norm([base, aligned], axis=-1)  # [s, l, w]
    theta = np.einsum("lwd,lwd->lw", base, aligned) / np.maximum(norms.prod(0), 1e-12)
    norm_base, norm_aligned = norms.sum(1)
    table = pd.DataFrame({"latent": np.arange(base.shape[1]), "forced": sparc.forced})
    table["rho"], table["theta"] = norm_aligned / (norm_base + norm_aligned + 1e-8), theta.mean(0)
    table["norm_base"], table["norm_aligned"] = norm_base, norm_aligned
    if sparc.windowed:
        table["entropy"] = _entropy(norms.sum(0))
        table["persistent"] = table["entropy"] >= 0.6
        table["min_abs_theta"] = np.abs(theta).min(0)
        table["drifting"] = table["min_abs_theta"] < 0.5
    if streams is not None:
        table = table.assign(**_usage(sparc, streams))
    components = None
    if thresholds is None and not fixed:
        thresholds, components = _adaptive(table["rho"].to_numpy())
    cuts = dict(FIXED if thresholds is None else thresholds)
    if set(cuts) != set(FIXED) or not np.isfinite(list(cuts.values())).all():
        raise DictionaryError(f"thresholds is {cuts}: give a finite number for each of {list(FIXED)}.")
    table["label"] = _labels(table["rho"], table["theta"].abs(), cuts)
    table.attrs |= {"thresholds": cuts, "components": components}
    return table


def _decoders(sparc: Sparc) -> np.ndarray:
    """float64 [s, l, w, d]."""
    return (sparc.decoders if sparc.windowed else sparc.decoders[:, None]).astype(np.float64)


def _entropy(norms: np.ndarray) -> np.ndarray:
    """Entropy [w] of the layer norms [l, w] over its largest value; 0 for one layer."""
    share = norms / np.maximum(norms.sum(0), 1e-8)
    return -(share * np.log(share + 1e-8)).sum(0) / np.log(len(norms)) if len(norms) > 1 else np.zeros(norms.shape[1])


def _usage(sparc: Sparc, streams) -> dict[str, np.ndarray]:
    x, weights = _stack(streams, sparc), sparc._weights
    fires, mean = 0, 0
    with torch.no_grad():
        for batch in x.split(_CHUNK, dim=1):
            z = _encode(weights, batch, sparc.config.topk)
            fires = fires + (z > 0).any(2).sum(1).numpy() / x.shape[1]
            mean = mean + z.mean(2).double().sum(1).numpy() / x.shape[1]
    names = {"density": fires, "cf": mean}
    columns = {f"{name}_{s}": value for name, both in names.items() for s, value in zip(STREAMS, both, strict=True)}
    return columns | {"cf_shift": mean[1] - mean[0]}


def labels(table: pd.DataFrame, cuts: dict) -> np.ndarray:
    """Labels of a `classify` table under other cuts on rho, such as `FIXED`."""
    return _labels(table["rho"].to_numpy(), table["theta"].abs().to_numpy(), cuts)


def _labels(rho, abs_theta, cuts: dict) -> np.ndarray:
    """The first rule that holds, in the published order; cuts may coincide or cross."""
    in_band = (rho > cuts["shared_low"]) & (rho < cuts["shared_high"])
    rules = {
        "base_only": rho < cuts["base_only"],
        "aligned_only": rho > cuts["aligned_only"],
        "shared_aligned": in_band & (abs_theta >= 0.8),
        "shared_redirected": in_band & (abs_theta < 0.5),
        "shared_intermediate": in_band,
        "shared_attenuated": (rho >= cuts["base_only"]) & (rho <= cuts["shared_low"]),
    }
    return np.select(list(rules.values()), list(rules), "other")


def _adaptive(rho: np.ndarray) -> tuple[dict[str, float], int | None]:
    """The published adaptive cuts, and the number of mixture components (chosen by BIC) they come from."""
    rho = rho[(rho >= 0) & (rho <= 1)]
    if len(rho) == 0:
        return FIXED, None
    components = _mixture(rho) if len(rho) >= 30 else []
    if len(components) < 2:
        p25, low, p75 = np.percentile(rho, (25, 40, 75))
        cuts = np.clip(0.6 * p25, 0.05, 0.35), np.clip(p75 + 0.5 * (1 - p75), 0.65, 0.98), low, p75
    else:
        crossings = [_crossing(left, right) for left, right in itertools.pairwise(components)]
        low, high = crossings[0], crossings[-1]
        (_, first, first_deviation), (_, last, last_deviation) = components[0], components[-1]
        base_only, aligned_only = min(low, first + 2 * first_deviation, 0.4), max(high, last - 2 * last_deviation, 0.5)
        cuts = np.clip(base_only, 0.05, 0.4), np.clip(aligned_only, 0.5, 0.98), low, high
        if len(components) == 2:
            cuts = [low] * 4
    return dict(zip(FIXED, map(float, cuts), strict=True)), len(components) or None


def _mixture(rho: np.ndarray) -> np.ndarray:
    """Weight, mean and deviation of each component [k, 3], by mean: the Gaussian mixture, k = 1 .. 4, of lowest BIC."""
    column = rho[:, None]
    fits = [GaussianMixture(k, covariance_type="diag", n_init=3, reg_covar=1e-4, random_state=42) for k in range(1, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few distinct values: BIC then prefers a smaller k
        best = min((fit.fit(column) for fit in fits), key=lambda fit: fit.bic(column))
    table = np.column_stack([best.weights_, best.means_[:, 0], np.sqrt(best.covariances_[:, 0])])
    return table[np.argsort(table[:, 1])]


def _crossing(left: np.ndarray, right: np.ndarray) -> float:
    """Where two weighted normals are equally dense, between their means; half-way if one covers the other there."""

    def gap(x):
        return left[0] * norm.pdf(x, *left[1:]) - right[0] * norm.pdf(x, *right[1:])

    low, high = max(0.0, left[1] - 0.01), min(1.0, right[1] + 0.01)
    return (left[1] + right[1]) / 2 if gap(low) * gap(high) > 0 else brentq(gap, low, high)


# --- Read the classes ---------------------------------------------------------------------------------------------


def feature_sharing_ratio(table: pd.DataFrame) -> dict[str, float]:
    """Shared latents over shared + exclusive ones (`single_layer`) and over all (`multi_layer`), as published.

    Untrained latents count as shared (rho near 0.5) and forced ones as shared_aligned: pass rows of `table` without
    them, e.g. `table[~table.forced & (table.density_base > 0)]`, for the ratio of trained, free latents. NaN if empty.
    """
    shared, exclusive = table["label"].isin(SHARED).sum(), table["label"].isin(EXCLUSIVE).sum()
    sizes = {"single_layer": shared + exclusive, "multi_layer": len(table)}
    return {name: float(shared / size) if size else math.nan for name, size in sizes.items()}


def superposition(
    sparc: Sparc, table: pd.DataFrame, *, corrected=False, max_latents=256, draws=100, seed=0
) -> pd.DataFrame:
    """Are aligned-only latents sparse sums of base latents? Lasso (no intercept) of an aligned row on the base rows.

    published   alpha 0.01 in scikit-learn's units, where all weights are zero once alpha >= alpha_max = max |X'y| / d.
                For unit vectors alpha_max <= 1 / d, so the test is silent from d = 100 on (`can_fire`). Counted if
                r2 > 0.8 with 2 .. 50 non-zeros; windows: unit vectors, r2 >= 0.5, 2 or more, one of another layer.
    corrected   unit vectors and alpha = alpha_max / 10. p = share of random directions (Gaussian mixtures of the
                aligned rows) that need no more non-zeros. Counted if r2 > 0.8, 2 .. 50 non-zeros and p <= 0.05, and
                in windows one of another layer. null_non_zeros is the median of the random directions.

    Windows and `corrected` regress on the 256 base rows of largest |cosine|. At most `max_latents` latents, drawn at
    random; `attrs["aligned_only"]` holds how many there are. One row a latent: latent, layer (position in the window),
    alpha, alpha_max, can_fire, non_zeros, r2, parts (base latents by weight), part_layers, superposed.
    """
    _check_table(table, sparc)
    base, aligned = _decoders(sparc)
    home = np.linalg.norm(aligned, axis=-1).argmax(0)  # the layer where a latent writes most
    if corrected or sparc.windowed:
        base, aligned = _unit(base), _unit(aligned)
    flat = base.reshape(-1, base.shape[-1])
    candidates = 256 if corrected or sparc.windowed else len(flat)
    found = table.loc[table["label"] == "aligned_only", "latent"].to_numpy()
    rng = np.random.default_rng(seed)
    null, rows = {}, []
    for latent in np.sort(rng.choice(found, min(max_latents, len(found)), replace=False)):
        layer = home[latent]
        row = _lasso(flat, aligned[layer, latent], candidates, corrected)
        layers, parts = np.divmod(np.array(row["parts"], int), base.shape[1])
        row |= {"latent": latent, "layer": layer, "parts": parts.tolist(), "part_layers": layers.tolist()}
        row["superposed"] = row["r2"] > 0.8 and 2 <= row["non_zeros"] <= 50
        if sparc.windowed and not corrected:
            row["superposed"] = row["r2"] >= 0.5 and row["non_zeros"] >= 2
        if sparc.windowed:
            row["superposed"] &= bool((layers != layer).any())
        if corrected:
            if layer not in null:
                random = _unit(rng.standard_normal((draws, base.shape[1])) @ aligned[layer])
                null[layer] = np.array([_lasso(flat, y, candidates, corrected)["non_zeros"] for y in random])
            row["null_non_zeros"] = np.median(null[layer])
            row["p"] = (1 + (null[layer] <= row["non_zeros"]).sum()) / (1 + draws)
            row["superposed"] &= bool(row["p"] <= 0.05)
        rows.append(row)
    columns = ["latent", "layer", "alpha", "alpha_max", "can_fire", "non_zeros", "r2", "parts", "part_layers"]
    out = pd.DataFrame(rows, columns=columns + ["null_non_zeros", "p"] * corrected + ["superposed"])
    out.attrs["aligned_only"] = len(found)
    return out


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _lasso(rows: np.ndarray, y: np.ndarray, candidates: int, corrected: bool) -> dict:
    """Lasso of y [d] on base rows [w, d]; `parts` are row numbers, heaviest first."""
    products = np.abs(rows @ y)
    kept = np.argsort(-products, kind="stable")[:candidates]
    alpha_max = products.max() / len(y)
    alpha = alpha_max / 10 if corrected else 0.01
    measured = {"alpha": alpha, "alpha_max": alpha_max, "can_fire": bool(alpha < alpha_max)}
    weights = np.zeros(len(kept))
    if measured["can_fire"]:  # else the solution is known to be zero, and at full size a fit takes seconds
        weights = Lasso(alpha=alpha, fit_intercept=False, max_iter=10_000).fit(rows[kept].T, y).coef_
    order = np.argsort(-np.abs(weights), kind="stable")
    parts = [int(kept[i]) for i in order if abs(weights[i]) > 1e-6]
    return measured | {"non_zeros": len(parts), "r2": r2_score(y, weights @ rows[kept]), "parts": parts}


def shared_geometry(
    sparc: Sparc, table: pd.DataFrame, *, corrected=False, min_density=0.01, permutations=100, seed=0
) -> pd.DataFrame:
    """One linear map from the base to the aligned decoder rows of shared latents, per layer, class and all_shared.

    published   T = Va Vb' pinv(Vb Vb') (columns v): mean and std of its singular values, condition number, mean angle
                of v and Tv in degrees. With fewer than d latents T is not unique and the condition number infinite.
    corrected   the best orthogonal map (Procrustes) of unit vectors, on free latents that fire in at least
                `min_density` of the rows of a stream (`classify` with streams). residual = share of squares that the
                map (with one scale) leaves, unrotated = without a map, null_mean and null_low = mean and 2.5 %
                percentile of the residual with partners permuted, p = share of permutations no worse.

    Numbers are NaN below 10 latents, the published minimum.
    """
    _check_table(table, sparc)
    live = True
    if corrected:
        if "density_base" not in table:
            raise DictionaryError("The table does not say which latents fire: make it by classify(sparc, streams).")
        live = ~table["forced"] & (table[["density_base", "density_aligned"]].max(axis=1) >= min_density)
    rng, rows = np.random.default_rng(seed), []
    for layer, (base, aligned) in enumerate(zip(*_decoders(sparc), strict=True)):
        for name in (*SHARED, "all_shared"):
            members = table["label"].isin(SHARED) if name == "all_shared" else table["label"] == name
            latents = table.loc[members & live, "latent"]
            row = {"layer": layer, "label": name, "n": len(latents)}
            if len(latents) >= 10:
                pair = base[latents], aligned[latents]
                row |= _procrustes(*map(_unit, pair), permutations, rng) if corrected else _pinv_map(*pair)
            rows.append(row)
    numbers = _PROCRUSTES if corrected else _PINV
    return pd.DataFrame(rows, columns=["layer", "label", "n", *numbers])


def _pinv_map(base: np.ndarray, aligned: np.ndarray) -> dict[str, float]:
    """Published numbers of the map T with T base_i ~ aligned_i; rows [n, d]."""
    t = aligned.T @ base @ np.linalg.pinv(base.T @ base)
    singular, moved = np.linalg.svd(t, compute_uv=False), base @ t.T
    cosine = np.abs((_unit(base) * _unit(moved)).sum(1)).clip(max=1)
    condition = singular[0] / singular[-1] if singular[-1] > 1e-12 else math.inf
    numbers = singular.mean(), singular.std(), condition, np.degrees(np.arccos(cosine)).mean()
    return dict(zip(_PINV, numbers, strict=True))


def _procrustes(base: np.ndarray, aligned: np.ndarray, permutations: int, rng) -> dict[str, float]:
    def residual(partner):
        return 1 - (orthogonal_procrustes(base, partner)[1] / len(base)) ** 2  # unit rows: |base| |partner| = n

    found = residual(aligned)
    null = np.array([residual(aligned[rng.permutation(len(base))]) for _ in range(permutations)])
    unrotated, p = 1 - ((base * aligned).sum() / len(base)) ** 2, (1 + (null <= found).sum()) / (1 + permutations)
    return dict(zip(_PROCRUSTES, (found, unrotated, null.mean(), np.percentile(null, 2.5), p), strict=True))


# --- Checks -------------------------------------------------------------------------------------------------------


def _stack(streams, sparc: Sparc | None = None, feature: str = "d") -> torch.Tensor:
    """Two checked streams as one float32 tensor [s, n, l, d], of the shape that `sparc` was trained on."""
    if not isinstance(streams, dict) or set(streams) != set(STREAMS):
        names = sorted(map(str, streams)) if isinstance(streams, dict) else type(streams).__name__
        raise DictionaryError(f"Streams are {names}: pass a dict of exactly {list(STREAMS)}.")
    both = [torch.as_tensor(streams[name]).detach().cpu().float() for name in STREAMS]
    shapes = [tuple(x.shape) for x in both]
    for name, x, shape in zip(STREAMS, both, shapes, strict=True):
        if x.ndim not in (2, 3) or 0 in shape:
            raise DictionaryError(f"Stream {name} has shape {shape}: pass [rows, d] or [rows, layers, d].")
        bad = (~x.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            raise DictionaryError(
                f"Stream {name} is NaN or infinite in row {int(bad[0])} ({len(bad)} such rows): drop these rows from "
                "both streams, or read the activations again in float32."
            )
    if shapes[0] != shapes[1]:
        raise DictionaryError(
            f"base is {shapes[0]} and aligned {shapes[1]}: read both models on the same rows, in the same order, "
            "at the same layers."
        )
    taken = sparc and (*sparc.encoders.shape[1:-2], sparc.encoders.shape[-2 if feature == "d" else -1])
    if sparc and shapes[0][1:] != taken:
        raise DictionaryError(
            f"A row is {shapes[0][1:]}, the crosscoder takes {taken}: read the layers it was trained on."
        )
    x = torch.stack(both)
    return x if x.ndim == 4 else x[:, :, None]


def _check_config(config: Config, rows: int, d: int) -> int:
    """The number of latents. Raises DictionaryError for a config that these streams cannot serve."""
    width = config.width_factor * d if config.width is None else config.width
    if not 2 <= config.topk <= width:
        raise DictionaryError(
            f"topk is {config.topk} for {width} latents: choose from 2 to {width}, or a larger width."
        )
    for name in ("forced_share", "validation_share", "warmup"):
        if not 0 <= getattr(config, name) < 1:
            raise DictionaryError(f"{name} is {getattr(config, name)}: it is a share, from 0 to below 1.")
    training = rows - int(rows * config.validation_share)
    if not 1 <= config.batch_size <= training:
        raise DictionaryError(
            f"{training} of {rows} rows are for training and fill no batch of {config.batch_size}: "
            "pass more rows, or lower batch_size."
        )
    if config.epochs < 1 or (config.steps is not None and config.steps < 0):
        raise DictionaryError(f"epochs is {config.epochs}, steps {config.steps}: epochs from 1, steps from 0 or None.")
    return width


def _check_table(table: pd.DataFrame, sparc: Sparc) -> None:
    if len(table) and table["latent"].max() >= len(sparc.forced):
        raise DictionaryError(
            f"The table has latent {table['latent'].max()}, the crosscoder {len(sparc.forced)} latents: "
            "pass the table that classify made of this crosscoder."
        )


def _check_loss(row: dict, x: torch.Tensor, config: Config) -> None:
    if not math.isfinite(row["total"]):
        raise DictionaryError(
            f"The loss is {row['total']} in epoch {row['epoch']}: lower learning_rate ({config.learning_rate}), or "
            f"scale both streams down (largest value {x.abs().max():.3g})."
        )
