"""What probes read, checked once: differences chosen - rejected, and the plan of who is held out when."""

from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.model_selection import StratifiedKFold

from alignlens.core.errors import ProbeError


def refuse(wrong: bool, message: str, error: type[Exception] = ProbeError) -> None:
    if wrong:
        raise error(message)


class Differences:
    """chosen - rejected of an object or tuple with both, or one array [pairs, layers, d_model]; iterates by layer."""

    def __init__(self, source, name: str = ""):
        if hasattr(source, "chosen") and hasattr(source, "rejected"):
            source = source.chosen, source.rejected
        self.arrays = [np.asarray(array) for array in (source if isinstance(source, tuple) else (source,))]
        self.shape = self.arrays[0].shape
        for array, kind in zip(self.arrays, ("chosen", "rejected") if len(self.arrays) == 2 else ("",), strict=True):
            title, need = f"{name} {kind}".strip(), "non-empty [pairs, layers, d_model], or fit_features for [pairs, k]"
            refuse(array.ndim != 3 or array.size == 0, f"{title} has shape {array.shape}: pass {need}.")
            refuse(array.shape != self.shape, f"{title} is {array.shape}, chosen {self.shape}: pass the same pairs.")
            bad = np.argwhere(~np.isfinite(array).all(-1)).tolist()
            refuse(bad, f"{title} is NaN or infinite at {len(bad)} [pair, layer] {bad[:3]}: drop or read in float32.")

    def __getitem__(self, layer: int) -> np.ndarray:
        first, *second = (array[:, layer] for array in self.arrays)
        return first.astype(np.float64) - (second[0] if second else 0)


def same_rows(base, aligned) -> list[Differences]:
    models = [Differences(base, "base"), Differences(aligned, "aligned")]
    shapes = f"base is {models[0].shape} and aligned {models[1].shape}"
    refuse(models[0].shape != models[1].shape, f"{shapes}: read both models on the same pairs, at the same layers.")
    return models


def features(chosen, rejected):
    """chosen - rejected without layers: float64 [pairs, k], dense, or sparse with only the columns in use."""
    forms = [sparse.issparse(side) and side.shape for side in (chosen, rejected)]
    refuse(forms[0] != forms[1], f"sparse shapes of chosen and rejected are {forms}: pass both in the same form.")
    if not forms[0]:
        refuse(np.ndim(chosen) not in (1, 2), f"chosen has shape {np.shape(chosen)}: pass [pairs] or [pairs, k].")
        return Differences(tuple(np.asarray(side).reshape(len(side), 1, -1) for side in (chosen, rejected)))[0]
    x = sparse.csr_array(chosen, dtype=np.float64) - sparse.csr_array(rejected, dtype=np.float64)
    refuse(not np.isfinite(x.data).all(), "sparse values of chosen - rejected are NaN or infinite: drop these pairs.")
    return x[:, np.union1d(x.indices[x.data != 0], [0])]  # the weight of a column of zeros would be zero


class Plan(NamedTuple):
    """Who is held out when. Both rows of a pair, x and -x, share a fold under the grouped protocol."""

    grouped: bool
    folds: int
    n: int  # pairs
    group: np.ndarray  # [pairs], 0 .. n_groups - 1
    fold: np.ndarray  # [pairs], fold of the row x
    mirror_fold: np.ndarray  # [pairs], fold of the row -x


def plan_folds(n: int, groups, protocol: str = "grouped", folds: int = 5, seed: int = 0) -> Plan:
    """Folds for n pairs, see `fit_layers`; ProbeError if the groups cannot fill them."""
    groups, grouped = np.asarray(groups), protocol == "grouped"
    names, group = np.unique(groups, return_inverse=True)
    count, unit = (len(names), "groups") if grouped else (n, "pairs")
    refuse(protocol not in ("grouped", "published"), f"Unknown protocol {protocol!r}: use 'grouped' or 'published'.")
    refuse(groups.shape != (n,), f"groups has shape {groups.shape} for {n} pairs: give one group (prompt) per pair.")
    refuse(folds < 3, f"folds is {folds}: at least 3 are needed, to score, to choose the penalty and to fit.")
    refuse(count < folds, f"{count} {unit} cannot fill {folds} folds: pass pairs of more prompts, or fewer folds.")
    if grouped:
        fold = (np.random.default_rng(seed).permutation(len(names)) % folds)[group]
        return Plan(grouped, folds, n, group, fold, fold)
    labels, row_fold = np.repeat([1, 0], n), np.empty(2 * n, int)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=42 + seed)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels)):
        row_fold[held_out] = fold
    return Plan(grouped, folds, n, group, row_fold[:n], row_fold[n:])
