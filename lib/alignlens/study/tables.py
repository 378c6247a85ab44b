"""Tables over a whole study: what figures draw and readers download. Each function takes a ``study.Study``."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, norm
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve

from alignlens import behavior, preferences, probes
from alignlens.preferences import tinyworld
from alignlens.study import Study, Variant

PROTOCOLS = ("grouped", "published")


def collect(study: Study, make, variants=None) -> pd.DataFrame:
    """Stack ``make(variant)`` tables over variants, with columns family, method and seed in front."""
    out = []
    for variant in variants or study.variants():
        table = make(variant)
        for i, name in enumerate(("family", "method", "seed")):
            table.insert(i, name, getattr(variant, name))
        out.append(table)
    return pd.concat(out, ignore_index=True)


# --- pairs ------------------------------------------------------------------------------------------------------------


def splits(study: Study) -> pd.DataFrame:
    """Pairs, prompts and mean characters of each split."""
    pairs = study.pairs.assign(chosen=study.pairs.chosen.str.len(), rejected=study.pairs.rejected.str.len())
    table = pairs.groupby("split").agg(
        pairs=("prompt_id", "size"),
        prompts=("prompt_id", "nunique"),
        chosen_characters=("chosen", "mean"),
        rejected_characters=("rejected", "mean"),
    )
    return table.loc[list(preferences.SPLITS)].round(1).reset_index()


def answer_lengths(study: Study, family: str) -> pd.DataFrame:
    """Tokens of every measured answer: side, tokens."""
    encoded = study.format(family).encode_pairs(study.measured(family))
    sides = {"chosen": encoded.chosen_ids, "rejected": encoded.rejected_ids}
    return pd.concat([pd.DataFrame({"side": s, "tokens": [len(r) for r in ids]}) for s, ids in sides.items()])


def factor_shares(study: Study) -> pd.DataFrame | None:
    """Share of pairs in which each planted factor favours the chosen answer; None outside the tiny world."""
    if not study.tiny_world:
        return None
    rows = []
    for factor, weight in tinyworld.UTILITY.items():
        gain = np.sign(weight) * np.sign(study.pairs[f"chosen_{factor}"] - study.pairs[f"rejected_{factor}"])
        rows.append(
            {"factor": factor, "chosen": (gain > 0).mean(), "tie": (gain == 0).mean(), "rejected": (gain < 0).mean()}
        )
    return pd.DataFrame(rows)


# --- bases ------------------------------------------------------------------------------------------------------------


def bases(study: Study) -> pd.DataFrame:
    """The tiny bases and what they say on held-out prompts: family, parameters, tokens, steps, loss, minutes, then
    shares of samples that are well formed, on topic and correct. Empty outside the tiny world."""
    rows = []
    for family in study.families:
        if not (study.tiny_world and study.preset.families[family].startswith("tiny:")):
            continue
        artifact = study.base(family)
        said = study.behavior(Variant(family, "base"))[["fluent", "on_topic", "correct"]].mean()
        facts = {n: artifact.extra[n] for n in ("parameters", "tokens", "steps", "loss")}
        minutes = artifact.manifest["wall_seconds"] / 60
        rows.append({"family": family, **facts, "minutes": minutes, **said.to_dict()})
    return pd.DataFrame(rows)


def pretraining(study: Study) -> pd.DataFrame:
    """Pretraining curves of the tiny bases: family, step, loss (nats a token)."""
    tiny = [f for f in study.families if study.preset.families[f].startswith("tiny:")]
    found = {f: pd.DataFrame(study.base(f).extra["curve"], columns=["step", "loss"]) for f in tiny}
    return pd.concat([t.assign(family=f) for f, t in found.items()]) if found else pd.DataFrame()


# --- alignment and behaviour ------------------------------------------------------------------------------------------


def _trained(study: Study) -> list[Variant]:
    return [v for v in study.variants(base=False) if not study.checkpoint(v.family, v.method)]


def curves(study: Study) -> pd.DataFrame:
    """Training curves of all trained variants; checkpoints from elsewhere have none (the table is then empty)."""
    trained = _trained(study)
    if not trained:
        return pd.DataFrame(columns=["family", "method", "seed", "step", "kl"])
    return collect(study, lambda v: study.variant(v).table("curves.parquet"), trained)


def doses(study: Study) -> pd.DataFrame:
    """How far each trained variant went: family, method, seed, steps, dose, dose_se (nats), stopped_by."""
    names = ("steps", "dose", "dose_se", "stopped_by")
    rows = [{**dataclasses.asdict(v), **{n: study.variant(v).extra[n] for n in names}} for v in _trained(study)]
    return pd.DataFrame(rows, columns=["family", "method", "seed", *names])


def reward_models(study: Study) -> pd.DataFrame:
    """Held-out accuracy of the reward models that ppo and grpo optimise: family, seed, accuracy, accuracy_se."""
    columns = ["family", "seed", "accuracy", "accuracy_se", "heldout_pairs"]
    if not study.needs_reward_model:
        return pd.DataFrame(columns=columns)
    facts = {(f, s): study.reward_model(f, s).extra for f in study.families for s in study.preset.seeds}
    return pd.DataFrame([{"family": f, "seed": s, **{n: x[n] for n in columns[2:]}} for (f, s), x in facts.items()])


def behaviour(study: Study) -> pd.DataFrame:
    """Behaviour of each variant over its seeds, against its base: family, method, measure, value, low, high."""
    out = []
    for family in study.families:
        base = study.behavior(Variant(family, "base"))
        for method in ["base", *study.methods]:
            tables = [study.behavior(Variant(family, method, s)) for s in study.seeds_of(family, method)]
            table = behavior.compare(tables, base, bootstrap=study.preset.bootstrap)
            out.append(table.assign(family=family, method=method))
    return pd.concat(out, ignore_index=True)


def examples(study: Study, family: str, prompts: int = 3) -> pd.DataFrame:
    """What each variant (first seed) answers to the same held-out prompts, next to the base's answer."""
    pairs = study.measured(family)
    out = {}
    for method in ["base", *study.methods]:
        table = study.behavior(Variant(family, method, study.seeds_of(family, method)[0]))
        rows = table[table.response.notna()].head(prompts)
        out[method] = rows.response.to_numpy()
    return pd.DataFrame(out, index=pairs.prompt.to_numpy()[rows.row]).T


# --- probes -----------------------------------------------------------------------------------------------------------


def probe_table(study: Study, name: str, *, base: bool = True) -> pd.DataFrame:
    """One probe table of all models ("grouped", "published", "transfer"), with family, method, seed."""
    return collect(study, lambda v: study.probes(v).table(f"{name}.parquet"), study.variants(base=base))


def null(study: Study, protocol: str) -> pd.DataFrame:
    """Permuted-sign null of each base under a protocol: family, layer, auroc_mean, auroc_low, auroc_high."""
    bases = [Variant(f, "base") for f in study.families]
    return collect(study, lambda v: study.probes(v).table(f"null_{protocol}.parquet"), bases).assign(protocol=protocol)


NOISE_DRAWS = 10  # one draw of few pairs can lie far from 0.5, so a floor is a mean


@cache
def noise_floor(pairs: int, d_model: int, protocol: str) -> float:
    """Mean AUROC of a protocol on ``NOISE_DRAWS`` draws of Gaussian pairs of this shape."""
    draws = [probes.noise_floor(pairs, d_model, protocol=protocol, seed=seed) for seed in range(NOISE_DRAWS)]
    return float(np.mean(draws))


def floors(study: Study) -> pd.DataFrame:
    """``noise_floor`` of each protocol at the measured shape: family, protocol, pairs, d_model, floor."""
    rows = []
    for family in study.families:
        n, d = len(study.measured(family)), study.width(family)
        for protocol in PROTOCOLS:
            value = noise_floor(n, d, protocol)
            rows.append({"family": family, "protocol": protocol, "pairs": n, "d_model": d, "floor": value})
    return pd.DataFrame(rows)


def reference_layers(study: Study) -> dict[str, int]:
    """The layer at which all models of a family are shown side by side: where the base's grouped AUROC is highest."""
    grouped = {f: study.probes(Variant(f, "base")).table("grouped.parquet") for f in study.families}
    return {family: int(table.layer[table.auroc.idxmax()]) for family, table in grouped.items()}


def best_layers(study: Study) -> pd.DataFrame:
    """The published study's table, done twice: best layer and AUROC as published, and without choosing on the test.

    auroc_published : highest over layers under the published protocol. layer : highest grouped AUROC.
    auroc_grouped : that maximum, chosen on the rows that report it. auroc_honest : layer chosen on one half of the
    prompts, AUROC on the other half, averaged over both ways. layer0_* : the same after the first block.
    """
    rows = []
    for variant in study.variants():
        artifact = study.probes(variant)
        grouped, published = (artifact.table(f"{name}.parquet") for name in PROTOCOLS)
        arrays = artifact.arrays("scores.safetensors")
        scores, labels, pair = (arrays[f"grouped.{n}"] for n in ("scores", "labels", "pair_ids"))
        prompts = study.activations(variant).prompt_id[pair]
        half = np.unique(prompts, return_inverse=True)[1] % 2
        honest = []
        for side in (0, 1):
            choose, test = half == side, half != side
            layer = int(np.argmax([roc_auc_score(labels[choose], s[choose]) for s in scores]))
            honest.append(roc_auc_score(labels[test], scores[layer][test]))
        rows.append(
            {
                **dataclasses.asdict(variant),
                "layer_published": int(published.layer[published.auroc.idxmax()]),
                "auroc_published": published.auroc.max(),
                "layer": int(grouped.layer[grouped.auroc.idxmax()]),
                "auroc_grouped": grouped.auroc.max(),
                "auroc_honest": float(np.mean(honest)),
                "layer0_published": published.auroc.iloc[0],
                "layer0_grouped": grouped.auroc.iloc[0],
            }
        )
    return pd.DataFrame(rows)


def held_out_probabilities(study: Study, protocol: str = "grouped", bins: int = 24) -> pd.DataFrame:
    """Histogram of the out-of-fold probability of (chosen - rejected) at the reference layer, first seeds.

    family, method, seed, low, high (edges of the bin), share of the pairs in it, right (share above 0.5).
    """
    layers, edges = reference_layers(study), np.linspace(0, 1, bins + 1)

    def make(variant):
        artifact = study.probes(variant)
        arrays = artifact.arrays("scores.safetensors")
        at = list(artifact.table("grouped.parquet").layer).index(layers[variant.family])
        scores = arrays[f"{protocol}.scores"][at][arrays[f"{protocol}.labels"] == 1]
        counts = np.histogram(1 / (1 + np.exp(-scores)), edges)[0]
        shares = {"low": edges[:-1], "high": edges[1:], "share": counts / counts.sum()}
        return pd.DataFrame(shares).assign(right=(scores > 0).mean())

    return collect(study, make, study.first_seeds())


def roc(study: Study, protocol: str = "grouped") -> tuple[pd.DataFrame, pd.DataFrame]:
    """ROC curves at the reference layer, first seed, at 101 false-positive rates, and the areas under the whole curves.

    (family, method, seed, false_positive, true_positive), (family, method, seed, layer, auroc).
    """
    layers = reference_layers(study)
    areas = []

    def make(variant):
        artifact = study.probes(variant)
        arrays = artifact.arrays("scores.safetensors")
        at = list(artifact.table("grouped.parquet").layer).index(layers[variant.family])
        labels, scores = arrays[f"{protocol}.labels"], arrays[f"{protocol}.scores"][at]
        false_positive, true_positive, _ = roc_curve(labels, scores)
        areas.append(
            {**dataclasses.asdict(variant), "layer": layers[variant.family], "auroc": roc_auc_score(labels, scores)}
        )
        grid = np.linspace(0, 1, 101)
        return pd.DataFrame({"false_positive": grid, "true_positive": np.interp(grid, false_positive, true_positive)})

    return collect(study, make, study.first_seeds()), pd.DataFrame(areas)


def pca(study: Study) -> pd.DataFrame:
    """First two principal components of raw chosen and rejected states at the reference layer, first seed.

    The labels are not an input of the projection; each model has its own.
    """
    layers = reference_layers(study)

    def make(variant):
        chosen, rejected = study.activations(variant).at(layers[variant.family])
        fitted = PCA(n_components=2, random_state=0)
        points = fitted.fit_transform(np.concatenate([chosen, rejected]).astype(float))
        sides = np.repeat(["chosen", "rejected"], len(chosen))
        ev1, ev2 = fitted.explained_variance_ratio_
        table = pd.DataFrame({"side": sides, "pc1": points[:, 0], "pc2": points[:, 1], "ev1": ev1, "ev2": ev2})
        # In random order, or the side drawn last would hide the other; more points than that only cover each other.
        return table.sample(min(len(table), 150), random_state=0)

    return collect(study, make, study.first_seeds())


def baselines(study: Study) -> pd.DataFrame:
    """Grouped probes of the base next to what needs no depth: length, bag of tokens, the base's log-probability margin.

    family, baseline, auroc, auroc_low, auroc_high, accuracy; "layer 0" and "best layer" come last.
    """
    out = []
    for family in study.families:
        pairs = study.measured(family)
        encoded = study.format(family).encode_pairs(pairs)
        base = study.behavior(Variant(family, "base"))
        size = max(max(ids) for ids in [*encoded.chosen_ids, *encoded.rejected_ids]) + 1
        lengths = [np.array([len(r) for r in side], float) for side in (encoded.chosen_ids, encoded.rejected_ids)]
        features = {
            "length": lengths,
            "bag of tokens": [_bag(side, size) for side in (encoded.chosen_ids, encoded.rejected_ids)],
            "log-probability": [base.chosen_logprob.to_numpy(), base.rejected_logprob.to_numpy()],
        }
        options = {"folds": study.preset.folds, "bootstrap": study.preset.bootstrap}
        found = {n: probes.fit_features(*sides, pairs.prompt_id.to_numpy(), **options) for n, sides in features.items()}
        grouped = study.probes(Variant(family, "base")).table("grouped.parquet")
        found |= {"layer 0": grouped.iloc[0], "best layer": grouped.loc[grouped.auroc.idxmax()]}
        names = ["auroc", "auroc_low", "auroc_high", "accuracy"]
        out += [{"family": family, "baseline": n, **row[names].astype(float)} for n, row in found.items()]
    return pd.DataFrame(out)


def _bag(rows: list[list[int]], size: int) -> csr_array:
    starts = np.cumsum([0, *map(len, rows)])
    return csr_array((np.ones(starts[-1]), np.concatenate(rows), starts), shape=(len(rows), size))


# --- one base, several sets of pairs ----------------------------------------------------------------------------------


def contrast_sets(study: Study, family: str) -> dict[str, pd.DataFrame]:
    """Three sets of pairs on held-out prompts, for reading one and the same unaligned base.

    "paired" one pair a prompt; "repeated answers" several rejected answers against one chosen, so chosen rows repeat;
    "few pairs" fewer pairs than the model has dimensions. Pairs from a file give the second only if prompts repeat.
    """
    p = study.preset
    pairs = study.measured(family)
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
    and the AUROC of rows whose mirror was in training (``auroc_leaked``) and of the others (``auroc_clean``).
    """
    options = {"folds": study.preset.folds}
    out = []
    for family in study.families:
        for name, pairs in contrast_sets(study, family).items():
            found = study.read(Variant(family, "base"), pairs, name)
            sides = (found.chosen, found.rejected, found.prompt_id)
            for protocol in PROTOCOLS:
                table = probes.fit_layers(*sides, protocol=protocol, bootstrap=study.preset.bootstrap, **options)
                kept = probes.out_of_fold(*sides, protocol=protocol, **options)
                leaks = [
                    probes.leak_check(kept.labels, scores, kept.fold_ids, kept.pair_ids, bootstrap=0)
                    for scores in kept.scores
                ]
                out.append(
                    table.assign(
                        layer=found.layers,
                        auroc_leaked=[leak["auroc_leaked"] for leak in leaks],
                        auroc_clean=[leak["auroc_clean"] for leak in leaks],
                        floor=noise_floor(len(pairs), found.chosen.shape[-1], protocol),
                        family=family,
                        set=name,
                        protocol=protocol,
                        pairs=len(pairs),
                    )
                )
    return pd.concat(out, ignore_index=True)


# --- verdicts by rule -------------------------------------------------------------------------------------------------

# measure that each method optimises, and its value when nothing happened
OBJECTIVES = {
    "dpo": ("accuracy", 0.5),
    "simpo": ("accuracy", 0.5),
    "orpo": ("accuracy", 0.5),
    "kto": ("accuracy", 0.5),
    "shuffled": ("accuracy", 0.5),
    "sft": ("chosen_shift", 0.0),
    "ppo": ("reward_gain", 0.0),
    "grpo": ("reward_gain", 0.0),
}


def objectives(behaviour: pd.DataFrame) -> pd.DataFrame:
    """Whether each method moved what it optimises on held-out pairs: "moved", "no change" or "moved back".

    A verdict needs a 95 % interval (``low``, ``high`` of ``behaviour``) that excludes the value of no change.
    """
    rows = []
    for (family, method), table in behaviour.groupby(["family", "method"], sort=False):
        name, neutral = OBJECTIVES.get(method, (None, None))
        found = table[table.measure == name]
        if found.empty and name == "reward_gain":  # judged by the reward model itself
            name, neutral, found = "win_rate", 0.5, table[table.measure == "win_rate"]
        if found.empty:
            continue
        value, low, high = found.iloc[0][["value", "low", "high"]].astype(float)
        moved = "moved" if low > neutral else "moved back" if high < neutral else "no change"
        rows.append(
            {
                "family": family,
                "method": method,
                "objective": name,
                "value": value,
                "low": low,
                "high": high,
                "moved": moved,
                "verdict": f"{moved}: {name} {value:.2f} [{low:.2f}, {high:.2f}]",
            }
        )
    return pd.DataFrame(rows)


def selectivity(study: Study) -> pd.DataFrame:
    """Accuracy, control accuracy and selectivity of each base at its reference layer, under both protocols."""
    rows = []
    for family, layer in reference_layers(study).items():
        found = study.activations(Variant(family, "base"))
        sides = [side[:, None] for side in found.at(layer)]
        for protocol in PROTOCOLS:
            table = probes.selectivity(
                *sides, found.prompt_id, protocol=protocol, folds=study.preset.folds, bootstrap=study.preset.bootstrap
            )
            rows.append({"family": family, "protocol": protocol, **table.iloc[0].to_dict(), "layer": layer})
    return pd.DataFrame(rows)


def changes(transfer: pd.DataFrame) -> pd.DataFrame:
    """Change of separability against the base, one row a variant: the largest one, and how many layers show one.

    transfer : over seeds, with ``difference`` and its 95 % interval by family, method, layer. p-values are normal,
    from the interval's width; ``after_correction`` controls the false discovery rate at 5 % over all layers and
    variants of a family (Benjamini and Hochberg).
    """
    error = ((transfer.difference_high - transfer.difference_low) / 3.92).clip(lower=1e-12)
    table = transfer.assign(p=2 * norm.sf(transfer.difference.abs() / error))
    table["p"] = table.groupby("family").p.transform(lambda p: false_discovery_control(p))
    table["raw"] = (table.difference_low > 0) | (table.difference_high < 0)
    rows = []
    for (family, method), found in table.groupby(["family", "method"], sort=False):
        top = found.loc[found.difference.abs().idxmax()]
        rows.append(
            {
                "family": family,
                "method": method,
                "largest_change": top.difference,
                "low": top.difference_low,
                "high": top.difference_high,
                "at_layer": int(top.layer),
                "layers_with_change": int(found.raw.sum()),
                "after_correction": int((found.p < 0.05).sum()),
            }
        )
    return pd.DataFrame(rows)
