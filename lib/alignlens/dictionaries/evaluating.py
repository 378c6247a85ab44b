"""How well a dictionary rebuilds, and which latents of two dictionaries are the same."""

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from alignlens.core.errors import DictionaryError
from alignlens.dictionaries.model import Dictionary
from alignlens.dictionaries.streams import join, moments, unit


def evaluate(dictionary: Dictionary, streams) -> dict:
    """How well a dictionary rebuilds held-out streams, over all rows at once.

    Returns
    -------
    dict of floats. r2 : 1 - squared error / squared deviation from the per-dimension mean of these rows, so a constant
    scores 0 (the published measure divides by one scalar variance and lets a constant score high); cosine : mean cosine
    of a row and its reconstruction; l2_ratio : mean ratio of their norms; each also per stream (``r2_base`` ...), the
    plain ones being means over streams. l0 : mean latents that fire a row. dead_share : latents that fire on no row.
    """
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

    alive : (bool [width], bool [width]), which latents take part; by default all. Streams are joined, each scaled to
    the first dictionary's mean row norm, so no stream outweighs another. Returns latent, partner, cosine, by cosine.
    Raises DictionaryError if the dictionaries read streams of other shapes.
    """
    if first.shapes != second.shapes:
        shapes = f"{first.shapes} and {second.shapes}"
        raise DictionaryError(f"dictionaries read {shapes}: only equal streams can be matched")
    indices = [np.flatnonzero(keep) for keep in alive or (np.ones(first.width), np.ones(second.width))]
    both = [{n: r.reshape(len(r), -1) for n, r in d.rows().items()} for d in (first, second)]
    size = {name: max(np.linalg.norm(r, axis=1).mean(), 1e-12) for name, r in both[0].items()}
    rows = [np.concatenate([r[n] / size[n] for n in size], axis=1)[i] for r, i in zip(both, indices, strict=True)]
    cosine = unit(rows[0]) @ unit(rows[1]).T
    i, j = linear_sum_assignment(-cosine)
    table = pd.DataFrame({"latent": indices[0][i], "partner": indices[1][j], "cosine": cosine[i, j].astype(float)})
    return table.sort_values("cosine", ascending=False, ignore_index=True)
