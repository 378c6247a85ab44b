"""Linear probes on pairs: can a direction tell the chosen answer from the rejected one, and is the number honest?

A probe reads x = chosen - rejected. Two protocols, both on the mirrored rows {x: 1, -x: 0}:

`grouped`    logistic regression without intercept, folds by group (one group per prompt), L2 penalty chosen inside the
             training folds. Both signs, all answers and all copies of a prompt share a fold. Noise scores 0.5.
`published`  the protocol of arXiv 2606.09850: the 2N mirrored rows are split as if they were independent, so a test row
             usually has its sign-flipped copy in training. Kept to reproduce; noise scores above 0.5 (`noise_floor`).

All folds, penalties and permutations of a layer are solved at once, one column each, by a preconditioned conjugate
gradient: features are float32 [pairs, layers, d_model], solvers float64, one layer in memory at a time.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.ndimage import gaussian_filter1d
from scipy.special import expit
from sklearn.model_selection import StratifiedKFold

from alignlens.core.errors import ProbeError
from alignlens.core.statistics import random_signs

PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
"""Grid of the grouped protocol: p in mean log-loss + p/2 |w|^2, w in standardised units; strongest first."""

PUBLISHED_C = 1.0
PUBLISHED_SEED = 42

_TOLERANCE = 1e-4  # solved when the gradient is this share of its norm at w = 0
_MAX_ITERATIONS = 1000
_RANK = 256  # principal directions the preconditioner treats exactly
_BLOCK = 1 << 22  # array elements worked on at once (32 MB of float64): bounds memory for any number of columns


# --- What a user asks for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfFold:
    """Held-out scores of the mirrored rows, each from the probe that did not train on that row's fold.

    Rows are [x of every pair, then -x of every pair]. Everything a ROC curve, a histogram or `leak_check` needs:
    `sklearn.metrics.roc_curve(result.labels, result.scores[layer])`.
    """

    scores: np.ndarray  # [layers, 2 * pairs], log-odds that the row is chosen - rejected
    labels: np.ndarray  # [2 * pairs], 1 for x and 0 for -x
    fold_ids: np.ndarray  # [2 * pairs]
    pair_ids: np.ndarray  # [2 * pairs]
    directions: np.ndarray  # [layers, folds, d_model], weights in the units of the activations
    coef_norms: np.ndarray  # [layers, folds], L2 norm of the weights in standardised units
    penalties: np.ndarray  # [layers, folds], see PENALTIES

    @property
    def probabilities(self) -> np.ndarray:
        """Held-out probabilities [layers, 2 * pairs]."""
        return expit(self.scores)


def out_of_fold(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0) -> OutOfFold:
    """Fit one probe per layer and fold; return the held-out scores. Parameters and errors as in `fit_layers`."""
    differences = _Differences(chosen, rejected)
    plan = _plan(differences, groups, protocol, folds, seed)
    parts = []
    for layer in range(plan.layers):
        x = differences[layer]
        probe = _fit(_Problem(x), plan)
        scores = np.concatenate(probe.scores(x))[:, 0]
        parts.append((scores, probe.directions.T, np.linalg.norm(probe.w, axis=0), probe.penalty))
    scores, directions, norms, penalties = map(np.stack, zip(*parts, strict=True))
    return OutOfFold(
        scores=scores,
        labels=np.repeat([1, 0], plan.n),
        fold_ids=np.concatenate([plan.fold, plan.mirror_fold]),
        pair_ids=np.tile(np.arange(plan.n), 2),
        directions=directions,
        coef_norms=norms,
        penalties=penalties,
    )


def fit_layers(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000) -> pd.DataFrame:
    """Cross-validated linear probe of chosen against rejected, at every layer.

    Parameters
    ----------
    chosen, rejected : float arrays [pairs, layers, d_model]
    groups : [pairs], the prompt of each pair; folds (grouped) and bootstrap (both protocols) keep a group together
    protocol : "grouped" or "published" (see the module's docstring)
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
    return _fit_layers(_Differences(chosen, rejected), groups, protocol, folds, seed, bootstrap)


def fit_features(chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000) -> pd.Series:
    """`fit_layers` for baselines without layers: length, bag of tokens, log-probability margin.

    chosen, rejected: arrays [pairs] or [pairs, k], or scipy sparse [pairs, k]; sparse ones are never made dense, so k
    may be a vocabulary. Returns the one row of `fit_layers`, without `layer`.
    """
    if sparse.issparse(chosen) != sparse.issparse(rejected):
        raise ProbeError("One of chosen and rejected is sparse, the other is not: pass both in the same form.")
    if not sparse.issparse(chosen):
        chosen, rejected = (_with_layer_axis(x, name) for x, name in ((chosen, "chosen"), (rejected, "rejected")))
    table = _fit_layers(_Differences(chosen, rejected), groups, protocol, folds, seed, bootstrap)
    return table.drop(columns="layer").iloc[0].rename(None)


def transfer(base, aligned, groups, *, folds=5, seed=0, bootstrap=1000) -> pd.DataFrame:
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
    models = {"base": _Differences.of(base, "base"), "aligned": _Differences.of(aligned, "aligned")}
    if models["base"].shape != models["aligned"].shape:
        raise ProbeError(
            f"base is {models['base'].shape} and aligned {models['aligned'].shape} [pairs, layers, d_model]: "
            "read both models on the same pairs, at the same layers."
        )
    plan = _plan(models["base"], groups, "grouped", folds, seed)
    weights = _bootstrap_weights(plan.group, bootstrap, seed)
    rows = []
    for layer in range(plan.layers):
        x = {name: model[layer] for name, model in models.items()}
        probes = {name: _fit(_Problem(x[name]), plan) for name in x}
        auroc = {
            (fitted, read): _metrics(probes[fitted], x[read], weights, ["auroc"])["auroc"]
            for fitted in probes
            for read in x
        }
        own_base, own_aligned = auroc["base", "base"], auroc["aligned", "aligned"]
        values = {
            "auroc_base": own_base,
            "auroc_aligned": own_aligned,
            "auroc_base_to_aligned": auroc["base", "aligned"],
            "auroc_aligned_to_base": auroc["aligned", "base"],
            "difference": own_aligned - own_base,
            "gap_base_to_aligned": own_aligned - auroc["base", "aligned"],
            "gap_aligned_to_base": own_base - auroc["aligned", "base"],
        }
        rows.append({"layer": layer} | _with_intervals(values))
    return pd.DataFrame(rows)


def leak_check(y, p, fold_ids, pair_ids, *, bootstrap=1000, seed=0) -> dict:
    """Split stored out-of-fold results by whether a row's mirror image was in the training folds.

    y : labels [rows] in {0, 1} · p : probabilities or any scores [rows] · fold_ids : the fold each row was held out in
    pair_ids : the pair each row belongs to; rows of a pair are mirrors of each other

    Returns auroc (all rows), auroc_leaked (a mirror lies in another fold, so it was trained on), auroc_clean (all
    copies share the fold) with auroc_clean_low/high (95 %, bootstrap over pairs), n_rows, n_leaked, n_clean and
    share_leaked. An AUROC that its rows cannot define (one class or none) is NaN. Honest folds have share_leaked 0;
    auroc far above auroc_clean is memory, not reading. The leak: weakness F1 of arXiv 2606.09850.

    Raises ProbeError if lengths differ, y is not binary, p is not finite, or no pair has two rows.
    """
    y, p, fold_ids, pair_ids = (np.asarray(a) for a in (y, p, fold_ids, pair_ids))
    if not (y.ndim == 1 and y.shape == p.shape == fold_ids.shape == pair_ids.shape):
        raise ProbeError(
            f"y {y.shape}, p {p.shape}, fold_ids {fold_ids.shape} and pair_ids {pair_ids.shape} must be "
            "one-dimensional and of the same length: pass the rows of one layer."
        )
    if not np.isin(y, (0, 1)).all():
        raise ProbeError(f"y holds {sorted(set(np.unique(y)) - {0, 1})[:3]}: labels must be 0 (-x) or 1 (x).")
    if not np.isfinite(p).all():
        raise ProbeError(f"p is NaN or infinite in row {np.flatnonzero(~np.isfinite(p))[0]}: check the stored scores.")
    _, pair = np.unique(pair_ids, return_inverse=True)
    _, fold = np.unique(fold_ids, return_inverse=True)
    if pair.size == 0 or np.bincount(pair).max() < 2:
        raise ProbeError("No pair_id occurs twice: pass both mirrored rows of each pair, under the same id.")
    lowest, highest = np.full(pair.max() + 1, fold.max()), np.zeros(pair.max() + 1, int)
    np.minimum.at(lowest, pair, fold)
    np.maximum.at(highest, pair, fold)
    leaked = (lowest != highest)[pair]

    def auroc(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        pos, neg = rows & (y == 1), rows & (y == 0)
        return _auroc(p[pos], p[neg], weights[:, pair[pos]], weights[:, pair[neg]])

    ones = np.ones((1, pair.max() + 1))
    clean = {"auroc_clean": auroc(~leaked, _bootstrap_weights(np.arange(pair.max() + 1), bootstrap, seed))}
    return {
        "auroc": float(auroc(np.ones(len(y), bool), ones)[0]),
        "auroc_leaked": float(auroc(leaked, ones)[0]),
        **{name: float(value) for name, value in _with_intervals(clean).items()},
        "n_rows": len(y),
        "n_leaked": int(leaked.sum()),
        "n_clean": int((~leaked).sum()),
        "share_leaked": float(leaked.mean()),
    }


def noise_floor(n_pairs, d_model, *, protocol="grouped", seed=0) -> float:
    """AUROC that a protocol (5 folds) reports on pure Gaussian pairs of this size: 0.5 for an honest one.

    Known for `published`: 0.951 at 897 pairs x 2048 dimensions, 0.74 at 5000 x 2048, 0.63 at 10000 x 2048.
    Gaussian noise has full rank; `permuted_sign_null` gives the floor of real, correlated features.
    """
    rng = np.random.default_rng(seed)
    pairs = [rng.standard_normal((n_pairs, 1, d_model), dtype=np.float32) for _ in ("chosen", "rejected")]
    table = fit_layers(*pairs, np.arange(n_pairs), protocol=protocol, seed=seed, bootstrap=0)
    return float(table["auroc"].iloc[0])


def permuted_sign_null(
    chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, permutations=100
) -> pd.DataFrame:
    """The floor of the real features: chosen and rejected swapped at random, one coin per group, and probed again.

    Grouped probes keep the penalty that each fold chose on the real labels, so the null is of the probe that was used.
    Returns one row a layer: layer, auroc_mean, and auroc_low, auroc_high, the central 95 % of the permutations.
    Other parameters and errors as in `fit_layers`.
    """
    if permutations < 1:
        raise ProbeError(f"permutations is {permutations}: draw at least one (100 or more for a 95 % band).")
    differences = _Differences(chosen, rejected)
    plan = _plan(differences, groups, protocol, folds, seed)
    signs = random_signs(plan.group, permutations, seed=seed)
    ones = np.ones((1, plan.n))
    rows = []
    for layer in range(plan.layers):
        x = differences[layer]
        auroc = []
        for probe in _fit_labellings(_Problem(x), plan, signs):
            scores = probe.scores(x)
            auroc += [_auroc(a, b, ones, ones)[0] for a, b in zip(*(side.T for side in scores), strict=True)]
        auroc = np.array(auroc)
        low, high = np.percentile(auroc, (2.5, 97.5))
        rows.append({"layer": layer, "auroc_mean": auroc.mean(), "auroc_low": low, "auroc_high": high})
    return pd.DataFrame(rows)


def selectivity(
    chosen, rejected, groups, *, protocol="grouped", folds=5, seed=0, bootstrap=1000, draws=5
) -> pd.DataFrame:
    """Accuracy on the real task minus accuracy on a control task that only memory can solve.

    The control gives each pair a random label, a fixed property of the pair that its mirrored copy (with the opposite
    label) shares; `draws` such labellings are averaged. Under `published` a copy in training lets the probe look the
    label up, so the control rises above 0.5 and selectivity falls; under `grouped` nothing is left to look up.
    Control probes keep the penalty chosen on the real labels.

    Returns one row a layer: layer, accuracy, accuracy_control, selectivity, each with `_low` and `_high` (95 %,
    bootstrap over groups). Other parameters and errors as in `fit_layers`. Source: Hewitt & Liang, arXiv 1909.03368.
    """
    if draws < 1:
        raise ProbeError(f"draws is {draws}: the control needs at least one random labelling.")
    differences = _Differences(chosen, rejected)
    plan = _plan(differences, groups, protocol, folds, seed)
    # The first labelling is the real one, so that the task and its control are solved side by side.
    signs = np.hstack([np.ones((plan.n, 1)), random_signs(np.arange(plan.n), draws, seed=seed)])
    weights = _bootstrap_weights(plan.group, bootstrap, seed)
    rows = []
    for layer in range(plan.layers):
        x = differences[layer]
        probes = _fit_labellings(_Problem(x), plan, signs)
        real, *control = np.hstack([_accuracies(probe, x, weights) for probe in probes]).T
        values = {"accuracy": real, "accuracy_control": np.mean(control, axis=0)}
        values["selectivity"] = values["accuracy"] - values["accuracy_control"]
        rows.append({"layer": layer} | _with_intervals(values))
    return pd.DataFrame(rows)


# --- Inputs and folds ---------------------------------------------------------------------------------------------


class _Differences:
    """chosen - rejected, checked once and handed out one float64 layer [pairs, d_model] at a time."""

    def __init__(self, chosen, rejected=None, name=""):
        label = f"{name} " if name else ""
        if sparse.issparse(chosen):
            _check_same_shape(chosen.shape, rejected.shape, label)
            difference = sparse.csr_array(chosen, dtype=np.float64) - sparse.csr_array(rejected, dtype=np.float64)
            _check_finite(difference.data[:, None, None], f"{label}chosen - rejected (sparse values)")
            # A column that is zero in every pair has weight zero: most of a vocabulary costs nothing.
            used = np.union1d(difference.indices[difference.data != 0], [0])
            difference = difference[:, used]
            self.arrays, self.shape = (difference,), (difference.shape[0], 1, difference.shape[1])
            return
        self.arrays = tuple(np.asarray(a) for a in (chosen, rejected) if a is not None)
        titles = [f"{label}{kind}" for kind in (("chosen", "rejected") if rejected is not None else ("difference",))]
        for array, title in zip(self.arrays, titles, strict=True):
            if array.ndim != 3 or 0 in array.shape:
                raise ProbeError(
                    f"{title} has shape {array.shape}: probes read non-empty arrays [pairs, layers, d_model]; "
                    "for features without layers use fit_features."
                )
        if rejected is not None:
            _check_same_shape(self.arrays[0].shape, self.arrays[1].shape, label)
        for array, title in zip(self.arrays, titles, strict=True):
            _check_finite(array, title)
        self.shape = self.arrays[0].shape

    @classmethod
    def of(cls, source, name: str) -> "_Differences":
        if hasattr(source, "chosen") and hasattr(source, "rejected"):
            return cls(source.chosen, source.rejected, name)
        return cls(*source, name=name) if isinstance(source, tuple) else cls(source, name=name)

    def __getitem__(self, layer: int):
        if sparse.issparse(self.arrays[0]):
            return self.arrays[0]
        x = self.arrays[0][:, layer].astype(np.float64)
        return x - self.arrays[1][:, layer] if len(self.arrays) == 2 else x


def _with_layer_axis(features, name: str) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim not in (1, 2):
        raise ProbeError(f"{name} has shape {features.shape}: features are [pairs] or [pairs, k].")
    return features.reshape(len(features), 1, -1)


def _check_same_shape(chosen: tuple, rejected: tuple, label: str) -> None:
    if chosen != rejected:
        raise ProbeError(
            f"{label}chosen is {chosen} and {label}rejected {rejected}: both need the same pairs, layers and d_model."
        )


def _check_finite(array: np.ndarray, title: str) -> None:
    for layer in range(array.shape[1]):
        bad = ~np.isfinite(array[:, layer]).all(-1)
        if bad.any():
            raise ProbeError(
                f"{title} is NaN or infinite at pair {np.flatnonzero(bad)[0]}, layer {layer} ({bad.sum()} such pairs "
                "in this layer): drop these pairs, or read the activations again in float32."
            )


@dataclass(frozen=True)
class _Plan:
    """Who is held out when. A pair is two rows, x and -x; under the grouped protocol they share a fold."""

    protocol: str
    folds: int
    layers: int
    group: np.ndarray  # [pairs], 0 .. n_groups - 1
    fold: np.ndarray  # [pairs], fold of the row x
    mirror_fold: np.ndarray  # [pairs], fold of the row -x

    @property
    def n(self) -> int:
        return len(self.group)

    @property
    def intercept(self) -> bool:
        return self.protocol == "published"


def _plan(differences: _Differences, groups, protocol: str, folds: int, seed: int) -> _Plan:
    n, layers, _ = differences.shape
    groups = np.asarray(groups)
    if protocol not in ("grouped", "published"):
        raise ProbeError(f"Unknown protocol {protocol!r}: use 'grouped' or 'published'.")
    if groups.shape != (n,):
        raise ProbeError(f"groups has shape {groups.shape} for {n} pairs: give one group (prompt) per pair.")
    if folds < 3:
        raise ProbeError(
            f"folds is {folds}: at least 3 are needed, one to score, one to choose the penalty, one to fit."
        )
    names, group = np.unique(groups, return_inverse=True)
    if protocol == "published":
        if n < folds:
            raise ProbeError(f"{n} pairs cannot fill {folds} folds: pass more pairs or fewer folds.")
        splitter = StratifiedKFold(folds, shuffle=True, random_state=PUBLISHED_SEED + seed)
        labels = np.repeat([1, 0], n)
        row_fold = np.empty(2 * n, int)
        for k, (_, test) in enumerate(splitter.split(labels, labels)):
            row_fold[test] = k
        return _Plan(protocol, folds, layers, group, row_fold[:n], row_fold[n:])
    if len(names) < folds:
        raise ProbeError(
            f"{len(names)} groups cannot fill {folds} folds: a group (prompt) stays in one fold, "
            "so pass pairs of more prompts or fewer folds."
        )
    fold = (np.random.default_rng(seed).permutation(len(names)) % folds)[group]
    return _Plan(protocol, folds, layers, group, fold, fold)


# --- One layer ----------------------------------------------------------------------------------------------------


class _Problem:
    """One layer's differences in common units, ready for many penalised logistic regressions at once."""

    def __init__(self, x):
        self.n = x.shape[0]
        self.spread = _safe(np.sqrt(_square(x).mean(0)))
        self.z = x @ sparse.diags_array(1 / self.spread) if sparse.issparse(x) else x / self.spread
        self.basis, self.values, self.rest = _leading_directions(self.z)

    def moments(self, weights: np.ndarray, *, centred: np.ndarray | None = None) -> np.ndarray:
        """Scale [d, fits] of the training rows of each fit: RMS, or the standard deviation given signed weights."""
        square = _square(self.z).T @ weights
        if centred is not None:
            square = square - (self.z.T @ centred) ** 2
        return _safe(np.sqrt(np.maximum(square, 0)))

    def solve(self, scale, weights, penalty, *, signs=None, intercept=False) -> tuple[np.ndarray, np.ndarray]:
        """Minimise sum_i weight_i log(1 + exp(-margin_i)) + penalty/2 |w|^2, one independent problem a column.

        scale [d, columns]: z / scale are the standardised features, the units of w and of its penalty.
        weights [n, columns], or [2n, columns] with an intercept (rows x, then rows -x); each column sums to 1.
        signs [n, columns]: -1 swaps chosen and rejected of that pair.

        Nonlinear conjugate gradient (Polak-Ribiere). Its preconditioner is the Hessian at w = 0, exact along the
        leading principal directions; a step is one Newton step along the line, shortened when it overshoots.
        Columns leave when they are solved. Returns w [d, columns] and the intercepts [columns].
        """
        d, columns = scale.shape
        signs = np.ones((1, columns)) if signs is None else signs
        # The intercept is one more row of w, unpenalised.
        ridge = np.vstack([np.repeat(penalty[None], d, 0), np.zeros((int(intercept), columns))])
        w, margin = np.zeros_like(ridge), np.zeros_like(weights)
        residual = -0.5 * weights
        gradient = self._backward(residual, scale, signs)
        descent = self._precondition(gradient, ridge)
        # A gradient that is only rounding error (no difference at this layer) must leave w at exactly zero.
        size = (gradient**2).sum(0)
        step, goal = np.where(size > 1e-24, -descent, 0), np.maximum(_TOLERANCE**2 * size, 1e-24)
        result, active = np.zeros_like(ridge), np.arange(columns)

        for _ in range(_MAX_ITERATIONS):
            along = self._forward(step, scale, signs)
            slope, stiffness, pull = (gradient * step).sum(0), (ridge * step**2).sum(0), (ridge * w * step).sum(0)
            # residual = -weight * chance, so this is weight * chance * (1 - chance), the curvature of each row.
            length = -slope / _safe(-(residual * (1 - expit(-margin)) * along**2).sum(0) + stiffness)
            for _ in range(30):
                residual = -weights * expit(-(margin + length * along))
                ahead = (residual * along).sum(0) + pull + length * stiffness
                beyond = ahead > -0.5 * slope
                if not beyond.any():
                    break
                # The slope rises from `slope` < 0 at zero to `ahead` > 0 here: go back to where the secant crosses.
                length = np.where(beyond, length * slope / (slope - ahead), length)
            w += length * step
            margin += length * along

            last_gradient, last_descent = gradient, descent
            gradient = self._backward(residual, scale, signs) + ridge * w
            done = (gradient**2).sum(0) <= goal
            result[:, active] = w
            if done.all():
                break
            descent = self._precondition(gradient, ridge)
            gain = (gradient * (descent - last_descent)).sum(0) / _safe((last_gradient * last_descent).sum(0))
            step = np.maximum(gain, 0) * step - descent
            step = np.where((gradient * step).sum(0) < 0, step, -descent)
            if done.any():
                keep = ~done
                w, margin, residual, gradient, descent, step, scale, weights, signs, ridge = (
                    a[:, keep] for a in (w, margin, residual, gradient, descent, step, scale, weights, signs, ridge)
                )
                active, goal = active[keep], goal[keep]
        else:
            warnings.warn(
                f"{len(active)} of {columns} probes had not converged after {_MAX_ITERATIONS} steps: check the "
                "features for extreme values.",
                stacklevel=2,
            )
        return result[:d], result[d] if intercept else np.zeros(columns)

    def solve_hessian(self, target, scale, curvature, penalty) -> np.ndarray:
        """Solve (features' diag(curvature) features + penalty) u = target, one problem a column; u [d, columns]."""
        ridge = np.broadcast_to(penalty, target.shape)
        u, residual = np.zeros_like(target), target.copy()
        descent = self._precondition(residual, ridge)
        step, power = descent, (residual * descent).sum(0)
        goal = _TOLERANCE**2 * (target**2).sum(0)
        for _ in range(_MAX_ITERATIONS):
            if ((residual**2).sum(0) <= goal).all():
                break
            image = self.z.T @ (curvature * (self.z @ (step / scale))) / scale + ridge * step
            bend = (step * image).sum(0)
            length = power / _safe(bend)
            u += length * step
            residual -= length * image
            descent = self._precondition(residual, ridge)
            power, old = (residual * descent).sum(0), power
            step = descent + power / _safe(old) * step
        return u

    def _forward(self, w, scale, signs):
        """Margins of the rows: label times (features @ w + intercept)."""
        d = len(scale)
        margin = signs * (self.z @ (w[:d] / scale))
        return np.vstack([margin + w[d], margin - w[d]]) if len(w) > d else margin

    def _backward(self, rows, scale, signs):
        """Transpose of `_forward`."""
        first, mirror = rows[: self.n], rows[self.n :]
        if not len(mirror):
            return self.z.T @ (signs * first) / scale
        return np.vstack([self.z.T @ (signs * (first + mirror)) / scale, (first - mirror).sum(0)])

    def _precondition(self, gradient, ridge):
        """Apply the inverse of 0.25 z'z/n + ridge, exact along the basis and one average value beside it."""
        d = len(self.basis)
        beside = 1 / (0.25 * self.rest + ridge[:1])
        leading = 1 / (0.25 * self.values[:, None] + ridge[:1]) - beside
        out = beside * gradient[:d] + self.basis @ (leading * (self.basis.T @ gradient[:d]))
        return np.vstack([out, 4 * gradient[d:]])


def _leading_directions(z) -> tuple[np.ndarray, np.ndarray, float]:
    """Top eigenvectors [d, rank], eigenvalues [rank] of z'z/n by subspace iteration; mean of the other eigenvalues."""
    n, d = z.shape
    rank = min(n, d, _RANK)
    basis = np.random.default_rng(0).standard_normal((d, rank))
    for _ in range(2):
        basis = np.linalg.qr(z.T @ (z @ basis))[0]
    image = z @ basis
    values, turn = np.linalg.eigh(image.T @ image / n)
    values = np.maximum(values, 0)
    others = min(n, d) - rank
    rest = max(_square(z).mean(0).sum() - values.sum(), 0) / others if others else 0.0
    return basis @ turn, values, rest


def _square(x):
    return x.power(2) if sparse.issparse(x) else x**2


def _safe(scale: np.ndarray) -> np.ndarray:
    """A divisor: zeros, which only meet numerators that are zero too, become one."""
    return np.where(scale > 0, scale, 1)


def _training(plan: _Plan, held_out: list[tuple[int, ...]]) -> np.ndarray:
    """Weights [pairs, fits], each column 1 / count on the pairs that lie in none of its held-out folds."""
    keep = np.stack([~np.isin(plan.fold, out) for out in held_out], axis=1).astype(np.float64)
    return keep / keep.sum(0)


def _choose_penalty(problem: _Problem, plan: _Plan) -> np.ndarray:
    """Penalty of each fold [folds] by log-loss on the other folds, each held out once from the rest.

    The probe that leaves out folds a and b serves twice: scored on b it tunes fold a, scored on a it tunes fold b.
    """
    left_out = list(combinations(range(plan.folds), 2))
    weights = _training(plan, left_out)
    scale = problem.moments(weights)
    member = np.equal.outer(np.arange(plan.folds), plan.fold).astype(np.float64)
    loss = np.zeros((plan.folds, len(PENALTIES)))
    per_block = max(1, _BLOCK // (plan.n * len(PENALTIES)))
    for start in range(0, len(left_out), per_block):
        fits = np.repeat(np.arange(start, min(start + per_block, len(left_out))), len(PENALTIES))
        penalty = np.tile(PENALTIES, len(fits) // len(PENALTIES))
        w, _ = problem.solve(scale[:, fits], weights[:, fits], penalty)
        row_loss = np.logaddexp(0, -(problem.z @ (w / scale[:, fits])))
        fold_loss = (member @ row_loss).reshape(plan.folds, -1, len(PENALTIES))
        for k, (a, b) in enumerate(left_out[start : start + per_block]):
            loss[a] += fold_loss[b, k]
            loss[b] += fold_loss[a, k]
    return np.asarray(PENALTIES)[loss.argmin(1)]


@dataclass(frozen=True)
class _Fit:
    """The probes of one layer: every fold under every labelling; columns run over folds, then labellings."""

    problem: _Problem
    plan: _Plan
    w: np.ndarray  # [d, columns], standardised units
    intercept: np.ndarray  # [folds, labellings]
    scale: np.ndarray  # [d, columns]
    weights: np.ndarray  # [rows, columns]
    penalty: np.ndarray  # [columns]
    signs: np.ndarray  # [pairs, labellings]

    @property
    def directions(self) -> np.ndarray:
        """Weights [d, columns] in the units of the differences."""
        return self.w / (self.problem.spread[:, None] * self.scale)

    def scores(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Held-out scores [pairs, labellings] of the rows x and -x, each by the probe that did not train on it."""
        plan = self.plan
        margin = (x @ self.directions).reshape(plan.n, plan.folds, -1) * self.signs[:, None]
        pairs, b = np.arange(plan.n), self.intercept
        return (margin[pairs, plan.fold] + b[plan.fold], -margin[pairs, plan.mirror_fold] + b[plan.mirror_fold])

    def influence(self, x, slope: np.ndarray) -> np.ndarray:
        """Derivative of a metric to each pair's weight in training [pairs, metrics]; grouped protocol only.

        slope [pairs, metrics]: derivative of the metric to each held-out score on x; with several labellings there is
        one metric for each. A pair's weight moves w by inverse Hessian times its gradient, and w moves the scores of
        the fold held out; read from the metric backwards this is one linear solve per fold and metric.
        """
        plan, metrics = self.plan, slope.shape[1]
        column = np.repeat(np.arange(self.w.shape[1]), metrics // self.signs.shape[1])
        scale, weights, penalty = self.scale[:, column], self.weights[:, column], self.penalty[column]
        signs = np.tile(self.signs, (1, plan.folds))[:, column]
        held = np.repeat(np.equal.outer(plan.fold, np.arange(plan.folds)), metrics, axis=1)
        target = x.T @ (held * signs * np.tile(slope, (1, plan.folds))) / (self.problem.spread[:, None] * scale)
        chance = expit(-signs * (self.problem.z @ (self.w / self.scale))[:, column])
        adjoint = self.problem.solve_hessian(target, scale, weights * chance * (1 - chance), penalty)
        effect = weights * chance * signs * (self.problem.z @ (adjoint / scale))
        effect -= weights * effect.sum(0)  # the loss is a mean: more weight here is less everywhere else
        return effect.reshape(plan.n, plan.folds, metrics).sum(1)


def _fit(problem: _Problem, plan: _Plan, penalty=None, signs=None) -> _Fit:
    """Fit every fold, under the real labels or under `signs` [pairs, labellings]; penalty [folds], chosen if None."""
    penalty = _penalty(problem, plan) if penalty is None else penalty
    signs = np.ones((plan.n, 1)) if signs is None else signs
    if plan.intercept:
        keep = np.concatenate([plan.fold, plan.mirror_fold])[:, None] != np.arange(plan.folds)
        share = keep / keep.sum(0)
        plus, minus = share[: plan.n], share[plan.n :]
        # Centring is absorbed by the intercept, so only the standard deviation of the mirrored rows matters.
        scale = problem.moments(plus + minus, centred=plus - minus)
        weights = 0.5 * np.vstack([plus / plus.sum(0), minus / minus.sum(0)])  # classes balanced
    else:
        weights = _training(plan, [(k,) for k in range(plan.folds)])
        scale = problem.moments(weights)
    columns = np.repeat(np.arange(plan.folds), signs.shape[1])
    scale, weights, penalty = scale[:, columns], weights[:, columns], penalty[columns]
    w, b = problem.solve(scale, weights, penalty, signs=np.tile(signs, (1, plan.folds)), intercept=plan.intercept)
    return _Fit(problem, plan, w, b.reshape(plan.folds, -1), scale, weights, penalty, signs)


def _fit_labellings(problem: _Problem, plan: _Plan, signs: np.ndarray) -> Iterator[_Fit]:
    """`_fit` under each labelling at the penalty chosen on the real labels, a bounded number at a time."""
    penalty = _penalty(problem, plan)
    per_block = max(1, _BLOCK // (max(problem.z.shape) * plan.folds))
    for start in range(0, signs.shape[1], per_block):
        yield _fit(problem, plan, penalty, signs[:, start : start + per_block])


def _penalty(problem: _Problem, plan: _Plan) -> np.ndarray:
    """Penalty of each fold [folds]: chosen within its training pairs, or C = 1 on its rows (published)."""
    if plan.protocol == "grouped":
        return _choose_penalty(problem, plan)
    rows = np.concatenate([plan.fold, plan.mirror_fold])
    return 1 / (PUBLISHED_C * (rows[:, None] != np.arange(plan.folds)).sum(0))


# --- Numbers and intervals ----------------------------------------------------------------------------------------


def _fit_layers(differences: _Differences, groups, protocol, folds, seed, bootstrap) -> pd.DataFrame:
    plan = _plan(differences, groups, protocol, folds, seed)
    weights = _bootstrap_weights(plan.group, bootstrap, seed)
    rows = []
    for layer in range(plan.layers):
        x = differences[layer]
        probe = _fit(_Problem(x), plan)
        positive, negative = probe.scores(x)
        right, wrong = (positive > 0).sum(), (negative > 0).sum()
        norms = np.linalg.norm(probe.w, axis=0)
        norm, half = norms.mean(), stats.t.ppf(0.975, plan.folds - 1) * stats.sem(norms)
        rows.append(
            {"layer": layer}
            | _with_intervals(_metrics(probe, x, weights))
            | {"f1": 2 * right / (right + wrong + plan.n)}
            | {"coef_norm": norm, "coef_norm_low": max(norm - half, 0.0), "coef_norm_high": norm + half}
            | {"penalty": np.median(probe.penalty)}
            | {"n_pairs": plan.n, "n_groups": plan.group.max() + 1, "protocol": protocol}
        )
    first = ["layer", "accuracy", "auroc", "auroc_low", "auroc_high", "auprc", "coef_norm"]
    table = pd.DataFrame(rows)
    return table[first + [name for name in table if name not in first]]


def _bootstrap_weights(group: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each pair occurs [1 + draws, pairs] when groups are redrawn; row 0 is the sample itself."""
    n_groups = group.max() + 1
    drawn = np.random.default_rng([seed, 1]).integers(n_groups, size=(draws, n_groups))
    drawn += n_groups * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * n_groups).reshape(draws, n_groups)
    return np.vstack([np.ones(n_groups, np.float32), counts])[:, group].astype(np.float32)


def _with_intervals(values: dict[str, np.ndarray]) -> dict[str, float]:
    """From [sample, replicates ...] of each number: the number, its 2.5 % and its 97.5 % percentile."""
    out = {}
    for name, value in values.items():
        replicates = value[1:][np.isfinite(value[1:])]
        low, high = np.percentile(replicates, (2.5, 97.5)) if len(replicates) else (np.nan, np.nan)
        out |= {name: value[0], f"{name}_low": low, f"{name}_high": high}
    return out


def _metrics(probe: _Fit, x, weights: np.ndarray, names=("accuracy", "auroc", "auprc")) -> dict[str, np.ndarray]:
    """The named metrics [replicates] of one probe's held-out scores on x, under pair weights."""
    positive, negative = (side[:, 0] for side in probe.scores(x))
    hits = _hits(positive, negative)
    compute = {
        "accuracy": lambda w: w @ hits / w.sum(1),
        "auroc": lambda w: _auroc(positive, negative, w, w),
        "auprc": lambda w: _average_precision(positive, negative, w),
    }
    blocks = np.array_split(weights, -(-weights.size // _BLOCK))
    values = {name: np.concatenate([compute[name](w) for w in blocks]) for name in names}
    if probe.plan.protocol == "grouped" and len(weights) > 1:
        slopes = _slopes(positive)
        shift = (weights - 1) @ probe.influence(x, np.stack([slopes[name] for name in names], axis=1))
        # A first-order shift may leave the range of the metric; the metric cannot.
        values = {name: np.clip(value + shift[:, k], 0, 1) for k, (name, value) in enumerate(values.items())}
    return values


def _accuracies(probe: _Fit, x, weights: np.ndarray) -> np.ndarray:
    """Accuracy [replicates, labellings] under pair weights, as in `_metrics` but for many labellings."""
    positive, negative = probe.scores(x)
    values = weights @ _hits(positive, negative) / weights.sum(1, keepdims=True)
    if probe.plan.protocol == "grouped" and len(weights) > 1:
        slopes = np.stack([_slopes(side)["accuracy"] for side in positive.T], axis=1)
        values = np.clip(values + (weights - 1) @ probe.influence(x, slopes), 0, 1)
    return values


def _slopes(score: np.ndarray) -> dict[str, np.ndarray]:
    """Derivative [pairs] of each metric of the mirrored rows {s: 1, -s: 0} to the score s of each pair.

    A rank metric of a sample is a step function; its slope is that of the population, with a smoothed density.
    """
    n = len(score)
    at_zero, at_mirror = _density(score, np.zeros(1)), _density(score, -score)
    ordered = np.sort(score)

    def above(threshold):
        return 1 - np.searchsorted(ordered, threshold, "left") / n

    def precision_slope(threshold):  # P / (P + F)^2, with P and F the shares of x and of -x scored at least this high
        true, false = above(threshold), np.searchsorted(ordered, -threshold, "right") / n
        return true / np.maximum(true + false, 1 / n) ** 2

    return {
        "accuracy": np.repeat(at_zero, n) / n,
        "auroc": 2 * at_mirror / n,
        "auprc": at_mirror * (precision_slope(score) + precision_slope(-score)) / n,
    }


def _density(sample: np.ndarray, at: np.ndarray, bins: int = 512) -> np.ndarray:
    """Gaussian kernel density of a sample (Silverman's bandwidth, binned); 0 if all values are equal."""
    low, high = np.percentile(sample, (25, 75))
    width = 0.9 * min(sample.std(), (high - low) / 1.34 or np.inf) * len(sample) ** -0.2
    if not width > 0:
        return np.zeros(len(at))
    counts, edges = np.histogram(sample, bins, (sample.min() - 4 * width, sample.max() + 4 * width))
    step = edges[1] - edges[0]
    smooth = gaussian_filter1d(counts / (len(sample) * step), width / step, mode="constant")
    return np.interp(at, (edges[1:] + edges[:-1]) / 2, smooth, left=0, right=0)


def _hits(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Share of a pair's two rows on the right side of zero; a score of zero counts half."""
    return 0.5 + 0.25 * (np.sign(positive) - np.sign(negative))


def _auroc(positive, negative, positive_weights, negative_weights) -> np.ndarray:
    """Weighted chance [replicates] that a positive outscores a negative, ties half; NaN without both kinds."""
    below, ties = _weight_below(negative, negative_weights, positive)
    won = np.einsum("ij,ij->i", positive_weights, below + 0.5 * ties, dtype=np.float64)
    total = positive_weights.sum(1, dtype=np.float64) * negative_weights.sum(1, dtype=np.float64)
    return np.divide(won, total, out=np.full(len(total), np.nan), where=total > 0)


def _average_precision(positive, negative, weights) -> np.ndarray:
    """Weighted average precision [replicates]: precision at the score of each positive row, averaged over them."""
    total = weights.sum(1, keepdims=True)
    true = total - _weight_below(positive, weights, positive)[0]
    false = total - _weight_below(negative, weights, positive)[0]
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=weights > 0)
    return np.einsum("ij,ij->i", weights, precision, dtype=np.float64) / total[:, 0]


def _weight_below(scores, weights, thresholds) -> tuple[np.ndarray, np.ndarray]:
    """Weight [replicates, thresholds] of the scores below each threshold, and of those equal to it."""
    order = np.argsort(scores)
    running = np.zeros((len(weights), len(scores) + 1), weights.dtype)
    np.cumsum(weights[:, order], axis=1, out=running[:, 1:])
    left, right = (np.searchsorted(scores[order], thresholds, side) for side in ("left", "right"))
    below = running[:, left]
    return below, running[:, right] - below
