"""Probes at every layer: held-out scores, and tables with one row a layer and intervals."""

from typing import NamedTuple

import numpy as np
from pandas import DataFrame, Series
from scipy import stats

from alignlens.core.statistics import bootstrap_weights, with_intervals
from alignlens.probes import inputs, solver
from alignlens.probes.scores import METRICS, metrics


class OutOfFold(NamedTuple):
    """Held-out scores of rows [x of every pair, then -x of every pair], each by the probe not trained on its fold."""

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
    plan, parts = inputs.plan_folds(len(chosen), groups, protocol, folds, seed), []
    for x in differences:
        probe = solver.fit(x, plan)
        scores, norms = np.concatenate(probe.scores(x))[:, 0], np.linalg.norm(probe.w, axis=0)
        parts.append((scores, probe.directions.T, norms, probe.penalty))
    rows = np.repeat([1, 0], plan.n), np.concatenate([plan.fold, plan.mirror_fold]), np.tile(np.arange(plan.n), 2)
    return OutOfFold(*map(np.stack, zip(*parts, strict=True)), *rows)


def fit_layers(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000) -> DataFrame:
    """Fit one probe per layer; read its held-out scores. One row a layer, with 95 % intervals `_low`, `_high`.

    chosen, rejected : float arrays [pairs, layers, d_model] · groups : [pairs], prompts, kept together by grouped folds
        and the bootstrap · protocol : "grouped" or "published", see `alignlens.probes` · folds : at least 3 · seed : of
        folds and bootstrap, 42 + seed for published folds (0: the paper's) · bootstrap : replicates; 0 leaves NaN
    Returns accuracy, auroc, auprc, f1 of the pooled mirrored rows (ties count half) with percentile intervals over
    groups; coef_norm, mean L2 norm of the fold weights in standardised units, with a Student interval over folds, which
    share pairs; penalty, median over folds. Under "grouped" a redrawn group counts where it is scored and, to first
    order (infinitesimal jackknife), where it trains: near nominal on a clear effect, conservative (about 99 %) on
    noise; under "published" probes are fixed, intervals on noise too short by about sqrt 2. Raises ProbeError for
    shapes that differ, values not finite, too few groups, an unknown protocol."""
    return _fit_layers(inputs.Differences((chosen, rejected)), len(chosen), groups, protocol, folds, seed, bootstrap)


def fit_features(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000) -> Series:
    """`fit_layers` without layers, one row: arrays or scipy sparse (never made dense), [pairs] or [pairs, k]."""
    x = inputs.features(chosen, rejected)
    table = _fit_layers([x], x.shape[0], groups, protocol, folds, seed, bootstrap)
    return table.drop(columns="layer").iloc[0].rename(None)


def _fit_layers(layers, n: int, groups, protocol, folds, seed, bootstrap) -> DataFrame:
    plan = inputs.plan_folds(n, groups, protocol, folds, seed)
    weights, rows = bootstrap_weights(plan.group, bootstrap, seed), []
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

    base, aligned : as `.chosen` and `.rejected`, a tuple of both, or their difference, [pairs, layers, d_model] of the
        same pairs. Other parameters as in `fit_layers`
    Returns one row a layer, with `_low`, `_high` (95 %, the same groups redrawn for both models): auroc_base,
    auroc_aligned, each by its own probe; auroc_base_to_aligned, base's probe on aligned, and its gap_base_to_aligned
    below auroc_aligned; auroc_aligned_to_base and gap_aligned_to_base likewise; difference = auroc_aligned -
    auroc_base. A direction is applied in activation units: a model that only rotated shows a gap, not a difference.
    Raises ProbeError as `fit_layers`, and if the two models differ in shape."""
    models = inputs.same_rows(base, aligned)
    plan = inputs.plan_folds(models[0].shape[0], groups, "grouped", folds, seed)
    weights, rows = bootstrap_weights(plan.group, bootstrap, seed), []
    for layer, (x, y) in enumerate(zip(*models, strict=True)):
        of_x, of_y = solver.fit(x, plan), solver.fit(y, plan)
        read = (of_x, x), (of_y, y), (of_x, y), (of_y, x)
        own_x, own_y, x_to_y, y_to_x = (metrics(probe, at, weights, "auroc")[0] for probe, at in read)
        found = {"auroc_base": own_x, "auroc_aligned": own_y, "auroc_base_to_aligned": x_to_y}
        found |= {"auroc_aligned_to_base": y_to_x, "difference": own_y - own_x}
        found |= {"gap_base_to_aligned": own_y - x_to_y, "gap_aligned_to_base": own_x - y_to_x}
        rows.append({"layer": layer} | with_intervals(found))
    return DataFrame(rows)
