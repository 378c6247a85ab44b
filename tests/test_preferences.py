"""Pairs are what the file says or refused with its place; every format is checked on token ids."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignlens.core.errors import PreferenceError
from alignlens.preferences import (
    COLUMNS,
    Formatter,
    check_folds,
    collate,
    describe_report,
    formatting,
    join_turns,
    load_pairs,
    prompt_id,
    split_by_prompt,
    split_hash,
    turns,
)

PAIR = {"prompt": "Name a colour.", "chosen": "Blue is a colour.", "rejected": "A dog."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def many(prompts, each=1):
    return pd.DataFrame(
        [
            {"prompt": f"Question {i}?", "chosen": f"Good {i} {j}.", "rejected": f"Bad {i} {j}.", "factor": i % 3}
            for i in range(prompts)
            for j in range(each)
        ]
    )


# Loading


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "table", "folder"])
def test_every_kind_of_source_gives_the_same_pairs(tmp_path, suffix):
    table = many(5).assign(chosen=["NA", "12", "a\u2028b", "null", 'x, "y"\nz'])
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        write(path, table.to_dict("records"))
    elif suffix == "json":
        path.write_text(json.dumps(table.to_dict("records")))
    elif suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "folder":
        path.mkdir()
        table.to_parquet(path / "train.parquet")
    pairs = load_pairs(table if suffix == "table" else path)
    assert list(pairs.columns) == [*COLUMNS, "factor"]
    for column in table.columns:
        assert pairs[column].tolist() == table[column].tolist()
    assert pairs["prompt_id"].tolist() == [prompt_id(text) for text in table["prompt"]]


def test_prompt_id_is_fixed_and_ignores_only_form():
    assert prompt_id("Name a colour.") == "8596ba513b96363d"
    assert prompt_id(" Name  a\ncolour. ") == prompt_id("Name a colour.")
    assert prompt_id("Caf\u00e9?") == prompt_id("Cafe\u0301?")
    assert prompt_id("name a colour.") != prompt_id("Name a colour.")
    assert prompt_id(join_turns([user("a"), assistant("b"), user("c")])) != prompt_id("user a assistant b user c")


def test_message_lists_are_reduced_to_one_prompt_and_one_answer(tmp_path):
    head = [{"role": "system", "content": "Be short."}, user("Hi"), assistant("Hello"), user("Name a colour.")]
    rows = [
        PAIR,
        {"prompt": "Q1", "chosen": [user("Q1"), assistant("a")], "rejected": [user("Q1"), assistant("b")]},
        {"prompt": [user("Q2")], "chosen": [assistant("a")], "rejected": "b"},
        {"chosen": [*head, assistant("Blue")], "rejected": [*head, assistant("Dog")]},
        {"prompt": "Name a colour.", "chosen": [*head, assistant("Red")], "rejected": [*head, assistant("Dog")]},
    ]
    want = ["Name a colour.", "Q1", "Q2", join_turns(head), join_turns(head)]
    loaded = load_pairs(write(tmp_path / "chat.jsonl", rows))
    assert loaded["prompt"].tolist() == want
    assert loaded["chosen"].tolist() == ["Blue is a colour.", "a", "a", "Blue", "Red"]
    assert loaded["rejected"].tolist() == ["A dog.", "b", "b", "Dog", "Dog"]
    assert turns(loaded["prompt"][3]) == head
    loaded.to_parquet(tmp_path / "chat.parquet")
    again = load_pairs(tmp_path / "chat.parquet")
    assert again["prompt"].tolist() == want and again["prompt_id"].tolist() == loaded["prompt_id"].tolist()


def test_several_rejected_answers_make_several_pairs():
    rows = [{**PAIR, "rejected": ["Dog", [user(PAIR["prompt"]), assistant("Cat")]]}, {**PAIR, "rejected": "Cow"}]
    pairs = load_pairs(pd.DataFrame(rows))
    assert pairs["rejected"].tolist() == ["Dog", "Cat", "Cow"] and pairs["prompt_id"].nunique() == 1


def test_labelled_completions_are_paired_within_their_prompt():
    rows = [("p", "g1", True), ("p", "g2", True), ("p", "b1", False), ("p", "g1", True), ("q", "g", True)]
    rows += [("r", "both", True), ("r", "both", False), ("r", "g", 1), ("r", "b", 0)]
    table = pd.DataFrame(rows, columns=["prompt", "completion", "label"]).assign(score=range(9))
    pairs = load_pairs(table)
    assert sorted(zip(pairs["prompt"], pairs["rejected"], strict=True)) == [("p", "b1"), ("r", "b")]
    assert pairs["chosen"][0] in ("g1", "g2") and list(pairs.columns) == [*COLUMNS, "score_chosen", "score_rejected"]
    shuffled = load_pairs(table.sample(frac=1, random_state=1))
    assert shuffled.sort_values("prompt")["chosen"].tolist() == pairs["chosen"].tolist()
    report = pairs.attrs["report"]
    assert report["repeated_completion"] == 1 and report["both_labels"] == 2
    assert report["prompts_with_one_label"] == 1 and report["unpaired_completion"] == 2


def test_what_is_dropped_is_counted():
    rows = [PAIR, PAIR, {**PAIR, "chosen": "A dog.", "rejected": "Blue is a colour."}, {**PAIR, "prompt": "P" * 50}]
    pairs = load_pairs(pd.DataFrame(rows), max_chars=40)
    assert pairs.attrs["report"] == {
        "source": "DataFrame",
        "rows": 4,
        "duplicate": 1,
        "too_long": 1,
        "contradictory": 1,
        "pairs": 2,
        "prompts": 1,
    }
    assert describe_report(pairs).splitlines()[1:] == [
        "       4  rows read",
        "       1  duplicate pairs dropped",
        "       1  pairs dropped: longer than max_chars",
        "       1  contradictory pairs kept (same answers, swapped)",
        "       2  pairs",
        "       1  prompts",
    ]
    with pytest.raises(PreferenceError, match="no loading report"):
        describe_report(pd.DataFrame())


def test_limit_draws_whole_prompts_away_from_file_order():
    table = many(200, each=3)
    drawn = load_pairs(table, limit=100)
    assert len(drawn) == 99 and (drawn["prompt_id"].value_counts() == 3).all()
    assert set(drawn["prompt_id"]) != set(load_pairs(table)["prompt_id"][:99])
    again = load_pairs(table.sample(frac=1, random_state=0), limit=100)
    assert set(again["prompt_id"]) == set(drawn["prompt_id"])
    assert set(load_pairs(table, limit=30)["prompt_id"]) < set(drawn["prompt_id"])
    assert drawn.attrs["report"]["over_limit"] == 501


BAD_ROWS = [
    ({"prompt": "x", "chosen": "a"}, "field 'rejected': is missing"),
    ({**PAIR, "prompt": None}, "field 'prompt': is missing"),
    ({**PAIR, "chosen": " \n"}, "field 'chosen': is empty"),
    ({**PAIR, "rejected": []}, "field 'rejected': is an empty message list"),
    ({**PAIR, "prompt": []}, "field 'prompt': is an empty message list"),
    ({**PAIR, "chosen": 7}, "field 'chosen': is int, not text"),
    ({**PAIR, "chosen": "half \ud83d"}, "field 'chosen': holds half a unicode character"),
    ({**PAIR, "chosen": {"text": "a"}}, "field 'chosen': is dict, not text"),
    ({**PAIR, "rejected": PAIR["chosen"] + " "}, "field 'rejected': is equal to chosen"),
    ({**PAIR, "chosen": [user("Q"), user("a")]}, "field 'chosen': does not end with an assistant turn"),
    ({**PAIR, "chosen": [{"from": "gpt"}]}, "field 'chosen': message 1 is not a role and a content"),
    (
        {**PAIR, "chosen": [{"role": "narrator", "content": "a"}]},
        "field 'chosen': message 1 has the unknown role 'narrator'",
    ),
    ({**PAIR, "chosen": [assistant(None)]}, "field 'chosen': is missing"),
    ({**PAIR, "prompt": [user("a\x1eb")]}, "field 'prompt': message 1 holds the turn separator \\x1e"),
    (
        {**PAIR, "chosen": [user("Other?"), assistant("a")]},
        "field 'chosen': repeats a prompt that differs from the other fields' prompt",
    ),
    (
        {**PAIR, "prompt": [user("Q"), assistant("A")]},
        "field 'prompt': the prompt ends with a turn of role 'assistant', not 'user'",
    ),
    ('{"prompt": "x", ', "broken JSON (Expecting property name enclosed in double quotes at column 17)"),
    ("[1, 2]", "is not a JSON object with named fields"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS, ids=[words for _, words in BAD_ROWS])
def test_a_bad_row_is_refused_with_its_place_or_dropped_and_counted(tmp_path, row, words):
    path = write(tmp_path / "bad.jsonl", [PAIR, "", row])
    message = f"{path}: 1 of 2 rows cannot be used. line 3, {words}. Mend them, or pass on_bad='drop'"
    with pytest.raises(PreferenceError, match=re.escape(message)):
        load_pairs(path)
    report = load_pairs(path, on_bad="drop").attrs["report"]
    assert report["pairs"] == 1 and sum(n for kind, n in report.items() if kind.startswith("bad_")) == 1


def test_many_bad_rows_are_counted_and_the_first_shown():
    table = pd.DataFrame([PAIR] + [{**PAIR, "rejected": PAIR["chosen"]}] * 7)
    with pytest.raises(PreferenceError, match="DataFrame: 7 of 8 rows .* row 2, .* row 6, [^;]*. Mend"):
        load_pairs(table)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "x", "chosen": "a", "other": 1}', "no column 'rejected'; it has prompt, chosen, other"),
        ("a.csv", "prompt,text\nx,y\n", "no column 'chosen' and no column 'rejected'; it has prompt, text"),
        ("a.jsonl", "\n", "no pair is left"),
        ("a.json", "[{]", "cannot be read (JSONDecodeError: Expecting property name enclosed in double quotes: line 1"),
        ("a.jsonl", b"\xff\xe9", "cannot be read (UnicodeDecodeError: 'utf-8' codec"),
        ("a.csv", 'prompt,chosen\n"x', "cannot be read (ParserError"),
        ("a.parquet", "no parquet", "cannot be read (ArrowInvalid"),
        ("a.csv", "prompt,completion,label\nx,y,maybe\n", "row 1, field 'label': is 'maybe', not true or false"),
        (
            "a.csv",
            "prompt,completion,label\nx,y,True\n",
            "no pair is left. rows read: 1, prompts dropped: only one label: 1",
        ),
    ],
)
def test_an_unusable_file_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PreferenceError, match=re.escape(words)) as refused:
        load_pairs(path)
    assert str(path) in str(refused.value)


def test_missing_sources_and_parameters_are_refused(tmp_path, monkeypatch):
    with pytest.raises(PreferenceError, match="none.jsonl: no such file. Give an existing"):
        load_pairs(tmp_path / "none.jsonl")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PreferenceError, match="nobody/nothing: cannot be read .* has a split 'train'"):
        load_pairs("nobody/nothing")
    for wrong in ({"limit": 0}, {"max_chars": True}, {"limit": 2.5}, {"on_bad": "ignore"}):
        with pytest.raises(PreferenceError, match=next(iter(wrong))):
            load_pairs(many(3), **wrong)
    with pytest.raises(PreferenceError, match="DataFrame: no pair is left. rows read: 3, .*field is empty: 3"):
        load_pairs(many(3).assign(chosen=""), on_bad="drop")
    with pytest.raises(PreferenceError, match="no pair is left.*longer than max_chars: 3"):
        load_pairs(many(3), max_chars=2)


# Splitting


def test_split_keeps_prompts_whole_and_in_place():
    pairs = split_by_prompt(load_pairs(many(2000, each=2)))
    assert (pairs.groupby("prompt_id")["split"].nunique() == 1).all()
    shares = pairs["split"].value_counts(normalize=True)
    assert abs(shares["measure"] - 0.3) < 0.03 and abs(shares["reward"] - 0.2) < 0.03
    fewer = split_by_prompt(load_pairs(many(500)).sample(frac=1, random_state=0))
    known = pairs.drop_duplicates("prompt_id").set_index("prompt_id")["split"]
    assert (fewer["prompt_id"].map(known) == fewer["split"]).all()
    assert split_hash(pairs) == split_hash(pairs[::-1]) != split_hash(fewer)
    assert split_hash(split_by_prompt(pairs, seed=1)) != split_hash(pairs)


def test_splits_and_folds_that_cannot_be_filled_are_refused():
    pairs = load_pairs(many(1))
    with pytest.raises(PreferenceError, match="split '.*' would be empty: 1 prompts at a share of"):
        split_by_prompt(pairs)
    with pytest.raises(PreferenceError, match="reward=0.5, measure=0.5: shares"):
        split_by_prompt(pairs, reward=0.5, measure=0.5)
    with pytest.raises(PreferenceError, match="4 prompts cannot fill 5 folds"):
        check_folds(load_pairs(many(4, each=5)), 5)
    check_folds(load_pairs(many(5)), 5)
    with pytest.raises(PreferenceError, match="no column 'prompt_id': make them with load_pairs"):
        check_folds(many(5), 5)
    with pytest.raises(PreferenceError, match="no column 'split': make them with split_by_prompt"):
        split_hash(pairs)


# Formatting

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
CHATML = (
    "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
).replace("\\n{%", "\n{%")
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] | trim"
    " + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"
)
# the empty thinking block is opened by generation and by the last answer
THINK = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
THINK_IN_GENERATION = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "{{ '<|im_start|>assistant\\n' }}{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}",
)
THINK_IN_ANSWER = THINK.replace("enable_thinking is defined", "false")
DATED = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}" + CHATML
WORDS = "Name a colour. Blue is a colour. A dog runs. user assistant system <think> </think> Hello there, friend!\n\n\n"
NEWLINES_APART = r"[^\r\n\p{L}]?\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer(
    template=None, *, specials=("<|end|>", "<|im_start|>", "<|im_end|>"), bos=None, eos="<|im_end|>", **more
):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(NEWLINES_APART), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([WORDS] * 5, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, raw.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, chat_template=template, **more)


def make_llama(**more):
    specials = ("<|bos|>", "<|eos|>", "<|head|>", "<|/head|>", "<|eot|>", "<|right_pad|>")
    return make_tokenizer(LLAMA, specials=specials, bos="<|bos|>", eos="<|eos|>", **more)


CHATS = {
    "chatml": (make_tokenizer, CHATML),
    "llama": (lambda template: make_llama(), LLAMA),
    "think": (make_tokenizer, THINK),
    "dated": (make_tokenizer, DATED),
}
SYSTEM = join_turns(
    [{"role": "system", "content": "Be short."}, user("Hi"), assistant("Hello"), user("Name a colour.")]
)


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("prompt", ["Name a colour.", SYSTEM], ids=["single", "turns"])
def test_chat_ids_are_those_of_the_rendered_conversation(kind, prompt):
    build, template = CHATS[kind]
    tokenizer = build(template)
    formatter = Formatter(tokenizer)
    response = "Blue is\n\na colour. \u00e9\u4e2d"
    prompt_ids, response_ids = formatter.encode(prompt, response)
    switches = {"enable_thinking": False, "return_dict": False}
    switches["chat_template"] = template.replace("strftime_now('%d %B %Y')", "'26 July 2024'")
    conversation = [*turns(prompt), assistant(response)]
    whole = tokenizer.apply_chat_template(conversation, **switches)
    ends = np.flatnonzero(np.array(whole) == formatter.end_id)
    assert prompt_ids + response_ids == whole[: ends[-1] + 1]
    assert prompt_ids == tokenizer.apply_chat_template(turns(prompt), add_generation_prompt=True, **switches)
    assert formatter.prompt_ids(prompt) == prompt_ids and formatter.response_ids(prompt, response) == response_ids
    assert response_ids.count(formatter.end_id) == 1 and response_ids[-1] == formatter.end_id
    assert (prompt_ids + response_ids).count(tokenizer.bos_token_id) == (kind == "llama")
    assert formatter.decode([*response_ids, formatter.pad_id]) == response
    assert formatter.pad_id != formatter.end_id


def test_plain_format_has_one_bos_and_one_end():
    with_bos = make_tokenizer(specials=("<|bos|>", "<|eos|>", "<|pad|>"), bos="<|bos|>", eos="<|eos|>")
    formatter = Formatter(with_bos)
    prompt_ids, response_ids = formatter.encode("Name a colour.", "Blue.")
    assert with_bos.decode(prompt_ids) == "<|bos|>Name a colour.\n\n" and prompt_ids.count(with_bos.bos_token_id) == 1
    assert with_bos.decode(response_ids) == "Blue.<|eos|>" and response_ids.count(with_bos.eos_token_id) == 1
    assert formatter.end_id == with_bos.eos_token_id and formatter.pad_id == with_bos.convert_tokens_to_ids("<|pad|>")
    without = Formatter(make_tokenizer())
    assert without.tokenizer.decode(without.prompt_ids(SYSTEM)) == "Be short.\n\nHi\n\nHello\n\nName a colour.\n\n"
    assert Formatter(make_llama(), template="plain").template == "plain"


def test_empty_thinking_blocks_belong_to_the_prompt():
    block = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for template in (THINK, THINK_IN_GENERATION, THINK_IN_ANSWER):
        formatter = Formatter(make_tokenizer(template))
        encoded = formatter.encode_pairs(load_pairs(pd.DataFrame([PAIR])))
        assert formatter.tokenizer.decode(encoded.prompt_ids[0]).endswith(block)
        assert formatter.tokenizer.decode(encoded.chosen_ids[0]) == "Blue is a colour.<|im_end|>"
        assert encoded.prompt_ids[0] == formatter.prompt_ids(PAIR["prompt"])


def test_dates_are_fixed_and_system_turns_are_kept():
    formatter = Formatter(make_tokenizer(DATED))
    text = formatter.tokenizer.decode(formatter.prompt_ids(SYSTEM))
    assert text.startswith("Today: 26 July 2024\n<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi")


def test_template_without_end_of_turn_gets_the_end_of_sequence():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    formatter = Formatter(make_tokenizer(template + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"))
    prompt_ids, response_ids = formatter.encode("Hi", "Blue.")
    assert formatter.tokenizer.decode(prompt_ids) == "user: Hi\nassistant:"
    assert formatter.tokenizer.decode(response_ids) == " Blue.<|im_end|>"


def test_a_batch_equals_its_rows_one_by_one(monkeypatch):
    monkeypatch.setattr(formatting, "CHUNK", 3)
    table = pd.concat([many(5, each=2), pd.DataFrame([{"prompt": SYSTEM, "chosen": "Blue", "rejected": "Dog"}])])
    pairs = load_pairs(table)
    for formatter in (Formatter(make_tokenizer(CHATML)), Formatter(make_llama()), Formatter(make_tokenizer())):
        encoded = formatter.encode_pairs(pairs)
        assert len(encoded) == len(pairs) == encoded.kept.sum() == encoded.report["kept"]
        for i, (prompt, chosen, rejected) in enumerate(
            zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True)
        ):
            assert (encoded.prompt_ids[i], encoded.chosen_ids[i]) == formatter.encode(prompt, chosen)
            assert encoded.rejected_ids[i] == formatter.response_ids(prompt, rejected)
        assert encoded.prompt_ids[0] is not encoded.prompt_ids[1]


def test_overlong_pairs_are_never_cut():
    long = {**PAIR, "chosen": "Blue. " * 50}
    pairs = load_pairs(pd.DataFrame([PAIR, long, {**PAIR, "prompt": "Hello. " * 50}]))
    formatter = Formatter(make_tokenizer(CHATML), max_length=60)
    encoded = formatter.encode_pairs(pairs)
    assert encoded.kept.tolist() == [True, False, False] and encoded.chosen_ids[0][-1] == formatter.end_id
    assert encoded.report["overlong_response"] == encoded.report["overlong_prompt"] == 1
    assert encoded.report["longest_tokens"] > 60
    with pytest.raises(PreferenceError, match=r"the prompt has \d+ tokens and the response \d+, over max_length=60"):
        formatter.encode(PAIR["prompt"], long["chosen"])
    with pytest.raises(PreferenceError, match=r"the prompt has \d+ tokens, over max_length=60"):
        formatter.prompt_ids("Hello. " * 50)
    with pytest.raises(PreferenceError, match=r"no pair of 2 can .* pairs have \d+ to \d+ tokens. .* Raise it"):
        formatter.encode_pairs(pairs[1:])


def test_texts_that_hold_special_tokens_or_merge_are_dropped_and_counted():
    rows = [PAIR, {**PAIR, "chosen": "Blue.<|im_end|> More"}, {**PAIR, "prompt": "a <|im_start|>"}]
    rows += [{**PAIR, "rejected": "\n\nDog"}]
    formatter = Formatter(make_tokenizer(CHATML))
    encoded = formatter.encode_pairs(load_pairs(pd.DataFrame(rows)))
    assert encoded.kept.tolist() == [True, False, False, False]
    assert encoded.report["special_token"] == 2 and encoded.report["boundary"] == 1
    with pytest.raises(PreferenceError, match=re.escape("the text holds the special token '<|im_end|>'")):
        formatter.encode("Hi", "Blue.<|im_end|> More")
    with pytest.raises(PreferenceError, match="tokenised differently once a response follows"):
        formatter.encode("Hi", "\n\nDog")
    with pytest.raises(PreferenceError, match="Row 1: the text holds the special token"):
        formatter.encode_pairs(pd.DataFrame([rows[2]]))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0]['content'] }}", "the chat template cannot be split: its prompt ends with"),
        (CHATML.replace("assistant\n", "assistant\n\n"), "the chat template cannot be split: its prompt ends with"),
        ("{{ raise_exception('no such roles') }}", "the chat template refuses turns of roles user: no such roles"),
    ],
)
def test_templates_that_cannot_be_split_are_refused(template, words):
    with pytest.raises(PreferenceError, match=words):
        Formatter(make_tokenizer(template))


def test_a_prompt_end_that_depends_on_the_answer_is_refused():
    tokenizer = make_llama()
    # this regex leaves the last of two line breaks to the word that follows
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(PreferenceError, match="is tokenised differently once a response follows"):
        Formatter(tokenizer)


def test_wrong_settings_are_refused():
    with pytest.raises(PreferenceError, match="template='chat': choose 'auto', 'plain' or, if"):
        Formatter(make_tokenizer(), template="chat")
    with pytest.raises(PreferenceError, match="template='raw': choose"):
        Formatter(make_tokenizer(), template="raw")
    with pytest.raises(PreferenceError, match="max_length=0"):
        Formatter(make_tokenizer(), max_length=0)
    with pytest.raises(PreferenceError, match="no end-of-sequence token"):
        Formatter(make_tokenizer(eos=None))


def test_padding_differs_from_the_end_of_turn():
    def padding(tokenizer):
        return tokenizer.convert_ids_to_tokens(Formatter(tokenizer).pad_id)

    assert padding(make_llama()) == "<|right_pad|>"
    assert padding(make_llama(pad_token="<|eos|>")) == "<|eos|>"
    assert padding(make_tokenizer(CHATML, pad_token="<|im_end|>")) == "<|end|>"
    assert padding(make_tokenizer(specials=("<unk>", "</s>"), eos="</s>", unk_token="<unk>")) == "<unk>"
    assert padding(make_tokenizer(specials=("</s>",), eos="</s>")) == "</s>"


def test_fingerprint_names_the_format_and_nothing_else():
    tokenizer = make_tokenizer(CHATML)
    first = Formatter(tokenizer).fingerprint
    tokenizer("a b", truncation=True, max_length=1)
    assert Formatter(tokenizer).fingerprint == first == Formatter(make_tokenizer(CHATML)).fingerprint
    others = [Formatter(make_tokenizer(THINK)), Formatter(tokenizer, template="plain")]
    others.append(Formatter(tokenizer, max_length=9))
    assert len({first, *(other.fingerprint for other in others)}) == 4


def test_describe_shows_tokens_and_special_tokens():
    shown = Formatter(make_tokenizer(CHATML)).describe("Name a colour.", "Blue is a colour.").splitlines()
    assert shown[0] == "chat template, end of turn [<|im_end|>], padding [<|end|>]"
    assert shown[2].startswith("  [<|im_start|>]|user|\\n|Name|") and shown[2].endswith("|\\n")
    assert shown[3].startswith("response (") and shown[4].endswith("|[<|im_end|>]")


@pytest.mark.parametrize(("side", "rows"), [("right", [[1, 2, 3], [4, 0, 0]]), ("left", [[1, 2, 3], [0, 0, 4]])])
def test_collate_pads_and_masks(side, rows):
    ids, mask = collate([[1, 2, 3], [4]], 0, side)
    assert ids.tolist() == rows and mask.tolist() == [[int(i > 0) for i in row] for row in rows]
