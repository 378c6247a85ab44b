"""Products and least squares on the kept codes of a batch, and the decoder rows that rebuild best."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import torch

from alignlens.dictionaries.model import CHUNK, Dictionary, Joined, unit

WORSE = 1.05  # error after refitting over error before, above which the trained rows stay
RIDGE = 0.1  # of the mean code energy of a latent
ROWS, ROWS_A_LATENT = 98_304, 64  # at most; enough that a latent's row is the mean of many firings


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


def refit(dictionary: Dictionary, joined: Joined, scale: torch.Tensor, order: torch.Tensor) -> Dictionary:
    """Decoder rows that rebuild a sample of rows best, codes being solved for on the latents that fire.

    A ridge towards the trained rows decides what the data leave open: how latents that fire together share a direction.
    Where most is left open (few rows for the width, codes far from sparse) the result would rebuild worse than the
    trained rows, by the codes as the encoder gives them: then these stay. facts["refit"] says which it was."""
    sample = np.sort(order[: min(ROWS_A_LATENT * dictionary.width, ROWS)].numpy())
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
