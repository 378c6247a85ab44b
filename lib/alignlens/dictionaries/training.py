"""Training: BatchTopK or an L1 penalty, every gradient in closed form on the kept codes alone; least squares at the
end.

BatchTopK (Bussmann et al., arXiv 2412.06410; for crosscoders Minder et al., arXiv 2504.02922) keeps the k x rows
largest codes of a batch, a few percent of all, so only the encoder's product is dense."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from alignlens.core.errors import DictionaryError
from alignlens.dictionaries.model import CHUNK, Config, Dictionary, Joined, join, moments, unit

CALIBRATION_ROWS = 65_536  # from which the fixed threshold is told
RESEED_ROWS, RARE = 32_768, 5  # firings in so many rows below which a latent may start again: about as rare as dead
TWIN, MOST = 0.8, 1024  # cosine from which two directions are one; latents started again at once
WORSE, RIDGE = 1.05, 0.1  # error after / before refitting above which it is dropped; of the mean code energy
REFIT_ROWS, ROWS_A_LATENT = 98_304, 64  # at most; enough that a latent's row is the mean of many firings
SHARING = 50  # rows that must have a direction in common before a latent starts from it


class Codes:
    """Kept codes of a batch: row, column and value of each, ordered by row."""

    def __init__(self, rows, columns, values, shape):
        self.rows, self.columns, self.values, self.shape = rows, columns, values, shape
        self.dense = len(values) > 0.1 * math.prod(shape)  # so many that plain matrices are faster, as with L1

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """[n, w] of the values at the codes' places, sparse unless ``dense``."""
        if self.dense:
            return torch.zeros(self.shape, device=values.device).index_put_((self.rows, self.columns), values)
        return _csr(self.rows, self.columns, values, self.shape)

    def transposed(self, values: torch.Tensor) -> torch.Tensor:
        if self.dense:
            return self.matrix(values).T
        order = torch.argsort(self.columns, stable=True)
        return _csr(self.columns[order], self.rows[order], values[order], self.shape[::-1])

    def along(self, gradient: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
        """Products of each code's row of ``gradient`` [n, D] and its latent's decoder row: [codes]."""
        if self.dense:
            return (gradient @ decoder.T)[self.rows, self.columns]
        return (gradient[self.rows] * decoder[self.columns]).sum(1)


def _csr(rows, columns, values, shape) -> torch.Tensor:
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():  # torch says once a process that such tensors are in beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def on_support(target: torch.Tensor, codes: Codes, decoder: torch.Tensor, rounds: int = 15) -> torch.Tensor:
    """Values of the codes that rebuild target [n, D] (without the decoder's bias) best, by projected gradient steps."""
    out = torch.empty_like(codes.values)
    places = torch.searchsorted(codes.rows, torch.arange(0, len(target) + 512, 512, device=codes.rows.device))
    for i, (first, last) in enumerate(itertools.pairwise(places.tolist())):  # small pieces stay in the cache
        x, columns = target[512 * i : 512 * (i + 1)], codes.columns[first:last]
        rows, values, latents = codes.rows[first:last] - 512 * i, codes.values[first:last], decoder[columns]
        for _ in range(rounds):
            error = x - _csr(rows, columns, values, (len(x), len(decoder))) @ decoder
            # Below 1 because latents that fire together overlap; 15 such steps leave under 1 % of what is to be gained.
            values = (values + 0.7 * (error[rows] * latents).sum(1)).clamp(min=0)
        out[first:last] = values
    return out


def train(streams, config: Config | None = None, *, facts: dict | None = None, device: str = "cpu") -> Dictionary:
    """Train a dictionary on named streams: name -> [rows, d] or [rows, layers, d], row i the same token in all.
    {"base": x} is a sparse autoencoder, {"base": x, "aligned": y} a crosscoder; memory-mapped arrays are read batch by
    batch. facts : kept, for ``Dictionary.load`` to check. Raises DictionaryError for streams that do not fit each
    other, hold NaN, or are fewer rows than a batch; for settings out of range; and if training diverges."""
    c, joined = config or Config(), join(streams)
    shapes, rows = {name: tuple(x.shape[1:]) for name, x in streams.items()}, len(joined)
    least = min(c.learning_rate, c.epochs, c.batch_size, 1 if c.steps is None else c.steps)
    alike, shares = len(shapes) > 1 and len(set(shapes.values())) == 1, (c.shared, c.warmup, c.decay)
    problems = {
        "activation must be batchtopk or l1": c.activation not in ("batchtopk", "l1"),
        f"k {c.k} must lie between 0 and width {c.width}": not 0 < c.k <= c.width,
        f"{rows} rows cannot fill a batch of {c.batch_size}: give more, or a smaller batch_size": rows < c.batch_size,
        "learning_rate, epochs, batch_size and steps must be positive": least <= 0,
        "shared, warmup and decay must lie between 0 and 1": not all(0 <= x <= 1 for x in shares),
        f"shared must be 0 for one stream, or streams of different shapes {shapes}": c.shared and not alike,
    }
    if found := [words for words, wrong in problems.items() if wrong]:
        raise DictionaryError(f"dictionary config: {'; '.join(found)}")
    trainer = Trainer(joined, shapes, c, device)
    trainer.run()
    found = dataclasses.replace(trainer.folded(), facts=facts or {})
    return refit(found, joined, trainer.scale, trainer.order(-2)) if c.refit else found


class Trainer:
    """Weights, optimiser and counters of one training; ``step`` is the whole algorithm."""

    def __init__(self, joined: Joined, shapes: dict, config: Config, device: str):
        self.joined, self.shapes, self.config, self.device = joined, shapes, config, device
        mean, variance = moments(joined)
        # Every stream and layer gets the same energy, or only the one with the largest norm would count.
        sizes = [shape[-1] for shape in shapes.values() for _ in range(math.prod(shape[:-1]))]
        energy = torch.stack([part.sum().sqrt() for part in variance.split(sizes)])
        energy[energy == 0] = 1  # constant: rounding must not be blown up
        self.mean, self.scale = mean.float(), energy.repeat_interleave(torch.tensor(sizes)).float()
        if config.published:
            self.mean, self.scale = torch.zeros_like(self.mean), torch.ones_like(self.scale)
        self.sizes = [math.prod(shape) for shape in shapes.values()]
        draw = torch.Generator().manual_seed(config.seed)
        # All streams start with the same decoder row: what differs afterwards, the data made differ.
        copies = len(self.sizes) if len(set(self.sizes)) == 1 else 1
        start = [torch.randn(config.width, size, generator=draw) for size in self.sizes[::copies]]
        decoder = torch.cat(start * copies, dim=1)
        decoder /= decoder.norm(dim=1, keepdim=True) / (0.1 if config.published else 1.0)
        self.decoder = decoder.to(device)
        self.encoder = self.decoder.clone()  # [w, D]: a latent's row is contiguous, as the sparse gradients want it
        self.encoder_bias, self.decoder_bias = (torch.zeros(size, device=device) for size in decoder.shape)
        self.weights = [self.encoder, self.decoder, self.encoder_bias, self.decoder_bias]
        self.optimizer = torch.optim.Adam([w.requires_grad_() for w in self.weights], config.learning_rate, fused=True)
        self.silent = torch.zeros(config.width, dtype=torch.int64, device=device)
        self.threshold, self.at, self.log, self.tied = 0.0, 0, [], round(config.shared * config.width)
        self.batches = len(joined) // config.batch_size
        self.steps = min(config.steps or 2**62, max(1, round(config.epochs * self.batches)))
        shares = np.linspace(0.25, 0.75, config.reseed) if config.reseed > 1 else np.full(config.reseed, 0.5)
        self.reseed_at = {max(1, int(share * self.steps)) for share in shares}

    def draw(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.config.seed + place)

    def order(self, epoch: int) -> torch.Tensor:
        """Rows in the order of an epoch; negative ones are samples for other ends."""
        return torch.randperm(len(self.joined), generator=self.draw(epoch))

    def take(self, which: torch.Tensor) -> torch.Tensor:
        """Rows in training's units, [n, D]."""
        return ((self.joined.read(which.numpy()) - self.mean) / self.scale).to(self.device)

    @torch.no_grad()
    def run(self) -> None:
        config, every = self.config, max(1, self.steps // 50)
        for at in range(self.steps):
            self.at, (epoch, place) = at, divmod(at, self.batches)
            if place == 0:
                order = self.order(epoch)
            if at in self.reseed_at:
                self._reseed(order)
            found = self.step(self.take(order[place * config.batch_size :][: config.batch_size]))
            if at % every == 0 or at == self.steps - 1:
                if not math.isfinite(found["loss"]):
                    raise DictionaryError(f"training diverged at step {at}: lower learning_rate {config.learning_rate}")
                self.log.append({"step": at, **found})

    def step(self, x: torch.Tensor) -> dict:
        """One batch: keep the largest codes, follow the gradient of the squared error at them. Returns the losses."""
        config, n = self.config, len(x)
        rise = min(1.0, (self.at + 1) / (config.warmup * self.steps + 1))
        fall = min(1.0, (self.steps - self.at) / (config.decay * self.steps)) if config.decay else 1.0
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * rise * fall
        # As in SAELens, the published autoencoder takes the decoder's bias off its input.
        seen = x - self.decoder_bias if config.published else x
        pre = torch.addmm(self.encoder_bias, seen, self.encoder.T)
        codes = self._keep_largest(pre)
        error = x - self.decoder_bias - codes.matrix(codes.values) @ self.decoder
        gradient = error * (-2.0 / n)
        to_code = codes.along(gradient, self.decoder)
        self.decoder.grad = codes.transposed(codes.values) @ gradient
        if config.activation == "l1":
            to_code = self._penalise(codes, to_code, n)
        self.encoder.grad = codes.transposed(to_code) @ seen
        self.encoder_bias.grad = torch.zeros_like(self.encoder_bias).index_add_(0, codes.columns, to_code)
        self.decoder_bias.grad = gradient.sum(0)
        self.silent += n
        self.silent[codes.columns] = 0
        dead = torch.nonzero(self.silent > config.dead_after)[:, 0]
        if config.aux_weight and len(dead):
            self._revive(dead, seen, pre, error)
        if config.published:  # the bias that was taken off the input, for both losses
            self.decoder_bias.grad -= self.encoder_bias.grad @ self.encoder
        self._project()
        self.optimizer.step()
        if not config.published:
            self.decoder /= self.decoder.norm(dim=1, keepdim=True)
        return {"loss": float(error.square().sum(1).mean()), "l0": len(codes.values) / n, "dead": len(dead)}

    def _keep_largest(self, pre: torch.Tensor) -> Codes:
        """The k x n largest positive codes of the batch; all positive ones with the L1 penalty."""
        wanted = int(self.config.k * len(pre))
        score = pre * self.decoder.norm(dim=1) if self.config.published else pre  # else the rows have norm 1
        # Most codes lie far below the last threshold: looking at the others alone saves sorting the whole batch.
        rows, columns = torch.nonzero(score > 0.6 * self.threshold, as_tuple=True)
        if self.config.activation == "batchtopk":
            if len(rows) < wanted:
                rows, columns = torch.nonzero(score > 0, as_tuple=True)
            values, cut = score[rows, columns], 0.0
            if len(values) > wanted:
                cut = float(values.kthvalue(len(values) - wanted).values)
                rows, columns = rows[values > cut], columns[values > cut]
            self.threshold = 0.99 * self.threshold + 0.01 * cut if self.config.published and self.at else cut
        return Codes(rows, columns, pre[rows, columns], pre.shape)

    def _penalise(self, codes: Codes, to_code: torch.Tensor, n: int) -> torch.Tensor:
        """Gradient of l1 x code x (sum of the streams' decoder norms): shrinks codes, favours exclusive latents."""
        parts = self.decoder.split(self.sizes, dim=1)
        norms = torch.stack([part.norm(dim=1) for part in parts], dim=1)
        mean_code = torch.zeros_like(self.encoder_bias).index_add_(0, codes.columns, codes.values) / n
        direction = torch.cat([p / m.clamp(min=1e-6)[:, None] for p, m in zip(parts, norms.T, strict=True)], dim=1)
        weight = self.config.l1 * min(1.0, (self.at + 1) / (0.2 * self.steps))
        self.decoder.grad += weight * mean_code[:, None] * direction
        return to_code + weight / n * norms.sum(1)[codes.columns]

    def _revive(self, dead: torch.Tensor, seen: torch.Tensor, pre: torch.Tensor, error: torch.Tensor) -> None:
        """Add the gradient of the auxiliary loss: dead latents rebuild the error that the live ones leave."""
        config, decoder = self.config, self.decoder[dead]
        weight = config.aux_weight * (min(1.0, len(dead) / config.aux_k) if config.published else 1.0)
        values, places = pre[:, dead].topk(min(config.aux_k, len(dead)), dim=1)
        codes = torch.zeros(len(pre), len(dead), device=self.device).scatter_(1, places, values.relu())
        gradient = (error - codes @ decoder) * (-2.0 * weight / len(pre))
        to_code = (gradient @ decoder.T) * (codes > 0)
        self.decoder.grad.index_add_(0, dead, codes.T @ gradient)
        self.encoder.grad.index_add_(0, dead, to_code.T @ seen)
        self.encoder_bias.grad.index_add_(0, dead, to_code.sum(0))

    def _project(self) -> None:
        if self.tied:  # designated shared latents: one row for all streams, moved by the sum of its gradients
            tied = self.decoder.grad[: self.tied]
            tied[:] = sum(tied.split(self.sizes, dim=1)).repeat(1, len(self.sizes))
        if not self.config.published:  # no step along the row: its length is the code's business
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad -= along * self.decoder

    def _reseed(self, order: torch.Tensor) -> None:
        """Start latents that hardly fire again where the others leave a common error."""
        x = self.take(order[:RESEED_ROWS])
        pre = torch.addmm(self.encoder_bias, x, self.encoder.T)
        places = torch.nonzero(pre > max(self.threshold, 1e-9), as_tuple=True)
        codes, fired = Codes(*places, pre[places], pre.shape), torch.bincount(places[1], minlength=self.config.width)
        free = torch.nonzero(fired[self.tied :] < RARE)[:MOST, 0] + self.tied
        if not len(free):
            return
        error = x - self.decoder_bias
        error -= codes.matrix(on_support(error, codes, self.decoder)) @ self.decoder
        if not 0 < float(error.square().sum()) < math.inf:  # nothing to explain, or diverged
            return
        found, known = shared_directions(error, len(free), self.draw(self.at)), self.decoder[fired >= RARE]
        # The same direction twice, or one that a live latent has already, would only be split.
        alike = (found @ torch.cat([known, found]).T) > TWIN
        found = found[~alike.tril(len(known) - 1).any(1)]
        free = free[: len(found)]
        self.encoder[free] = self.decoder[free] = found
        # They begin by firing on the rows that lie furthest along them, not on every row that leans their way.
        self.encoder_bias[free] = self.threshold - _sharing_cut(x @ found.T)
        self.silent[free] = 0
        for weight, moment in itertools.product(self.weights[:3], ("exp_avg", "exp_avg_sq")):
            self.optimizer.state[weight][moment][free] = 0

    @torch.no_grad()
    def folded(self) -> Dictionary:
        """The dictionary in the streams' own units, with a threshold that fires as often as the batches' own did."""
        encoder, decoder, bias, decoder_bias = (weight.detach().cpu() for weight in self.weights)
        threshold, published = self.threshold, self.config.published
        weigh = decoder.norm(dim=1).clamp(min=1e-12) if published else torch.ones(self.config.width)
        if published:
            bias = bias - encoder @ decoder_bias
        elif self.config.activation == "batchtopk":
            threshold = self._fixed_threshold(encoder, bias)
        norms = (decoder * self.scale).norm(dim=1).clamp(min=1e-12)  # of decoder rows, which get norm 1
        weights = {
            "encoder": ((encoder / self.scale) * norms[:, None]).T.contiguous(),
            "encoder_bias": (bias - (encoder / self.scale) @ self.mean) * norms,
            "decoder": (decoder * self.scale) / norms[:, None],
            "decoder_bias": decoder_bias * self.scale + self.mean,
            "threshold": threshold / weigh * norms,
        }
        arrays = {name: weight.numpy() for name, weight in weights.items()}
        return Dictionary(**arrays, shapes=self.shapes, config=self.config, history=pd.DataFrame(self.log))

    def _fixed_threshold(self, encoder: torch.Tensor, bias: torch.Tensor) -> float:
        """The value above which k codes a row lie, over a sample of rows."""
        sample, kept = self.order(-1)[:CALIBRATION_ROWS], torch.empty(0)
        wanted = int(self.config.k * len(sample))
        for part in sample.split(CHUNK):
            pre = torch.addmm(bias, self.take(part).cpu(), encoder.T).flatten()
            kept = torch.cat([kept, pre[pre > (kept.min() if len(kept) == wanted else 0)]])
            if len(kept) > wanted:
                kept = kept.topk(wanted, sorted=False).values
        return float(kept.min()) if len(kept) == wanted else 0.0


def shared_directions(error: torch.Tensor, count: int, draw: torch.Generator, rounds: int = 10) -> torch.Tensor:
    """Unit directions [count, D] along which some rows of the error [n, D] lie far out: candidates for new latents. By
    power iteration, from single rows drawn by their energy, over the ``SHARING`` rows that lie furthest along each
    direction: a sparse direction is a fixed point of that step, a mixture is not."""
    energy, found = error.square().sum(1).cpu(), []
    few = count > int((energy > 0).sum())
    start = torch.multinomial(energy, count, replacement=few, generator=draw)
    for v in normalize(error[start]).split(256):
        for _ in range(rounds):
            along = (error @ v.T).relu()
            v = normalize((along * (along > _sharing_cut(along))).T @ error)
        found.append(v)
    return torch.cat(found)


def _sharing_cut(along: torch.Tensor) -> torch.Tensor:
    """The value in each column [n, directions] above which its ``SHARING`` furthest rows lie."""
    return along.kthvalue(max(1, len(along) - SHARING), dim=0).values


def refit(dictionary: Dictionary, joined: Joined, scale: torch.Tensor, order: torch.Tensor) -> Dictionary:
    """Decoder rows that rebuild a sample of rows best, codes being solved for on the latents that fire. A ridge towards
    the trained rows decides what the data leave open: how latents that fire together share a direction. Where most is
    left open (few rows for the width, codes far from sparse) the result would rebuild worse than the trained rows, by
    the codes as the encoder gives them: then these stay. facts["refit"] says which it was."""
    sample = np.sort(order[: min(ROWS_A_LATENT * dictionary.width, REFIT_ROWS)].numpy())
    decoder, bias = (torch.from_numpy(a.copy()) for a in (dictionary.decoder, dictionary.decoder_bias))
    for _ in range(dictionary.config.refit):
        scaled = decoder / scale  # codes are solved for in training's units, where streams and layers count the same
        norms = scaled.norm(dim=1, keepdim=True).clamp(min=1e-12)
        gram, product = _normal_equations(dictionary, joined.chunks(sample), bias, scale, scaled / norms, norms)
        live = np.flatnonzero(np.diag(gram)[:-1] > 0)
        solve = np.append(live, len(gram) - 1)
        inner = gram[np.ix_(solve, solve)]
        ridge = RIDGE * np.diag(inner)[:-1].mean()
        inner[np.diag_indices(len(live))] += ridge
        before = (decoder / norms).numpy()[live]  # a row as a code of training's units is multiplied with
        solved = np.linalg.solve(inner, product[solve] + np.vstack([ridge * before, np.zeros((1, len(scale)))]))
        decoder[live], bias = (torch.from_numpy(part).float() for part in (unit(solved[:-1]), solved[-1]))
    # Rows keep norm 1 in training's units; in their own the codes take it up.
    stretch = (torch.from_numpy(dictionary.decoder) / scale).norm(dim=1) / (decoder / scale).norm(dim=1)
    codes = {name: getattr(dictionary, name) * stretch.numpy() for name in ("encoder", "encoder_bias", "threshold")}
    found = dataclasses.replace(dictionary, decoder=decoder.numpy(), decoder_bias=bias.numpy(), **codes)
    x = joined.read(sample[:CHUNK])
    rebuilt = (torch.from_numpy(d.decode(d.code(x))) for d in (dictionary, found))
    before, after = (float(((x - y) / scale).square().sum()) for y in rebuilt)
    better = after <= WORSE * before
    return dataclasses.replace(found if better else dictionary, facts=dictionary.facts | {"refit": better})


def _normal_equations(dictionary: Dictionary, chunks, bias, scale, decoder, norms) -> tuple[np.ndarray, np.ndarray]:
    """float64 (F'F [w + 1, w + 1], F'x [w + 1, D]) of codes F, with a last column of ones for the bias."""
    w = dictionary.width
    gram, product = np.zeros((w + 1, w + 1)), np.zeros((w + 1, len(bias)))
    for x in chunks:
        found = dictionary.code(x)
        rows, columns = (torch.from_numpy(i).long() for i in found.tocoo().coords)
        codes = Codes(rows, columns, torch.from_numpy(found.data) * norms[columns, 0], found.shape)
        found.data = on_support((x - bias) / scale, codes, decoder).double().numpy()
        gram[:w, :w] += (found.T @ found).toarray()
        gram[w, :w] += found.sum(0)
        gram[w, w] += len(x)
        product[:w] += found.T @ x.double().numpy()
        product[w] += x.double().sum(0).numpy()
    gram[:w, w] = gram[w, :w]
    return gram, product
