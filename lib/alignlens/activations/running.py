"""Token sequences run through a bridged model in batches: streams, logits, log-probabilities and KL."""

import contextlib
import inspect
from dataclasses import dataclass

import numpy as np
import torch

from alignlens.activations.bridging import taking
from alignlens.core.errors import ActivationError
from alignlens.models import token_kl, token_logprobs
from alignlens.preferences import Encoded, collate

CHUNK_LOGITS = 2**25  # logits held in float32 at once


@contextlib.contextmanager
def evaluating(batch_size: int):
    """No gradients; a lack of GPU memory becomes an ActivationError that says what to do."""
    try:
        with torch.inference_mode():
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise ActivationError(f"out of GPU memory with batch_size={batch_size}: halve it") from error


def _head(bridged, places: int) -> dict:
    """The option that computes logits of the last places only, where the model has it: nobody reads the others."""
    forward = inspect.signature(bridged.original_model.forward)
    return {"logits_to_keep": places} if "logits_to_keep" in forward.parameters else {}


class Batch:
    """Some of the sequences, padded on the right.

    rows : int [batch], which they are; ids, mask : int64 [batch, longest]; tokens : the wanted ones, bool
    [batch, longest]. *Predictions* are those of every wanted token after the first, made at the one before:
    predicting, bool [batch, longest - 1].
    """

    def __init__(self, sequences: "Sequences", rows: np.ndarray, pad_id: int):
        self.rows = rows
        self.ids, self.mask = collate([sequences.ids[i] for i in rows], pad_id)
        starts = torch.tensor([sequences.starts[i] for i in rows])
        self.tokens = self.mask.bool() & (torch.arange(self.ids.shape[1]) >= starts[:, None])
        self.predicting = self.tokens[:, :-1] & self.tokens[:, 1:]

    def _run(self, bridged, **options):
        device = bridged.original_model.device
        return bridged(self.ids.to(device), attention_mask=self.mask.to(device), use_cache=False, **options)

    def streams(self, bridged, layers, *, mean: bool = False, every: bool = False) -> torch.Tensor:
        """Streams after blocks at the wanted tokens, or at every one: float32 [tokens, layers, d_model].

        mean : their means instead, [batch, layers, d_model].
        """
        tokens = self.mask.bool() if every else self.tokens

        def take(stream):
            if not mean:
                return stream[tokens].float()
            here = tokens.to(stream.device)
            # Padding may hold anything, NaN included: it is left out, not multiplied by zero.
            kept = torch.where(here[..., None], stream.float(), 0.0)
            return kept.sum(1) / here.sum(1, keepdim=True)

        stop = max(layers) + 1
        short = {"stop_at_layer": stop} if stop < bridged.cfg.n_layers else _head(bridged, 1)
        with taking(bridged, layers, take) as found:
            self._run(bridged, return_type=None, **short)
        device = bridged.original_model.device  # later blocks of a split model may be elsewhere
        return torch.stack([found[layer].to(device) for layer in layers], dim=1)

    def logits(self, bridged, *hooks) -> torch.Tensor:
        """Logits of the predictions under forward hooks: [predictions, vocabulary]."""
        first = int(self.predicting.any(0).int().argmax())
        places = self.ids.shape[1] - first
        with bridged.hooks(fwd_hooks=list(hooks)):
            logits = self._run(bridged, **_head(bridged, places))
        return logits[:, -places:-1][self.predicting[:, first:]]

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

    ids : the lists; starts : where the wanted tokens of each begin; place : int [inputs], the list of each input
    """

    ids: list
    starts: list
    place: np.ndarray

    @classmethod
    def of(cls, prompts, responses, *, lead: int | None = 0) -> "Sequences":
        """Prompts with their responses: wanted are the response and ``lead`` tokens before it; None: only the end."""
        found, place = {}, []
        for prompt, response in zip(prompts, responses, strict=True):
            ids = (*prompt, *response)
            start = len(ids) - 1 if lead is None else len(prompt) - lead
            place.append(found.setdefault((ids, start), len(found)))
        return cls([list(ids) for ids, _ in found], [start for _, start in found], np.array(place))

    @property
    def first(self) -> np.ndarray:
        """The first input of each list: int [lists], rising."""
        return np.unique(self.place, return_index=True)[1]

    @property
    def sizes(self) -> np.ndarray:
        """Wanted tokens of each list: int [lists]."""
        return np.array([len(ids) - start for ids, start in zip(self.ids, self.starts, strict=True)])

    def batches(self, batch_size: int, pad_id: int):
        """Batches of similar length, longest first: one too large fails at once."""
        order = np.argsort([-len(ids) for ids in self.ids], kind="stable")
        for start in range(0, len(order), batch_size):
            yield Batch(self, order[start : start + batch_size], pad_id)


def check_finite(values: np.ndarray, layers: list[int], rows: np.ndarray, encoded: Encoded, units: str) -> None:
    """Refuse NaN and infinite streams [units, layers, d_model]; rows [units] are theirs among the kept pairs."""
    bad = ~np.isfinite(values).all(-1)
    for layer, wrong in zip(layers, bad.T, strict=True):
        if wrong.any():
            row = rows[wrong].min()
            raise ActivationError(
                f"NaN or infinite activations after block {layer} in {wrong.sum()} of {len(wrong)} {units} of a batch, "
                f"such as row {encoded.rows[row]} (prompt_id {encoded.prompt_id[row]}): check the weights, or run in "
                "float32 or bfloat16 instead of float16"
            )
