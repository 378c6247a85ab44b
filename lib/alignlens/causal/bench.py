"""A model on which interventions are tried: what they do to log-probabilities and to samples."""

import numpy as np
import torch

from alignlens import models
from alignlens.activations import Sequences, ready, replacing
from alignlens.core.errors import CausalError
from alignlens.core.statistics import by_group, resample

UNUSUAL = 10  # times the median norm: such tokens (the first of a text, some line breaks) would set the scale alone


def score(bridges, sequences: Sequences, compared, hooks, count: int, batch_size: int, pad_id: int):
    """Log p [models + count, sequences] of clean models, then of the first under each hook of hooks(batch), nats;
    and KL(hooked || clean model) [models, count, sequences], nats, of the sequences ``compared``, else 0."""
    logp = np.zeros((len(bridges) + count, len(sequences.ids)))
    divergence = np.zeros((len(bridges), count, len(sequences.ids)))
    for batch in sequences.batches(batch_size, pad_id):
        wanted = np.flatnonzero(np.isin(batch.rows, compared))
        clean = [batch.logits(bridged) for bridged in bridges]
        logp[: len(bridges), batch.rows] = [batch.logprobs(logits) for logits in clean]
        for number, hook in enumerate(hooks(batch)):
            logits = batch.logits(bridges[0], hook)
            logp[len(bridges) + number, batch.rows] = batch.logprobs(logits)
            divergence[:, number, batch.rows] = [batch.kl(logits, other, wanted) for other in clean]
    return logp, divergence


def bootstrapped(values: np.ndarray, groups, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of float [rows, items] over items, and over draws of their groups: [rows], [draws, rows]."""
    sums, counts = by_group(values.T, groups)
    weights = resample(len(sums), draws, seed)
    return values.mean(1), weights @ sums / (weights @ counts)


class Bench:
    """The model with its pairs and, at the tokens that are changed, the clean stream's mean and norm."""

    def __init__(self, model, formatter, pairs, layer, random, sampled, response_tokens, batch_size, seed):
        encoded = formatter.encode_pairs(pairs)
        self.sequences = Sequences.of(encoded.prompt_ids * 2, encoded.chosen_ids + encoded.rejected_ids, lead=1)
        self.chosen, self.rejected = self.sequences.place.reshape(2, -1)
        self.prompt_id, self.formatter = encoded.prompt_id, formatter
        self.batch_size, self.seed = batch_size, seed
        ends = {"end_id": formatter.end_id, "pad_id": formatter.pad_id}
        self.sampling = ends | {"max_new_tokens": response_tokens, "batch_size": batch_size}
        first = np.sort(np.unique(encoded.prompt_id, return_index=True)[1])[:sampled]
        self.prompts, self.texts = ([found[i] for i in first] for found in (encoded.prompt_ids, encoded.prompts))
        longest = [ids + [0] * response_tokens for ids in self.prompts]
        self.bridged, (self.layer,) = ready(model, self.sequences.ids + longest, layer)
        draws = np.random.default_rng([seed, 1]).standard_normal((random, self.bridged.cfg.d_model))
        self.random = [self.vector("random", draw / np.linalg.norm(draw)) for draw in draws]

    def vector(self, name, values):
        values, width = torch.as_tensor(np.asarray(values, np.float32)), self.bridged.cfg.d_model
        if values.shape != (width,) or not torch.isfinite(values).all():
            raise CausalError(f"{name!r} has shape {tuple(values.shape)}: give {width} finite numbers")
        return values.to(self.bridged.original_model.device)

    def check(self, directions: dict) -> dict:
        """The directions with norm 1."""
        found = {name: self.vector(name, values) for name, values in directions.items()}
        if short := [name for name, vector in found.items() if not vector.norm() > 0]:
            raise CausalError(f"direction {short[0]!r} is zero: leave it out")
        return {name: vector / vector.norm() for name, vector in found.items()}

    def beside(self, name: str, unit, amount):
        """Changes of the stream by amount(stream) along the named direction, and by as much along the random ones."""
        for kind, along in [("named", unit), *(("random", vector) for vector in self.random)]:
            yield kind, name, 1.0, name, lambda x, along=along: x + amount(x)[..., None] * along

    def streams(self):
        """The clean streams at the tokens that are changed: a float32 [tokens, d_model] a batch."""
        for batch in self.sequences.batches(self.batch_size, self.formatter.pad_id):
            yield batch.streams(self.bridged, [self.layer])[:, 0]

    def measure_stream(self) -> None:
        """Set mean, norm and tokens of the clean stream; read twice: only norms are held for all tokens at once."""
        norms = torch.cat([x.norm(dim=1).cpu() for x in self.streams()])
        if not torch.isfinite(norms).all():
            raise CausalError(f"NaN or infinite streams after block {self.layer}: check the model's weights")
        limit, total, square, count = UNUSUAL * float(norms.median()), 0.0, 0.0, 0
        for x in self.streams():
            x = x[x.norm(dim=1) <= limit].cpu().double()
            total, square, count = total + x.sum(0), square + float(x.square().sum()), count + len(x)
        self.tokens, self.mean = len(norms), self.vector("mean", total / count)
        self.norm = float((square / count - (total / count).square().sum()).clamp(min=0).sqrt())

    def sizes(self, changes) -> np.ndarray:
        """Root-mean-square size of each change, in units of the stream's norm: float64 [changes]."""
        square = sum(np.array([float((change(x) - x).square().sum()) for change in changes]) for x in self.streams())
        return np.sqrt(square / self.tokens) / max(self.norm, 1e-12)

    def score(self, sequences, compared, changes):
        return score(
            [self.bridged], sequences, compared,
            lambda batch: [replacing(self.layer, batch.tokens, change) for change in changes],
            len(changes), self.batch_size, self.formatter.pad_id,
        )  # fmt: skip

    def sample(self, change=None) -> list[list[int]]:
        """Responses to prompts (padded on the left: what answers stands last), with the same random numbers always."""
        hooks, made = [replacing(self.layer, (slice(None), -1), change)] if change else [], []
        with self.bridged.hooks(fwd_hooks=hooks):
            for start in range(0, len(self.prompts), self.batch_size):  # a seed a batch, however long the last one ran
                prompts, options = self.prompts[start : start + self.batch_size], self.sampling
                made += models.sample(self.bridged.original_model, prompts, seed=self.seed + start, **options)
        return made
