"""Directions from which latents that hardly fire start again: those that rows of the error share."""

import math

import torch
from torch.nn.functional import normalize

ROWS = 32_768  # looked at
RARE = 5  # firings in ROWS below which a latent is free to start again: about the density that reads as dead
TWIN = 0.8  # cosine from which two directions are one
MOST = 1024  # latents started again at once
SHARING = 50  # rows that must have a direction in common before a latent starts from it


def missing_directions(error: torch.Tensor, known: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """At most ``count`` unit directions [.., D] of the error [n, D] that neither each other nor the known ones repeat.

    The same direction twice, or one that a live latent has already, would only be split.
    """
    if not 0 < float(error.square().sum()) < math.inf:  # nothing is left to explain, or the training diverged
        return error[:0]
    found = shared_directions(error, count, draw)
    alike = (found @ torch.cat([known, found]).T) > TWIN
    return found[~alike.tril(len(known) - 1).any(1)]


def shared_directions(error: torch.Tensor, count: int, draw: torch.Generator, rounds: int = 10) -> torch.Tensor:
    """Unit directions [count, D] along which some rows of the error lie far out: candidates for missing latents.

    From single rows, drawn by their energy, by power iteration over the ``SHARING`` rows that lie furthest along each
    direction: a sparse direction is a fixed point of that step, a mixture is not.
    """
    energy, found = error.square().sum(1).cpu(), []
    few = count > int((energy > 0).sum())
    start = torch.multinomial(energy, count, replacement=few, generator=draw)
    for v in normalize(error[start]).split(256):
        for _ in range(rounds):
            along = (error @ v.T).relu()
            v = normalize((along * (along > sharing_cut(along))).T @ error)
        found.append(v)
    return torch.cat(found)


def sharing_cut(along: torch.Tensor) -> torch.Tensor:
    """The value in each column [n, directions] above which its ``SHARING`` furthest rows lie."""
    return along.kthvalue(max(1, len(along) - SHARING), dim=0).values
