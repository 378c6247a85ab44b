"""The claims: what each is judged on, table by table, and the rule that is applied to it.

The docstring of a claim's function is its rule, word for word as the ledger states it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from alignlens.claims import rules
from alignlens.claims.evidence import Evidence, Tables
from alignlens.claims.paper import class_shares, published, reanalysis
from alignlens.claims.rules import BROAD, CONCENTRATED, NOT_TESTABLE, NULLS
from alignlens.core.settings import METHODS
from alignlens.core.statistics import standard_error
from alignlens.study.mechanisms import matched_dose

# Measures of rotation and attenuation by their table, the most direct first: 1 if more of it is more, -1 if less is.
MEASURES = {
    "decomposition_seeds": {"rotated": 1, "attenuated": 1},
    "geometry": {"rotation_degrees": 1, "norm_ratio": -1},
    "crosscoder_labels": {"shared_rotated": 1, "shared_attenuated": 1},
}
WORDS = {
    "rotated": "AUROC that only the variant's own probe still reads",
    "attenuated": "AUROC that no probe reads any more",
    "rotation_degrees": "Rotation of the stream, degrees",
    "norm_ratio": "Norm, as a multiple of base",
    "shared_rotated": "Share of rotated latents",
    "shared_attenuated": "Share of attenuated latents",
}


@dataclass
class Case:
    """A claim under judgement: a study's tables; what was published, what the published and the sound protocol give."""

    study: Tables
    paper: Evidence = field(default_factory=Evidence)
    here: Evidence = field(default_factory=Evidence)
    sound: Evidence = field(default_factory=Evidence)


def _of(table: pd.DataFrame, *methods: str) -> pd.DataFrame:
    return table[table.method.isin(methods)]


# --- changes of separability ------------------------------------------------------------------------------------------


def change(case: Case, methods: tuple[str, ...], sign: int, contrast: str = "") -> tuple[str, str]:
    """Sound protocol, at the layer where the family's base is best, aligned minus base, grouped folds, interval over
    prompts and seeds. Replicated: interval without 0, q < {LEVEL} over families x methods, claimed sign in at least 2/3
    of the families and the other sign in none. Changed: clear somewhere, but not so. Not replicated: clear nowhere, and
    in at least 2/3 of the families the method learnt something (objective moved, half of the target dose) and the
    interval excludes the published change (median over families). Else not testable here.
    """

    def rule(found, rows):
        return rules.judge_change(found, sign, float((sign * rows.change).median()))

    verdict = _by_method(case, methods, rule, _at_layer0 if contrast else None)
    _contrast(case, contrast)
    _matched(case, methods)
    return verdict


def preserve(case: Case) -> tuple[str, str]:
    """An equivalence test. Replicated: in at least 2/3 of the families the method learnt something (objective moved,
    half of the target dose) and the whole 95 % interval of the change lies within ±{MARGIN}. Not replicated: at least
    2/3 of the intervals lie beyond the margin. Else not testable here.
    """
    verdict = _by_method(case, ("ppo", "simpo"), lambda found, _: rules.judge_equivalence(found), _loss)
    _loss(case.paper, reanalysis(), "kto", "For comparison, kto: %s. No reward, KL or win rate is published.")
    _matched(case, ("ppo", "simpo"))
    return verdict


def _by_method(case: Case, methods, rule: Callable, more: Callable | None) -> tuple[str, str]:
    """The common verdict over methods of a rule on (changes here, the paper's rows); more : further words on these."""
    verdicts, because = [], []
    for method in methods:
        rows, own, found = (_of(t, method) for t in (reanalysis(), case.study.published_changes, case.study.changes))
        text = f"{method}: %s against base; {rows.beyond_noise.sum()} of {len(rows)} exceed two standard errors."
        case.paper.tell(text, rows, "probe_metrics", "change")
        if more:
            more(case.paper, rows, method)
        text = f"{method} on the pairs that base is read on, best layer against best layer: %s."
        case.here.tell(text, own, "layer_metrics_published", "change")
        text = f"{method}, grouped folds, at the base's best layer: %s; learnt something in {found.trained.sum()} families."
        case.sound.tell(text, found, "transfer_gaps", "change")
        verdict, reason = rule(found, rows) if len(found) else (NOT_TESTABLE, "not measured")
        verdicts.append(verdict)
        because.append(f"{method}: {reason}")
    return rules.combine(verdicts), "; ".join(because)


def _at_layer0(out: Evidence, rows: pd.DataFrame, method: str) -> None:
    base = _of(reanalysis(), "base").set_index("family").loc[rows.family].reset_index()
    out.tell("At layer 0 already: %s.", rows, "probe_metrics", "layer 0 change", "layer0_change")
    floor, own = (out.each(table, "noise_floors", "noise floor", "floor") for table in (rows, base))
    out.say(f"Pure noise of the same n and d scores {floor}; at the base's n {own}.")
    text = "As a share of what lies above the floor the change is %s."
    out.tell(text, rows, "noise_floors", "above-floor change", "above_floor_change")
    leak = published("leak_free").query("method == @method and layer == 'best'")
    leak = leak.rename(columns={"auroc_clean_low": "low", "auroc_clean_high": "high"})
    if len(leak):
        clean = out.each(leak, "leak_free", "leak-free AUROC", "auroc_clean")
        pairs, own = (leak.pairs - leak.leaked_pairs).iloc[0], out.each(base, "probe_metrics", "AUROC", "auroc")
        out.say(f"On the {pairs} pairs whose mirror image was not in training: {clean}; base, with the leak, {own}.")


def _loss(out: Evidence, _, method: str, text: str = "Loss on plain text: %s nats a token.") -> None:
    loss = published("models").pivot(index="family", columns="method", values="ce_loss")
    moved = (loss[method] - loss["base"]).rename("change").reset_index().assign(method=method)
    out.tell(text, moved, "models", "loss change", "change")


def _contrast(case: Case, name: str) -> None:
    """What another set of pairs does to one and the same base, under either protocol."""
    table = case.study["data_matters"]
    if name not in set(table["set"]):
        return
    best = table.groupby(["protocol", "family", "set"], sort=False).auroc.max().unstack()
    for protocol, out in (("published", case.here), ("grouped", case.sound)):
        rows = (
            (best.loc[protocol][name] - best.loc[protocol]["paired"])
            .dropna()
            .rename("change")
            .reset_index()
            .assign(method="base")
        )
        text = f"The unaligned base read on {name} instead of one pair a prompt: %s."
        out.tell(text, rows, "data_matters", f"change of the base on {name}", "change")


def _matched(case: Case, methods) -> None:
    """Changes where every method stands at the same dose, if the way there was measured."""
    path = _of(case.study["dose_response"], *METHODS)
    if _of(path, *methods).empty:
        return case.sound.say("Matched dose: not measured.")
    dose = float(path.groupby(["family", "method"]).kl.max().min())
    found = matched_dose(path, dose).query("measure == 'change'")
    for method in methods:
        text = f"{method} at a dose of {dose:.2f} nats, which every method reaches: %s."
        case.sound.tell(text, _of(found, method), "dose_response", "change at matched dose", "value")
    return None


# --- rotation and attenuation -----------------------------------------------------------------------------------------


def mechanism(case: Case) -> tuple[str, str]:
    """Replicated: the fall of C3 is, and rotation or attenuation exceeds the nulls (two seeds, random direction) by two
    standard errors in at least 2/3 of the families for both methods; changed: for one method only; not replicated: for
    neither. Without that fall there is nothing to explain, and the verdict is that of C3. Decided by the first of
    decomposition, geometry and crosscoder labels that was measured.
    """
    methods = ("dpo", "orpo")
    _published_mechanism(case, methods)
    tables = {source: rows for source in MEASURES if len(rows := _beside_nulls(case.study, source))}
    for source, table in tables.items():
        for measure, rows in _of(table, *methods).groupby("measure", sort=False):
            null = rows.drop_duplicates("family").assign(method="null")
            null = case.sound.each(null, source, f"{measure}, null", "null")
            said = [
                f"{m} {case.sound.each(t, source, measure, 'value')} (beyond in {t.beyond.sum()} of {len(t)})"
                for m, t in rows.groupby("method", sort=False)
            ]
            case.sound.say(f"{WORDS[measure]}: {'; '.join(said)}; strongest null {null}.")
    _interventions(case, methods)
    fall, _ = change(Case(case.study), methods, -1)
    source, table = next(iter(tables.items()), ("", pd.DataFrame(columns=["method"])))
    if not set(methods) <= set(table.method):
        return NOT_TESTABLE, "no table measures rotation or attenuation beside nulls for dpo and orpo"
    hits = table.groupby(["method", "measure"]).beyond.agg(lambda beyond: rules.majority(beyond.sum(), len(beyond)))
    named = [m for m in methods if hits[m].any()]
    verdict = (rules.NOT_REPLICATED, rules.CHANGED, rules.REPLICATED)[len(named)] if fall == rules.REPLICATED else fall
    said = f"fall of separability: {fall}; rotation or attenuation beyond the nulls for {', '.join(named) or 'neither'}"
    return verdict, f"{said} (by {source}.csv)"


def _published_mechanism(case: Case, methods) -> None:
    span = class_shares().groupby("family", sort=False).shared_redirected.agg(["min", "max"]).reset_index()
    low, high = (case.paper.each(span, "crosscoder_classes", f"redirected share, {end}", end) for end in ("min", "max"))
    case.paper.say(f"Redirected latents, over all methods: lowest {low}; highest {high}. No null is published.")
    anchor = published("anchors").pivot(index="family", columns="method", values="median_anchor").reset_index()
    for method in methods:
        text = f"{method}: anchor activation at the base's own layer, as a multiple of base: %s (read off a plot)."
        rows = anchor.assign(ratio=anchor[method] / anchor["base"], method=method)
        case.paper.tell(text, rows, "anchors", "anchor ratio", "ratio")
    labels = case.study["published_classes"].query("thresholds == 'adaptive' and `class` == 'shared_redirected'")
    for method, words in (*zip(methods, methods, strict=True), ("self", "base with itself")):
        case.here.tell(
            f"Redirected, {words}: %s.", _of(labels, method), "published_classes", "redirected share", "share"
        )


def _beside_nulls(study: Tables, source: str) -> pd.DataFrame:
    """Rotation and attenuation beside their nulls: measure, family, method, value (mean over seeds), null, beyond.

    null : the strongest seed or draw of any null. beyond : two standard errors above it; those of latent shares are
    binomial, of the others from prompts and seeds.
    """
    table = study[source]
    if _of(table, *NULLS).empty:
        return table[:0]
    if source != "crosscoder_labels":
        table = study.at_reference(table)
        return pd.concat([_against_nulls(table, *measure) for measure in MEASURES[source].items()])
    rows = table.assign(live=rules.live(table))[table.label.isin(MEASURES[source])]
    null = _of(rows, *NULLS).groupby(["family", "label"]).share.max().rename("null").reset_index()
    rows = rows.merge(null).rename(columns={"label": "measure", "share": "value"})
    return rows.assign(beyond=rules.exceeds(rows.value, rows.null, rows.live))


def _against_nulls(table: pd.DataFrame, name: str, side: int) -> pd.DataFrame:
    error = standard_error(table[f"{name}_low"], table[f"{name}_high"], least=0.0) if f"{name}_low" in table else 0.0
    table = table.assign(value=table[name], strength=side * table[name], within=error).dropna(subset="strength")
    nulls = _of(table, *NULLS)
    nulls = nulls.loc[nulls.groupby("family").strength.idxmax()].set_index("family").add_prefix("null_")
    ours = _of(table, *METHODS).groupby(["family", "method"], sort=False)
    rows = ours.agg({"value": "mean", "strength": "mean", "within": lambda e: (e**2).mean()})
    error = ours.strength.sem().fillna(0.0)  # between seeds; one seed has none
    rows = rows.assign(between=error, measure=name).reset_index().join(nulls, on="family", how="inner")
    error = np.sqrt(rows.within + rows.between**2 + rows.null_within**2)
    return rows.assign(null=rows.null_value, beyond=rows.strength - rows.null_strength > 2 * error)


def _interventions(case: Case, methods) -> None:
    table = _of(case.study["causal"], *methods).dropna(subset="beats")
    table = table[(table.measure == "margin") & table["name"].astype(str).str.startswith("preference")]
    if table.empty:
        return case.sound.say("Interventions: not measured.")
    share = case.sound.add("causal", "share that beats random directions", table.beats.astype(bool).mean())
    return case.sound.say(
        f"Steering along the preference direction and ablating it: of {len(table)} effects on the margin a share of "
        f"{share} beats norm-matched random directions (0.05 by chance)."
    )


# --- layers, families, breadth ----------------------------------------------------------------------------------------


def depth(case: Case) -> tuple[str, str]:
    """Plateau: layers whose AUROC lies within the interval of the base's best. Replicated: in at least 2/3 of the
    families it holds neither the first nor the last layer. Changed: narrow (at most half of the layers), but at an end.
    Not replicated: all layers, and the interval, within {MARGIN}. Else not testable here.
    """
    rows = _of(reanalysis(), "base").assign(depth=lambda t: t.best_layer / (t.layers - 1))
    best = case.paper.each(rows, "probe_metrics", "depth of the best layer", "depth")
    first = case.paper.each(rows, "probe_metrics", "layer 0 AUROC", "layer0")
    span = ", ".join(f"{r.family} {r.plateau_first}-{r.plateau_last} of {r.layers}" for r in rows.itertuples())
    case.paper.say(
        f"Base, depth of the best layer: {best}; layers within two standard errors: {span}; layer 0: {first}."
    )
    for source, out in (("layer_metrics_published", case.here), ("layer_metrics_grouped", case.sound)):
        found = _of(case.study[source], "base")
        layers = found.groupby("family").layer.nunique()
        top = found.loc[found.groupby("family", sort=False).auroc.idxmax()]
        top = top.rename(columns={"auroc_low": "low", "auroc_high": "high"})
        where = ", ".join(f"{r.family} {r.layer} of {layers[r.family]}" for r in top.itertuples())
        out.tell(f"Base, best AUROC: %s, at layer {where}.", top, source, "best AUROC", "auroc")
    return rules.judge_depth(found) if len(found) else (NOT_TESTABLE, "not measured")


def families(case: Case) -> tuple[str, str]:
    """Cochran's Q over families for each method, errors from prompts and training seeds, corrected over methods.
    Replicated: families differ for some method. Not replicated: for none, though a difference as large as the published
    range would be seen. Else not testable here.
    """
    own, found = (
        pd.concat([_of(table, method) for method in METHODS])
        for table in (case.study.published_changes, case.study.changes)
    )
    text = "Range over families of the change"
    paper = reanalysis().query("method != 'base'")
    spread = _ranges(
        case.paper, f"{text} against base: %s. No second training seed is published.", paper, "probe_metrics"
    )
    _ranges(case.here, f"{text} against base, best layer against best layer: %s.", own, "layer_metrics_published")
    _ranges(case.sound, f"{text}, grouped folds, at the base's best layer: %s.", found, "transfer_gaps")
    if found.empty:
        return NOT_TESTABLE, "not measured"
    seeds = _of(case.study["best_layers"], *METHODS).groupby(["family", "method"]).auroc_grouped.std()
    if seeds.notna().any():
        said = case.sound.add("best_layers", "spread over seeds", float(np.sqrt((seeds**2).mean())))
        case.sound.say(f"Standard deviation over training seeds within a family: {said}.")
    return rules.judge_families(found, spread)


def _ranges(out: Evidence, text: str, table: pd.DataFrame, source: str) -> float:
    """Say the range over families of each method's change; returns the median over methods."""
    span = table.groupby("method", sort=False).change.agg(lambda values: values.max() - values.min())
    if len(span):
        out.say(text % ", ".join(f"{m} {out.add(source, 'range', v, method=m)}" for m, v in span.items()))
    return float(span.median())


def breadth(case: Case) -> tuple[str, str]:
    """Live aligned-only latents by fixed cut-offs. Replicated: in at least 2/3 of the families every broad method has
    more than every concentrated one and than every null (two standard errors). Not replicated: the upper bounds of the
    broad methods lie below the published share. Changed: otherwise, where a method exceeds its nulls. Else not testable
    here.
    """
    shares = class_shares().query("run != 'rescue'").groupby(["family", "method"], sort=False).aligned_only.mean()
    broad, narrow = (shares[shares.index.isin(names, level="method")] for names in (BROAD, CONCENTRATED))
    lowest, highest = broad.groupby("family").min(), narrow.groupby("family").max()
    for family in lowest.index:
        low = case.paper.add("crosscoder_classes", "aligned-only share, lowest broad", lowest[family], family=family)
        name = "aligned-only share, highest concentrated"
        high = case.paper.add("crosscoder_classes", name, highest[family], family=family)
        case.paper.say(f"{family}: lowest broad share {low}, highest concentrated {high}.")
    held = (lowest > highest).sum()
    case.paper.say(f"The order holds in {held} of {len(lowest)} families; PPO and nulls are not published.")
    labels, own = case.study["crosscoder_labels"], case.study["published_classes"]
    own = own.query("thresholds == 'adaptive' and `class` == 'aligned_only'")
    for words, names in {"broad": BROAD, "concentrated": CONCENTRATED, "nulls": NULLS}.items():
        if len(part := _of(own, *names)):
            said = case.here.add("published_classes", f"aligned-only share, {words}", part.share.mean())
            case.here.say(f"Aligned-only share, {words}: {said} in the mean.")
        part = (
            _of(labels[labels.label == "aligned_only"], *names).groupby("family", sort=False).share.max().reset_index()
        )
        text, name = f"Largest aligned-only share of live latents, {words}: %s.", f"largest aligned-only share, {words}"
        case.sound.tell(text, part, "crosscoder_labels", name, "share")
    return rules.judge_breadth(labels, float(broad.median())) if len(labels) else (NOT_TESTABLE, "not measured")
