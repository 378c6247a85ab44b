"""Weighted metrics of the mirrored rows {x: 1, -x: 0}, and what a redrawn pair does to them."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from alignlens.probes.solver import BLOCK, Probes


def metrics(probes: Probes, x, weights: np.ndarray, *names: str) -> np.ndarray:
    """METRICS [labellings * names, replicates] of the held-out scores on x under pair weights [replicates, pairs]."""
    sides = [side.T for side in probes.scores(x)]
    asked = [(METRICS[name], *scores) for scores in zip(*sides, strict=True) for name in names]
    blocks = np.array_split(weights, -(-weights.size // BLOCK))
    values = np.array([np.concatenate([metric(*scores, w) for w in blocks]) for metric, *scores in asked])
    if probes.plan.grouped and len(weights) > 1:  # to first order, a weight also counts where its pair trains
        slopes = np.stack([slope[name] for slope in map(_slopes, sides[0]) for name in names], axis=1)
        values = np.clip(values + ((weights - 1) @ probes.influence(x, slopes)).T, 0, 1)
    return values


def accuracy(positive, negative, weights) -> np.ndarray:
    """Weighted share [replicates] of rows on the right side of zero; a score of zero counts half."""
    return weights @ (0.5 + 0.25 * (np.sign(positive) - np.sign(negative))) / weights.sum(1)


def auroc(positive, negative, weights, negative_weights) -> np.ndarray:
    """Weighted chance [replicates] that a positive outscores a negative, ties half; NaN without both kinds."""
    below, ties = _weight_below(negative, negative_weights, positive)
    won = np.einsum("ij,ij->i", weights, below + 0.5 * ties, dtype=np.float64)
    total = weights.sum(1, dtype=np.float64) * negative_weights.sum(1, dtype=np.float64)
    return np.divide(won, total, out=np.full(len(total), np.nan), where=total > 0)


def average_precision(positive, negative, weights) -> np.ndarray:
    """Weighted average precision [replicates]: precision at the score of each positive row, averaged over them."""
    total = weights.sum(1, keepdims=True)
    true, false = (total - _weight_below(side, weights, positive)[0] for side in (positive, negative))
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=weights > 0)
    return np.einsum("ij,ij->i", weights, precision, dtype=np.float64) / total[:, 0]


METRICS = {"accuracy": accuracy, "auroc": lambda p, n, w: auroc(p, n, w, w), "auprc": average_precision}


def _weight_below(scores, weights, thresholds) -> tuple[np.ndarray, np.ndarray]:
    """Weight [replicates, thresholds] of the scores below each threshold, and of those equal to it."""
    order = np.argsort(scores)
    running = np.zeros((len(weights), len(scores) + 1), weights.dtype)
    np.cumsum(weights[:, order], axis=1, out=running[:, 1:])
    left, right = (np.searchsorted(scores[order], thresholds, side) for side in ("left", "right"))
    below = running[:, left]
    return below, running[:, right] - below


def _slopes(score: np.ndarray) -> dict[str, np.ndarray]:
    """Derivative [pairs] of each metric to the score s of each pair; of a rank metric, with a smoothed density."""
    n, ordered = len(score), np.sort(score)
    at_zero, at_mirror = _density(score, np.zeros(1)), _density(score, -score)
    # P / (P + F)^2 at the thresholds x and -x, with P and F the shares of x and of -x scored at least this high.
    threshold = np.stack([score, -score])
    true = 1 - np.searchsorted(ordered, threshold, "left") / n
    precision = (true / np.maximum(true + np.searchsorted(ordered, -threshold, "right") / n, 1 / n) ** 2).sum(0)
    return {"accuracy": np.repeat(at_zero, n) / n, "auroc": 2 * at_mirror / n, "auprc": at_mirror * precision / n}


def _density(sample: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Gaussian kernel density of a sample (Silverman's bandwidth, binned); 0 if all values are equal."""
    quartiles = np.subtract(*np.percentile(sample, (75, 25)))
    width = 0.9 * min(sample.std(), quartiles / 1.34 or np.inf) * len(sample) ** -0.2
    if not width > 0:
        return np.zeros(len(at))
    counts, edges = np.histogram(sample, 512, (sample.min() - 4 * width, sample.max() + 4 * width))
    step = edges[1] - edges[0]
    smooth = gaussian_filter1d(counts / (len(sample) * step), width / step, mode="constant")
    return np.interp(at, (edges[1:] + edges[:-1]) / 2, smooth, left=0, right=0)
