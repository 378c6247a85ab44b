"""Tables of dictionaries over a whole study; see ``tables``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from .study import Study, Variant
from .tables import collect

NULLS = ("self", "seeds", "random")


def calibration(study: Study) -> pd.DataFrame:
    """Scores of every calibration run: kind, recall, false_discovery and more, by regime, instrument, samples, seed."""
    return pd.concat(
        [study.calibration(*words).table("score.parquet") for words in study.calibrations()], ignore_index=True
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
            found = study.read_dictionary(study.sae(family, layer), [layer])
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
    from . import dictionaries

    out = []
    for family in study.families:
        layer = study.crosscoder_layer(family)
        first, second = (study.read_dictionary(study.sae(family, layer, seed), [layer]) for seed in (0, 1))
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
    from . import dictionaries

    tables, qualities = [], []
    for family in study.families:
        layer = study.crosscoder_layer(family)
        for name, first, second in study.comparisons(family):
            found = study.read_dictionary(study.crosscoder(first, second), [layer])
            streams = {"base": study.tokens(first).at(layer), "aligned": study.tokens(second).at(layer)}
            facts = {"family": family, "method": name, "layer": layer, "rows": len(streams["base"])}
            tables.append(dictionaries.classify(found, streams).assign(**facts))
            qualities.append({**facts, **dictionaries.evaluate(found, streams)})
    return pd.concat(tables, ignore_index=True), pd.DataFrame(qualities)


def label_shares(latents: pd.DataFrame) -> pd.DataFrame:
    """Share of live latents under each label: family, method, label, share, count, and dead, the share of all
    latents.
    """
    from . import dictionaries

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
    from . import dictionaries

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
    from . import sparc

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
    from . import dictionaries

    out = []
    for family in study.families:
        name, first, second = min(study.comparisons(family), key=lambda c: c[0] != "dpo")
        layers = study.dictionary_layers(family)
        found = study.read_dictionary(study.window(family), layers)
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
        from . import latents

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
    found = study.read_dictionary(study.sae(variant.family, layer), [layer])
    tokens = study.tokens(variant)
    names = {}
    if study.tiny_world:
        told = named_latents(*factors(study))
        told = told[(told.family == variant.family) & (told.layer == layer)]
        names = dict(zip(told.latent, told.name + told.auroc.map(" ({:.2f})".format), strict=True))
    return LatentReader(
        found.codes({"pooled": tokens.at(layer)}), tokens, study.format(variant.family).tokenizer, names
    )
