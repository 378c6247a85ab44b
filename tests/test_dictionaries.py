"""Dictionaries: known answers written by hand, gradients against autograd, and what may change nothing."""

import dataclasses
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from alignlens import calibration, dictionaries
from alignlens.core.errors import DictionaryError
from alignlens.core.store import write_arrays
from alignlens.dictionaries import Config, Dictionary, model, training
from alignlens.dictionaries.model import join
from alignlens.dictionaries.training import Codes, on_support, shared_directions

ARRAYS = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold")
SMALL = Config(width=20, k=2, steps=160, batch_size=64, dead_after=500, aux_k=8, seed=3)
ROWS = 1500


def by_hand(encoder, decoder, *, shapes=None, bias=0.0, threshold=0.0) -> Dictionary:
    """A dictionary with these weights: encoder [D, w], decoder [w, D], no bias on the codes."""
    encoder, decoder = np.asarray(encoder, np.float32), np.asarray(decoder, np.float32)
    width, size = decoder.shape
    return Dictionary(
        encoder=encoder,
        encoder_bias=np.zeros(width, np.float32),
        decoder=decoder,
        decoder_bias=np.broadcast_to(np.float32(bias), size).copy(),
        threshold=np.broadcast_to(np.float32(threshold), width).copy(),
        shapes=shapes or {"base": (size,)},
        config=Config(width=width, k=1),
    )


def rows_of_a_small_world(seed: int) -> dict[str, np.ndarray]:
    """Float32 numbers that float16 holds exactly."""
    planted = calibration.Planted(calibration.Regime(features=16, d=8, rarest=0.05, commonest=0.2), seed=0)
    return {name: x.astype(np.float16).astype(np.float32) for name, x in planted.sample(ROWS, seed=seed).items()}


@pytest.fixture(scope="module")
def streams() -> dict[str, np.ndarray]:
    return rows_of_a_small_world(1)


@pytest.fixture(scope="module")
def others() -> dict[str, np.ndarray]:
    """Rows not trained on: the threshold is the code of a training row, which rounding may put on either side."""
    return rows_of_a_small_world(2)


@pytest.fixture(scope="module")
def trained(streams) -> Dictionary:
    return dictionaries.train(streams, SMALL, facts={"hook": "blocks.1.hook_resid_post", "models": {"base": "a1"}})


def encode(dictionary: Dictionary, streams) -> np.ndarray:
    """Dense codes."""
    return dictionary.codes(streams).toarray()


def assert_equal(first: Dictionary, second: Dictionary) -> None:
    """All weights equal to the bit."""
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


# --- evaluate: known answers --------------------------------------------------------------------------------------


def test_the_mean_scores_zero_however_unequal_the_dimensions_are():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5000, 4)) * [1, 2, 0.5, 1] + [1000, -30, 0, 4]).astype(np.float32)
    constant = by_hand(np.zeros((4, 2)), np.zeros((2, 4)), bias=x.mean(0, dtype=np.float64))
    found = dictionaries.evaluate(constant, {"base": x})
    assert found["r2"] == pytest.approx(0, abs=1e-6)
    assert found["l0"] == 0 and found["dead_share"] == 1
    assert dictionaries.evaluate(by_hand(np.zeros((4, 2)), np.zeros((2, 4))), {"base": x})["r2"] < -1e5  # zero is worse


def test_perfect_reconstruction_scores_one():
    x = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32) + 5
    both_signs = np.concatenate([np.eye(3), -np.eye(3)])
    found = dictionaries.evaluate(by_hand(both_signs.T, both_signs), {"base": x})
    assert found["r2"] == 1 and found["l0"] == 3
    assert found["cosine"] == pytest.approx(1) and found["l2_ratio"] == pytest.approx(1)


def test_quality_of_two_rows_calculated_by_hand():
    base = np.array([[3, 4], [0, 2]], np.float32)
    aligned = np.array([[1], [3]], np.float32)
    # Latent 0 would read 3 and stays below its threshold; latent 1 reads 4 and 2; latent 2 reads nothing.
    encoder = [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    decoder = [[1, 0, 9], [0, 1, 0], [0, 0, 9]]
    shapes = {"base": (2,), "aligned": (1,)}
    dictionary = by_hand(encoder, decoder, shapes=shapes, bias=[0, 0, 2], threshold=[3.5, 0.5, 0])
    found = dictionaries.evaluate(dictionary, {"base": base, "aligned": aligned})
    expected = {
        "r2_base": 1 - 9 / 6.5, "cosine_base": (0.8 + 1) / 2, "l2_ratio_base": (0.8 + 1) / 2,
        "r2_aligned": 0, "cosine_aligned": 1, "l2_ratio_aligned": (2 + 2 / 3) / 2,
        "r2": (1 - 9 / 6.5) / 2, "cosine": 0.95, "l2_ratio": (0.9 + 4 / 3) / 2, "l0": 1, "dead_share": 2 / 3,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_code_must_exceed_its_threshold():
    dictionary = by_hand([[1.0, 1.0]], [[1.0], [1.0]], threshold=[2.0, 0.0])
    codes = encode(dictionary, {"base": np.array([[2.0], [2.5], [-1.0], [0.0]], np.float32)})
    np.testing.assert_array_equal(codes, [[0, 2], [2.5, 2.5], [0, 0], [0, 0]])


# --- Encoding and decoding ----------------------------------------------------------------------------------------


def test_codes_depend_on_their_own_row_only(trained, others):
    codes = encode(trained, others)
    order = np.random.default_rng(0).permutation(ROWS)
    np.testing.assert_allclose(encode(trained, {n: x[order] for n, x in others.items()}), codes[order], atol=1e-5)
    for row in (0, 7, ROWS - 1):
        alone = encode(trained, {n: x[row : row + 1] for n, x in others.items()})
        np.testing.assert_allclose(alone[0], codes[row], atol=1e-5)


def test_sparse_codes_are_the_codes(trained, streams):
    codes, sparse = encode(trained, streams), trained.codes(streams)
    assert codes.dtype == np.float32 and codes.shape == sparse.shape == (ROWS, SMALL.width)
    np.testing.assert_array_equal(sparse.toarray(), codes)
    assert sparse.nnz == (codes > 0).sum() and (codes >= 0).all()
    assert sparse.nnz / ROWS == pytest.approx(dictionaries.evaluate(trained, streams)["l0"])


def test_decoding_the_codes_is_the_reconstruction(trained, streams):
    codes, rebuilt = encode(trained, streams), trained.reconstruct(streams)
    dense = trained.split(trained.decode(codes))
    for i, (name, x) in enumerate(streams.items()):
        assert rebuilt[name].dtype == np.float32 and rebuilt[name].shape == x.shape
        np.testing.assert_allclose(dense[name], rebuilt[name], atol=1e-5)
        expected = codes @ trained.rows()[name] + np.split(trained.decoder_bias, 2)[i]
        np.testing.assert_allclose(rebuilt[name], expected, atol=1e-5)


def test_the_order_in_which_streams_are_given_does_not_matter(trained, streams):
    backwards = dict(reversed(streams.items()))
    assert list(backwards) != list(trained.shapes)
    np.testing.assert_array_equal(encode(trained, backwards), encode(trained, streams))
    assert dictionaries.evaluate(trained, backwards) == dictionaries.evaluate(trained, streams)
    pd.testing.assert_frame_equal(dictionaries.classify(trained, backwards), dictionaries.classify(trained, streams))


def test_results_do_not_depend_on_how_many_rows_are_read_at_once(trained, others, monkeypatch):
    read = (encode, dictionaries.evaluate, dictionaries.classify)
    codes, quality, table = (f(trained, others) for f in read)
    for chunk in (1, 7, ROWS):
        monkeypatch.setattr(model, "CHUNK", chunk)
        np.testing.assert_allclose(encode(trained, others), codes, atol=1e-5)
        assert dictionaries.evaluate(trained, others) == pytest.approx(quality, rel=1e-5)
        pd.testing.assert_frame_equal(dictionaries.classify(trained, others), table, rtol=1e-4, atol=1e-5)


def test_arrays_on_disk_and_half_precision_give_the_same(trained, streams, tmp_path):
    half = {name: x.astype(np.float16) for name, x in streams.items()}
    for name, x in half.items():
        np.save(tmp_path / f"{name}.npy", x)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in half}
    for given in (half, mapped):
        np.testing.assert_array_equal(encode(trained, given), encode(trained, streams))
        assert dictionaries.evaluate(trained, given) == dictionaries.evaluate(trained, streams)
        assert_equal(dictionaries.train(given, SMALL), trained)


def test_torch_tensors_are_read_as_arrays(trained, streams):
    given = {name: torch.from_numpy(x) for name, x in streams.items()}
    np.testing.assert_array_equal(encode(trained, given), encode(trained, streams))


# --- Refused --------------------------------------------------------------------------------------------------------


def with_value(x, row, value):
    x = x.copy()
    x[row, 2] = value
    return x


BAD_STREAMS = {
    "no dictionary": (lambda s: s["base"], "must map names to arrays"),
    "nothing": (lambda s: {}, "must map names to arrays"),
    "a vector": (lambda s: s | {"base": s["base"][0]}, r"stream 'base' has shape \(8,\)"),
    "a list": (lambda s: s | {"aligned": s["aligned"].tolist()}, r"stream 'aligned' has shape \(1500, 8\)"),
    "no rows": (lambda s: {n: x[:0] for n, x in s.items()}, r"stream 'base' has shape \(0, 8\)"),
    "other rows": (lambda s: s | {"aligned": s["aligned"][1:]}, "stream 'aligned' has 1499 rows, 'base' has 1500"),
    "nan": (lambda s: s | {"aligned": with_value(s["aligned"], 1234, np.nan)}, "stream 'aligned' holds NaN.*row 1234"),
    "infinity": (lambda s: s | {"base": with_value(s["base"], 0, -np.inf)}, "stream 'base' holds NaN.*row 0"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_bad_streams_are_refused_where_they_are_read_and_where_they_are_trained_on(trained, streams, case):
    change, words = BAD_STREAMS[case]
    for read in (
        lambda s: dictionaries.train(s, SMALL),
        lambda s: encode(trained, s),
        lambda s: dictionaries.evaluate(trained, s),
    ):
        with pytest.raises(DictionaryError, match=words):
            read(change(streams))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"base": s["base"]}, "streams are base; this dictionary reads base, aligned"),
        (lambda s: {"base": s["base"], "tuned": s["aligned"]}, "streams are base, tuned; .* reads base, aligned"),
        (lambda s: s | {"aligned": s["aligned"][:, :7]}, r"stream 'aligned' has rows of shape \(7,\), not \(8,\)"),
        (lambda s: s | {"base": s["base"][:, None]}, r"stream 'base' has rows of shape \(1, 8\), not \(8,\)"),
    ],
)
def test_streams_of_another_dictionary_are_refused(trained, streams, change, words):
    with pytest.raises(DictionaryError, match=words):
        encode(trained, change(streams))


def test_the_row_of_a_bad_value_is_found_beyond_the_first_chunk(trained, streams, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 100)
    with pytest.raises(DictionaryError, match="row 1234"):
        encode(trained, streams | {"base": with_value(streams["base"], 1234, np.nan)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "relu"}, "activation must be batchtopk or l1"),
        ({"k": 0}, "k 0 must lie between 0 and width 20"),
        ({"k": 21}, "k 21 must lie between 0 and width 20"),
        ({"batch_size": 2000}, "1500 rows cannot fill a batch of 2000"),
        ({"learning_rate": 0}, "learning_rate, epochs, batch_size and steps must be positive"),
        ({"steps": 0}, "learning_rate, epochs, batch_size and steps must be positive"),
        ({"shared": 1.5}, "shared, warmup and decay must lie between 0 and 1"),
        ({"decay": -1}, "warmup and decay must lie between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(streams, changes, words):
    with pytest.raises(DictionaryError, match=words):
        dictionaries.train(streams, dataclasses.replace(SMALL, **changes))


def test_latents_cannot_be_shared_by_one_stream_or_by_streams_of_other_shapes(streams):
    config = dataclasses.replace(SMALL, shared=0.5)
    with pytest.raises(DictionaryError, match="must be 0 for one stream"):
        dictionaries.train({"base": streams["base"]}, config)
    with pytest.raises(DictionaryError, match="or streams of different shapes"):
        dictionaries.train(streams | {"aligned": streams["aligned"][:, :5]}, config)


def test_divergence_is_reported(streams):
    with pytest.raises(DictionaryError, match="diverged at step .*learning_rate"):
        dictionaries.train(streams, dataclasses.replace(SMALL, learning_rate=1e30))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_very_short_training_works(streams, steps):
    few = {name: x[:9] for name, x in streams.items()}
    found = dictionaries.train(few, dataclasses.replace(SMALL, steps=steps, batch_size=4))
    assert all(np.isfinite(getattr(found, name)).all() for name in ARRAYS)


def test_constant_streams_are_rebuilt_by_the_bias_alone():
    x = np.tile(np.float32([7.1, -3.33, 1000.7, 0.1]), (200, 1))
    found = dictionaries.train({"base": x}, SMALL)
    np.testing.assert_allclose(found.reconstruct({"base": x})["base"], x, atol=1e-3)
    assert encode(found, {"base": x}).max() < 1e-3


def test_a_constant_stream_does_not_disturb_the_other(streams):
    constant = {"base": streams["base"], "aligned": np.full((ROWS, 3), 1000.7, np.float32)}
    both, alone = (dictionaries.train(s, SMALL) for s in (constant, {"base": streams["base"]}))
    r2 = dictionaries.evaluate(both, constant)["r2_base"]
    assert r2 == pytest.approx(dictionaries.evaluate(alone, {"base": streams["base"]})["r2"], abs=0.05)


def test_torch_does_not_warn_about_its_sparse_tensors(streams):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)  # else torch says it once a process
        try:
            dictionaries.train(streams, dataclasses.replace(SMALL, steps=2))
        finally:
            torch.set_warn_always(False)


# --- Units are folded into the weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "shift"), [(10, 5), (1e-3, 0), (1e3, -1e4)])
def test_units_change_neither_what_fires_nor_what_is_rebuilt(streams, factor, shift):
    scaled = {name: x * np.float32(factor) + np.float32(shift) for name, x in streams.items()}
    plain, other = dictionaries.train(streams, SMALL), dictionaries.train(scaled, SMALL)
    codes, same = encode(plain, streams), encode(other, scaled) / factor
    # Rounding moves codes a little, so one that stands at the threshold may fall on the other side.
    assert ((codes > 0) != (same > 0)).mean() < 5e-4
    both = (codes > 0) & (same > 0)
    np.testing.assert_allclose(same[both], codes[both], rtol=0.01, atol=0.01)
    np.testing.assert_allclose(other.decoder, plain.decoder, atol=0.01)
    np.testing.assert_allclose((other.decoder_bias - shift) / factor, plain.decoder_bias, atol=0.01)
    quality = [dictionaries.evaluate(*pair)["r2"] for pair in ((plain, streams), (other, scaled))]
    assert quality[0] == pytest.approx(quality[1], abs=1e-3)


def test_a_window_of_one_layer_is_the_layer(streams, trained):
    window = {name: x[:, None] for name, x in streams.items()}
    found = dictionaries.train(window, SMALL)
    assert_equal(found, trained)
    assert found.shapes == {"base": (1, 8), "aligned": (1, 8)} and found.rows()["base"].shape == (SMALL.width, 1, 8)
    assert found.reconstruct(window)["aligned"].shape == (ROWS, 1, 8)
    np.testing.assert_array_equal(encode(found, window), encode(trained, streams))
    columns = ["rho", "theta", "nu_base", "nu_aligned", "label"]
    tables = [dictionaries.classify(found, window)[columns], dictionaries.classify(trained, streams)[columns]]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize("refit", [0, 2])
def test_a_layer_with_large_activations_does_not_crowd_out_the_others(streams, others, refit):
    """A power of two is exact in floating point: nothing but the unit of that layer may change."""
    config = dataclasses.replace(SMALL, refit=refit)
    unit = np.array([1, 1024], np.float32)[:, None]
    window, loud = (np.stack(list(streams.values()), axis=1) * u for u in (1, unit))
    plain, other = (dictionaries.train({"base": x}, config) for x in (window, loud))
    window, loud = (np.stack(list(others.values()), axis=1) * u for u in (1, unit))
    rebuilt, same = plain.reconstruct({"base": window})["base"], other.reconstruct({"base": loud})["base"]
    # Sums of unequal terms round differently, so a code that stands at the threshold may fall on the other side.
    alike = np.isclose(same / unit, rebuilt, rtol=0.01, atol=0.03).all(axis=(1, 2))
    assert alike.mean() > 0.995


def test_decoder_rows_have_norm_one_and_streams_their_own_shapes():
    rng = np.random.default_rng(0)
    unequal = {"base": rng.standard_normal((300, 2, 3)), "aligned": rng.standard_normal((300, 5))}
    found = dictionaries.train({n: x.astype(np.float32) for n, x in unequal.items()}, SMALL)
    assert {name: r.shape for name, r in found.rows().items()} == {"base": (20, 2, 3), "aligned": (20, 5)}
    np.testing.assert_allclose(np.linalg.norm(found.decoder, axis=1), 1, atol=1e-5)


# --- One step of training -------------------------------------------------------------------------------------------


def trainer_of(streams, config: Config) -> training.Trainer:
    """A trainer of the rows as they are, neither centred nor scaled."""
    found = training.Trainer(join(streams), {name: x.shape[1:] for name, x in streams.items()}, config, "cpu")
    found.mean, found.scale = torch.zeros_like(found.mean), torch.ones_like(found.scale)
    return found


def plain_loss(weights, x, config, sizes, *, dead, ramp):
    """The loss as one would write it: dense codes, a mask, and autograd."""
    encoder, decoder, encoder_bias, decoder_bias = weights
    seen = x - decoder_bias if config.published else x
    pre = seen @ encoder.T + encoder_bias
    score = (pre * decoder.norm(dim=1) if config.published else pre).detach()
    mask = score > 0
    if config.activation == "batchtopk":
        mask &= score >= score.flatten().topk(int(config.k * len(x))).values.min()
    codes = pre * mask
    error = x - (codes @ decoder + decoder_bias)
    loss = error.square().sum(1).mean()
    if config.activation == "l1":
        norms = sum(part.norm(dim=1) for part in decoder.split(sizes, dim=1))
        loss = loss + config.l1 * ramp * (codes * norms).sum(1).mean()
    silent = torch.nonzero(dead & ~mask.any(0))[:, 0]
    if config.aux_weight and len(silent):
        weight = config.aux_weight * (min(1, len(silent) / config.aux_k) if config.published else 1)
        best = pre[:, silent].topk(min(config.aux_k, len(silent)), dim=1)
        revived = torch.zeros(len(x), len(silent)).scatter(1, best.indices, best.values.relu())
        loss = loss + weight * (error.detach() - revived @ decoder[silent]).square().sum(1).mean()
    return loss, mask


@pytest.mark.parametrize(
    "changes",
    [
        {"aux_weight": 0.0},
        {},
        {"aux_k": 3},
        {"activation": "l1", "l1": 0.3, "aux_weight": 0.0},
        {"activation": "l1", "l1": 0.3},
        {"published": True, "aux_weight": 1.0, "aux_k": 4},
        {"published": True, "aux_weight": 1.0, "aux_k": 64},
    ],
    ids=str,
)
def test_gradients_of_a_step_are_those_of_autograd(streams, monkeypatch, changes):
    config = dataclasses.replace(SMALL, **changes)
    trainer = trainer_of(streams, config)
    draw = torch.Generator().manual_seed(0)
    x = trainer.take(torch.arange(64))
    with torch.no_grad():
        for weight in trainer.weights:
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
        trainer.encoder_bias[:6] -= 3  # so that some latents are silent in this batch
        if not config.published:
            trainer.decoder /= trainer.decoder.norm(dim=1, keepdim=True)
        trainer.silent[:12] = config.dead_after
        trainer.at = 10
    monkeypatch.setattr(trainer, "_project", lambda: None)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)

    weights = [weight.detach().clone().requires_grad_() for weight in trainer.weights]
    dead = torch.arange(config.width) < 12
    ramp = (trainer.at + 1) / (0.2 * trainer.steps)
    loss, mask = plain_loss(weights, x, config, trainer.sizes, dead=dead, ramp=ramp)
    loss.backward()
    with torch.no_grad():
        found = trainer.step(x)
    assert found["l0"] == mask.sum() / len(x) and found["dead"] == (dead & ~mask.any(0)).sum() >= 5
    names = ("encoder", "decoder", "encoder bias", "decoder bias")
    for name, ours, theirs in zip(names, trainer.weights, weights, strict=True):
        assert theirs.grad.abs().max() > 0.01
        np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("k", "kept"),
    [
        (0.5, [[5, 0, 0], [0, 0, 0]]),
        (1.5, [[5, 0, 0], [4, 3, 0]]),
        (2, [[5, 0, 0], [4, 3, 2]]),
        (2.5, [[5, 1, 0], [4, 3, 2]]),
        (3, [[5, 1, 0], [4, 3, 2]]),  # never a negative one
    ],
)
@pytest.mark.parametrize("threshold", [0.0, 1.9, 100.0])
def test_batchtopk_keeps_the_largest_codes_of_the_batch(k, kept, threshold):
    trainer = trainer_of({"base": np.ones((4, 3), np.float32)}, Config(width=3, k=k, batch_size=2, epochs=1))
    trainer.threshold = threshold  # of the last batch: a shortcut, without influence on what is kept
    codes = trainer._keep_largest(torch.tensor([[5.0, 1.0, -9.0], [4.0, 3.0, 2.0]]))
    np.testing.assert_array_equal(codes.matrix(codes.values).to_dense(), kept)
    np.testing.assert_array_equal(codes.transposed(codes.values).to_dense(), np.transpose(kept))


def test_published_batchtopk_weighs_codes_by_decoder_norms():
    config = Config(width=3, k=1, batch_size=2, epochs=1, published=True)
    trainer = trainer_of({"base": np.ones((4, 3), np.float32)}, config)
    with torch.no_grad():
        trainer.decoder.copy_(torch.diag(torch.tensor([0.1, 1.0, 10.0])))
        codes = trainer._keep_largest(torch.tensor([[5.0, 1.0, -9.0], [4.0, 3.0, 2.0]]))
    np.testing.assert_array_equal(codes.matrix(codes.values).to_dense(), [[0, 0, 0], [0, 3, 2]])
    assert trainer.threshold == 1  # the largest score that was not kept


def test_l1_keeps_all_positive_codes():
    config = Config(width=3, k=1, batch_size=2, epochs=1, activation="l1")
    trainer = trainer_of({"base": np.ones((4, 3), np.float32)}, config)
    codes = trainer._keep_largest(torch.tensor([[5.0, 1.0, -9.0], [4.0, 3.0, 2.0]]))
    np.testing.assert_array_equal(codes.matrix(codes.values).to_dense(), [[5, 1, 0], [4, 3, 2]])


def test_the_penalty_makes_codes_sparser(streams):
    config = dataclasses.replace(SMALL, activation="l1", k=20, aux_weight=0.0)
    weak, strong = (dictionaries.train(streams, dataclasses.replace(config, l1=l1)) for l1 in (0.0, 0.3))
    assert dictionaries.evaluate(strong, streams)["l0"] < 0.7 * dictionaries.evaluate(weak, streams)["l0"]


def test_steps_do_not_go_along_decoder_rows_and_keep_them_at_norm_one(streams):
    trainer = trainer_of(streams, dataclasses.replace(SMALL, shared=0.3))
    for batch in range(20):
        before = trainer.decoder.detach().clone()
        with torch.no_grad():
            trainer.step(trainer.take(torch.arange(64) + 64 * batch))
        np.testing.assert_allclose((trainer.decoder.grad * before).sum(1), 0, atol=1e-5)
        np.testing.assert_allclose(trainer.decoder.detach().norm(dim=1), 1, atol=1e-6)
        base, aligned = trainer.decoder.detach().split(8, dim=1)
        np.testing.assert_array_equal(base[:6], aligned[:6])
    assert (base[6:] - aligned[6:]).abs().max(dim=1).values.min() > 1e-3


def test_designated_latents_follow_the_sum_of_their_gradients(streams):
    trainer = trainer_of(streams, dataclasses.replace(SMALL, shared=0.3, published=True))  # published: no projection
    gradient = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    trainer.decoder.grad = gradient.clone()
    trainer._project()
    base, aligned = trainer.decoder.grad.split(8, dim=1)
    np.testing.assert_array_equal(base[:6], (gradient[:, :8] + gradient[:, 8:])[:6])
    np.testing.assert_array_equal(aligned[:6], base[:6])
    np.testing.assert_array_equal(trainer.decoder.grad[6:], gradient[6:])


def test_designated_latents_have_one_row_for_all_streams(streams):
    config = dataclasses.replace(SMALL, shared=0.31, refit=0)
    found = dictionaries.train(streams, config)
    energy = {name: np.sqrt(x.astype(np.float64).var(0).sum()) for name, x in streams.items()}
    base, aligned = (found.rows()[name] / energy[name] for name in ("base", "aligned"))
    np.testing.assert_allclose(base[:6], aligned[:6], atol=1e-6)
    assert (np.abs(base[6:] - aligned[6:]).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("k", [1, 2.5, 6])
def test_the_fixed_threshold_fires_as_often_as_asked(streams, k):
    found = dictionaries.train(streams, dataclasses.replace(SMALL, k=k))
    assert dictionaries.evaluate(found, streams)["l0"] == pytest.approx(k, rel=0.03)


def test_refitting_keeps_the_error_and_which_latents_fire(streams, trained):
    without = dictionaries.train(streams, dataclasses.replace(SMALL, refit=0))
    assert ((encode(trained, streams) > 0) != (encode(without, streams) > 0)).mean() < 1e-4
    quality = [dictionaries.evaluate(d, streams)["r2"] for d in (without, trained)]
    assert quality[0] > 0.5 and quality[1] == pytest.approx(quality[0], abs=0.03)


@pytest.mark.parametrize(("width", "k"), [(20, 2), (64, 20)])
def test_refitting_never_rebuilds_much_worse(streams, width, k):
    """Where codes are not sparse and rows are few, the trained rows stay, and the dictionary says so."""
    few = {name: x[:200] for name, x in streams.items()}
    config = dataclasses.replace(SMALL, width=width, k=k)
    without, found = (dictionaries.train(few, dataclasses.replace(config, refit=refit)) for refit in (0, 2))
    left = [1 - dictionaries.evaluate(d, few)["r2"] for d in (without, found)]
    assert left[1] <= 1.1 * left[0]
    assert found.facts["refit"] == (found.decoder != without.decoder).any()


def test_published_settings_train_on_raw_rows_and_leave_norms_free():
    config = dictionaries.published(2560)
    assert (config.width, config.k, config.batch_size, config.learning_rate) == (16_384, 64, 1024, 3e-4)
    assert (config.aux_k, config.dead_after, config.refit, config.reseed) == (1280, 1_024_000, 0, 0)
    x = np.random.default_rng(0).standard_normal((600, 6)).astype(np.float32) + 3
    found = dictionaries.train({"base": x}, dictionaries.published(6, width=12, k=2, batch_size=64, epochs=9))
    np.testing.assert_allclose(np.linalg.norm(found.decoder, axis=1), 1, atol=1e-5)  # folded into the codes
    np.testing.assert_allclose(found.threshold, found.threshold[0], rtol=1e-5)
    assert found.threshold[0] > 0


# --- Repeating, saving ------------------------------------------------------------------------------------------------


def test_seeds_reproduce_to_the_bit(streams, trained):
    again = dictionaries.train(streams, SMALL)
    assert_equal(again, trained)
    pd.testing.assert_frame_equal(again.history, trained.history)
    other = dictionaries.train(streams, dataclasses.replace(SMALL, seed=4))
    assert np.abs(other.decoder - trained.decoder).max() > 0.1


def test_saving_and_loading_gives_the_same_dictionary(streams, trained, tmp_path):
    trained.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dictionary.json", "dictionary.safetensors"]
    loaded = Dictionary.load(tmp_path, expect={"hook": "blocks.1.hook_resid_post", "models": {"base": "a1"}})
    assert_equal(loaded, trained)
    assert (loaded.config, loaded.shapes, loaded.facts) == (trained.config, trained.shapes, trained.facts)
    assert list(loaded.shapes) == list(trained.shapes)
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    np.testing.assert_array_equal(encode(loaded, streams), encode(trained, streams))


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"hook": "blocks.2.hook_resid_post"}, "hook 'blocks.1.hook_resid_post', not 'blocks.2.hook_resid_post'"),
        ({"models": {"base": "b2"}}, "models {'base': 'a1'}, not {'base': 'b2'}"),
        ({"tokenizer": "t"}, "tokenizer None, not 't'"),
    ],
)
def test_a_dictionary_of_another_place_is_refused_naming_both(trained, tmp_path, expect, words):
    trained.save(tmp_path)
    with pytest.raises(DictionaryError, match=words):
        Dictionary.load(tmp_path, expect=expect)


def test_damaged_files_are_refused(trained, tmp_path):
    def refused():
        with pytest.raises(DictionaryError, match=str(tmp_path)):
            Dictionary.load(tmp_path)

    refused()
    trained.save(tmp_path)
    words, arrays = tmp_path / "dictionary.json", tmp_path / "dictionary.safetensors"
    intact = words.read_text(encoding="utf-8")
    newer = json.dumps(json.loads(intact) | {"config": {"width": 20, "wings": 2}})
    for text in (intact[: len(intact) // 2], "{}", "[]", newer):
        words.write_text(text, encoding="utf-8")
        refused()
    words.write_text(intact, encoding="utf-8")
    Dictionary.load(tmp_path)
    for body in (arrays.read_bytes()[:-100], b"", b"no safetensors at all"):
        arrays.write_bytes(body)
        refused()
    write_arrays(arrays, {"encoder": trained.encoder})
    refused()


# --- Pairing two dictionaries ---------------------------------------------------------------------------------------


def permuted(dictionary: Dictionary, order) -> Dictionary:
    changes = {"encoder": dictionary.encoder[:, order], "decoder": dictionary.decoder[order]}
    changes |= {name: getattr(dictionary, name)[order] for name in ("encoder_bias", "threshold")}
    return dataclasses.replace(dictionary, **changes)


def swapped(dictionary: Dictionary) -> Dictionary:
    """The same dictionary with its streams written in the other order."""
    halves = {name: np.roll(getattr(dictionary, name), 8, axis=axis) for name, axis in
              [("encoder", 0), ("decoder", 1), ("decoder_bias", 0)]}  # fmt: skip
    return dataclasses.replace(dictionary, shapes=dict(reversed(dictionary.shapes.items())), **halves)


def test_a_permuted_copy_matches_its_original(trained):
    order = np.random.default_rng(0).permutation(SMALL.width)
    table = dictionaries.match(trained, permuted(trained, order))
    assert sorted(table.latent) == list(range(SMALL.width))
    np.testing.assert_array_equal(order[table.partner], table.latent)
    np.testing.assert_allclose(table.cosine, 1, atol=1e-5)


def test_matching_looks_at_live_latents_only_and_sorts_by_cosine(trained):
    alive = (np.arange(20) < 12, np.arange(20) >= 4)
    table = dictionaries.match(trained, trained, alive=alive)
    assert set(table.latent) == set(range(12)) and set(table.partner) <= set(range(4, 20))
    assert table.cosine.is_monotonic_decreasing and (table.cosine.round(5) == 1).sum() == 8


def test_matching_does_not_depend_on_the_order_or_the_units_of_streams(trained):
    table = dictionaries.match(trained, swapped(trained))
    np.testing.assert_array_equal(table.latent, table.partner)
    other = permuted(trained, np.roll(np.arange(20), 1))
    noisy = dataclasses.replace(other, decoder=other.decoder + 0.3 * np.roll(other.decoder, 3, axis=0))
    unit = np.repeat(np.float32([1, 1000]), 8)
    loud = [dataclasses.replace(d, decoder=d.decoder * unit) for d in (trained, noisy)]
    pd.testing.assert_frame_equal(dictionaries.match(*loud), dictionaries.match(trained, noisy), rtol=1e-4)


def test_dictionaries_of_other_streams_are_not_matched(trained):
    with pytest.raises(DictionaryError, match="only equal streams can be matched"):
        dictionaries.match(trained, by_hand(np.eye(8), np.eye(8)))


# --- Labels ---------------------------------------------------------------------------------------------------------

SAME = {"rho": 0.5, "degrees": 5.0, "ratio": 1.0, "density": 0.01, "nu_base": 1.0, "nu_aligned": 1.0}
BASE = SAME | {"rho": 0.05, "ratio": 0.05, "nu_aligned": 0.1}
ALIGNED = SAME | {"rho": 0.95, "ratio": 20.0, "nu_base": 0.1}
LABEL_CASES = [
    (SAME, "shared_same"),
    (SAME | {"degrees": 19.9}, "shared_same"),
    (SAME | {"degrees": 20.1}, "shared_rotated"),
    (SAME | {"degrees": 120, "ratio": 0.5, "rho": 1 / 3}, "shared_rotated"),  # before attenuation
    (SAME | {"ratio": 0.81, "rho": 0.45}, "shared_same"),
    (SAME | {"ratio": 0.79, "rho": 0.44}, "shared_attenuated"),
    (SAME | {"ratio": 1 / 0.79, "rho": 0.56}, "shared_attenuated"),
    (SAME | {"ratio": 1 / 0.81, "rho": 0.55}, "shared_same"),
    (BASE, "base_only"),
    (BASE | {"degrees": 90}, "base_only"),  # a row that is hardly there has no direction
    (BASE | {"rho": 0.19}, "base_only"),
    (BASE | {"rho": 0.21, "ratio": 0.27}, "shared_attenuated"),
    (BASE | {"nu_aligned": 0.9}, "shared_attenuated"),  # aligned holds it, though it is not written there
    (BASE | {"nu_aligned": 0.9, "degrees": 90}, "shared_attenuated"),
    (BASE | {"nu_aligned": np.nan}, "shared_attenuated"),
    (BASE | {"rho": 0.0, "ratio": 0.0}, "base_only"),
    (ALIGNED, "aligned_only"),
    (ALIGNED | {"degrees": 90}, "aligned_only"),
    (ALIGNED | {"nu_base": 0.9}, "shared_attenuated"),
    (ALIGNED | {"rho": 1.0, "ratio": 1e12}, "aligned_only"),
    (SAME | {"density": 0.9e-4}, "dead"),
    (BASE | {"density": 0.0}, "dead"),
]


@pytest.mark.parametrize(("row", "expected"), LABEL_CASES)
def test_labels(row, expected):
    assert dictionaries.label(pd.DataFrame([row]), n_rows=1_000_000).tolist() == [expected]


def test_a_latent_that_fires_on_too_few_rows_is_dead():
    table = pd.DataFrame([SAME | {"density": 0.009}, SAME | {"density": 0.011}])
    assert dictionaries.label(table, n_rows=1000).tolist() == ["dead", "shared_same"]


@pytest.mark.parametrize(
    ("cut", "value", "row", "becomes"),
    [
        ("dead", 0.02, SAME, "dead"),
        ("few", 20_000, SAME, "dead"),
        ("exclusive", 0.04, BASE, "shared_attenuated"),
        ("exclusive", 0.04, ALIGNED, "shared_attenuated"),
        ("scaling", 0.05, BASE, "shared_attenuated"),
        ("rotated", 4.0, SAME, "shared_rotated"),
        ("attenuated", 0.3, SAME | {"ratio": 0.4, "rho": 0.29}, "shared_same"),
    ],
)
def test_each_cut_moves_the_label_it_names_and_no_other(cut, value, row, becomes):
    cases = pd.DataFrame([row, *(case for case, _ in LABEL_CASES)])
    before = dictionaries.label(cases, n_rows=1_000_000)
    after = dictionaries.label(cases, n_rows=1_000_000, cuts=dataclasses.replace(dictionaries.CUTS, **{cut: value}))
    assert before[0] != becomes and after[0] == becomes
    moved = set(before[before != after]) | set(after[before != after])
    concerned = {
        "dead": set(dictionaries.LABELS), "few": set(dictionaries.LABELS),
        "exclusive": {"base_only", "aligned_only", "shared_attenuated", "shared_rotated"},
        "scaling": {"base_only", "aligned_only", "shared_attenuated", "shared_rotated"},
        "rotated": {"shared_rotated", "shared_same", "shared_attenuated"},
        "attenuated": {"shared_attenuated", "shared_same"},
    }  # fmt: skip
    assert moved <= concerned[cut]


# --- Reading a crosscoder: a world whose dictionary is written by hand ------------------------------------------------

AXES = np.eye(8)
TURN = np.radians(40)
WORLD = {  # name -> the feature's row in base and in aligned
    "same": (AXES[0], AXES[0]),
    "rotated": (AXES[1], np.cos(TURN) * AXES[1] + np.sin(TURN) * AXES[6]),
    "weaker": (AXES[2], 0.5 * AXES[2]),
    "stronger": (AXES[3], 2 * AXES[3]),
    "base": (AXES[4], 0 * AXES[4]),
    "aligned": (0 * AXES[5], AXES[5]),
    "silent": (AXES[7], AXES[7]),
}
BOTH = {"base": (8,), "aligned": (8,)}


@pytest.fixture(scope="module")
def world():
    """(streams, dictionary): orthogonal features, and the crosscoder that reads and writes them exactly."""
    rng = np.random.default_rng(0)
    codes = (rng.random((4000, len(WORLD))) < 0.1) * rng.uniform(0.5, 1.5, (4000, len(WORLD)))
    codes[:, -1] = 0
    rows = [np.array(side) for side in zip(*WORLD.values(), strict=True)]
    streams = {name: (codes @ r + 2).astype(np.float32) for name, r in zip(BOTH, rows, strict=True)}
    reads_base = np.array([name != "aligned" for name in WORLD])[:, None]
    encoder = np.concatenate([rows[0] * reads_base, rows[1] * ~reads_base], axis=1).T
    dictionary = by_hand(encoder, np.concatenate(rows, axis=1), shapes=BOTH, bias=2.0, threshold=0.1)
    return streams, dataclasses.replace(dictionary, encoder_bias=(-2 * encoder.sum(0)).astype(np.float32))


def test_what_was_planted_is_read(world):
    streams, dictionary = world
    assert dictionaries.evaluate(dictionary, streams)["r2"] == pytest.approx(1)
    table = dictionaries.classify(dictionary, streams)
    table.index = list(WORLD)
    expected = pd.DataFrame(
        {
            "rho": [0.5, 0.5, 1 / 3, 2 / 3, 0, 1, 0.5],
            "degrees": [0, 40, 0, 0, 90, 90, 0],
            "ratio": [1, 1, 0.5, 2, 0, 1e12, 1],
        },
        index=table.index,
    )
    np.testing.assert_allclose(table[expected.columns], expected, rtol=1e-5, atol=0.05)
    np.testing.assert_allclose(table.theta, np.cos(np.radians(table.degrees)), atol=1e-6)
    assert list(table.label) == [
        "shared_same", "shared_rotated", "shared_attenuated", "shared_attenuated", "base_only", "aligned_only", "dead"
    ]  # fmt: skip
    assert set(table.label) == set(dictionaries.LABELS)
    assert table.density.iloc[:-1].between(0.08, 0.12).all() and table.density.iloc[-1] == 0
    assert list(table.latent) == list(range(7)) and table.attrs["cuts"] == dataclasses.asdict(dictionaries.CUTS)


def test_latent_scaling_is_near_zero_where_a_stream_lacks_the_latent_and_one_where_it_is_shared(world):
    table = dictionaries.classify(world[1], world[0]).set_index(pd.Index(WORLD))
    assert abs(table.nu_aligned["base"]) < 0.1 and abs(table.nu_base["aligned"]) < 0.1
    assert table.nu_base["same"] == pytest.approx(1, abs=0.05) and table.nu_aligned["same"] == pytest.approx(
        1, abs=0.05
    )
    assert table.nu_aligned["weaker"] == pytest.approx(0.5, abs=0.05)
    assert table.loc["silent", ["nu_base", "nu_aligned"]].isna().all()


@pytest.mark.parametrize(("stream", "other"), [("base", "aligned"), ("aligned", "base")])
def test_a_shared_latent_that_was_only_not_written_is_no_exclusive_one(world, stream, other):
    """Zero one stream's decoder row of a truly shared latent: the norm says exclusive, latent scaling says no."""
    streams, dictionary = world
    decoder = dictionary.decoder.copy()
    decoder[0, 8 * (stream == "aligned") :][:8] = 0
    table = dictionaries.classify(dataclasses.replace(dictionary, decoder=decoder), streams)
    assert table.rho[0] == (1 if stream == "base" else 0)
    assert table[f"nu_{stream}"][0] == table[f"nu_{stream}_error"][0] == pytest.approx(1, abs=0.05)
    assert table.label[0] == "shared_attenuated"
    assert list(table.label[4:6]) == ["base_only", "aligned_only"]  # these stay what they are


def test_a_feature_split_into_two_latents_is_no_exclusive_one():
    """Base written by one latent, aligned by another on the same rows: nothing is left out, yet it is shared."""
    rng = np.random.default_rng(0)
    codes = (rng.random((4000, 2)) < 0.1) * rng.uniform(0.5, 1.5, (4000, 2))
    for together, expected in ((True, ["shared_attenuated"] * 2), (False, ["base_only", "aligned_only"])):
        fires = codes[:, [0, 0]] if together else codes  # apart: the same direction, on rows of its own
        streams = {"base": fires[:, :1] * AXES[:1], "aligned": fires[:, 1:] * AXES[:1]}
        weights = np.zeros((2, 16))
        weights[0, 0] = weights[1, 8] = 1
        table = dictionaries.classify(by_hand(weights.T, weights, shapes=BOTH), streams)
        assert list(table.label) == expected
        np.testing.assert_allclose(table[["nu_aligned", "nu_base"]].to_numpy()[[0, 1], [0, 1]], together, atol=0.1)


def test_exchanging_the_streams_exchanges_the_labels(trained, streams, world):
    exchange = {"base_only": "aligned_only", "aligned_only": "base_only"}
    for given, dictionary in ((streams, trained), world):
        table = dictionaries.classify(dictionary, given)
        renamed = dataclasses.replace(dictionary, shapes={"aligned": (8,), "base": (8,)})
        other = dictionaries.classify(renamed, {"aligned": given["base"], "base": given["aligned"]})
        np.testing.assert_allclose(other.rho, 1 - table.rho, atol=1e-12)
        np.testing.assert_allclose(other.degrees, table.degrees)
        np.testing.assert_allclose(other[["nu_aligned", "nu_base"]], table[["nu_base", "nu_aligned"]])
        assert list(other.label) == list(table.label.replace(exchange))
    assert {"base_only", "aligned_only"} <= set(table.label)


def test_classify_compares_base_and_aligned_and_nothing_else(streams):
    one = by_hand(np.eye(8), np.eye(8))
    with pytest.raises(DictionaryError, match="base and aligned; this dictionary reads base$"):
        dictionaries.classify(one, {"base": streams["base"]})
    tuned = by_hand(np.eye(16), np.eye(16), shapes={"base": (8,), "tuned": (8,)})
    with pytest.raises(DictionaryError, match="reads base, tuned"):
        dictionaries.classify(tuned, {"base": streams["base"], "tuned": streams["aligned"]})
    unequal = by_hand(np.eye(15), np.eye(15), shapes={"base": (8,), "aligned": (7,)})
    with pytest.raises(DictionaryError):
        dictionaries.classify(unequal, {"base": streams["base"], "aligned": streams["aligned"][:, :7]})


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("trained_shared", [0.0, 0.5])
def test_a_model_compared_with_itself_shares_everything(noise, trained_shared):
    planted = calibration.Planted(calibration.Regime(features=48, d=24), seed=1)
    config = dataclasses.replace(calibration.config_for(planted, "alignlens", epochs=8, seed=0), shared=trained_shared)

    def pair(seed):
        x = planted.sample(16_000, seed=seed)["base"]
        rng = np.random.default_rng([seed, 5])
        level = noise * np.sqrt(np.square(x).mean())
        return {n: x + np.float32(level) * rng.standard_normal(x.shape, np.float32) for n in ("base", "aligned")}

    table = dictionaries.classify(dictionaries.train(pair(1), config), pair(2))
    live = table[table.label != "dead"]
    assert len(live) > 30
    assert (live.label == "shared_same").mean() >= (0.99 if noise else 1)
    if not noise:
        np.testing.assert_allclose(live.rho, 0.5, atol=1e-4)
        np.testing.assert_allclose(live.degrees, 0, atol=0.1)


def test_streams_with_nothing_in_common_share_nothing():
    regime = calibration.Regime(features=24, d=24)
    worlds = [calibration.Planted(regime, seed) for seed in (0, 1)]

    def pair(seed):
        samples = [planted.sample(16_000, seed=seed + 10 * i)["base"] for i, planted in enumerate(worlds)]
        return dict(zip(dictionaries.STREAMS, samples, strict=True))

    k = sum(planted.frequency[planted.kind != "aligned_only"].sum() for planted in worlds)
    config = Config(width=60, k=k, epochs=10, learning_rate=5e-3)
    table = dictionaries.classify(dictionaries.train(pair(1), config), pair(2))
    live = table[table.label != "dead"]
    assert len(live) >= 40
    assert live.label.isin(["base_only", "aligned_only"]).mean() >= 0.98


# --- The helpers of training ----------------------------------------------------------------------------------------


def test_codes_are_solved_for_exactly_on_a_known_support():
    rng = np.random.default_rng(0)
    decoder = rng.standard_normal((40, 16))
    decoder = torch.from_numpy(decoder / np.linalg.norm(decoder, axis=1, keepdims=True)).float()
    truth = torch.from_numpy((rng.random((1300, 40)) < 0.04) * rng.uniform(0.5, 1.5, (1300, 40))).float()
    rows, columns = torch.nonzero(truth, as_tuple=True)
    blurred = (truth[rows, columns] + 0.4 * torch.randn(len(rows), generator=torch.Generator().manual_seed(0))).clamp(0)
    start = Codes(rows, columns, blurred, truth.shape)

    def error(values):
        return float((start.matrix(values).to_dense() - truth).norm() / truth.norm())

    few, many = (on_support(truth @ decoder, start, decoder, rounds=rounds) for rounds in (15, 400))
    assert error(blurred) > 0.2 and error(few) < 0.03 and error(many) < 1e-3
    assert (many >= 0).all()
    # What does not fit is not followed below zero.
    assert (on_support(-truth @ decoder, start, decoder) >= 0).all()


def test_directions_that_sparse_rows_share_are_found():
    rng = np.random.default_rng(0)
    planted = rng.standard_normal((12, 32))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    codes = (rng.random((6000, 12)) < 0.02) * rng.uniform(0.5, 1.5, (6000, 12))
    error = torch.from_numpy(codes @ planted + 0.01 * rng.standard_normal((6000, 32))).float()
    found = shared_directions(error, 60, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    cosine = planted @ found.T
    assert (cosine.max(axis=1) > 0.98).all()  # each planted one
    assert (cosine.max(axis=0) > 0.95).mean() > 0.9  # and little else


@pytest.mark.parametrize("rows", [3, 40, 3000])
def test_noise_gives_unit_directions_that_no_rows_share(rows):
    error = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    found = shared_directions(error, 100, torch.Generator().manual_seed(0))
    assert found.shape == (100, 16)
    np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-5)
    if rows == 3000:  # in sparse residuals, 50 rows lie within a few degrees of a direction; here none do
        cosine = error / error.norm(dim=1, keepdim=True) @ found.T
        assert ((cosine > 0.95).sum(0) < 10).all()


def test_directions_are_found_where_most_rows_hold_no_error():
    error = torch.zeros(200, 8)
    error[:3] = torch.eye(8)[:3]
    found = shared_directions(error, 10, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-5)
