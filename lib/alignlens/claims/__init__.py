"""The claims of arXiv 2606.09850 as data: each with its rule, and a verdict that the rule gives from tables.

``reanalysis`` and ``class_shares`` look at the published numbers alone (``data/published``). ``ledger`` sets three
kinds of evidence side by side: what the paper published, what the published protocol gives on this study's models,
and what the sound protocol gives on them. No verdict is written by hand. Rules need two families and compare with what
the paper reports, so a flat result is "not replicated" only where the study could have seen the published effect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import beta, chi2, false_discovery_control, norm

from alignlens import probes
from alignlens.core import settings as presets
from alignlens.core import store
from alignlens.core.errors import ClaimError
from alignlens.study.mechanisms import matched_dose

SCHEMA = "alignlens.claims/1"
REPLICATED, CHANGED, NOT_REPLICATED, NOT_TESTABLE = "replicated", "changed", "not replicated", "not testable here"
VERDICTS = (REPLICATED, CHANGED, NOT_REPLICATED, NOT_TESTABLE)

METHODS = ("ppo", "dpo", "simpo", "orpo", "grpo", "kto")
NULLS = ("self", "seeds", "random")
MARGIN = 0.02  # AUROC: a change whose whole interval lies within +-MARGIN counts as none
LEVEL = 0.05  # false discovery rate over families x methods
MAJORITY = 2 / 3  # of the families must agree
FORCED_SHARE = 0.06  # of the published dictionary is shared by construction
PAPER = "arXiv 2606.09850"
TABLES = (
    "transfer_gaps layer_metrics_grouped layer_metrics_published data_matters best_layers objectives doses "
    "crosscoder_labels published_classes geometry decomposition_seeds dose_response causal"
).split()
"""Tables that the ledger reads, by the name of their CSV in ``figures/<preset>``; any may be missing."""


MEASURES = {
    "rotated": "AUROC that only the variant's own probe still reads",
    "attenuated": "AUROC that no probe reads any more",
    "rotation_degrees": "Rotation of the stream, degrees",
    "norm_ratio": "Norm, as a multiple of base",
    "shared_rotated": "Share of rotated latents",
    "shared_attenuated": "Share of attenuated latents",
}


# --- the published numbers --------------------------------------------------------------------------------------------


@cache
def published(name: str) -> pd.DataFrame:
    """One table of ``data/published``; its README says what each column is."""
    path = Path(presets.home()) / "data" / "published" / f"{name}.csv"
    if not path.exists():
        raise ClaimError(f"data/published/{name}.csv is missing: run from the project's folder or restore the file.")
    return pd.read_csv(path)


def auroc_error(auroc, pairs):
    """Standard error of the AUROC of ``pairs`` mirrored rows {s: 1, -s: 0}, from the value alone.

    Hanley and McNeil (1982) for as many positives as negatives, times sqrt 2: a mirrored row is the same pair again, so
    its error does not average out. Sampling of pairs only: no leak, no choice of layer, no training seed.
    """
    a = np.asarray(auroc, float)
    first, second = a / (2 - a), 2 * a**2 / (1 + a)
    variance = (a * (1 - a) + (pairs - 1) * (first + second - 2 * a**2)) / pairs**2
    return np.sqrt(2 * variance)


def protocol_floors(shapes, *, draws: int = 3) -> pd.DataFrame:
    """The published protocol on Gaussian noise: pairs, d_model, seed, floor for each (pairs, d_model) of ``shapes``.

    ``data/published/noise_floors.csv`` holds the paper's six shapes; one core needs about 0.3 s a draw at 897 pairs
    and 4 s and 1 GB at 10,000 x 3,072.
    """
    rows = [
        {"pairs": n, "d_model": d, "seed": seed, "floor": probes.noise_floor(n, d, protocol="published", seed=seed)}
        for n, d in shapes
        for seed in range(draws)
    ]
    return pd.DataFrame(rows)


def reanalysis() -> pd.DataFrame:
    """The paper's probe results against what they can be compared with, one row a family and method.

    best_layer, auroc : arg-max over layers, as published. change : against the base of the family. change_error :
    of two independent samples, so too wide where both were read on the same pairs. beyond_noise : |change| above two of
    them. layer0, layer0_change : at the first block. share_at_layer0 : layer0_change / change where beyond_noise, else
    NaN. plateau_first, plateau_last : layers within two errors of the best. floor : Gaussian noise of the same n and d.
    above_floor : (auroc - floor) / (1 - floor); above_floor_change : against the base. Gaussian noise has full rank, so
    the floor of real, correlated features is lower.
    """
    probe, models = published("probe_metrics"), published("models")
    floors = published("noise_floors").groupby(["pairs", "d_model"]).floor.mean()
    rows = []
    for model in models.itertuples():
        layers = probe[(probe.family == model.family) & (probe.method == model.method)].sort_values("layer")
        best = layers.loc[layers.auroc.idxmax()]
        error = float(auroc_error(best.auroc, model.pairs))
        plateau = layers.layer[layers.auroc >= best.auroc - 2 * error]
        floor = floors[model.pairs, model.d_model]
        rows.append(
            {
                "family": model.family, "method": model.method, "pairs": model.pairs, "d_model": model.d_model,
                "probe_set": model.probe_set, "layers": model.layers, "best_layer": int(best.layer),
                "auroc": best.auroc, "error": error, "layer0": layers.auroc.iloc[0],
                "plateau_first": int(plateau.min()), "plateau_last": int(plateau.max()),
                "floor": floor, "above_floor": (best.auroc - floor) / (1 - floor),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    base = table[table.method == "base"].set_index("family")
    for name, new in (("auroc", "change"), ("layer0", "layer0_change"), ("above_floor", "above_floor_change")):
        table[new] = table[name] - table.family.map(base[name])
    aligned = table.method != "base"
    table["change_error"] = np.hypot(table.error, table.family.map(base.error)).where(aligned)
    table["beyond_noise"] = aligned & (table.change.abs() > 2 * table.change_error)
    table["share_at_layer0"] = (table.layer0_change / table.change).where(table.beyond_noise)
    return table


def class_shares() -> pd.DataFrame:
    """The paper's crosscoder classes: family, method, run, share of the dictionary in each, and what is forced.

    shared_redirected, shared_aligned, aligned_only, base_only : shares. forced : share that the training copies from
    base to aligned, hence "shared_aligned" by construction. redirected_shift : median |usage shift| of the redirected.
    """
    table = published("crosscoder_classes")
    wide = table.pivot_table(index=["family", "method", "run"], columns="class", values="share").fillna(0.0)
    total = table.groupby(["family", "method", "run"])["count"].sum()
    wide["forced"] = (FORCED_SHARE * total).astype(int) / total
    silent = table[table["class"] == "shared_redirected"].set_index(["family", "method", "run"]).median_abs_shift
    names = ["shared_redirected", "shared_aligned", "forced", "aligned_only", "base_only"]
    return wide[names].assign(redirected_shift=silent).reset_index()


# --- evidence ---------------------------------------------------------------------------------------------------------


class Evidence:
    """Sentences and the numbers in them; each number knows the table it comes from."""

    def __init__(self):
        self.sentences: list[str] = []
        self.numbers: list[dict] = []

    def say(self, text: str) -> None:
        self.sentences.append(text)

    def add(self, source: str, name: str, value, *, low=math.nan, high=math.nan, family="", method="") -> str:
        """Keep a number; returns it as text, signed if it is a change, with its interval if it has one."""
        if not math.isfinite(value):
            return "not measured"
        form = "{:+.3f}" if "change" in name else "{:.3g}" if abs(value) >= 10 else "{:.3f}"
        self.numbers.append(
            {"name": name, "family": family, "method": method, "value": float(value), "low": float(low),
             "high": float(high), "source": source}
        )  # fmt: skip
        interval = f" [{form.format(low)}, {form.format(high)}]" if math.isfinite(low) else ""
        return form.format(value) + interval

    def each(
        self, table: pd.DataFrame, source: str, name: str, column: str, method: str = "", *, interval=False
    ) -> str:
        """A number for each family, as "family value, family value"."""
        said = []
        for row in table.to_dict("records"):
            family, bounds = row["family"], {"low": row["low"], "high": row["high"]} if interval else {}
            number = self.add(source, name, row[column], family=family, method=method, **bounds)
            said.append(f"{family.split('-Instruct')[0]} {number}")
        return ", ".join(said)

    def plain(self, run: str) -> dict:
        numbers = [{**number, "run": run} for number in self.numbers]
        return {"text": "\n".join(self.sentences) or "Not measured.", "numbers": numbers}


def _table(tables: dict, name: str, *columns: str) -> pd.DataFrame | None:
    """A table of the study, or None if it was not made; refuses one without the columns that the rules read."""
    found = tables.get(name)
    if found is None or not len(found):
        return None
    if missing := [c for c in columns if c not in found]:
        raise ClaimError(f"Table {name} has no column {missing[0]!r}: pass it as {name}.csv in figures/ has it.")
    return found


def needed(families: int) -> int:
    """How many of so many families make a majority."""
    return math.ceil(MAJORITY * families - 1e-9)


def reference_changes(transfer: pd.DataFrame) -> pd.DataFrame:
    """Change of separability of each method at the layer where its family's base is best.

    transfer : ``transfer_gaps.csv``. Returns family, method, layer, change, low, high (95 %, prompts and seeds),
    p (normal, from the interval), q (Benjamini and Hochberg over families x methods; controls stay outside). The layer
    is chosen on the base's own number, which leans against a rise: compare with a control at the same layer.
    """
    known = transfer.assign(auroc_base=transfer.auroc_base.fillna(-np.inf))
    rows = transfer.loc[known.groupby("family", sort=False).auroc_base.idxmax(), ["family", "layer"]]
    table = transfer.merge(rows, on=["family", "layer"])
    names = {"difference": "change", "difference_low": "low", "difference_high": "high"}
    table = table[["family", "method", "layer", *names]].rename(columns=names)
    error = ((table.high - table.low) / 3.92).clip(lower=1e-12)
    table["p"] = 2 * norm.sf(table.change.abs() / error)
    table["q"] = math.nan
    tested = table.method.isin(METHODS) & table.p.notna()
    if tested.any():
        table.loc[tested, "q"] = false_discovery_control(table.p[tested])
    return table


# --- rules ------------------------------------------------------------------------------------------------------------
# Each returns (verdict, because). Tables hold one row a family; a row with NaN was not measured and supports nothing.


def judge_change(table: pd.DataFrame, sign: int, effect: float) -> tuple[str, str]:
    """A claimed rise (+1) or fall (-1). table : family, change, low, high, q, trained. effect : published size, > 0.

    replicated : clear (q < LEVEL, interval without 0) with that sign in a majority of families, in none with the other.
    changed : clear somewhere, but not so. not replicated : clear nowhere, and in a majority the method learnt something
    and the interval excludes the published size. Else not testable here.
    """
    found, families = table.dropna(subset=["change", "low", "high"]), len(table)
    if len(found) < 2:
        return NOT_TESTABLE, f"measured in {len(found)} of {families} families; two are needed"
    clear = (found.q < LEVEL) & ((found.low > 0) | (found.high < 0))
    claimed, other = (int((clear & (side * found.change > 0)).sum()) for side in (sign, -sign))
    short = (found.high < effect) if sign > 0 else (found.low > -effect)
    excluded = int((short & found.trained.astype(bool)).sum())
    way = {1: "rise", -1: "fall"}
    said = f"a clear {way[sign]} in {claimed} of {families} families, a clear {way[-sign]} in {other}"
    if claimed >= needed(families) and not other:
        return REPLICATED, said
    if claimed or other:
        return CHANGED, said
    said += f"; {excluded} of {families} intervals of trained variants exclude the published {sign * effect:+.3f}"
    return (NOT_REPLICATED if excluded >= needed(families) else NOT_TESTABLE), said


def judge_equivalence(table: pd.DataFrame, margin: float = MARGIN) -> tuple[str, str]:
    """A claim that nothing changes. table : family, change, low, high, trained (the method learnt something).

    replicated : in a majority of families the method learnt and the whole interval lies within +-margin. not
    replicated : in a majority it lies beyond the margin. Else not testable here: preserving is then not shown, since an
    interval that reaches over the margin would hold a change as well.
    """
    found, families = table.dropna(subset=["change", "low", "high"]), len(table)
    learnt = found[found.trained.astype(bool)]
    if len(learnt) < 2:
        return NOT_TESTABLE, f"learnt and measured in {len(learnt)} of {families} families; two are needed"
    inside = int(((learnt.low > -margin) & (learnt.high < margin)).sum())
    beyond = int(((learnt.low > margin) | (learnt.high < -margin)).sum())
    widest = max(learnt.low.abs().max(), learnt.high.abs().max())
    said = f"{inside} of {families} intervals lie within ±{margin:.3f} and {beyond} beyond; they reach {widest:.3f}"
    if inside >= needed(families):
        return REPLICATED, said
    return (NOT_REPLICATED, said) if beyond >= needed(families) else (NOT_TESTABLE, f"not shown: {said}")


def judge_depth(table: pd.DataFrame, margin: float = MARGIN) -> tuple[str, str]:
    """A claim that the signal sits in middle layers. table : family, layer, auroc, auroc_low, auroc_high.

    A family's plateau: layers whose AUROC lies within the interval of its best. replicated : in a majority of families
    it holds neither the first nor the last layer. changed : in a majority it covers at most half of the layers, at an
    end. not replicated : in a majority all layers lie within ``margin`` and so does the interval. Else not testable.
    """
    counts = {"middle": 0, "end": 0, "flat": 0, "wide": 0}
    families = table.family.nunique()
    for _, rows in table.dropna(subset=["auroc", "auroc_low", "auroc_high"]).groupby("family", sort=False):
        best = rows.loc[rows.auroc.idxmax()]
        plateau = set(rows.layer[rows.auroc >= best.auroc_low])
        ends = {rows.layer.min(), rows.layer.max()}
        if not plateau & ends:
            counts["middle"] += 1
        elif len(plateau) <= len(rows) / 2:
            counts["end"] += 1
        elif max(np.ptp(rows.auroc), (best.auroc_high - best.auroc_low) / 2) <= margin:
            counts["flat"] += 1
        else:
            counts["wide"] += 1
    said = "; ".join(
        f"{words} in {counts[kind]} of {families} families"
        for kind, words in (
            ("middle", "plateau inside the network"),
            ("end", "a narrow plateau at an end"),
            ("flat", "flat"),
            ("wide", "too wide an interval to place it"),
        )
    )
    for kind, verdict in (("middle", REPLICATED), ("end", CHANGED), ("flat", NOT_REPLICATED)):
        if families >= 2 and counts[kind] >= needed(families):
            return verdict, said
    return NOT_TESTABLE, said


def judge_families(table: pd.DataFrame, spread: float) -> tuple[str, str]:
    """A claim that effects differ between families. table : family, method, change, low, high.

    spread : the published range over families.

    Cochran's Q for each method, with errors from prompts and seeds, corrected over methods (Benjamini and Hochberg).
    replicated : any method differs. not replicated : none does, and the smallest difference between two families that
    would be seen (median over rows) is below the published range. Else not testable here.
    """
    found = table.dropna(subset=["change", "low", "high"])
    found = found.assign(error=((found.high - found.low) / 3.92).clip(lower=1e-12))
    found = found[found.groupby("method").family.transform("nunique") >= 2]
    if not len(found):
        return NOT_TESTABLE, "no method is measured in two families"
    p = {}
    for method, rows in found.groupby("method", sort=False):
        weight = rows.error**-2
        q = (weight * (rows.change - np.average(rows.change, weights=weight)) ** 2).sum()
        p[method] = chi2.sf(q, len(rows) - 1)
    corrected = pd.Series(false_discovery_control(list(p.values())), index=list(p))
    differ = list(corrected.index[corrected < LEVEL])
    seen = 1.96 * math.sqrt(2) * float(found.error.median())
    said = f"families differ for {', '.join(differ) or 'no method'} (smallest corrected p {corrected.min():.2g})"
    if differ:
        return REPLICATED, said
    said += f"; a difference of {seen:.3f} would be seen, the published range is {spread:.3f}"
    return (NOT_REPLICATED if seen < spread else NOT_TESTABLE), said


BROAD, CONCENTRATED = ("dpo", "simpo", "grpo"), ("kto", "orpo")


def judge_breadth(labels: pd.DataFrame, share: float) -> tuple[str, str]:
    """A claim that some methods add many exclusive latents. labels : ``crosscoder_labels.csv``. share : published.

    replicated : in a majority of families every broad method has more aligned-only latents than every concentrated one
    and, by two standard errors, than every null. not replicated : in a majority the upper 95 % bound (Clopper and
    Pearson) of every broad method is below the published share. changed : some method exceeds its nulls, otherwise.
    """
    rows = labels[labels.label == "aligned_only"].assign(live=_live(labels))
    families, ordered, small, exceeding = rows.family.nunique(), 0, 0, 0
    for _, part in rows.groupby("family", sort=False):
        part = part.set_index("method")
        broad, narrow, null = (part[part.index.isin(names)] for names in (BROAD, CONCENTRATED, NULLS))
        if not (len(broad) and len(narrow) and len(null)) or part[["share", "live"]].isna().any(axis=None):
            continue
        ceiling = null.share.max()
        beyond = {r.Index: _exceeds(r.share, ceiling, r.live) for r in part.itertuples() if r.Index in METHODS}
        exceeding += any(beyond.values())
        ordered += broad.share.min() > narrow.share.max() and all(beyond[m] for m in broad.index)
        upper = beta.ppf(0.975, broad["count"] + 1, (broad.live - broad["count"]).clip(lower=1e-9))
        small += bool((upper < share).all())
    said = (
        f"broad above concentrated and above the nulls in {ordered} of {families} families; "
        f"any method above its nulls in {exceeding}; upper bounds below the published share {share:.3f} in {small}"
    )
    if families >= 2 and ordered >= needed(families):
        return REPLICATED, said
    if families >= 2 and small >= needed(families):
        return NOT_REPLICATED, said
    return (CHANGED if families >= 2 and exceeding else NOT_TESTABLE), said


def _live(labels: pd.DataFrame) -> pd.Series:
    """Live latents of each crosscoder, recovered from its counts: the labels share them out."""
    return labels.groupby(["family", "method"])["count"].transform("sum")


def _exceeds(share: float, null: float, live: float) -> bool:
    """Whether a share lies two standard errors (binomial, latents taken as independent) above that of a null."""
    return share - null > 2 * math.sqrt((share * (1 - share) + null * (1 - null)) / max(live, 1))


def combine(verdicts: list[str]) -> str:
    """One verdict over methods: theirs if they agree; changed if one is, or if some hold and others do not."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return CHANGED if CHANGED in verdicts or REPLICATED in verdicts else NOT_TESTABLE


# --- what several claims read -----------------------------------------------------------------------------------------


_DIFFERENCE = ("difference", "difference_low", "difference_high")


@dataclass(frozen=True)
class _Study:
    """The tables under judgement, and what claims share of them."""

    tables: dict
    dose: float | None

    def get(self, name: str, *columns: str) -> pd.DataFrame | None:
        return _table(self.tables, name, *columns)

    def changes(self, method: str) -> pd.DataFrame | None:
        transfer = self.get("transfer_gaps", "family", "method", "layer", "auroc_base", *_DIFFERENCE)
        found = None if transfer is None else reference_changes(transfer)
        if found is None or method not in set(found.method):
            return None
        rows = found[found.method == method]
        return rows.assign(trained=rows.family.map(self._trained(method)).eq(True))

    def layers(self) -> dict[str, int]:
        """The reference layer of each family."""
        transfer = self.get("transfer_gaps", "family", "method", "layer", "auroc_base", *_DIFFERENCE)
        if transfer is None:
            return {}
        best = reference_changes(transfer).drop_duplicates("family")
        return dict(zip(best.family, best.layer, strict=True))

    def published_changes(self, method: str) -> pd.DataFrame | None:
        """Best layer against best layer, under the published protocol on this study's own pairs: family, change."""
        table = self.get("layer_metrics_published", "family", "method", "auroc")
        if table is None or method not in set(table.method):
            return None
        best = table.groupby(["family", "method"], sort=False).auroc.max().unstack()
        return (best[method] - best["base"]).dropna().rename("change").reset_index()

    def _trained(self, method: str) -> pd.Series:
        """Whether a method moved its objective and went at least half of the target dose, by family."""
        moved, doses = (
            self.get("objectives", "family", "method", "moved"),
            self.get("doses", "family", "method", "dose"),
        )
        if moved is None:
            return pd.Series(dtype=bool)
        out = moved[moved.method == method].set_index("family").moved == "moved"
        if doses is not None and self.dose:
            mean = doses[doses.method == method].groupby("family").dose.mean()
            out &= mean.reindex(out.index) >= self.dose / 2
        return out


def _paper_changes(out: Evidence, method: str) -> pd.DataFrame:
    table = reanalysis()
    rows = table[table.method == method]
    said = out.each(rows, "data/published/probe_metrics.csv", "change", "change", method)
    clear = int(rows.beyond_noise.sum())
    out.say(f"{method}: {said} against base; {clear} of {len(rows)} exceed two standard errors.")
    return rows


def _here_published(out: Evidence, study: _Study, method: str) -> None:
    rows = study.published_changes(method)
    if rows is not None:
        said = out.each(rows, "layer_metrics_published.csv", "change", "change", method)
        out.say(f"{method} on the pairs that base is read on, best layer against best layer: {said}.")


def _here_sound(out: Evidence, study: _Study, method: str) -> pd.DataFrame | None:
    rows = study.changes(method)
    if rows is not None:
        said = out.each(rows, "transfer_gaps.csv", "change", "change", method, interval=True)
        learnt = int(rows.trained.sum())
        out.say(f"{method}, grouped folds, at the base's best layer: {said}; learnt something in {learnt} families.")
    return rows


def _doses(out: Evidence, study: _Study, methods) -> None:
    """Changes where every method stands at the same dose, if the way there was measured."""
    path = study.get("dose_response", "family", "method", "share", "kl", "change", "change_low", "change_high")
    path = None if path is None else path[path.method.isin(METHODS)]
    if path is None or not path.method.isin(methods).any():
        return out.say("Matched dose: not measured.")
    dose = float(path.groupby(["family", "method"]).kl.max().min())
    found = matched_dose(path, dose).query("measure == 'change'")
    for method in methods:
        rows = found[found.method == method]
        said = out.each(rows, "dose_response.csv", "change at matched dose", "value", method, interval=True)
        out.say(f"{method} at a dose of {dose:.2f} nats, which every method reaches: {said}.")
    return None


# --- the claims -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A claim: what it says, the rule that judges it, and the function that applies the rule."""

    id: str
    statement: str
    rule: str
    judge: Callable  # (published, here_published, here_sound: Evidence, study) -> (verdict, because)


_CHANGE_RULE = (
    "Sound protocol, at the layer where the family's base is best, aligned minus base, grouped folds, interval over "
    f"prompts and seeds. Replicated: interval without 0, q < {LEVEL} over families x methods, claimed sign in at least "
    "2/3 of the families and the other sign in none. Changed: clear somewhere, but not so. Not replicated: clear "
    "nowhere, and in at least 2/3 of the families the method learnt something (objective moved, half of the target "
    "dose) and the interval excludes the published change (median over families). Else not testable here."
)


def _change_claim(methods: tuple[str, ...], sign: int, contrast: str | None = None):
    """Judge of a claimed rise or fall; contrast : the set of ``data_matters.csv`` that is like the paper's for it."""

    def judge(paper: Evidence, here: Evidence, sound: Evidence, study: _Study):
        verdicts, because = [], []
        for method in methods:
            rows = _paper_changes(paper, method)
            if contrast:
                _at_layer0(paper, rows, method)
            _here_published(here, study, method)
            changes = _here_sound(sound, study, method)
            if changes is None:
                verdicts.append(NOT_TESTABLE)
                because.append(f"{method}: not measured")
                continue
            verdict, reason = judge_change(changes, sign, float((sign * rows.change).median()))
            verdicts.append(verdict)
            because.append(f"{method}: {reason}")
        if contrast:
            _contrast(here, sound, study, contrast)
        _doses(sound, study, methods)
        return combine(verdicts), "; ".join(because)

    return judge


def _at_layer0(out: Evidence, rows: pd.DataFrame, method: str) -> None:
    said = out.each(rows, "data/published/probe_metrics.csv", "layer 0 change", "layer0_change", method)
    out.say(f"At layer 0 already: {said}.")
    table = reanalysis()
    base = table[(table.method == "base")].set_index("family").loc[rows.family]
    source = "data/published/noise_floors.csv"
    floor = out.each(rows, source, "noise floor", "floor", method)
    own = out.each(base.reset_index(), source, "noise floor", "floor", "base")
    out.say(f"Pure noise of the same n and d scores {floor}; at the base's n {own}.")
    adjusted = out.each(rows, source, "above-floor change", "above_floor_change", method)
    out.say(f"As a share of what lies above the floor the change is {adjusted}.")
    leak = published("leak_free").query("method == @method and layer == 'best'")
    if len(leak):
        leak = leak.rename(columns={"auroc_clean_low": "low", "auroc_clean_high": "high"})
        pairs = int((leak.pairs - leak.leaked_pairs).iloc[0])
        clean = out.each(leak, "data/published/leak_free.csv", "leak-free AUROC", "auroc_clean", method, interval=True)
        own = out.each(base.reset_index(), "data/published/probe_metrics.csv", "AUROC", "auroc", "base")
        out.say(f"On the {pairs} pairs whose mirror image was not in training: {clean}; base, with the leak, {own}.")


def _contrast(here: Evidence, sound: Evidence, study: _Study, name: str) -> None:
    """What another set of pairs does to one and the same base, under either protocol."""
    table = study.get("data_matters", "family", "set", "protocol", "auroc")
    if table is None or name not in set(table.set):
        return
    best = table.groupby(["protocol", "family", "set"], sort=False).auroc.max().unstack()
    for protocol, out in (("published", here), ("grouped", sound)):
        rows = (best.loc[protocol][name] - best.loc[protocol]["paired"]).dropna().rename("change").reset_index()
        said = out.each(rows, "data_matters.csv", f"change of the base on {name}", "change", "base")
        out.say(f"The unaligned base read on {name} instead of one pair a prompt: {said}.")


def _mechanism_claim(paper: Evidence, here: Evidence, sound: Evidence, study: _Study):
    methods = ("dpo", "orpo")
    classes = class_shares()
    span = classes.groupby("family", sort=False).shared_redirected.agg(["min", "max"]).reset_index()
    low, high = (
        paper.each(span, "data/published/crosscoder_classes.csv", f"redirected share, {end}", end)
        for end in ("min", "max")
    )
    paper.say(f"Redirected latents, over all methods: lowest {low}; highest {high}. No null is published.")
    anchor = published("anchors").pivot(index="family", columns="method", values="median_anchor").reset_index()
    for method in methods:
        anchor["ratio"] = anchor[method] / anchor["base"]
        said = paper.each(anchor, "data/published/anchors.csv", "anchor ratio", "ratio", method)
        paper.say(
            f"{method}: anchor activation at the base's own layer, as a multiple of base: {said} (read off a plot)."
        )
    labels = study.get("published_classes", "family", "method", "thresholds", "class", "share")
    if labels is not None:
        rows = labels[(labels.thresholds == "adaptive") & (labels["class"] == "shared_redirected")]
        for method in (*methods, "self"):
            if method in set(rows.method):
                name = "base with itself" if method == "self" else method
                part = rows[rows.method == method]
                said = here.each(part, "published_classes.csv", "redirected share", "share", method)
                here.say(f"Redirected, {name}: {said}.")
    beyond, decided = {}, ""
    for table in _mechanism(study):
        source = table.source.iloc[0]
        decided = decided or source
        for measure, rows in table[table.method.isin(methods)].groupby("measure", sort=False):
            null = sound.each(rows.drop_duplicates("family"), source, f"{measure}, null", "null", "null")
            said = []
            for method, part in rows.groupby("method", sort=False):
                count = int(part.beyond.sum())
                value = sound.each(part, source, measure, "value", method)
                said.append(f"{method} {value} (beyond in {count} of {len(part)})")
                if source == decided:
                    beyond[method] = beyond.get(method, False) or (len(part) >= 2 and count >= needed(len(part)))
            sound.say(f"{MEASURES[measure]}: {'; '.join(said)}; strongest null {null}.")
    _causal(sound, study, methods)
    fall, _ = _change_claim(methods, -1)(Evidence(), Evidence(), Evidence(), study)
    if not set(methods) <= set(beyond):
        return NOT_TESTABLE, "no table measures rotation or attenuation beside nulls for dpo and orpo"
    named = [m for m in methods if beyond[m]]
    said = f"fall of separability: {fall}; rotation or attenuation beyond the nulls for {', '.join(named) or 'neither'}"
    said += f" (by {decided})"
    if fall != REPLICATED:
        return fall, said
    return (NOT_REPLICATED, CHANGED, REPLICATED)[len(named)], said


def _mechanism(study: _Study) -> list[pd.DataFrame]:
    """Rotation and attenuation beside their nulls, the most direct table first; one table a source that was made.

    source, measure, family, method, value (mean over seeds), null (the strongest seed or draw of any null), beyond (two
    standard errors above it; those of latent shares are binomial, of the others from prompts and seeds).
    """
    found = []
    for name, measures in (
        ("decomposition_seeds", {"rotated": 1, "attenuated": 1}),
        ("geometry", {"rotation_degrees": 1, "norm_ratio": -1}),
    ):
        table = study.get(name, "family", "method", "layer", *measures)
        if table is not None and set(NULLS) & set(table.method):
            rows = _at_reference(table, study.layers())
            parts = [_against_nulls(rows, m, side) for m, side in measures.items()]
            found.append(pd.concat(parts, ignore_index=True).assign(source=f"{name}.csv"))
    labels = study.get("crosscoder_labels", "family", "method", "label", "share", "count")
    if labels is not None and set(NULLS) & set(labels.method):
        rows = labels.assign(live=_live(labels)).query("label in ('shared_rotated', 'shared_attenuated')")
        null = rows[rows.method.isin(NULLS)].groupby(["family", "label"]).share.max().rename("null")
        rows = rows.merge(null.reset_index(), on=["family", "label"])
        hits = [_exceeds(r.share, r.null, r.live) for r in rows.itertuples()]
        rows = rows.assign(beyond=hits, source="crosscoder_labels.csv", measure=rows.label, value=rows.share)
        found.append(rows[["source", "measure", "family", "method", "value", "null", "beyond"]])
    return [table for table in found if len(table)]


def _at_reference(table: pd.DataFrame, layers: dict[str, int]) -> pd.DataFrame:
    """Rows at each family's reference layer, or at the nearest layer that was measured."""
    parts = []
    for family, rows in table.groupby("family", sort=False):
        wanted = layers.get(family, rows.layer.median())
        parts.append(rows[rows.layer == min(rows.layer.unique(), key=lambda x: abs(x - wanted))])
    return pd.concat(parts)


def _against_nulls(table: pd.DataFrame, name: str, side: int) -> pd.DataFrame:
    """One measure against the strongest null of its family; side : +1 if more is more, -1 if less is."""
    half = (table[f"{name}_high"] - table[f"{name}_low"]) / 3.92 if f"{name}_low" in table else 0.0
    table = table.assign(size=side * table[name], error=half).dropna(subset=["size"])
    out = []
    for family, rows in table.groupby("family", sort=False):
        nulls = rows[rows.method.isin(NULLS)]
        if nulls.empty:
            continue
        null = nulls.loc[nulls["size"].idxmax()]
        for method, part in rows[rows.method.isin(METHODS)].groupby("method", sort=False):
            between = part["size"].var() / len(part) if len(part) > 1 else 0.0
            error = math.sqrt((part.error**2).mean() + between + null.error**2)
            beyond = bool(part["size"].mean() - null["size"] > 2 * error)
            row = {"measure": name, "family": family, "method": method, "value": part[name].mean()}
            out.append(row | {"null": null[name], "beyond": beyond})
    return pd.DataFrame(out, columns=["measure", "family", "method", "value", "null", "beyond"])


def _causal(out: Evidence, study: _Study, methods) -> None:
    table = study.get("causal", "method", "name", "measure", "beats")
    if table is not None:
        table = table[
            table.method.isin(methods) & (table.measure == "margin") & table.name.str.startswith("preference")
        ]
        table = table.dropna(subset=["beats"])
    if table is None or not len(table):
        return out.say("Interventions: not measured.")
    share = out.add("causal.csv", "share that beats random directions", table.beats.astype(bool).mean())
    return out.say(
        f"Steering along the preference direction and ablating it: of {len(table)} effects on the margin a share of "
        f"{share} beats norm-matched random directions (0.05 by chance)."
    )


def _preserve_claim(paper: Evidence, here: Evidence, sound: Evidence, study: _Study):
    loss = published("models").pivot(index="family", columns="method", values="ce_loss")
    verdicts, because = [], []
    for method in ("ppo", "simpo"):
        _paper_changes(paper, method)
        moved = (loss[method] - loss["base"]).rename("change").reset_index()
        said = paper.each(moved, "data/published/models.csv", "loss change", "change", method)
        paper.say(f"Loss on plain text: {said} nats a token.")
        _here_published(here, study, method)
        rows = _here_sound(sound, study, method)
        if rows is None:
            verdicts.append(NOT_TESTABLE)
            because.append(f"{method}: not measured")
            continue
        verdict, reason = judge_equivalence(rows)
        verdicts.append(verdict)
        because.append(f"{method}: {reason}")
    moved = (loss["kto"] - loss["base"]).rename("change").reset_index()
    said = paper.each(moved, "data/published/models.csv", "loss change", "change", "kto")
    paper.say(f"For comparison, kto: {said}. No reward, KL or win rate is published.")
    _doses(sound, study, ("ppo", "simpo"))
    return combine(verdicts), "; ".join(because)


def _depth_claim(paper: Evidence, here: Evidence, sound: Evidence, study: _Study):
    table = reanalysis()
    rows = table[table.method == "base"].assign(depth=lambda t: t.best_layer / (t.layers - 1))
    source = "data/published/probe_metrics.csv"
    best = paper.each(rows, source, "depth of the best layer", "depth", "base")
    first = paper.each(rows, source, "layer 0 AUROC", "layer0", "base")
    span = ", ".join(f"{r.family} {r.plateau_first}-{r.plateau_last} of {r.layers}" for r in rows.itertuples())
    paper.say(f"Base, depth of the best layer: {best}; layers within two standard errors: {span}; layer 0: {first}.")
    verdict, because = NOT_TESTABLE, "not measured"
    for name, out in (("published", here), ("grouped", sound)):
        found = study.get(f"layer_metrics_{name}", "family", "method", "layer", "auroc", "auroc_low", "auroc_high")
        if found is None:
            continue
        base = found[found.method == "base"].rename(columns={"auroc_low": "low", "auroc_high": "high"})
        top = base.loc[base.groupby("family", sort=False).auroc.idxmax()]
        said = out.each(top, f"layer_metrics_{name}.csv", "best AUROC", "auroc", "base", interval=True)
        where = ", ".join(
            f"{r.family} {r.layer} of {base[base.family == r.family].layer.nunique()}" for r in top.itertuples()
        )
        out.say(f"Base, best AUROC: {said}, at layer {where}.")
        if name == "grouped":
            verdict, because = judge_depth(found[found.method == "base"])
    return verdict, because


def _family_claim(paper: Evidence, here: Evidence, sound: Evidence, study: _Study):
    table = reanalysis().query("method != 'base'")
    span = table.groupby("method", sort=False).change.agg(np.ptp)
    said = ", ".join(
        f"{m} {paper.add('data/published/probe_metrics.csv', 'range', v, method=m)}" for m, v in span.items()
    )
    paper.say(f"Range over families of the change against base: {said}. No second training seed is published.")
    own = {m: t.change for m in METHODS if (t := study.published_changes(m)) is not None and len(t)}
    if own:
        said = ", ".join(
            f"{m} {here.add('layer_metrics_published.csv', 'range', np.ptp(v), method=m)}" for m, v in own.items()
        )
        here.say(f"Range over families of the change against base, best layer against best layer: {said}.")
    rows = [t for t in map(study.changes, METHODS) if t is not None]
    if not rows:
        return NOT_TESTABLE, "not measured"
    changes = pd.concat(rows)
    here_span = changes.groupby("method", sort=False).change.agg(lambda c: c.max() - c.min())
    said = ", ".join(f"{m} {sound.add('transfer_gaps.csv', 'range', v, method=m)}" for m, v in here_span.items())
    sound.say(f"Range over families of the change, grouped folds, at the base's best layer: {said}.")
    layers = study.get("best_layers", "family", "method", "seed", "auroc_grouped")
    if layers is not None:
        by_seed = layers[layers.method.isin(METHODS)].groupby(["family", "method"]).auroc_grouped.std()
        if by_seed.notna().any():
            spread = sound.add("best_layers.csv", "spread over seeds", float(np.sqrt((by_seed**2).mean())))
            sound.say(f"Standard deviation over training seeds within a family: {spread}.")
    return judge_families(changes, float(span.median()))


def _breadth_claim(paper: Evidence, here: Evidence, sound: Evidence, study: _Study):
    classes = (
        class_shares().query("run != 'rescue'").groupby(["family", "method"], sort=False).aligned_only.mean().unstack()
    )
    source, held = "data/published/crosscoder_classes.csv", 0
    for family, row in classes.iterrows():
        broad, narrow = row.reindex(BROAD).dropna(), row.reindex(CONCENTRATED).dropna()
        held += broad.min() > narrow.max()
        low = paper.add(source, "aligned-only share, lowest broad", broad.min(), family=family)
        high = paper.add(source, "aligned-only share, highest concentrated", narrow.max(), family=family)
        paper.say(f"{family}: lowest broad share {low}, highest concentrated {high}.")
    paper.say(f"The order holds in {held} of {len(classes)} families; PPO and nulls are not published.")
    labels = study.get("published_classes", "family", "method", "thresholds", "class", "share")
    if labels is not None:
        rows = labels[(labels.thresholds == "adaptive") & (labels["class"] == "aligned_only")]
        for words, names in (("broad", BROAD), ("concentrated", CONCENTRATED), ("nulls", NULLS)):
            part = rows[rows.method.isin(names)]
            if len(part):
                said = here.add("published_classes.csv", f"aligned-only share, {words}", part.share.mean())
                here.say(f"Aligned-only share, {words}: {said} in the mean.")
    labels = study.get("crosscoder_labels", "family", "method", "label", "share", "count")
    if labels is None:
        return NOT_TESTABLE, "not measured"
    rows = labels[labels.label == "aligned_only"]
    for words, names in (("broad", BROAD), ("concentrated", CONCENTRATED), ("nulls", NULLS)):
        part = rows[rows.method.isin(names)].groupby("family", sort=False).share.max().reset_index()
        if len(part):
            said = sound.each(part, "crosscoder_labels.csv", f"largest aligned-only share, {words}", "share")
            sound.say(f"Largest aligned-only share of live latents, {words}: {said}.")
    return judge_breadth(labels, float(classes[list(BROAD)].stack().median()))


CLAIMS = (
    Claim("C1", "KTO raises the separability of chosen and rejected answers.", _CHANGE_RULE,
          _change_claim(("kto",), 1, "few pairs")),
    Claim("C2", "GRPO raises separability.", _CHANGE_RULE, _change_claim(("grpo",), 1, "repeated answers")),
    Claim("C3", "DPO and ORPO lower separability.",
          _CHANGE_RULE + " Two methods: their common verdict; changed if only one holds.",
          _change_claim(("dpo", "orpo"), -1)),
    Claim("C4", "DPO and ORPO lower it through rotation and attenuation.",
          "Replicated: the fall of C3 is, and rotation or attenuation exceeds the nulls (two seeds, random direction) "
          "by two standard errors in at least 2/3 of the families for both methods; changed: for one method only; not "
          "replicated: for neither. Without that fall there is nothing to explain, and the verdict is that of C3. "
          "Decided by the first of decomposition, geometry and crosscoder labels that was measured.",
          _mechanism_claim),
    Claim("C5", "PPO and SimPO preserve separability.",
          "An equivalence test. Replicated: in at least 2/3 of the families the method learnt something (objective "
          f"moved, half of the target dose) and the whole 95 % interval of the change lies within ±{MARGIN}. Not "
          "replicated: at least 2/3 of the intervals lie beyond the margin. Else not testable here.",
          _preserve_claim),
    Claim("C6", "The preference signal sits in early-middle to middle-late layers.",
          "Plateau: layers whose AUROC lies within the interval of the base's best. Replicated: in at least 2/3 of the "
          "families it holds neither the first nor the last layer. Changed: narrow (at most half of the layers), but "
          f"at an end. Not replicated: all layers, and the interval, within {MARGIN}. Else not testable here.",
          _depth_claim),
    Claim("C7", "The effects depend on the architecture.",
          "Cochran's Q over families for each method, errors from prompts and training seeds, corrected over methods. "
          "Replicated: families differ for some method. Not replicated: for none, though a difference as large as the "
          "published range would be seen. Else not testable here.",
          _family_claim),
    Claim("C8", "DPO, SimPO and GRPO add many exclusive latents, KTO and ORPO few.",
          "Live aligned-only latents by fixed cut-offs. Replicated: in at least 2/3 of the families every broad method "
          "has more than every concentrated one and than every null (two standard errors). Not replicated: the upper "
          "bounds of the broad methods lie below the published share. Changed: otherwise, where a method exceeds its "
          "nulls. Else not testable here.",
          _breadth_claim),
)  # fmt: skip


# --- the ledger -------------------------------------------------------------------------------------------------------


def ledger(tables: dict[str, pd.DataFrame], *, run_id: str, preset: str, dose: float | None = None) -> dict:
    """Judge every claim by its rule.

    tables : by the names in ``TABLES``; what is missing or empty counts as not measured. dose : the target in nats, for
    asking whether a method learnt something; None asks only whether its objective moved. Returns plain data:
    {"schema", "run_id", "preset", "claims": [{"id", "statement", "rule", "published": {"text", "numbers"},
    "here_published": ..., "here_sound": ..., "verdict", "because", "sources"}]}. Each number has name, family, method,
    value, low, high, source and run. Raises ClaimError for a table without the columns that a rule reads.
    """
    study, claims = _Study(tables, dose), []
    for claim in CLAIMS:
        evidence = [Evidence() for _ in range(3)]
        verdict, because = claim.judge(*evidence, study)
        sources = dict.fromkeys(number["source"] for part in evidence for number in part.numbers)
        said = [part.plain(run) for part, run in zip(evidence, (PAPER, run_id, run_id), strict=True)]
        claims.append(
            {"id": claim.id, "statement": claim.statement, "rule": claim.rule}
            | dict(zip(("published", "here_published", "here_sound"), said, strict=True))
            | {"verdict": verdict, "because": because, "sources": list(sources)}
        )
    return {"schema": SCHEMA, "run_id": run_id, "preset": preset, "claims": claims}


def frame(document: dict) -> pd.DataFrame:
    """A ledger as a table of text, one row a claim."""
    check(document)
    rows = [
        {
            **{name: claim[name] for name in ("id", "statement", "verdict", "because")},
            **{name: claim[name]["text"].replace("\n", " ") for name in ("published", "here_published", "here_sound")},
            "rule": claim["rule"],
            "sources": "; ".join(claim["sources"]),
            "run_id": document["run_id"],
        }
        for claim in document["claims"]
    ]
    return pd.DataFrame(rows)


def write(document: dict, path: str | Path) -> None:
    """Write a ledger as JSON; numbers that do not exist become null."""
    check(document)
    store.write_json(Path(path), document)


def read(path: str | Path) -> dict:
    """Read and check what ``write`` wrote."""
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    check(document)
    return document


def check(document: dict) -> None:
    """Raise ClaimError unless a document is a ledger of this version, with a known verdict for every claim."""
    if document.get("schema") != SCHEMA:
        raise ClaimError(
            f"The ledger says schema {document.get('schema')!r}, this version reads {SCHEMA!r}: make it anew."
        )
    for claim in document.get("claims", []):
        if claim.get("verdict") not in VERDICTS:
            raise ClaimError(f"Claim {claim.get('id')} has the verdict {claim.get('verdict')!r}: one of {VERDICTS}.")


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of ``TABLES`` that lie in a folder of figures as CSV, for a ledger without a study."""
    return {name: pd.read_csv(path) for name in TABLES if (path := Path(folder) / f"{name}.csv").exists()}
