"""Kept codes of a batch, a few percent of all: products and least squares on them alone."""

import itertools
import math
import warnings

import torch


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
        """[w, n], sparse unless ``dense``."""
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
    """Values of the codes that rebuild each row best with the latents that fire on it, by projected gradient steps.

    target [n, D] : rows without the decoder's bias; decoder rows have norm 1.
    """
    out = torch.empty_like(codes.values)
    places = torch.searchsorted(codes.rows, torch.arange(0, len(target) + 512, 512, device=codes.rows.device))
    for i, (first, last) in enumerate(itertools.pairwise(places.tolist())):  # small pieces stay in the cache
        x, columns = target[512 * i : 512 * (i + 1)], codes.columns[first:last]
        rows, values = codes.rows[first:last] - 512 * i, codes.values[first:last]
        latents = decoder[columns]
        for _ in range(rounds):
            error = x - _csr(rows, columns, values, (len(x), len(decoder))) @ decoder
            # Below 1 because latents that fire together overlap; 15 such steps leave under 1 % of what is to be gained.
            values = (values + 0.7 * (error[rows] * latents).sum(1)).clamp(min=0)
        out[first:last] = values
    return out
