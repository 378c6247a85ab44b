"""Causal tests: change the residual stream after a block and see what that does to the model's preferences.

A direction, latent or layer that merely correlates with a preference changes nothing when it is pushed, removed or
exchanged. Each intervention runs beside random directions that change the stream by as much, since any large enough
change does something (the null that arXiv 2606.09850 lacks).

*Tokens.* position="response", the default, changes the stream at the last prompt token, which predicts the first
response token, and at every response token; position="all" changes it at every token of prompt and response.

*Effects* are intervened minus clean, paired by prompt:

margin : mean over pairs of log p(chosen) - log p(rejected), nats. Against any fixed reference this is also the change
    of the implicit-reward margin.
accuracy : share of pairs with a positive margin, relative to the reference's if there is one; ties count half.
kl : KL(intervened || clean), nats, summed over the tokens of the chosen response; when samples are drawn, over those
    of the intervened model's samples.
length : tokens of a sample. reward : what ``judge`` says of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from alignlens import activations, models
from alignlens.core.errors import ActivationError, CausalError, PreferenceError
from alignlens.preferences import Formatter, collate

POSITIONS = ("response", "all")
LEAST_RANDOM = 20  # the rank p of fewer draws cannot fall below 0.05
LEVEL = 0.05
UNUSUAL = 10  # times the median norm: such tokens (the first of a text, some line breaks) would set the scale alone
CHUNK = 2**25  # logits held in float32 at once


# Interventions -------------------------------------------------------------------------------------------------------


def steer(model, formatter: Formatter, pairs: pd.DataFrame, directions: dict, *, layer, strength, **options):
    """Add a direction to the stream after a block: x + strength * norm * u.

    Parameters
    ----------
    model : a transformers causal model (a copy is bridged) or its TransformerLens bridge (``activations.bridge``).
    pairs : DataFrame[prompt, chosen, rejected, prompt_id], none of which the model was trained on.
    directions : name -> float [d_model], of any norm.
    layer : block index, negative from the end; the stream after it is changed.
    strength : one or several, of either sign, in units of the stream's norm: the root-mean-square distance of the clean
        stream from its mean at the tokens that are changed. Tokens of more than 10 times the median norm do not count
        for it.

    Options, the same for ``ablate`` and ``ablate_latents``
    -------------------------------------------------------
    random : int, 20 at least; random directions (isotropic Gaussian) that run beside the named ones.
    position : response | all, see above.
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
    CausalError for directions, layers, strengths or options that do not fit, for pairs of which none fits the
    formatter, and for effects that are not finite; ActivationError for sequences that the model cannot hold.
    """
    strengths = np.atleast_1d(np.asarray(strength, float))
    if strengths.ndim != 1 or not len(strengths) or not np.isfinite(strengths).all():
        raise CausalError(f"strength={strength!r}: give a finite number or a list of them")

    def plan(bench: _Bench):
        rows = [("named", name, unit) for name, unit in bench.check(directions).items()]
        rows += [("random", "random", unit) for unit in bench.random]  # one null: the change is of one size for all
        for value in map(float, strengths):
            for kind, name, unit in rows:
                yield _Try(kind, name, value, value, lambda x, v=value * bench.norm * unit: x + v)

    return _compare("steer", plan, model, formatter, pairs, layer, **options)


def ablate(model, formatter: Formatter, pairs: pd.DataFrame, directions: dict, *, layer, mean=None, **options):
    """Take the variation along a direction out of the stream: x - (x·u - m·u) u, m being its mean (mean ablation).

    The random directions r that run beside it get the same change at each token, (m·u - x·u) r: what they would have
    removed of their own is usually much less, and no fair comparison.

    Parameters
    ----------
    directions : name -> float [d_model], of any norm; each is ablated alone.
    mean : float [d_model], by default that of the clean stream at the tokens that are changed, those of more than 10
        times the median norm left out.
    model, pairs, layer and options, and what is returned and raised : as for ``steer``. strength is 1; the random rows
    bear the name of the direction that they are compared with.
    """

    def plan(bench: _Bench):
        centre = bench.mean if mean is None else bench.vector("mean", mean)
        for name, unit in bench.check(directions).items():
            level = centre @ unit
            for kind, along in bench.beside(unit):
                yield _Try(kind, name, 1.0, name, _write(lambda x, u=unit, m=level: m - x @ u, along))

    return _compare("ablate", plan, model, formatter, pairs, layer, **options)


def ablate_latents(model, formatter: Formatter, pairs: pd.DataFrame, dictionary, latents, *, layer, **options):
    """Take what a latent writes out of the stream: x - code(x) * decoder row, one latent at a time.

    Parameters
    ----------
    dictionary : ``dictionaries.Dictionary`` of one stream at this layer. (Codes of a crosscoder need both models'
        streams at once. To steer along a latent give ``steer`` its decoder row.)
    latents : their indices. The random directions get a change of the same size at each token.
    model, pairs, layer and options, and what is returned and raised : as for ``steer``. strength is 1; name is the
    latent's index, on random rows too.
    """
    shapes = list(dictionary.shapes.values())
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise CausalError(
            f"the dictionary reads {dictionary.shapes}: only one stream of one layer can be encoded while a model runs"
        )
    if wrong := [i for i in latents if not 0 <= i < dictionary.width]:
        raise CausalError(f"latent {wrong[0]} is not in the dictionary: give indices from 0 to {dictionary.width - 1}")

    def plan(bench: _Bench):
        hook, asked = dictionary.facts.get("hook"), activations.hook_name(bench.layer)
        if hook is not None and hook != asked:
            raise CausalError(f"the dictionary was trained at {hook}: give that layer, not {asked}")
        for i in map(int, latents):
            row, reader = (bench.vector(f"latent {i}", v) for v in (dictionary.decoder[i], dictionary.encoder[:, i]))
            bias, least = float(dictionary.encoder_bias[i]), max(float(dictionary.threshold[i]), 0.0)
            length = row.norm()

            def removed(x, reader=reader, bias=bias, least=least, length=length):
                return -length * torch.where((code := x @ reader + bias) > least, code, 0.0)

            for kind, along in bench.beside(row / length.clamp(min=1e-12)):
                yield _Try(kind, str(i), 1.0, i, _write(removed, along))

    return _compare("ablate_latents", plan, model, formatter, pairs, layer, **options)


@dataclass
class _Try:
    """One intervention: ``replace`` gets float32 [tokens, d_model] and returns the same. ``null`` : its random rows."""

    kind: str
    name: str
    strength: float
    null: object
    replace: Callable


def _write(amount, along):
    """Change each token's stream along a direction by an amount that depends on the stream: float [tokens]."""
    return lambda x: x + amount(x)[:, None] * along


# Measuring -----------------------------------------------------------------------------------------------------------


class _Batch:
    """Some of the sequences of prompt and response, and the logits that predict their response tokens."""

    def __init__(self, bridged, sequences, starts, rows, position: str, pad_id: int):
        ids, mask = collate([sequences[i] for i in rows], pad_id)
        answering = activations._wanted_tokens(mask, [starts[i] - 1 for i in rows])
        self.tokens = answering if position == "response" else mask.bool()
        predicting = answering.clone()
        predicting[:, :-1] &= mask[:, 1:].bool()
        predicting[:, -1] = False
        self.row = predicting.nonzero()[:, 0]  # of each prediction
        self.targets = ids.roll(-1, 1)[predicting]
        self.bridged, self.device = bridged, activations._device(bridged)
        self.ids, self.mask = ids.to(self.device), mask.to(self.device)
        last = ids.shape[1] - int(predicting.any(0).int().argmax())
        self.predicting = predicting[:, -last:]
        self.options = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(bridged.original_model.forward).parameters:
            self.options["logits_to_keep"] = last  # none of the prompt's, which nobody reads

    def logits(self, layer: int | None = None, replace=None):
        """[predictions, vocabulary], the stream after a block replaced at the tokens that are changed."""
        hooks = [] if replace is None else [_hook(layer, replace, lambda stream: self.tokens.to(stream.device))]
        with self.bridged.hooks(fwd_hooks=hooks):
            logits = self.bridged(self.ids, attention_mask=self.mask, **self.options)
        return logits[:, -self.predicting.shape[1] :][self.predicting.to(logits.device)]

    def logprobs(self, logits) -> np.ndarray:
        """Summed log-probability of each response: float64 [sequences], nats."""
        targets = self.targets.to(logits.device)
        nats = [cross_entropy(logits[part].float(), targets[part], reduction="none") for part in _chunks(logits)]
        return -self._sum(torch.cat(nats), self.row)

    def kl(self, logits, other, rows) -> np.ndarray:
        """KL(first || second) of the given sequences' responses, other ones 0: float64 [sequences], nats."""
        which = torch.isin(self.row, torch.as_tensor(rows)).nonzero()[:, 0]
        values = [torch.zeros(0)]
        for part in _chunks(logits[: len(which)]):
            at = which[part].to(logits.device)
            p, q = (x[at].float().log_softmax(-1) for x in (logits, other.to(logits.device)))
            values.append((p.exp() * (p - q)).sum(-1).cpu())
        return self._sum(torch.cat(values), self.row[which])

    def _sum(self, values, row) -> np.ndarray:
        return np.bincount(row.numpy(), values.double().cpu().numpy(), minlength=len(self.ids))


def _chunks(logits):
    step = max(1, CHUNK // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _hook(layer: int, replace, tokens):
    """A forward hook; tokens(stream) says where the stream is replaced: anything that indexes [batch, place]."""

    def change(stream, hook):
        at = tokens(stream)
        stream = stream.clone()
        stream[at] = replace(stream[at].reshape(-1, stream.shape[-1]).float()).reshape(stream[at].shape).to(stream)
        return stream

    return activations.hook_name(layer), change


def _prepare(formatter, pairs, position):
    """The encoded pairs, the distinct sequences with the starts of their responses, and their places [2, pairs]."""
    if position not in POSITIONS:
        raise CausalError(f"position={position!r}: choose one of {', '.join(POSITIONS)}")
    try:
        encoded = activations._encode(None, pairs, formatter)[1]
    except PreferenceError as error:
        raise CausalError(f"no pairs to intervene on: {error}") from error
    sides = [encoded.chosen_ids, encoded.rejected_ids]
    sequences, starts, places = activations._unique_sequences(encoded.prompt_ids, sides, "every")
    return encoded, sequences, starts, places.reshape(2, -1)


def _layers(layers, n_layers: int) -> list[int]:
    try:
        return activations._check_layers(layers, n_layers)
    except (ActivationError, TypeError, ValueError) as error:
        raise CausalError(f"no such layer: {error}") from error


class _Bench:
    """The model with its pairs and, at the tokens that are changed, the clean stream's mean and norm."""

    def __init__(self, model, formatter, pairs, layer, position, random, sampled, response_tokens, batch_size, seed):
        encoded, self.sequences, self.starts, self.places = _prepare(formatter, pairs, position)
        self.prompt_id = encoded.prompt_id
        first = np.sort(np.unique(self.prompt_id, return_index=True)[1])[:sampled]
        self.prompts = [encoded.prompt_ids[i] for i in first]
        self.texts = [encoded.prompts[i] for i in first]
        longest = [[*ids, *[0] * response_tokens] for ids in self.prompts]
        self.bridged = activations._ready(model, self.sequences + longest, None, False)
        self.layer = _layers([layer], self.bridged.cfg.n_layers)[0]
        self.formatter, self.position, self.batch_size = formatter, position, batch_size
        self.response_tokens, self.seed = response_tokens, seed
        draws = np.random.default_rng([seed, 1]).standard_normal((random, self.bridged.cfg.d_model))
        self.random = [self.vector("random", draw / np.linalg.norm(draw)) for draw in draws]
        self._measure_stream()

    def vector(self, name, values):
        """float32 [d_model] on the model's device, checked."""
        values = torch.as_tensor(np.asarray(values, np.float32))
        if values.shape != (self.bridged.cfg.d_model,) or not torch.isfinite(values).all():
            raise CausalError(
                f"{name!r} has shape {tuple(values.shape)}: give {self.bridged.cfg.d_model} finite numbers, one for "
                "each dimension of the stream"
            )
        return values.to(activations._device(self.bridged))

    def check(self, directions: dict) -> dict:
        """The directions with norm 1."""
        found = {name: self.vector(name, values) for name, values in directions.items()}
        if short := [name for name, vector in found.items() if not vector.norm() > 0]:
            raise CausalError(f"direction {short[0]!r} is zero: leave it out")
        return {name: vector / vector.norm() for name, vector in found.items()}

    def beside(self, unit):
        """The named direction and the random ones, each with its kind."""
        return [("named", unit), *(("random", vector) for vector in self.random)]

    def batches(self, sequences, starts):
        for rows in activations._batches(sequences, self.batch_size):
            yield rows, _Batch(self.bridged, sequences, starts, rows, self.position, self.formatter.pad_id)

    def _measure_stream(self):
        def streams():  # read twice instead of kept: only norms are held for all tokens at once
            for _, batch in self.batches(self.sequences, self.starts):
                at = batch.tokens.to(batch.device)
                yield activations._streams_at(self.bridged, self.layer, batch.ids, batch.mask, at)

        with activations._evaluating([self.bridged], self.batch_size):
            norms = torch.cat([x.norm(dim=1).cpu() for x in streams()])
            if not torch.isfinite(norms).all():
                raise CausalError(f"NaN or infinite streams after block {self.layer}: check the model's weights")
            limit, total, square, count = UNUSUAL * float(norms.median()), 0.0, 0.0, 0
            for x in streams():
                x = x[x.norm(dim=1) <= limit].cpu().double()
                total, square, count = total + x.sum(0), square + float(x.square().sum()), count + len(x)
        self.tokens = len(norms)
        self.mean = (total / count).float().to(activations._device(self.bridged))
        self.norm = float((square / count - (total / count).square().sum()).clamp(min=0).sqrt())

    def score(self, tries, kl: bool):
        """log p [1 + tries, sequences] (clean first), KL to clean [tries, sequences], size of the change [tries]."""
        logp = np.zeros((1 + len(tries), len(self.sequences)))
        divergence, square = np.zeros((len(tries), len(self.sequences))), np.zeros(len(tries))
        chosen = np.unique(self.places[0]) if kl else []
        for rows, batch in self.batches(self.sequences, self.starts):
            clean, wanted = batch.logits(), np.flatnonzero(np.isin(rows, chosen))
            logp[0, rows] = batch.logprobs(clean)
            for number, tried in enumerate(tries):

                def replace(x, number=number, tried=tried):
                    made = tried.replace(x)
                    square[number] += float((made - x).square().sum())
                    return made

                logits = batch.logits(self.layer, replace)
                logp[number + 1, rows] = batch.logprobs(logits)
                divergence[number, rows] = batch.kl(logits, clean, wanted)
        return logp, divergence, np.sqrt(square / self.tokens) / max(self.norm, 1e-12)

    def sample(self, replace=None) -> list[list[int]]:
        """Responses to the prompts; the same random numbers whatever the intervention."""
        # The prompt is padded on the left and later steps hold one new token: what answers stands last.
        at = (slice(None), slice(-1, None)) if self.position == "response" else slice(None)
        hooks = [] if replace is None else [_hook(self.layer, replace, lambda stream: at)]
        made = []
        with self.bridged.hooks(fwd_hooks=hooks):
            for start in range(0, len(self.prompts), self.batch_size):  # a seed a batch, however long the last one ran
                made += models.sample(
                    self.bridged.original_model, self.prompts[start : start + self.batch_size],
                    end_id=self.formatter.end_id, pad_id=self.formatter.pad_id, max_new_tokens=self.response_tokens,
                    seed=self.seed + start, batch_size=self.batch_size,
                )  # fmt: skip
        return made

    def sampled_kl(self, responses, replace) -> np.ndarray:
        """KL(intervened || clean) of the responses: float64 [prompts], nats."""
        out, sequences = np.zeros(len(responses)), [p + r for p, r in zip(self.prompts, responses, strict=True)]
        for rows, batch in self.batches(sequences, [len(p) for p in self.prompts]):
            out[rows] = batch.kl(batch.logits(self.layer, replace), batch.logits(), np.arange(len(rows)))
        return out


def _compare(
    intervention, plan, model, formatter, pairs, layer, *, random=20, position="response", reference=None, sampled=0,
    judge=None, response_tokens=32, batch_size=64, bootstrap=1000, seed=0,
) -> pd.DataFrame:  # fmt: skip
    """Run the interventions of plan(bench) and set the named ones beside the random ones; see ``steer``."""
    if random < LEAST_RANDOM:
        raise CausalError(f"random={random}: at least {LEAST_RANDOM} random directions are needed to tell an effect")
    if judge is not None and not sampled:
        raise CausalError("a judge reads samples: give sampled, the number of prompts to answer")
    bench = _Bench(model, formatter, pairs, layer, position, random, sampled, response_tokens, batch_size, seed)
    tries = list(plan(bench))
    if all(tried.kind == "random" for tried in tries):
        raise CausalError("nothing to intervene on: give one direction or latent at least")
    chosen, rejected = bench.places
    if reference is not None and np.shape(reference) != chosen.shape:
        raise CausalError(f"reference has shape {np.shape(reference)}: give one margin for each of {len(chosen)} pairs")
    with activations._evaluating([bench.bridged], batch_size):
        logp, divergence, size = bench.score(tries, kl=not bench.prompts)
        margin = logp[:, chosen] - logp[:, rejected]
        right = (np.sign(margin - (0 if reference is None else np.asarray(reference))) + 1) / 2
        effects = {"margin": margin[1:] - margin[0], "accuracy": right[1:] - right[0]}
        effects |= _sampled(bench, tries, judge) if bench.prompts else {"kl": divergence[:, chosen]}
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


COLUMNS = [
    "intervention", "kind", "name", "layer", "strength", "measure", "value", "low", "high", "random_mean",
    "random_low", "random_high", "p", "beats", "change_norm", "stream_norm",
]  # fmt: skip


def _sampled(bench: _Bench, tries, judge) -> dict[str, np.ndarray]:
    """Effects on samples: name -> float64 [tries, prompts]."""

    def read(responses):
        found = {"length": np.array([len(ids) for ids in responses], float)}
        if judge is not None:
            found["reward"] = np.asarray(judge(bench.texts, [bench.formatter.decode(r) for r in responses]), float)
            if found["reward"].shape != (len(responses),):
                shape = found["reward"].shape
                raise CausalError(f"the judge gave shape {shape} for {len(responses)} responses: one number for each")
        return found

    clean, effects = read(bench.sample()), []
    for tried in tries:
        responses = bench.sample(tried.replace)
        effect = {name: values - clean[name] for name, values in read(responses).items()}
        effects.append({"kl": bench.sampled_kl(responses, tried.replace)} | effect)
    return {name: np.stack([effect[name] for effect in effects]) for name in effects[0]}


def _bootstrap(values, groups, bootstrap: int, seed: int):
    """Means of float [tries, items] over items, and over draws of their groups: [tries], [tries, draws]."""
    ids, index = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(index, row, minlength=len(ids)) for row in values])
    weights = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=bootstrap)
    return values.mean(1), sums @ weights.T / (weights @ np.bincount(index))


def _against_random(values, groups, kind, null, bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    """Columns of one measure from float [tries, items]."""
    value, draws = _bootstrap(values, groups, bootstrap, seed)
    low, high = np.percentile(draws, [2.5, 97.5], axis=1)
    named = (kind == "named").to_numpy()
    found = {name: np.full(len(value), np.nan) for name in ("random_mean", "random_low", "random_high", "p")}
    for i in np.flatnonzero(named):
        other = value[(null == null[i]) & ~named]
        # Any change of this size may do harm: what counts is how far a direction lies from where they all lie.
        centre = np.append(other, value[i]).mean()
        p = (1 + np.sum(np.abs(other - centre) >= np.abs(value[i] - centre))) / (1 + len(other))
        for name, number in zip(found, (other.mean(), *np.percentile(other, [2.5, 97.5]), p), strict=True):
            found[name][i] = number
    mean = found["random_mean"]
    beats = named & (found["p"] < LEVEL) & ((mean < low) | (mean > high)) & ((low > 0) | (high < 0))
    return {"value": value, "low": low, "high": high, **found, "beats": beats}


# Patching ------------------------------------------------------------------------------------------------------------


def patch(
    source, target, formatter: Formatter, pairs: pd.DataFrame, *, layers="all", position: str = "all",
    batch_size: int = 64, bootstrap: int = 1000, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Give one model the other's stream after one block at a time: where does the difference in margin come about?

    Final norm and unembedding stay the target's, so at the last layer share is 1 only as far as those do not differ.

    Parameters
    ----------
    source, target : transformers causal models (copies are bridged) or their bridges, of equal depth and width and
        with the same token ids, such as a base and its aligned variant, either way round.
    layers : "all" or block indices, negative from the end. position : all | response (and the last prompt token).
    pairs, batch_size, bootstrap, seed : as for ``steer``.

    Returns
    -------
    DataFrame, one row a layer: layer; margin_target, margin_source, margin_patched : mean over pairs of log p(chosen) -
    log p(rejected), nats; share : (patched - target) / (source - target), with low and high, its 95 % bootstrap
    interval over prompts; reason : why share is NaN, else empty; kl_to_source, kl_to_target : KL(patched || that model)
    summed over the tokens of the chosen response, nats.

    Raises
    ------
    CausalError for models that do not fit each other, unknown layers, pairs of which none fits the formatter, and
    margins that are not finite; ActivationError for sequences that a model cannot hold.
    """
    encoded, sequences, starts, (chosen, rejected) = _prepare(formatter, pairs, position)
    source, target = (activations._ready(model, sequences, None, False) for model in (source, target))
    shapes = [(m.cfg.n_layers, m.cfg.d_model, m.cfg.d_vocab) for m in (source, target)]
    if shapes[0] != shapes[1]:
        raise CausalError(
            f"source and target have layers, width and vocabulary {shapes[0]} and {shapes[1]}: patch between models of "
            "one shape"
        )
    layers = _layers(layers, target.cfg.n_layers)
    logp = np.zeros((2 + len(layers), len(sequences)))  # target, source, patched at each layer
    divergence = np.zeros((2, len(layers), len(sequences)))
    with activations._evaluating([source, target], batch_size):
        for rows in activations._batches(sequences, batch_size):
            batch, other = (_Batch(m, sequences, starts, rows, position, formatter.pad_id) for m in (target, source))
            wanted = np.flatnonzero(np.isin(rows, chosen))
            with activations._taking(source, layers, lambda s, at=batch.tokens: s[at.to(s.device)].float()) as streams:
                ends = [batch.logits(), other.logits()]
            for number, logits in enumerate(ends):
                logp[number, rows] = batch.logprobs(logits)
            for number, layer in enumerate(layers):
                logits = batch.logits(layer, lambda x, stream=streams[layer]: stream.to(x.device))
                logp[2 + number, rows] = batch.logprobs(logits)
                for place, end in enumerate(ends[::-1]):
                    divergence[place, number, rows] = batch.kl(logits, end, wanted)
    margin = logp[:, chosen] - logp[:, rejected]
    if not np.isfinite(margin).all():
        raise CausalError("margins are NaN or infinite: check both models' weights, or run in float32")
    value, draws = _bootstrap(margin, encoded.prompt_id, bootstrap, seed)
    low, high = np.percentile(draws[1] - draws[0], [2.5, 97.5])
    table = pd.DataFrame({"layer": layers, "margin_target": value[0], "margin_source": value[1]})
    table["margin_patched"] = value[2:]
    table[["share", "low", "high"]], table["reason"] = np.nan, ""
    if low <= 0 <= high:
        table["reason"] = "the margins of source and target do not differ beyond their 95 % interval"
    else:
        table["share"] = (value[2:] - value[0]) / (value[1] - value[0])
        shares = (draws[2:] - draws[0]) / (draws[1] - draws[0])
        table["low"], table["high"] = np.percentile(shares, [2.5, 97.5], axis=1)
    table["kl_to_source"], table["kl_to_target"] = divergence[:, :, chosen].mean(2)
    return table
