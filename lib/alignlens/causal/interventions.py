"""Steering, ablation of directions or latents, beside random directions of the same size; patching between models."""

import numpy as np
import pandas as pd

from alignlens.activations import Sequences, evaluating, hook_name, ready, replacing
from alignlens.causal.bench import Bench, bootstrapped, score
from alignlens.core.errors import CausalError
from alignlens.core.statistics import interval
from alignlens.preferences import Formatter

LEAST_RANDOM = 20  # the rank p of fewer draws cannot fall below 0.05
EFFECT = ["value", "low", "high", "random_mean", "random_low", "random_high", "p", "beats"]
COLUMNS = ["intervention", "kind", "name", "layer", "strength", "measure", *EFFECT, "change_norm", "stream_norm"]


def steer(model, formatter: Formatter, pairs, directions: dict, *, layer, strength, **options) -> pd.DataFrame:
    """Add a direction to the stream after a block, at the last prompt token and the answer's: x + strength * norm * u.

    model : a transformers causal model (a copy is bridged) or its TransformerLens bridge (``activations.bridge``).
    pairs : DataFrame[prompt, chosen, rejected, prompt_id] or ``preferences.Encoded``; the model was trained on none.
    directions : name -> float [d_model], of any norm; layer : block index, negative from the end.
    strength : one or several, of either sign, in units of the stream's norm: the root-mean-square distance of the clean
        stream from its mean at the changed tokens, those of more than 10 times the median norm left out.
    random : int, 20 at least; isotropic random directions that run beside the named ones.
    reference : float [pairs that fit], a reference model's log p(chosen) - log p(rejected); by default 0.
    sampled : how many of the first prompts are answered too, with the same random numbers for all; response_tokens :
        most tokens of an answer; judge : (prompts, responses), lists of texts, -> float [prompts].
    batch_size : changes the speed and the memory, not the result; bootstrap : draws of prompts; seed.

    Returns a row per intervention and measure: intervention, kind (named | random), name, layer, strength; measure
    (intervened - clean) : margin, mean log p(chosen) - log p(rejected), nats; accuracy, share of margins above the
        reference's, ties half; kl(intervened || clean), nats, over the chosen answer or, if drawn, the samples; of
        these also length, tokens, and reward, what ``judge`` gives
    value, low, high : the effect and its 95 % bootstrap interval over prompts
    change_norm : root-mean-square size of the change in units of ``stream_norm``, which is in the stream's own
    random_mean, random_low, random_high (named rows only) : mean, 2.5 and 97.5 percentiles of the random directions
    p : rank of the effect's distance from the mean of all (this direction and the random ones) among theirs, (1 + as
        far or farther) / (1 + random), of one direction, strength and measure: where many are tried, correct for that
    beats : p < 0.05 and the interval excludes both random_mean and 0. Only what beats may be named.
    Raises CausalError for arguments that do not fit and effects that are not finite; else as ``activations.read``."""
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

    m is the mean of the clean stream at the changed tokens, those of more than 10 times the median norm left out. The
    random directions r get the same change at each token, (m·u - x·u) r: what they would have removed of their own is
    usually much less, and no fair comparison; their rows bear the name of u. Each direction is ablated alone, with
    strength 1; arguments, result and errors as for ``steer``."""

    def plan(bench: Bench):
        for name, unit in bench.check(directions).items():
            yield from bench.beside(name, unit, lambda x, u=unit, level=bench.mean @ unit: level - x @ u)

    return _compare("ablate", plan, model, formatter, pairs, layer, **options)


def ablate_latents(model, formatter: Formatter, pairs, dictionary, latents, *, layer, **options) -> pd.DataFrame:
    """Take what a latent writes out of the stream: x - code(x) * decoder row, one latent at a time.

    dictionary : ``dictionaries.Dictionary`` of one stream at this layer (a crosscoder needs both models' at once).
    latents : their indices; random rows, whose change is of the same size at each token, bear them as names too.
    strength is 1; other arguments, result and errors as for ``steer``, which steers along a latent by its decoder row.
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
            unit, length = row / row.norm().clamp(min=1e-12), row.norm()

            def removed(x, reader=reader, bias=bias, least=least, length=length):
                code = x @ reader + bias
                return -length * code.where(code > least, 0.0)

            yield from bench.beside(str(i), unit, removed)

    return _compare("ablate_latents", plan, model, formatter, pairs, layer, **options)


def patch(source, target, formatter, pairs, *, layers="all", batch_size=64, bootstrap=1000, seed=0) -> pd.DataFrame:
    """Give one model the other's stream after one block at a time: where does the difference in margin come about?

    The stream is replaced at every token of prompt and response. Final norm and unembedding stay the target's, so at
    the last layer share is 1 only as far as those do not differ.
    source, target : transformers causal models (copies are bridged) or their bridges, of equal depth and width and
        with the same token ids, such as a base and its aligned variant, either way round.
    layers : "all" or block indices, negative from the end; pairs, batch_size, bootstrap, seed : as for ``steer``.
    Returns a row per layer: layer; margin_target, margin_source, margin_patched : mean log p(chosen) - log p(rejected),
    nats; share : (patched - target) / (source - target), with low and high, its 95 % bootstrap interval over prompts;
    reason : why share is NaN, else empty; kl_to_source, kl_to_target : KL(patched || that model) summed over the chosen
    response, nats. Raises as ``steer``, and CausalError for models that do not fit each other."""
    encoded = formatter.encode_pairs(pairs)
    sequences = Sequences.of(encoded.prompt_ids * 2, encoded.chosen_ids + encoded.rejected_ids, lead=1)
    chosen, rejected = sequences.place.reshape(2, -1)
    (source, layers), (target, _) = (ready(model, sequences.ids, layers) for model in (source, target))
    shapes = [(m.cfg.n_layers, m.cfg.d_model, m.cfg.d_vocab) for m in (source, target)]
    if shapes[0] != shapes[1]:
        raise CausalError(f"layers, width, vocabulary: {shapes[0]} and {shapes[1]}; patch between models of one shape")

    def hooks(batch):
        every, streams = batch.mask.bool(), batch.streams(source, layers, every=True)
        return [replacing(layer, every, lambda _, new=streams[:, i]: new) for i, layer in enumerate(layers)]

    with evaluating(batch_size):
        logp, divergence = score([target, source], sequences, chosen, hooks, len(layers), batch_size, formatter.pad_id)
    margin = logp[:, chosen] - logp[:, rejected]
    if not np.isfinite(margin).all():
        raise CausalError("margins are NaN or infinite: check both models' weights, or run in float32")
    value, draws = bootstrapped(margin, encoded.prompt_id, bootstrap, seed)
    margins = {"margin_target": value[0], "margin_source": value[1], "margin_patched": value[2:]}
    table = pd.DataFrame({"layer": layers} | margins | dict.fromkeys(("share", "low", "high"), np.nan) | {"reason": ""})
    low, high = interval(draws[:, 1] - draws[:, 0])
    if low <= 0 <= high:
        table["reason"] = "the margins of source and target do not differ beyond their 95 % interval"
    else:
        table["share"] = (value[2:] - value[0]) / (value[1] - value[0])
        table["low"], table["high"] = interval((draws[:, 2:] - draws[:, [0]]) / (draws[:, [1]] - draws[:, [0]]))
    table[["kl_to_source", "kl_to_target"]] = divergence[::-1, :, chosen].mean(2).T
    return table


def _compare(
    intervention, plan, model, formatter, pairs, layer, *, random=20, reference=None, sampled=0, judge=None,
    response_tokens=32, batch_size=64, bootstrap=1000, seed=0,
) -> pd.DataFrame:  # fmt: skip
    # plan(bench) yields kind, name, strength, null (what a named one shares with its random ones) and the change, a
    # function of streams float32 [..., d_model] that returns the same.
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
        facts = facts.assign(intervention=intervention, layer=bench.layer, stream_norm=bench.norm)
        facts["change_norm"] = bench.sizes(changes)
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
        groups = bench.prompt_id if measure in ("margin", "accuracy") or not sampled else np.arange(len(bench.prompts))
        effect = _against_random(*bootstrapped(values, groups, bootstrap, seed), facts)
        tables.append(facts.assign(measure=measure, **effect))
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def _sampled(bench: Bench, changes, judge) -> dict[str, np.ndarray]:
    """Effects on samples: name -> float64 [changes, prompts]."""
    found = []
    for change in [None, *changes]:
        responses = bench.sample(change)
        found.append({"kl": 0.0, "length": np.array([len(ids) for ids in responses], float)})
        if change is not None:
            sequences = Sequences.of(bench.prompts, responses, lead=1)
            found[-1]["kl"] = bench.score(sequences, sequences.place, [change])[1][0, 0, sequences.place]
        if judge is not None:
            reward = np.asarray(judge(bench.texts, [bench.formatter.decode(ids) for ids in responses]), float)
            if reward.shape != (len(responses),):
                raise CausalError(f"the judge gave shape {reward.shape} for {len(responses)} responses: one each")
            found[-1]["reward"] = reward
    return {name: np.stack([effect[name] - found[0][name] for effect in found[1:]]) for name in found[0]}


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
