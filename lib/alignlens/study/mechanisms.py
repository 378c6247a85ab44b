"""Tables of dictionaries, geometry, dose and causes over a whole study, as several notebooks use them; see ``tables``.

The names of the nulls stand in the column method: "self" (the base with itself), "seeds" (two seeds of one method) and
"random" (adapters of random direction, each as large as a variant's)."""

import dataclasses

import numpy as np
import pandas as pd

from alignlens import behavior, dictionaries, geometry
from alignlens.core.statistics import corrected, p_value
from alignlens.dictionaries import latents
from alignlens.published import sparc
from alignlens.study import Study, Variant, features
from alignlens.study.tables import collect, reference_layers


@dataclasses.dataclass
class LatentReader:
    """One model read by its family's pooled dictionary at one layer, for looking at single latents."""

    codes: object  # sparse [tokens, latents]
    tokens: object
    tokenizer: object

    def examples(self, latent: int) -> pd.DataFrame:
        """``latents.examples`` with text: the response around each token, the token itself in brackets."""
        table = latents.examples(self.codes, self.tokens, latent)
        return table.assign(text=[self._around(i) for i in table["index"]])

    def _around(self, index: int, before: int = 8, after: int = 3) -> str:
        ids, place = self.tokens.token_id, self.tokens.place
        left, right = ids[index - min(before, place[index]) : index], ids[index + 1 : index + 1 + after]
        right = right[: np.append(place[index + 1 :][:after], 0).argmin()]  # the next response begins at place 0
        left, token, right = map(self.tokenizer.decode, (left, ids[index : index + 1], right))
        return f"{left}[{token}]{right}"


def latent_reader(study: Study, variant: Variant, layer: int) -> LatentReader:
    """See ``LatentReader``."""
    found = features.read_dictionary(study.sae(variant.family, layer, 0), [layer])
    tokens = study.tokens(variant)
    return LatentReader(found.codes({"pooled": tokens.at(layer)}), tokens, study.format(variant.family).tokenizer)


def crosscoders(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every latent of every crosscoder on the measured pairs, and each crosscoder's quality.

    (family, method, the columns of ``dictionaries.classify``, rows), (family, method, those of
    ``dictionaries.evaluate``)."""
    tables, qualities = [], []
    for name, first, second in study.comparisons():
        layer = study.crosscoder_layer(first.family)
        found = features.read_dictionary(study.crosscoder(first, second), [layer])
        streams = {"base": study.tokens(first).at(layer), "aligned": study.tokens(second).at(layer)}
        facts = {"family": first.family, "method": name, "layer": layer, "rows": len(streams["base"])}
        tables.append(dictionaries.classify(found, streams).assign(**facts))
        qualities.append({**facts, **dictionaries.evaluate(found, streams)})
    return pd.concat(tables, ignore_index=True), pd.DataFrame(qualities)


def label_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Share of live latents under each label: family, method, label, share, count, and dead, the share of all."""
    out = []
    for (family, method), part in table.groupby(["family", "method"], sort=False):
        counts, live = part.label.value_counts(), int((part.label != "dead").sum())
        for name in dictionaries.LABELS[1:]:
            row = {"family": family, "method": method, "label": name, "share": counts.get(name, 0) / max(live, 1)}
            out.append(row | {"count": counts.get(name, 0), "dead": 1 - live / len(part)})
    return pd.DataFrame(out)


def published_classes(study: Study) -> pd.DataFrame:
    """Classes of the published crosscoder, by its adaptive and by its fixed thresholds, nulls included.

    family, method, thresholds, class, share (of all latents, as published), sharing (feature sharing ratio), fve, r2,
    dead_published, dead_share."""
    out = []
    for name, first, second in study.comparisons():
        artifact = study.published_crosscoder(first, second)
        table, quality = artifact.table("classes.parquet"), artifact.json("facts.json")["quality"]
        facts = {"fve": quality["fve_published"]} | {n: quality[n] for n in ("r2", "dead_published", "dead_share")}
        for kind, labels in (("adaptive", table.label), ("fixed", sparc.labels(table, sparc.FIXED))):
            share = pd.Series(labels).value_counts(normalize=True)
            sharing = sparc.feature_sharing_ratio(table.assign(label=labels))["single_layer"]
            row = {"family": first.family, "method": name, "thresholds": kind, "sharing": sharing, **facts}
            out += [row | {"class": n, "share": float(share.get(n, 0.0))} for n in sparc.CLASSES]
    return pd.DataFrame(out)


def geometry_table(study: Study, name: str) -> pd.DataFrame:
    """ "geometry" or "decomposition" of every variant against its base and of the nulls: family, method, seed, layer, …

    Of the null "random" the seed numbers the draw."""
    out = []
    for method, first, second in study.comparisons(every=True):
        table = study.geometry(first, second).table(f"{name}.parquet")
        facts = {"family": first.family, "method": method, "seed": second.seed}
        out.append(pd.DataFrame(facts, table.index).join(table))
    return pd.concat(out, ignore_index=True)


def clear_parts(parts: pd.DataFrame) -> pd.DataFrame:
    """Add to the decomposition over seeds which parts are more than chance: rotated_, attenuated_, created_clear.

    parts : family, method, layer, ``gap``, ``change`` and ``rotated`` with their 95 % intervals. p-values are normal,
    one-sided for the gap, and controlled at a false discovery rate of 5 % over all layers, variants and nulls of a
    family. A gap alone may be signal that was created, so rotated must exclude 0 as well."""
    p = {n: p_value(parts[n], parts[f"{n}_low"], parts[f"{n}_high"], above=n == "gap") for n in ("gap", "change")}
    clear = corrected(pd.DataFrame(p, parts.index), by=parts.family) < 0.05
    return parts.assign(
        rotated_clear=clear.gap & (parts.rotated_low > 0),
        attenuated_clear=clear.change & (parts.change < 0),
        created_clear=clear.change & (parts.change > 0),
    )


def pairs_needed(study: Study, shares=(0.2, 0.4, 0.6, 0.8, 1.0)) -> pd.DataFrame:
    """The decomposition at the reference layer with fewer prompts: how many does it take to see a turned signal?

    One method (dpo, if there) and the nulls of each family: family, method, pairs, then ``geometry.decompose``."""
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
                table = geometry.decompose(*sides, first.prompt_id[few], **study.draws).assign(layer=layer)
                facts = {"family": family, "method": name, "pairs": int(few.sum())}
                rows.append(pd.DataFrame(facts, table.index).join(table))
    return pd.concat(rows, ignore_index=True)


DOSE_MEASURES = ("kl", "accuracy", "margin", "score", "length", "chosen_shift", "rejected_shift")
# Of each table the columns that are followed, and what they are for a model that has not moved.
UNMOVED = {
    "decomposition": {"aligned": None, "change": 0.0, "gap": 0.0},
    "geometry": {"rotation_degrees": 0.0, "cka": 1.0, "mean_cosine": 1.0, "signal_ratio": 1.0},
}


def dose_path(study: Study) -> pd.DataFrame:
    """Behaviour, separability and geometry along the way from base to variant, first seeds, at the reference layer.

    One row a variant and share of the way: family, method, seed, share (0: the base, 1: the variant), layer, kl (dose,
    nats a response), then each measure with its ``_low`` and ``_high``. Between base and variant the weights are
    interpolated, so the path is a straight line in weights, not the path that training took."""
    layers, out = reference_layers(study), []
    for variant in study.first_seeds(base=False):
        made, whole = study.dose(variant), study.geometry(variant.base, variant)
        before, layer = study.behavior(variant.base), layers[variant.family]
        ends = {0.0: before, 1.0: study.behavior(variant)}
        for share in (0.0, *study.preset.dose_shares, 1.0):
            row = dataclasses.asdict(variant) | {"share": share, "layer": layer}
            if share in ends:
                said = behavior.compare([ends[share]], before, bootstrap=study.preset.bootstrap)
            else:
                said = made.table("behavior.parquet").query("share == @share")
            said = said.set_index("measure")
            for measure, found in said.loc[[m for m in DOSE_MEASURES if m in said.index]].iterrows():
                row |= {measure: found.value, f"{measure}_low": found.low, f"{measure}_high": found.high}
            for name, columns in UNMOVED.items():
                table = (whole if share in ends else made).table(f"{name}.parquet")
                table = table if share in ends else table.query("share == @share")
                row |= _at_layer(table[table.layer == layer].iloc[0], columns, still=share == 0)
            out.append(row)
    return pd.DataFrame(out)


def _at_layer(at: pd.Series, columns: dict, *, still: bool) -> dict[str, float]:
    """The followed columns with their intervals; of a model that has not moved, what they are by definition."""
    row = {}
    for column, unmoved in columns.items():
        source = "base" if still and unmoved is None else column  # base's own AUROC is known from any comparison
        for end in ("", "_low", "_high"):
            row[column + end] = unmoved if still and unmoved is not None else at.get(source + end, np.nan)
    return row


def matched_dose(path: pd.DataFrame, dose: float) -> pd.DataFrame:
    """Every variant at one dose: measures interpolated along ``dose_path``, linear in KL between neighbouring points.

    Returns family, method, measure, value, low, high, last (value at the whole way) and reached: False where the
    variant ended below the dose; its values are then NaN."""
    names, rows = [n for n in path if f"{n}_low" in path and n != "kl"], []
    for (family, method), way in path.groupby(["family", "method"], sort=False):
        way = way.sort_values("kl")
        reached = bool(way.kl.max() >= dose)
        for name in names:
            ends = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
            values = {k: np.interp(dose, way.kl, way[c]) if reached else np.nan for k, c in ends.items()}
            values |= {"last": way[name][way.share == 1].iloc[0], "reached": reached}
            rows.append({"family": family, "method": method, "measure": name, **values})
    return pd.DataFrame(rows)


def causal(study: Study) -> pd.DataFrame:
    """Every intervention of every first seed and base: family, method, seed and the columns of ``causal.steer``."""
    return collect(study, lambda v: study.causal(v).table("interventions.parquet"), study.first_seeds())
