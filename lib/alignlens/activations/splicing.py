"""What a model predicts when other streams are put in the place of its own."""

from itertools import product

import numpy as np
import pandas as pd

from alignlens.activations.bridging import check_layers, ready, replacing
from alignlens.activations.running import Sequences, check_finite, evaluating
from alignlens.core.errors import ActivationError
from alignlens.preferences import Encoded, Formatter


def spliced_loss(
    models: dict, formatter: Formatter, pairs: pd.DataFrame | Encoded, layer: int, replacements: dict, *,
    batch_size: int = 32,
) -> pd.DataFrame:  # fmt: skip
    """Next-token cross-entropy over chosen responses when the residual stream after a block is replaced there.

    Only response tokens are replaced, and only predictions made from them are counted: the stream at response token i
    predicts token i + 1, so the end-of-turn token predicts nothing. The prompt's streams stay the model's own.

    Parameters
    ----------
    models : name -> TransformerLens bridge (``bridge``). All read the same token ids.
    layer : block index; the stream after it is replaced.
    replacements : name -> function, or None for the clean run. The function gets the clean streams at the same response
        tokens of all models, {model: float32 [tokens, d_model]}, and returns a dict of the same shapes. It must treat
        each token by itself: which tokens come together depends on the batch.
    batch_size : changes the speed, not the result.

    Returns
    -------
    DataFrame, one row a replacement, model and distinct response of two tokens or more, in the order of the pairs:
    replacement, model, prompt_id, tokens (predictions counted), loss (their mean, nats).

    Raises
    ------
    ActivationError for an unknown layer, sequences that a model cannot hold, a lack of GPU memory, a replacement of
    another shape, and NaN or infinite streams or losses; PreferenceError if no pair can be formatted.
    """
    encoded = formatter.encode_pairs(pairs)
    sequences = Sequences.of(encoded.prompt_ids, encoded.chosen_ids)
    first, sizes = sequences.first, sequences.sizes
    bridges = {name: ready(model, sequences.ids) for name, model in models.items()}
    layers = {name: check_layers(layer, model.cfg.n_layers) for name, model in bridges.items()}
    nats = np.empty((len(replacements), len(bridges), len(sizes)))
    with evaluating(batch_size):
        for batch in sequences.batches(batch_size, formatter.pad_id):
            clean = {name: batch.streams(model, layers[name]) for name, model in bridges.items()}
            for name, streams in clean.items():
                rows = first[batch.rows].repeat(sizes[batch.rows])
                check_finite(streams.numpy(), layers[name], rows, encoded, f"tokens of {name}")
            for number, (what, replace) in enumerate(replacements.items()):
                made = {} if replace is None else _replaced(what, replace, clean)
                for place, (name, model) in enumerate(bridges.items()):
                    hooks = [replacing(*layers[name], batch.tokens, lambda _, new=made[name]: new)] if made else []
                    nats[number, place, batch.rows] = -batch.logprobs(batch.logits(model, *hooks))
    told = np.flatnonzero(sizes > 1)
    table = pd.DataFrame(product(replacements, bridges, told), columns=["replacement", "model", "sequence"])
    table["prompt_id"] = encoded.prompt_id[first[table.sequence]]
    table["tokens"] = sizes[table.pop("sequence")] - 1
    table["loss"] = nats[..., told].ravel() / table.tokens
    if len(bad := table[~np.isfinite(table.loss)]):
        replacement, model, prompt, _, loss = bad.iloc[0]
        raise ActivationError(
            f"the loss of model {model!r} under replacement {replacement!r} is {loss} at prompt_id {prompt} "
            f"({len(bad)} of {len(table)} losses are not finite): check the replacement and the weights after its block"
        )
    return table


def _replaced(what: str, replace, clean: dict) -> dict:
    """What a replacement makes of the clean streams, checked."""
    made = replace({name: streams[:, 0].clone() for name, streams in clean.items()})  # it may work in place
    expected = {name: tuple(streams[:, 0].shape) for name, streams in clean.items()}
    shapes = {name: tuple(value.shape) for name, value in made.items()} if isinstance(made, dict) else type(made)
    if shapes != expected:
        raise ActivationError(f"replacement {what!r} gave {shapes}, not {expected}: return one tensor for each model")
    return made
