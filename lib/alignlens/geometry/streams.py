"""The turn, scale and noise between two streams, and the linear algebra that comparing and decomposing share."""

from typing import NamedTuple

import numpy as np
from scipy import linalg
from scipy.sparse.linalg import eigsh

from alignlens.core.errors import GeometryError
from alignlens.probes.inputs import Differences, refuse, same_rows


def both_streams(base, aligned) -> list[Differences]:
    models = same_rows(base, aligned)
    bare = any(len(model.arrays) < 2 for model in models)
    refuse(bare, "base or aligned holds differences only: pass chosen and rejected, to fit the map.", GeometryError)
    return models


def checked_rows(x, name: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    refuse(x.ndim != 2 or len(x) < 16, f"{name} has shape {x.shape}: pass at least 16 rows [rows, d].", GeometryError)
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    refuse(len(bad) > 0, f"{name} is NaN or infinite in rows {bad[:3]}: drop them from both models.", GeometryError)
    return x


class Sums(NamedTuple):  # over centred rows in a basis of `rank` directions: all that an orthogonal map needs
    xx: np.ndarray  # [rank, rank]
    xy: np.ndarray  # [rank, rank], x' y
    yy: np.ndarray  # [rank, rank]
    norms: np.ndarray  # [6]: rows, |x|^2, |y|^2, |x|^2 |y|^2, |x|^4, |y|^4 of each row
    whole: np.ndarray  # [3]: |x|^2, x y, |y|^2 in all d dimensions

    @classmethod
    def of(cls, x, y, whole):
        a, b = (x**2).sum(1), (y**2).sum(1)
        return cls(x.T @ x, x.T @ y, y.T @ y, np.array([len(x), a.sum(), b.sum(), a @ b, a @ a, b @ b]), whole.sum(0))

    @classmethod
    def total(cls, parts):
        return cls(*map(sum, zip(*parts, strict=True)))


def compare_rows(x, y, block: np.ndarray, blocks: int = 2):
    """Numbers of `compare` and square_degrees; if blocks > 2, also those with intervals as each block is left out."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    raw = np.linalg.norm(y, axis=1).mean() / np.linalg.norm(x, axis=1).mean()
    x, y = x - mean_x, y - mean_y
    whole = np.stack([(x**2).sum(1), (x * y).sum(1), (y**2).sum(1)], axis=1)
    full = Sums.of(x, y, whole)
    refuse(not min(full.whole[::2]) > 0, "All rows of x or y are equal: such a layer has no geometry.", GeometryError)
    basis, kept = joint_components(full.xx, full.yy, len(x), 0.999)  # fainter directions have no orientation
    basis = basis @ np.linalg.eigh(basis.T @ full.xx @ basis)[1]  # the principal directions of x among them
    u, v = x @ basis, y @ basis
    parts = [Sums.of(u[block == b], v[block == b], whole[block == b]) for b in range(blocks)]
    half = [Sums.total(parts[b::2]) for b in (0, 1)]
    maps, both = [polar(sums.xy) for sums in half], Sums.total(half)
    # Mean squared angle over mean squared chord of the planes of the map: 1 if small, (pi / 2)^2 at 180 degrees.
    turn = polar(both.xy)
    cosines, axes = np.linalg.eigh((turn + turn.T) / 2)
    cosines, weight = np.clip(cosines, -1, 1), np.diag(both.xx) @ axes**2 / np.diag(both.xx).sum()
    chord = weight @ (2 - 2 * cosines)
    curvature = (weight @ np.arccos(cosines) ** 2) / chord if chord > 1e-6 else 1.0
    within = _numbers(half, maps, curvature)
    shift, k = np.linalg.norm(mean_y - mean_x) / np.sqrt(full.whole[0] / len(x)), leading_rank(full.xx)
    numbers = {"rotation_degrees": np.sqrt(np.maximum(within["square_degrees"], 0))} | within | _cka(full)
    numbers |= {"raw_norm_ratio": raw, "mean_shift": shift, "principal_angles": angles(full.xx, full.yy, k)}
    numbers |= {"rank": basis.shape[1], "variance_kept": kept}
    left_out = []
    for b in range(blocks if blocks > 2 else 0):
        less, turn = list(half), list(maps)
        less[b % 2] = Sums(*map(np.subtract, half[b % 2], parts[b]))
        turn[b % 2] = polar(less[b % 2].xy)
        # CKA's spread within the joint components is put around the whole one.
        cka = numbers["cka"] + _cka(Sums.total(less))["cka"] - _cka(both)["cka"]
        left_out.append(_numbers(less, turn, curvature) | {"cka": cka})
    return numbers, left_out


def _numbers(half: list[Sums], maps: list[np.ndarray], curvature: float) -> dict:
    """What needs an orthogonal map: fitted on each half (`maps`), read on the other."""
    both = Sums.total(half)
    fitted, held_out = ([np.sum(r * h.xy) for r, h in zip(order, half, strict=True)] for order in (maps, maps[::-1]))
    xx, xy, yy = np.stack([sums.whole for sums in half], axis=1)
    rest = xy - [np.trace(sums.xy) for sums in half]  # overlap of the part that no map turns
    # Rows: without and with a turn; columns: the half that is read, by the scale of the other one.
    scale = np.maximum([xy, fitted + rest] / xx, 0)[:, ::-1]
    left = yy - 2 * scale * [xy, held_out + rest] + scale**2 * xx
    residual = (np.maximum(left, 0) / both.whole[2]).sum(1)
    # Noise turns both images of a direction off the true one: they lose a share of their overlap with it, that share
    # squared of their overlap with each other. Where images agree on less than half there is no angle.
    total = np.trace(both.xx)
    variance, agreement = np.diag(both.xx) / total, (maps[0] * maps[1]).sum(1)
    weight = np.where(agreement > 0.5, variance, 0)
    chord = 2 - np.diag(maps[0] + maps[1]) / np.sqrt(np.maximum(agreement, 0.5))
    square = curvature * weight @ chord / weight.sum() if weight.any() else np.nan
    numbers = {"identity_residual": residual[0], "procrustes_residual": residual[1]}
    numbers |= {"square_degrees": np.degrees(np.degrees(min(square, np.pi**2))), "map_agreement": variance @ agreement}
    # Noise makes the fitted overlap too large by as much as the held-out one too small, to second order.
    return numbers | {"norm_ratio": (sum(fitted) + sum(held_out)) / (2 * total)}


def _cka(sums: Sums) -> dict:
    """Linear CKA from sums over centred rows; unbiased HSIC with the diagonal of both Gram matrices left out."""
    n, x, y, xy, xx, yy = sums.norms
    terms = (sums.xy, xy, x, y), (sums.xx, xx, x, x), (sums.yy, yy, y, y)
    top, *size = (np.sum(gram**2) - cross * n / (n - 2) + a * b / ((n - 1) * (n - 2)) for gram, cross, a, b in terms)
    biased = np.sum(sums.xy**2) / (np.linalg.norm(sums.xx) * np.linalg.norm(sums.yy))
    return {"cka": ratio(top, np.sqrt(max(size[0], 0) * max(size[1], 0))), "cka_biased": biased}


def polar(xy: np.ndarray) -> np.ndarray:
    """Orthogonal R that brings x R closest to y, from x' y; where x has no variance a faint pull closes its planes."""
    left, _, right = np.linalg.svd(xy + 1e-9 * (np.abs(xy).max() * np.eye(len(xy)) - xy.T))
    return left @ right


def joint_components(xx, yy, rows: int, share: float) -> tuple[np.ndarray, float]:
    """Leading eigenvectors [d, rank] of both covariances at trace 1, as x may turn into faint ones; their share."""
    joint = xx / np.trace(xx) + yy / np.trace(yy)
    values, axes = eigen(joint, min(len(joint), max(rows // 4, 1), 384))  # a map costs the cube of its components
    running = np.cumsum(values) / np.trace(joint)
    rank = min(np.searchsorted(running, share) + 1, len(values))
    return axes[:, :rank], float(min(running[rank - 1], 1.0))


def eigen(symmetric: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues and their vectors [d, count], largest first."""
    d = len(symmetric)
    if d > 512 and count <= 16 and symmetric.any():
        values, axes = eigsh(symmetric, count, v0=np.ones(d))
        order = np.argsort(-values)
        return values[order], axes[:, order]
    values, axes = linalg.eigh(symmetric, subset_by_index=(d - count, d - 1))
    return values[::-1], axes[:, ::-1]


def leading_rank(gram: np.ndarray) -> int:
    values = eigen(gram, min(10, len(gram)))[0]  # at most 10 components, enough for 90 % of the variance
    return int(min(np.searchsorted(np.cumsum(values), 0.9 * np.trace(gram)) + 1, len(values)))


def angles(first: np.ndarray, second: np.ndarray, k: int) -> list[float]:
    """Principal angles in degrees, ascending, between the leading k eigenvectors of two Gram matrices [d, d]."""
    return np.degrees(linalg.subspace_angles(eigen(first, k)[1], eigen(second, k)[1]))[::-1].tolist()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(ratio(a @ b, np.linalg.norm(a) * np.linalg.norm(b)))


def ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else np.nan
