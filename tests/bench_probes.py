"""Speed of the batched probes beside the scikit-learn loop a user would write: the same folds, penalties and scores.

Run: `pytest tests/bench_probes.py --benchmark-only` (set OMP_NUM_THREADS=1 for steady numbers). `extra_info` of each
row holds the ratio loop / batched and the largest AUROC difference; all takes about a minute, most of it the loop.
"""

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from alignlens import probes
from alignlens.calibration.nulls import Pairs
from alignlens.probes.solver import PENALTIES


def activation_like(n, layers, d, seed=0):
    """Correlated features with a decaying spectrum and a weak preference, float32."""
    rng = np.random.default_rng(seed)
    mix = (np.arange(1, d + 1) ** -0.5)[:, None] * np.linalg.qr(rng.standard_normal((d, d)))[0]
    x = rng.standard_normal((n, layers, d)) @ mix
    score = x @ rng.standard_normal(d)
    x *= np.sign(score / score.std() + rng.logistic(size=score.shape))[..., None]
    return Pairs(x.astype(np.float32), np.zeros_like(x, np.float32))


def loop(pairs, fold, penalties=PENALTIES):
    """Nested cross-validation without batching; AUROC of each layer, no intervals."""

    def margins(x, train, test, penalty):
        scale = np.sqrt((x[train] ** 2).mean(0))
        rows, labels = np.vstack([x[train], -x[train]]) / scale, np.repeat([1, 0], train.sum())
        model = LogisticRegression(C=1 / (len(rows) * penalty), fit_intercept=False, max_iter=5000)
        return x[test] / scale @ model.fit(rows, labels).coef_[0]

    auroc = []
    for layer in range(pairs.chosen.shape[1]):
        x = (pairs.chosen[:, layer] - pairs.rejected[:, layer]).astype(np.float64)
        score = np.empty(len(x))
        for a in np.unique(fold):
            others = [b for b in np.unique(fold) if b != a]
            loss = [
                sum(np.logaddexp(0, -margins(x, (fold != a) & (fold != b), fold == b, penalty)).sum() for b in others)
                for penalty in penalties
            ]
            score[fold == a] = margins(x, fold != a, fold == a, penalties[int(np.argmin(loss))])
        auroc.append(roc_auc_score(np.repeat([1, 0], len(x)), np.concatenate([score, -score])))
    return np.array(auroc)


@pytest.mark.parametrize(("n", "d", "layers"), [(500, 96, 6), (2000, 1024, 4)])
def test_fit_layers(benchmark, n, d, layers):
    """`fit_layers` with its 1000 bootstrap replicates; the loop is given no intervals to compute."""
    pairs, groups = activation_like(n, layers, d), np.arange(n)
    fold = probes.out_of_fold(*pairs, groups).fold_ids[:n]
    table = benchmark.pedantic(probes.fit_layers, args=(*pairs, groups), rounds=3, warmup_rounds=1)
    # The loop's time is linear in layers, so one layer of the large size stands for all.
    timed = layers if d < 500 else 1
    start = time.perf_counter()
    expected = loop(Pairs(*(a[:, :timed] for a in pairs)), fold)
    seconds = (time.perf_counter() - start) * layers / timed
    benchmark.extra_info["loop_seconds"] = round(seconds, 2)
    benchmark.extra_info["ratio"] = round(seconds / benchmark.stats.stats.min, 1)
    benchmark.extra_info["auroc_difference"] = float(np.abs(table.auroc[:timed] - expected).max())
    print(f"\n{n} x {d} x {layers}: {benchmark.extra_info}")
    assert benchmark.extra_info["auroc_difference"] < 0.005
    assert benchmark.extra_info["ratio"] > 1


@pytest.mark.parametrize("protocol", ["grouped", "published"])
def test_permuted_sign_null(benchmark, protocol):
    pairs = activation_like(500, 1, 96)
    null = benchmark.pedantic(
        probes.permuted_sign_null, args=(*pairs, np.arange(500)), kwargs={"protocol": protocol}, rounds=3
    )
    assert null.auroc_high[0] > 0.5
