"""Named interventions beside random ones of the same size."""

import numpy as np
import pandas as pd

from alignlens.activations import evaluating
from alignlens.causal.bench import Bench
from alignlens.core.errors import CausalError
from alignlens.core.statistics import by_group, interval, resample

LEAST_RANDOM = 20  # the rank p of fewer draws cannot fall below 0.05
LEVEL = 0.05
COLUMNS = [
    "intervention", "kind", "name", "layer", "strength", "measure", "value", "low", "high", "random_mean",
    "random_low", "random_high", "p", "beats", "change_norm", "stream_norm",
]  # fmt: skip


def compare(
    intervention, plan, model, formatter, pairs, layer, *, random=20, reference=None, sampled=0, judge=None,
    response_tokens=32, batch_size=64, bootstrap=1000, seed=0,
) -> pd.DataFrame:  # fmt: skip
    """Run the interventions of plan(bench) and set the named ones beside the random ones; see ``steer``."""
    if random < LEAST_RANDOM:
        raise CausalError(f"random={random}: at least {LEAST_RANDOM} random directions are needed to tell an effect")
    if judge is not None and not sampled:
        raise CausalError("a judge reads samples: give sampled, the number of prompts to answer")
    bench = Bench(
        model, formatter, pairs, layer, random=random, sampled=sampled, response_tokens=response_tokens,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    chosen, rejected = bench.chosen, bench.rejected
    if reference is not None and np.shape(reference) != chosen.shape:
        raise CausalError(f"reference has shape {np.shape(reference)}: give one margin for each of {len(chosen)} pairs")
    with evaluating(batch_size):
        bench.measure_stream()
        tries = list(plan(bench))
        if all(tried.kind == "random" for tried in tries):
            raise CausalError("nothing to intervene on: give one direction or latent at least")
        logp, divergence, size = bench.score(tries, kl=not bench.prompts)
        sampled_effects = _sampled(bench, tries, judge) if bench.prompts else {"kl": divergence[:, chosen]}
    margin = logp[:, chosen] - logp[:, rejected]
    right = (np.sign(margin - (0 if reference is None else np.asarray(reference))) + 1) / 2
    effects = {"margin": margin[1:] - margin[0], "accuracy": right[1:] - right[0]} | sampled_effects
    facts = pd.DataFrame({name: [getattr(t, name) for t in tries] for name in ("kind", "name", "strength")})
    facts = facts.assign(intervention=intervention, layer=bench.layer, change_norm=size, stream_norm=bench.norm)
    null = pd.factorize(np.array([t.null for t in tries], object))[0]
    tables = []
    for measure, values in effects.items():
        if not np.isfinite(values).all():
            bad = tries[int(np.flatnonzero(~np.isfinite(values).all(1))[0])]
            raise CausalError(
                f"{measure} under {intervention} of {bad.name!r} at strength {bad.strength:g} is not finite: "
                "lower the strength or run in float32"
            )
        of_pairs = measure in ("margin", "accuracy") or not bench.prompts
        groups = bench.prompt_id if of_pairs else np.arange(len(bench.prompts))
        found = _against_random(values, groups, facts.kind, null, bootstrap, seed)
        tables.append(facts.assign(measure=measure, **found))
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def _sampled(bench: Bench, tries, judge) -> dict[str, np.ndarray]:
    """Effects on samples: name -> float64 [tries, prompts]."""

    def read(responses):
        found = {"length": np.array([len(ids) for ids in responses], float)}
        if judge is not None:
            found["reward"] = np.asarray(judge(bench.texts, [bench.formatter.decode(r) for r in responses]), float)
            if (shape := found["reward"].shape) != (len(responses),):
                raise CausalError(f"the judge gave shape {shape} for {len(responses)} responses: one number for each")
        return found

    clean, effects = read(bench.sample()), []
    for tried in tries:
        responses = bench.sample(tried.replace)
        effect = {name: values - clean[name] for name, values in read(responses).items()}
        effects.append({"kl": bench.sampled_kl(responses, tried.replace)} | effect)
    return {name: np.stack([effect[name] for effect in effects]) for name in effects[0]}


def bootstrapped(values: np.ndarray, groups, draws: int, seed: int):
    """Means of float [rows, items] over items, and over draws of their groups: [rows], [draws, rows]."""
    sums, counts = by_group(values.T, groups)
    weights = resample(len(sums), draws, seed)
    return values.mean(1), weights @ sums / (weights @ counts)


def _against_random(values, groups, kind, null, bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    """Columns of one measure from float [tries, items]."""
    value, draws = bootstrapped(values, groups, bootstrap, seed)
    low, high = interval(draws)
    named = (kind == "named").to_numpy()
    found = {name: np.full(len(value), np.nan) for name in ("random_mean", "random_low", "random_high", "p")}
    for i in np.flatnonzero(named):
        other = value[(null == null[i]) & ~named]
        # Any change of this size may do harm: what counts is how far a direction lies from where they all lie.
        centre = np.append(other, value[i]).mean()
        p = (1 + np.sum(np.abs(other - centre) >= np.abs(value[i] - centre))) / (1 + len(other))
        for name, number in zip(found, (other.mean(), *interval(other), p), strict=True):
            found[name][i] = number
    mean = found["random_mean"]
    beats = named & (found["p"] < LEVEL) & ((mean < low) | (mean > high)) & ((low > 0) | (high < 0))
    return {"value": value, "low": low, "high": high, **found, "beats": beats}
