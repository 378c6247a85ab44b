"""Steering along directions, ablating them, and ablating the latents of a dictionary."""

import numpy as np
import pandas as pd
import torch

from alignlens.activations import hook_name
from alignlens.causal.bench import Bench, Try
from alignlens.causal.comparing import compare
from alignlens.core.errors import CausalError
from alignlens.preferences import Formatter


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
    CausalError for directions, layers, strengths or options that do not fit, for pairs of which none fits the
    formatter, and for effects that are not finite; ActivationError for sequences that the model cannot hold.
    """
    strengths = np.ravel(np.asarray(strength, float)).tolist()
    if not strengths or not np.isfinite(strengths).all():
        raise CausalError(f"strength={strength!r}: give a finite number or a list of them")

    def plan(bench: Bench):
        rows = [("named", name, unit) for name, unit in bench.check(directions).items()]
        rows += [("random", "random", unit) for unit in bench.random]  # one null: the change is of one size for all
        for value in strengths:
            for kind, name, unit in rows:
                yield Try(kind, name, value, value, lambda x, v=value * bench.norm * unit: x + v)

    return compare("steer", plan, model, formatter, pairs, layer, **options)


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

    return compare("ablate", plan, model, formatter, pairs, layer, **options)


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
                return -length * torch.where((code := x @ reader + bias) > least, code, 0.0)

            yield from bench.beside(str(i), row / length.clamp(min=1e-12), removed)

    return compare("ablate_latents", plan, model, formatter, pairs, layer, **options)
