"""Statistics that several instruments share: resampling of prompts, intervals, p-values, halves.

A *group* is a prompt: all answers and all copies of it are drawn, held out or flipped together. Intervals are central
95 % intervals; a table holds one as the columns ``name``, ``name_low`` and ``name_high``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm

Z95 = 1.96  # half a 95 % interval of a normal estimate, in standard errors
CENTRAL = (2.5, 97.5)  # percentiles


def resample(count: int, draws: int, rng) -> np.ndarray:
    """How often each of ``count`` groups occurs in each bootstrap draw: int [draws, count]. rng : Generator or seed."""
    return np.random.default_rng(rng).multinomial(count, np.full(count, 1 / count), size=draws)


def random_signs(index: np.ndarray, draws: int, *, seed: int = 0) -> np.ndarray:
    """Fair signs [rows, draws] in {-1, 1}: one per value of the integer ``index`` [rows], shared by its rows."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(index.max() + 1, draws))
    return signs[index]


def by_group(values: np.ndarray, groups) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts [groups, ...] over groups of the finite values [rows, ...]; groups in sorted order."""
    index = np.unique(groups, return_inverse=True)[1]
    known = np.isfinite(values)
    sums, counts = np.zeros((2, index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index, np.where(known, values, 0.0))
    np.add.at(counts, index, known)
    return sums, counts


def alternating_halves(groups) -> np.ndarray:
    """0 or 1 [rows]: groups fall into two halves by turns, in the order in which they first appear."""
    return pd.factorize(np.asarray(groups))[0] % 2


def interval(draws: np.ndarray, axis: int = 0) -> np.ndarray:
    """Central 95 % of bootstrap draws: [2, ...], low and high."""
    return np.percentile(draws, CENTRAL, axis=axis)


def standard_error(low, high, *, least: float = 1e-12):
    """Standard error of a normal estimate from its 95 % interval, at least ``least`` so that it can divide."""
    error = (high - low) / (2 * Z95)
    return error.clip(lower=least) if isinstance(error, pd.Series) else np.maximum(error, least)


def p_value(value, low, high, *, above: bool = False):
    """p of no effect for a normal estimate with a 95 % interval: two-sided, or one-sided that it is above zero."""
    error = standard_error(low, high)
    return norm.sf(value / error) if above else 2 * norm.sf(abs(value) / error)


def corrected(p, by=None):
    """p-values at a controlled false discovery rate (Benjamini and Hochberg, 1995), within each value of ``by``.

    p : array or Series; NaN stands for what was not tested and stays NaN.
    """
    if by is not None:
        return p.groupby(by).transform(corrected)
    known = np.isfinite(p)
    out = p.copy() if isinstance(p, pd.Series) else np.array(p, float)
    if known.any():
        out[known] = false_discovery_control(p[known])
    return out


def over_seeds(table: pd.DataFrame, names: list[str], keys=("family", "method", "layer")) -> pd.DataFrame:
    """Mean over seeds with a 95 % interval from prompts and seeds: keys, and for each name: name, _low, _high.

    Seeds share their prompts, so the error from prompts does not average out; the spread between seeds does:
    variance = mean variance over prompts + variance between seeds / number of seeds.
    """
    out = []
    for key, rows in table.groupby(list(keys), sort=False):
        row = dict(zip(keys, key, strict=True))
        for name in names:
            values = rows[name].to_numpy(float)
            between = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
            within = 0.0
            if f"{name}_low" in rows:
                within = np.mean(((rows[f"{name}_high"] - rows[f"{name}_low"]) / (2 * Z95)) ** 2)
            half = Z95 * np.sqrt(within + between)
            row |= {name: values.mean(), f"{name}_low": values.mean() - half, f"{name}_high": values.mean() + half}
        out.append(row)
    return pd.DataFrame(out)
