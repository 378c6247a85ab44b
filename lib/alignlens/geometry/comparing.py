"""Whole streams and directions of preference of two models, and of two halves of one model."""

import numpy as np
from pandas import DataFrame
from scipy import stats

from alignlens.core.errors import GeometryError
from alignlens.geometry.streams import angles, both_streams, checked_rows, compare_rows, cosine, leading_rank, ratio
from alignlens.probes import inputs, solver

BLOCKS = 20  # blocks of groups left out in turn for the intervals
INTERVALS = ("cka", "norm_ratio", "mean_cosine", "signal_ratio", "noise_ratio", "square_degrees")


def compare(x, y, *, seed=0) -> dict:
    """How the rows of one model became the rows of another: turned, scaled, shifted or noisier.

    x, y : float arrays [rows, d], row i of both read from the same text; at least 16 rows. Fewer than 4 d rows, or d
    above 384, restrict the orthogonal map to the leading `rank` components of the joint covariance of x and y.

    Returns
    -------
    cka, cka_biased : linear CKA with the unbiased (Nguyen et al., arXiv 2010.15327) and the usual (Kornblith et al.,
        arXiv 1905.00414) estimate of HSIC; 1 for any rotation and scale; unbiased, about 0 for unrelated rows
    rotation_degrees : root-mean-square angle by which the best orthogonal map turns a row, planes weighted by variance
    norm_ratio : scale of y over x along that map; noise leaves it at 1. raw_norm_ratio : ratio of the mean row norms
    identity_residual, procrustes_residual : share of y's variance left after the best scale of x, and after the best
        rotation and scale, judged on rows they were not fitted on. Their difference is what turning explains
    mean_shift : norm of the difference of the means, over the root-mean-square norm of x about its mean
    principal_angles : degrees, ascending, between the leading subspaces that hold 90 % of x's variance (at most 10
        components; as many of y)
    map_agreement : overlap of the images of x under the maps of the two halves, 1 if the rows determine the map. Angles
        count only directions where it passes 1/2 (NaN if none does). Unrelated streams with a few dominant directions
        may pass it by chance: where cka is about 0 there is no map, whatever the angle
    rank, variance_kept : components that the map mixes and their share of the joint variance; the rest stays in place,
        so a turn of faint directions, or of isotropic streams with fewer than 4 d rows, is underestimated

    Measured with noise of half the signal's variance, d = 64: angles within 2 degrees from 2000 rows and 8 from 300;
    noise shortens a half turn by up to 10. Raises GeometryError for shapes that differ, values that are not finite, too
    few rows, or rows that are all equal.
    """
    x, y = checked_rows(x, "x"), checked_rows(y, "y")
    inputs.refuse(x.shape != y.shape, f"x is {x.shape} and y {y.shape}: read both on the same rows.", GeometryError)
    numbers, _ = compare_rows(x, y, np.random.default_rng(seed).permutation(len(x)) % 2)
    return {name: number for name, number in numbers.items() if name != "square_degrees"}


def halves(x, groups, *, seed=0) -> dict:
    """What two disjoint halves of the groups of one model say: the floor under every angle between two models.

    x : [rows, d], streams, or differences chosen - rejected · groups : [rows], the prompt of each row

    Returns, averaged over 10 random splits: principal_angles (as in `compare`), mean_cosine (between the halves' mean
    rows; for differences, between preference directions), mean_shift, and raw_norm_ratio (larger over smaller).
    Rotation, CKA and residuals need the same rows twice and have no such floor: their noise is taken out within
    `compare`. A half has half the rows, so these floors are on the pessimistic side.
    """
    x = checked_rows(x, "x")
    centred, found = x - x.mean(0), []
    k = leading_rank(centred.T @ centred)
    for first in _splits(inputs.plan_folds(len(x), groups, seed=seed).group, seed):
        parts = x[first], x[~first]
        means, norms = [p.mean(0) for p in parts], [np.linalg.norm(p, axis=1).mean() for p in parts]
        grams = [(p - mean).T @ (p - mean) for p, mean in zip(parts, means, strict=True)]
        shift = np.linalg.norm(means[1] - means[0]) / np.sqrt(np.trace(grams[0]) / first.sum())
        found.append([cosine(*means), shift, max(norms) / min(norms), *angles(*grams, k)])
    mean_cosine, shift, norm_ratio, *between = np.mean(found, axis=0).tolist()
    return {"principal_angles": between, "mean_cosine": mean_cosine, "mean_shift": shift, "raw_norm_ratio": norm_ratio}


def compare_layers(base, aligned, groups, *, seed=0) -> DataFrame:
    """`compare` at every layer on chosen and rejected rows together, and the geometry of preference beside it.

    base, aligned : `.chosen` and `.rejected`, or tuples, of arrays [pairs, layers, d_model]; same pairs, same order
    groups : [pairs], the prompt of each pair

    Returns one row a layer: the numbers of `compare` (principal_angles as principal_angle_max), and, on the differences
    chosen - rejected:
    mean_cosine, probe_cosine : between the models' mean differences, and between their grouped probes (in activation
        units, averaged over folds); `_floor`: between two halves of base (mean: averaged over 10 splits; probe: one).
        A half has half the pairs, and the models share theirs, so a model that did not turn lies above the floor
    preference_angle_1 .. 5 : degrees between the spaces of the first right singular vectors of the differences
    signal_ratio, noise_ratio : aligned over base, of the norm of the mean difference and of the rms about it

    `_low`, `_high` (95 %) of cka, rotation_degrees, norm_ratio, mean_cosine, signal_ratio, noise_ratio: jackknife
    over 20 blocks of groups with a Student quantile, within the components that the map mixes. Raises GeometryError or
    ProbeError.
    """
    models = both_streams(base, aligned)
    group = inputs.plan_folds(models[0].shape[0], groups, seed=seed).group
    blocks = min(BLOCKS, group.max() + 1)
    block = (np.random.default_rng([seed, 2]).permutation(group.max() + 1) % blocks)[group]
    member = np.equal.outer(np.arange(blocks), block).astype(np.float64)
    splits, rows = list(_splits(group, seed)), []

    def direction(d: np.ndarray, keep=slice(None)) -> np.ndarray:
        return solver.fit(d[keep], inputs.plan_folds(len(d[keep]), group[keep], seed=seed)).directions.mean(1)

    for layer, (d, e) in enumerate(zip(*models, strict=True)):
        x, y = (np.concatenate([a[:, layer] for a in model.arrays]).astype(np.float64) for model in models)
        numbers, without = compare_rows(x, y, np.tile(block, 2), blocks)
        numbers["principal_angle_max"] = numbers.pop("principal_angles")[-1]
        moments = [(member.sum(1), member @ z, member @ (z**2).sum(1)) for z in (d, e)]  # of each block
        numbers |= _preference(moments)
        left_out = [without(b) | _preference(moments, b) for b in range(blocks)]
        for name in INTERVALS:
            numbers |= _jackknife(name, numbers[name], [one[name] for one in left_out])
        numbers |= {f"rotation_degrees_{s}": np.sqrt(numbers.pop(f"square_degrees_{s}")) for s in ("low", "high")}
        numbers["mean_cosine_floor"] = np.mean([cosine(d[first].mean(0), d[~first].mean(0)) for first in splits])
        numbers["probe_cosine"] = cosine(direction(d), direction(e))
        numbers["probe_cosine_floor"] = cosine(direction(d, splits[0]), direction(d, ~splits[0]))
        between = angles(d.T @ d, e.T @ e, min(5, *d.shape))
        numbers |= {f"preference_angle_{i}": angle for i, angle in enumerate(between, 1)}
        rows.append({"layer": layer} | numbers)
    return DataFrame(rows).drop(columns="square_degrees")


def _splits(group: np.ndarray, seed: int):
    """Masks of the rows in the first half, groups kept together."""
    rng = np.random.default_rng([seed, 3])
    return ((rng.permutation(group.max() + 1) % 2 == 0)[group] for _ in range(10))


def _preference(moments, without: int | None = None) -> dict:
    """From pairs, sum [d] and sum of squared norms of the differences of each block, of base and of aligned."""
    sums = [[m.sum(0) - (0 if without is None else m[without]) for m in moment] for moment in moments]
    means = [total / n for n, total, _ in sums]
    signal = [np.linalg.norm(mean) for mean in means]
    noise = [np.sqrt(max(square / n - s**2, 0.0)) for (n, _, square), s in zip(sums, signal, strict=True)]
    return {"mean_cosine": cosine(*means), "signal_ratio": ratio(*signal[::-1]), "noise_ratio": ratio(*noise[::-1])}


def _jackknife(name: str, value: float, left_out: list[float]) -> dict:
    """95 % interval from the values with one block left out, within the range that the number can take."""
    count = len(left_out)
    half = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) * np.var(left_out))
    bounds = {"mean_cosine": (-1, 1), "cka": (-np.inf, 1)}.get(name, (0, np.inf))
    return dict(zip((f"{name}_low", f"{name}_high"), np.clip([value - half, value + half], *bounds), strict=True))
