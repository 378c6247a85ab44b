"""Many penalised logistic regressions at once, one column each, by a preconditioned conjugate gradient in float64."""

import warnings
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import expit

from alignlens.probes.inputs import Plan

PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)  # grouped: p in mean log-loss + p/2 |w|^2, w in standardised units
TOLERANCE = 1e-4  # solved when the gradient is this share of its norm at w = 0
MAX_ITERATIONS = 1000
BLOCK = 1 << 22  # array elements worked on at once (32 MB of float64): bounds memory for any number of columns


class Problem:
    """One layer's differences in common units, ready for many regressions."""

    def __init__(self, x):
        self.n, d = x.shape
        self.spread = _safe(np.sqrt((x**2).mean(0)))
        self.z = x @ sparse.diags_array(1 / self.spread) if sparse.issparse(x) else x / self.spread
        rank = min(self.n, d, 256)  # directions that the preconditioner treats exactly
        basis = np.random.default_rng(0).standard_normal((d, rank))  # subspace iteration on z'z/n
        for _ in range(2):
            basis = np.linalg.qr(self.z.T @ (self.z @ basis))[0]
        image = self.z @ basis
        values, turn = np.linalg.eigh(image.T @ image / self.n)
        self.basis, self.values = basis @ turn, np.maximum(values, 0)
        others = min(self.n, d) - rank
        self.rest = max((self.z**2).mean(0).sum() - self.values.sum(), 0) / others if others else 0.0

    def spreads(self, weights: np.ndarray, mean: np.ndarray | float = 0.0) -> np.ndarray:
        """Standard deviation [d, fits] of the features about a mean, under weights [pairs, fits]."""
        return _safe(np.sqrt(np.maximum((self.z**2).T @ weights - mean**2, 0)))

    def solve(self, scale, weights, penalty, signs) -> tuple[np.ndarray, np.ndarray]:
        """Minimise sum_i weight_i log(1 + exp(-margin_i)) + penalty/2 |w|^2, one independent problem a column.

        scale [d, columns]: w is in units of z / scale. weights [n, columns], or [2n, columns] (rows x, then -x) for an
        intercept: columns sum to 1. signs [n, columns]: -1 swaps chosen and rejected. Polak-Ribiere conjugate gradient,
        preconditioned with the Hessian at w = 0, Newton steps along the line. Returns w [d, columns], intercepts
        [columns]."""
        d, columns = scale.shape
        ridge = np.zeros((d + (len(weights) > self.n), columns))  # the intercept is one more row, unpenalised
        ridge[:d] = penalty
        w, margin, result = np.zeros_like(ridge), np.zeros_like(weights), np.zeros_like(ridge)
        residual = -0.5 * weights
        gradient = self._backward(residual, scale, signs)
        descent = self._precondition(gradient, penalty)
        # A gradient that is only rounding error (no difference at this layer) must leave w at exactly zero.
        size, active = (gradient**2).sum(0), np.arange(columns)
        step, goal = np.where(size > 1e-24, -descent, 0), np.maximum(TOLERANCE**2 * size, 1e-24)
        for _ in range(MAX_ITERATIONS):
            along = signs * (self.z @ (step[:d] / scale))
            if len(weights) > self.n:
                along = np.vstack([along + step[d], along - step[d]])
            slope, stiffness, pull = (gradient * step).sum(0), (ridge * step**2).sum(0), (ridge * w * step).sum(0)
            curvature = -(residual * (1 - expit(-margin)) * along**2).sum(0)  # weight * chance * (1 - chance) a row
            length = -slope / _safe(curvature + stiffness)
            for _ in range(30):
                residual = -weights * expit(-(margin + length * along))
                ahead = (residual * along).sum(0) + pull + length * stiffness
                beyond = ahead > -0.5 * slope
                if not beyond.any():
                    break
                length = np.where(beyond, length * slope / (slope - ahead), length)  # back to where the secant crosses
            w += length * step
            margin += length * along
            last_gradient, last_descent = gradient, descent
            gradient = self._backward(residual, scale, signs) + ridge * w
            keep = (gradient**2).sum(0) > goal
            result[:, active] = w
            if not keep.any():
                break
            descent = self._precondition(gradient, ridge[0])
            gain = (gradient * (descent - last_descent)).sum(0) / _safe((last_gradient * last_descent).sum(0))
            step = np.maximum(gain, 0) * step - descent
            step = np.where((gradient * step).sum(0) < 0, step, -descent)
            if not keep.all():
                w, margin, residual, gradient, descent = (a[:, keep] for a in (w, margin, residual, gradient, descent))
                step, scale, weights, signs, ridge = (a[:, keep] for a in (step, scale, weights, signs, ridge))
                active, goal = active[keep], goal[keep]
        else:
            said = f"{len(active)} probes had not converged after {MAX_ITERATIONS} steps: are there extreme values?"
            warnings.warn(said, stacklevel=2)
        return result[:d], result[d:].sum(0)

    def solve_hessian(self, target, scale, curvature, penalty) -> np.ndarray:
        """Solve (features' diag(curvature) features + penalty) u = target, one problem a column; u [d, columns]."""
        u, residual, step, power = np.zeros_like(target), target.copy(), 0.0, 1.0
        goal = TOLERANCE**2 * (target**2).sum(0)
        for _ in range(MAX_ITERATIONS):
            if ((residual**2).sum(0) <= goal).all():
                break
            descent = self._precondition(residual, penalty)
            power, old = (residual * descent).sum(0), power
            step = descent + power / _safe(old) * step
            image = self.z.T @ (curvature * (self.z @ (step / scale))) / scale + penalty * step
            length = power / _safe((step * image).sum(0))
            u += length * step
            residual -= length * image
        return u

    def _backward(self, rows, scale, signs):  # gradient [d or d + 1, columns] from the slope of the loss in each margin
        first, mirror = rows[: self.n], rows[self.n :]
        if not len(mirror):
            return self.z.T @ (signs * first) / scale
        return np.vstack([self.z.T @ (signs * (first + mirror)) / scale, (first - mirror).sum(0)])

    def _precondition(self, gradient, penalty):
        """Apply the inverse of 0.25 z'z/n + penalty, exact along the basis, one average value beside it."""
        d, beside = len(self.basis), 1 / (0.25 * self.rest + penalty)
        leading = 1 / (0.25 * self.values[:, None] + penalty) - beside
        out = beside * gradient[:d] + self.basis @ (leading * (self.basis.T @ gradient[:d]))
        return np.vstack([out, 4 * gradient[d:]])


class Probes(NamedTuple):
    """The probes of one layer: every fold under every labelling; columns run over folds, then labellings."""

    problem: Problem
    plan: Plan
    w: np.ndarray  # [d, columns], standardised units
    intercept: np.ndarray  # [folds, labellings]
    scale: np.ndarray  # [d, columns]
    weights: np.ndarray  # [rows, columns]
    penalty: np.ndarray  # [columns]
    signs: np.ndarray  # [pairs, columns]

    @property
    def directions(self) -> np.ndarray:
        return self.w / (self.problem.spread[:, None] * self.scale)  # [d, columns], in the units of the differences

    def scores(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Held-out scores [pairs, labellings] of the rows x and -x, each by the probe that did not train on it."""
        margin = (x @ self.directions * self.signs).reshape(self.plan.n, self.plan.folds, -1)
        pairs, fold, mirror_fold = np.arange(self.plan.n), self.plan.fold, self.plan.mirror_fold
        return margin[pairs, fold] + self.intercept[fold], self.intercept[mirror_fold] - margin[pairs, mirror_fold]

    def influence(self, x, slope: np.ndarray) -> np.ndarray:
        """Derivative [pairs, metrics] of metrics to pairs' weights in training; slope: theirs to each score."""
        folds, metrics = self.plan.folds, slope.shape[1]
        column = np.repeat(np.arange(self.w.shape[1]), metrics // self.intercept.shape[1])
        scale, weights, penalty, signs = (a[..., column] for a in (self.scale, self.weights, self.penalty, self.signs))
        held = np.repeat(np.equal.outer(self.plan.fold, np.arange(folds)), metrics, axis=1)
        target = x.T @ (held * signs * np.tile(slope, (1, folds))) / (self.problem.spread[:, None] * scale)
        chance = expit(-signs * (self.problem.z @ (self.w / self.scale))[:, column])
        # Backwards: a weight moves w by inverse Hessian times its gradient, and w moves the scores.
        adjoint = self.problem.solve_hessian(target, scale, weights * chance * (1 - chance), penalty)
        effect = weights * chance * signs * (self.problem.z @ (adjoint / scale))
        effect -= weights * effect.sum(0)  # the loss is a mean: more weight here is less everywhere else
        return effect.reshape(self.plan.n, folds, metrics).sum(1)


def fit(x, plan: Plan) -> Probes:
    """Probes of one layer of differences [pairs, d_model] (float64 or sparse), one a fold."""
    return next(fit_labellings(x, plan, np.ones((plan.n, 1))))


def fit_labellings(x, plan: Plan, signs: np.ndarray):
    """Yield `Probes` of signs [pairs, labellings], some at a time, under the penalty chosen on the real labels."""
    problem, folds = Problem(x), np.arange(plan.folds)
    rows = plan.fold if plan.grouped else np.concatenate([plan.fold, plan.mirror_fold])
    keep = rows[:, None] != folds
    weights = keep / keep.sum(0)
    if plan.grouped:
        scale, penalty = problem.spreads(weights), _choose_penalty(problem, plan)
    else:
        plus, minus = weights.reshape(2, plan.n, -1)
        scale = problem.spreads(plus + minus, problem.z.T @ (plus - minus))  # the intercept absorbs centring
        penalty = 1 / keep.sum(0)  # C = 1
        weights = 0.5 * np.vstack([plus / plus.sum(0), minus / minus.sum(0)])  # classes balanced
    per_block = max(1, BLOCK // (max(problem.z.shape) * plan.folds))
    for start in range(0, signs.shape[1], per_block):
        block = signs[:, start : start + per_block]
        columns = np.repeat(folds, block.shape[1])
        given = scale[:, columns], weights[:, columns], penalty[columns], np.tile(block, (1, plan.folds))
        w, b = problem.solve(*given)
        yield Probes(problem, plan, w, b.reshape(plan.folds, -1), *given)


def _choose_penalty(problem: Problem, plan: Plan) -> np.ndarray:
    """Penalty [folds] by log-loss: the probe without folds a and b, scored on b, tunes a, and scored on a, tunes b."""
    left_out, grid = np.array(list(combinations(range(plan.folds), 2))), np.array(PENALTIES)
    keep = (plan.fold[:, None, None] != left_out).all(-1)
    fits = np.repeat(np.arange(len(left_out)), len(grid))
    weights = keep / keep.sum(0)
    scale, weights = problem.spreads(weights)[:, fits], weights[:, fits]
    w, _ = problem.solve(scale, weights, np.tile(grid, len(left_out)), np.ones((1, len(fits))))
    row_loss = np.logaddexp(0, -(problem.z @ (w / scale)))
    fold_loss = ((np.arange(plan.folds)[:, None] == plan.fold) @ row_loss).reshape(plan.folds, -1, len(grid))
    loss = np.zeros((plan.folds, len(grid)))
    for k, two in enumerate(left_out):
        loss[two] += fold_loss[two[::-1], k]
    return grid[loss.argmin(1)]


def _safe(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1)  # a divisor: zeros meet zero numerators
