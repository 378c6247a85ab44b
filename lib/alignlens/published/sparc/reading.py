"""What the published study reads off the decoder rows: classes of latents, superposition, geometry of shared ones."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from sklearn.metrics import r2_score
from sklearn.mixture import GaussianMixture

from alignlens.dictionaries import STREAMS, unit
from alignlens.published.sparc.training import Sparc

SHARED = ("shared_aligned", "shared_redirected", "shared_intermediate", "shared_attenuated")
EXCLUSIVE = ("base_only", "aligned_only")
CLASSES = (*EXCLUSIVE, *SHARED, "other")
# The published fixed cuts on rho: used where no mixture can be fitted, or with `labels(table, FIXED)`.
FIXED = {"base_only": 0.15, "aligned_only": 0.85, "shared_low": 0.35, "shared_high": 0.65}
CANDIDATES, MIN_DENSITY = 256, 0.01  # base rows a regression starts from; of latents in corrected geometry
PINV = ("singular_mean", "singular_std", "condition", "angle_degrees")
PROCRUSTES = ("residual", "unrotated", "null_mean", "null_low", "p")


def classify(sparc: Sparc, streams) -> pd.DataFrame:
    """The published classes, one row a latent.

    rho = |aligned| / (|base| + |aligned|) of the decoder rows, theta = their cosine, norm_base, norm_aligned, forced,
    label; density_ (share of rows where it fires) and cf_ (mean code) _base and _aligned, cf_shift = aligned - base
    (published as "counterfactual sensitivity", without an intervention). In a window norms are summed and theta
    averaged over layers, and entropy (of layer norms, 1 = even), persistent, min_abs_theta and drifting are added. The
    cuts on rho adapt to each dictionary, so counts of two compare only under one set (`labels`): `attrs["thresholds"]`,
    from `attrs["components"]` mixture components (None: no mixture)."""
    base, aligned = sparc.decoders.astype(np.float64)
    norms = np.linalg.norm([base, aligned], axis=-1)  # [s, l, w]
    theta = np.einsum("lwd,lwd->lw", base, aligned) / np.maximum(norms.prod(0), 1e-12)
    norm_base, norm_aligned = norms.sum(1)
    rho = norm_aligned / (norm_base + norm_aligned + 1e-8)
    columns = {"latent": np.arange(len(rho)), "forced": sparc.forced, "rho": rho, "theta": theta.mean(0)}
    columns |= {"norm_base": norm_base, "norm_aligned": norm_aligned}
    if len(norms[0]) > 1:  # a window of layers
        share = norms.sum(0) / np.maximum(norms.sum(0).sum(0), 1e-8)
        entropy, least = -(share * np.log(share + 1e-8)).sum(0) / np.log(len(share)), np.abs(theta).min(0)
        columns |= {"entropy": entropy, "persistent": entropy >= 0.6, "min_abs_theta": least, "drifting": least < 0.5}
    fires, mean, rows = 0, 0, len(streams["base"])
    for _, z, _ in sparc.batches(streams, 256):
        fires = fires + (z > 0).any(2).sum(1).numpy() / rows
        mean = mean + z.mean(2).double().sum(1).numpy() / rows
    for name, both in (("density", fires), ("cf", mean)):
        columns |= {f"{name}_{stream}": values for stream, values in zip(STREAMS, both, strict=True)}
    table, (cuts, components) = pd.DataFrame(columns | {"cf_shift": mean[1] - mean[0]}), adaptive(rho)
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
        cuts = [low] * 4 if len(components) == 2 else cuts
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


def superposition(sparc: Sparc, table: pd.DataFrame, *, corrected=False, max_latents=256, draws=100) -> pd.DataFrame:
    """Are aligned-only latents sparse sums of base latents? Lasso (no intercept) of an aligned row on the base rows.

    published: alpha 0.01 in scikit-learn's units, where all weights are zero once alpha >= alpha_max = max |X'y| / d.
    For unit vectors alpha_max <= 1 / d, so the test is silent from d = 100 on (`can_fire`). Counted if r2 > 0.8 with 2
    to 50 non-zeros; windows: unit vectors, r2 >= 0.5, 2 or more, one of another layer. corrected: unit vectors,
    alpha = alpha_max / 10, and p <= 0.05 for the share of random directions (Gaussian mixtures of the aligned rows)
    that need no more non-zeros. Windows and `corrected` regress on the 256 base rows of largest |cosine|. One row a
    latent, at most `max_latents`, drawn at random of `attrs["aligned_only"]`; layer and part_layers are positions in
    the window, parts base latents by weight."""
    base, aligned = sparc.decoders.astype(np.float64)
    home, windowed = np.linalg.norm(aligned, axis=-1).argmax(0), len(base) > 1  # the layer where a latent writes most
    if corrected or windowed:
        base, aligned = unit(base), unit(aligned)
    flat = base.reshape(-1, base.shape[-1])
    candidates = CANDIDATES if corrected or windowed else len(flat)
    found = table.loc[table["label"] == "aligned_only", "latent"].to_numpy()
    rng, null, rows = np.random.default_rng(0), {}, []
    for latent in np.sort(rng.choice(found, min(max_latents, len(found)), replace=False)):
        layer = home[latent]
        row = _lasso(flat, aligned[layer, latent], candidates, corrected)
        layers, parts = np.divmod(np.array(row["parts"], int), base.shape[1])
        row |= {"latent": latent, "layer": layer, "parts": parts.tolist(), "part_layers": layers.tolist()}
        row["superposed"] = row["r2"] > 0.8 and 2 <= row["non_zeros"] <= 50
        if windowed:
            loosely = row["superposed"] if corrected else row["r2"] >= 0.5 and row["non_zeros"] >= 2
            row["superposed"] = loosely and bool((layers != layer).any())
        if corrected:
            if layer not in null:
                random = unit(rng.standard_normal((draws, base.shape[1])) @ aligned[layer])
                null[layer] = np.array([_lasso(flat, y, candidates, corrected)["non_zeros"] for y in random])
            p = (1 + (null[layer] <= row["non_zeros"]).sum()) / (1 + draws)
            row |= {"null_non_zeros": np.median(null[layer]), "p": p, "superposed": row["superposed"] & bool(p <= 0.05)}
        rows.append(row)
    columns = ["latent", "layer", "alpha", "alpha_max", "can_fire", "non_zeros", "r2", "parts", "part_layers"]
    out = pd.DataFrame(rows, columns=columns + ["null_non_zeros", "p"] * corrected + ["superposed"])
    out.attrs["aligned_only"] = len(found)
    return out


def _lasso(rows: np.ndarray, y: np.ndarray, candidates: int, corrected: bool) -> dict:
    """Lasso of y [d] on base rows [w, d]; `parts` are row numbers, heaviest first."""
    products = np.abs(rows @ y)
    kept, alpha_max = np.argsort(-products, kind="stable")[:candidates], products.max() / len(y)
    alpha = alpha_max / 10 if corrected else 0.01
    weights, can_fire = np.zeros(len(kept)), bool(alpha < alpha_max)
    if can_fire:  # else the solution is known to be zero, and at full size a fit takes seconds
        weights = Lasso(alpha=alpha, fit_intercept=False, max_iter=10_000).fit(rows[kept].T, y).coef_
    parts = [int(kept[i]) for i in np.argsort(-np.abs(weights), kind="stable") if abs(weights[i]) > 1e-6]
    measured = {"alpha": alpha, "alpha_max": alpha_max, "can_fire": can_fire, "non_zeros": len(parts)}
    return measured | {"r2": r2_score(y, weights @ rows[kept]), "parts": parts}


def shared_geometry(sparc: Sparc, table: pd.DataFrame, *, corrected=False, permutations=100) -> pd.DataFrame:
    """One linear map from the base to the aligned decoder rows of shared latents, per layer, class and all_shared.

    published: T = Va Vb' pinv(Vb Vb') (columns v): mean and std of its singular values, condition number (infinite
    below d latents), mean angle of v and Tv in degrees. corrected: the best orthogonal map (Procrustes) of unit
    vectors, on free latents that fire in at least 1 % of the rows of a stream: residual = share of squares that the map
    (with one scale) leaves, unrotated = without a map, null_mean, null_low (2.5 %) and p = under permuted partners. NaN
    below 10 latents, the published minimum."""
    dense = table[["density_base", "density_aligned"]].max(axis=1) >= MIN_DENSITY
    live = ~table["forced"] & dense if corrected else True
    rng, rows = np.random.default_rng(0), []
    for layer, (base, aligned) in enumerate(zip(*sparc.decoders.astype(np.float64), strict=True)):
        for name in (*SHARED, "all_shared"):
            latents = table["latent"][live & table["label"].isin(SHARED if name == "all_shared" else [name])]
            row = {"layer": layer, "label": name, "n": len(latents)}
            if len(latents) >= 10:
                pair = base[latents], aligned[latents]
                row |= _procrustes(*map(unit, pair), permutations, rng) if corrected else _pinv_map(*pair)
            rows.append(row)
    return pd.DataFrame(rows, columns=["layer", "label", "n", *(PROCRUSTES if corrected else PINV)])


def _pinv_map(base: np.ndarray, aligned: np.ndarray) -> dict[str, float]:
    """Numbers of the map T with T base_i ~ aligned_i; rows [n, d]."""
    t = aligned.T @ base @ np.linalg.pinv(base.T @ base)
    singular, cosine = np.linalg.svd(t, compute_uv=False), np.abs((unit(base) * unit(base @ t.T)).sum(1)).clip(max=1)
    condition = singular[0] / singular[-1] if singular[-1] > 1e-12 else math.inf
    numbers = singular.mean(), singular.std(), condition, np.degrees(np.arccos(cosine)).mean()
    return dict(zip(PINV, numbers, strict=True))


def _procrustes(base: np.ndarray, aligned: np.ndarray, permutations: int, rng) -> dict[str, float]:
    def residual(partner):
        return 1 - (orthogonal_procrustes(base, partner)[1] / len(base)) ** 2  # unit rows: |base| |partner| = n

    found = residual(aligned)
    null = np.array([residual(aligned[rng.permutation(len(base))]) for _ in range(permutations)])
    unrotated, p = 1 - ((base * aligned).sum() / len(base)) ** 2, (1 + (null <= found).sum()) / (1 + permutations)
    return dict(zip(PROCRUSTES, (found, unrotated, null.mean(), np.percentile(null, 2.5), p), strict=True))
