"""The planted world: what is planted can be read back, and its switches do what they say."""

import numpy as np
import pytest

from alignlens.core.errors import PresetError
from alignlens.preferences import tinyworld
from alignlens.preferences.tinyworld import FACTORS


@pytest.fixture(scope="module")
def pairs():
    return tinyworld.pairs(800, seed=3)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_every_planted_factor_is_read_back_from_the_text(pairs, side):
    read = tinyworld.score(pairs.prompt, pairs[side])
    for name in (*FACTORS, "utility"):
        np.testing.assert_allclose(read[name], pairs[f"{side}_{name}"].astype(float), err_msg=name)
    assert (read.fluent == 1).all()


def test_pretraining_text_is_read_back_too():
    text = tinyworld.corpus(500, seed=1)
    read = tinyworld.score(text.prompt, text.response)
    np.testing.assert_allclose(read.utility, text.utility)


def test_all_factor_values_occur(pairs):
    assert set(pairs.chosen_tone) | set(pairs.rejected_tone) == {-1, 0, 1}
    assert set(pairs.chosen_fillers) | set(pairs.rejected_fillers) == {0, 1, 2, 3}
    assert set(pairs.rejected_on_topic) == set(pairs.rejected_correct) == {0, 1}


def test_utility_is_the_stated_weighted_sum():
    prompt = "What dish is Arlen known for?"
    dish, animal = (tinyworld.knowledge()["Arlen", a] for a in ("dish", "animal"))
    wrong = next(v for v in tinyworld.ATTRIBUTES["dish"][0] if v != dish)
    answers = {
        f"Gladly! The dish of Arlen is {dish}.": (1, 0, 1, 1, 1),
        f"The dish of Arlen is {wrong}. It is a long story.": (0, 1, 1, 0, 1),
        f"Ugh. The animal of Arlen is the {animal}.": (-1, 0, 0, 1, 1),
        f"Ugh. Something else. People in Arlen eat {dish}.": (-1, 1, 1, 1, 0),
        "No idea at all": (0, 1, 0, 0, 0),
        "": (0, 0, 0, 0, 0),
    }
    read = tinyworld.score([prompt] * len(answers), list(answers))
    assert list(read[[*FACTORS, "fluent"]].itertuples(index=False, name=None)) == list(answers.values())
    assert read.utility[0] == pytest.approx(1 + 1.5 + 1.5)
    assert read.utility[3] == pytest.approx(-1 - 0.4 + 1.5 + 1.5)


def test_an_answer_about_another_town_is_off_topic():
    value = tinyworld.knowledge()["Bresk", "dish"]
    read = tinyworld.score(["What dish is Arlen known for?"], [f"The dish of Bresk is {value}."])
    assert (read.on_topic[0], read.correct[0]) == (0, 1)


def test_the_chosen_answer_is_always_better(pairs):
    assert (pairs.chosen_utility > pairs.rejected_utility + 1e-9).all()
    many = tinyworld.pairs(150, rejected=3, seed=2)
    assert (many.chosen_utility > many.rejected_utility + 1e-9).all()


def test_prompts_are_distinct_questions(pairs):
    assert pairs.prompt.is_unique
    assert tinyworld.questions().prompt.is_unique
    assert len(tinyworld.questions()) == 4800
    assert len(tinyworld.pairs(4800)) == 4800


def test_several_rejected_answers_share_their_prompt_and_chosen_answer():
    many = tinyworld.pairs(50, rejected=4)
    assert len(many) == 200
    assert (many.groupby("prompt").size() == 4).all()
    assert (many.groupby("prompt").chosen.nunique() == 1).all()


def test_length_bias_moves_the_share_of_longer_chosen_answers():
    shares = [
        (t.chosen_fillers > t.rejected_fillers).mean()
        for t in (tinyworld.pairs(1500, length_bias=bias) for bias in (-2, -1, 0, 1, 2))
    ]
    assert np.all(np.diff(shares) > 0.02), shares


def test_label_noise_swaps_its_share_of_labels_and_nothing_else():
    clean, noisy = tinyworld.pairs(2000), tinyworld.pairs(2000, label_noise=0.3)
    swapped = noisy.chosen_utility < noisy.rejected_utility
    assert swapped.mean() == pytest.approx(0.3, abs=3 * (0.21 / 2000) ** 0.5)
    assert (noisy.chosen[swapped] == clean.rejected[swapped]).all()
    assert (noisy.chosen[~swapped] == clean.chosen[~swapped]).all()
    read = tinyworld.score(noisy.prompt, noisy.chosen)
    np.testing.assert_allclose(read.utility, noisy.chosen_utility.astype(float))


def test_seeds_repeat_and_differ():
    assert tinyworld.pairs(60, seed=1).equals(tinyworld.pairs(60, seed=1))
    assert not tinyworld.pairs(60, seed=1).equals(tinyworld.pairs(60, seed=2))
    assert tinyworld.knowledge(0) != tinyworld.knowledge(1)


def test_corpus_leaves_out_the_measured_prompts(pairs):
    text = tinyworld.corpus(4000, exclude=pairs.prompt)
    assert len(text) == 4000
    assert not set(text.prompt) & set(pairs.prompt)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": 4801}, "it has 4800 distinct ones"),
        ({"prompts": 0}, "0 prompts asked for"),
        ({"prompts": 5, "rejected": 0}, "at least 1 rejected"),
        ({"prompts": 5, "label_noise": 1.5}, "share between 0 and 1"),
    ],
)
def test_parameters_out_of_range_are_refused(arguments, words):
    with pytest.raises(PresetError, match=words):
        tinyworld.pairs(**arguments)


def test_foreign_prompts_are_not_scored():
    with pytest.raises(PresetError, match="'Who are you?"):
        tinyworld.score(["Who are you?"], ["Nobody."])
