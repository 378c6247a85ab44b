"""Probes at every layer: held-out scores, and tables with one row a layer and intervals."""

from typing import NamedTuple

import numpy as np
from pandas import DataFrame, Series
from scipy import stats

from alignlens.core.statistics import bootstrap_weights, with_intervals
from alignlens.probes import inputs, solver
from alignlens.probes.scores import METRICS, metrics


class OutOfFold(NamedTuple):
    """Held-out scores of the mirrored rows, each from the probe that did not train on that row's fold.

    Rows are [x of every pair, then -x of every pair]. Everything a ROC curve, a histogram or `leak_check` needs:
    `sklearn.metrics.roc_curve(result.labels, result.scores[layer])`.
    """

    scores: np.ndarray  # [layers, 2 * pairs], log-odds that the row is chosen - rejected
    directions: np.ndarray  # [layers, folds, d_model], weights in the units of the activations
    coef_norms: np.ndarray  # [layers, folds], L2 norm of the weights in standardised units
    penalties: np.ndarray  # [layers, folds], see PENALTIES
    labels: np.ndarray  # [2 * pairs], 1 for x and 0 for -x
    fold_ids: np.ndarray  # [2 * pairs]
    pair_ids: np.ndarray  # [2 * pairs]


def out_of_fold(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0) -> OutOfFold:
    """Fit one probe per layer and fold; return the held-out scores. Parameters and errors as in `fit_layers`."""
    differences = inputs.Differences((chosen, rejected))
    plan = inputs.plan_folds(len(chosen), groups, protocol, folds, seed)
    parts = []
    for x in differences:
        probe = solver.fit(x, plan)
        scores = np.concatenate(probe.scores(x))[:, 0]
        parts.append((scores, probe.directions.T, np.linalg.norm(probe.w, axis=0), probe.penalty))
    rows = np.repeat([1, 0], plan.n), np.concatenate([plan.fold, plan.mirror_fold]), np.tile(np.arange(plan.n), 2)
    return OutOfFold(*map(np.stack, zip(*parts, strict=True)), *rows)


def fit_layers(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000) -> DataFrame:
    """Cross-validated linear probe of chosen against rejected, at every layer.

    Parameters
    ----------
    chosen, rejected : float arrays [pairs, layers, d_model]
    groups : [pairs], the prompt of each pair; folds (grouped) and bootstrap (both protocols) keep a group together
    protocol : "grouped" or "published" (see the package's docstring)
    folds : number of folds, at least 3: the penalty is chosen by leaving out a second one
    seed : shuffles folds and bootstrap; the published protocol shuffles with 42 + seed, so 0 gives the paper's folds
    bootstrap : replicates behind the intervals; 0 leaves them NaN

    Returns
    -------
    One row a layer. accuracy, auroc, auprc, f1 of the pooled held-out mirrored rows (ties count half), with 95 %
    percentile intervals `_low`, `_high` from a bootstrap over groups. Under "grouped" a redrawn group counts both where
    it is scored and, to first order (infinitesimal jackknife), where it trains, with scale and penalty held fixed;
    with the probes held fixed, as under "published", intervals on noise are too short by about sqrt 2. The intervals
    are close to nominal on a clear effect and conservative (about 99 % coverage) on noise. coef_norm:
    mean L2 norm of the fold weights in standardised units, with a Student interval over folds (which share training
    pairs: read it as spread). penalty: median over folds. A layer where chosen equals rejected has auroc 0.5.

    Raises ProbeError for shapes that differ, values that are not finite, too few groups, an unknown protocol.
    Source: arXiv 2606.09850 for the published protocol, whose folds leak; the grouped one closes the leak.
    """
    return _fit_layers(inputs.Differences((chosen, rejected)), len(chosen), groups, protocol, folds, seed, bootstrap)


def fit_features(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000) -> Series:
    """`fit_layers` for baselines without layers: length, bag of tokens, log-probability margin.

    chosen, rejected: arrays [pairs] or [pairs, k], or scipy sparse [pairs, k]; sparse ones are never made dense, so k
    may be a vocabulary. Returns the one row of `fit_layers`, without `layer`.
    """
    x = inputs.features(chosen, rejected)
    table = _fit_layers([x], x.shape[0], groups, protocol, folds, seed, bootstrap)
    return table.drop(columns="layer").iloc[0].rename(None)


def _fit_layers(layers, n: int, groups, protocol, folds, seed, bootstrap) -> DataFrame:
    plan = inputs.plan_folds(n, groups, protocol, folds, seed)
    weights = bootstrap_weights(plan.group, bootstrap, seed)
    rows = []
    for layer, x in enumerate(layers):
        probe = solver.fit(x, plan)
        right, wrong = ((side > 0).sum() for side in probe.scores(x))
        norms = np.linalg.norm(probe.w, axis=0)
        norm, half = norms.mean(), stats.t.ppf(0.975, folds - 1) * stats.sem(norms)
        found = with_intervals(dict(zip(METRICS, metrics(probe, x, weights, *METRICS), strict=True)))
        found |= {"f1": 2 * right / (right + wrong + n), "coef_norm": norm, "coef_norm_low": max(norm - half, 0.0)}
        rows.append({"layer": layer} | found | {"coef_norm_high": norm + half, "penalty": np.median(probe.penalty)})
    table = DataFrame(rows).assign(n_pairs=n, n_groups=plan.group.max() + 1, protocol=protocol)
    first = "layer accuracy auroc auroc_low auroc_high auprc coef_norm".split()
    return table[[*first, *table.columns.difference(first, sort=False)]]


def transfer(base, aligned, groups, *, folds=5, seed=0, bootstrap=1000) -> DataFrame:
    """Fit a grouped probe on one model and score it on the other's held-out pairs, both ways, with the same folds.

    base, aligned: anything with `.chosen` and `.rejected`, a tuple (chosen, rejected), or their difference; arrays
    [pairs, layers, d_model] of the same pairs in the same order. Other parameters as in `fit_layers`.

    Returns one row a layer, each number with `_low` and `_high` (95 %, the same groups redrawn for both models):
    auroc_base, auroc_aligned : each model read by its own probe
    auroc_base_to_aligned, auroc_aligned_to_base : the first model's probe reads the second model
    difference : auroc_aligned - auroc_base
    gap_base_to_aligned : auroc_aligned - auroc_base_to_aligned, what the aligned model loses when read by base's probe
    gap_aligned_to_base : auroc_base - auroc_aligned_to_base

    A direction is applied as it is, in activation units: a model that only rotated shows a gap, not a difference.
    Raises ProbeError as `fit_layers`, and if the two models differ in shape.
    """
    models = inputs.same_rows(base, aligned)
    plan = inputs.plan_folds(models[0].shape[0], groups, "grouped", folds, seed)
    weights = bootstrap_weights(plan.group, bootstrap, seed)
    rows = []
    for layer, (x, y) in enumerate(zip(*models, strict=True)):
        of_x, of_y = solver.fit(x, plan), solver.fit(y, plan)
        read = (of_x, x), (of_y, y), (of_x, y), (of_y, x)
        own_x, own_y, x_to_y, y_to_x = (metrics(probe, at, weights, "auroc")[0] for probe, at in read)
        found = {
            "auroc_base": own_x, "auroc_aligned": own_y, "auroc_base_to_aligned": x_to_y,
            "auroc_aligned_to_base": y_to_x, "difference": own_y - own_x, "gap_base_to_aligned": own_y - x_to_y,
            "gap_aligned_to_base": own_x - y_to_x,
        }  # fmt: skip
        rows.append({"layer": layer} | with_intervals(found))
    return DataFrame(rows)
