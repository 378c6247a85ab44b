"""Where between two models does the difference in preference come about?"""

import numpy as np
import pandas as pd

from alignlens.activations import evaluating, ready, replacing
from alignlens.causal.bench import answers, bootstrapped, score
from alignlens.core.errors import CausalError
from alignlens.core.statistics import interval
from alignlens.preferences import Formatter


def patch(
    source, target, formatter: Formatter, pairs, *, layers="all", batch_size: int = 64, bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Give one model the other's stream after one block at a time: where does the difference in margin come about?

    The stream is replaced at every token of prompt and response. Final norm and unembedding stay the target's, so at
    the last layer share is 1 only as far as those do not differ.

    Parameters
    ----------
    source, target : transformers causal models (copies are bridged) or their bridges, of equal depth and width and
        with the same token ids, such as a base and its aligned variant, either way round.
    layers : "all" or block indices, negative from the end.
    pairs, batch_size, bootstrap, seed : as for ``steer``.

    Returns
    -------
    DataFrame, one row a layer: layer; margin_target, margin_source, margin_patched : mean over pairs of log p(chosen) -
    log p(rejected), nats; share : (patched - target) / (source - target), with low and high, its 95 % bootstrap
    interval over prompts; reason : why share is NaN, else empty; kl_to_source, kl_to_target : KL(patched || that model)
    summed over the tokens of the chosen response, nats.

    Raises
    ------
    CausalError for models that do not fit each other and margins that are not finite; ActivationError for unknown
    layers and sequences that a model cannot hold; PreferenceError if no pair can be formatted.
    """
    encoded = formatter.encode_pairs(pairs)
    sequences, (chosen, rejected) = answers(encoded)
    (source, layers), (target, _) = (ready(model, sequences.ids, layers) for model in (source, target))
    shapes = [(m.cfg.n_layers, m.cfg.d_model, m.cfg.d_vocab) for m in (source, target)]
    if shapes[0] != shapes[1]:
        raise CausalError(f"layers, width, vocabulary: {shapes[0]} and {shapes[1]}; patch between models of one shape")

    def hooks(batch):
        every = batch.mask.bool()
        streams = batch.streams(source, layers, every=True)
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
