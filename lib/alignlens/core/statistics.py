"""Statistics that several instruments share: resampling of prompts, intervals, p-values, halves.

A *group* is a prompt, with all its answers and copies. A table holds a central 95 % interval as ``name_low``,
``name_high`` beside ``name``."""

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm

Z95 = 1.96  # half a 95 % interval of a normal estimate, in standard errors


def resample(count: int, draws: int, rng) -> np.ndarray:
    """How often each of ``count`` groups occurs in each bootstrap draw: int [draws, count]. rng : Generator or seed."""
    return np.random.default_rng(rng).multinomial(count, np.full(count, 1 / count), size=draws)


def bootstrap_weights(group: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each row counts, float32 [1 + draws, rows], as groups 0 .. of ``group`` are redrawn; row 0: once."""
    n_groups = group.max() + 1
    drawn = np.random.default_rng([seed, 1]).integers(n_groups, size=(draws, n_groups))
    drawn += n_groups * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * n_groups).reshape(draws, n_groups)
    return np.vstack([np.ones(n_groups, np.float32), counts])[:, group].astype(np.float32)


def random_signs(index: np.ndarray, draws: int, *, seed: int = 0) -> np.ndarray:
    """Fair signs [rows, draws] in {-1, 1}: one per value of the integer ``index`` [rows], shared by its rows."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(index.max() + 1, draws))[index]


def by_group(values: np.ndarray, groups) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts [groups, ...] over groups of the finite values [rows, ...]; groups in sorted order."""
    index, known = np.unique(groups, return_inverse=True)[1], np.isfinite(values)
    sums, counts = np.zeros((2, index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index, np.where(known, values, 0.0))
    np.add.at(counts, index, known)
    return sums, counts


def alternating_halves(groups) -> np.ndarray:
    """0 or 1 [rows]: groups fall into two halves by turns, in the order in which they first appear."""
    return pd.factorize(np.asarray(groups))[0] % 2


def interval(draws: np.ndarray, axis: int = 0) -> np.ndarray:
    """Central 95 % of bootstrap draws: [2, ...], low and high. A draw that is NaN does not count."""
    return (np.nanpercentile if np.isnan(draws).any() else np.percentile)(draws, (2.5, 97.5), axis=axis)


def with_intervals(values: dict[str, np.ndarray]) -> dict[str, float]:
    """From [sample, draws ...] of each number: name, name_low and name_high; both NaN where nothing was drawn."""
    out = {}
    for name, value in values.items():
        low, high = interval(value[1:]) if np.isfinite(value[1:]).any() else (np.nan, np.nan)
        out |= {name: value[0], f"{name}_low": low, f"{name}_high": high}
    return out


def standard_error(low, high, *, least: float = 1e-12):
    """Standard error of a normal estimate from its 95 % interval, at least ``least`` so that it can divide."""
    return np.maximum((high - low) / (2 * Z95), least)


def p_value(value, low, high, *, above: bool = False):
    """p of no effect from a 95 % interval, two-sided or one-sided (above zero): numbers, arrays, or Series as given."""
    error = standard_error(low, high)
    p = norm.sf(value / error) if above else 2 * norm.sf(abs(value) / error)
    return pd.Series(p, value.index) if isinstance(value, pd.Series) else p


def corrected(p, by=None):
    """Benjamini-Hochberg p-values, of a Series within each value of the Series ``by``; NaN was not tested and stays."""
    if by is not None:
        return p.groupby(by).transform(corrected)
    known, out = np.isfinite(p), p.copy()
    out[known] = false_discovery_control(p[known]) if known.any() else []
    return out


def over_seeds(table: pd.DataFrame, names: list[str], keys=("family", "method", "layer")) -> pd.DataFrame:
    """Mean over seeds with a 95 % interval from prompts and seeds: keys, and for each name: name, _low, _high.

    Seeds share prompts: variance = mean variance over prompts + variance between seeds / number of seeds."""
    out = []
    for key, rows in table.groupby(list(keys), sort=False):
        row = dict(zip(keys, key, strict=True))
        for name in names:
            values, variance = rows[name].to_numpy(float), 0.0
            if f"{name}_low" in rows:
                variance = (standard_error(rows[f"{name}_low"], rows[f"{name}_high"], least=0.0) ** 2).mean()
            if len(values) > 1:
                variance += values.var(ddof=1) / len(values)
            mean, half = values.mean(), Z95 * np.sqrt(variance)
            row |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
        out.append(row)
    return pd.DataFrame(out)
