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

from . import behavior, preferences, probes, tinyworld
from .study import Study, Variant

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


def held_out_probabilities(study: Study, protocol: str = "grouped") -> pd.DataFrame:
    """Out-of-fold probability of each (chosen - rejected) at the reference layer, first seed of each method."""
    layers = reference_layers(study)

    def make(variant):
        artifact = study.probes(variant)
        arrays = artifact.arrays("scores.safetensors")
        at = list(artifact.table("grouped.parquet").layer).index(layers[variant.family])
        right = arrays[f"{protocol}.labels"] == 1
        return pd.DataFrame({"probability": 1 / (1 + np.exp(-arrays[f"{protocol}.scores"][at][right]))})

    return collect(study, make, study.first_seeds())


def roc(study: Study, protocol: str = "grouped") -> tuple[pd.DataFrame, pd.DataFrame]:
    """ROC curves at the reference layer, first seed: (family, method, false_positive, true_positive), (…, auroc)."""
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
        return pd.DataFrame({"false_positive": false_positive, "true_positive": true_positive})

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
        return table.sample(frac=1, random_state=0)  # or the side drawn last would hide the other

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


# --- dictionaries -----------------------------------------------------------------------------------------------------

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


# --- geometry, dose and causes ----------------------------------------------------------------------------------------


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

    parts : family, method, layer, ``gap`` and ``change`` with their 95 % intervals. p-values are normal, one-sided for
    the gap, and controlled at a false discovery rate of 5 % over all layers, variants and nulls of a family.
    """
    p = {}
    for name in ("gap", "change"):
        error = ((parts[f"{name}_high"] - parts[f"{name}_low"]) / 3.92).clip(lower=1e-12)
        p[name] = norm.sf(parts[name] / error) if name == "gap" else 2 * norm.sf(parts[name].abs() / error)
    corrected = pd.DataFrame(p, parts.index).groupby(parts.family).transform(lambda p: false_discovery_control(p))
    clear = corrected < 0.05
    return parts.assign(
        rotated_clear=clear.gap & (parts.gap > 0),
        attenuated_clear=clear.change & (parts.change < 0),
        created_clear=clear.change & (parts.change > 0),
    )


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
            partial = tables["behavior"][tables["behavior"].share == share].drop(columns="share")
            said = before if share == 0 else study.behavior(variant) if share == 1 else partial
            behaved = behavior.compare([said], before, **draws).set_index("measure")
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


# --- the published study --------------------------------------------------------------------------------------------


def figure_index() -> pd.DataFrame:
    """Every figure and table of the published study and where its counterpart stands: item, published, ours, note."""
    from . import presets

    return pd.read_csv(presets.home() / "data" / "published" / "figures.csv").fillna("")
