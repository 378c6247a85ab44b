"""Numbers of an audit: what one holds, when it is more than noise, and how a sentence shows it."""

import math

import numpy as np
from scipy.stats import binomtest, norm

from alignlens.core.statistics import by_group, interval, resample, with_intervals

EQUIVALENCE = 0.02  # AUROC: a change is called preserved only if its whole interval lies within
DRAWS = 2000  # of prompts
POWER = 1 + norm.ppf(0.8) / norm.ppf(0.975)  # effect, in halves of a 95 % interval, that is seen with 80 % power


def number(value, low=math.nan, high=math.nan, *, null=0.0, floor=math.nan, unit="") -> dict:
    """One measured number with its 95 % interval. null : the value if nothing happened. floor : the distance from null
    that noise alone reaches in 95 % of cases."""
    names = ("value", "low", "high", "null", "floor")
    return dict(zip(names, map(rounded, (value, low, high, null, floor)), strict=True)) | {"unit": unit}


def rounded(value) -> float | None:
    """Six significant digits: what a page needs, and the same bytes where the last bits of a sum differ."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def exact(value, unit: str) -> dict:
    """A number that is counted, not estimated."""
    return number(value, value, value, floor=0.0, unit=unit)


def of_row(row, name: str, **words) -> dict:
    """The number ``name`` of a table's row, with its ``_low`` and ``_high``."""
    return number(row[name], row[f"{name}_low"], row[f"{name}_high"], **words)


def changed(row, name: str, **words) -> dict:
    """A difference of two models: noise alone would reach half of its interval's width."""
    return of_row(row, name, floor=(row[f"{name}_high"] - row[f"{name}_low"]) / 2, **words)


def mean(values, prompt_id, *, null=0.0, floor=None, unit="", seed=0) -> dict:
    """Mean of the finite values [rows], redrawn over prompts. floor : by flipping signs of prompts about null."""
    totals, rng = np.stack(by_group(np.asarray(values, float), prompt_id)), np.random.default_rng(seed)
    sums, counts = totals[:, totals[1] > 0]
    weights = resample(len(sums), DRAWS, rng)
    ends = interval(weights @ sums / (weights @ counts))
    if floor is None:
        signs = rng.choice((-1.0, 1.0), size=(DRAWS, len(sums)))
        floor = np.percentile(np.abs(signs @ (sums - null * counts)) / counts.sum(), 95)
    return number(sums.sum() / counts.sum(), *ends, null=null, floor=floor, unit=unit)


def drawn(values: np.ndarray, **words) -> dict:
    """The number of a sample's value and its draws [1 + draws]."""
    return of_row(with_intervals({"x": values}), "x", **words)


def as_good(draws: np.ndarray) -> list[int]:
    """Which items may be the largest, by max-t over all pairs of values and joint draws [items, 1 + draws]: those that
    none exceeds by more than 95 % of draws let any two differ by chance."""
    centred, ahead = draws[:, 1:] - draws[:, 1:].mean(1, keepdims=True), draws[:, :1] - draws[:, 0]
    apart = centred[:, None] - centred
    error = apart.std(2) + 1e-12
    reach = np.percentile(np.abs(apart / error[..., None]).max((0, 1)), 95)
    return np.flatnonzero((ahead / error <= reach).all(0)).tolist()


def wilson(count: int, total: int, **words) -> dict:
    """A share with Wilson's interval; of nothing, unknown."""
    ends = binomtest(count, total).proportion_ci(method="wilson") if total else (math.nan, math.nan)
    return number(count / total if total else math.nan, *ends, **{"floor": 0.0} | words)


def beyond(x: dict) -> bool:
    """Whether a number is more than noise: its interval leaves out the null, and it lies farther off than the floor."""
    known, null = None not in (x["low"], x["high"]), x["null"]
    return known and not x["low"] <= null <= x["high"] and abs(x["value"] - null) > (x["floor"] or 0.0)


def preserved(x: dict) -> bool:
    """Whether a change of AUROC is small for certain: its whole interval lies within the equivalence margin."""
    return x["low"] is not None and -EQUIVALENCE <= x["low"] and x["high"] <= EQUIVALENCE


def detectable(x: dict) -> float | None:
    """The smallest change that would have been seen in 80 of 100 repetitions, from the interval's half-width."""
    return None if x["low"] is None else rounded(POWER * (x["high"] - x["low"]) / 2)


def measured(result: dict, name: str) -> bool:
    return result[name]["status"] == "measured"


def digits(value, sign: bool = False) -> str:
    """A number in three significant digits."""
    if not value:
        return "unknown" if value is None else "0"
    plus = "+" * sign
    text = f"{value:{plus}.3g}"
    return (f"{value:{plus}.1e}" if "e" in text else text).replace("-", "−")


def percent(value) -> str:
    return "unknown" if value is None else f"{100 * value:.3g}\u00a0%"


def shown(x: dict, show=None) -> str:
    """value (low to high), shares in percent unless ``show`` says otherwise."""
    show = show or (percent if x["unit"].startswith("share") else digits)
    return f"{show(x['value'])} ({show(x['low'])} to {show(x['high'])})"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
