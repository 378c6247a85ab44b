"""Tables of geometry, dose and causes over a whole study; see ``tables``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm

from . import behavior
from .study import Study, Variant
from .tables import collect, reference_layers


def planted_geometry(study: Study) -> pd.DataFrame:
    """Known changes of each base's own streams at its reference layer, as ``geometry.compare`` reads them.

    family, planted (what was done), true_degrees, true_scale, then rotation_degrees, norm_ratio, procrustes_residual,
    identity_residual, cka, cka_biased. Noise is Gaussian, a share of the streams' total variance.
    """
    from . import geometry, nulls

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
    from . import geometry

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
