"""Which latents base and aligned share, and how."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd

from alignlens.core.errors import DictionaryError
from alignlens.dictionaries.model import Dictionary
from alignlens.dictionaries.streams import STREAMS, Joined, join, unit

LABELS = ("dead", "base_only", "aligned_only", "shared_same", "shared_rotated", "shared_attenuated")


@dataclass(frozen=True)
class Cuts:
    """Where labels begin: one set for all runs, fixed before any was read.

    dead : a latent that fires on a smaller share of rows (or fewer than ``few`` of them) is dead: too rare to read.
    exclusive : rho below it is base_only, above 1 - it aligned_only (a norm ratio of 4), if latent scaling agrees.
    scaling : nu of the other stream must lie below it, or that stream does hold the latent and it is no exclusive one.
    rotated : degrees between the two decoder rows from which a shared latent counts as rotated.
    attenuated : norm ratio (of the weaker to the stronger) below which it counts as attenuated.
    """

    dead: float = 1e-4
    few: int = 10
    exclusive: float = 0.2
    scaling: float = 0.5
    rotated: float = 20.0
    attenuated: float = 0.8


CUTS = Cuts()


def classify(dictionary: Dictionary, streams) -> pd.DataFrame:
    """Which latents base and aligned share, and how; one row a latent of a crosscoder on streams base and aligned.

    Returns
    -------
    DataFrame, one row a latent. rho : |aligned row| / (|base row| + |aligned row|); theta : cosine of the two rows, and
    ``degrees``, its angle; ratio : |aligned row| / |base row|; density : share of rows on which the latent fires.
    nu_base, nu_aligned : latent scaling (Minder et al., arXiv 2504.02922): how much of the latent, read along the
    *other* stream's row, stands in this stream all the same, relative to the other stream: the larger of ``_error``
    (what the reconstruction left out) and ``_reconstruction`` (what other latents write instead). Near 0 for a latent
    that this stream truly lacks, near 1 where the latent was only not written. label : see ``LABELS`` and ``Cuts``;
    rotation is asked before attenuation. attrs["cuts"] holds the cuts.

    A window's norms are taken over all its layers. Raises DictionaryError if the streams are not base and aligned.
    """
    if set(dictionary.shapes) != set(STREAMS) or len(set(dictionary.shapes.values())) > 1:
        read = ", ".join(dictionary.shapes)
        raise DictionaryError(f"classify compares the streams base and aligned; this dictionary reads {read}")
    joined = join(streams, dictionary.shapes)
    rows = {name: r.reshape(dictionary.width, -1).astype(np.float64) for name, r in dictionary.rows().items()}
    base, aligned = (np.linalg.norm(rows[name], axis=1) for name in STREAMS)
    theta = np.clip((rows["base"] * rows["aligned"]).sum(1) / np.maximum(base * aligned, 1e-24), -1, 1)
    fired, nu = _latent_scaling(dictionary, joined, rows)
    columns = {
        "latent": np.arange(dictionary.width), "rho": aligned / np.maximum(base + aligned, 1e-24), "theta": theta,
        "degrees": np.degrees(np.arccos(theta)), "ratio": aligned / np.maximum(base, 1e-12),
        "density": fired / len(joined),
    }  # fmt: skip
    table = pd.DataFrame(columns | nu)
    table["label"] = label(table, len(joined))
    table.attrs["cuts"] = dataclasses.asdict(CUTS)
    return table


def label(table: pd.DataFrame, n_rows: int, cuts: Cuts = CUTS) -> np.ndarray:
    """Labels [latents] of a ``classify`` table under any cuts: what a sensitivity analysis varies."""
    weaker = np.minimum(table.ratio, 1 / table.ratio.clip(lower=1e-12))
    rules = {
        "dead": (table.density < cuts.dead) | (table.density * n_rows < cuts.few),
        "base_only": (table.rho < cuts.exclusive) & (table.nu_aligned < cuts.scaling),
        "aligned_only": (table.rho > 1 - cuts.exclusive) & (table.nu_base < cuts.scaling),
        # A row too short to read has no direction: an exclusive-looking latent that scaling contradicts is attenuated.
        "shared_rotated": (table.degrees > cuts.rotated) & table.rho.between(cuts.exclusive, 1 - cuts.exclusive),
        "shared_attenuated": weaker < cuts.attenuated,
    }
    return np.select(list(rules.values()), list(rules), "shared_same")


def _latent_scaling(dictionary: Dictionary, joined: Joined, rows: dict) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(rows on which each latent fires, name -> nu [width]), from sums over rows in one pass.

    For a latent with codes f and a unit row u, beta of a target Y [n, d] is f'Y u / f'f: the multiple of f u that
    explains Y best. Targets: the stream's error with this latent left out of its reconstruction, and the centred
    reconstruction itself. nu is the beta of the tested stream over that of the other, u being the other's row.
    """
    w = dictionary.width
    fired, energy, total = counts = np.zeros((3, w))
    error, reconstruction = ({name: np.zeros_like(r) for name, r in rows.items()} for _ in range(2))
    bias = {name: b.reshape(-1).astype(np.float64) for name, b in dictionary.split(dictionary.decoder_bias).items()}
    for x in joined.chunks():
        codes = dictionary.code(x).astype(np.float64)
        values = codes.data
        counts += [np.bincount(codes.indices, weights, w) for weights in (np.ones_like(values), values**2, values)]
        for name, real in dictionary.split(x.numpy()).items():
            rebuilt = codes @ rows[name]
            error[name] += codes.T @ (real.reshape(len(x), -1) - rebuilt - bias[name])
            reconstruction[name] += codes.T @ rebuilt
    for name, r in rows.items():  # latents that merely fire at the same time by chance share no covariance
        reconstruction[name] -= np.outer(total, total @ r) / len(joined)
    energy, nu = np.maximum(energy, 1e-12), {}
    for name, other in (STREAMS, STREAMS[::-1]):
        along = unit(rows[other])
        for what, sums in {"error": error, "reconstruction": reconstruction}.items():
            beta = {stream: (sums[stream] * along).sum(1) / energy for stream in STREAMS}
            if what == "error":  # this latent's own part, which the error lacks
                beta = {stream: value + (rows[stream] * along).sum(1) for stream, value in beta.items()}
            below = np.where(np.abs(beta[other]) < 1e-9, np.nan, beta[other])
            nu[f"nu_{name}_{what}"] = np.where(fired > 0, beta[name] / below, np.nan)
        nu[f"nu_{name}"] = np.fmax(nu[f"nu_{name}_error"], nu[f"nu_{name}_reconstruction"])
    return fired, nu
