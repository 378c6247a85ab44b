"""Tables over a whole study that several notebooks need. Each function takes a ``study.Study``."""

import dataclasses
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import roc_auc_score

from alignlens import behavior, preferences, probes
from alignlens.core import statistics
from alignlens.preferences import tinyworld
from alignlens.study import Study, Variant
from alignlens.study.measuring import PROTOCOLS


def collect(study: Study, make, variants=None) -> pd.DataFrame:
    """Stack ``make(variant)`` tables over variants, with columns family, method and seed in front."""
    out = []
    for variant in variants or study.variants():
        table = make(variant)
        out.append(pd.DataFrame(dataclasses.asdict(variant), table.index).join(table))
    return pd.concat(out, ignore_index=True)


def trained(study: Study) -> list[Variant]:
    """The variants that this study trained itself: those of ready checkpoints have no curves."""
    return [v for v in study.variants(base=False) if not study.checkpoint(v.family, v.method)]


def doses(study: Study) -> pd.DataFrame:
    """How far each trained variant went: family, method, seed, steps, dose, dose_se (nats), stopped_by."""
    names = ("steps", "dose", "dose_se", "stopped_by")
    rows = [{**dataclasses.asdict(v), **{n: study.variant(v).extra[n] for n in names}} for v in trained(study)]
    return pd.DataFrame(rows, columns=["family", "method", "seed", *names])


def behaviour(study: Study) -> pd.DataFrame:
    """Behaviour of each variant over its seeds, against its base: family, method, measure, value, low, high."""
    out = []
    for family, method in product(study.families, ["base", *study.methods]):
        tables = [study.behavior(Variant(family, method, seed)) for seed in study.seeds_of(family, method)]
        base = study.behavior(Variant(family, "base"))
        table = behavior.compare(tables, base, bootstrap=study.preset.bootstrap)
        out.append(table.assign(family=family, method=method))
    return pd.concat(out, ignore_index=True)


# measure that each method optimises, and its value when nothing happened
OBJECTIVES = dict.fromkeys(("dpo", "simpo", "orpo", "kto", "shuffled"), ("accuracy", 0.5)) | {
    "sft": ("chosen_shift", 0.0), "ppo": ("reward_gain", 0.0), "grpo": ("reward_gain", 0.0),
}  # fmt: skip


def objectives(behaviour: pd.DataFrame) -> pd.DataFrame:
    """Whether each method moved what it optimises on held-out pairs: "moved", "no change" or "moved back".

    A verdict needs a 95 % interval (``low``, ``high`` of ``behaviour``) that excludes the value of no change."""
    rows = []
    for (family, method), table in behaviour.groupby(["family", "method"], sort=False):
        name, neutral = OBJECTIVES.get(method, (None, None))
        if name == "reward_gain" and name not in set(table.measure):  # judged by the reward model itself
            name, neutral = "win_rate", 0.5
        found = table[table.measure == name]
        if found.empty:
            continue
        value, low, high = found.iloc[0][["value", "low", "high"]].astype(float)
        moved = "moved" if low > neutral else "moved back" if high < neutral else "no change"
        verdict = f"{moved}: {name} {value:.2f} [{low:.2f}, {high:.2f}]"
        row = {"family": family, "method": method, "objective": name, "value": value, "low": low, "high": high}
        rows.append(row | {"moved": moved, "verdict": verdict})
    return pd.DataFrame(rows)


def probe_table(study: Study, name: str, *, base: bool = True) -> pd.DataFrame:
    """One probe table of all models ("grouped", "published", "transfer"), with family, method, seed."""
    return collect(study, lambda v: study.probes(v).table(f"{name}.parquet"), study.variants(base=base))


def reference_layers(study: Study) -> dict[str, int]:
    """The layer at which all models of a family are shown side by side: where the base's grouped AUROC is highest."""
    grouped = {f: study.probes(Variant(f, "base")).table("grouped.parquet") for f in study.families}
    return {family: _best(table) for family, table in grouped.items()}


def _best(table: pd.DataFrame) -> int:
    return int(table.layer[table.auroc.idxmax()])


def best_layers(study: Study) -> pd.DataFrame:
    """The published study's table, done twice: best layer and AUROC as published, and without choosing on the test.

    auroc_published : highest over layers under the published protocol. layer : highest grouped AUROC.
    auroc_grouped : that maximum, chosen on the rows that report it. auroc_honest : layer chosen on one half of the
    prompts, AUROC on the other half, averaged over both ways. layer0_* : the same after the first block."""
    rows = []
    for variant in study.variants():
        artifact = study.probes(variant)
        grouped, published = (artifact.table(f"{name}.parquet") for name in PROTOCOLS)
        row = {
            "layer_published": _best(published), "auroc_published": published.auroc.max(), "layer": _best(grouped),
            "auroc_grouped": grouped.auroc.max(), "auroc_honest": _honest(study, variant),
            "layer0_published": published.auroc.iloc[0], "layer0_grouped": grouped.auroc.iloc[0],
        }  # fmt: skip
        rows.append(dataclasses.asdict(variant) | row)
    return pd.DataFrame(rows)


def _honest(study: Study, variant: Variant) -> float:
    """AUROC of the layer that is best on one half of the prompts, on the other half; mean of both ways."""
    arrays = study.probes(variant).arrays("scores.safetensors")
    scores, labels, pair = (arrays[f"grouped.{n}"] for n in ("scores", "labels", "pair_ids"))
    half = np.unique(study.activations(variant).prompt_id[pair], return_inverse=True)[1] % 2
    auroc = [[roc_auc_score(labels[half == h], layer[half == h]) for layer in scores] for h in (0, 1)]
    return float(np.mean([other[np.argmax(one)] for one, other in (auroc, auroc[::-1])]))


def changes(transfer: pd.DataFrame) -> pd.DataFrame:
    """Change of separability against the base, one row a variant: the largest one, and how many layers show one.

    transfer : over seeds, with ``difference`` and its 95 % interval by family, method, layer.
    ``after_correction`` controls the false discovery rate at 5 % over all layers and variants of a family."""
    key, low, high = ["family", "method"], transfer.difference_low, transfer.difference_high
    clear = statistics.corrected(statistics.p_value(transfer.difference, low, high), by=transfer.family) < 0.05
    counts = {"layers_with_change": (low > 0) | (high < 0), "after_correction": clear}
    names = {"difference": "largest_change", "difference_low": "low", "difference_high": "high", "layer": "at_layer"}
    by = transfer.assign(**counts, size=transfer.difference.abs()).groupby(key, sort=False)
    top = transfer.loc[by["size"].idxmax()].rename(columns=names)[[*key, *names.values()]]
    return top.join(by[[*counts]].sum(), on=key).reset_index(drop=True)


def baselines(study: Study) -> pd.DataFrame:
    """Grouped probes of the base next to what needs no depth: length, bag of tokens, the base's log-probability margin.

    family, baseline, auroc, auroc_low, auroc_high, accuracy; "layer 0" and "best layer" come last."""
    names, rows = ["auroc", "auroc_low", "auroc_high", "accuracy"], {}
    for family in study.families:
        pairs, base = study.measured(family), Variant(family, "base")
        encoded, said = study.format(family).encode_pairs(pairs), study.behavior(base)
        sides = encoded.chosen_ids, encoded.rejected_ids
        bag = CountVectorizer(analyzer=list, dtype=float).fit([*sides[0], *sides[1]])
        features = {
            "length": [np.array([len(ids) for ids in side], float) for side in sides],
            "bag of tokens": [bag.transform(side) for side in sides],
            "log-probability": [said.chosen_logprob.to_numpy(), said.rejected_logprob.to_numpy()],
        }
        for name, values in features.items():
            rows[family, name] = probes.fit_features(*values, pairs.prompt_id.to_numpy(), **study.draws)[names]
        grouped = study.probes(base).table("grouped.parquet")[names]
        rows |= {(family, "layer 0"): grouped.iloc[0], (family, "best layer"): grouped.loc[grouped.auroc.idxmax()]}
    return pd.DataFrame(rows).T.astype(float).rename_axis(["family", "baseline"]).reset_index()


NOISE_DRAWS = 10  # one draw of few pairs can lie far from 0.5, so a floor is a mean


@cache
def noise_floor(pairs: int, d_model: int, protocol: str) -> float:
    """Mean AUROC of a protocol on ``NOISE_DRAWS`` draws of Gaussian pairs of this shape."""
    draws = [probes.noise_floor(pairs, d_model, protocol=protocol, seed=seed) for seed in range(NOISE_DRAWS)]
    return float(np.mean(draws))


def contrast_sets(study: Study, family: str) -> dict[str, pd.DataFrame]:
    """Three sets of pairs on held-out prompts, for reading one and the same unaligned base.

    "paired" one pair a prompt; "repeated answers" several rejected answers against one chosen, so chosen rows repeat;
    "few pairs" fewer pairs than the model has dimensions. Pairs from a file give the second only if prompts repeat."""
    p, pairs = study.preset, study.measured(family)
    sets = {"paired": pairs.drop_duplicates("prompt_id").reset_index(drop=True)}
    if study.tiny_world:
        options = {"length_bias": p.length_bias, "label_noise": p.label_noise}
        many = preferences.load_pairs(tinyworld.pairs(p.prompts, rejected=4, seed=1, **options))
        many = many[many.prompt.isin(set(study.split("measure").prompt))]
    else:
        many = pairs[pairs.prompt_id.duplicated(keep=False)]
    if many.prompt_id.nunique() >= 2 * p.folds:
        sets["repeated answers"] = many.iloc[: len(pairs)].reset_index(drop=True)
    few = int(min(len(sets["paired"]), max(4 * p.folds, 0.75 * study.width(family))))
    sets["few pairs"] = sets["paired"].iloc[:few].reset_index(drop=True)
    return sets


def contrast(study: Study) -> pd.DataFrame:
    """Each base read on each contrast set under both protocols.

    family, set, protocol, pairs, layer, the columns of ``probes.fit_layers``, ``floor`` (Gaussian noise of that shape)
    and the AUROC of rows whose mirror was in training (``auroc_leaked``) and of the others (``auroc_clean``)."""
    out = []
    for family in study.families:
        for name, pairs in contrast_sets(study, family).items():
            found = study.activations(Variant(family, "base"), name, pairs)
            facts = {"family": family, "set": name, "pairs": len(pairs)}
            for protocol in PROTOCOLS:
                floor = noise_floor(len(pairs), found.chosen.shape[-1], protocol)
                out.append(_with_leaks(study, found, protocol).assign(floor=floor, **facts))
    return pd.concat(out, ignore_index=True)


def _with_leaks(study: Study, found, protocol: str) -> pd.DataFrame:
    """``probes.fit_layers`` of read activations, with the AUROC of leaked and of clean rows a layer."""
    sides = (found.chosen, found.rejected, found.prompt_id)
    table = probes.fit_layers(*sides, protocol=protocol, **study.draws)
    kept = probes.out_of_fold(*sides, protocol=protocol, folds=study.preset.folds)
    leaks = [probes.leak_check(kept.labels, s, kept.fold_ids, kept.pair_ids, bootstrap=0) for s in kept.scores]
    leaked = {name: [leak[name] for leak in leaks] for name in ("auroc_leaked", "auroc_clean")}
    return table.assign(layer=found.layers, protocol=protocol, **leaked)
