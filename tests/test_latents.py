"""Latents across models: usage, change, factors and anchors on codes whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

from alignlens.core.errors import DictionaryError
from alignlens.dictionaries import latents

PAIRS, LENGTH = 120, 5


def tokens(pairs=PAIRS, length=LENGTH, prompts=None):
    """Response tokens of pairs whose answers all have the same length, by pair, side and place."""
    row, side, place = (x.ravel() for x in np.indices((pairs, 2, length)))
    prompt_id = np.array([f"p{i}" for i in (range(pairs) if prompts is None else prompts)])
    return SimpleNamespace(row=row, side=side, place=place, token_id=place, prompt_id=prompt_id)


def noise_codes(seed=0, width=30, rate=0.2):
    rng = np.random.default_rng(seed)
    shape = (PAIRS * 2 * LENGTH, width)
    return csr_array((rng.random(shape) < rate) * rng.uniform(0.5, 1.5, shape))


def test_responses_are_means_over_their_own_tokens():
    found = latents.responses(csr_array(np.arange(20.0)[:, None]), tokens(2))
    np.testing.assert_allclose(found[:, :, 0], [[2, 12], [7, 17]])


def test_a_response_read_under_an_earlier_row_is_left_out_not_counted_as_silent():
    t = tokens(3)
    keep = ~((t.row == 2) & (t.side == 1))
    for name in ("row", "side", "place", "token_id"):
        setattr(t, name, getattr(t, name)[keep])
    codes = csr_array(np.ones((keep.sum(), 1)))
    assert np.isnan(latents.responses(codes, t)[1, 2, 0])
    assert latents.usage(codes, t).effect[0] == 0


def test_usage_of_a_latent_that_fires_in_chosen_answers_only():
    t = tokens()
    codes = csr_array(np.stack([2.0 * (t.side == 0), np.ones(len(t.row))], axis=1))
    table = latents.usage(codes, t)
    assert table.density.tolist() == [0.5, 1.0]
    assert table["mean"].tolist() == [1.0, 1.0]
    assert table.mean_active.tolist() == [2.0, 1.0]
    assert table.effect.tolist() == [2.0, 0.0]


def test_the_same_model_changes_nothing():
    codes = noise_codes()
    table = latents.change(codes, codes, tokens())
    for name in ("density", "mean", "effect"):
        assert (table[f"{name}_change"] == 0).all()
        assert (table[f"{name}_p"] == 1).all()


def test_noise_changes_no_more_latents_than_the_false_discovery_rate_allows():
    hits = [
        (latents.change(noise_codes(2 * s), noise_codes(2 * s + 1), tokens())[["mean_p", "effect_p"]] < 0.05).to_numpy()
        for s in range(20)
    ]
    assert np.mean([h.any(0) for h in hits]) < 0.2, "families with any false discovery"


def test_a_planted_change_is_found_and_only_there():
    base, t = noise_codes(), tokens()
    changed = base.toarray()
    changed[:, 3] *= 1.5
    changed[:, 7] *= np.where(t.side == 0, 1.5, 1 / 1.5)
    table = latents.change(base, csr_array(changed), t)
    assert set(table.latent[table.mean_p < 0.05]) >= {3}
    assert set(table.latent[table.effect_p < 0.05]) == {7}
    assert set(table.latent[table.density_p < 0.05]) == set()
    assert table.effect_change_low[7] > 0


def test_pairs_of_one_prompt_count_once():
    """Every prompt four times over: the interval is that of the prompts, not of the rows."""
    codes = noise_codes()
    one = latents.usage(codes, tokens())
    repeated = csr_array(np.repeat(codes.toarray().reshape(PAIRS, -1), 4, axis=0).reshape(-1, codes.shape[1]))
    four = latents.usage(repeated, tokens(4 * PAIRS, prompts=np.repeat(np.arange(PAIRS), 4)))
    np.testing.assert_allclose(four.effect_high - four.effect_low, one.effect_high - one.effect_low)


def test_codes_of_other_tokens_are_refused():
    with pytest.raises(DictionaryError, match="read the same tokens"):
        latents.responses(csr_array(np.ones((3, 1))), tokens())


def factors(seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({f"{side}_kind": rng.random(PAIRS) < 0.5 for side in ("chosen", "rejected")})


def test_a_latent_that_tells_a_factor_is_named_and_noise_is_not():
    t, truth = tokens(), factors()
    truth_of_token = truth[["chosen_kind", "rejected_kind"]].to_numpy()[t.row, t.side]
    codes = noise_codes().toarray()
    codes[:, 0] = truth_of_token
    codes[:, 1] = ~truth_of_token
    table, null = latents.factor_auroc(csr_array(codes), t, truth)
    assert table.auroc[0] == 1 and table.auroc[1] == 0
    strength = (table.auroc - 0.5).abs()
    assert (strength > null.ceiling[0] - 0.5).sum() <= 3, "the two planted ones, and by 5 % a third"


def test_factor_ceiling_holds_on_noise():
    above = []
    for seed in range(20):
        table, null = latents.factor_auroc(noise_codes(seed), tokens(), factors(seed + 100))
        above.append((table.auroc - 0.5).abs().max() > null.ceiling[0] - 0.5)
    assert np.mean(above) <= 0.3, "one in twenty is expected"


def test_anchors_of_the_same_model_are_one():
    codes = noise_codes()
    table = latents.anchors(codes, codes, tokens())
    np.testing.assert_allclose(table[["forward", "backward", "ratio"]], 1)


def test_scatter_looks_like_a_fall_forward_only():
    """Two noisy readings of the same thing: the published reading falls, the symmetric one does not."""
    rng = np.random.default_rng(0)
    truth = noise_codes(rate=0.6).toarray()
    base, variant = (csr_array(truth * rng.lognormal(0, 0.3, truth.shape)) for _ in range(2))
    table = latents.anchors(base, variant, tokens())
    assert table.forward.median() < 0.9 < 1.1 < table.backward.median()
    assert abs(table.ratio.median() - 1) < 0.05


def test_a_planted_attenuation_comes_back_in_the_ratio():
    codes = noise_codes(rate=0.6)
    np.testing.assert_allclose(latents.anchors(codes, 0.7 * codes, tokens()).ratio, 0.7)


def test_examples_come_from_all_bands_and_one_a_prompt():
    codes = noise_codes(rate=0.6)
    table = latents.examples(codes, tokens(), 4)
    assert sorted(table.band.unique()) == [0, 1, 2, 3]
    assert (table.groupby("band").size() == 3).all()
    assert tokens().row[table["index"]].tolist() == list(dict.fromkeys(tokens().row[table["index"]]))
    assert table.code[0] == codes[:, [4]].toarray().max()
    means = table.groupby("band").code.mean().to_numpy()
    assert (np.diff(means) < 0).all()
