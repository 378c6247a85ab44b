"""Planted features: the world is as described, the score knows the truth, and our crosscoder recovers it."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from alignlens import calibration, dictionaries
from alignlens.calibration import KINDS, Planted, Regime
from alignlens.calibration.planted import SHARES
from alignlens.core.errors import DictionaryError

SMALL = Regime(features=48, d=24)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted(SMALL, seed=0)


@pytest.fixture(scope="module")
def truth(planted) -> pd.DataFrame:
    """The table that a perfect instrument would give."""
    return pd.DataFrame({"label": planted.kind, "degrees": planted.degrees, "ratio": planted.ratio})


# --- The planted world ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["easy", "hard", SMALL])
def test_rows_are_what_their_kind_says(regime):
    planted = Planted(regime, seed=1)
    assert dict(pd.Series(planted.kind).value_counts(normalize=True)) == dict(zip(KINDS, SHARES, strict=True))
    base, aligned = (planted.rows[name].astype(np.float64) for name in ("base", "aligned"))
    long, short = np.linalg.norm(base, axis=1), np.linalg.norm(aligned, axis=1)
    is_kind = {kind: planted.kind == kind for kind in KINDS}
    np.testing.assert_allclose(long, ~is_kind["aligned_only"], atol=1e-5)
    np.testing.assert_allclose(short, np.where(is_kind["base_only"], 0, planted.ratio), atol=1e-5)
    shared = np.char.startswith(planted.kind, "shared")
    angle = np.degrees(np.arccos(np.clip((base * aligned).sum(1) / (long * short + 1e-12), -1, 1)))
    np.testing.assert_allclose(angle[shared], planted.degrees[shared], atol=0.1)
    np.testing.assert_array_equal(base[is_kind["shared_same"]], aligned[is_kind["shared_same"]])
    assert (planted.degrees[is_kind["shared_rotated"]] > 30).all() and (planted.degrees < 60).all()
    assert (planted.ratio[is_kind["shared_attenuated"]] < 0.7).all() and (planted.ratio > 0.3).all()
    assert (planted.degrees[~is_kind["shared_rotated"]] == 0).all()
    assert (planted.ratio[~is_kind["shared_attenuated"]] == 1).all()


@pytest.mark.parametrize(("groups", "nested"), [(0, False), (12, False), (0, True), (12, True)])
def test_features_fire_as_often_as_stated(groups, nested):
    planted = Planted(dataclasses.replace(SMALL, groups=groups, nested=nested), seed=0)
    rows = 100_000
    codes = planted.codes(rows, seed=1)
    fired = (codes > 0).mean(0)
    assert ((planted.frequency >= 0.005) & (planted.frequency <= 0.05)).all()
    # Half of an exclusive feature's firings, drawn twice in one row now and then, count once.
    spread = 4.5 * np.sqrt(planted.frequency / rows) * (3 if groups else 1)
    assert (np.abs(fired - planted.frequency) < spread + 0.03 * planted.frequency * nested).all()
    assert planted.l0 == pytest.approx((codes > 0).sum(1).mean(), rel=0.03)
    values = codes[codes > 0]
    assert values.min() >= 0.5 and values.max() <= 1.5 and values.mean() == pytest.approx(1, abs=0.01)


def test_frequencies_are_log_uniform():
    frequency = Planted("hard", seed=0).frequency
    place = np.log(frequency / 0.001) / np.log(50)
    np.testing.assert_allclose(np.quantile(place, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.06)


def test_independent_features_do_not_fire_together_and_groups_do():
    def together(**changes):
        planted = Planted(dataclasses.replace(SMALL, **changes), seed=0)
        fires = (planted.codes(100_000, seed=1) > 0).astype(np.float32)
        expected = len(fires) * np.outer(fires.mean(0), fires.mean(0))
        ratio = fires.T @ fires / expected
        same = planted._group[:, None] == planted._group
        np.fill_diagonal(same, False)
        return ratio[same].mean(), ratio[planted._group[:, None] != planted._group]

    alone = together()[0]
    within, across = together(groups=6)
    assert alone == pytest.approx(1, abs=0.05) and across.mean() == pytest.approx(1, abs=0.05)
    # On a tenth of the rows five times as frequent: 0.1 x 25 + 0.9 x (0.5 / 0.9)^2.
    assert within == pytest.approx(2.78, rel=0.05)


@pytest.mark.parametrize("groups", [0, 12])
def test_nested_exclusive_features_fire_half_of_the_time_with_their_partner(groups):
    planted = Planted(dataclasses.replace(SMALL, features=96, rarest=0.002, groups=groups, nested=True), seed=0)
    fires = planted.codes(200_000, seed=1) > 0
    own, other = fires[:, planted._exclusive], fires[:, planted._partner]
    share = (own & other).sum(0) / own.sum(0)
    assert (np.isin(planted.kind[planted._partner], ["shared_same"])).all()
    assert share.mean() == pytest.approx(0.51, abs=0.02)
    assert ((share > 0.4) & (share < 0.65)).all()
    # Its partner fires without it, too, so the two are no single feature.
    assert ((own & other).sum(0) / other.sum(0)).max() < 0.65
    plain = Planted(dataclasses.replace(SMALL, features=96, rarest=0.002), seed=0)
    np.testing.assert_array_equal(planted.kind, plain.kind)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_noise_is_as_strong_as_stated_and_independent_between_streams(noise):
    planted = Planted(dataclasses.replace(SMALL, noise=noise), seed=0)
    codes, streams = planted.codes(50_000, seed=1), planted.sample(50_000, seed=1)
    signal = {name: codes @ rows for name, rows in planted.rows.items()}
    rest = {name: streams[name] - signal[name] for name in streams}
    assert all(x.dtype == np.float32 and x.shape == (50_000, 24) for x in streams.values())
    power = np.mean([np.square(x).sum(1).mean() for x in signal.values()])
    for x in rest.values():
        assert np.sqrt(np.square(x).sum(1).mean() / power) == pytest.approx(noise, rel=0.02, abs=1e-6)
    if noise:
        assert abs(np.corrcoef(rest["base"].ravel(), rest["aligned"].ravel())[0, 1]) < 0.01


def test_seeds_reproduce_worlds_and_samples(planted):
    again, other = Planted(SMALL, seed=0), Planted(SMALL, seed=1)
    for name in ("base", "aligned"):
        np.testing.assert_array_equal(again.rows[name], planted.rows[name])
        np.testing.assert_array_equal(again.sample(500, seed=3)[name], planted.sample(500, seed=3)[name])
        assert np.abs(other.rows[name] - planted.rows[name]).max() > 0.1
        assert np.abs(planted.sample(500, seed=4)[name] - planted.sample(500, seed=3)[name]).max() > 0.1


# --- The score ------------------------------------------------------------------------------------------------------


def test_the_truth_scores_perfectly(planted, truth):
    found = calibration.score(planted, planted.rows, truth).set_index("kind")
    assert list(found.index) == list(KINDS) and found.planted.sum() == found.labelled.sum() == 48
    assert (found.recall == 1).all() and (found.found == 1).all() and (found.false_discovery == 0).all()
    assert found.degrees_error_95["shared_rotated"] == 0 and found.ratio_error_95["shared_attenuated"] == 0


def test_order_and_length_of_latents_do_not_matter(planted, truth):
    order = np.random.default_rng(0).permutation(48)
    rows = {name: 7 * r[order] for name, r in planted.rows.items()}
    found = calibration.score(planted, rows, truth.iloc[order].reset_index(drop=True))
    pd.testing.assert_frame_equal(found, calibration.score(planted, planted.rows, truth))


def test_shuffled_labels_score_at_chance(planted, truth):
    rng = np.random.default_rng(0)
    tables = [truth.assign(label=rng.permutation(truth.label)) for _ in range(50)]
    found = pd.concat([calibration.score(planted, planted.rows, table) for table in tables]).groupby("kind").mean()
    share = dict(zip(KINDS, SHARES, strict=True))
    for kind, row in found.iterrows():
        assert row.found == 1
        assert row.recall == pytest.approx(share[kind], abs=0.06)
        assert row.false_discovery == pytest.approx(1 - share[kind], abs=0.06)


def test_errors_of_angle_and_ratio_are_measured(planted, truth):
    off = truth.assign(degrees=truth.degrees - 3, ratio=truth.ratio * 1.1)
    found = calibration.score(planted, planted.rows, off).set_index("kind")
    assert found.degrees_error["shared_rotated"] == pytest.approx(3)
    assert found.ratio_error_95["shared_attenuated"] == pytest.approx(0.1)
    assert found.degrees_error.isna().sum() == found.ratio_error.isna().sum() == 4


def test_missing_doubled_and_invented_latents_are_counted(planted, truth):
    same = np.flatnonzero(planted.kind == "shared_same")
    rng = np.random.default_rng(0)
    invented = {name: rng.standard_normal((3, 24)) for name in planted.rows}

    def scored(keep, label="shared_same", extra=None):
        rows = {n: np.concatenate([r[keep], extra[n]]) if extra else r[keep] for n, r in planted.rows.items()}
        more = pd.DataFrame({"label": [label] * (len(rows["base"]) - len(keep))})
        table = pd.concat([truth.iloc[keep], more], ignore_index=True)
        return calibration.score(planted, rows, table).set_index("kind").loc["shared_same"]

    everything = np.arange(48)
    missing = scored(np.delete(everything, same[:6]))
    assert (missing.found, missing.recall, missing.false_discovery) == (0.75, 0.75, 0)
    copies = {name: r[same[:3]] for name, r in planted.rows.items()}
    for extra in (copies, invented):
        more = scored(everything, extra=extra)
        assert (more.recall, more.labelled) == (1, 27) and more.false_discovery == pytest.approx(3 / 27)
    dead = scored(everything, label="dead", extra=invented)
    assert (dead.recall, dead.labelled, dead.false_discovery) == (1, 24, 0)


def test_a_latent_must_point_the_feature_s_way(planted, truth):
    rng = np.random.default_rng(0)

    def found(noise):
        rows = {name: r + noise / np.sqrt(24) * rng.standard_normal(r.shape) for name, r in planted.rows.items()}
        return calibration.score(planted, rows, truth).found.mean()

    assert found(0.15) == 1 and found(1.5) < 0.1


# --- Our crosscoder on planted worlds --------------------------------------------------------------------------------


def recovered(regime, seed, *, samples, epochs) -> tuple[pd.DataFrame, dict]:
    """(score by kind, quality) of our configuration, on rows that it was not trained on."""
    planted = Planted(regime, seed)
    streams, test = planted.sample(samples, seed=1), planted.sample(50_000, seed=2)
    config = calibration.config_for(planted, "alignlens", epochs=epochs, seed=seed)
    found = dictionaries.train(streams, config)
    table = calibration.score(planted, found.rows(), dictionaries.classify(found, test))
    return table.set_index("kind"), dictionaries.evaluate(found, test)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_planted_world_is_recovered(seed):
    found, quality = recovered(SMALL, seed, samples=20_000, epochs=20)
    assert (found.recall >= 0.95).all() and (found.false_discovery <= 0.05).all()
    assert found.degrees_error_95["shared_rotated"] <= 2 and found.ratio_error_95["shared_attenuated"] <= 0.03
    assert quality["r2"] > 0.97 and quality["dead_share"] < 0.25


def test_the_stated_tolerances_do_not_hold_for_an_untrained_crosscoder():
    found, quality = recovered(SMALL, 0, samples=2_000, epochs=0.5)
    assert found.recall.mean() < 0.3 and quality["r2"] < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_easy_regime_is_recovered(seed):
    """Recall and precision of 99 % for every label, angles to 2 degrees, norm ratios to 3 %."""
    found, quality = recovered("easy", seed, samples=100_000, epochs=10)
    assert (found.recall >= 0.99).all() and (found.false_discovery <= 0.01).all()
    assert found.degrees_error_95["shared_rotated"] <= 2 and found.ratio_error_95["shared_attenuated"] <= 0.03
    assert quality["r2"] > 0.93


@pytest.mark.parametrize("instrument", calibration.INSTRUMENTS)
def test_each_instrument_is_scored_in_the_same_columns(monkeypatch, instrument):
    monkeypatch.setitem(calibration.REGIMES, "small", SMALL)
    monkeypatch.setattr(calibration.planted, "HELD_OUT", 2000)
    table = calibration.run("small", 0, instrument, samples=4000, epochs=1)
    assert list(table.kind) == list(KINDS) and (table.instrument == instrument).all()
    columns = ["planted", "found", "recall", "labelled", "false_discovery", "regime", "seed", "samples", "r2", "live"]
    assert table[columns].notna().all(axis=None)
    assert table.labelled.sum() <= table.live.iloc[0] and table.r2.iloc[0] <= 1


def test_an_unknown_instrument_is_refused():
    with pytest.raises(DictionaryError, match="'ruler' is unknown; choose from alignlens, l1, published"):
        calibration.run("easy", 0, "ruler", samples=100, epochs=1)
