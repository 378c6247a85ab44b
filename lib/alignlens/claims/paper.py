"""The published numbers of arXiv 2606.09850 alone (``data/published``), beside what they can be compared with."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

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
    """Standard error of the AUROC of ``pairs`` mirrored rows {s: 1, -s: 0}, from the value alone; of sampling only.

    Hanley and McNeil (1982) for as many positives as negatives, times sqrt 2, since a mirrored row is the same pair."""
    a = np.asarray(auroc, float)
    first, second = a / (2 - a), 2 * a**2 / (1 + a)
    return np.sqrt(2 * (a * (1 - a) + (pairs - 1) * (first + second - 2 * a**2)) / pairs**2)


@cache
def reanalysis() -> pd.DataFrame:
    """The paper's probe results against what they can be compared with, one row a family and method.

    best_layer, auroc : arg-max over layers. change, layer0_change, above_floor_change : against the family's base.
    change_error : of independent samples, too wide for the same pairs; beyond_noise : |change| above two of them.
    share_at_layer0 : layer0_change / change where beyond_noise. plateau_first, plateau_last : layers within two errors
    of the best. floor : Gaussian noise of the same n and d; of real, correlated features it is lower."""
    layers = published("probe_metrics").drop(columns="accuracy").sort_values("layer")
    curves, floors = layers.groupby(MODEL).auroc, published("noise_floors").groupby(["pairs", "d_model"]).floor.mean()
    best = layers.loc[curves.idxmax()].rename(columns={"layer": "best_layer"})
    table = published("models")[[*MODEL, "pairs", "d_model", "probe_set", "layers"]].merge(best)
    table["error"] = auroc_error(table.auroc, table.pairs)
    near = layers.merge(table[[*MODEL, "auroc", "error"]], on=MODEL, suffixes=("", "_best"))
    near = near[near.auroc >= near.auroc_best - 2 * near.error].groupby(MODEL).layer
    plateau = curves.agg(layer0="first").join(near.agg(plateau_first="min", plateau_last="max"))
    table = table.join(plateau, on=MODEL).join(floors, on=["pairs", "d_model"])
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
    """The paper's crosscoder classes as shares of the dictionary, one row a family, method and run.

    forced : "shared_aligned" by construction. redirected_shift : median |usage shift| of the redirected."""
    table = published("crosscoder_classes")
    shares, total = table.pivot_table(index=RUN, columns="class", values="share"), table.groupby(RUN)["count"].sum()
    shares = shares.fillna(0.0).assign(forced=(FORCED_SHARE * total).astype(int) / total)
    shares = shares[["shared_redirected", "shared_aligned", "forced", "aligned_only", "base_only"]]
    shift = table[table["class"] == "shared_redirected"].set_index(RUN).median_abs_shift
    return shares.assign(redirected_shift=shift).reset_index()
