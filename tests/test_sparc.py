"""The published crosscoder: its formulas against plain numpy, and the artefacts that they are known to make."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Lasso

from alignlens.core.errors import DictionaryError
from alignlens.dictionaries import unit
from alignlens.published import sparc
from alignlens.published.sparc import Config, Sparc, training
from alignlens.published.sparc.reading import adaptive

N, D, WIDTH, TOPK = 320, 24, 96, 16
SMALL = Config(width=WIDTH, topk=TOPK)


def planted(n=N, d=D, features=40, seed=0):
    """Sparse sums of planted directions (base), and the same with a fifth of the directions turned (aligned)."""
    rng = np.random.default_rng(seed)
    directions = unit(rng.standard_normal((features, d)))
    turned = directions.copy()
    turned[: features // 5] = unit(rng.standard_normal((features // 5, d)))
    codes = (rng.random((n, features)) < 0.1) * rng.exponential(size=(n, features))
    return {"base": (codes @ directions).astype(np.float32), "aligned": (codes @ turned).astype(np.float32)}


def crosscoder(base_rows, aligned_rows, biases=None, topk=2):
    """A crosscoder with the given decoder rows [width, d] or [layers, width, d] and encoders of zero."""
    decoders = np.stack([base_rows, aligned_rows]).astype(np.float32)
    decoders = decoders if decoders.ndim == 4 else decoders[:, None]
    _, layers, width, d = decoders.shape
    biases = np.zeros((2, layers, width), np.float32) if biases is None else np.float32(biases)[:, None]
    encoders = np.zeros((2, layers, d, width), np.float32)
    return Sparc(encoders, biases, decoders, np.zeros(width, bool), Config(width=width, topk=topk))


def coded(model, streams):
    """Codes and rows rebuilt: stream -> [rows, width] and [rows, d], with a layer axis where the streams have one."""
    both = zip(*((z, rebuilt) for _, z, rebuilt in model.batches(streams, 256)), strict=True)
    both = [torch.cat(parts, 1).numpy() for parts in both]
    both = [x if (model.decoders.shape[1] > 1) else x[:, :, 0] for x in both]
    return [dict(zip(sparc.STREAMS, x, strict=True)) for x in both]


def classify(model):
    """Classes of decoder rows, whatever fires."""
    zeros = np.zeros((2, *model.decoders.shape[1::2]), np.float32)
    return sparc.classify(model, dict.fromkeys(sparc.STREAMS, zeros if (model.decoders.shape[1] > 1) else zeros[:, 0]))


@pytest.fixture(scope="module")
def streams():
    return planted()


@pytest.fixture(scope="module")
def trained(streams):
    return sparc.train(streams, SMALL)


@pytest.fixture(scope="module")
def untrained():
    return sparc.train(planted(64, 96), Config(topk=40, steps=0))


# --- To the formula -----------------------------------------------------------------------------------------------


def test_defaults_are_the_published_values():
    assert dataclasses.asdict(Config()) == {
        "width_factor": 8, "width": None, "topk": 400, "forced_share": 0.06, "cross_weight": 0.4, "l1": 1e-3,
        "l1_forced": 5e-5, "learning_rate": 3e-4, "weight_decay": 1e-5, "warmup": 0.05, "epochs": 4, "steps": None,
        "batch_size": 32, "clip": 1.0, "validation_share": 0.1, "seed": 42,
    }  # fmt: skip
    forced = [training.start(1, 2, width, 0.06, torch.Generator())[1].sum() for width in (16384, 24576, 20480)]
    assert forced == [983, 1474, 1228]


def test_the_mask_unites_the_top_half_k_of_both_streams(streams, trained):
    codes = coded(trained, streams)[0]
    h = [streams[s].astype(float) @ trained.encoders[i, 0] + trained.biases[i, 0] for i, s in enumerate(sparc.STREAMS)]
    for row in range(0, N, 20):
        on = set(np.argsort(h[0][row])[-TOPK // 2 :]) | set(np.argsort(h[1][row])[-TOPK // 2 :])
        mask = np.isin(np.arange(WIDTH), list(on))
        for i, stream in enumerate(sparc.STREAMS):
            np.testing.assert_allclose(codes[stream][row], np.maximum(h[i][row], 0) * mask, atol=1e-5)


def test_the_loss_of_a_batch_is_the_formula(streams, trained):
    x = {s: streams[s][:32].astype(float) for s in sparc.STREAMS}
    codes, rebuilt = coded(trained, x)
    z = {s: codes.astype(float) for s, codes in codes.items()}
    rows = dict(zip(sparc.STREAMS, trained.decoders[:, 0].astype(float), strict=True))
    other = {"base": "aligned", "aligned": "base"}
    own = sum(np.mean((x[s] - z[s] @ rows[s]) ** 2) for s in x)
    cross = sum(np.mean((x[s] - z[other[s]] @ rows[s]) ** 2) for s in x)
    norms = sum(np.linalg.norm(rows[s], axis=1) for s in x)
    l1 = (np.abs(z["base"]) + np.abs(z["aligned"])) / 2 * norms
    free, forced = l1[:, ~trained.forced].sum(1).mean(), l1[:, trained.forced].sum(1).mean()
    weights = training.Weights(*map(torch.from_numpy, (trained.encoders, trained.biases, trained.decoders)))
    parts = training.loss(weights, training.stack(x), torch.from_numpy(trained.forced), SMALL)[0]
    assert parts["self"] == pytest.approx(own, rel=1e-5)
    assert parts["cross"] == pytest.approx(cross, rel=1e-5)
    assert parts["sparsity"] == pytest.approx(1e-3 * free + 5e-5 * forced, rel=1e-5)
    assert parts["total"] == pytest.approx(own + 0.4 * cross + 1e-3 * free + 5e-5 * forced, rel=1e-5)
    np.testing.assert_allclose(rebuilt["base"], z["base"] @ rows["base"], atol=1e-4)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    rates = [training.rate(step, 100, Config()) / 3e-4 for step in range(100)]
    np.testing.assert_allclose(rates[:6], [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(rates[5:], 0.5 * (1 + np.cos(np.pi * np.arange(95) / 95)))


def test_history_and_quality_follow_their_formulas(streams, trained):
    history = trained.history
    assert history["split"].tolist() == ["train", "validation"] * 4
    assert history["step"].tolist() == [9, 9, 18, 18, 27, 27, 36, 36]  # 288 training rows, batches of 32
    assert history.total.iloc[-2] < history.total.iloc[0]
    x, (codes, rebuilt) = streams["base"].astype(float), coded(trained, streams)
    rebuilt = rebuilt["base"].astype(float)
    batches = [slice(start, start + 32) for start in range(0, N, 32)]
    found = sparc.quality(trained, streams)
    fve = [1 - np.mean((x[b] - rebuilt[b]) ** 2) / x[b].var(ddof=1) for b in batches]
    assert found["fve_published_base"] == pytest.approx(np.mean(fve), abs=1e-5)
    assert found["r2_base"] == pytest.approx(1 - ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), abs=1e-5)
    fires = (codes["base"] > 0) | (codes["aligned"] > 0)
    assert found["dead_published"] == pytest.approx(np.mean([~fires[b].any(0) for b in batches]), abs=1e-6)
    assert found["dead_share"] == pytest.approx(np.mean(~fires.any(0)), abs=1e-6)
    assert found["l0_aligned"] == pytest.approx((codes["aligned"] > 0).sum(1).mean(), rel=1e-6)


def test_a_constant_predictor_looks_good_under_the_published_formula_only():
    """Dimension means of very different sizes: predicting them explains nothing, yet the published number is high."""
    rng = np.random.default_rng(0)
    mean = 10 * rng.standard_normal(D)
    x = (mean + rng.standard_normal((N, D))).astype(np.float32)
    decoders = np.zeros((2, 4, D))
    decoders[:, 0] = x.mean(0)
    biases = np.array([[1.0, 0, 0, 0]] * 2)  # latent 0 always fires at 1
    found = sparc.quality(crosscoder(*decoders, biases), {"base": x, "aligned": x})
    assert found["fve_published"] > 0.95
    assert found["r2"] == pytest.approx(0, abs=1e-5)


# --- Training -----------------------------------------------------------------------------------------------------


def test_forced_rows_are_copies_after_every_step(streams):
    for steps in (0, 1, 2, 3, 7):
        model = sparc.train(streams, dataclasses.replace(SMALL, steps=steps, learning_rate=0.01))
        same = (model.decoders[0] == model.decoders[1]).all((0, 2))
        np.testing.assert_array_equal(same, model.forced)
        assert model.forced.sum() == int(0.06 * WIDTH)


def test_seeds_repeat_bit_for_bit_and_leave_the_callers_random_state(streams, trained):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    again = sparc.train(streams, SMALL)
    sparc.classify(again, streams)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])  # noqa: NPY002
    for name in ("encoders", "biases", "decoders", "forced"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trained, name))
    pd.testing.assert_frame_equal(again.history, trained.history)
    other = sparc.train(streams, dataclasses.replace(SMALL, seed=99))
    assert (other.encoders != trained.encoders).any()


def test_a_window_of_one_layer_is_the_single_layer(streams, trained):
    window = {name: x[:, None] for name, x in streams.items()}
    model = sparc.train(window, SMALL)
    pd.testing.assert_frame_equal(model.history, trained.history)
    np.testing.assert_array_equal(model.decoders, trained.decoders)
    assert sparc.quality(model, window) == sparc.quality(trained, streams)
    pd.testing.assert_frame_equal(sparc.classify(model, window), sparc.classify(trained, streams))


def test_a_window_shares_one_mask_and_describes_layers():
    rng = np.random.default_rng(0)
    window = {name: rng.standard_normal((80, 3, D)) for name in sparc.STREAMS}
    model = sparc.train(window, dataclasses.replace(SMALL, steps=4))
    codes, rebuilt = coded(model, window)
    assert codes["base"].shape == (80, 3, WIDTH)
    assert rebuilt["base"].shape == (80, 3, D)
    h = np.einsum("nld,sldw->snlw", window["base"], model.encoders) + model.biases[:, None]
    top = np.sort(h[0].mean(1), axis=1)[:, -TOPK // 2]
    row, latent = np.nonzero(h[0].mean(1) >= top[:, None])
    np.testing.assert_allclose(codes["base"][row, :, latent], np.maximum(h[0], 0)[row, :, latent], atol=1e-5)
    table = sparc.classify(model, window)
    norms = np.linalg.norm(model.decoders.astype(float), axis=-1).sum(1)
    np.testing.assert_allclose(table.rho, norms[1] / norms.sum(0), atol=1e-6)
    assert table.entropy.between(0.9, 1.001).all() and table.persistent.all()
    assert (table.drifting == (table.min_abs_theta < 0.5)).all()


# --- Classes ------------------------------------------------------------------------------------------------------


def test_shared_aligned_is_exactly_the_forced_set(streams, trained):
    """F7a: theta is 1 by construction for forced latents, and a short run turns no other latent that far."""
    table = sparc.classify(trained, streams)
    for labels in (table.label, sparc.labels(table, sparc.FIXED)):
        np.testing.assert_array_equal(labels == "shared_aligned", table.forced)
    np.testing.assert_allclose(table.theta[table.forced], 1)


def test_untrained_latents_count_as_shared_and_redirected(untrained):
    """F7b: independent starts have equal norms and unrelated directions, which reads as `shared_redirected`."""
    table = classify(untrained)
    table["label"] = sparc.labels(table, sparc.FIXED)
    free = table[~table.forced]
    assert free.rho.std() < 0.02 and abs(free.rho.mean() - 0.5) < 0.002
    assert (free.theta.abs() < 0.5).all()
    assert (free.label == "shared_redirected").all()
    assert sparc.feature_sharing_ratio(table) == {"single_layer": 1.0, "multi_layer": 1.0}


def test_one_component_puts_35_percent_in_the_shared_band(untrained):
    """F8: quantiles fix the share, whatever the dictionary is; the rest of the same latents change their class."""
    table = classify(untrained)
    cuts = table.attrs["thresholds"]
    assert table.attrs["components"] == 1
    band = (table.rho > cuts["shared_low"]) & (table.rho < cuts["shared_high"])
    assert band.mean() == pytest.approx(0.35, abs=0.005)
    assert (table.label == "shared_attenuated").mean() == pytest.approx(0.40, abs=0.005)


def test_two_components_make_all_cuts_equal_and_no_class_shared():
    rng = np.random.default_rng(0)
    rho = np.concatenate([rng.normal(0.3, 0.02, 400), rng.normal(0.7, 0.02, 400)])
    cuts, components = adaptive(rho)
    assert components == 2
    assert len(set(cuts.values())) == 1 and 0.35 < cuts["shared_low"] < 0.65
    labels = sparc.labels(pd.DataFrame({"rho": rho, "theta": 1.0}), cuts)
    assert set(labels) == {"base_only", "aligned_only"}


def test_three_components_span_the_band_and_floor_aligned_only_at_one_half():
    rng = np.random.default_rng(0)
    rho = np.concatenate([rng.normal(mean, 0.01, 400) for mean in (0.2, 0.5, 0.8)])
    cuts, components = adaptive(rho)
    assert components == 3
    assert 0.2 < cuts["shared_low"] < 0.5 < cuts["shared_high"] < 0.8
    assert 0.2 < cuts["base_only"] <= 0.4 and cuts["aligned_only"] >= cuts["shared_high"]
    # F7c: a last component just above one half pulls the cut down to it, so rho = 0.51 reads as aligned only.
    low = np.concatenate([rng.normal(mean, 0.001, 400) for mean in (0.1, 0.3, 0.51)])
    assert 0.4 < adaptive(low)[0]["aligned_only"] < 0.51


def test_few_or_no_values_take_the_published_ways_out():
    assert adaptive(np.array([])) == (sparc.FIXED, None)
    cuts, components = adaptive(np.linspace(0.4, 0.6, 29))
    assert components is None
    assert cuts == pytest.approx({"base_only": 0.27, "aligned_only": 0.775, "shared_low": 0.48, "shared_high": 0.55})


def test_labels_follow_the_published_order():
    rho = np.array([0.1, 0.9, 0.5, 0.5, 0.5, 0.35, 0.15, 0.65, 0.7])
    theta = np.array([1.0, 1.0, 0.8, 0.49, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert sparc.labels(pd.DataFrame({"rho": rho, "theta": -theta}), sparc.FIXED).tolist() == [
        "base_only", "aligned_only", "shared_aligned", "shared_redirected", "shared_intermediate",
        "shared_attenuated", "shared_attenuated", "other", "other",
    ]  # fmt: skip


def test_labels_follow_the_cuts_of_the_table(streams, trained):
    table = sparc.classify(trained, streams)
    np.testing.assert_array_equal(sparc.labels(table, table.attrs["thresholds"]), table.label)


def test_usage_columns_count_codes(streams, trained):
    table, codes = sparc.classify(trained, streams), coded(trained, streams)[0]
    np.testing.assert_allclose(table.density_aligned, (codes["aligned"] > 0).mean(0))
    np.testing.assert_allclose(table.cf_shift, codes["aligned"].mean(0) - codes["base"].mean(0), atol=1e-6)


def test_feature_sharing_ratio_has_two_definitions():
    labels = ["base_only"] * 2 + ["shared_aligned", "shared_attenuated"] * 3 + ["other"] * 4
    ratio = sparc.feature_sharing_ratio(pd.DataFrame({"label": labels}))
    assert ratio == {"single_layer": 6 / 8, "multi_layer": 6 / 12}
    assert np.isnan(sparc.feature_sharing_ratio(pd.DataFrame({"label": []}))["single_layer"])


# --- Superposition and geometry -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summed():
    """Unit base rows, random unit aligned rows, and one aligned row that is the sum of base rows 3 and 7."""
    rng = np.random.default_rng(0)
    base, aligned = (unit(rng.standard_normal((256, 128))) for _ in range(2))
    aligned[0] = unit(base[3] + base[7])
    table = pd.DataFrame({"latent": np.arange(256), "label": ["aligned_only"] * 4 + ["other"] * 252})
    return crosscoder(base, aligned), table


def test_the_published_lasso_cannot_fire_on_unit_vectors(summed):
    found = sparc.superposition(*summed)
    assert (found.non_zeros == 0).all() and not found.can_fire.any() and not found.superposed.any()
    assert (found.alpha_max <= 1 / 128).all()
    assert found.attrs["aligned_only"] == 4
    base, aligned = summed[0].decoders[:, 0].astype(float)
    assert not Lasso(alpha=0.01, fit_intercept=False).fit(base.T, aligned[0]).coef_.any()
    # Longer vectors pass the same test with the same directions: the published alpha measures length.
    model = crosscoder(40 * base, 40 * aligned)
    assert sparc.superposition(model, summed[1]).superposed.tolist() == [True, False, False, False]


def test_the_corrected_lasso_finds_exactly_the_two_parts(summed):
    found = sparc.superposition(*summed, corrected=True).set_index("latent")
    assert sorted(found.parts[0]) == [3, 7] and found.superposed[0] and found.r2[0] > 0.95
    assert found.p[0] == pytest.approx(1 / 101)
    assert not found.superposed[1:].any() and (found.null_non_zeros > 10).all()
    assert len(sparc.superposition(*summed, max_latents=2)) == 2


def test_superposition_without_candidates_is_an_empty_table(summed):
    model, table = summed
    assert len(sparc.superposition(model, table.assign(label="other"), corrected=True)) == 0


def test_a_window_asks_for_a_part_in_another_layer():
    rng = np.random.default_rng(0)
    base, aligned = unit(rng.standard_normal((2, 2, 16, 64)))
    aligned[1] *= 2  # all latents write most in layer 1
    aligned[1, 0] = 2 * unit(base[0, 3] + base[1, 7])
    aligned[1, 1] = 2 * unit(base[1, 3] + base[1, 7])
    model = crosscoder(base, aligned)
    table = pd.DataFrame({"latent": [0, 1], "label": "aligned_only"})
    found = sparc.superposition(model, table, corrected=True)
    assert sorted(zip(found.part_layers[0], found.parts[0], strict=True)) == [(0, 3), (1, 7)]
    assert found.superposed.tolist() == [True, False]


def test_the_published_map_is_ill_posed_and_procrustes_recovers_a_rotation():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    base = rng.standard_normal((64, 32))
    unrelated = rng.standard_normal((64, 32))
    table = pd.DataFrame({"latent": np.arange(64), "label": "shared_redirected", "forced": False})
    table["density_base"] = table["density_aligned"] = 0.5

    def row(aligned, latents=64, **options):
        found = sparc.shared_geometry(crosscoder(base, aligned), table[:latents], **options)
        return found.set_index("label").loc["shared_redirected"]

    rotated = row(base @ rotation)
    assert rotated.singular_mean == pytest.approx(1, abs=1e-4) and rotated.singular_std < 1e-4
    assert rotated.condition == pytest.approx(1, abs=1e-3)
    # F28: with fewer latents than dimensions the map is not unique, though the latents are rotated just the same.
    assert row(base @ rotation, 20).condition == np.inf
    turned = row(base @ rotation, corrected=True)
    assert turned.residual == pytest.approx(0, abs=1e-6) and turned.p < 0.05
    assert turned.unrotated > 0.9 and turned.null_low > 0.3
    assert row(unrelated, corrected=True).p > 0.05
    assert row(base, 9, corrected=True).isna()["residual"]
    table["density_base"] = table["density_aligned"] = 0.0
    assert row(base, corrected=True).n == 0


# --- Bad input ----------------------------------------------------------------------------------------------------


def test_bad_streams_are_refused(streams, trained):
    x, y = streams["base"], streams["aligned"]
    broken = y.copy()
    broken[17, 3] = np.nan
    for bad, words in {
        "streams are base, tuned; .* reads base, aligned": {"base": x, "tuned": y},
        "must map names to arrays": (x, y),
        "'aligned' has 319 rows, 'base' has 320": {"base": x, "aligned": y[:-1]},
        "'aligned' holds NaN or infinite values in row 17": {"base": x, "aligned": broken},
        r"'base' has shape \(320,\)": {"base": x[:, 0], "aligned": y},
        "fill no batch": {"base": x[:20], "aligned": y[:20]},
    }.items():
        with pytest.raises(DictionaryError, match=bad):
            sparc.train(words, SMALL)
    with pytest.raises(DictionaryError, match=r"rows of shape \(5,\), not \(24,\)"):
        sparc.quality(trained, {"base": x[:, :5], "aligned": y[:, :5]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topk": 97}, "topk is 97 for 96 latents"),
        ({"topk": 1}, "from 2 to 96"),
        ({"forced_share": 1.0}, "forced_share"),
        ({"epochs": 0}, "epochs go from 1"),
        ({"steps": -1}, "steps from 0"),
        ({"batch_size": 0}, "batch of 0"),
        ({"learning_rate": float("inf")}, "lower learning_rate"),
    ],
)
def test_bad_configs_are_refused(streams, changes, words):
    with pytest.raises(DictionaryError, match=words):
        sparc.train(streams, dataclasses.replace(SMALL, **changes))
