"""Token sequences run through a bridged model in batches: streams, logits, log-probabilities and KL."""

import contextlib
import inspect
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from alignlens.activations.bridging import ready, replacing, taking
from alignlens.core.errors import ActivationError
from alignlens.models import token_kl, token_logprobs
from alignlens.preferences import Encoded, Formatter, collate

CHUNK_LOGITS = 2**25  # logits held in float32 at once


@contextlib.contextmanager
def evaluating(batch_size: int):
    """No gradients; a lack of GPU memory becomes an ActivationError that says what to do."""
    try:
        with torch.inference_mode():
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise ActivationError(f"out of GPU memory with batch_size={batch_size}: halve it") from error


class Batch:
    """Some of the sequences, padded on the right.

    rows : int [batch], which they are; ids, mask : int64 [batch, longest]; tokens : the wanted ones, bool, and
    predicting, bool [batch, longest - 1] : those that predict the next wanted one. The first is not predicted."""

    def __init__(self, sequences: "Sequences", rows: np.ndarray, pad_id: int):
        self.rows = rows
        self.ids, self.mask = collate([sequences.ids[i] for i in rows], pad_id)
        starts = torch.tensor([sequences.starts[i] for i in rows])
        self.tokens = self.mask.bool() & (torch.arange(self.ids.shape[1]) >= starts[:, None])
        self.predicting = self.tokens[:, :-1] & self.tokens[:, 1:]

    def _run(self, bridged, places: int, **options):
        """A forward pass; where the model can, only the last places get logits, as nobody reads the others."""
        model = bridged.original_model
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = places
        return bridged(self.ids.to(model.device), attention_mask=self.mask.to(model.device), use_cache=False, **options)

    def streams(self, bridged, layers, *, mean: bool = False, every: bool = False) -> torch.Tensor:
        """Streams at the wanted tokens, or every one: float32 [tokens, layers, d_model]; or means [batch, ...]."""
        tokens = self.mask.bool() if every else self.tokens

        def take(stream):
            if not mean:
                return stream[tokens].float()
            here = tokens.to(stream.device)
            # Padding may hold anything, NaN included: it is left out, not multiplied by zero.
            return torch.where(here[..., None], stream.float(), 0.0).sum(1) / here.sum(1, keepdim=True)

        with taking(bridged, layers, take) as found:
            self._run(bridged, 1, return_type=None, stop_at_layer=max(layers) + 1)
        device = bridged.original_model.device  # later blocks of a split model may be elsewhere
        return torch.stack([found[layer].to(device) for layer in layers], dim=1)

    def logits(self, bridged, *hooks) -> torch.Tensor:
        """Logits of the predictions under forward hooks: [predictions, vocabulary]."""
        first = int(self.predicting.any(0).int().argmax())
        places = self.ids.shape[1] - first
        with bridged.hooks(fwd_hooks=list(hooks)):
            return self._run(bridged, places)[:, -places:-1][self.predicting[:, first:]]

    def logprobs(self, logits) -> np.ndarray:
        """Log-probability of the predicted tokens, summed over each sequence: float64 [batch], nats."""
        return self._sums(token_logprobs, logits, self.ids[:, 1:][self.predicting], np.arange(len(self.rows)))

    def kl(self, logits, other, rows) -> np.ndarray:
        """KL(logits || other) summed over each sequence of these rows of the batch, else 0: float64 [batch], nats."""
        return self._sums(token_kl, logits, other, rows)

    def _sums(self, measure, logits, other, rows) -> np.ndarray:
        row = self.predicting.nonzero()[:, 0]
        which = torch.isin(row, torch.as_tensor(rows)).nonzero()[:, 0]
        parts = which.split(max(1, CHUNK_LOGITS // logits.shape[-1]))
        values = [measure(logits[part], other[part].to(logits.device)).cpu() for part in parts]
        return np.bincount(row[which].numpy(), torch.cat(values).double().numpy(), minlength=len(self.rows))


@dataclass
class Sequences:
    """Distinct token lists, in the order in which they first appear.

    ids : the lists; starts, sizes : where the wanted tokens of each begin, and how many they are
    place : int [inputs], the list of each input; first : int [lists], the first input of each, rising"""

    ids: list
    starts: list
    sizes: np.ndarray
    place: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, prompts, responses, *, lead: int | None = 0) -> "Sequences":
        """Prompts with their responses: wanted are the response and ``lead`` tokens before it; None: only the end."""
        found, place = {}, []
        for prompt, response in zip(prompts, responses, strict=True):
            ids = (*prompt, *response)
            start = len(ids) - 1 if lead is None else len(prompt) - lead
            place.append(found.setdefault((ids, start), len(found)))
        ids, starts = [list(ids) for ids, _ in found], [start for _, start in found]
        sizes = np.array([len(ids) - start for ids, start in found])
        return cls(ids, starts, sizes, np.array(place), np.unique(place, return_index=True)[1])

    def batches(self, batch_size: int, pad_id: int):
        """Batches of similar length, longest first: one too large fails at once."""
        order = np.argsort([-len(ids) for ids in self.ids], kind="stable")
        for start in range(0, len(order), batch_size):
            yield Batch(self, order[start : start + batch_size], pad_id)


def check_finite(values: np.ndarray, layers: list[int], rows: np.ndarray, encoded: Encoded, units: str) -> None:
    """Refuse NaN and infinite streams [units, layers, d_model]; rows [units] are theirs among the kept pairs."""
    for layer, wrong in zip(layers, ~np.isfinite(values).all(-1).T, strict=True):
        if wrong.any():
            where, row = f"block {layer} in {wrong.sum()} of {len(wrong)} {units} of a batch", rows[wrong].min()
            such = f"row {encoded.rows[row]} (prompt_id {encoded.prompt_id[row]})"
            advice = f"such as {such}: check the weights, or run in float32 or bfloat16 instead of float16"
            raise ActivationError(f"NaN or infinite activations after {where}, {advice}")


def spliced_loss(
    model, formatter: Formatter, pairs: pd.DataFrame | Encoded, layer: int, replacements: dict, *, batch_size: int = 32
) -> pd.DataFrame:
    """Next-token cross-entropy over chosen responses when the residual stream after a block is replaced there.

    Only response tokens are replaced, and only predictions made from them are counted: the stream at response token i
    predicts token i + 1, so the end-of-turn token predicts nothing. The prompt's streams stay the model's own.
    model : a transformers causal model (a copy is bridged) or its TransformerLens bridge; layer : block index.
    replacements : name -> function, or None for the clean run. It gets the clean stream at response tokens, float32
        [tokens, d_model], and returns another, or one vector for all; each token by itself, as batches mix them.
    Returns a row per replacement and distinct response of two tokens or more, in input order: replacement, prompt_id,
    tokens (predictions counted), loss (their mean, nats). Raises as ``read``, and ActivationError if one is not finite.
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
    table = pd.concat(tables)[["replacement", "prompt_id", "tokens", "loss"]]
    table = table.query("tokens > 0").reset_index(drop=True)
    if len(bad := table[~np.isfinite(table.loss)]):
        replacement, prompt, _, loss = bad.iloc[0]
        what = f"{replacement!r} is {loss} at prompt_id {prompt} ({len(bad)} of {len(table)} losses are not finite)"
        raise ActivationError(f"the loss under {what}: check what the replacement returns, and the model's weights")
    return table
