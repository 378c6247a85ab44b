"""The published numbers of arXiv 2606.09850 alone (``data/published``), beside what they can be compared with."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from alignlens import probes
from alignlens.core.errors import ClaimError
from alignlens.core.settings import place

FORCED_SHARE = 0.06  # of the published dictionary is shared by construction
MODEL = ["family", "method"]
RUN = [*MODEL, "run"]


@cache
def published(name: str) -> pd.DataFrame:
    """One table of ``data/published``; its README says what each column is."""
    path = Path(place(f"data/published/{name}.csv"))
    if not path.exists():
        raise ClaimError(f"data/published/{name}.csv is missing: run from the project's folder or restore the file.")
    return pd.read_csv(path)


def auroc_error(auroc, pairs):
    """Standard error of the AUROC of ``pairs`` mirrored rows {s: 1, -s: 0}, from the value alone.

    Hanley and McNeil (1982) for as many positives as negatives, times sqrt 2: a mirrored row is the same pair again, so
    its error does not average out. Sampling of pairs only: no leak, no choice of layer, no training seed.
    """
    a = np.asarray(auroc, float)
    first, second = a / (2 - a), 2 * a**2 / (1 + a)
    variance = (a * (1 - a) + (pairs - 1) * (first + second - 2 * a**2)) / pairs**2
    return np.sqrt(2 * variance)


def protocol_floors(shapes, *, draws: int = 3) -> pd.DataFrame:
    """The published protocol on Gaussian noise: pairs, d_model, seed, floor for each (pairs, d_model) of ``shapes``.

    ``data/published/noise_floors.csv`` holds the paper's six shapes; one core needs about 0.3 s a draw at 897 pairs
    and 4 s and 1 GB at 10,000 x 3,072.
    """
    table = pd.DataFrame(
        [(n, d, seed) for n, d in shapes for seed in range(draws)], columns=["pairs", "d_model", "seed"]
    )
    floors = [probes.noise_floor(n, d, protocol="published", seed=seed) for n, d, seed in table.to_numpy().tolist()]
    return table.assign(floor=floors)


@cache
def reanalysis() -> pd.DataFrame:
    """The paper's probe results against what they can be compared with, one row a family and method.

    best_layer, auroc : arg-max over layers, as published. change : against the base of the family. change_error :
    of two independent samples, so too wide where both were read on the same pairs. beyond_noise : |change| above two of
    them. layer0, layer0_change : at the first block. share_at_layer0 : layer0_change / change where beyond_noise, else
    NaN. plateau_first, plateau_last : layers within two errors of the best. floor : Gaussian noise of the same n and d.
    above_floor : (auroc - floor) / (1 - floor); above_floor_change : against the base. Gaussian noise has full rank, so
    the floor of real, correlated features is lower.
    """
    layers = published("probe_metrics").sort_values("layer")
    floors = published("noise_floors").groupby(["pairs", "d_model"], as_index=False).floor.mean()
    best = layers.loc[layers.groupby(MODEL).auroc.idxmax()].rename(columns={"layer": "best_layer"})
    table = published("models")[[*MODEL, "pairs", "d_model", "probe_set", "layers"]]
    table = table.merge(best.drop(columns="accuracy")).assign(error=lambda t: auroc_error(t.auroc, t.pairs))
    curves = layers.merge(table[[*MODEL, "auroc", "error"]], on=MODEL, suffixes=("", "_best"))
    curves = curves[curves.auroc >= curves.auroc_best - 2 * curves.error].groupby(MODEL).layer
    first = layers[layers.layer == 0].rename(columns={"auroc": "layer0"})[[*MODEL, "layer0"]]
    plateau = curves.agg(plateau_first="min", plateau_last="max").reset_index()
    table = table.merge(first).merge(plateau).merge(floors, on=["pairs", "d_model"])
    table["above_floor"] = (table.auroc - table.floor) / (1 - table.floor)
    base = table[table.method == "base"].set_index("family")
    for name, new in (("auroc", "change"), ("layer0", "layer0_change"), ("above_floor", "above_floor_change")):
        table[new] = table[name] - table.family.map(base[name])
    aligned = table.method != "base"
    table["change_error"] = np.hypot(table.error, table.family.map(base.error)).where(aligned)
    table["beyond_noise"] = aligned & (table.change.abs() > 2 * table.change_error)
    table["share_at_layer0"] = (table.layer0_change / table.change).where(table.beyond_noise)
    return table


def class_shares() -> pd.DataFrame:
    """The paper's crosscoder classes: family, method, run, share of the dictionary in each, and what is forced.

    shared_redirected, shared_aligned, aligned_only, base_only : shares. forced : share that the training copies from
    base to aligned, hence "shared_aligned" by construction. redirected_shift : median |usage shift| of the redirected.
    """
    table = published("crosscoder_classes")
    shares = table.pivot_table(index=RUN, columns="class", values="share").fillna(0.0)
    total = table.groupby(RUN)["count"].sum()
    shares["forced"] = (FORCED_SHARE * total).astype(int) / total
    shares = shares[["shared_redirected", "shared_aligned", "forced", "aligned_only", "base_only"]]
    shift = table[table["class"] == "shared_redirected"].set_index(RUN).median_abs_shift
    return shares.assign(redirected_shift=shift).reset_index()
