"""Rotation, scaling and noise between the residual streams of two models that read the same rows.

Read one model with another model's direction and a drop has three causes: the signal weakened, it turned, or it drowned
in noise. `compare` keeps the three apart for whole streams, `compare_layers` adds the directions of preference, and
`decompose` splits a change of probe AUROC into what is kept, rotated, attenuated and created. `halves` says what two
disjoint halves of one model give: an angle between two models means nothing without it.

Conventions: y = scale * x R with R orthogonal, rows centred. A map is fitted on one half of the rows and read on the
other, so noise, whose best map differs from half to half, does not pass for rotation. Solvers work in float64.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import linalg, stats
from scipy.sparse.linalg import eigsh

from alignlens.core.errors import GeometryError
from alignlens.probes import _bootstrap_weights, _Differences, _fit, _metrics, _plan, _Problem, _with_intervals

PREFERENCE_RANK = 5
SPLITS = 10  # random splits into halves that a floor is averaged over

_RANK = 384  # joint components an orthogonal map may mix: a map costs the cube of it
_SHARE = 0.999  # of the joint variance: what lies beyond is too faint to have an orientation
_INTERVALS = ("cka", "norm_ratio", "mean_cosine", "signal_ratio", "noise_ratio")


# --- What a user asks for -----------------------------------------------------------------------------------------


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
    x, y = _rows(x, "x"), _rows(y, "y")
    _check_same(x.shape, y.shape, "x", "y")
    block = np.random.default_rng(seed).permutation(len(x)) % 2
    numbers = _compare(x, y, block)[0]
    del numbers["square_degrees"]
    return numbers


def halves(x, groups, *, seed=0) -> dict:
    """What two disjoint halves of the groups of one model say: the floor under every angle between two models.

    x : [rows, d], streams, or differences chosen - rejected · groups : [rows], the prompt of each row

    Returns, averaged over 10 random splits: principal_angles (as in `compare`), mean_cosine (between the halves' mean
    rows; for differences, between preference directions), mean_shift, and raw_norm_ratio (larger over smaller).
    Rotation, CKA and residuals need the same rows twice and have no such floor: their noise is taken out within
    `compare`. A half has half the rows, so these floors are on the pessimistic side.
    """
    x = _rows(x, "x")
    group = _grouped_plan(groups, len(x), seed).group
    centred = x - x.mean(0)
    k = _leading_rank(centred.T @ centred)
    found = []
    for first in _splits(group, seed):
        parts = x[first], x[~first]
        means, norms = [p.mean(0) for p in parts], [np.linalg.norm(p, axis=1).mean() for p in parts]
        grams = [(p - mean).T @ (p - mean) for p, mean in zip(parts, means, strict=True)]
        shift = np.linalg.norm(means[1] - means[0]) / np.sqrt(np.trace(grams[0]) / first.sum())
        found.append([_cosine(*means), shift, max(norms) / min(norms), *_angles(*(_top(gram, k) for gram in grams))])
    cosine, shift, ratio, *angles = np.mean(found, axis=0).tolist()
    return {"principal_angles": angles, "mean_cosine": cosine, "mean_shift": shift, "raw_norm_ratio": ratio}


def compare_layers(base, aligned, groups, *, seed=0, blocks=20) -> pd.DataFrame:
    """`compare` at every layer on chosen and rejected rows together, and the geometry of preference beside it.

    base, aligned : `.chosen` and `.rejected`, or tuples, of arrays [pairs, layers, d_model]; same pairs, same order
    groups : [pairs], the prompt of each pair · blocks : blocks of groups left out in turn for the intervals

    Returns one row a layer: the numbers of `compare` (principal_angles as principal_angle_max), and, on the differences
    chosen - rejected:
    mean_cosine, probe_cosine : between the models' mean differences, and between their grouped probes (in activation
        units, averaged over folds); `_floor`: between two halves of base (mean: averaged over 10 splits; probe: one).
        A half has half the pairs, and the models share theirs, so a model that did not turn lies above the floor
    preference_angle_1 .. 5 : degrees between the spaces of the first right singular vectors of the differences
    signal_ratio, noise_ratio : aligned over base, of the norm of the mean difference and of the rms about it

    `_low`, `_high` (95 %) of cka, rotation_degrees, norm_ratio, mean_cosine, signal_ratio, noise_ratio: delete-block
    jackknife with a Student quantile, within the components that the map mixes. Raises GeometryError or ProbeError.
    """
    models = _pair(base, aligned)
    plan = _plan(models[0], groups, "grouped", 5, seed)
    if blocks < 4:
        raise GeometryError(f"blocks is {blocks}: the jackknife needs at least 4 (20 are usual).")
    blocks = min(blocks, plan.group.max() + 1)
    block = (np.random.default_rng([seed, 2]).permutation(plan.group.max() + 1) % blocks)[plan.group]
    splits = list(_splits(plan.group, seed))
    rows = []
    for layer in range(plan.layers):
        x, y = (np.concatenate([a[:, layer] for a in model.arrays]).astype(np.float64) for model in models)
        numbers, left_out = _compare(x, y, np.tile(block, 2), blocks)
        numbers["principal_angle_max"] = numbers.pop("principal_angles")[-1]
        differences = [model[layer] for model in models]
        moments = [_block_moments(d, block, blocks) for d in differences]
        numbers |= _preference(*(tuple(m.sum(0) for m in moment) for moment in moments))
        for b in range(blocks):
            left_out[b] |= _preference(*(tuple(m.sum(0) - m[b] for m in moment) for moment in moments))
        for name in _INTERVALS:
            numbers |= _jackknife(name, numbers[name], [one[name] for one in left_out])
        # Near zero only the square of an angle has a spread.
        square = _jackknife("square", numbers.pop("square_degrees"), [one["square_degrees"] for one in left_out])
        numbers |= {f"rotation_degrees_{side}": _root(square[f"square_{side}"]) for side in ("low", "high")}

        d = differences[0]
        numbers["mean_cosine_floor"] = np.mean([_cosine(d[first].mean(0), d[~first].mean(0)) for first in splits])
        numbers["probe_cosine"] = _cosine(*(_probe_direction(d, plan) for d in differences))
        numbers["probe_cosine_floor"] = _cosine(
            *(
                _probe_direction(d[keep], _grouped_plan(plan.group[keep], keep.sum(), seed))
                for keep in (splits[0], ~splits[0])
            )
        )
        k = min(PREFERENCE_RANK, *d.shape)
        angles = _angles(*(_top(d.T @ d, k) for d in differences))
        numbers |= {f"preference_angle_{i}": angle for i, angle in enumerate(angles, 1)}
        rows.append({"layer": layer} | numbers)
    return pd.DataFrame(rows)


def decompose(base, aligned, groups, *, folds=5, seed=0, bootstrap=1000) -> pd.DataFrame:
    """Split what probes read in two models into kept, rotated, attenuated and created, in AUROC above 0.5.

    base, aligned, groups, folds, seed, bootstrap : as in `probes.transfer`, but chosen and rejected are both needed

    Returns one row a layer; numbers but the last two with `_low`, `_high` (95 %, the same groups redrawn for both):
    base, aligned : held-out AUROC of each model's own grouped probe
    direct, repaired : AUROC of base's probe on aligned, as it is, and after undoing the best orthogonal map and scale
        from base to aligned, fitted on the streams of the training folds (chosen and rejected each about their mean,
        so that the map knows no label; at most 384 components)
    change = aligned - base, gap = aligned - direct, repair = repaired - direct
    kept : what base's probe reads in aligned, no more than either own probe reads
    rotated : what both own probes read and base's probe misses; rotated_repaired : how much of it the map restores
    attenuated, created : what only base's, and only aligned's, own probe reads
        kept + rotated + attenuated = base - 0.5 and kept + rotated + created = aligned - 0.5 (0 where below chance)
    verdict : "none" if neither own probe is above chance (`_low` > 0.5); else "rotated" if rotated_low > 0, followed by
        "repaired" if also repair_low > 0; "attenuated" if change_high < 0; "created" if change_low > 0; joined by "+";
        "kept" if none of these holds. "unknown" without bootstrap. No correction for the number of
        layers
    signal_ratio, spread_ratio : mean and standard deviation of base's probe's held-out scores, aligned over base.
        AUROC does not see scale: a copy at half the size is kept, with both ratios 0.5

    "Rotated" means that base's direction misses signal; only "repaired" says that one orthogonal map of the whole
    stream explains it. Clipped parts are biased upward on noise: read them with their intervals.
    Raises GeometryError if streams are missing or shapes differ, ProbeError as `probes.fit_layers`.
    """
    models = _pair(base, aligned)
    plan = _plan(models[0], groups, "grouped", folds, seed)
    weights = _bootstrap_weights(plan.group, bootstrap, seed)
    rows = []
    for layer in range(plan.layers):
        x, y = (model[layer] for model in models)
        probe, own = _fit(_Problem(x), plan), _fit(_Problem(y), plan)
        undone = _undo(*([a[:, layer].astype(np.float64) for a in model.arrays] for model in models), plan)
        auroc = {
            name: _metrics(fitted, read, weights, ["auroc"])["auroc"]
            for name, fitted, read in (
                ("base", probe, x),
                ("aligned", own, y),
                ("direct", probe, y),
                ("repaired", probe, undone),
            )
        }
        above = {name: np.maximum(value - 0.5, 0) for name, value in auroc.items()}
        both = np.minimum(above["base"], above["aligned"])
        kept = np.minimum(above["direct"], both)
        values = auroc | {
            "change": auroc["aligned"] - auroc["base"],
            "gap": auroc["aligned"] - auroc["direct"],
            "repair": auroc["repaired"] - auroc["direct"],
            "kept": kept,
            "rotated": both - kept,
            "rotated_repaired": np.maximum(np.minimum(above["repaired"], both) - kept, 0),
            "attenuated": above["base"] - both,
            "created": above["aligned"] - both,
        }
        numbers = _with_intervals(values)
        score_x, score_y = (probe.scores(read)[0][:, 0] for read in (x, y))
        numbers["verdict"] = _verdict(numbers)
        numbers["signal_ratio"] = _ratio(score_y.mean(), score_x.mean())
        numbers["spread_ratio"] = _ratio(score_y.std(), score_x.std())
        rows.append({"layer": layer} | numbers)
    return pd.DataFrame(rows)


# --- Inputs -------------------------------------------------------------------------------------------------------


def _rows(x, name: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 16:
        raise GeometryError(f"{name} has shape {x.shape}: pass at least 16 rows [rows, d] of one layer.")
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise GeometryError(f"{name} is NaN or infinite in row {np.flatnonzero(bad)[0]}: drop it from both models.")
    return x


def _check_same(first: tuple, second: tuple, *names: str) -> None:
    if first != second:
        raise GeometryError(f"{names[0]} is {first} and {names[1]} {second}: read both models on the same rows.")


def _grouped_plan(groups, n: int, seed: int, folds: int = 5):
    return _plan(_Differences(np.zeros((n, 1, 1))), groups, "grouped", folds, seed)


def _pair(base, aligned) -> list[_Differences]:
    models = [_Differences.of(base, "base"), _Differences.of(aligned, "aligned")]
    for model, name in zip(models, ("base", "aligned"), strict=True):
        if len(model.arrays) < 2:
            raise GeometryError(f"{name} holds differences only: pass chosen and rejected, whose streams fix the map.")
    _check_same(models[0].shape, models[1].shape, "base", "aligned")
    return models


def _splits(group: np.ndarray, seed: int):
    """Masks of the rows in the first half, groups kept together."""
    rng = np.random.default_rng([seed, 3])
    for _ in range(SPLITS):
        yield (rng.permutation(group.max() + 1) % 2 == 0)[group]


# --- Whole streams ------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums over centred rows, in a basis of `rank` directions: all that `_numbers` needs, additive over rows."""

    xx: np.ndarray  # [rank, rank]
    xy: np.ndarray  # [rank, rank], x' y
    yy: np.ndarray  # [rank, rank]
    norms: np.ndarray  # [6]: rows, |x|^2, |y|^2, |x|^2 |y|^2, |x|^4, |y|^4 of each row
    whole: np.ndarray  # [3]: |x|^2, x y, |y|^2 in all d dimensions

    @classmethod
    def of(cls, x, y, whole=None) -> "_Sums":
        a, b = (x**2).sum(1), (y**2).sum(1)
        norms = np.array([len(x), a.sum(), b.sum(), a @ b, a @ a, b @ b])
        whole = np.array([a.sum(), (x * y).sum(), b.sum()]) if whole is None else whole
        return cls(x.T @ x, x.T @ y, y.T @ y, norms, whole)

    def plus(self, other: "_Sums", sign=1) -> "_Sums":
        return _Sums(*(a + sign * b for a, b in zip(self, other, strict=True)))


def _compare(x, y, block: np.ndarray, blocks: int = 2) -> tuple[dict, list[dict]]:
    """The numbers of `compare`, and those with intervals when a block is left out; halves are even and odd blocks."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    raw = np.linalg.norm(y, axis=1).mean() / np.linalg.norm(x, axis=1).mean()
    x, y = x - mean_x, y - mean_y
    full = _Sums.of(x, y)
    for name, total in (("x", full.whole[0]), ("y", full.whole[2])):
        if not total > 0:
            raise GeometryError(f"All rows of {name} are equal: a layer that does not vary has no geometry.")
    basis, kept = _joint_components(full.xx, full.yy, len(x), _SHARE)
    basis = basis @ np.linalg.eigh(basis.T @ full.xx @ basis)[1]  # the principal directions of x among them
    whole = np.stack([(x**2).sum(1), (x * y).sum(1), (y**2).sum(1)], axis=1)
    u, v = x @ basis, y @ basis
    parts = [_Sums.of(u[block == b], v[block == b], whole[block == b].sum(0)) for b in range(blocks)]
    half = [parts[0], parts[1]]
    for b in range(2, blocks):
        half[b % 2] = half[b % 2].plus(parts[b])
    maps = [_polar(h.xy) for h in half]
    both = half[0].plus(half[1])
    curvature = _curvature(np.diag(both.xx), _polar(both.xy))
    within = _numbers(half, maps, curvature)
    degrees = {"rotation_degrees": _root(within["square_degrees"])}
    k = _leading_rank(full.xx)
    numbers = degrees | within | _cka(full) | {
        "raw_norm_ratio": raw,
        "mean_shift": np.linalg.norm(mean_y - mean_x) / np.sqrt(full.whole[0] / len(x)),
        "principal_angles": _angles(_top(full.xx, k), _top(full.yy, k)),
        "rank": basis.shape[1],
        "variance_kept": kept,
    }  # fmt: skip
    if blocks == 2:
        return numbers, []
    left_out, cka = [], _cka(both)["cka"]
    for b in range(blocks):
        less, turn = list(half), list(maps)
        less[b % 2] = half[b % 2].plus(parts[b], -1)
        turn[b % 2] = _polar(less[b % 2].xy)
        one = _numbers(less, turn, curvature)
        # The jackknife reads CKA within the joint components; its spread is then put around the whole one.
        one["cka"] = numbers["cka"] + _cka(less[0].plus(less[1]))["cka"] - cka
        left_out.append(one)
    return numbers, left_out


def _numbers(half: list[_Sums], maps: list[np.ndarray], curvature: float) -> dict:
    """What needs an orthogonal map: fitted on each half (`maps`), read on the other."""
    both = half[0].plus(half[1])
    # With noise the fitted overlap is too large by as much as the held-out overlap is too small (both are Bregman
    # divergences of the nuclear norm, equal to second order), so their mean is the overlap without noise.
    fitted = [np.sum(turn * sums.xy) for turn, sums in zip(maps, half, strict=True)]
    held_out = [np.sum(turn * sums.xy) for turn, sums in zip(maps[::-1], half, strict=True)]
    residual = {"identity_residual": 0.0, "procrustes_residual": 0.0}
    for train, test in ((0, 1), (1, 0)):
        rest = [sums.whole[1] - np.trace(sums.xy) for sums in half]  # overlap of the part that no map turns
        overlap = {
            "identity_residual": (half[train].whole[1], half[test].whole[1]),
            "procrustes_residual": (fitted[train] + rest[train], held_out[test] + rest[test]),
        }
        for name, (seen, unseen) in overlap.items():
            scale = max(seen / half[train].whole[0], 0.0)
            left = half[test].whole[2] - 2 * scale * unseen + scale**2 * half[test].whole[0]
            residual[name] += max(left, 0.0) / both.whole[2]
    # Noise turns the two images of a direction away from the true one, each its own way: both lose the same share of
    # their overlap with the direction itself, and that share squared of their overlap with each other. Directions
    # whose images agree on less than half are noise to the map and have no angle.
    total = np.trace(both.xx)
    variance = np.diag(both.xx) / total
    agreement = (maps[0] * maps[1]).sum(1)
    cosine = np.diag(maps[0] + maps[1]) / 2
    weight = np.where(agreement > 0.5, variance, 0)
    chord = 2 - 2 * cosine / np.sqrt(np.maximum(agreement, 0.5))
    square = curvature * weight @ chord / weight.sum() if weight.any() else np.nan
    return residual | {
        "square_degrees": np.degrees(np.degrees(min(square, np.pi**2))),
        "map_agreement": variance @ agreement,
        "norm_ratio": (sum(fitted) + sum(held_out)) / (2 * total),
    }


def _curvature(variance: np.ndarray, turn: np.ndarray) -> float:
    """Mean squared angle over mean squared chord of the planes of an orthogonal map: 1 if small, (pi / 2)^2 at 180."""
    cosine, axes = np.linalg.eigh((turn + turn.T) / 2)
    cosine = np.clip(cosine, -1, 1)
    weight = variance @ axes**2 / variance.sum()
    chord = weight @ (2 - 2 * cosine)
    return (weight @ np.arccos(cosine) ** 2) / chord if chord > 1e-6 else 1.0


def _polar(xy: np.ndarray) -> np.ndarray:
    """Orthogonal R that brings x R closest to y, from x' y.

    Where x has no variance the data leave R open; a faint pull back along the known turn (-x' y transposed) and towards
    the identity closes its planes, so that a stream turned into new dimensions reads as 90 degrees.
    """
    size = np.abs(xy).max()
    left, _, right = np.linalg.svd(xy + 1e-9 * (size * np.eye(len(xy)) - xy.T))
    return left @ right


def _joint_components(xx, yy, rows: int, share: float) -> tuple[np.ndarray, float]:
    """Leading eigenvectors [d, rank] of the two covariances together, each at trace 1, and their share of variance.

    Joint, so that a direction that x turns into is there even where x itself has little variance.
    """
    joint = xx / np.trace(xx) + yy / np.trace(yy)
    values, axes = _eigen(joint, min(len(joint), max(rows // 4, 1), _RANK))
    running = np.cumsum(values) / np.trace(joint)
    rank = min(np.searchsorted(running, share) + 1, len(values))
    return axes[:, :rank], float(min(running[rank - 1], 1.0))


def _cka(sums: _Sums) -> dict:
    """Linear CKA from sums over centred rows; unbiased HSIC with the diagonal of both Gram matrices left out."""
    n, x, y, xy, xx, yy = sums.norms

    def unbiased(gram, cross, a, b):
        return np.sum(gram**2) - cross * n / (n - 2) + a * b / ((n - 1) * (n - 2))

    size = np.sqrt(max(unbiased(sums.xx, xx, x, x), 0) * max(unbiased(sums.yy, yy, y, y), 0))
    biased = np.sum(sums.xy**2) / (np.linalg.norm(sums.xx) * np.linalg.norm(sums.yy))
    return {"cka": _ratio(unbiased(sums.xy, xy, x, y), size), "cka_biased": biased}


# --- Directions of preference -------------------------------------------------------------------------------------


def _block_moments(d: np.ndarray, block: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs, sum [blocks, d] and squared norm of the differences of each block."""
    member = np.equal.outer(np.arange(blocks), block).astype(np.float64)
    return member.sum(1), member @ d, member @ (d**2).sum(1)


def _preference(base: tuple, aligned: tuple) -> dict:
    means = [total / n for n, total, _ in (base, aligned)]
    signal = [np.linalg.norm(mean) for mean in means]
    noise = [np.sqrt(max(m[2] / m[0] - s**2, 0.0)) for m, s in zip((base, aligned), signal, strict=True)]
    return {
        "mean_cosine": _cosine(*means),
        "signal_ratio": _ratio(signal[1], signal[0]),
        "noise_ratio": _ratio(noise[1], noise[0]),
    }


def _jackknife(name: str, value: float, left_out: list[float]) -> dict:
    """95 % interval from the values with one block left out, within the range that the number can take."""
    count = len(left_out)
    half = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) * np.var(left_out))
    lowest, highest = {"mean_cosine": (-1, 1), "cka": (-np.inf, 1)}.get(name, (0, np.inf))
    low, high = np.clip([value - half, value + half], lowest, highest)
    return {f"{name}_low": low, f"{name}_high": high}


def _probe_direction(d: np.ndarray, plan) -> np.ndarray:
    return _fit(_Problem(d), plan).directions.mean(1)


def _undo(base: list[np.ndarray], aligned: list[np.ndarray], plan) -> np.ndarray:
    """Aligned differences [pairs, d] taken back to base's orientation and scale, by the map of the other folds."""
    out = np.empty_like(base[0])
    for k in range(plan.folds):
        held = plan.fold == k
        # About the mean of each kind: else the map would join whatever follows the label in training.
        x, y = (np.concatenate([a[~held] - a[~held].mean(0) for a in model]) for model in (base, aligned))
        out[held] = difference = aligned[0][held] - aligned[1][held]
        xx, yy = x.T @ x, y.T @ y
        if not (np.trace(xx) > 0 and np.trace(yy) > 0):
            continue
        # All components: preference may lie in the faintest one.
        basis = _joint_components(xx, yy, len(x), 1.0)[0]
        xy = (x @ basis).T @ (y @ basis)
        turn = _polar(xy)
        scale = np.sum(turn * xy) / np.sum(xx * (basis @ basis.T))
        inside = difference @ basis
        out[held] = (difference + (inside @ turn.T - inside) @ basis.T) / (scale if scale > 0 else 1.0)
    return out


def _verdict(numbers: dict) -> str:
    if np.isnan(numbers["base_low"]):
        return "unknown"
    if not max(numbers["base_low"], numbers["aligned_low"]) > 0.5:
        return "none"
    rotated = numbers["rotated_low"] > 0
    words = {
        "rotated": rotated,
        "repaired": rotated and numbers["repair_low"] > 0,
        "attenuated": numbers["change_high"] < 0,
        "created": numbers["change_low"] > 0,
    }
    return "+".join(word for word, holds in words.items() if holds) or "kept"


# --- Linear algebra -----------------------------------------------------------------------------------------------


def _eigen(symmetric: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues and their vectors [d, count], largest first."""
    d = len(symmetric)
    if d > 512 and count <= 16 and symmetric.any():
        values, axes = eigsh(symmetric, count, v0=np.ones(d))
        order = np.argsort(-values)
        return values[order], axes[:, order]
    values, axes = linalg.eigh(symmetric, subset_by_index=(d - count, d - 1))
    return values[::-1], axes[:, ::-1]


def _top(gram: np.ndarray, k: int) -> np.ndarray:
    return _eigen(gram, k)[1]


def _leading_rank(gram: np.ndarray) -> int:
    """Fewest components that hold 90 % of the variance, at most 10."""
    values = _eigen(gram, min(10, len(gram)))[0]
    return int(min(np.searchsorted(np.cumsum(values), 0.9 * np.trace(gram)) + 1, len(values)))


def _angles(first: np.ndarray, second: np.ndarray) -> list[float]:
    return np.degrees(linalg.subspace_angles(first, second))[::-1].tolist()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(_ratio(a @ b, np.linalg.norm(a) * np.linalg.norm(b)))


def _root(square: float) -> float:
    return np.sqrt(max(square, 0.0)) if np.isfinite(square) else np.nan


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else np.nan
