"""Steering along directions, ablating them or a dictionary's latents, beside random directions of the same size."""

import numpy as np
import pandas as pd

from alignlens.activations import evaluating, hook_name
from alignlens.causal.bench import Bench, bootstrapped
from alignlens.core.errors import CausalError
from alignlens.core.statistics import interval
from alignlens.preferences import Formatter

LEAST_RANDOM = 20  # the rank p of fewer draws cannot fall below 0.05
EFFECT = ["value", "low", "high", "random_mean", "random_low", "random_high", "p", "beats"]
COLUMNS = ["intervention", "kind", "name", "layer", "strength", "measure", *EFFECT, "change_norm", "stream_norm"]


def steer(model, formatter: Formatter, pairs, directions: dict, *, layer, strength, **options) -> pd.DataFrame:
    """Add a direction to the stream after a block: x + strength * norm * u.

    Parameters
    ----------
    model : a transformers causal model (a copy is bridged) or its TransformerLens bridge (``activations.bridge``).
    pairs : DataFrame[prompt, chosen, rejected, prompt_id] or ``preferences.Encoded``, none of which the model was
        trained on.
    directions : name -> float [d_model], of any norm.
    layer : block index, negative from the end; the stream after it is changed.
    strength : one or several, of either sign, in units of the stream's norm: the root-mean-square distance of the clean
        stream from its mean at the tokens that are changed. Tokens of more than 10 times the median norm do not count
        for it.

    Options, the same for ``ablate`` and ``ablate_latents``
    -------------------------------------------------------
    random : int, 20 at least; random directions (isotropic Gaussian) that run beside the named ones.
    reference : float [pairs that fit], a reference model's log p(chosen) - log p(rejected); by default 0.
    sampled : samples are drawn for this many prompts, the first ones, with the same random numbers for all.
    judge : (prompts, responses), lists of texts, -> float [prompts]; response_tokens : most tokens of a sample.
    batch_size : changes the speed and the memory, not the result. bootstrap : draws of prompts. seed.

    Returns
    -------
    DataFrame, one row an intervention and measure. intervention, kind (named | random), name, layer, strength, measure;
    value, low, high : the effect with its 95 % bootstrap interval over prompts; change_norm : root-mean-square size of
    the change in units of ``stream_norm``, which is in the stream's own. On named rows also random_mean, random_low,
    random_high : mean and 2.5 and 97.5 percentiles of the random directions' values; p : rank of the effect's distance
    from the mean of all (this direction and the random ones) among theirs, (1 + as far or farther) / (1 + random);
    beats : p < 0.05 and the interval excludes both random_mean and 0. Only what beats may be named. With 20 random
    directions the smallest p is 1/21; p is of one direction, strength and measure: where many are tried, correct for
    that, with more random directions.

    Raises
    ------
    CausalError for directions, strengths or options that do not fit, and for effects that are not finite;
    ActivationError for layers that there are not and sequences that the model cannot hold; PreferenceError if no pair
    can be formatted.
    """
    strengths = np.ravel(np.asarray(strength, float)).tolist()
    if not strengths or not np.isfinite(strengths).all():
        raise CausalError(f"strength={strength!r}: give a finite number or a list of them")

    def plan(bench: Bench):
        rows = [("named", name, unit) for name, unit in bench.check(directions).items()]
        rows += [("random", "random", unit) for unit in bench.random]  # one null: the change is of one size for all
        for value in strengths:
            for kind, name, unit in rows:
                yield kind, name, value, value, lambda x, v=value * bench.norm * unit: x + v

    return _compare("steer", plan, model, formatter, pairs, layer, **options)


def ablate(model, formatter: Formatter, pairs, directions: dict, *, layer, **options) -> pd.DataFrame:
    """Take the variation along a direction out of the stream: x - (x·u - m·u) u (mean ablation).

    m is the mean of the clean stream at the tokens that are changed, those of more than 10 times the median norm left
    out. The random directions r that run beside it get the same change at each token, (m·u - x·u) r: what they would
    have removed of their own is usually much less, and no fair comparison.

    Parameters
    ----------
    directions : name -> float [d_model], of any norm; each is ablated alone.
    model, pairs, layer and options, and what is returned and raised : as for ``steer``. strength is 1; the random rows
    bear the name of the direction that they are compared with.
    """

    def plan(bench: Bench):
        for name, unit in bench.check(directions).items():
            yield from bench.beside(name, unit, lambda x, u=unit, level=bench.mean @ unit: level - x @ u)

    return _compare("ablate", plan, model, formatter, pairs, layer, **options)


def ablate_latents(model, formatter: Formatter, pairs, dictionary, latents, *, layer, **options) -> pd.DataFrame:
    """Take what a latent writes out of the stream: x - code(x) * decoder row, one latent at a time.

    Parameters
    ----------
    dictionary : ``dictionaries.Dictionary`` of one stream at this layer. (Codes of a crosscoder need both models'
        streams at once. To steer along a latent give ``steer`` its decoder row.)
    latents : their indices. The random directions get a change of the same size at each token.
    model, pairs, layer and options, and what is returned and raised : as for ``steer``. strength is 1; name is the
    latent's index, on random rows too.
    """
    if [len(shape) for shape in dictionary.shapes.values()] != [1]:
        raise CausalError(f"the dictionary reads {dictionary.shapes}: only one stream of one layer can be encoded here")
    if wrong := [i for i in latents if not 0 <= i < dictionary.width]:
        raise CausalError(f"latent {wrong[0]} is not in the dictionary: give indices from 0 to {dictionary.width - 1}")

    def plan(bench: Bench):
        asked = hook_name(bench.layer)
        if (hook := dictionary.facts.get("hook") or asked) != asked:
            raise CausalError(f"the dictionary was trained at {hook}: give that layer, not {asked}")
        for i in map(int, latents):
            row, reader = (bench.vector(f"latent {i}", v) for v in (dictionary.decoder[i], dictionary.encoder[:, i]))
            bias, least = float(dictionary.encoder_bias[i]), max(float(dictionary.threshold[i]), 0.0)
            length = row.norm()

            def removed(x, reader=reader, bias=bias, least=least, length=length):
                code = x @ reader + bias
                return -length * code.where(code > least, 0.0)

            yield from bench.beside(str(i), row / length.clamp(min=1e-12), removed)

    return _compare("ablate_latents", plan, model, formatter, pairs, layer, **options)


def _compare(
    intervention, plan, model, formatter, pairs, layer, *, random=20, reference=None, sampled=0, judge=None,
    response_tokens=32, batch_size=64, bootstrap=1000, seed=0,
) -> pd.DataFrame:  # fmt: skip
    """Set the named interventions of plan(bench) beside the random ones; see ``steer``.

    plan : yields kind, name, strength, null (what a named one shares with its random ones) and the change, a function
        of streams float32 [..., d_model] that returns the same.
    """
    if random < LEAST_RANDOM:
        raise CausalError(f"random={random}: at least {LEAST_RANDOM} random directions are needed to tell an effect")
    if judge is not None and not sampled:
        raise CausalError("a judge reads samples: give sampled, the number of prompts to answer")
    bench = Bench(model, formatter, pairs, layer, random, sampled, response_tokens, batch_size, seed)
    pairs = len(bench.chosen)
    reference = np.zeros(pairs) if reference is None else np.asarray(reference)
    if reference.shape != (pairs,):
        raise CausalError(f"reference has shape {reference.shape}: give one margin for each of {pairs} pairs")
    with evaluating(batch_size):
        bench.measure_stream()
        tries = list(plan(bench))
        changes = [change for *_, change in tries]
        facts = pd.DataFrame([tried[:4] for tried in tries], columns=["kind", "name", "strength", "null"])
        if "named" not in facts.kind.tolist():
            raise CausalError("nothing to intervene on: give one direction or latent at least")
        facts = facts.assign(intervention=intervention, layer=bench.layer, change_norm=bench.sizes(changes))
        facts["stream_norm"] = bench.norm
        logp, divergence = bench.score(bench.sequences, [] if sampled else bench.chosen, changes)
        margin = logp[:, bench.chosen] - logp[:, bench.rejected]
        right = (np.sign(margin - reference) + 1) / 2
        effects = {"margin": margin[1:] - margin[0], "accuracy": right[1:] - right[0]}
        effects |= _sampled(bench, changes, judge) if sampled else {"kl": divergence[0][:, bench.chosen]}
    tables = []
    for measure, values in effects.items():
        if len(bad := facts[~np.isfinite(values).all(1)]):
            what = f"{measure} under {intervention} of {bad['name'].iloc[0]!r}"
            raise CausalError(f"{what} is not finite: lower the strength or run in float32")
        of_pairs = not sampled or measure in ("margin", "accuracy")
        groups = bench.prompt_id if of_pairs else np.arange(len(bench.prompts))
        effect = _against_random(*bootstrapped(values, groups, bootstrap, seed), facts)
        tables.append(facts.assign(measure=measure, **effect))
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def _sampled(bench: Bench, changes, judge) -> dict[str, np.ndarray]:
    """Effects on samples: name -> float64 [changes, prompts]."""

    def read(responses):
        found = {"length": np.array([len(ids) for ids in responses], float)}
        if judge is not None:
            found["reward"] = np.asarray(judge(bench.texts, [bench.formatter.decode(r) for r in responses]), float)
            if (shape := found["reward"].shape) != (len(responses),):
                raise CausalError(f"the judge gave shape {shape} for {len(responses)} responses: one number for each")
        return found

    clean, effects = read(bench.sample()), []
    for change in changes:
        responses = bench.sample(change)
        effect = {name: values - clean[name] for name, values in read(responses).items()}
        effects.append({"kl": bench.sampled_kl(responses, change)} | effect)
    return {name: np.stack([effect[name] for effect in effects]) for name in effects[0]}


def _against_random(value: np.ndarray, draws: np.ndarray, facts: pd.DataFrame) -> dict[str, np.ndarray]:
    """The columns EFFECT of one measure."""
    (low, high), named = interval(draws), (facts.kind == "named").to_numpy()
    found = np.full((4, len(value)), np.nan)
    for i in np.flatnonzero(named):
        other = value[(facts.null == facts.null[i]) & ~named]
        # Any change of this size may do harm: what counts is how far a direction lies from where they all lie.
        centre = np.append(other, value[i]).mean()
        p = (1 + np.sum(np.abs(other - centre) >= np.abs(value[i] - centre))) / (1 + len(other))
        found[:, i] = other.mean(), *interval(other), p
    mean, *_, p = found
    beats = named & (p < 0.05) & ((mean < low) | (mean > high)) & ((low > 0) | (high < 0))
    return dict(zip(EFFECT, (value, low, high, *found, beats), strict=True))
