"""A model on which interventions are tried: what they do to log-probabilities and to samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from alignlens import models
from alignlens.activations import Sequences, check_layers, ready, replacing
from alignlens.core.errors import ActivationError, CausalError, PreferenceError
from alignlens.preferences import Encoded

UNUSUAL = 10  # times the median norm: such tokens (the first of a text, some line breaks) would set the scale alone


@dataclass
class Try:
    """One intervention: ``replace`` gets float32 [..., d_model] and returns the same. ``null`` : its random rows."""

    kind: str
    name: str
    strength: float
    null: object
    replace: Callable


def encode(formatter, pairs) -> Encoded:
    """The encoded pairs, or a CausalError that says why there are none."""
    try:
        return formatter.encode_pairs(pairs)
    except PreferenceError as error:
        raise CausalError(f"no pairs to intervene on: {error}") from error


def answers(encoded: Encoded) -> tuple[Sequences, np.ndarray]:
    """The distinct answers, read from the last prompt token on, and their places: int [chosen or rejected, pairs]."""
    sequences = Sequences.of(encoded.prompt_ids * 2, encoded.chosen_ids + encoded.rejected_ids, lead=1)
    return sequences, sequences.place.reshape(2, -1)


def layers_of(layers, bridged) -> list[int]:
    """``activations.check_layers`` with a CausalError."""
    try:
        return check_layers(layers, bridged.cfg.n_layers)
    except ActivationError as error:
        raise CausalError(f"no such layer: {error}") from error


class Bench:
    """The model with its pairs and, at the tokens that are changed, the clean stream's mean and norm."""

    def __init__(self, model, formatter, pairs, layer, *, random, sampled, response_tokens, batch_size, seed):
        encoded = encode(formatter, pairs)
        self.sequences, (self.chosen, self.rejected) = answers(encoded)
        self.prompt_id = encoded.prompt_id
        first = np.sort(np.unique(encoded.prompt_id, return_index=True)[1])[:sampled]
        self.prompts, self.texts = ([found[i] for i in first] for found in (encoded.prompt_ids, encoded.prompts))
        longest = [[*ids, *[0] * response_tokens] for ids in self.prompts]
        self.bridged = ready(model, self.sequences.ids + longest)
        (self.layer,) = layers_of(layer, self.bridged)
        self.formatter, self.batch_size = formatter, batch_size
        self.response_tokens, self.seed = response_tokens, seed
        draws = np.random.default_rng([seed, 1]).standard_normal((random, self.bridged.cfg.d_model))
        self.random = [self.vector("random", draw / np.linalg.norm(draw)) for draw in draws]

    def vector(self, name, values):
        """float32 [d_model] on the model's device, checked."""
        values = torch.as_tensor(np.asarray(values, np.float32))
        if values.shape != (self.bridged.cfg.d_model,) or not torch.isfinite(values).all():
            raise CausalError(
                f"{name!r} has shape {tuple(values.shape)}: give {self.bridged.cfg.d_model} finite numbers, one for "
                "each dimension of the stream"
            )
        return values.to(self.bridged.original_model.device)

    def check(self, directions: dict) -> dict:
        """The directions with norm 1."""
        found = {name: self.vector(name, values) for name, values in directions.items()}
        if short := [name for name, vector in found.items() if not vector.norm() > 0]:
            raise CausalError(f"direction {short[0]!r} is zero: leave it out")
        return {name: vector / vector.norm() for name, vector in found.items()}

    def beside(self, name: str, unit, amount):
        """A change of the stream by amount(stream) along the named direction, and by as much along the random ones."""
        for kind, along in [("named", unit), *(("random", vector) for vector in self.random)]:
            yield Try(kind, name, 1.0, name, lambda x, along=along: x + amount(x)[..., None] * along)

    def batches(self, sequences):
        return sequences.batches(self.batch_size, self.formatter.pad_id)

    def _streams(self):
        for batch in self.batches(self.sequences):
            yield batch.streams(self.bridged, [self.layer])[:, 0]

    def measure_stream(self) -> None:
        """Set mean float32 [d_model], norm and the number of tokens; read twice: only norms are held for all tokens."""
        norms = torch.cat([x.norm(dim=1) for x in self._streams()])
        if not torch.isfinite(norms).all():
            raise CausalError(f"NaN or infinite streams after block {self.layer}: check the model's weights")
        limit, total, square, count = UNUSUAL * float(norms.median()), 0.0, 0.0, 0
        for x in self._streams():
            x = x[x.norm(dim=1) <= limit].double()
            total, square, count = total + x.sum(0), square + float(x.square().sum()), count + len(x)
        self.tokens, self.mean = len(norms), self.vector("mean", total / count)
        self.norm = float((square / count - (total / count).square().sum()).clamp(min=0).sqrt())

    def score(self, tries: list[Try], kl: bool):
        """log p [1 + tries, sequences] (clean first), KL to clean [tries, sequences], size of the change [tries]."""
        logp = np.zeros((1 + len(tries), len(self.sequences.ids)))
        divergence, square = np.zeros((len(tries), len(self.sequences.ids))), np.zeros(len(tries))
        for batch in self.batches(self.sequences):
            clean = batch.logits(self.bridged)
            wanted = np.flatnonzero(np.isin(batch.rows, self.chosen if kl else []))
            logp[0, batch.rows] = batch.logprobs(clean)
            for number, tried in enumerate(tries):

                def replace(x, number=number, tried=tried):
                    made = tried.replace(x)
                    square[number] += float((made - x).square().sum())
                    return made

                logits = batch.logits(self.bridged, replacing(self.layer, batch.tokens, replace))
                logp[number + 1, batch.rows] = batch.logprobs(logits)
                divergence[number, batch.rows] = batch.kl(logits, clean, wanted)
        return logp, divergence, np.sqrt(square / self.tokens) / max(self.norm, 1e-12)

    def sample(self, replace=None) -> list[list[int]]:
        """Responses to the prompts; the same random numbers whatever the intervention."""
        # The prompt is padded on the left and later steps hold one new token: what answers stands last.
        hooks = [replacing(self.layer, (slice(None), -1), replace)] if replace else []
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
        sequences = Sequences.of(self.prompts, responses, lead=1)
        out = np.zeros(len(sequences.ids))
        for batch in self.batches(sequences):
            changed = batch.logits(self.bridged, replacing(self.layer, batch.tokens, replace))
            out[batch.rows] = batch.kl(changed, batch.logits(self.bridged), np.arange(len(batch.rows)))
        return out[sequences.place]
