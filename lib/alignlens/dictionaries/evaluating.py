"""How well a dictionary rebuilds, which latents base and aligned share and how, which latents of two are the same."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from alignlens.core.errors import DictionaryError
from alignlens.dictionaries.model import STREAMS, Dictionary, Joined, join, moments, unit

LABELS = ("dead", "base_only", "aligned_only", "shared_same", "shared_rotated", "shared_attenuated")


@dataclass(frozen=True)
class Cuts:
    """Where labels begin: one set for all runs, fixed before any was read."""

    dead: float = 1e-4  # a latent that fires on a smaller share of rows, or on fewer than `few`, is too rare to read
    few: int = 10
    exclusive: float = 0.2  # rho below it is base_only, above 1 - it aligned_only (a norm ratio of 4), if nu agrees:
    scaling: float = 0.5  # nu of the other stream must lie below it, or that stream does hold the latent
    rotated: float = 20.0  # degrees between the two decoder rows above which a shared latent counts as rotated
    attenuated: float = 0.8  # norm ratio (weaker to stronger) below which it counts as attenuated


CUTS = Cuts()


def evaluate(dictionary: Dictionary, streams) -> dict:
    """How well a dictionary rebuilds held-out streams, over all rows at once: a dict of floats.

    r2 : 1 - squared error / squares about the mean of each dimension, so a constant scores 0; cosine, l2_ratio : of
    rows and their reconstruction, means over rows; each also per stream (``r2_base`` ...), the plain ones being means
    over streams. l0 : mean latents that fire a row. dead_share : latents that fire on no row."""
    joined = join(streams, dictionary.shapes)
    spread = {name: float(v.sum()) for name, v in dictionary.split(moments(joined)[1].numpy()).items()}
    sums = {name: np.zeros(3) for name in dictionary.shapes}  # squared error, cosine, ratio
    fired, active, n = np.zeros(dictionary.width, bool), 0, len(joined)
    for x in joined.chunks():
        codes = dictionary.code(x)
        fired[codes.indices] = True
        active += codes.nnz
        rebuilt = dictionary.split(dictionary.decode(codes))
        for name, real in dictionary.split(x.numpy()).items():
            a, b = (v.reshape(len(x), -1).astype(np.float64) for v in (real, rebuilt[name]))
            long, short = (np.linalg.norm(v, axis=1) for v in (a, b))
            cosine, ratio = (a * b).sum(1) / np.maximum(long * short, 1e-12), short / np.maximum(long, 1e-12)
            sums[name] += np.square(a - b).sum(), cosine.sum(), ratio.sum()
    out = {}
    for name, (error, cosine, ratio) in sums.items():
        values = {"r2": 1 - error / max(n * spread[name], 1e-12), "cosine": cosine / n, "l2_ratio": ratio / n}
        out |= {f"{what}_{name}": float(value) for what, value in values.items()}
    out |= {what: float(np.mean([out[f"{what}_{name}"] for name in sums])) for what in values}
    return out | {"l0": active / n, "dead_share": float(1 - fired.mean())}


def match(first: Dictionary, second: Dictionary, *, alive=None) -> pd.DataFrame:
    """One-to-one pairing of two dictionaries' latents by the cosine of their decoder rows (Hungarian matching).

    alive : (bool [width], bool [width]), which latents take part. Streams are joined, each scaled to the first
    dictionary's mean row norm. Returns latent, partner, cosine, by cosine. Raises DictionaryError for other shapes."""
    if first.shapes != second.shapes:
        raise DictionaryError(f"only equal streams can be matched, not {first.shapes} and {second.shapes}")
    indices = [np.flatnonzero(keep) for keep in alive or (np.ones(first.width), np.ones(second.width))]
    both = [{n: r.reshape(len(r), -1) for n, r in d.rows().items()} for d in (first, second)]
    size = {name: max(np.linalg.norm(r, axis=1).mean(), 1e-12) for name, r in both[0].items()}
    rows = [np.concatenate([r[n] / size[n] for n in size], axis=1)[i] for r, i in zip(both, indices, strict=True)]
    cosine = unit(rows[0]) @ unit(rows[1]).T
    i, j = linear_sum_assignment(-cosine)
    table = pd.DataFrame({"latent": indices[0][i], "partner": indices[1][j], "cosine": cosine[i, j].astype(float)})
    return table.sort_values("cosine", ascending=False, ignore_index=True)


def classify(dictionary: Dictionary, streams) -> pd.DataFrame:
    """Which latents base and aligned share, and how; one row a latent of a crosscoder on streams base and aligned.

    rho : |aligned row| / (|base row| + |aligned row|), a window's norms over all its layers; theta : cosine of the two
    rows, ``degrees`` its angle; ratio : |aligned row| / |base row|; density : share of rows on which it fires. nu_base,
    nu_aligned : latent scaling (Minder et al., arXiv 2504.02922): how much of the latent, read along the *other*
    stream's row, stands in this stream all the same, relative to the other: the larger of ``_error`` (what the
    reconstruction left out) and ``_reconstruction`` (what other latents write instead). Near 0 for a latent that this
    stream truly lacks, near 1 where it was only not written. label : by ``Cuts``, which attrs["cuts"] holds; rotation
    is asked before attenuation. Raises DictionaryError for other streams."""
    if set(dictionary.shapes) != set(STREAMS) or len(set(dictionary.shapes.values())) > 1:
        raise DictionaryError(
            f"classify compares base and aligned; this dictionary reads {', '.join(dictionary.shapes)}"
        )
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
    """(rows on which each latent fires, name -> nu [width]), from sums over rows in one pass. For a latent with codes f
    and a unit row u, beta of a target Y [n, d] is f'Y u / f'f, the multiple of f u that explains Y best. Targets: the
    stream's error with this latent left out of its reconstruction, and the centred reconstruction. nu is the beta of
    the tested stream over that of the other, u being the other's row."""
    fired, energy, total = counts = np.zeros((3, dictionary.width))
    error, reconstruction = ({name: np.zeros_like(r) for name, r in rows.items()} for _ in range(2))
    bias = {name: b.reshape(-1).astype(np.float64) for name, b in dictionary.split(dictionary.decoder_bias).items()}
    for x in joined.chunks():
        codes = dictionary.code(x).astype(np.float64)
        powers = (codes.data**power for power in (0, 2, 1))
        counts += [np.bincount(codes.indices, weights, dictionary.width) for weights in powers]
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
