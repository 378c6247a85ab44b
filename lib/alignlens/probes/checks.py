"""Is a probe's number honest? The leak, the floor of noise, the floor of real features, a task only memory solves."""

import numpy as np
from pandas import DataFrame, Series

from alignlens.core.statistics import bootstrap_weights, interval, random_signs, with_intervals
from alignlens.probes.inputs import Differences, plan_folds, refuse
from alignlens.probes.layers import fit_layers
from alignlens.probes.scores import auroc, metrics
from alignlens.probes.solver import fit_labellings


def leak_check(y, p, fold_ids, pair_ids, *, bootstrap=1000, seed=0) -> dict:
    """Split stored out-of-fold results by whether a row's mirror image was in the training folds.

    y, labels in {0, 1}; p, probabilities or any scores; fold_ids, the fold that held a row out; pair_ids, equal for
    mirrored rows: all [rows]. Returns auroc (all rows), auroc_leaked (a mirror trained the probe), auroc_clean (it did
    not) with _low, _high (95 %, bootstrap over pairs), n_rows, n_leaked, n_clean, share_leaked (0 in honest folds); NaN
    where a class is missing. auroc far above auroc_clean is memory: weakness F1 of arXiv 2606.09850. Raises ProbeError
    if lengths differ, y is not binary, p is not finite, or no pair has two rows."""
    y, p, fold_ids, pair_ids = map(np.asarray, (y, p, fold_ids, pair_ids))
    shapes = [a.shape for a in (y, p, fold_ids, pair_ids)]
    _, pair, rows = np.unique(pair_ids, return_inverse=True, return_counts=True)
    bad = np.flatnonzero(~np.isfinite(p))
    refuse(y.ndim != 1 or len(set(shapes)) > 1, f"y, p, fold_ids, pair_ids are {shapes}: pass rows of the same length.")
    refuse(not np.isin(y, (0, 1)).all(), f"y holds {np.unique(y)[:5]}: labels must be 0 (-x) or 1 (x).")
    refuse(len(bad) > 0, f"p is NaN or infinite in rows {bad[:3]}: check the stored scores.")
    refuse(rows.max(initial=0) < 2, "No pair_id occurs twice: pass both mirrored rows of each pair, under the same id.")
    leaked = Series(fold_ids).groupby(pair).transform("nunique").to_numpy() > 1
    weights, found = bootstrap_weights(np.arange(len(rows)), bootstrap, seed), {}
    for name, mask in {"auroc": leaked | True, "auroc_leaked": leaked, "auroc_clean": ~leaked}.items():
        pos, neg, drawn = mask & (y == 1), mask & (y == 0), weights if name == "auroc_clean" else weights[:1]
        found[name] = auroc(p[pos], p[neg], drawn[:, pair[pos]], drawn[:, pair[neg]])
    found = {name: area[0] for name, area in found.items()} | with_intervals({"auroc_clean": found["auroc_clean"]})
    counts = {"n_rows": len(y), "n_leaked": int(leaked.sum()), "n_clean": int((~leaked).sum())}
    return {name: float(value) for name, value in found.items()} | counts | {"share_leaked": float(leaked.mean())}


def noise_floor(n_pairs, d_model, *, protocol="grouped", seed=0) -> float:
    """AUROC (5 folds) on pure Gaussian pairs: 0.5 if honest; `published` reads 0.951 at 897 pairs x 2048 dimensions."""
    rng = np.random.default_rng(seed)
    pairs = [rng.standard_normal((n_pairs, 1, d_model), dtype=np.float32) for _ in range(2)]
    return float(fit_layers(*pairs, np.arange(n_pairs), protocol=protocol, seed=seed, bootstrap=0).auroc[0])


def permuted_sign_null(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, permutations=100) -> DataFrame:
    """The floor of the real features: chosen and rejected swapped at random, one coin per group, and probed again.

    Grouped probes keep the penalty chosen on the real labels. Returns one row a layer: layer, auroc_mean, auroc_low,
    auroc_high (central 95 % of the permutations). Other parameters and errors as in `fit_layers`."""
    refuse(permutations < 1, f"permutations is {permutations}: draw at least one (100 or more for a 95 % band).")
    differences = Differences((chosen, rejected))
    plan = plan_folds(len(chosen), groups, protocol, folds, seed)
    signs, ones, rows = random_signs(plan.group, permutations, seed=seed), np.ones((1, plan.n)), []
    for layer, x in enumerate(differences):
        found = np.concatenate([metrics(probes, x, ones, "auroc") for probes in fit_labellings(x, plan, signs)])[:, 0]
        low, high = interval(found)
        rows.append({"layer": layer, "auroc_mean": found.mean(), "auroc_low": low, "auroc_high": high})
    return DataFrame(rows)


def selectivity(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000, draws=5) -> DataFrame:
    """Accuracy on the real task minus accuracy on a control that only memory solves (Hewitt & Liang, arXiv 1909.03368).

    The control averages `draws` random labellings of the pairs, under the penalty chosen on the real labels; a mirrored
    copy in training gives its label away. Returns one row a layer: layer, accuracy, accuracy_control, selectivity, with
    `_low`, `_high` (95 %, bootstrap over groups). Other parameters and errors as in `fit_layers`."""
    refuse(draws < 1, f"draws is {draws}: the control needs at least one random labelling.")
    differences = Differences((chosen, rejected))
    plan = plan_folds(len(chosen), groups, protocol, folds, seed)
    signs = np.hstack([np.ones((plan.n, 1)), random_signs(np.arange(plan.n), draws, seed=seed)])  # the real task first
    weights, rows = bootstrap_weights(plan.group, bootstrap, seed), []
    for layer, x in enumerate(differences):
        real, *controls = np.concatenate([metrics(p, x, weights, "accuracy") for p in fit_labellings(x, plan, signs)])
        values = {"accuracy": real, "accuracy_control": (control := np.mean(controls, axis=0))}
        rows.append({"layer": layer} | with_intervals(values | {"selectivity": real - control}))
    return DataFrame(rows)
