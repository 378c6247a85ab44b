"""The claims. The docstring of a claim's function is its rule, word for word as the ledger states it.

Each says its evidence to ``paper`` (published), ``here`` (its protocol on this study's models), ``sound`` (ours)."""

import numpy as np
import pandas as pd

from alignlens.claims import rules
from alignlens.claims.evidence import Evidence, Tables, of
from alignlens.claims.paper import class_shares, published, reanalysis
from alignlens.claims.rules import BROAD, CHANGED, CONCENTRATED, NOT_REPLICATED, NOT_TESTABLE, NULLS, REPLICATED
from alignlens.core.settings import METHODS
from alignlens.core.statistics import standard_error
from alignlens.study.mechanisms import matched_dose

Verdict = tuple[str, str]  # verdict, because
NOT_MEASURED = NOT_TESTABLE, "not measured"
# Of rotation and attenuation, the most direct first: the table, 1 if more of it is more and -1 if less is, words.
MEASURES = {
    "rotated": ("decomposition_seeds", 1, "AUROC that only the variant's own probe still reads"),
    "attenuated": ("decomposition_seeds", 1, "AUROC that no probe reads any more"),
    "rotation_degrees": ("geometry", 1, "Rotation of the stream, degrees"),
    "norm_ratio": ("geometry", -1, "Norm, as a multiple of base"),
    "shared_rotated": ("crosscoder_labels", 1, "Share of rotated latents"),
    "shared_attenuated": ("crosscoder_labels", 1, "Share of attenuated latents"),
}


def change(study: Tables, paper: Evidence, here: Evidence, sound: Evidence, methods, sign: int, contrast="") -> Verdict:
    """Sound protocol, at the layer where the family's base is best, aligned minus base, grouped folds, interval over
    prompts and seeds. Replicated: interval without 0, q < {LEVEL} over families x methods, claimed sign in at least 2/3
    of the families and the other sign in none. Changed: clear somewhere, but not so. Not replicated: clear nowhere, and
    in at least 2/3 of the families the method learnt something (objective moved, half of the target dose) and the
    interval excludes the published change (median over families). Else not testable here."""
    evidence, more = (paper, here, sound), _at_layer0 if contrast else None
    return _by_method(study, *evidence, methods, lambda t, x: rules.judge_change(t, sign, sign * x), more, contrast)


def preserve(study: Tables, paper: Evidence, here: Evidence, sound: Evidence) -> Verdict:
    """An equivalence test. Replicated: in at least 2/3 of the families the method learnt something (objective moved,
    half of the target dose) and the whole 95 % interval of the change lies within ±{MARGIN}. Not replicated: at least
    2/3 of the intervals lie beyond the margin. Else not testable here."""
    methods = ("ppo", "simpo")
    verdict = _by_method(study, paper, here, sound, methods, lambda t, _: rules.judge_equivalence(t), _loss)
    _loss(paper, "kto", text="For comparison, kto: %s. No reward, KL or win rate is published.")
    return verdict


def _by_method(study, paper, here, sound, methods, rule, more, contrast="") -> Verdict:
    """The common verdict; rule : of (changes here, published change); more : more words on the paper's."""
    judged = {}
    for method in methods:
        rows, own, found = (of(table, method) for table in (reanalysis(), study.published_changes, study.changes))
        text = f"{method}: %s against base; {rows.beyond_noise.sum()} of {len(rows)} exceed two standard errors."
        paper.tell(text, rows, "probe_metrics", "change")
        if more:
            more(paper, method, rows)
        text = f"{method} on the pairs that base is read on, best layer against best layer: %s."
        here.tell(text, own, "layer_metrics_published", "change")
        text = f"{method}, grouped folds, at the base's best layer: %s; learnt something in "
        sound.tell(f"{text}{found.trained.sum()} families.", found, "transfer_gaps", "change")
        judged[method] = rule(found, rows.change.median()) if len(found) else NOT_MEASURED
    best = study["data_matters"].groupby(["protocol", "family", "set"]).auroc.max().unstack()
    if contrast in best:  # what another set of pairs does to one and the same base
        best = best.assign(change=best[contrast] - best["paired"], method="base").dropna(subset="change").reset_index()
        text = f"The unaligned base read on {contrast} instead of one pair a prompt: %s."
        for protocol, out in (("published", here), ("grouped", sound)):
            rows = best[best.protocol == protocol]
            out.tell(text, rows, "data_matters", f"change of the base on {contrast}", "change")
    _matched(study, sound, methods)
    verdicts = {verdict for verdict, _ in judged.values()}
    if len(verdicts) > 1:
        verdicts = {CHANGED if {CHANGED, REPLICATED} & verdicts else NOT_TESTABLE}
    return verdicts.pop(), "; ".join(f"{method}: {reason}" for method, (_, reason) in judged.items())


def _at_layer0(paper: Evidence, method: str, rows: pd.DataFrame) -> None:
    base = of(reanalysis(), "base").set_index("family").loc[rows.family].reset_index()
    paper.tell("At layer 0 already: %s.", rows, "probe_metrics", "layer 0 change", "layer0_change")
    floor, own = (paper.each(table, "noise_floors", "noise floor", "floor") for table in (rows, base))
    paper.say(f"Pure noise of the same n and d scores {floor}; at the base's n {own}.")
    text = "As a share of what lies above the floor the change is %s."
    paper.tell(text, rows, "noise_floors", "above-floor change", "above_floor_change")
    leak = of(published("leak_free"), method).query("layer == 'best'")
    leak = leak.rename(columns={"auroc_clean_low": "low", "auroc_clean_high": "high"})
    if len(leak):
        clean = paper.each(leak, "leak_free", "leak-free AUROC", "auroc_clean")
        pairs, own = (leak.pairs - leak.leaked_pairs).iloc[0], paper.each(base, "probe_metrics", "AUROC", "auroc")
        paper.say(f"On the {pairs} pairs whose mirror image was not in training: {clean}; base, with the leak, {own}.")


def _loss(paper: Evidence, method: str, _=None, text: str = "Loss on plain text: %s nats a token.") -> None:
    loss = published("models").pivot(index="family", columns="method", values="ce_loss")
    loss = loss.assign(change=loss[method] - loss["base"], method=method).reset_index()
    paper.tell(text, loss, "models", "loss change", "change")


def _matched(study: Tables, sound: Evidence, methods) -> None:
    """Changes where every method stands at the same dose, if the way there was measured."""
    path = of(study["dose_response"], *METHODS)
    if of(path, *methods).empty:
        return sound.say("Matched dose: not measured.")
    dose = path.groupby(["family", "method"]).kl.max().min()
    found = matched_dose(path, dose).query("measure == 'change'")
    for method in methods:
        text = f"{method} at a dose of {dose:.2f} nats, which every method reaches: %s."
        sound.tell(text, of(found, method), "dose_response", "change at matched dose", "value")


def mechanism(study: Tables, paper: Evidence, here: Evidence, sound: Evidence) -> Verdict:
    """Replicated: the fall of C3 is, and rotation or attenuation exceeds the nulls (two seeds, random direction) by two
    standard errors in at least 2/3 of the families for both methods; changed: for one method only; not replicated: for
    neither. Without that fall there is nothing to explain, and the verdict is that of C3. Decided by the first of
    decomposition, geometry and crosscoder labels that was measured."""
    methods = ("dpo", "orpo")
    _published_mechanism(study, paper, here, methods)
    table = pd.concat([_beside_nulls(study, name) for name in MEASURES])
    for measure, rows in of(table, *methods).groupby("measure", sort=False):
        source, _, words = MEASURES[measure]
        null = sound.each(rows.drop_duplicates("family").assign(method="null"), source, f"{measure}, null", "null")
        said = [
            f"{method} {sound.each(part, source, measure, 'value')} (beyond in {part.beyond.sum()} of {len(part)})"
            for method, part in rows.groupby("method", sort=False)
        ]
        sound.say(f"{words}: {'; '.join(said)}; strongest null {null}.")
    tried = of(study["causal"], *methods).dropna(subset="beats").query("measure == 'margin'")
    tried = tried[tried["name"].astype(str).str.startswith("preference")]
    if "kind" in tried:
        tried = tried[tried.kind == "named"]  # an ablation's random directions bear its name
    share = sound.add("causal", "share that beats random directions", tried.beats.astype(bool).mean())
    text = f"Steering along the preference direction and ablating it: of {len(tried)} effects on the margin a share of "
    text += f"{share} beats norm-matched random directions (0.05 by chance)."
    sound.say(text if len(tried) else "Interventions: not measured.")
    decided = table[table.source == table.source.iloc[0]] if len(table) else table
    if not set(methods) <= set(decided.method):
        return NOT_TESTABLE, "no table measures rotation or attenuation beside nulls for dpo and orpo"
    hits = decided.groupby(["method", "measure"]).beyond.agg(lambda beyond: rules.majority(beyond.sum(), len(beyond)))
    named = [method for method in methods if hits[method].any()]
    fall, _ = change(study, Evidence(), Evidence(), Evidence(), methods, -1)
    verdict = (NOT_REPLICATED, CHANGED, REPLICATED)[len(named)] if fall == REPLICATED else fall
    said = f"fall of separability: {fall}; rotation or attenuation beyond the nulls for {', '.join(named) or 'neither'}"
    return verdict, f"{said} (by {decided.source.iloc[0]}.csv)"


def _published_mechanism(study: Tables, paper: Evidence, here: Evidence, methods) -> None:
    span = class_shares().groupby("family", sort=False).shared_redirected.agg(["min", "max"]).reset_index()
    low, high = (paper.each(span, "crosscoder_classes", f"redirected share, {end}", end) for end in ("min", "max"))
    paper.say(f"Redirected latents, over all methods: lowest {low}; highest {high}. No null is published.")
    anchor = published("anchors").pivot(index="family", columns="method", values="median_anchor").reset_index()
    for method in methods:
        text = f"{method}: anchor activation at the base's own layer, as a multiple of base: %s (read off a plot)."
        rows = anchor.assign(ratio=anchor[method] / anchor["base"], method=method)
        paper.tell(text, rows, "anchors", "anchor ratio", "ratio")
    labels = study["published_classes"].query("thresholds == 'adaptive' and `class` == 'shared_redirected'")
    for method in (*methods, "self"):
        text = f"Redirected, {'base with itself' if method == 'self' else method}: %s."
        here.tell(text, of(labels, method), "published_classes", "redirected share", "share")


def _beside_nulls(study: Tables, name: str) -> pd.DataFrame:
    """A measure beside its nulls: source, measure, family, method, value (mean over seeds), null (the strongest of
    any, NaN in a family without), beyond (by two standard errors: binomial of latent shares, else of prompts and
    seeds). Empty without nulls."""
    source, side, _ = MEASURES[name]
    table, latents = study[source], source == "crosscoder_labels"
    if of(table, *NULLS).empty:
        return pd.DataFrame(columns=["source", "measure", "family", "method"])
    if latents:
        table = table.assign(live=rules.live(table), **{name: table.share})[table.label == name]
    else:
        wanted = table.family.map(study.changes.groupby("family").layer.first())
        wanted = wanted.fillna(table.groupby("family").layer.transform("median"))
        reach = (table.layer - wanted + 0.1).abs()  # of two layers as near, the earlier
        table = table[reach == reach.groupby(table.family).transform("min")].dropna(subset=name).reset_index(drop=True)
    ends = [table[name + end] if name + end in table else table[name] for end in ("_low", "_high")]
    table = table.assign(strength=side * table[name], within=standard_error(*ends, least=0) ** 2)
    nulls, ours = of(table, *NULLS), of(table, *METHODS).groupby(["family", "method"], sort=False)
    nulls = nulls.loc[nulls.groupby("family").strength.idxmax()].set_index("family").add_prefix("null_")
    rows = ours.mean(numeric_only=True).assign(between=ours.strength.sem().fillna(0.0) ** 2).reset_index()
    rows = rows.join(nulls, on="family").assign(source=source, measure=name)
    rows = rows.assign(value=side * rows.strength, null=side * rows.null_strength)
    beyond = rows.strength - rows.null_strength > 2 * np.sqrt(rows.within + rows.between + rows.null_within)
    return rows.assign(beyond=rules.exceeds(rows.value, rows.null, rows.live) if latents else beyond)


def depth(study: Tables, paper: Evidence, here: Evidence, sound: Evidence) -> Verdict:
    """Plateau: layers whose AUROC lies within the interval of the base's best. Replicated: in at least 2/3 of the
    families it holds neither the first nor the last layer. Changed: narrow (at most half of the layers), but at an end.
    Not replicated: all layers, and the interval, within {MARGIN}. Else not testable here."""
    rows = of(reanalysis(), "base").assign(depth=lambda t: t.best_layer / (t.layers - 1))
    best = paper.each(rows, "probe_metrics", "depth of the best layer", "depth")
    first = paper.each(rows, "probe_metrics", "layer 0 AUROC", "layer0")
    span = ", ".join(f"{r.family} {r.plateau_first}-{r.plateau_last} of {r.layers}" for r in rows.itertuples())
    paper.say(f"Base, depth of the best layer: {best}; layers within two standard errors: {span}; layer 0: {first}.")
    for source, out in (("layer_metrics_published", here), ("layer_metrics_grouped", sound)):
        found = of(study[source], "base")
        top, layers = found.loc[found.groupby("family", sort=False).auroc.idxmax()], found.groupby("family").layer
        top = top.rename(columns={"auroc_low": "low", "auroc_high": "high"})
        where = ", ".join(f"{r.family} {r.layer} of {layers.nunique()[r.family]}" for r in top.itertuples())
        out.tell(f"Base, best AUROC: %s, at layer {where}.", top, source, "best AUROC", "auroc")
    return rules.judge_depth(found) if len(found) else NOT_MEASURED


def families(study: Tables, paper: Evidence, here: Evidence, sound: Evidence) -> Verdict:
    """Cochran's Q over families for each method, errors from prompts and training seeds, corrected over methods.
    Replicated: families differ for some method. Not replicated: for none, though a difference as large as the published
    range would be seen. Else not testable here."""
    text, again = "Range over families of the change", of(reanalysis(), *METHODS)
    spread = _range(paper, f"{text} against base: %s. No second training seed is published.", again, "probe_metrics")
    text_here = f"{text} against base, best layer against best layer: %s."
    _range(here, text_here, study.published_changes, "layer_metrics_published")
    _range(sound, f"{text}, grouped folds, at the base's best layer: %s.", study.changes, "transfer_gaps")
    if study.changes.empty:
        return NOT_MEASURED
    seeds = of(study["best_layers"], *METHODS).groupby(["family", "method"]).auroc_grouped.std()
    if seeds.notna().any():
        said = sound.add("best_layers", "spread over seeds", np.sqrt((seeds**2).mean()))
        sound.say(f"Standard deviation over training seeds within a family: {said}.")
    return rules.judge_families(study.changes, spread)


def _range(out: Evidence, text: str, table: pd.DataFrame, source: str) -> float:
    """Say the range over families of each method's change; returns the median over methods."""
    span = table.groupby("method", sort=False).change.agg(lambda values: values.max() - values.min())
    if len(span):
        out.say(text % ", ".join(f"{m} {out.add(source, 'range', v, method=m)}" for m, v in span.items()))
    return float(span.median())


def breadth(study: Tables, paper: Evidence, here: Evidence, sound: Evidence) -> Verdict:
    """Live aligned-only latents by fixed cut-offs. Replicated: in at least 2/3 of the families every broad method has
    more than every concentrated one and than every null (two standard errors). Not replicated: the upper bounds of the
    broad methods lie below the published share. Changed: otherwise, where a method exceeds its nulls. Else not testable
    here."""
    shares = class_shares().query("run != 'rescue'").groupby(["family", "method"]).aligned_only.mean().reset_index()
    broad, narrow = (of(shares, *names).groupby("family").aligned_only for names in (BROAD, CONCENTRATED))
    order, name = pd.DataFrame({"low": broad.min(), "high": narrow.max()}), "aligned-only share"
    for family, low, high in order.itertuples():
        low = paper.add("crosscoder_classes", f"{name}, lowest broad", low, family=family)
        high = paper.add("crosscoder_classes", f"{name}, highest concentrated", high, family=family)
        paper.say(f"{family}: lowest broad share {low}, highest concentrated {high}.")
    held = f"{(order.low > order.high).sum()} of {len(order)} families"
    paper.say(f"The order holds in {held}; PPO and nulls are not published.")
    own = study["published_classes"].query("thresholds == 'adaptive' and `class` == 'aligned_only'")
    only = study["crosscoder_labels"].query("label == 'aligned_only'")
    for words, names in {"broad": BROAD, "concentrated": CONCENTRATED, "nulls": NULLS}.items():
        if len(part := of(own, *names)):
            said = here.add("published_classes", f"{name}, {words}", part.share.mean())
            here.say(f"Aligned-only share, {words}: {said} in the mean.")
        part = of(only, *names).groupby("family", sort=False, as_index=False).share.max()
        text = f"Largest aligned-only share of live latents, {words}: %s."
        sound.tell(text, part, "crosscoder_labels", f"largest {name}, {words}", "share")
    share, labels = of(shares, *BROAD).aligned_only.median(), study["crosscoder_labels"]
    return rules.judge_breadth(labels, share) if len(labels) else NOT_MEASURED
