"""Geometry: a planted turn, scale or noise comes back as itself and as nothing else; planted parts of a change too."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from alignlens import geometry
from alignlens.calibration import nulls
from alignlens.core.errors import AlignlensError, GeometryError

D = 64


def rows(n, d=D, *, decay=0.0, seed=0):
    """Gaussian rows [n, d] with a power-law spectrum along random axes; decay 0 is isotropic."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -decay @ axes


def noisy(y, share, seed=9):
    """y with isotropic noise that has `share` of its variance."""
    size = np.sqrt(share * y.var(0).sum() / y.shape[1])
    return y + size * np.random.default_rng(seed).standard_normal(y.shape)


def turned(pairs, degrees, scale=1.0):
    return nulls.Pairs(*(nulls.rotated_copy(x, degrees, scale=scale, seed=3) for x in pairs))


# --- compare ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("n", [2000, 300])
@pytest.mark.parametrize(("degrees", "scale"), [(5, 1.0), (20, 0.5), (45, 2.0), (90, 1.0), (180, 1.0)])
def test_a_turn_and_a_scale_come_back(n, decay, degrees, scale):
    x = rows(n, decay=decay)
    found = geometry.compare(x, nulls.rotated_copy(x, degrees, scale=scale))
    assert found["rotation_degrees"] == pytest.approx(degrees, abs=0.2)
    assert found["norm_ratio"] == pytest.approx(scale, rel=0.01)
    assert found["cka"] == pytest.approx(1, abs=1e-9)
    assert found["procrustes_residual"] < 0.005
    assert found["identity_residual"] == pytest.approx(1 - max(np.cos(np.radians(degrees)), 0) ** 2, abs=0.02)


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("degrees", [0, 5, 20, 45, 90])
def test_noise_is_neither_a_turn_nor_a_scale(decay, share, degrees):
    x = rows(2000, decay=decay, seed=1)
    found = geometry.compare(x, noisy(nulls.rotated_copy(x, degrees, scale=0.5), share))
    assert found["rotation_degrees"] == pytest.approx(degrees, abs=2)
    assert found["norm_ratio"] == pytest.approx(0.5, rel=0.01)
    assert found["procrustes_residual"] == pytest.approx(share / (1 + share), abs=0.03)
    assert found["raw_norm_ratio"] > 0.51


def test_noise_at_few_rows_stays_within_the_documented_error():
    for seed in range(4):
        x = rows(300, decay=1.0, seed=seed)
        for degrees in (0, 20, 90):
            y = noisy(nulls.rotated_copy(x, degrees, seed=seed), 0.5, seed + 20)
            assert geometry.compare(x, y)["rotation_degrees"] == pytest.approx(degrees, abs=8)


def test_a_stream_compared_with_itself_scaled_or_shifted_did_not_turn():
    x = rows(400, decay=1.0)
    for y, scale, shift in ((x, 1, 0), (0.5 * x, 0.5, None), (x + 3, 1, 3 * np.sqrt(D))):
        found = geometry.compare(x, y)
        assert found["rotation_degrees"] == pytest.approx(0, abs=1e-4)
        assert found["norm_ratio"] == pytest.approx(scale, rel=1e-9)
        assert found["identity_residual"] == pytest.approx(0, abs=1e-9)
        assert found["procrustes_residual"] == pytest.approx(0, abs=1e-9)
        assert found["principal_angles"] == pytest.approx(np.zeros(len(found["principal_angles"])), abs=1e-4)
        if shift is not None:
            rms = np.sqrt(x.var(0).sum())
            assert found["mean_shift"] == pytest.approx(shift / rms, abs=1e-9)


def test_a_stream_turned_into_new_dimensions_reads_as_a_right_angle():
    x = np.zeros((500, 20))
    x[:, :5] = rows(500, 5)
    found = geometry.compare(x, np.roll(x, 10, axis=1))
    assert found["rotation_degrees"] == pytest.approx(90, abs=1)
    assert found["norm_ratio"] == pytest.approx(1, rel=1e-6)


def test_a_mirror_image_reads_as_the_half_turn_of_one_direction():
    x = rows(1000, 16)
    mirror = x * np.where(np.arange(16) == 0, -1, 1)
    share = x.var(0)[0] / x.var(0).sum()
    assert geometry.compare(x, mirror)["rotation_degrees"] == pytest.approx(180 * np.sqrt(share), abs=0.5)


def test_unequal_turns_are_averaged_as_squares_weighted_by_variance():
    """One plane with most of the variance turns by 60 degrees, the others stay."""
    x = rows(2000, 8) * np.array([3, 3, 1, 1, 1, 1, 1, 1])
    y = x.copy()
    y[:, :2] = nulls.rotated_copy(x[:, :2], 60)
    share = x.var(0)[:2].sum() / x.var(0).sum()
    assert geometry.compare(x, y)["rotation_degrees"] == pytest.approx(60 * np.sqrt(share), abs=0.1)
    assert geometry.compare(x, noisy(y, 0.3))["rotation_degrees"] == pytest.approx(60 * np.sqrt(share), abs=1.5)


def test_only_the_unbiased_cka_of_unrelated_streams_is_zero():
    found = [geometry.compare(rows(80, seed=s), rows(80, seed=s + 50)) for s in range(10)]
    assert abs(np.mean([one["cka"] for one in found])) < 0.03
    assert min(one["cka_biased"] for one in found) > 0.3


def test_unrelated_streams_have_no_angle():
    for seed in range(3):
        found = geometry.compare(rows(600, seed=seed), rows(600, seed=seed + 50))
        assert np.isnan(found["rotation_degrees"]) and abs(found["map_agreement"]) < 0.1


@pytest.mark.parametrize(("n", "d"), [(30, 12), (40, 70)])
def test_cka_agrees_with_its_definition_on_gram_matrices(n, d):
    x = rows(n, d, seed=1)
    y = x + rows(n, d, seed=2)

    def hsic(k, m):
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        return np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()

    k, m = x @ x.T, y @ y.T
    centre = np.eye(n) - 1 / n
    ck, cm = centre @ k @ centre, centre @ m @ centre
    found = geometry.compare(x + 5, y)
    assert found["cka"] == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), rel=1e-9)
    biased = np.sum(ck * cm) / np.sqrt(np.sum(ck**2) * np.sum(cm**2))
    assert found["cka_biased"] == pytest.approx(biased, rel=1e-9)


def test_principal_angles_agree_with_scipy():
    x, y = rows(500, 12, decay=1.5, seed=1), rows(500, 12, decay=1.5, seed=2)
    found = geometry.compare(x, y)["principal_angles"]
    share = np.cumsum(np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]) / x.var(0, ddof=1).sum()
    k = np.flatnonzero(share >= 0.9)[0] + 1
    leading = [np.linalg.svd(a - a.mean(0), full_matrices=False)[2][:k].T for a in (x, y)]
    assert found == pytest.approx(np.degrees(subspace_angles(*leading))[::-1], abs=1e-5)
    assert found == sorted(found)


def test_errors_say_what_is_wrong():
    x = rows(50, 4)
    holed = x.copy()
    holed[3, 0] = np.nan
    for y, words in ((x[:-1], "same rows"), (holed, r"rows \[3\]"), (x[:, 0], "rows, d"), (np.ones_like(x), "equal")):
        with pytest.raises(GeometryError, match=words):
            geometry.compare(x, y)
    pairs = nulls.gaussian_pairs(40, 1, 4)
    with pytest.raises(GeometryError, match="differences only"):
        geometry.decompose(pairs.chosen, pairs.chosen, np.arange(40))
    with pytest.raises(GeometryError, match="differences only"):
        geometry.compare_layers(pairs, pairs.chosen, np.arange(40))
    with pytest.raises(AlignlensError, match="one group"):
        geometry.halves(x, np.arange(7))


# --- Floors and layers --------------------------------------------------------------------------------------------


def test_halves_of_structure_agree_and_halves_of_noise_do_not():
    groups = np.arange(400) // 2
    sharp = geometry.halves(rows(400, 32, decay=3.0) + 4, groups)
    noise = geometry.halves(rows(400, 32), groups)
    assert max(sharp["principal_angles"]) < 5 < 60 < max(noise["principal_angles"])
    assert sharp["mean_cosine"] > 0.99 and abs(noise["mean_cosine"]) < 0.2
    assert sharp["mean_shift"] < 0.3 and 1 <= noise["raw_norm_ratio"] < 1.05


def test_halves_keep_copies_of_a_prompt_together():
    """Copies on both sides would make the halves equal: split by group they differ as much as half as many rows do."""
    x = rows(60, 32)
    copies = geometry.halves(np.tile(x, (2, 1)), np.tile(np.arange(60), 2))
    assert copies["mean_cosine"] == pytest.approx(geometry.halves(x, np.arange(60))["mean_cosine"], abs=1e-9)


@pytest.fixture(scope="module")
def layers():
    """Layer 0 is the same, layer 1 turned by 20 degrees, layer 2 halved; preference planted in all."""
    chosen, rejected = nulls.gaussian_pairs(400, 3, 32, seed=1)
    chosen[..., 0] += 2
    base = nulls.Pairs(chosen, rejected)
    aligned = nulls.Pairs(chosen.copy(), rejected.copy())
    for x, y in zip(base, aligned, strict=True):
        y[:, 1] = nulls.rotated_copy(x[:, 1], 20)
        y[:, 2] = 0.5 * x[:, 2]
        y += 0.05 * np.random.default_rng(71 + int(x is chosen)).standard_normal(y.shape, dtype=np.float32)
    return geometry.compare_layers(base, aligned, np.arange(400) // 2), base, aligned


def test_each_layer_reads_as_what_was_done_to_it(layers):
    table = layers[0]
    assert table.rotation_degrees.to_numpy() == pytest.approx([0, 20, 0], abs=0.7)
    assert table.norm_ratio.to_numpy() == pytest.approx([1, 1, 0.5], abs=0.005)
    assert table.signal_ratio.to_numpy() == pytest.approx([1, 1, 0.5], abs=0.02)
    assert table.noise_ratio.to_numpy() == pytest.approx([1, 1, 0.5], abs=0.02)
    cosine = np.cos(np.radians([0, 20, 0]))
    assert table.mean_cosine.to_numpy() == pytest.approx(cosine, abs=0.02)
    assert table.probe_cosine.to_numpy() == pytest.approx(cosine, abs=0.1)
    # The floor of the unturned layers lies below them: an angle of theirs would be no news.
    assert (table.mean_cosine_floor < 0.99).all() and (table.mean_cosine_floor > 0.7).all()
    assert (table.preference_angle_1.to_numpy()[[0, 2]] < 10).all() and table.preference_angle_1[1] > 10
    for name in ("cka", "rotation_degrees", "norm_ratio", "mean_cosine", "signal_ratio", "noise_ratio"):
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all(), name
    assert table.rotation_degrees_low[1] > 19 and table.rotation_degrees_high[1] < 21


def test_layers_agree_with_compare_and_repeat(layers):
    table, base, aligned = layers
    stacked = [np.concatenate([part[:, 1] for part in model]) for model in (base, aligned)]
    alone = geometry.compare(*stacked)
    for name in ("cka", "cka_biased", "raw_norm_ratio", "mean_shift", "variance_kept"):
        assert table[name][1] == pytest.approx(alone[name], rel=1e-9)
    assert table.rotation_degrees[1] == pytest.approx(alone["rotation_degrees"], abs=0.3)  # other halves
    named = [SimpleNamespace(chosen=model.chosen, rejected=model.rejected) for model in (base, aligned)]
    again = geometry.compare_layers(*named, np.arange(400) // 2)
    assert again.equals(table)


def test_jackknife_intervals_match_the_spread_over_samples():
    """Layers with the same effect and independent noise are repeated samples of one experiment."""
    base = nulls.gaussian_pairs(200, 30, 8, seed=2)
    base.chosen[:, :, 0] += 1
    aligned = turned(base, 20, 0.7)
    for x, seed in zip(aligned, (71, 72), strict=True):
        x += 0.5 * np.random.default_rng(seed).standard_normal(x.shape, dtype=np.float32)
    table = geometry.compare_layers(base, aligned, np.arange(200))
    for name in ("cka", "rotation_degrees", "norm_ratio", "mean_cosine", "signal_ratio", "noise_ratio"):
        implied = (table[f"{name}_high"] - table[f"{name}_low"]).mean() / (2 * 2.09)
        assert 0.6 < implied / table[name].std() < 1.6, name
    assert ((table.rotation_degrees_low < 20) & (table.rotation_degrees_high > 20)).mean() > 0.8


# --- decompose ----------------------------------------------------------------------------------------------------

N, GROUPS = 500, np.arange(500) // 2
PARTS = ["rotated", "rotated_repaired", "attenuated", "created"]


def planted(seed=1):
    return nulls.planted_pairs(N, 1, 24, layer=0, strength=1.5, seed=seed)[0]


def decompose(base, aligned, **options):
    table = geometry.decompose(base, aligned, GROUPS, bootstrap=options.pop("bootstrap", 200), **options)
    above = (table[["base", "aligned"]] - 0.5).clip(lower=0)
    assert (table.kept + table.rotated + table.attenuated).to_numpy() == pytest.approx(above.base.to_numpy(), abs=1e-12)
    total = table.kept + table.rotated + table.created
    assert total.to_numpy() == pytest.approx(above.aligned.to_numpy(), abs=1e-12)
    assert (table[["kept", *PARTS]] >= 0).all().all()
    return table.iloc[0] if len(table) == 1 else table


def test_identical_models_keep_everything():
    found = decompose(planted(), planted())
    assert found.kept == found.base - 0.5 > 0.4
    assert (found[[*PARTS, "change", "gap"]] == 0).all()
    assert (found.verdict, found.signal_ratio, found.spread_ratio) == ("kept", 1, 1)


def test_without_intervals_there_is_no_verdict():
    assert decompose(planted(), planted(), bootstrap=0).verdict == "unknown"


def test_a_scaled_copy_is_kept_and_its_scale_reported():
    found = decompose(planted(), turned(planted(), 0, 0.5))
    assert found.verdict == "kept"
    assert found.kept == pytest.approx(found.base - 0.5, abs=1e-4)
    assert (found.signal_ratio, found.spread_ratio) == pytest.approx((0.5, 0.5), rel=1e-4)


@pytest.mark.parametrize(("degrees", "scale"), [(60, 2.0), (90, 0.5)])
def test_a_turned_copy_is_rotated_and_repaired(degrees, scale):
    found = decompose(planted(), turned(planted(), degrees, scale))
    assert found.verdict == "rotated+repaired"
    assert found.rotated > 0.1 and found.rotated_repaired == pytest.approx(found.rotated, abs=0.01)
    assert found.repaired == pytest.approx(found.base, abs=0.005)
    assert max(found.attenuated, found.created) < 0.01


def test_signal_in_one_model_only_is_attenuated_or_created():
    noise = nulls.gaussian_pairs(N, 1, 24, seed=5)
    lost, new = decompose(planted(), noise), decompose(noise, planted())
    assert (lost.verdict, new.verdict) == ("attenuated", "created")
    assert lost.attenuated > 0.35 and new.created > 0.35
    assert max(lost.rotated, lost.created, new.rotated, new.attenuated) < 0.06


def test_a_signal_that_moves_while_the_stream_stays_is_rotated_but_not_repaired():
    """The map of the stream is the identity: no orthogonal map of the whole explains the new direction."""
    chosen, rejected = nulls.gaussian_pairs(N, 1, 24, seed=6)
    first, second = chosen.copy(), chosen.copy()
    first[..., 0] += 1.5
    second[..., 1] += 1.5
    found = decompose((first, rejected), (second, rejected))
    assert found.verdict == "rotated"
    assert found.rotated > 0.3 and found.rotated_repaired < 0.05


def test_noise_against_noise_has_nothing_to_split():
    pairs = [nulls.gaussian_pairs(N, 30, 16, seed=seed) for seed in (7, 8)]
    table = decompose(*pairs)
    assert (table.verdict == "none").mean() >= 0.9
    assert not table.verdict.str.contains("rotated").any()


def test_verdicts_on_one_signal_with_fresh_noise_are_kept():
    """Same effect, independent pairs noise in each model: nothing changed, so nearly all layers say so."""
    models = []
    for seed in (1, 2):
        chosen, rejected = nulls.gaussian_pairs(N, 20, 16, seed=seed)
        chosen[..., 0] += 1.5
        models.append((chosen, rejected))
    table = decompose(*models)
    assert (table.verdict == "kept").mean() >= 0.9
    for name in ("kept", "change", "gap", "repair"):
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()
