"""The published classes of latents, and the cuts that adapt to each dictionary."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from alignlens.dictionaries import STREAMS
from alignlens.published.sparc.training import Sparc

SHARED = ("shared_aligned", "shared_redirected", "shared_intermediate", "shared_attenuated")
EXCLUSIVE = ("base_only", "aligned_only")
CLASSES = (*EXCLUSIVE, *SHARED, "other")
# The published fixed cuts on rho: used where no mixture can be fitted, or with `labels(table, FIXED)`.
FIXED = {"base_only": 0.15, "aligned_only": 0.85, "shared_low": 0.35, "shared_high": 0.65}


def classify(sparc: Sparc, streams) -> pd.DataFrame:
    """The published classes, one row a latent.

    rho = |aligned| / (|base| + |aligned|) of the decoder rows, theta = their cosine, norm_base, norm_aligned, forced,
    label; density_base/_aligned (share of rows where it fires) and cf_base, cf_aligned, cf_shift = aligned - base (mean
    code; published as "counterfactual sensitivity", without an intervention). In a window norms are summed and theta
    averaged over layers, and entropy (of the layer norms, 1 = even), persistent (entropy >= 0.6), min_abs_theta and
    drifting (min_abs_theta < 0.5) are added. The cuts on rho adapt to each dictionary, so counts of two compare only
    under one set (`labels`): `attrs["thresholds"]`, from `attrs["components"]` mixture components (None: no
    mixture)."""
    base, aligned = sparc.decoders.astype(np.float64)
    norms = np.linalg.norm([base, aligned], axis=-1)  # [s, l, w]
    theta = np.einsum("lwd,lwd->lw", base, aligned) / np.maximum(norms.prod(0), 1e-12)
    norm_base, norm_aligned = norms.sum(1)
    columns = {
        "latent": np.arange(base.shape[1]), "forced": sparc.forced,
        "rho": norm_aligned / (norm_base + norm_aligned + 1e-8), "theta": theta.mean(0),
        "norm_base": norm_base, "norm_aligned": norm_aligned,
    }  # fmt: skip
    if len(norms[0]) > 1:  # a window of layers
        share = norms.sum(0) / np.maximum(norms.sum(0).sum(0), 1e-8)
        entropy, least = -(share * np.log(share + 1e-8)).sum(0) / np.log(len(share)), np.abs(theta).min(0)
        columns |= {"entropy": entropy, "persistent": entropy >= 0.6, "min_abs_theta": least, "drifting": least < 0.5}
    fires, mean, rows = 0, 0, len(streams["base"])
    for _, z, _ in sparc.batches(streams, 256):
        fires = fires + (z > 0).any(2).sum(1).numpy() / rows
        mean = mean + z.mean(2).double().sum(1).numpy() / rows
    both = {"density": fires, "cf": mean}
    columns |= {f"{name}_{stream}": both[name][i] for name in both for i, stream in enumerate(STREAMS)}
    table = pd.DataFrame(columns | {"cf_shift": mean[1] - mean[0]})
    cuts, components = adaptive(table["rho"].to_numpy())
    table["label"] = labels(table, cuts)
    table.attrs |= {"thresholds": cuts, "components": components}
    return table


def labels(table: pd.DataFrame, cuts: dict) -> np.ndarray:
    """Labels of a `classify` table under any cuts on rho: the first rule that holds, in the published order."""
    rho, abs_theta = table["rho"].to_numpy(), table["theta"].abs().to_numpy()
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


def adaptive(rho: np.ndarray) -> tuple[dict[str, float], int | None]:
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
        (_, first, narrow), (_, last, wide) = components[0], components[-1]  # means and deviations
        base_only, aligned_only = np.clip(min(low, first + 2 * narrow), 0.05, 0.4), max(high, last - 2 * wide)
        cuts = base_only, np.clip(aligned_only, 0.5, 0.98), low, high
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


def feature_sharing_ratio(table: pd.DataFrame) -> dict[str, float]:
    """Shared latents over shared + exclusive ones (`single_layer`) and over all (`multi_layer`), as published.

    Untrained latents count as shared (rho near 0.5), forced ones as shared_aligned: for the ratio of trained, free ones
    pass `table[~table.forced & (table.density_base > 0)]`. NaN if empty."""
    shared, exclusive = table["label"].isin(SHARED).sum(), table["label"].isin(EXCLUSIVE).sum()
    sizes = {"single_layer": shared + exclusive, "multi_layer": len(table)}
    return {name: float(shared / size) if size else math.nan for name, size in sizes.items()}
