"""A change of probe AUROC, split into what is kept, rotated, attenuated and created."""

import numpy as np
from pandas import DataFrame

from alignlens.core.statistics import bootstrap_weights, with_intervals
from alignlens.geometry.streams import both_streams, joint_components, polar, ratio
from alignlens.probes import inputs, scores, solver


def decompose(base, aligned, groups, *, folds=5, seed=0, bootstrap=1000) -> DataFrame:
    """Split what probes read in two models into kept, rotated, attenuated and created, in AUROC above 0.5.

    base, aligned, groups, folds, seed, bootstrap : as in `probes.transfer`, but chosen and rejected are both needed
    Returns one row a layer; numbers but the last two with `_low`, `_high` (95 %, the same groups redrawn for both):
    base, aligned : held-out AUROC of each model's own grouped probe
    direct, repaired : AUROC of base's probe on aligned as it is, and with the best orthogonal map and scale undone,
        fitted on streams of the training folds (each kind about its mean, at most 384 components)
    change = aligned - base, gap = aligned - direct, repair = repaired - direct
    kept : what base's probe reads in aligned, no more than either own probe reads
    rotated : what both own probes read and base's misses; rotated_repaired : how much of it the map restores
    attenuated, created : what only base's, only aligned's own probe reads; base - 0.5 = kept + rotated + attenuated
    verdict : "none" if neither own `_low` > 0.5; else, joined by "+", "rotated" if rotated_low > 0 with "repaired" if
        repair_low > 0, "attenuated" if change_high < 0, "created" if change_low > 0; else "kept"; no draws: "unknown"
    signal_ratio, spread_ratio : mean and standard deviation of the held-out scores of base's probe, aligned over base
    Only "repaired" says that one orthogonal map explains the turn. Clipped parts are biased upward on noise; layers are
    not corrected for. Raises GeometryError without both sides, ProbeError as `probes.transfer`."""
    return decompose_draws(base, aligned, groups, folds=folds, seed=seed, bootstrap=bootstrap)[0]


def decompose_draws(base, aligned, groups, *, folds=5, seed=0, bootstrap=1000) -> tuple[DataFrame, dict]:
    """The table of `decompose`, and the draws behind its intervals, name -> [layers, 1 + bootstrap], the sample itself
    first. All layers share the redrawn groups, so that a mean over layers or a difference of two is taken draw by draw.
    """
    models = both_streams(base, aligned)
    plan = inputs.plan_folds(models[0].shape[0], groups, "grouped", folds, seed)
    weights, rows, draws = bootstrap_weights(plan.group, bootstrap, seed), [], []
    for layer, (x, y) in enumerate(zip(*models, strict=True)):
        probe, own = solver.fit(x, plan), solver.fit(y, plan)
        undone = _undo(*([a[:, layer].astype(np.float64) for a in model.arrays] for model in models), plan)
        read = (probe, x), (own, y), (probe, y), (probe, undone)
        first, second, direct, repaired = (scores.metrics(fitted, at, weights, "auroc")[0] for fitted, at in read)
        both = np.maximum(np.minimum(first, second) - 0.5, 0)
        kept = np.clip(direct - 0.5, 0, both)
        values = {"base": first, "aligned": second, "direct": direct, "repaired": repaired, "change": second - first}
        values |= {"gap": second - direct, "repair": repaired - direct, "kept": kept, "rotated": both - kept}
        values["rotated_repaired"] = np.maximum(np.clip(repaired - 0.5, 0, both) - kept, 0)
        values |= {"attenuated": np.maximum(first - 0.5, 0) - both, "created": np.maximum(second - 0.5, 0) - both}
        draws.append(values)
        numbers, (score_x, score_y) = with_intervals(values), (probe.scores(at)[0][:, 0] for at in (x, y))
        numbers |= {"verdict": _verdict(numbers), "signal_ratio": ratio(score_y.mean(), score_x.mean())}
        rows.append({"layer": layer} | numbers | {"spread_ratio": ratio(score_y.std(), score_x.std())})
    return DataFrame(rows), {name: np.stack([values[name] for values in draws]) for name in draws[0]}


def _undo(base: list[np.ndarray], aligned: list[np.ndarray], plan) -> np.ndarray:
    """Aligned differences [pairs, d] taken back to base's orientation and scale, by the map of the other folds."""
    out = aligned[0] - aligned[1]
    for k in range(plan.folds):
        held = plan.fold == k
        # About the mean of each kind: else the map would join whatever follows the label in training.
        x, y = (np.concatenate([a[~held] - a[~held].mean(0) for a in model]) for model in (base, aligned))
        xx, yy = x.T @ x, y.T @ y
        if np.trace(xx) > 0 and np.trace(yy) > 0:
            basis = joint_components(xx, yy, len(x), 1.0)[0]  # all: preference may lie in the faintest one
            turn = polar(xy := (x @ basis).T @ (y @ basis))
            scale = np.sum(turn * xy) / np.sum(xx * (basis @ basis.T))
            inside = out[held] @ basis
            out[held] = (out[held] + (inside @ turn.T - inside) @ basis.T) / (scale if scale > 0 else 1.0)
    return out


def _verdict(numbers: dict) -> str:
    if np.isnan(numbers["base_low"]):
        return "unknown"
    if not max(numbers["base_low"], numbers["aligned_low"]) > 0.5:
        return "none"
    words = {"rotated": (rotated := numbers["rotated_low"] > 0), "repaired": rotated and numbers["repair_low"] > 0}
    words |= {"attenuated": numbers["change_high"] < 0, "created": numbers["change_low"] > 0}
    return "+".join(word for word, holds in words.items() if holds) or "kept"
