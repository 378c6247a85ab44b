"""Whole streams and directions of preference of two models, and of two halves of one model."""

import numpy as np
from pandas import DataFrame
from scipy import stats

from alignlens.core.errors import GeometryError
from alignlens.geometry.streams import angles, both_streams, checked_rows, compare_rows, cosine, leading_rank, ratio
from alignlens.probes import inputs, solver

BLOCKS = 20  # blocks of groups left out in turn for the intervals
# The numbers with intervals, and the range that each can take.
INTERVALS = dict.fromkeys("cka norm_ratio mean_cosine signal_ratio noise_ratio square_degrees".split(), (0, np.inf))
INTERVALS |= {"cka": (-np.inf, 1), "mean_cosine": (-1, 1)}


def compare(x, y, *, seed=0) -> dict:
    """How the rows of one model became the rows of another: turned, scaled, shifted or noisier.

    x, y : float arrays [rows, d], row i of both read from the same text; at least 16 rows
    cka, cka_biased : linear CKA (Kornblith et al., arXiv 1905.00414), unbiased (Nguyen et al., arXiv 2010.15327) and
        usual: 1 for any rotation and scale; unbiased, about 0 for unrelated rows, which have no map
    rotation_degrees : root-mean-square angle by which the best orthogonal map turns a row, planes weighted by variance
    norm_ratio : scale of y over x along that map, unmoved by noise; raw_norm_ratio : of the mean row norms
    identity_residual, procrustes_residual : share of y's variance left after the best scale of x, and after the best
        rotation and scale, on rows they were not fitted on; the difference is what turning explains
    mean_shift : norm of the difference of the means, over the root-mean-square norm of x about its mean
    principal_angles : degrees, ascending, between leading subspaces: 90 % of x's variance, at most 10 components
    map_agreement : overlap of the images of x under the maps of two halves; angles count those above 1/2 (else NaN)
    rank, variance_kept : joint components that the map mixes (fewer with d above 384 or below 4 d rows) and their share
        of the variance; the rest stays in place, so the turn of faint directions is underestimated
    Returns these as a dict. At noise of half the signal's variance, d = 64, angles are within 2 degrees from 2000 rows,
    8 from 300; half turns read up to 10 short. Raises GeometryError for unequal shapes, values not finite, few rows."""
    x, y = checked_rows(x, "x"), checked_rows(y, "y")
    inputs.refuse(x.shape != y.shape, f"x is {x.shape} and y {y.shape}: read both on the same rows.", GeometryError)
    numbers, _ = compare_rows(x, y, np.random.default_rng(seed).permutation(len(x)) % 2)
    return {name: number for name, number in numbers.items() if name != "square_degrees"}


def halves(x, groups, *, seed=0) -> dict:
    """What two disjoint halves of the groups of one model say: the floor under every angle between two models.

    x : [rows, d], streams, or differences chosen - rejected · groups : [rows], the prompt of each row
    Returns, over 10 random splits, mean principal_angles and mean_shift (as in `compare`), mean_cosine (of the halves'
    mean rows; for differences, preference directions), raw_norm_ratio (larger over smaller); pessimistic, as a half has
    half the rows. Rotation, CKA and residuals have no such floor: `compare` takes out their noise."""
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

    base, aligned : `.chosen` and `.rejected`, or tuples, of arrays [pairs, layers, d_model] · groups : [pairs], prompts
    Returns one row a layer: `compare` (principal_angles as principal_angle_max) and, on differences chosen - rejected,
    mean_cosine, probe_cosine of the models' mean differences and grouped probes (activation units, mean over folds),
    with `_floor` of two halves of base (10 splits; probe: one), lower for their fewer pairs; preference_angle_1 .. 5,
    degrees between first right singular spaces; signal_ratio, noise_ratio, aligned over base, of the mean's norm and
    the rms about it. `_low`, `_high` (95 %) of INTERVALS and rotation_degrees: jackknife over 20 blocks of groups."""
    models = both_streams(base, aligned)
    group = inputs.plan_folds(models[0].shape[0], groups, seed=seed).group
    blocks = min(BLOCKS, group.max() + 1)
    block = (np.random.default_rng([seed, 2]).permutation(group.max() + 1) % blocks)[group]
    member = np.equal.outer(np.arange(blocks), block).astype(np.float64)
    splits, rows, quantile = _splits(group, seed), [], stats.t.ppf(0.975, blocks - 1)
    masks = [np.full(len(group), True)] * 2 + [splits[0], ~splits[0]]
    kept = [(keep, inputs.plan_folds(keep.sum(), group[keep], seed=seed)) for keep in masks]
    for layer, (d, e) in enumerate(zip(*models, strict=True)):
        x, y = (np.concatenate([a[:, layer] for a in model.arrays]).astype(np.float64) for model in models)
        numbers, left_out = compare_rows(x, y, np.tile(block, 2), blocks)
        numbers["principal_angle_max"] = numbers.pop("principal_angles")[-1]
        moments = [(member.sum(1), member @ z, member @ (z**2).sum(1)) for z in (d, e)]  # of each block
        numbers |= _preference(moments)
        left_out = [others | _preference(moments, b) for b, others in enumerate(left_out)]
        for name, bounds in INTERVALS.items():
            half = quantile * np.sqrt((blocks - 1) * np.var([one[name] for one in left_out]))
            low, high = np.clip([numbers[name] - half, numbers[name] + half], *bounds)
            numbers |= {f"{name}_low": low, f"{name}_high": high}
        numbers |= {f"rotation_degrees_{s}": np.sqrt(numbers.pop(f"square_degrees_{s}")) for s in ("low", "high")}
        numbers["mean_cosine_floor"] = np.mean([cosine(d[first].mean(0), d[~first].mean(0)) for first in splits])
        probes = [solver.fit(z[at], plan).directions.mean(1) for z, (at, plan) in zip((d, e, d, d), kept, strict=True)]
        numbers |= {"probe_cosine": cosine(*probes[:2]), "probe_cosine_floor": cosine(*probes[2:])}
        between = angles(d.T @ d, e.T @ e, min(5, *d.shape))
        numbers |= {f"preference_angle_{i}": angle for i, angle in enumerate(between, 1)}
        rows.append({"layer": layer} | numbers)
    return DataFrame(rows).drop(columns="square_degrees")


def _splits(group: np.ndarray, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, 3])
    return [(rng.permutation(group.max() + 1) % 2 == 0)[group] for _ in range(10)]  # masks of the first halves


def _preference(moments, without: int | None = None) -> dict:
    """From pairs, sum [d] and sum of squared norms of the differences of each block, of base and of aligned."""
    sums = [[m.sum(0) - (0 if without is None else m[without]) for m in moment] for moment in moments]
    means = [total / n for n, total, _ in sums]
    signal = [np.linalg.norm(mean) for mean in means]
    noise = [np.sqrt(max(square / n - s**2, 0.0)) for (n, _, square), s in zip(sums, signal, strict=True)]
    return {"mean_cosine": cosine(*means), "signal_ratio": ratio(*signal[::-1]), "noise_ratio": ratio(*noise[::-1])}
