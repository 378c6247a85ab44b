"""Behaviour: a model compared with itself has not moved, and a planted move is found with an honest interval."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import utility

from alignlens import behavior, models
from alignlens.behavior import MEASURES, Judge, compare, measure
from alignlens.core.errors import PreferenceError
from alignlens.preferences import tinyworld

JUDGE = Judge("truth", lambda p, r: tinyworld.score(p, r).rename(columns={"utility": "score"}))


def table(n=400, *, seed=0, sampled=None, prompts=None):
    """A made-up table of ``measure``."""
    rng = np.random.default_rng(seed)
    sampled = n if sampled is None else sampled
    made = pd.DataFrame(
        {
            "row": np.arange(n),
            "prompt_id": [f"p{i % (prompts or n)}" for i in range(n)],
            "chosen_logprob": rng.normal(-10, 1, n),
            "rejected_logprob": rng.normal(-12, 1, n),
            "chosen_length": 10,
            "rejected_length": 12,
        }
    )
    some = pd.DataFrame(
        {
            "response": ["the same words again"] * sampled,
            "length": rng.integers(3, 9, sampled).astype(float),
            "ended": 1.0,
            "kl": 0.0,
            "score": rng.normal(0, 1, sampled),
        }
    )
    return made.join(some)


def read(result):
    return result.set_index("measure")


# --- comparing ------------------------------------------------------------------------------------------------------


def test_a_model_compared_with_itself_has_not_moved():
    base = table()
    found = read(compare([base], base))
    for name in ("margin", "chosen_shift", "rejected_shift", "kl"):
        assert (found.loc[name, ["value", "low", "high"]] == 0).all()
    for name in ("accuracy", "win_rate"):
        assert (found.loc[name, ["value", "low", "high"]] == 0.5).all(), "ties count half"


def test_a_planted_shift_is_found_within_its_interval():
    hits, base = 0, table()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        moved = base.assign(
            chosen_logprob=base.chosen_logprob + rng.normal(0.3, 1, len(base)),
            rejected_logprob=base.rejected_logprob + rng.normal(-0.2, 1, len(base)),
        )
        found = read(compare([moved], base, seed=seed))
        assert found.value["margin"] == pytest.approx(0.5, abs=0.35)
        assert found.value["margin"] == pytest.approx(found.value["chosen_shift"] - found.value["rejected_shift"])
        hits += found.low["margin"] <= 0.5 <= found.high["margin"]
        spread = found.high["margin"] - found.low["margin"]
        assert spread == pytest.approx(2 * 1.96 * (2 / len(base)) ** 0.5, rel=0.25)
    assert hits >= 17


def test_constant_moves_are_exact():
    base = table()
    moved = base.assign(chosen_logprob=base.chosen_logprob + 1, score=base.score + 1, length=base.length + 2, kl=3.0)
    found = read(compare([moved], base)).value
    for name, want in {
        "margin": 1,
        "chosen_shift": 1,
        "rejected_shift": 0,
        "accuracy": 1,
        "win_rate": 1,
        "kl": 3,
    }.items():
        assert found[name] == pytest.approx(want)
    assert found["length"] == pytest.approx(base.length.mean() + 2)
    assert found["score"] == pytest.approx(base.score.mean() + 1)


def test_seeds_are_averaged_and_widen_the_interval():
    base = table()
    seeds = [base.assign(chosen_logprob=base.chosen_logprob + move) for move in (0.0, 1.0, 2.0)]
    found = read(compare(seeds, base))
    assert found.value["margin"] == pytest.approx(1)
    assert found.low["margin"] <= 1 / 3
    assert found.high["margin"] >= 5 / 3


def test_prompts_not_pairs_are_drawn():
    """Ten pairs of a prompt that move alike are one observation."""
    rng = np.random.default_rng(0)
    base, few = table(400), table(400, prompts=40)
    moved = rng.normal(0, 1, 40)[np.arange(400) % 40]
    wide = read(compare([few.assign(chosen_logprob=few.chosen_logprob + moved)], few))
    narrow = read(compare([base.assign(chosen_logprob=base.chosen_logprob + moved)], base))
    width = [(t.high - t.low)["margin"] for t in (wide, narrow)]
    assert width[0] > 2.5 * width[1]


def test_rows_without_samples_count_for_log_probabilities_only():
    base = table(100, sampled=30)
    better = base.assign(score=base.score + np.where(np.arange(100) < 15, 1, -1))
    found = read(compare([better], base))
    assert found.value["win_rate"] == pytest.approx(0.5)
    assert found.value["length"] == pytest.approx(base.length[:30].mean())
    assert np.isfinite(found[["value", "low", "high"]].to_numpy()).all()


def test_a_measure_that_no_row_has_is_missing_not_zero():
    base = table(50, sampled=0)
    found = read(compare([base.assign(response=None)], base.assign(response=None)))
    assert found.loc["kl", ["value", "low", "high"]].isna().all()
    assert found.value["margin"] == 0


def test_without_a_judge_there_is_no_win_rate():
    base = table().drop(columns="score")
    assert "win_rate" not in read(compare([base], base)).index


def test_reward_gain_is_against_the_bases_samples():
    base = table().assign(reward=1.0)
    found = read(compare([base.assign(reward=3.5)], base))
    assert found.value["reward_gain"] == 2.5


@pytest.mark.parametrize(
    ("texts", "first", "second"),
    [
        (["a b c d"], 1.0, 1.0),
        (["a a a a"], 1 / 4, 1 / 3),
        (["a b", "a b"], 1 / 2, 1 / 2),
        (["a b", "b a"], 1 / 2, 1.0),
        (["a", ""], 1.0, 0.0),
    ],
)
def test_distinct_n_of_known_texts(texts, first, second):
    base = table(len(texts)).assign(response=texts)
    found = read(compare([base], base)).value
    assert (found["distinct_1"], found["distinct_2"]) == (pytest.approx(first), pytest.approx(second))


def test_distinct_n_spans_its_seeds():
    one, two = (table(2).assign(response=texts) for texts in (["a b", "c d"], ["a a", "a a"]))
    row = read(compare([one, two], one)).loc["distinct_1"]
    assert tuple(row[["value", "low", "high"]]) == (0.625, 0.25, 1.0)


def test_tables_of_other_pairs_are_refused():
    base = table()
    for other in (base.assign(row=base.row + 1), base.assign(prompt_id=base.prompt_id[::-1].to_numpy()), base.head(9)):
        with pytest.raises(PreferenceError, match="measured on other pairs"):
            compare([other], base)


def test_the_same_seed_gives_the_same_intervals():
    base, moved = table(), table(seed=1)
    assert compare([moved], base, seed=3).equals(compare([moved], base, seed=3))
    assert not compare([moved], base, seed=3).equals(compare([moved], base, seed=4))


# --- measuring ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(micro):
    model, _ = models.load(micro.folder)
    return measure(model, micro.format, micro.heldout, JUDGE, sampled=10, response_tokens=24, seed=0)


def test_measure_scores_every_pair_and_samples_some_prompts(micro, measured):
    model, f = models.load(micro.folder)[0], micro.format
    assert len(measured) == len(micro.heldout)
    assert measured.prompt_id.tolist() == micro.heldout.prompt_id.tolist()
    row = micro.heldout.iloc[5]
    ids = [[x] for x in f.encode(row.prompt, row.rejected)]
    assert measured.rejected_logprob[5] == pytest.approx(models.response_logprobs(model, *ids, pad_id=0)[0], abs=1e-3)
    assert measured.rejected_length[5] == len(ids[1][0])
    sampled = measured[measured.response.notna()]
    assert len(sampled) == 10
    np.testing.assert_allclose(sampled.score, utility(micro.heldout.prompt[:10], sampled.response))
    assert set(sampled.ended) <= {0, 1}
    assert (sampled.length[sampled.ended == 0] == 24).all()
    assert (sampled.kl == 0).all()
    assert measured.score[10:].isna().all()


def test_pairs_may_be_encoded_already(micro, measured):
    model, f = models.load(micro.folder)[0], micro.format
    again = measure(model, f, f.encode_pairs(micro.heldout), JUDGE, sampled=10, response_tokens=24, seed=0)
    pd.testing.assert_frame_equal(again, measured)


def test_a_base_measured_twice_has_not_moved(micro, measured):
    model, _ = models.load(micro.folder)
    again = measure(
        model, micro.format, micro.heldout, JUDGE, reference=model, sampled=10, response_tokens=24, seed=0, batch_size=7
    )
    found = read(compare([again], measured)).value
    for name in ("margin", "chosen_shift", "rejected_shift", "kl"):
        assert found[name] == pytest.approx(0, abs=1e-4)
    assert found["win_rate"] == 0.5


def test_pairs_over_the_length_are_left_out_and_rows_say_which(micro):
    model, _ = models.load(micro.folder)
    from alignlens.preferences import Formatter

    lengths = [len(sum(micro.format.encode(r.prompt, r.chosen), [])) for r in micro.heldout.itertuples()]
    short = Formatter(micro.format.tokenizer, max_length=int(np.median(lengths)))
    found = measure(model, short, micro.heldout, None, sampled=3, response_tokens=4, seed=0)
    assert 0 < len(found) < len(micro.heldout)
    assert (found.prompt_id == micro.heldout.prompt_id.to_numpy()[found.row]).all()


def test_several_pairs_of_a_prompt_are_answered_once(micro):
    model, _ = models.load(micro.folder)
    twice = pd.concat([micro.heldout.head(4)] * 2, ignore_index=True)
    found = measure(model, micro.format, twice, None, sampled=6, response_tokens=4, seed=0)
    assert found.response.notna().tolist() == [True] * 4 + [False] * 4


def test_an_adapter_that_can_be_switched_off_needs_no_reference(micro):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(models.load(micro.folder)[0], LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    found = measure(model.eval(), micro.format, micro.heldout.head(6), None, sampled=6, response_tokens=8, seed=0)
    base, _ = models.load(micro.folder)
    ids = [micro.format.prompt_ids(p) for p in micro.heldout.prompt.head(6)]
    made = models.sample(model, ids, end_id=micro.format.end_id, pad_id=0, max_new_tokens=8, seed=0)
    want = models.response_kl(model, ids, made, pad_id=0, reference=base)
    assert want.min() > 0
    np.testing.assert_allclose(found.kl, want, rtol=1e-3)


def test_every_measure_of_the_table_is_explained(measured):
    judged = measured.assign(reward=0.0)
    found = compare([judged], judged).measure.tolist()
    assert set(MEASURES) <= set(found)
    assert set(found) - set(MEASURES) <= {*tinyworld.FACTORS, "fluent", "ended"}
    assert behavior.MEASURES is MEASURES
