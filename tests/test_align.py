"""Alignment: every trainer sees the formatter's token ids, trains its adapter only, repeats, stops and explains."""

import dataclasses
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import utility
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig
from transformers.generation import GenerationMixin

from alignlens import align, models
from alignlens.align import Recipe, resuming, trainers
from alignlens.align.trainers import Run
from alignlens.align.training import _formatter
from alignlens.core import settings
from alignlens.core.errors import AlignError
from alignlens.core.store import DamagedArtifact
from alignlens.preferences import collate

METHODS = (*settings.METHODS, *settings.CONTROLS)
OFFLINE = [m for m in METHODS if m not in align.ONLINE]
CURVES = {
    "step", "loss", "reward", "margin", "kl", "kl_se", "length", "chosen_logprob", "rejected_logprob",
    "heldout_margin", "heldout_accuracy",
}  # fmt: skip


def run(folder, micro, method, *, reward=None, heldout=None, resumable=None, **changes):
    """Train a variant of the micro base; its adapter, its curves and what ``train`` said."""
    folder.mkdir(exist_ok=True)
    reward = utility if reward is None and method in align.ONLINE else reward
    recipe = micro.recipe(method, **changes)
    facts = align.train(
        folder, micro.folder, micro.train, micro.heldout if heldout is None else heldout, recipe, reward=reward,
        resumable=resumable,
    )  # fmt: skip
    return SimpleNamespace(
        adapter=load_file(folder / "adapter_model.safetensors"),
        bytes=(folder / "adapter_model.safetensors").read_bytes(),
        curves=pd.read_parquet(folder / "curves.parquet"),
        facts=facts,
    )


# --- what the trainers see ------------------------------------------------------------------------------------------


class Caught(Exception):
    pass


@pytest.fixture
def first_batch(monkeypatch, tmp_path):
    """first_batch(micro, method): the trainer as built by ``train`` and the first batch that it collates."""
    build = Run.trainer

    def catch(micro, method, **changes):
        seen = []
        with monkeypatch.context() as patch, pytest.raises(Caught):
            patch.setattr(Run, "trainer", lambda *words, **named: seen.append(build(*words, **named)) or _raise())
            align.train(
                tmp_path, micro.folder, micro.train, micro.heldout, micro.recipe(method, **changes),
                reward=utility if method in align.ONLINE else None,
            )  # fmt: skip
        return seen[0], next(iter(seen[0].get_train_dataloader()))

    return catch


def _raise():
    raise Caught


def sides(micro):
    """The formatter's own (prompt ids, response ids) of every chosen and every rejected answer."""
    f, table = micro.format, micro.train
    return tuple([f.encode(p, r) for p, r in zip(table.prompt, table[s], strict=True)] for s in ("chosen", "rejected"))


def trained(ids, attention, loss_mask):
    """Each row of a batch as (ids that are read, ids that are trained on)."""
    rows = zip(ids.tolist(), attention.bool().tolist(), loss_mask.bool().tolist(), strict=True)
    out = []
    for row, seen, lost in rows:
        assert not any(wrong and not right for wrong, right in zip(lost, seen, strict=True)), "padding is trained on"
        assert seen == sorted(seen, reverse=True), "training rows are padded on the right"
        out.append((tuple(np.array(row)[seen].tolist()), tuple(np.array(row)[lost].tolist())))
    return out


def rows_of(parts):
    return {(tuple(p + r), tuple(r)) for p, r in parts}


@pytest.fixture(params=["micro", "no_bos", "two_ends"])
def base(request):
    return request.getfixturevalue(request.param)


def test_formats_differ_as_the_fixtures_say(micro, no_bos, two_ends):
    begins = [m.format.prompt_ids("Hello there")[0] == m.format.tokenizer.bos_token_id for m in (micro, two_ends)]
    assert begins == [True, True]
    assert no_bos.format.tokenizer.bos_token_id is None
    assert two_ends.format.end_id != two_ends.format.tokenizer.eos_token_id


@pytest.mark.parametrize("method", ["dpo", "shuffled"])
def test_preference_batches_hold_the_formatters_ids(base, method, first_batch):
    trainer, batch = first_batch(base, method)
    rows = trained(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    chosen, rejected = map(rows_of, sides(base))
    assert len(rows) == 16
    assert set(rows) <= chosen | rejected
    if method == "dpo":
        assert set(rows[:8]) <= chosen
        assert set(rows[8:]) <= rejected
    prompts = [row[: len(row) - len(answer)] for row, answer in rows]
    assert prompts[:8] == prompts[8:]


def test_kto_batches_hold_the_formatters_ids_and_a_mismatched_answer(base, first_batch):
    trainer, batch = first_batch(base, "kto")
    rows = trained(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    chosen, rejected = map(rows_of, sides(base))
    for row, label in zip(rows, batch["label"].tolist(), strict=True):
        assert row in (chosen if label else rejected)
    other = trained(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
    for i, (row, answer) in enumerate(other):
        prompt = rows[i][0][: len(rows[i][0]) - len(rows[i][1])]
        assert answer == rows[i - 1][1]
        assert row == prompt + answer


@pytest.mark.parametrize("method", ["simpo", "orpo"])
def test_reference_free_batches_hold_the_formatters_ids(base, method, first_batch):
    trainer, batch = first_batch(base, method)
    for side, parts in zip(("chosen", "rejected"), sides(base), strict=True):
        labels = batch[f"{side}_labels"]
        rows = trained(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], labels != -100)
        assert len(rows) == 8
        assert set(rows) <= rows_of(parts)
        ids = batch[f"{side}_input_ids"]
        assert (labels[labels != -100] == ids[labels != -100]).all()


def test_sft_batches_hold_the_formatters_ids(base, first_batch):
    trainer, batch = first_batch(base, "sft")
    rows = trained(batch["input_ids"], batch["attention_mask"], batch["labels"] != -100)
    assert len(rows) == 8
    assert set(rows) <= rows_of(sides(base)[0])
    on = batch["labels"] != -100
    assert (batch["labels"][on] == batch["input_ids"][on]).all()


def test_reward_batches_hold_the_formatters_ids(base, tmp_path, monkeypatch):
    from trl import RewardTrainer

    def train(self):
        batch = next(iter(self.get_train_dataloader()))
        rows = trained(batch["input_ids"], batch["attention_mask"], batch["attention_mask"])
        chosen, rejected = ({ids for ids, _ in rows_of(parts)} for parts in sides(base))
        assert {ids for ids, _ in rows[:8]} <= chosen
        assert {ids for ids, _ in rows[8:]} <= rejected
        assert self.model.config.pad_token_id == base.format.pad_id
        raise Caught

    monkeypatch.setattr(RewardTrainer, "train", train)
    with pytest.raises(Caught):
        align.train_reward(tmp_path, base.folder, base.train, base.recipe("reward"))


@pytest.mark.parametrize("method", align.ONLINE)
def test_generation_starts_from_the_formatters_prompt_and_ends_at_its_end(base, method, tmp_path, monkeypatch):
    calls, judged, generate = [], [], GenerationMixin.generate

    def recorded(self, *words, **named):
        made = generate(self, *words, **named)
        calls.append((named["input_ids"], named["attention_mask"], getattr(made, "sequences", made)))
        return made

    def judge(prompts, responses):
        judged.extend(zip(prompts, responses, strict=True))
        return [float(len(r)) for r in responses]

    monkeypatch.setattr(GenerationMixin, "generate", recorded)
    monkeypatch.setattr(align.Monitor, "check", lambda self, step: self.rows or self.rows.append({
        "step": 0, "kl": 0.0, "kl_se": 0.0}))  # fmt: skip
    run(tmp_path / "v", base, method, reward=judge, steps=1, response_tokens=24)
    f = base.format
    prompts = {tuple(f.prompt_ids(p)): p for p in base.train.prompt}
    (ids, mask, made), *_ = calls
    assert len(judged) == 8
    ended = 0
    for row, seen, whole, (prompt, response) in zip(ids, mask.bool(), made, judged, strict=True):
        assert prompts[tuple(row[seen].tolist())] == prompt
        assert seen.tolist() == sorted(seen.tolist()), "prompts are padded on the left"
        answer = whole[len(row) :].tolist()
        if f.end_id in answer:
            end = answer.index(f.end_id) + 1
            assert set(answer[end:]) <= {f.pad_id}, "generation went on after the end of the turn"
            answer, ended = answer[:end], ended + 1
        assert f.decode(answer) == response
    assert ended, "no answer ended: lengthen response_tokens"


def test_grpo_trains_on_the_completion_up_to_its_end(micro, tmp_path, monkeypatch):
    from trl import GRPOTrainer

    batches, loss = [], GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, m, x: batches.append(x) or loss(self, m, x))
    run(tmp_path / "v", micro, "grpo", steps=1, response_tokens=24)
    f = micro.format
    prompts = {tuple(f.prompt_ids(p)) for p in micro.train.prompt}
    (batch,) = batches
    ended = 0
    for prompt, seen, answer, on in zip(
        *(batch[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
    ):
        assert tuple(prompt[seen.bool()].tolist()) in prompts
        kept = answer[on.bool()].tolist()
        assert f.end_id not in kept[:-1]
        assert kept[-1] == f.end_id or len(kept) == 24
        assert set(answer[~on.bool()].tolist()) <= {f.pad_id}
        ended += kept[-1] == f.end_id
    assert ended


def test_pairs_longer_than_max_length_are_left_out_and_counted_never_cut(micro, first_batch, tmp_path):
    lengths = [[sum(map(len, row)) for row in side] for side in map(list, sides(micro))]
    longest = np.max(lengths, axis=0)
    most = int(np.median(longest))
    fits = dataclasses.replace(micro, train=micro.train[longest <= most])
    assert 10 < len(fits.train) < len(micro.train) - 10
    trainer, batch = first_batch(micro, "dpo", max_length=most)
    rows = trained(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    assert set(rows) <= rows_of(sum(sides(fits), []))
    made = run(tmp_path / "v", micro, "sft", max_length=most, steps=1)
    assert made.facts["pairs"] == len(fits.train)


# --- rewards of sampled text ----------------------------------------------------------------------------------------


def known(format, prompts):
    return {prompt: format.prompt_ids(prompt) for prompt in prompts}


def test_a_reward_function_gets_the_text_of_padded_rows(micro):
    table = micro.train.head(6)
    f = micro.format
    judge = trainers._TextReward(utility, f, known(f, micro.train.prompt))
    rows = [sum(f.encode(p, r), []) for p, r in zip(table.prompt, table.chosen, strict=True)]
    ids, mask = collate(rows, f.pad_id, side="left")
    values = judge.score(judge(input_ids=ids, attention_mask=mask).hidden_states[-1])
    want = torch.tensor(utility(table.prompt, table.chosen), dtype=torch.float32)
    assert values.shape == (6, ids.shape[1], 1)
    torch.testing.assert_close(values[:, -1, 0], want)


def test_a_prompt_that_begins_another_does_not_take_its_rows(micro):
    f = micro.format
    short, long = "Which is it?", "Which is it? Tell me."
    judge = trainers._TextReward(lambda prompts, answers: [len(p) for p in prompts], f, known(f, [short, long]))
    rows = [sum(f.encode(p, "Yes."), []) for p in (short, long)]
    ids, mask = collate(rows, f.pad_id, side="left")
    assert judge(ids, mask).hidden_states[0][:, 0, 0].tolist() == [len(short), len(long)]


def test_rows_with_changed_prompts_are_refused(micro):
    judge = trainers._TextReward(utility, micro.format, known(micro.format, micro.train.prompt[:2]))
    with pytest.raises(AlignError, match="token ids were changed on the way"):
        judge(torch.tensor([[9, 9, 9]]), torch.ones(1, 3))


@pytest.mark.parametrize("side", ["model", "function"])
def test_grpo_scores_are_the_rewards_own(micro, reward, side):
    f, table = micro.format, micro.train.head(4)
    ids = [f.response_ids(p, r) for p, r in zip(table.prompt, table.chosen, strict=True)]
    judge = models.load_reward(micro.folder, reward) if side == "model" else utility
    made = Run(micro.recipe("grpo"), None, f, f.encode_pairs(table), "", judge)
    scores = trainers._grpo_reward(made)(table.prompt.tolist(), table.chosen.tolist(), completion_ids=ids)
    if side == "model":
        want = models.rewards(judge, [f.prompt_ids(p) for p in table.prompt], ids, pad_id=f.pad_id)
    else:
        want = utility(table.prompt, table.chosen)
    np.testing.assert_allclose(scores, want, rtol=1e-5)


def test_ppos_reward_is_read_at_the_end_of_the_response(micro, reward):
    from trl.experimental.utils import get_reward

    f, table = micro.format, micro.train.head(6)
    model = models.load_reward(micro.folder, reward)
    parts = [f.encode(p, r) for p, r in zip(table.prompt, table.chosen, strict=True)]
    left, _ = collate([p for p, _ in parts], f.pad_id, side="left")
    right, _ = collate([r for _, r in parts], f.pad_id)
    with torch.no_grad():
        _, scores, _ = get_reward(model, torch.cat([left, right], 1), f.pad_id, left.shape[1])
    want = models.rewards(model, *map(list, zip(*parts, strict=True)), pad_id=f.pad_id)
    np.testing.assert_allclose(scores, want, atol=1e-5)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(micro, reward, tmp_path_factory):
    """Each method trained for three steps, once; the printed output beside it."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def get(method):
        if method not in done:
            judge = models.load_reward(micro.folder, reward) if method == "ppo" else None
            done[method] = run(folder / method, micro, method, reward=judge)
        return done[method]

    return get


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_adapter_and_leaves_the_base(micro, runs, method):
    before = (micro.folder / "model.safetensors").read_bytes()
    made = runs(method)
    assert (micro.folder / "model.safetensors").read_bytes() == before
    tuned = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in made.adapter}
    assert tuned == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(v.dtype == torch.float16 for v in made.adapter.values())
    assert len([n for n, v in made.adapter.items() if "lora_B" in n and v.abs().max() > 0]) == 8
    assert made.facts["method"] == method
    assert (made.facts["steps"], made.facts["stopped_by"], made.facts["pairs"]) == (3, "last step", len(micro.train))
    assert made.facts["dose"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_curves_have_their_columns(runs, method):
    curves = runs(method).curves
    assert set(curves.columns) == CURVES
    assert curves.step.tolist() == [0, 2, 3]
    first = curves.iloc[0]
    assert (first.kl, first.kl_se, first.heldout_margin, first.heldout_accuracy) == (0, 0, 0, 0.5)
    assert curves.kl.iloc[-1] > 0
    assert np.isfinite(curves.loc[1, "loss"]), "what a trainer logs at a step stands in the row of that step"
    assert np.isfinite(curves.loc[1, "reward"]) == (method in align.ONLINE)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(micro, reward, runs, method, tmp_path):
    judge = models.load_reward(micro.folder, reward) if method == "ppo" else None
    torch.manual_seed(1234)
    np.random.seed(1234)  # noqa: NPY002
    assert run(tmp_path / "again", micro, method, reward=judge).bytes == runs(method).bytes
    other = run(tmp_path / "other", micro, method, reward=judge, seed=1, steps=2, check_every=9)
    first = {n: v for n, v in other.adapter.items() if "lora_A" in n}
    assert not any(torch.equal(v, runs(method).adapter[n]) for n, v in first.items())


@pytest.mark.parametrize("method", ["dpo", "kto", "simpo", "orpo"])
def test_preference_methods_widen_the_margin_on_their_own_pairs(micro, method, tmp_path):
    pairs = micro.train.head(16)
    narrow = dataclasses.replace(micro, train=pairs)
    curves = run(tmp_path / "v", narrow, method, heldout=pairs, steps=10, batch_size=16, check_prompts=16).curves
    assert curves.heldout_margin.iloc[-1] > 0.02
    assert curves.heldout_accuracy.iloc[-1] > 0.6


def test_sft_raises_the_chosen_answers(micro, tmp_path):
    pairs = micro.train.head(16)
    curves = run(
        tmp_path / "v", dataclasses.replace(micro, train=pairs), "sft", heldout=pairs, steps=10, batch_size=16
    ).curves
    assert curves.chosen_logprob.iloc[-1] > curves.chosen_logprob.iloc[0] + 0.5


@pytest.mark.parametrize("method", align.ONLINE)
def test_online_methods_raise_their_reward(micro, method, tmp_path):
    def short(prompts, responses):
        return [-len(r) / 10 for r in responses]

    rate = {"grpo": 1e-2, "ppo": 1e-2}[method]
    curves = run(
        tmp_path / "v", micro, method, reward=short, steps=10, batch_size=16, check_every=5, check_prompts=24,
        learning_rate=rate, response_tokens=24,
    ).curves  # fmt: skip
    assert curves.length.iloc[-1] < curves.length.iloc[0] - 1, curves[["step", "length", "reward"]]


@pytest.mark.parametrize("kind", ["model", "function"])
def test_ppos_value_model_learns(micro, reward, kind):
    """A reward model is loaded frozen: a value model copied from it would never learn."""
    model, tokenizer = models.load(micro.folder)
    f = _formatter(tokenizer, 96)
    judge = models.load_reward(micro.folder, reward) if kind == "model" else utility
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    found = trainers._ppo_models(Run(micro.recipe("ppo"), model, f, f.encode_pairs(micro.train), "", judge))
    given, value = found["reward_model"], found["value_model"]
    assert torch.equal(torch.random.get_rng_state(), before), "the policy's own adapter draws from here on"
    learning = [n for n, p in value.named_parameters() if p.requires_grad]
    assert [n for n in learning if "lora_" not in n] == ["score.weight"]
    assert len(learning) == 1 + 2 * 4 * 2
    if kind == "model":
        assert given is judge
        assert not any(p.requires_grad for p in judge.parameters())
        parts = [f.encode(p, r) for p, r in micro.train.head(3)[["prompt", "chosen"]].itertuples(index=False)]
        both = [models.rewards(m, *map(list, zip(*parts, strict=True)), pad_id=f.pad_id) for m in (judge, value)]
        np.testing.assert_allclose(*both, atol=1e-5)
    else:
        assert value.score.weight.abs().max() == 0


def test_shuffled_swaps_about_half_of_the_labels_by_seed(micro, first_batch):
    chosen, rejected = map(rows_of, sides(micro))

    def swapped(seed):
        rows = first_batch(micro, "shuffled", seed=seed)[0].train_dataset
        pairs = zip(rows["prompt_ids"], rows["chosen_ids"], strict=True)
        return [(tuple(p + c), tuple(c)) in rejected for p, c in pairs]

    first, second = swapped(0), swapped(1)
    assert 0.3 < np.mean(first) < 0.7
    assert 0.3 < np.mean(second) < 0.7
    assert first != second
    rows = first_batch(micro, "shuffled", seed=0)[0].train_dataset
    pairs = zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
    either = [
        {(tuple(p + a), tuple(a)) in chosen for a in sides_} == {True, False} or sides_[0] == sides_[1]
        for p, *sides_ in pairs
    ]
    assert all(either), "each row still holds one chosen and one rejected answer of its prompt"


@pytest.mark.parametrize("method", ["dpo", "ppo", "grpo"])
def test_a_run_ends_at_its_dose(micro, method, tmp_path):
    made = run(
        tmp_path / "v", micro, method, stop="dose", dose=1e-4, steps=9, check_every=2, learning_rate=2e-2,
        response_tokens=12,
    )  # fmt: skip
    assert made.facts["stopped_by"] == "dose"
    assert made.facts["steps"] < 9
    assert made.facts["dose"] >= 1e-4
    assert (made.curves.kl.iloc[:-1] < 1e-4).all()


def test_a_dose_out_of_reach_ends_at_the_last_step(micro, tmp_path):
    made = run(tmp_path / "v", micro, "dpo", stop="dose", dose=1e6)
    assert (made.facts["steps"], made.facts["stopped_by"]) == (3, "last step")


@pytest.mark.parametrize("method", ["sft", "grpo", "ppo"])
def test_divergence_is_an_error_that_says_what_to_do(micro, method, tmp_path):
    with pytest.raises(AlignError, match=rf"{method}: training diverged by step \d.*lower the learning rate"):
        run(tmp_path / "v", micro, method, learning_rate=1e30, steps=6, check_every=1)
    assert not list((tmp_path / "v").iterdir()), "nothing is saved of a run that broke"


@pytest.mark.parametrize("method", ["dpo", "simpo", "kto", "sft", "grpo", "ppo"])
def test_training_says_nothing(micro, method, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run(tmp_path / "v", micro, method, steps=1, check_every=1)
    out, err = capfd.readouterr()
    assert out + err == ""


def test_making_and_loading_models_says_nothing(micro, reward, tmp_path, capfd, world):
    models.load(micro.folder)
    models.load_reward(micro.folder, reward)
    align.train_reward(tmp_path, micro.folder, micro.train, micro.recipe("reward", steps=1))
    text = [("What?", "That.")] * 4
    models.pretrain(
        tmp_path, "qwen3", text, layers=1, d_model=16, vocab_size=300, steps=1, batch_size=2, learning_rate=0.1, seed=0
    )
    assert "".join(capfd.readouterr()) == ""


def test_quiet_gives_logging_and_bars_back():
    import logging

    from datasets.utils.logging import is_progress_bar_enabled
    from transformers.utils import logging as transformers_logging

    def state():
        return (
            transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(),
            is_progress_bar_enabled(), logging.getLogger("trl").level, len(warnings.filters),
        )  # fmt: skip

    before = state()
    with pytest.raises(ZeroDivisionError), models.quietly():
        assert state() != before
        _ = 1 / 0
    assert state() == before


@pytest.mark.parametrize("trust", [True, False])
def test_trust_reaches_every_model_that_training_loads(micro, monkeypatch, tmp_path, trust):
    seen, loads = [], {name: getattr(models, name) for name in ("load", "load_tokenizer", "score_model")}
    for name, load in loads.items():
        monkeypatch.setattr(models, name, lambda *words, _name=name, _load=load, **named: seen.append(
            (_name, named["trust_remote_code"])) or _load(*words, **named))  # fmt: skip
    recipe = micro.recipe("sft", steps=1)
    align.train(tmp_path, micro.folder, micro.train, micro.heldout, recipe, trust_remote_code=trust)
    recipe = micro.recipe("reward", steps=1)
    align.train_reward(tmp_path, micro.folder, micro.train, recipe, trust_remote_code=trust)
    assert seen == [(name, trust) for name in loads]


# --- recipes and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "rlhf"}, "method 'rlhf': it is unknown; choose from ppo"),
        ({"stop": "never"}, "choose 'dose' or 'last'"),
        ({"steps": 0}, "must be positive"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"dose": 0.0}, "must be positive"),
        ({"check_every": 0}, "must be positive"),
        ({"response_tokens": 0}, "must be positive"),
        ({"micro_batch_size": 5}, "16 must be a multiple of micro_batch_size 5"),
        ({"micro_batch_size": 32}, "must be a multiple of"),
        ({"method": "kto", "micro_batch_size": 1}, r"kto's over 1"),
        ({"method": "grpo", "batch_size": 12}, "multiple of num_generations 8"),
    ],
)
def test_recipes_are_checked(changes, words):
    with pytest.raises(AlignError, match=words):
        Recipe(**{"method": "dpo", "learning_rate": 1e-4, "steps": 5} | changes)


def test_published_recipes_hold_the_papers_numbers():
    def get(method):
        return align.published(Recipe(method, learning_rate=1.0, steps=1, dose=9.0), 1000)

    dpo, kto, simpo, grpo, ppo = map(get, ("dpo", "kto", "simpo", "grpo", "ppo"))
    for recipe in (dpo, kto, simpo, grpo, ppo):
        assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout, recipe.stop) == (16, 32, 0.05, "last")
    assert [r.learning_rate for r in (dpo, kto, simpo, grpo, ppo)] == [5e-7, 5e-7, 5e-7, 1e-6, 3e-6]
    assert [r.steps for r in (dpo, kto, simpo, grpo, ppo)] == [32, 32, 32, 32, 125], "one epoch"
    assert [r.max_length for r in (dpo, kto, simpo)] == [512, 512, 1024]
    assert [r.response_tokens for r in (grpo, ppo)] == [256, 53]
    assert (dpo.all_options["beta"], kto.all_options["beta"]) == (0.1, 0.1)
    assert (simpo.all_options["beta"], simpo.all_options["simpo_gamma"]) == (2.0, 1.0)
    assert (grpo.all_options["num_generations"], grpo.all_options["loss_type"]) == (4, "dr_grpo")
    assert (ppo.all_options["kl_coef"], ppo.all_options["num_ppo_epochs"]) == (0.05, 1)


def test_there_is_no_published_orpo():
    with pytest.raises(AlignError, match="no recipe for orpo is published; load its checkpoint"):
        align.published(Recipe("orpo", learning_rate=1.0, steps=1), 1000)
    assert set(align.PUBLISHED) == set(settings.METHODS) - {"orpo"}


@pytest.mark.parametrize("method", sorted(align.PUBLISHED))
def test_published_options_are_options_of_the_trainers(micro, method, first_batch):
    recipe = align.published(micro.recipe(method), 64)
    names = ("batch_size", "max_length", "response_tokens", "options", "lora_dropout")
    trainer, _ = first_batch(micro, method, **{n: getattr(recipe, n) for n in names})
    for name, value in recipe.options.items():
        assert getattr(trainer.args, name) == value


@pytest.mark.parametrize("method", align.ONLINE)
def test_online_methods_need_a_reward(micro, method, tmp_path):
    with pytest.raises(AlignError, match=f"{method} needs a reward: train a reward model"):
        align.train(tmp_path, micro.folder, micro.train, micro.heldout, micro.recipe(method))


def test_ppo_needs_prompts_for_a_batch(micro, tmp_path):
    few = dataclasses.replace(micro, train=micro.train.head(5))
    with pytest.raises(AlignError, match="5 prompts do not fill one batch of 8"):
        run(tmp_path / "v", few, "ppo")


def test_a_reward_model_needs_prompts_to_test_on(micro, tmp_path):
    with pytest.raises(AlignError, match="3 prompts are too few"):
        align.train_reward(tmp_path, micro.folder, micro.train.head(3), micro.recipe("reward"))


def test_a_reward_model_learns_and_reports_held_out_accuracy(micro, tmp_path):
    facts = align.train_reward(tmp_path, micro.folder, micro.train, micro.recipe("reward", steps=2))
    assert (facts["pairs"], facts["heldout_pairs"]) == (len(micro.train) - 16, 16)
    assert 0 <= facts["accuracy"] <= 1
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert any("score" in name and value.abs().max() > 0 for name, value in adapter.items())


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50), {"c_attn"}),
        (
            GPTNeoXConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=50),
            {"query_key_value", "dense"},
        ),
    ],
)
def test_other_architectures_carry_the_adapter_on_their_attention(micro, config, targets):
    from peft import get_peft_model

    lora = trainers.lora(micro.recipe("dpo"), AutoModelForCausalLM.from_config(config))
    assert isinstance(lora, LoraConfig)
    assert set(lora.target_modules) == targets
    with models.quietly():
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    tuned = [n for n, _ in model.named_parameters() if "lora_A" in n]
    assert len(tuned) == len(targets)
    assert all("attn" in n or "attention" in n for n in tuned)


def test_an_architecture_without_known_projections_is_refused(micro):
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="strange")
    with pytest.raises(AlignError, match="strange has none of the attention projections"):
        trainers.lora(micro.recipe("dpo"), model)


# --- killed and gone on ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    """Save at every check, and die right after the one of this step."""
    save = resuming.Resumable._save

    def dying(self, *_, **__):
        save(self)
        if self.trainer.state.global_step == step:
            raise Killed

    monkeypatch.setattr(resuming, "EVERY", 0)
    monkeypatch.setattr(resuming.Resumable, "_save", dying)


LONG = {"steps": 7, "check_every": 2, "response_tokens": 8, "lora_dropout": 0.1, "check_prompts": 4}


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_adapter(micro, method, reward, tmp_path, monkeypatch):
    """Bit for bit, over several passes of few pairs: weights, optimiser, order of data, dropout, samples and curves."""
    few = dataclasses.replace(micro, train=micro.train.head(20))
    judge = models.load_reward(micro.folder, reward) if method == "ppo" else None
    options = {"options": {"num_generations": 2}} if method == "grpo" else {}
    whole = run(tmp_path / "whole", few, method, reward=judge, **LONG, **options)
    working = tmp_path / "working"
    for step in (2, 6):  # killed twice: within a pass over the data and later
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, step)
            run(tmp_path / "rest", few, method, reward=judge, resumable=working, **LONG, **options)
    steps, measure = [], align.Monitor._measure
    monkeypatch.setattr(align.Monitor, "_measure", lambda self, step: steps.append(step) or measure(self, step))
    rest = run(tmp_path / "rest", few, method, reward=judge, resumable=working, **LONG, **options)
    assert steps == [7], "what was done before the kill is not done again"
    assert rest.bytes == whole.bytes
    assert rest.facts == whole.facts
    pd.testing.assert_frame_equal(rest.curves, whole.curves)


def test_a_run_killed_between_two_checks_lands_on_its_dose(micro, tmp_path, monkeypatch):
    """Landing goes back to the weights of the check before it: after the kill they come from the saved state."""
    options = {"stop": "dose", "dose": 0.05, "steps": 40, "check_every": 2, "check_prompts": 4}
    whole = run(tmp_path / "whole", micro, "dpo", **options)
    last = whole.facts["steps"] - 2
    assert whole.facts["stopped_by"] == "dose"
    assert last >= 2
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, last)
        run(tmp_path / "rest", micro, "dpo", resumable=tmp_path / "working", **options)
    assert run(tmp_path / "rest", micro, "dpo", resumable=tmp_path / "working", **options).bytes == whole.bytes


def test_a_killed_reward_model_goes_on_to_the_same_adapter(micro, tmp_path, monkeypatch):
    def train(name):
        (tmp_path / name).mkdir(exist_ok=True)
        align.train_reward(
            tmp_path / name,
            micro.folder,
            micro.train,
            micro.recipe("reward", steps=5, check_every=1),
            resumable=working,
        )
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    working = None
    whole, working = train("whole"), tmp_path / "working"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 3)
        train("rest")
    assert train("rest") == whole


@pytest.mark.parametrize("harm", ["a changed byte", "a lost end", "nothing in it", "other versions"])
def test_a_state_that_cannot_be_used_is_reported_and_training_starts_anew(micro, harm, tmp_path, monkeypatch):
    options = {"steps": 3, "check_every": 1, "check_prompts": 2, "resumable": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 2)
        run(tmp_path / "v", micro, "sft", **options)
    state = tmp_path / "state"
    raw = state.read_bytes()
    if harm == "other versions":
        monkeypatch.setattr(resuming, "versions", lambda: {"torch": "0"})
    else:
        changed = raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]
        state.write_bytes({"a changed byte": changed, "a lost end": raw[:-1], "nothing in it": b""}[harm])
    with pytest.warns(
        DamagedArtifact, match="state is damaged or was written with other versions: training starts anew"
    ):
        made = run(tmp_path / "v", micro, "sft", **options)
    assert made.curves.step.tolist() == [0, 1, 2, 3]


def test_what_broke_is_not_gone_on_from(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "EVERY", 0)
    with pytest.raises(AlignError, match="training diverged"):
        run(tmp_path / "v", micro, "sft", learning_rate=1e30, steps=6, check_every=1, resumable=tmp_path / "working")
    assert not (tmp_path / "working").exists()


def test_a_run_says_how_far_it_is(micro, tmp_path, monkeypatch):
    told, write = [], Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, words, **_: told.append(words) or write(path, words))
    monkeypatch.setattr(resuming.time, "monotonic", iter(range(0, 10**6, 10)).__next__)
    run(tmp_path / "v", micro, "sft", steps=3, check_every=1, resumable=tmp_path / "working")
    said = [words for words in told if words.startswith("step")]
    assert [words.split(", ")[0] for words in said] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert re.fullmatch(r"step 1 of 3, dose [\d.e-]+ nats, 00:\d\d left at most", said[0])


# --- within the model's context -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "asked", "most"),
    [
        (128, (1024, 256), (128, 64, 64)),
        (128, (96, 16), (96, 96, 16)),
        (128, (128, 48), (128, 80, 48)),
        (8192, (1024, 256), (1024, 1024, 256)),
        (None, (1024, 256), (1024, 1024, 256)),
    ],
)
def test_lengths_are_the_smaller_of_what_is_asked_and_what_the_model_holds(context, asked, most):
    text = SimpleNamespace(max_position_embeddings=context)
    assert align.limits(SimpleNamespace(get_text_config=lambda: text), *asked) == most


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_training_uses_the_smaller_of_max_length_and_context(micro, method, tmp_path):
    """The micro base holds 128 tokens, so it is as if 128, and answers of half of that, had been asked for."""
    asked = run(tmp_path / "asked", micro, method, max_length=1024, response_tokens=256, steps=2)
    held = run(tmp_path / "held", micro, method, max_length=128, response_tokens=64, steps=2)
    assert asked.bytes == held.bytes
    assert asked.facts == held.facts


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(micro):
    encoded = micro.format.encode_pairs(micro.train)
    sizes = np.array([len(ids) for ids in encoded.prompt_ids])
    most = int(np.median(sizes))
    found = align.answerable(encoded, most)
    assert [len(ids) for ids in found.prompt_ids] == sizes[sizes <= most].tolist()
    assert found.report["no_room_to_answer"] == (sizes > most).sum() > 0
    assert found.prompts == micro.train.prompt[found.kept].tolist()
    assert found.prompt_id.tolist() == micro.train.prompt_id[found.kept].tolist()
    assert align.answerable(encoded, 128) is encoded
    with pytest.raises(AlignError, match="no prompt has at most 3 tokens"):
        align.answerable(encoded, 3)
