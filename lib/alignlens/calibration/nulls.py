"""Known answers: data about which the right result is known before any instrument looks."""

from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """Two float32 arrays [pairs, layers, d_model], accepted wherever activations are."""

    chosen: np.ndarray
    rejected: np.ndarray


def gaussian_pairs(n_pairs: int, layers: int, d_model: int, *, seed: int = 0) -> Pairs:
    """Chosen and rejected drawn independently from N(0, 1): no instrument may tell them apart."""
    rng = np.random.default_rng(seed)
    return Pairs(*(rng.standard_normal((n_pairs, layers, d_model), dtype=np.float32) for _ in Pairs._fields))


def planted_pairs(n_pairs: int, layers: int, d_model: int, *, layer: int, strength: float, seed: int = 0):
    """Gaussian pairs, chosen moved by `strength` along one unit direction at one layer; returns them and the direction.

    chosen - rejected is N(strength, 2) along it, so with Phi the normal CDF the best linear probe there has accuracy
    Phi(strength / sqrt 2) and AUROC Phi(strength); elsewhere both are 0.5. IndexError if there is no such layer."""
    pairs = gaussian_pairs(n_pairs, layers, d_model, seed=seed)
    direction = np.random.default_rng([seed, 1]).standard_normal(d_model).astype(np.float32)
    direction /= np.linalg.norm(direction)
    pairs.chosen[:, layer] += np.float32(strength) * direction
    return pairs, direction


def rotated_copy(x: np.ndarray, degrees: float, *, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Turn `x` [..., d] by `degrees` in d // 2 random orthogonal planes (odd d: one direction stays), times `scale`."""
    frame = np.linalg.qr(np.random.default_rng(seed).standard_normal((x.shape[-1],) * 2))[0]
    coordinates, half = x.astype(np.float64) @ frame, x.shape[-1] // 2
    first, second = coordinates[..., :half].copy(), coordinates[..., half : 2 * half].copy()
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    coordinates[..., :half] = cosine * first - sine * second
    coordinates[..., half : 2 * half] = sine * first + cosine * second
    return (scale * coordinates @ frame.T).astype(x.dtype)
