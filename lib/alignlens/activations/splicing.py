"""What a model predicts when other streams are put in the place of its own."""

import numpy as np
import pandas as pd

from alignlens.activations.bridging import ready, replacing
from alignlens.activations.running import Sequences, evaluating
from alignlens.core.errors import ActivationError
from alignlens.preferences import Encoded, Formatter


def spliced_loss(
    model, formatter: Formatter, pairs: pd.DataFrame | Encoded, layer: int, replacements: dict, *, batch_size: int = 32
) -> pd.DataFrame:
    """Next-token cross-entropy over chosen responses when the residual stream after a block is replaced there.

    Only response tokens are replaced, and only predictions made from them are counted: the stream at response token i
    predicts token i + 1, so the end-of-turn token predicts nothing. The prompt's streams stay the model's own.

    Parameters
    ----------
    model : a transformers causal model (a copy is bridged) or its TransformerLens bridge (``bridge``).
    layer : block index; the stream after it is replaced.
    replacements : name -> function, or None for the clean run. The function gets the clean stream at response tokens,
        float32 [tokens, d_model], and returns another, or one vector for all. It must treat each token by itself: which
        tokens come together depends on the batch.
    batch_size : changes the speed, not the result.

    Returns
    -------
    DataFrame, one row a replacement and distinct response of two tokens or more, in the order of the pairs:
    replacement, prompt_id, tokens (predictions counted), loss (their mean, nats).

    Raises
    ------
    ActivationError for an unknown layer, sequences that the model cannot hold, a lack of GPU memory, and losses that
    are not finite; PreferenceError if no pair can be formatted.
    """
    encoded = formatter.encode_pairs(pairs)
    sequences = Sequences.of(encoded.prompt_ids, encoded.chosen_ids)
    bridged, (layer,) = ready(model, sequences.ids, layer)
    nats = np.empty((len(replacements), len(sequences.ids)))
    with evaluating(batch_size):
        for batch in sequences.batches(batch_size, formatter.pad_id):
            for number, replace in enumerate(replacements.values()):
                hooks = [] if replace is None else [replacing(layer, batch.tokens, replace)]
                nats[number, batch.rows] = -batch.logprobs(batch.logits(bridged, *hooks))
    rows = pd.DataFrame({"prompt_id": encoded.prompt_id[sequences.first], "tokens": sequences.sizes - 1})
    tables = [rows.assign(replacement=name, loss=nats[i] / rows.tokens) for i, name in enumerate(replacements)]
    table = pd.concat(tables).query("tokens > 0").reset_index(drop=True)
    table = table[["replacement", "prompt_id", "tokens", "loss"]]
    if len(bad := table[~np.isfinite(table.loss)]):
        replacement, prompt, _, loss = bad.iloc[0]
        raise ActivationError(
            f"the loss under replacement {replacement!r} is {loss} at prompt_id {prompt} ({len(bad)} of {len(table)} "
            "losses are not finite): check what the replacement returns, and the model's weights"
        )
    return table
