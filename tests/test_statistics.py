"""Shared statistics: known answers, and what resampling may and may not change."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from alignlens.core import statistics as stats


def test_resampling_redraws_as_many_groups_as_there_are():
    counts = stats.resample(7, 500, 0)
    assert counts.shape == (500, 7) and (counts.sum(1) == 7).all()
    assert counts.mean() == 1 and counts.var() == pytest.approx(6 / 7, rel=0.1)
    generator = np.random.default_rng(0)
    np.testing.assert_array_equal(counts, stats.resample(7, 500, generator))
    assert (stats.resample(7, 500, generator) != counts).any()


def test_bootstrap_weights_move_the_rows_of_a_group_together():
    group = np.array([0, 1, 1, 2, 3, 3, 3])
    weights = stats.bootstrap_weights(group, 500, 0)
    assert weights.shape == (501, 7) and (weights[0] == 1).all()
    assert (weights[:, 1] == weights[:, 2]).all() and (weights[:, 4] == weights[:, 6]).all()
    assert (weights[:, [0, 1, 3, 4]].sum(1) == 4).all()


def test_random_signs_are_fair_and_shared_by_a_group():
    signs = stats.random_signs(np.repeat(np.arange(200), 3), 50)
    assert set(np.unique(signs)) == {-1.0, 1.0} and abs(signs.mean()) < 0.05
    assert (signs.reshape(200, 3, 50) == signs.reshape(200, 3, 50)[:, :1]).all()


def test_sums_of_groups_leave_out_what_is_missing():
    sums, counts = stats.by_group(np.array([[1.0, 5], [2, np.nan], [4, 6]]), ["b", "a", "b"])
    np.testing.assert_array_equal(sums, [[2, 0], [5, 11]])
    np.testing.assert_array_equal(counts, [[1, 0], [2, 2]])


def test_halves_keep_a_group_together():
    assert stats.alternating_halves(["z", "z", "a", "m", "a", "z"]).tolist() == [0, 0, 1, 0, 1, 0]


def test_intervals_of_draws():
    draws = np.arange(1001.0)
    assert stats.interval(draws).tolist() == [25, 975]
    assert stats.interval(np.append(draws, np.nan)).tolist() == [25, 975]
    found = stats.with_intervals({"a": np.append(500, draws), "b": np.array([3.0]), "c": np.array([3, np.nan])})
    assert [found["a"], found["a_low"], found["a_high"]] == [500, 25, 975]
    assert found["b"] == found["c"] == 3 and np.isnan([found["b_low"], found["c_high"]]).all()


def test_errors_and_p_values_of_normal_estimates():
    value = pd.Series([0.0, 1.96, -1.96, 1.0], index=list("abcd"))
    half = stats.Z95 * pd.Series([1.0, 1, 1, 0], index=list("abcd"))
    low, high = value - half, value + half
    assert stats.standard_error(low, high).tolist() == pytest.approx([1, 1, 1, 1e-12])
    assert stats.standard_error(1.0, 1.0, least=0.0) == 0
    p = stats.p_value(value, low, high)
    assert p.index.equals(value.index) and p.tolist() == pytest.approx([1, 0.05, 0.05, 0], abs=1e-4)
    assert stats.p_value(1.96, 0.0, 3.92, above=True) == norm.sf(1.96)


def test_correction_within_groups_skips_what_was_not_tested():
    p = pd.Series([0.01, 0.02, np.nan, 0.5, 0.04], index=list("vwxyz"))
    np.testing.assert_allclose(stats.corrected(p), [0.04, 0.04, np.nan, 0.5, 0.16 / 3])
    np.testing.assert_allclose(stats.corrected(p.to_numpy()), stats.corrected(p))
    within = stats.corrected(p, pd.Series(list("aabbb"), index=p.index))
    np.testing.assert_allclose(within, [0.02, 0.02, np.nan, 0.5, 0.08])
    assert stats.corrected(np.full(3, np.nan)).tolist() == pytest.approx([np.nan] * 3, nan_ok=True)


def test_over_seeds_keeps_the_error_that_seeds_share():
    table = pd.DataFrame({"family": "a", "method": "dpo", "layer": 0, "auroc": [0.6, 0.6, 0.6]})
    table = table.assign(auroc_low=0.5, auroc_high=0.7)
    row = stats.over_seeds(table, ["auroc"]).iloc[0]
    assert [row.auroc, row.auroc_low, row.auroc_high] == pytest.approx([0.6, 0.5, 0.7])
    spread = stats.over_seeds(table.assign(auroc=[0.6, 0.7, 0.8]), ["auroc"]).iloc[0]
    assert spread.auroc_high - spread.auroc == pytest.approx(1.96 * np.sqrt((0.1 / 1.96) ** 2 + 0.01 / 3))
    bare = stats.over_seeds(table[["family", "method", "layer", "auroc"]], ["auroc"]).iloc[0]
    assert bare.auroc_low == bare.auroc_high == pytest.approx(0.6)
