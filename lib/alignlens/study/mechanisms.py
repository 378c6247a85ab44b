"""Tables of dictionaries, geometry, dose and causes over a whole study; see ``tables``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm

from alignlens import behavior
from alignlens.study import STAGES, Study, Variant, features
from alignlens.study.tables import collect, reference_layers

NULLS = ("self", "seeds", "random")


def calibration(study: Study) -> pd.DataFrame:
    """Scores of every calibration run: kind, recall, false_discovery and more, by regime, instrument, samples, seed."""
    return pd.concat(
        [study.calibration(*words).table("score.parquet") for words in STAGES["calibration"].wanted(study)],
        ignore_index=True,
    )


def calibration_summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and worst seed of recall and false discovery: regime, instrument, samples, kind, seeds, ..."""
    keys = ["regime", "instrument", "samples", "kind"]
    named = {
        "seeds": ("seed", "nunique"),
        "recall": ("recall", "mean"),
        "recall_worst": ("recall", "min"),
        "found": ("found", "mean"),
        "false_discovery": ("false_discovery", "mean"),
        "false_discovery_worst": ("false_discovery", "max"),
        "r2": ("r2", "mean"),
    }
    for name in ("degrees_error_95", "ratio_error_95"):
        if name in scores:
            named[name] = (name, "max")
    return scores.groupby(keys, sort=False).agg(**named).reset_index()


def dictionary_history(study: Study) -> pd.DataFrame:
    """Training curves of the pooled autoencoders: family, layer, step, loss (share of the energy left), l0, dead."""
    out = []
    for family in study.families:
        for layer in study.dictionary_layers(family):
            found = features.read_dictionary(study.sae(family, layer), [layer])
            out.append(found.history.assign(family=family, layer=layer, dead_share=found.history.dead / found.width))
    return pd.concat(out, ignore_index=True)


def latent_table(study: Study, name: str, *, base: bool = True, null: bool = False) -> pd.DataFrame:
    """One table of ``Study.latents`` of all models, with family, method, seed; null adds the random direction."""
    variants = study.variants(base=base)
    if null:
        variants += [v for f in study.families for what, _, v in study.comparisons(f) if what == "random"]
    return collect(study, lambda v: study.latents(v).table(f"{name}.parquet"), variants)


def factors(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """AUROC of each latent for each planted factor on the bases, and its permutation ceiling; empty elsewhere."""
    if not study.tiny_world:
        return pd.DataFrame(), pd.DataFrame()
    bases = [Variant(f, "base") for f in study.families]
    return tuple(
        collect(study, lambda v, n=n: study.latents(v).table(f"{n}.parquet"), bases) for n in ("factors", "factor_null")
    )


def named_latents(factor_table: pd.DataFrame, ceiling: pd.DataFrame) -> pd.DataFrame:
    """The factor that each latent tells best, where it beats the permutation ceiling: family, layer, latent, name,
    auroc.
    """
    table = factor_table.merge(ceiling[["family", "layer", "factor", "ceiling"]], on=["family", "layer", "factor"])
    table["strength"] = (table.auroc - 0.5).abs()
    best = table.loc[table.groupby(["family", "layer", "latent"]).strength.idxmax()]
    best = best[best.strength > best.ceiling - 0.5]
    name = np.where(best.auroc > 0.5, "", "not ") + best.factor.astype(str)
    return best.assign(name=name)[["family", "layer", "latent", "name", "auroc"]].reset_index(drop=True)


def latent_changes(study: Study) -> pd.DataFrame:
    """Share of live latents that changed against the base (5 % false discovery): family, method, seed, layer, measure,
    share, and p95, the 95th percentile of the absolute change over live latents. Method "random" is the null."""
    table = latent_table(study, "change", base=False, null=True)
    usage = latent_table(study, "usage")
    live = usage[usage.method == "base"].query("density > 0")[["family", "layer", "latent"]]
    table = table.merge(live, on=["family", "layer", "latent"])
    out = []
    for measure in ("density", "mean", "effect"):
        found = table.assign(hit=table[f"{measure}_p"] < 0.05, size=table[f"{measure}_change"].abs())
        groups = found.groupby(["family", "method", "seed", "layer"], sort=False)
        out.append(groups.agg(share=("hit", "mean"), p95=("size", lambda x: x.quantile(0.95))).assign(measure=measure))
    return pd.concat(out).reset_index()


def seed_stability(study: Study) -> pd.DataFrame:
    """Cosine of each live latent with its partner in a dictionary of another seed: family, kind, cosine.

    kind "chance" matches the first dictionary with random rows of its shape.
    """
    from alignlens import dictionaries

    out = []
    for family in study.families:
        layer = study.crosscoder_layer(family)
        first, second = (features.read_dictionary(study.sae(family, layer, seed), [layer]) for seed in (0, 1))
        streams = {"pooled": study.tokens(Variant(family, "base")).at(layer)}
        alive = tuple(np.diff(d.codes(streams).tocsc().indptr) > 0 for d in (first, second))
        rng = np.random.default_rng(0)
        random = dataclasses.replace(second, decoder=rng.standard_normal(second.decoder.shape).astype(np.float32))
        for kind, other in (("another seed", second), ("chance", random)):
            table = dictionaries.match(first, other, alive=alive)
            out.append(table[["cosine"]].assign(family=family, kind=kind))
    return pd.concat(out, ignore_index=True)


def published_saes(study: Study) -> pd.DataFrame:
    """The published comparison: every model its own autoencoder at its own best layer, alive counts beside the base's.

    family, method, layer, alive, mean_density, mean_max, and their differences to the base (``delta_*``).
    """
    rows = []
    for v in study.first_seeds():
        artifact = study.published_sae(v)
        used, quality = artifact.table("usage.parquet"), artifact.json("quality.json")
        row = {
            "alive": int((used.density > 0).sum()),
            "mean_density": used.density.mean(),
            "mean_max": used["max"].mean(),
        }
        facts = {"r2": quality["r2"], "dead_share": quality["dead_share"]}
        rows.append({"family": v.family, "method": v.method, "layer": quality["layer"], **row, **facts})
    table = pd.DataFrame(rows)
    for name in ("alive", "mean_density", "mean_max"):
        base = table[table.method == "base"].set_index("family")[name]
        table[f"delta_{name}"] = table[name] - table.family.map(base)
    return table


def crosscoders(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every latent of every crosscoder on the measured pairs, and each crosscoder's quality.

    (family, method, the columns of ``dictionaries.classify``, rows), (family, method, those of
    ``dictionaries.evaluate``).
    method also holds the nulls: self, seeds, random.
    """
    from alignlens import dictionaries

    tables, qualities = [], []
    for family in study.families:
        layer = study.crosscoder_layer(family)
        for name, first, second in study.comparisons(family):
            found = features.read_dictionary(study.crosscoder(first, second), [layer])
            streams = {"base": study.tokens(first).at(layer), "aligned": study.tokens(second).at(layer)}
            facts = {"family": family, "method": name, "layer": layer, "rows": len(streams["base"])}
            tables.append(dictionaries.classify(found, streams).assign(**facts))
            qualities.append({**facts, **dictionaries.evaluate(found, streams)})
    return pd.concat(tables, ignore_index=True), pd.DataFrame(qualities)


def label_shares(latents: pd.DataFrame) -> pd.DataFrame:
    """Share of live latents under each label: family, method, label, share, count, and dead, the share of all
    latents.
    """
    from alignlens import dictionaries

    out = []
    for (family, method), table in latents.groupby(["family", "method"], sort=False):
        live = table[table.label != "dead"]
        for name in dictionaries.LABELS[1:]:
            count = int((live.label == name).sum())
            row = {
                "family": family,
                "method": method,
                "label": name,
                "share": count / max(len(live), 1),
                "count": count,
            }
            out.append(row | {"dead": 1 - len(live) / len(table)})
    return pd.DataFrame(out)


def label_sensitivity(latents: pd.DataFrame) -> pd.DataFrame:
    """How label shares move with one cut-off at a time: cut, value, family, method, label, share of live latents."""
    from alignlens import dictionaries

    grids = {
        "exclusive": (0.05, 0.1, 0.15, 0.2, 0.3),
        "rotated": (5, 10, 20, 30, 45, 60),
        "attenuated": (0.5, 0.67, 0.8, 0.9, 0.95),
        "scaling": (0.1, 0.25, 0.5, 0.75, 1.0),
    }
    out = []
    for cut, values in grids.items():
        for value in values:
            cuts = dataclasses.replace(dictionaries.CUTS, **{cut: value})
            for (family, method), table in latents.groupby(["family", "method"], sort=False):
                labels = dictionaries.label(table, int(table.rows.iloc[0]), cuts)
                share = pd.Series(labels[labels != "dead"]).value_counts(normalize=True)
                row = {"cut": cut, "value": value, "family": family, "method": method}
                out += [row | {"label": n, "share": float(share.get(n, 0.0))} for n in dictionaries.LABELS[1:]]
    return pd.DataFrame(out)


def published_classes(study: Study) -> pd.DataFrame:
    """Classes of the published crosscoder, by its adaptive and by its fixed thresholds, nulls included.

    family, method, thresholds, class, share (of all latents, as published), sharing (feature sharing ratio), fve, r2,
    dead_published, dead_share.
    """
    from alignlens.published import sparc

    out = []
    for family in study.families:
        for name, first, second in study.comparisons(family):
            artifact = study.published_crosscoder(first, second)
            table, facts = artifact.table("classes.parquet"), artifact.json("facts.json")
            quality = facts["quality"]
            for kind in ("adaptive", "fixed"):
                labels = table.label if kind == "adaptive" else sparc.labels(table, sparc.FIXED)
                share = pd.Series(labels).value_counts(normalize=True)
                row = {
                    "family": family, "method": name, "thresholds": kind,
                    "sharing": sparc.feature_sharing_ratio(table.assign(label=labels))["single_layer"],
                    "fve": quality["fve_published"], "r2": quality["r2"],
                    "dead_published": quality["dead_published"], "dead_share": quality["dead_share"],
                }  # fmt: skip
                out += [row | {"class": n, "share": float(share.get(n, 0.0))} for n in sparc.CLASSES]
    return pd.DataFrame(out)


def published_extras(study: Study) -> pd.DataFrame:
    """The published superposition test and shared map beside their corrected forms: family, method, test, measure,
    value.
    """
    out = []
    for family in study.families:
        for name, first, second in study.comparisons(family):
            artifact = study.published_crosscoder(first, second)
            for kind in ("published", "corrected"):
                lasso = artifact.table(f"lasso_{kind}.parquet")
                row = {"family": family, "method": name, "test": f"superposition, {kind}"}
                out.append(row | {"measure": "latents tested", "value": len(lasso)})
                if len(lasso):
                    out.append(row | {"measure": "superposed share", "value": float(lasso.superposed.mean())})
                    out.append(row | {"measure": "non-zeros (mean)", "value": float(lasso.non_zeros.mean())})
                geometry = artifact.table(f"geometry_{kind}.parquet")
                row["test"] = f"shared map, {kind}"
                geometry = geometry[geometry.label == "all_shared"].dropna()
                if len(geometry):
                    numbers = geometry.drop(columns="layer").select_dtypes("number").iloc[0]
                    out += [row | {"measure": m, "value": float(v)} for m, v in numbers.items()]
    return pd.DataFrame(out)


def window_latents(study: Study) -> pd.DataFrame:
    """The multi-layer crosscoder by layer: family, method, latent, label, layer, norm_base, norm_aligned, theta,
    density.
    """
    from alignlens import dictionaries

    out = []
    for family in study.families:
        name, first, second = min(study.comparisons(family), key=lambda c: c[0] != "dpo")
        layers = study.dictionary_layers(family)
        found = features.read_dictionary(study.crosscoder(*features.windowed(study, family)), layers)
        streams = {n: study.tokens(v).streams for n, v in zip(dictionaries.STREAMS, (first, second), strict=True)}
        labels = dictionaries.classify(found, streams)
        rows = {n: r.astype(float) for n, r in found.rows().items()}
        norms = {n: np.linalg.norm(r, axis=-1) for n, r in rows.items()}
        theta = (rows["base"] * rows["aligned"]).sum(-1) / np.maximum(norms["base"] * norms["aligned"], 1e-12)
        for i, layer in enumerate(layers):
            part = labels[["latent", "label", "density"]].assign(family=family, method=name, layer=layer)
            out.append(
                part.assign(norm_base=norms["base"][:, i], norm_aligned=norms["aligned"][:, i], theta=theta[:, i])
            )
    return pd.concat(out, ignore_index=True)


def top_latents(study: Study, family: str, *, count: int = 8) -> pd.DataFrame:
    """The live latents of the base with the largest preference effect at the middle layer, with their examples.

    latent, effect, density, name (the factor it tells, if any), example: strongest tokens in brackets, one prompt each.
    """
    base, layer = Variant(family, "base"), study.crosscoder_layer(family)
    used = study.latents(base).table("usage.parquet").query("layer == @layer")
    error = ((used.effect_high - used.effect_low) / 3.92).clip(lower=1e-9)
    best = used.assign(strength=used.effect.abs() / error).query("density > 1e-3").nlargest(count, "strength")
    reader = latent_reader(study, base, layer)
    names = reader.names
    rows = []
    for row in best.itertuples():
        shown = reader.examples(row.latent)
        texts = [t for band, t in zip(shown.band, shown.text, strict=True) if band == 0]
        facts = {"family": family, "layer": layer, "latent": row.latent, "name": names.get(row.latent, "")}
        numbers = {"effect": row.effect, "effect_low": row.effect_low, "effect_high": row.effect_high}
        rows.append({**facts, **numbers, "density": row.density, "examples": " · ".join(texts)})
    return pd.DataFrame(rows)


@dataclasses.dataclass
class LatentReader:
    """One model read by its family's pooled dictionary at one layer, for looking at single latents."""

    codes: object  # sparse [tokens, latents]
    tokens: object
    tokenizer: object
    names: dict[int, str]  # latent -> planted factor that it tells

    def examples(self, latent: int, *, before: int = 8, after: int = 3, **options) -> pd.DataFrame:
        """``latents.examples`` with text: the response around each token, the token itself in brackets."""
        from alignlens.dictionaries import latents

        table = latents.examples(self.codes, self.tokens, latent, **options)
        return table.assign(text=[self._around(i, before, after) for i in table["index"]])

    def _around(self, index: int, before: int, after: int) -> str:
        first, last, words = *self.response(index), self.tokenizer
        ids = self.tokens.token_id
        left = words.decode(ids[max(first, index - before) : index])
        right = words.decode(ids[index + 1 : min(last, index + 1 + after)])
        return f"{left}[{words.decode(ids[index : index + 1])}]{right}"

    def response(self, index: int) -> tuple[int, int]:
        """Bounds, in the tokens, of the response that a token stands in."""
        first = index - int(self.tokens.place[index])
        last = first + 1
        while last < len(self.tokens.place) and self.tokens.place[last] > 0:
            last += 1
        return first, last


def latent_reader(study: Study, variant: Variant, layer: int) -> LatentReader:
    """See ``LatentReader``."""
    found = features.read_dictionary(study.sae(variant.family, layer), [layer])
    tokens = study.tokens(variant)
    names = {}
    if study.tiny_world:
        told = named_latents(*factors(study))
        told = told[(told.family == variant.family) & (told.layer == layer)]
        names = dict(zip(told.latent, told.name + told.auroc.map(" ({:.2f})".format), strict=True))
    return LatentReader(
        found.codes({"pooled": tokens.at(layer)}), tokens, study.format(variant.family).tokenizer, names
    )


# Geometry, dose, causes ---


def planted_geometry(study: Study) -> pd.DataFrame:
    """Known changes of each base's own streams at its reference layer, as ``geometry.compare`` reads them.

    family, planted (what was done), true_degrees, true_scale, then rotation_degrees, norm_ratio, procrustes_residual,
    identity_residual, cka, cka_biased. Noise is Gaussian, a share of the streams' total variance.
    """
    from alignlens import geometry
    from alignlens.calibration import nulls

    rows = []
    for family, layer in reference_layers(study).items():
        x = np.concatenate(study.activations(Variant(family, "base")).at(layer))
        noise = np.random.default_rng(0).standard_normal(x.shape) * np.sqrt(x.var(0).sum() / x.shape[1])
        planted = {f"turned by {d}°": (nulls.rotated_copy(x, d), d, 1.0) for d in (5, 20, 45)}
        planted |= {f"scaled × {f:g}": (f * x, 0, f) for f in (0.5, 2.0)}
        planted["turned by 20°, scaled × 0.5"] = (nulls.rotated_copy(x, 20, scale=0.5), 20, 0.5)
        planted |= {f"noise, {share:.0%}": (x + np.sqrt(share) * noise, 0, 1.0) for share in (0.1, 0.5)}
        planted["rows in another order"] = (np.random.default_rng(1).permutation(x), np.nan, np.nan)
        for name, (y, degrees, scale) in planted.items():
            found = geometry.compare(x, y)
            rows.append({"family": family, "planted": name, "true_degrees": degrees, "true_scale": scale} | found)
    return pd.DataFrame(rows).drop(columns="principal_angles")


def geometry_table(study: Study, name: str) -> pd.DataFrame:
    """ "geometry" or "decomposition" of every variant against its base and of the nulls: family, method, seed, layer, …

    method also holds the nulls: "seeds" (two seeds of one method), "random" (random directions, seed numbers the draw).
    """
    out = []
    for family in study.families:
        for method, first, second in study.geometry_comparisons(family):
            table = study.geometry(first, second).table(f"{name}.parquet")
            out.append(pd.DataFrame({"family": family, "method": method, "seed": second.seed}, table.index).join(table))
    return pd.concat(out, ignore_index=True)


def clear_parts(parts: pd.DataFrame) -> pd.DataFrame:
    """Add to the decomposition over seeds which parts are more than chance: rotated_clear, attenuated_clear,
    created_clear.

    parts : family, method, layer, ``gap``, ``change`` and ``rotated`` with their 95 % intervals. p-values are normal,
    one-sided for the gap, and controlled at a false discovery rate of 5 % over all layers, variants and nulls of a
    family. A gap alone may be signal that was created, so rotated must exclude 0 as well.
    """
    p = {}
    for name in ("gap", "change"):
        error = ((parts[f"{name}_high"] - parts[f"{name}_low"]) / 3.92).clip(lower=1e-12)
        p[name] = norm.sf(parts[name] / error) if name == "gap" else 2 * norm.sf(parts[name].abs() / error)
    corrected = pd.DataFrame(p, parts.index).groupby(parts.family).transform(lambda p: false_discovery_control(p))
    clear = corrected < 0.05
    return parts.assign(
        rotated_clear=clear.gap & (parts.rotated_low > 0),
        attenuated_clear=clear.change & (parts.change < 0),
        created_clear=clear.change & (parts.change > 0),
    )


def pairs_needed(study: Study, shares=(0.2, 0.4, 0.6, 0.8, 1.0)) -> pd.DataFrame:
    """The decomposition at the reference layer with fewer prompts: how many does it take to see a turned signal?

    One method (dpo, if there) and the nulls of each family: family, method, pairs, then ``geometry.decompose``.
    """
    from alignlens import geometry

    draws = {"folds": study.preset.folds, "bootstrap": study.preset.bootstrap}
    rows = []
    for family, layer in reference_layers(study).items():
        found = {name: pair for name, *pair in study.comparisons(family)}
        shown = min((m for m in found if m in study.methods), key=lambda m: m != "dpo")
        for name in [n for n in (shown, "seeds", "random") if n in found]:
            first, second = map(study.activations, found[name])
            order = pd.factorize(first.prompt_id)[0]
            for share in shares:
                few = order < share * (order.max() + 1)
                sides = (tuple(x[few][:, None] for x in model.at(layer)) for model in (first, second))
                table = geometry.decompose(*sides, first.prompt_id[few], **draws)
                rows.append(table.assign(family=family, method=name, layer=layer, pairs=int(few.sum())))
    table = pd.concat(rows, ignore_index=True)
    return table[["family", "method", "pairs", *[c for c in table if c not in ("family", "method", "pairs")]]]


DOSE_MEASURES = ("accuracy", "margin", "score", "length", "chosen_shift", "rejected_shift")
DOSE_LAYER_COLUMNS = {
    "decomposition": ("aligned", "change", "gap"),
    "geometry": ("rotation_degrees", "cka", "mean_cosine", "signal_ratio"),
}


def dose_path(study: Study) -> pd.DataFrame:
    """Behaviour, separability and geometry along the way from base to variant, first seeds, at the reference layer.

    One row a variant and share of the way: family, method, seed, share (0: the base, 1: the variant), layer, kl (dose,
    nats a response), then each measure with its ``_low`` and ``_high``. Between base and variant the weights are
    interpolated, so the path is a straight line in weights, not the path that training took.
    """
    layers, draws = reference_layers(study), {"bootstrap": study.preset.bootstrap}
    out = []
    for variant in study.first_seeds(base=False):
        base = Variant(variant.family, "base")
        made, whole = study.dose(variant), study.geometry(base, variant)
        before, layer = study.behavior(base), layers[variant.family]
        tables = {name: made.table(f"{name}.parquet") for name in ("behavior", *DOSE_LAYER_COLUMNS)}
        for share in (0.0, *study.preset.dose_shares, 1.0):
            row = dataclasses.asdict(variant) | {"share": share, "layer": layer}
            if share in (0, 1):
                said = behavior.compare([before if share == 0 else study.behavior(variant)], before, **draws)
            else:
                said = tables["behavior"][tables["behavior"].share == share]
            behaved = said.set_index("measure")
            for measure in ("kl", *DOSE_MEASURES):
                if measure in behaved.index:
                    row |= _with_interval(behaved.loc[measure], "value", measure)
            for name, columns in DOSE_LAYER_COLUMNS.items():
                table = whole.table(f"{name}.parquet") if share in (0, 1) else tables[name][tables[name].share == share]
                at = table[table.layer == layer].iloc[0]
                for column in columns:
                    row |= _at_base(at, column) if share == 0 else _with_interval(at, column, column)
            out.append(row)
    return pd.DataFrame(out)


def _with_interval(row, column: str, name: str) -> dict[str, float]:
    low, high = ("low", "high") if column == "value" else (f"{column}_low", f"{column}_high")
    return {name: row[column], f"{name}_low": row.get(low, np.nan), f"{name}_high": row.get(high, np.nan)}


def _at_base(row, column: str) -> dict[str, float]:
    """What a measure is for a model that has not moved; its base's own AUROC is known from any comparison."""
    if column == "aligned":
        return _with_interval(row, "base", "aligned")
    still = 1.0 if column in ("cka", "mean_cosine", "signal_ratio") else 0.0
    return {column: still, f"{column}_low": still, f"{column}_high": still}


def matched_dose(path: pd.DataFrame, dose: float) -> pd.DataFrame:
    """Every variant at one dose: measures interpolated along ``dose_path``, linear in KL between neighbouring points.

    Returns family, method, measure, value, low, high, last (value at the whole way) and reached: False where the
    variant ended below the dose; its values are then NaN.
    """
    names = [n for n in path if f"{n}_low" in path and n != "kl"]
    rows = []
    for (family, method), way in path.groupby(["family", "method"], sort=False):
        way = way.sort_values("kl")
        reached = bool(way.kl.max() >= dose)
        for name in names:
            ends = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
            values = {k: np.interp(dose, way.kl, way[c]) if reached else np.nan for k, c in ends.items()}
            last = way[name][way.share == 1].iloc[0]
            rows.append(
                {"family": family, "method": method, "measure": name, **values, "last": last, "reached": reached}
            )
    return pd.DataFrame(rows)


def causal(study: Study) -> pd.DataFrame:
    """Every intervention of every first seed and base: family, method, seed and the columns of ``causal.steer``."""
    return collect(study, lambda v: study.causal(v).table("interventions.parquet"), study.first_seeds())


def steering_summary(table: pd.DataFrame) -> pd.DataFrame:
    """How often each kind of direction earns its name: family, direction, tests (model × strength), beats, right_sign.

    table : ``causal``. beats : tests of the margin in which it beats the random directions (two-sided, so one in twenty
    by chance). right_sign : of these, with the margin moved the way of the push.
    """
    rows = table[(table.intervention == "steer") & (table.kind == "named") & (table.measure == "margin")]
    rows = rows.assign(
        direction=rows.name.where(~rows.name.str.startswith("latent"), "latents"),
        beats=rows.beats.astype(bool),
        right=rows.beats.astype(bool) & (np.sign(rows.value) == np.sign(rows.strength)),
    )
    found = rows.groupby(["family", "direction"], sort=False).agg(
        tests=("beats", "size"), beats=("beats", "sum"), right_sign=("right", "sum"), largest=("value", "max")
    )
    return found.reset_index()


def patching(study: Study) -> pd.DataFrame:
    """Activation patching between base and variant, layer by layer, both ways: family, method, seed, into, layer, …"""
    variants = study.first_seeds(base=False)
    return collect(study, lambda v: study.causal(v).table("patching.parquet"), variants)
