"""Probes: known answers, agreement with scikit-learn, and the symmetries that an honest protocol must have."""

import numpy as np
import pytest
from scipy import sparse
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from alignlens import probes
from alignlens.calibration import nulls
from alignlens.core.errors import ProbeError
from alignlens.probes import inputs, scores, solver

N, LAYERS, D, PLANTED, STRENGTH = 300, 3, 24, 1, 1.0
GROUPS = np.arange(N) // 2
METRICS = ["accuracy", "auroc", "auprc", "coef_norm"]


@pytest.fixture(scope="module")
def planted():
    return nulls.planted_pairs(N, LAYERS, D, layer=PLANTED, strength=STRENGTH, seed=3)[0]


def correlated_pairs(n, d, seed=0):
    """Pairs with a decaying spectrum and unequal scales, as activations have, and a preference along a common axis."""
    rng = np.random.default_rng(seed)
    mix = (np.arange(1, d + 1) ** -0.7)[:, None] * np.linalg.qr(rng.standard_normal((d, d)))[0]
    x = rng.standard_normal((n, d)) @ mix
    x *= np.sign(x @ rng.standard_normal(d) + 0.7 * x.std() * np.sqrt(d) * rng.logistic(size=n))[:, None]
    x *= rng.lognormal(size=d)
    return nulls.Pairs(x[:, None].astype(np.float32), np.zeros((n, 1, d), np.float32))


# --- Known answers ------------------------------------------------------------------------------------------------


def test_grouped_noise_is_chance_and_intervals_cover_it():
    table = probes.fit_layers(*nulls.gaussian_pairs(150, 60, 16, seed=1), np.arange(150), bootstrap=300)
    for metric in ("accuracy", "auroc", "auprc"):
        covered = (table[f"{metric}_low"] <= 0.5) & (table[f"{metric}_high"] >= 0.5)
        assert covered.mean() >= 0.93, metric
        assert abs(table[metric].mean() - 0.5) < 0.03


def test_interval_width_matches_the_spread_over_samples():
    """Layers with the same effect and independent noise are repeated samples of one experiment."""
    pairs = nulls.gaussian_pairs(200, 60, 32, seed=2)
    pairs.chosen[:, :, 0] += 2.0
    table = probes.fit_layers(*pairs, np.arange(200), bootstrap=300)
    implied = (table.auroc_high - table.auroc_low).mean() / (2 * 1.96)
    # With the probes held fixed this ratio would be about 0.7.
    assert 0.85 < implied / table.auroc.std() < 1.4


@pytest.mark.parametrize(("n_pairs", "expected", "tolerance"), [(5000, 0.74, 0.02), (897, 0.951, 0.01)])
def test_published_protocol_reads_noise(n_pairs, expected, tolerance):
    assert probes.noise_floor(n_pairs, 2048, protocol="published", seed=0) == pytest.approx(expected, abs=tolerance)


def test_grouped_noise_floor_is_chance():
    assert probes.noise_floor(1000, 256, protocol="grouped", seed=0) == pytest.approx(0.5, abs=0.06)


def test_planted_direction_is_found_at_its_layer_and_only_there():
    pairs, direction = nulls.planted_pairs(1500, 4, 32, layer=2, strength=STRENGTH, seed=0)
    table = probes.fit_layers(*pairs, np.arange(1500), bootstrap=300).set_index("layer")
    assert table.auroc[2] == pytest.approx(norm.cdf(STRENGTH), abs=0.03)
    assert table.accuracy[2] == pytest.approx(norm.cdf(STRENGTH / np.sqrt(2)), abs=0.03)
    others = table.drop(index=2)
    assert ((others.auroc_low <= 0.5) & (others.auroc_high >= 0.5)).all()
    found = probes.out_of_fold(*pairs, np.arange(1500)).directions[2].mean(0)
    assert found @ direction / np.linalg.norm(found) > 0.9


@pytest.mark.parametrize("protocol", ["grouped", "published"])
def test_a_layer_without_difference_is_exactly_chance(planted, protocol):
    rejected = planted.rejected.copy()
    rejected[:, 0] = planted.chosen[:, 0]
    for seed in range(3):
        row = probes.fit_layers(planted.chosen, rejected, GROUPS, protocol=protocol, bootstrap=50, seed=seed).iloc[0]
        assert [row.accuracy, row.auroc, row.auroc_low, row.auroc_high, row.auprc, row.coef_norm] == [0.5] * 5 + [0]


# --- Agreement with scikit-learn ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(400, 48), (120, 300), (30, 6)])
def test_published_agrees_with_scikit_learn(n, d):
    pairs = correlated_pairs(n, d)
    x = (pairs.chosen - pairs.rejected)[:, 0].astype(np.float64)
    rows, y = np.vstack([x, -x]), np.repeat([1, 0], n)
    folds = StratifiedKFold(5, shuffle=True, random_state=42)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000, tol=1e-8))
    p = cross_val_predict(model, rows, y, cv=folds, method="predict_proba")[:, 1]
    norms = [np.linalg.norm(model.fit(rows[i], y[i])[-1].coef_) for i, _ in folds.split(rows, y)]

    result = probes.out_of_fold(*pairs, np.arange(n), protocol="published")
    table = probes.fit_layers(*pairs, np.arange(n), protocol="published", bootstrap=0).iloc[0]
    np.testing.assert_allclose(expit(result.scores[0]), p, atol=0.005)
    assert table.auroc == pytest.approx(roc_auc_score(y, p), abs=0.005)
    assert table.auprc == pytest.approx(average_precision_score(y, p), abs=0.005)
    assert table.accuracy == pytest.approx(((p > 0.5) == y).mean(), abs=0.005)
    assert table.f1 == pytest.approx(f1_score(y, p > 0.5), abs=0.005)
    assert table.coef_norm == pytest.approx(np.mean(norms), rel=0.001)


def sklearn_grouped(x, fold, held_out, penalty):
    """The probe a user would write: mirrored rows, training-fold scale, no intercept. Returns margins of all rows."""
    train = ~np.isin(fold, held_out)
    scale = np.sqrt((x[train] ** 2).mean(0))
    rows = np.vstack([x[train], -x[train]]) / scale
    c = 1 / (len(rows) * penalty)  # scikit-learn sums the loss over both mirrored rows of a pair
    model = LogisticRegression(C=c, fit_intercept=False, max_iter=5000, tol=1e-6)
    return x / scale @ model.fit(rows, np.repeat([1, 0], train.sum())).coef_[0]


@pytest.mark.parametrize(("n", "d"), [(400, 48), (120, 200)])
def test_grouped_agrees_with_nested_scikit_learn(n, d):
    pairs, groups = correlated_pairs(n, d, seed=1), np.arange(n) // 2
    x = (pairs.chosen - pairs.rejected)[:, 0].astype(np.float64)
    result = probes.out_of_fold(*pairs, groups)
    fold = result.fold_ids[:n]
    held_out = np.empty(n)
    for a in range(5):
        loss = {
            penalty: sum(
                np.logaddexp(0, -sklearn_grouped(x, fold, (a, b), penalty)[fold == b]).sum() for b in range(5) if b != a
            )
            for penalty in solver.PENALTIES
        }
        penalty = min(loss, key=loss.get)
        assert penalty == result.penalties[0, a]
        held_out[fold == a] = sklearn_grouped(x, fold, (a,), penalty)[fold == a]
    np.testing.assert_allclose(result.scores[0, :n], held_out, atol=0.01 * held_out.std())
    labels = np.repeat([1, 0], n)
    expected = roc_auc_score(labels, np.concatenate([held_out, -held_out]))
    table = probes.fit_layers(*pairs, groups, bootstrap=0).iloc[0]
    assert table.auroc == pytest.approx(expected, abs=0.002)
    assert table.auroc == pytest.approx(roc_auc_score(labels, result.scores[0]), abs=1e-6)
    assert table.auprc == pytest.approx(average_precision_score(labels, result.scores[0]), abs=1e-6)


def test_weighted_metrics_agree_with_scikit_learn_under_ties():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(-2, 4, 40) / 2, rng.integers(-4, 2, 40) / 2
    weights = rng.integers(0, 4, (5, 40)).astype(np.float32)
    auroc = scores.auroc(positive, negative, weights, weights)
    precision = scores.average_precision(positive, negative, weights)
    labels, score = np.repeat([1, 0], 40), np.concatenate([positive, negative])
    for k, w in enumerate(weights):
        assert auroc[k] == pytest.approx(roc_auc_score(labels, score, sample_weight=np.tile(w, 2)))
        assert precision[k] == pytest.approx(average_precision_score(labels, score, sample_weight=np.tile(w, 2)))


def test_training_influence_is_the_derivative_of_a_refit(planted, monkeypatch):
    """Give a little more weight to one pair, fit again, and see the held-out scores move as predicted."""
    monkeypatch.setattr(solver, "TOLERANCE", 1e-9)
    plan = inputs.plan_folds(N, GROUPS)
    x = inputs.Differences(planted)[PLANTED]
    fit = solver.fit(x, plan)
    slope = np.random.default_rng(0).standard_normal((N, 1))
    predicted = fit.influence(x, slope)[:, 0]
    heavy = 1 + 0.01 * (np.arange(N) % 7 == 0)
    weights = fit.weights * heavy[:, None]
    weights /= weights.sum(0)
    w, _ = fit.problem.solve(fit.scale, weights, fit.penalty, np.ones_like(weights))
    change = (x @ (w / (fit.problem.spread[:, None] * fit.scale)))[np.arange(N), plan.fold] - fit.scores(x)[0][:, 0]
    assert change @ slope[:, 0] == pytest.approx((heavy - 1) @ predicted, rel=0.03)


# --- Symmetries ---------------------------------------------------------------------------------------------------


def test_swapping_chosen_and_rejected_changes_nothing(planted):
    table = probes.fit_layers(*planted, GROUPS, bootstrap=100)
    swapped = probes.fit_layers(planted.rejected, planted.chosen, GROUPS, bootstrap=100)
    np.testing.assert_allclose(swapped.select_dtypes("number"), table.select_dtypes("number"), rtol=1e-9)


def test_row_order_does_not_matter(planted):
    order = np.random.default_rng(0).permutation(N)
    table = probes.fit_layers(*planted, GROUPS, bootstrap=100)
    shuffled = probes.fit_layers(planted.chosen[order], planted.rejected[order], GROUPS[order], bootstrap=100)
    np.testing.assert_allclose(shuffled.select_dtypes("number"), table.select_dtypes("number"), rtol=1e-3, atol=1e-4)


def test_scale_of_a_dimension_does_not_matter(planted):
    factor = np.float32(2.0) ** np.random.default_rng(0).integers(-8, 9, D)
    table = probes.fit_layers(*planted, GROUPS, bootstrap=0)
    scaled = probes.fit_layers(planted.chosen * factor, planted.rejected * factor, GROUPS, bootstrap=0)
    np.testing.assert_allclose(scaled[METRICS], table[METRICS], rtol=1e-6)


def test_results_repeat_and_seeds_change_the_folds(planted):
    first, again, other = (probes.out_of_fold(*planted, GROUPS, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert (first.fold_ids != other.fold_ids).any()


def test_a_group_lies_in_one_fold_and_each_fold_is_used(planted):
    names = np.array([f"prompt {i % 40}" for i in range(N)])
    result = probes.out_of_fold(*planted, names)
    assert all(len(set(result.fold_ids[np.tile(names, 2) == name])) == 1 for name in names)
    assert set(result.fold_ids) == set(range(5))
    assert probes.leak_check(result.labels, result.scores[0], result.fold_ids, result.pair_ids)["share_leaked"] == 0


def test_copies_leak_across_groups_but_not_within_one():
    """Four copies of each pair change nothing if they share a group, and everything if they do not."""
    pairs = nulls.gaussian_pairs(120, 1, 64, seed=1)
    copies = [np.tile(a, (4, 1, 1)) for a in pairs]
    once = probes.fit_layers(*pairs, np.arange(120), bootstrap=300).iloc[0]
    grouped = probes.fit_layers(*copies, np.tile(np.arange(120), 4), bootstrap=300).iloc[0]
    leaked = probes.fit_layers(*copies, np.arange(480), bootstrap=300).iloc[0]
    np.testing.assert_allclose(list(grouped[METRICS]), list(once[METRICS]), rtol=1e-3)
    assert grouped.auroc_low <= 0.5 <= grouped.auroc_high
    assert leaked.auroc_low > 0.7


def test_intervals_follow_the_number_of_groups_not_of_rows(planted):
    def width(chosen, rejected, groups):
        row = probes.fit_layers(chosen, rejected, groups, bootstrap=500).iloc[PLANTED]
        return row.auroc_high - row.auroc_low

    alone = width(*planted, np.arange(N))
    copied = width(*(np.repeat(a, 4, axis=0) for a in planted), np.repeat(np.arange(N), 4))
    more = width(*nulls.planted_pairs(4 * N, LAYERS, D, layer=PLANTED, strength=STRENGTH, seed=4)[0], np.arange(4 * N))
    assert copied == pytest.approx(alone, rel=0.15)
    assert more < 0.7 * alone


def test_out_of_fold_is_what_the_table_reports(planted):
    result = probes.out_of_fold(*planted, GROUPS, protocol="published")
    table = probes.fit_layers(*planted, GROUPS, protocol="published", bootstrap=0)
    for layer in range(LAYERS):
        assert roc_auc_score(result.labels, result.scores[layer]) == pytest.approx(table.auroc[layer], abs=1e-6)
    np.testing.assert_allclose(result.coef_norms.mean(1), table.coef_norm)
    assert result.directions.shape == (LAYERS, 5, D) and result.scores.shape == (LAYERS, 2 * N)
    assert table.filter(regex="_low|_high").filter(regex="acc|au").isna().all(axis=None)


def test_columns_of_the_table(planted):
    table = probes.fit_layers(*planted, GROUPS, bootstrap=50)
    assert list(table.columns[:7]) == ["layer", "accuracy", "auroc", "auroc_low", "auroc_high", "auprc", "coef_norm"]
    assert list(table.layer) == list(range(LAYERS))
    for metric in METRICS:
        assert ((table[f"{metric}_low"] <= table[metric]) & (table[metric] <= table[f"{metric}_high"])).all()


# --- Transfer -----------------------------------------------------------------------------------------------------


def test_transfer_between_identical_models_is_exactly_their_own(planted):
    table = probes.transfer(planted, tuple(planted), GROUPS, bootstrap=100)
    own = probes.fit_layers(*planted, GROUPS, bootstrap=100)
    for column in ("auroc_base", "auroc_aligned", "auroc_base_to_aligned", "auroc_aligned_to_base"):
        np.testing.assert_array_equal(table[column], own.auroc)
        np.testing.assert_array_equal(table[f"{column}_low"], table.auroc_base_low)
        np.testing.assert_allclose(table[f"{column}_low"], own.auroc_low, atol=1e-3)
    for column in ("difference", "gap_base_to_aligned", "gap_aligned_to_base"):
        assert (table[[column, f"{column}_low", f"{column}_high"]] == 0).all(axis=None)


def test_transfer_sees_a_rotation_as_a_gap_and_not_as_a_difference(planted):
    turned = nulls.Pairs(*(nulls.rotated_copy(a, 90, seed=1) for a in planted))
    row = probes.transfer(planted, turned, GROUPS, bootstrap=300).iloc[PLANTED]
    assert abs(row.difference) < 0.03
    assert row.gap_base_to_aligned_low > 0.1 and row.gap_aligned_to_base_low > 0.1
    assert row.auroc_base_to_aligned == pytest.approx(0.5, abs=0.1)


def test_transfer_sees_a_stronger_model_as_a_difference(planted):
    stronger, _ = nulls.planted_pairs(N, LAYERS, D, layer=PLANTED, strength=2 * STRENGTH, seed=3)
    table = probes.transfer(planted.chosen - planted.rejected, stronger, GROUPS, bootstrap=300)
    assert table.difference_low[PLANTED] > 0.05
    np.testing.assert_allclose(table.gap_base_to_aligned, table.auroc_aligned - table.auroc_base_to_aligned)
    np.testing.assert_allclose(table.gap_aligned_to_base, table.auroc_base - table.auroc_aligned_to_base)
    # At the planted layer either probe reads the stronger model better: the two directions are not confused.
    assert table.auroc_base_to_aligned[PLANTED] > table.auroc_aligned_to_base[PLANTED] + 0.05
    assert (table.difference.drop(index=PLANTED) == 0).all()


# --- Leak, null, control task -------------------------------------------------------------------------------------


def test_leak_check_separates_memory_from_reading():
    pairs = nulls.gaussian_pairs(897, 1, 2048, seed=0)
    result = probes.out_of_fold(*pairs, np.arange(897), protocol="published")
    check = probes.leak_check(result.labels, result.scores[0], result.fold_ids, result.pair_ids)
    assert check["auroc"] == pytest.approx(0.951, abs=0.01)
    assert check["auroc_leaked"] > 0.995
    assert check["auroc_clean_low"] < 0.5 < check["auroc_clean_high"]
    assert check["auroc_clean"] == pytest.approx(0.5, abs=0.1)
    assert check["share_leaked"] == pytest.approx(0.8, abs=0.04)
    assert check["n_leaked"] + check["n_clean"] == check["n_rows"] == 2 * 897


def test_leak_check_without_clean_rows_says_nan():
    check = probes.leak_check([1, 0, 1, 0], [0.9, 0.1, 0.8, 0.2], [0, 1, 0, 1], [0, 0, 1, 1])
    assert check["auroc"] == check["auroc_leaked"] == 1 and check["n_clean"] == 0
    assert np.isnan([check["auroc_clean"], check["auroc_clean_low"]]).all()


def test_permuted_sign_null(planted):
    null = probes.permuted_sign_null(*planted, GROUPS, permutations=60)
    table = probes.fit_layers(*planted, GROUPS, bootstrap=0)
    assert list(null.columns) == ["layer", "auroc_mean", "auroc_low", "auroc_high"]
    assert (abs(null.auroc_mean - 0.5) < 0.03).all()
    assert table.auroc[PLANTED] > null.auroc_high[PLANTED]
    assert null.auroc_low[0] < table.auroc[0] < null.auroc_high[0]
    published = probes.permuted_sign_null(*planted, GROUPS, protocol="published", permutations=60)
    assert (published.auroc_mean > 0.55).all()


def test_null_tosses_one_coin_per_group(planted):
    """Copies that share a group add nothing to the null; a coin for each would make its band too narrow."""
    copies = [np.tile(a, (4, 1, 1)) for a in planted]
    null = probes.permuted_sign_null(*copies, np.tile(np.arange(N), 4), permutations=20)
    once = probes.permuted_sign_null(*planted, np.arange(N), permutations=20)
    np.testing.assert_allclose(null, once, atol=1e-3)


def test_null_is_the_same_in_blocks(planted, monkeypatch):
    whole = probes.permuted_sign_null(*planted, GROUPS, permutations=7)
    for module in (solver, scores):
        monkeypatch.setattr(module, "BLOCK", N * 5 * 2)
    np.testing.assert_allclose(probes.permuted_sign_null(*planted, GROUPS, permutations=7), whole, atol=1e-3)
    blocks = probes.fit_layers(*planted, GROUPS, bootstrap=50)
    monkeypatch.undo()
    np.testing.assert_allclose(blocks[METRICS], probes.fit_layers(*planted, GROUPS, bootstrap=50)[METRICS], rtol=1e-3)


def test_control_task_is_memorised_only_under_the_published_protocol():
    pairs, _ = nulls.planted_pairs(N, 1, 100, layer=0, strength=1.5, seed=0)
    grouped, published = (
        probes.selectivity(*pairs, np.arange(N), protocol=protocol, bootstrap=300).iloc[0]
        for protocol in ("grouped", "published")
    )
    assert grouped.accuracy_control_low < 0.5 < grouped.accuracy_control_high
    assert published.accuracy_control_low > 0.6
    assert grouped.selectivity_low > 0.1 and grouped.selectivity > published.selectivity
    same = probes.fit_layers(*pairs, np.arange(N), bootstrap=300).iloc[0]
    for column in ("accuracy", "accuracy_low", "accuracy_high"):
        assert grouped[column] == pytest.approx(same[column], abs=1e-3)


# --- Baselines ----------------------------------------------------------------------------------------------------


def test_one_feature_scores_as_its_own_ranking():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(120, 30, N), rng.normal(100, 30, N)
    row = probes.fit_features(chosen, rejected, np.arange(N))
    longer = (chosen > rejected).mean()
    assert row.accuracy == pytest.approx(longer) and row.auroc_low > 0.5 and "layer" not in row
    assert row.auroc == pytest.approx(norm.cdf((chosen - rejected).mean() * np.sqrt(2) / (30 * np.sqrt(2))), abs=0.04)


def test_sparse_features_agree_with_dense_ones():
    rng = np.random.default_rng(0)
    chosen, rejected = (sparse.random_array((N, 60), density=0.1, rng=rng, format="csr") for _ in range(2))
    chosen = chosen + sparse.csr_array((np.ones(N), (np.arange(N), rng.integers(0, 3, N))), shape=(N, 60))
    for protocol in ("grouped", "published"):
        sparse_row, dense_row = (
            probes.fit_features(a, b, GROUPS, protocol=protocol, bootstrap=100)
            for a, b in ((chosen, rejected), (chosen.toarray(), rejected.toarray()))
        )
        assert dense_row.auroc > 0.6
        np.testing.assert_allclose(list(sparse_row[METRICS]), list(dense_row[METRICS]), atol=2e-3)


def bag_of_tokens(favourite, rng, vocabulary=50_000, length=40):
    """Word counts with a long tail, as language has; one word in twenty is the favourite."""
    words = np.minimum(rng.zipf(1.3, N * length), vocabulary - 1)
    words[rng.random(N * length) < 0.05] = favourite
    return sparse.csr_array((np.ones(N * length), (np.repeat(np.arange(N), length), words)), (N, vocabulary))


def test_bag_of_tokens_of_a_whole_vocabulary():
    rng = np.random.default_rng(0)
    row = probes.fit_features(bag_of_tokens(7, rng), bag_of_tokens(8, rng), np.arange(N), bootstrap=50)
    assert row.auroc_low > 0.7
    same = probes.fit_features(bag_of_tokens(7, rng), bag_of_tokens(7, rng), np.arange(N), bootstrap=50)
    assert same.auroc_low <= 0.5 <= same.auroc_high


# --- Nulls --------------------------------------------------------------------------------------------------------


def test_rotated_copy_turns_every_vector_by_the_angle():
    x = nulls.gaussian_pairs(50, 1, 16).chosen[:, 0]
    y = nulls.rotated_copy(x, 30, scale=2.0)
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(np.degrees(np.arccos(cosine)), 30, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 2 * np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(y @ y.T, 4 * x @ x.T, atol=1e-3)
    assert y.dtype == np.float32


def test_planted_pairs_differ_from_noise_at_one_layer_only():
    noise = nulls.gaussian_pairs(20, 3, 8, seed=5)
    pairs, direction = nulls.planted_pairs(20, 3, 8, layer=1, strength=2.0, seed=5)
    moved = pairs.chosen - noise.chosen
    np.testing.assert_allclose(moved[:, 1], np.tile(2 * direction, (20, 1)), atol=1e-6)
    assert (moved[:, [0, 2]] == 0).all() and (pairs.rejected == noise.rejected).all()


# --- Errors -------------------------------------------------------------------------------------------------------


def broken(planted, value):
    chosen = planted.chosen.copy()
    chosen[7, 2, 5] = value
    return chosen


CASES = {
    "shapes": (lambda p: ((p.chosen, p.rejected[:-1], GROUPS), {}), r"rejected is \(299, 3, 24\).*same pairs"),
    "two axes": (lambda p: ((p.chosen[:, 0], p.rejected[:, 0], GROUPS), {}), r"chosen has shape \(300, 24\).*fit_feat"),
    "empty": (lambda p: ((p.chosen[:0], p.rejected[:0], GROUPS[:0]), {}), "non-empty"),
    "nan": (lambda p: ((broken(p, np.nan), p.rejected, GROUPS), {}), r"^chosen is NaN or infinite at 1 .*\[7, 2\]"),
    "inf": (lambda p: ((p.chosen, broken(p, np.inf), GROUPS), {}), r"rejected is NaN or infinite at 1 .*\[7, 2\]"),
    "groups": (lambda p: ((*p, GROUPS[:-1]), {}), r"groups has shape \(299,\) for 300 pairs"),
    "few groups": (lambda p: ((*p, np.arange(N) % 4), {}), "4 groups cannot fill 5 folds"),
    "protocol": (lambda p: ((*p, GROUPS), {"protocol": "loo"}), "'loo': use 'grouped' or 'published'"),
    "folds": (lambda p: ((*p, GROUPS), {"folds": 2}), "folds is 2: at least 3"),
    "few pairs": (
        lambda p: ((p.chosen[:4], p.rejected[:4], GROUPS[:4]), {"protocol": "published"}),
        "4 pairs cannot fill 5 folds",
    ),
}


@pytest.mark.parametrize(("make", "message"), CASES.values(), ids=CASES)
def test_errors_say_what_where_and_what_to_do(planted, make, message):
    arguments, options = make(planted)
    for function in (probes.fit_layers, probes.out_of_fold, probes.permuted_sign_null, probes.selectivity):
        with pytest.raises(ProbeError, match=message):
            function(*arguments, **options)


def test_errors_of_the_other_functions(planted):
    with pytest.raises(ProbeError, match=r"base is \(300, 3, 24\) and aligned \(300, 2, 24\)"):
        probes.transfer(planted, (planted.chosen[:, :2], planted.rejected[:, :2]), GROUPS)
    with pytest.raises(ProbeError, match="aligned chosen is NaN or infinite"):
        probes.transfer(planted, (broken(planted, np.nan), planted.rejected), GROUPS)
    with pytest.raises(ProbeError, match="permutations is 0"):
        probes.permuted_sign_null(*planted, GROUPS, permutations=0)
    with pytest.raises(ProbeError, match="draws is 0"):
        probes.selectivity(*planted, GROUPS, draws=0)
    with pytest.raises(ProbeError, match=r"chosen has shape \(300, 3, 24\): pass"):
        probes.fit_features(*planted, GROUPS)
    with pytest.raises(ProbeError, match="in the same form"):
        probes.fit_features(sparse.eye_array(N), np.eye(N), GROUPS)
    with pytest.raises(ProbeError, match="sparse values.*NaN"):
        probes.fit_features(sparse.eye_array(N) * np.nan, sparse.eye_array(N), GROUPS)


@pytest.mark.parametrize(
    ("y", "p", "fold", "pair", "message"),
    [
        ([1, 0], [0.5], [0, 1], [0, 0], "same length"),
        ([1, 2], [0.5, 0.5], [0, 1], [0, 0], "labels must be 0"),
        ([1, 0], [0.5, np.nan], [0, 1], [0, 0], r"NaN or infinite in rows \[1\]"),
        ([1, 0], [0.5, 0.5], [0, 1], [0, 1], "No pair_id occurs twice"),
        ([], [], [], [], "No pair_id occurs twice"),
    ],
)
def test_errors_of_leak_check(y, p, fold, pair, message):
    with pytest.raises(ProbeError, match=message):
        probes.leak_check(y, p, fold, pair)


def test_a_probe_that_does_not_converge_says_so(planted, monkeypatch):
    monkeypatch.setattr(solver, "MAX_ITERATIONS", 1)
    with pytest.warns(UserWarning, match="probes had not converged after 1 steps"):
        probes.out_of_fold(*planted, GROUPS)
