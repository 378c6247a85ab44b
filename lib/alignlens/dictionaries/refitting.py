"""Least squares for a trained decoder: codes solved for on the latents that fire, then the rows that rebuild best."""

import dataclasses

import numpy as np
import torch

from alignlens.dictionaries.model import Dictionary
from alignlens.dictionaries.streams import CHUNK, Joined, unit
from alignlens.dictionaries.support import Codes, on_support

WORSE = 1.05  # error after refitting over error before, above which the trained rows stay
RIDGE = 0.1  # of the mean code energy of a latent
ROWS = 98_304  # at most
ROWS_A_LATENT = 64  # enough that a latent's row is the mean of many firings


def refit(dictionary: Dictionary, joined: Joined, scale: torch.Tensor, order: torch.Tensor) -> Dictionary:
    """Decoder rows that rebuild a sample of rows best, codes being solved for on the latents that fire.

    A ridge towards the trained rows decides what the data leave open: how latents that fire together share a direction.
    Where most is left open (few rows for the width, codes far from sparse) the result would rebuild worse than the
    trained rows, by the codes as the encoder gives them: then these stay. facts["refit"] says which it was.
    """
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
        wanted = product[solve] + np.vstack([ridge * before, np.zeros((1, decoder.shape[1]))])
        solved = np.linalg.solve(inner, wanted)
        decoder[live], bias = (torch.from_numpy(part).float() for part in (unit(solved[:-1]), solved[-1]))
    # Rows keep norm 1 in training's units, where streams and layers count the same; in their own the codes take it up.
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
