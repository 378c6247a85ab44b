"""The rules, as ``cases`` states them: each looks at one table, a row a family, and returns (verdict, because).

A row with NaN was not measured and supports nothing. "Not replicated" needs power to see the published effect."""

import math

import numpy as np
import pandas as pd
from scipy.stats import beta, chi2

from alignlens.core.settings import METHODS
from alignlens.core.statistics import Z95, corrected, p_value, standard_error

REPLICATED, CHANGED, NOT_REPLICATED, NOT_TESTABLE = "replicated", "changed", "not replicated", "not testable here"
VERDICTS = (REPLICATED, CHANGED, NOT_REPLICATED, NOT_TESTABLE)
NULLS = ("self", "seeds", "random")  # the base with itself, two seeds of one method, adapters of random direction
BROAD, CONCENTRATED = ("dpo", "simpo", "grpo"), ("kto", "orpo")
MARGIN = 0.02  # AUROC: a change whose whole interval lies within +-MARGIN counts as none
LEVEL = 0.05  # false discovery rate over families x methods
MAJORITY = 2 / 3  # of the families must agree
INTERVAL = ["change", "low", "high"]
PLACES = {"plateau inside the network": REPLICATED, "a narrow plateau at an end": CHANGED, "flat": NOT_REPLICATED}
PLACES["too wide an interval to place it"] = NOT_TESTABLE


def majority(count: int, families: int) -> bool:
    """Whether so many of so many families are enough to judge by."""
    return families >= 2 and count >= math.ceil(MAJORITY * families - 1e-9)


def by_majority(families: int, counts: dict[str, int]) -> str:
    """The first verdict that a majority of families supports."""
    return next((verdict for verdict, count in counts.items() if majority(count, families)), NOT_TESTABLE)


def reference_changes(transfer: pd.DataFrame) -> pd.DataFrame:
    """Change of separability of each method at the layer where its family's base is best, from ``transfer_gaps.csv``.

    Returns family, method, layer, change, low, high (95 %, prompts and seeds), p (normal), q (Benjamini and Hochberg
    over families x methods, without controls). The base's best leans against a rise: compare with a control there."""
    best = transfer.auroc_base.fillna(-np.inf).groupby(transfer.family, sort=False).idxmax()
    rows = transfer.loc[best, ["family", "layer"]]
    names = {"difference": "change", "difference_low": "low", "difference_high": "high"}
    table = transfer.merge(rows)[["family", "method", "layer", *names]].rename(columns=names)
    table["p"] = p_value(table.change, table.low, table.high)
    table["q"] = corrected(table.p.where(table.method.isin(METHODS)))
    return table


def judge_change(table: pd.DataFrame, sign: int, effect: float) -> tuple[str, str]:
    """A claimed rise (+1) or fall (-1). table : family, change, low, high, q, trained. effect : published size, > 0."""
    found, families = table.dropna(subset=INTERVAL), len(table)
    if len(found) < 2:
        return NOT_TESTABLE, f"measured in {len(found)} of {families} families; two are needed"
    clear = (found.q < LEVEL) & ((found.low > 0) | (found.high < 0))
    claimed, other = (int((clear & (side * found.change > 0)).sum()) for side in (sign, -sign))
    this, that = ("rise", "fall")[::sign]
    said = f"a clear {this} in {claimed} of {families} families, a clear {that} in {other}"
    if claimed or other:
        return (REPLICATED if majority(claimed, families) and not other else CHANGED), said
    short = (found.high < effect) if sign > 0 else (found.low > -effect)
    excluded = int((short & found.trained.astype(bool)).sum())
    said += f"; {excluded} of {families} intervals of trained variants exclude the published {sign * effect:+.3f}"
    return by_majority(families, {NOT_REPLICATED: excluded}), said


def judge_equivalence(table: pd.DataFrame) -> tuple[str, str]:
    """A claim that nothing changes. table : family, change, low, high, trained (the method learnt something)."""
    found, families = table.dropna(subset=INTERVAL), len(table)
    learnt = found[found.trained.astype(bool)]
    if len(learnt) < 2:
        return NOT_TESTABLE, f"learnt and measured in {len(learnt)} of {families} families; two are needed"
    inside = int(((learnt.low > -MARGIN) & (learnt.high < MARGIN)).sum())
    beyond = int(((learnt.low > MARGIN) | (learnt.high < -MARGIN)).sum())
    widest = learnt[["low", "high"]].abs().max(axis=None)
    said = f"{inside} of {families} intervals lie within ±{MARGIN:.3f} and {beyond} beyond; they reach {widest:.3f}"
    verdict = by_majority(families, {REPLICATED: inside, NOT_REPLICATED: beyond})
    return verdict, f"not shown: {said}" if verdict == NOT_TESTABLE else said


def judge_depth(table: pd.DataFrame) -> tuple[str, str]:
    """A claim that the signal sits in middle layers. table : family, layer, auroc, auroc_low, auroc_high."""
    families = table.family.nunique()
    found = table.dropna(subset=["auroc", "auroc_low", "auroc_high"]).groupby("family", sort=False)
    counts = dict.fromkeys(PLACES, 0)
    for _, rows in found:
        best = rows.loc[rows.auroc.idxmax()]
        plateau = rows.layer[rows.auroc >= best.auroc_low]
        inside = not plateau.isin([rows.layer.min(), rows.layer.max()]).any()
        narrow = plateau.nunique() <= len(rows) / 2
        flat = max(np.ptp(rows.auroc), (best.auroc_high - best.auroc_low) / 2) <= MARGIN
        counts[next(words for words, holds in zip(PLACES, (inside, narrow, flat, True), strict=True) if holds)] += 1
    said = "; ".join(f"{words} in {counts[words]} of {families} families" for words in PLACES)
    return by_majority(families, {verdict: counts[words] for words, verdict in PLACES.items()}), said


def judge_families(table: pd.DataFrame, spread: float) -> tuple[str, str]:
    """A claim that families differ. table : family, method, change, low, high. spread : published range."""
    found = table.dropna(subset=INTERVAL)
    found = found[found.groupby("method").family.transform("nunique") >= 2]
    if not len(found):
        return NOT_TESTABLE, "no method is measured in two families"
    error = standard_error(found.low, found.high)
    found = found.assign(weight=error**-2, weighted=found.change * error**-2)
    total = found.groupby("method")[["weight", "weighted"]].transform("sum")
    q = (found.weight * (found.change - total.weighted / total.weight) ** 2).groupby(found.method, sort=False)
    p = corrected(pd.Series(chi2.sf(q.sum(), q.size() - 1), index=q.size().index))
    said = f"families differ for {', '.join(p.index[p < LEVEL]) or 'no method'} (smallest corrected p {p.min():.2g})"
    if (p < LEVEL).any():
        return REPLICATED, said
    seen = Z95 * math.sqrt(2) * float(error.median())
    said += f"; a difference of {seen:.3f} would be seen, the published range is {spread:.3f}"
    return (NOT_REPLICATED if seen < spread else NOT_TESTABLE), said


def judge_breadth(labels: pd.DataFrame, share: float) -> tuple[str, str]:
    """A claim that some methods add many exclusive latents. labels : ``crosscoder_labels.csv``. share : published."""
    rows = labels.assign(live=live(labels))[labels.label == "aligned_only"].set_index("method")
    families, ordered, small, exceeding = rows.family.nunique(), 0, 0, 0
    for _, part in rows.groupby("family", sort=False):
        broad, narrow, null = (part[part.index.isin(names)] for names in (BROAD, CONCENTRATED, NULLS))
        if broad.empty or narrow.empty or null.empty or part[["share", "live"]].isna().any(axis=None):
            continue
        beyond = exceeds(part.share, null.share.max(), part.live)
        exceeding += beyond[part.index.isin(METHODS)].any()
        ordered += broad.share.min() > narrow.share.max() and beyond[broad.index].all()
        upper = beta.ppf(0.975, broad["count"] + 1, (broad.live - broad["count"]).clip(lower=1e-9))  # Clopper, Pearson
        small += (upper < share).all()
    said = f"broad above concentrated and above the nulls in {ordered} of {families} families; any method above its "
    said += f"nulls in {exceeding}; upper bounds below the published share {share:.3f} in {small}"
    verdict = by_majority(families, {REPLICATED: ordered, NOT_REPLICATED: small})
    return CHANGED if verdict == NOT_TESTABLE and families >= 2 and exceeding else verdict, said


def live(labels: pd.DataFrame) -> pd.Series:
    """Live latents of each crosscoder, recovered from its counts: the labels share them out."""
    return labels.groupby(["family", "method"])["count"].transform("sum")


def exceeds(share, null, count):
    """Whether shares lie two standard errors (binomial, latents taken as independent) above that of a null."""
    return share - null > 2 * np.sqrt((share * (1 - share) + null * (1 - null)) / np.maximum(count, 1))
