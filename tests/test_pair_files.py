"""Preference files as people have them: each layout gives the pairs that it means, or says what to do."""

import bz2
import gzip
import json
import re

import datasets
import pandas as pd
import pytest
from huggingface_hub import constants

from alignlens.core.errors import PreferenceError
from alignlens.preferences import NOTED, describe_report, is_local, join_turns, load_pairs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def read(rows, **options):
    """(prompt, chosen, rejected) of each pair of a table or file, and the report."""
    pairs = load_pairs(rows, **options)
    return list(zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True)), pairs.attrs["report"]


ASKED = [user("Q")]
ONE = ("Q", "a", "b")
TALK = [system("S"), user("Q1"), assistant("A1"), user("Q")]
LONG = (join_turns(TALK), "a", "b")


def both(head, **more):
    return {"chosen": [*head, assistant("a")], "rejected": [*head, assistant("b")], **more}


# rows -> pairs
LAYOUTS = {
    "messages as JSON text": ([{name: json.dumps(talk) for name, talk in both(TALK).items()}], [LONG]),
    "messages as Python text": ([{name: repr(talk) for name, talk in both(TALK).items()}], [LONG]),
    "messages as numpy prints them": (
        [
            dict(
                chosen="[{'content': 'Q', 'role': 'user'}\n {'content': \"it's } {\\na\", 'role': 'assistant'}]",
                rejected="[{'content': 'Q', 'role': 'user'} {'content': 'b', 'role': 'assistant'}]",
            )
        ],
        [("Q", "it's } {\na", "b")],
    ),
    "one message as JSON text": (
        [{"prompt": "Q", "chosen": json.dumps(assistant("a")), "rejected": json.dumps(assistant("b"))}],
        [ONE],
    ),
    "rows of messages and of text, mixed": (
        [
            {name: json.dumps(talk) for name, talk in both(ASKED, prompt=ASKED).items()},
            {"prompt": "[1] Why?", "chosen": "[see 1]", "rejected": '["b"]'},
            {
                "prompt": '[{"role": 1}, x',
                "chosen": '{"role": "none"}',
                "rejected": '[{"role": "user", "content": "c"}] is a list.',
            },
        ],
        [
            ONE,
            ("[1] Why?", "[see 1]", '["b"]'),
            ('[{"role": 1}, x', '{"role": "none"}', '[{"role": "user", "content": "c"}] is a list.'),
        ],
    ),
    "input beside instruction": (
        [{"instruction": "Add.", "input": text, "chosen": "a", "rejected": "b"} for text in ("1, 2", "", "3, 4")],
        [("Add.\n\n1, 2", "a", "b"), ("Add.", "a", "b"), ("Add.\n\n3, 4", "a", "b")],
    ),
    "input that the prompt holds already": (
        [{"prompt": "Add: 1, 2", "input": "1, 2", "chosen": "a", "rejected": "b"}],
        [("Add: 1, 2", "a", "b")],
    ),
    "system column": (
        [{"system": "S", "question": "Q", "chosen": "a", "rejected": "b"}],
        [(join_turns([system("S"), user("Q")]), "a", "b")],
    ),
    "history column": (
        [{"instruction": "Q", "system": "S", "history": [["Q1", "A1"]], "chosen": "a", "rejected": "b"}],
        [LONG],
    ),
    "dialogues as text": (
        [
            {
                "chosen": f"\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q\n\nAssistant: {a}",
                "rejected": f"\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q\n\nAssistant: {b}",
            }
            for a, b in (("a", "b"), ("Human: he said.", "1.\n\n2."))
        ],
        [(join_turns(TALK[1:]), "a", "b"), (join_turns(TALK[1:]), "Human: he said.", "1.\n\n2.")],
    ),
    "dialogues on lines": ([{"chosen": "USER: Q\nASSISTANT: a", "rejected": "USER: Q\nASSISTANT: b"}], [ONE]),
    "dialogues on one line": ([{"chosen": "Human: Q Assistant: a", "rejected": "Human: Q Assistant: b"}], [ONE]),
    "dialogues beside their prompt": (
        [{"prompt": "Q", "chosen": "Human: Q\n\nAssistant: a", "rejected": "Human: Q\n\nAssistant: b"}],
        [ONE],
    ),
    "prompt as a dialogue": (
        [{"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " a", "rejected": " b"}],
        [("Q", " a", " b")],
    ),
    "prompt repeated by both answers": (
        [
            {"prompt": "Name a colour.", "chosen": "Name a colour.\n\nBlue", "rejected": "Name a colour. Dog"},
            {"prompt": "Q:", "chosen": "Q: a", "rejected": "Q:b"},
        ],
        [("Name a colour.", "Blue", "Dog"), ("Q:", "a", "b")],
    ),
    "prompt quoted by few answers": (
        [
            {"prompt": "Say hi.", "chosen": "Say hi. Done.", "rejected": "Say hi. No."},
            {"prompt": "Q", "chosen": "a", "rejected": "b"},
        ],
        [("Say hi.", "Say hi. Done.", "Say hi. No."), ONE],
    ),
    "prompt quoted by one answer": (
        [{"prompt": "Say hi.", "chosen": "Say hi. Done.", "rejected": "No."}],
        [("Say hi.", "Say hi. Done.", "No.")],
    ),
    "system message in the prompt only": ([both(ASKED, prompt=TALK)], [LONG]),
    "prompt is the first turn": ([both(TALK[1:], prompt="Q1")], [(join_turns(TALK[1:]), "a", "b")]),
    "answers that go on after the prompt": (
        [{"prompt": ASKED, "chosen": [assistant("a"), user("And?"), assistant("c")], "rejected": [assistant("b")]}],
        [ONE],
    ),
    "blank prompt beside conversations": ([both(ASKED, prompt="")], [ONE]),
    "conversation in one answer": ([{"chosen": [*ASKED, assistant("a")], "rejected": "b"}], [ONE]),
    "content in parts": (
        [
            {
                "prompt": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What"},
                            {"type": "text", "text": " "},
                            {"type": "text", "text": "now?"},
                        ],
                    }
                ],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
                "rejected": [{"type": "text", "text": "b"}],
            }
        ],
        [("What now?", "a", "b")],
    ),
    "empty system turn": (
        [both([system(""), *ASKED]), both([system(None), user("Q2")], prompt="Q2")],
        [ONE, ("Q2", "a", "b")],
    ),
    "roles in other spellings": (
        [
            {
                "chosen": [{"role": "User", "content": "Q"}, {"role": "assistant ", "content": "a"}],
                "rejected": [{"role": "Human", "content": "Q"}, {"role": "bot", "content": "b"}],
            }
        ],
        [ONE],
    ),
    "ShareGPT": (
        [
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            }
        ],
        [ONE],
    ),
    "conversations that part early": (
        [
            {
                "chosen": [*ASKED, assistant("a"), user("More"), assistant("c")],
                "rejected": [*ASKED, assistant("b"), user("Why?")],
            }
        ],
        [ONE],
    ),
    "output_1 and output_2": (
        [
            {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 1},
            {"instruction": "Q2", "output_1": "b", "output_2": "a", "preference": 2},
            {"instruction": "Q3", "output_1": "b", "output_2": "a", "preference": 1.9},
        ],
        [ONE, ("Q2", "a", "b"), ("Q3", "a", "b")],
    ),
    "response_j and response_k": ([{"question": "Q", "response_j": "a", "response_k": "b"}], [ONE]),
    "response_a and response_b": (
        [
            {"prompt": "Q", "response_a": "b", "response_b": "a", "winner": "model_b"},
            {"prompt": "Q2", "response_a": "a", "response_b": "b", "winner": "A"},
        ],
        [ONE, ("Q2", "a", "b")],
    ),
    "conversation_a and conversation_b": (
        [{"conversation_a": [*ASKED, assistant("b")], "conversation_b": [*ASKED, assistant("a")], "winner": "model_b"}],
        [ONE],
    ),
    "response_0 and response_1": (
        [{"prompt": "Q", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0}],
        [ONE],
    ),
    "strength of a preference": (
        [
            {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": -2},
            {"prompt": "Q2", "response_1": "b", "response_2": "a", "preference_strength": 3},
        ],
        [ONE, ("Q2", "a", "b")],
    ),
    "answers and their scores": ([{"prompt": "Q", "responses": ["c", "a", "b"], "scores": [2, 3.5, 1]}], [ONE]),
    "messages and rejected_response": ([{"messages": [*TALK, assistant("a")], "rejected_response": "b"}], [LONG]),
    "OpenAI's": (
        [
            {
                "input": {"messages": ASKED},
                "preferred_output": [assistant("a")],
                "non_preferred_output": [assistant("b")],
            }
        ],
        [ONE],
    ),
    "kto_tag": ([{"messages": [*ASKED, assistant(text)], "kto_tag": text == "a"} for text in "ab"], [ONE]),
    "capitals": ([{"Prompt": "Q", "Chosen": "a", "Rejected": "b"}], [ONE]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_each_layout_gives_the_pairs_that_it_means(case, tmp_path):
    rows, pairs = LAYOUTS[case]
    assert read(rows)[0] == pairs
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path)[0] == pairs
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)  # lists as Python prints them
    assert read(tmp_path / "pairs.csv")[0] == pairs


def test_what_was_done_to_read_a_file_is_reported():
    counts = {
        "input beside instruction": {"input_joined": 2, "columns_read": "prompt from instruction"},
        "system column": {"system_joined": 1, "columns_read": "prompt from question"},
        "history column": {"system_joined": 1, "history_joined": 1, "columns_read": "prompt from instruction"},
        "dialogues as text": {"dialogue_text": 2},
        "prompt as a dialogue": {"dialogue_text": 1},
        "prompt repeated by both answers": {"prompt_taken_off": 2},
        "conversation in one answer": {"one_sided": 1},
        "conversations that part early": {"later_turns": 1},
        "answers and their scores": {"columns_read": "chosen and rejected from responses, scores"},
        "capitals": {"columns_read": "prompt from Prompt; chosen from Chosen; rejected from Rejected"},
        "prompt quoted by few answers": {},
    }
    for case, noted in counts.items():
        pairs = load_pairs(LAYOUTS[case][0])
        assert {name: value for name, value in pairs.attrs["report"].items() if name in NOTED} == noted, case
    assert "columns read: prompt from instruction" in describe_report(
        load_pairs(LAYOUTS["input beside instruction"][0])
    )


UNREADABLE = {
    "system message in one answer": (
        {"chosen": [system("S"), *ASKED, assistant("a")], "rejected": [*ASKED, assistant("b")]},
        "field 'chosen': holds a system message or earlier turns that the other answer lacks",
    ),
    "history in one answer": (
        {"prompt": "Q", "chosen": "a", "rejected": [*TALK, assistant("b")]},
        "field 'rejected': holds a system message or earlier turns that the other answer lacks",
    ),
    "system messages that differ": (
        {name: [system(name), *ASKED, assistant(name)] for name in ("chosen", "rejected")},
        "field 'rejected': parts from chosen at message 1, where not both hold an answer",
    ),
    "conversations that part at the user": (
        {
            "chosen": [*ASKED, assistant("a"), user("1"), assistant("b")],
            "rejected": [*ASKED, assistant("a"), user("2"), assistant("c")],
        },
        "field 'rejected': parts from chosen at message 3",
    ),
    "beginning of the other": (
        {"chosen": [*ASKED, assistant("a"), user("Q2"), assistant("b")], "rejected": [*ASKED, assistant("a")]},
        "field 'rejected': one conversation is the beginning of the other: end both with",
    ),
    "image": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
            "chosen": "a",
            "rejected": "b",
        },
        "field 'prompt': message 1 holds a part of type 'image', and only text can be read",
    ),
    "tool call": (
        {"prompt": "Q", "chosen": [{"role": "assistant", "content": "a", "tool_calls": [{}]}], "rejected": "b"},
        "field 'chosen': message 1 calls a tool",
    ),
    "cut cell": (
        {"prompt": "Q", "chosen": '[{"role": "assistant", "content": "a', "rejected": "b"},
        "field 'chosen': begins like a message list, but is neither whole JSON nor as Python prints it",
    ),
    "no answer": (
        {"chosen": "\n\nHuman: Q\n\nAssistant:", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
        "field 'chosen': is empty",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "field 'prompt': is missing"),
    "invalid": (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "is_valid": False},
        "field 'is_valid': is False: the file itself",
    ),
    "tied": (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "preference": "tie (bothbad)"},
        "field 'preference': is tie (bothbad): no answer is preferred",
    ),
    "no strength": (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "preference_strength": 0},
        "field 'preference_strength': is 0: no",
    ),
    "history as prose": (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "history": "once"},
        "field 'history': is not a list of messages or of pairs",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_row_that_cannot_be_read_is_named_or_dropped(case):
    row, words = UNREADABLE[case]
    good = both(ASKED, prompt="Q") if "chosen" in row else LAYOUTS["output_1 and output_2"][0][0]
    with pytest.raises(PreferenceError, match=re.escape(f"list: 1 of 2 rows cannot be used. row 2, {words}")):
        load_pairs([good, row])
    pairs, report = read([good, row], on_bad="drop")
    assert pairs == [ONE] and sum(n for kind, n in report.items() if kind.startswith("bad_")) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"prompt": "Q", "response_a": "a", "response_b": "b"}],
            "Or say in a column 'winner' which of response_a and response_b is better",
        ),
        (
            [{"prompt": "Q", "response_a": "a", "response_b": "b", "winner": 0}],
            "column 'winner' holds 0, which does not say whether",
        ),
        (
            [{"prompt": "Q", "response_0": "a", "response_1": "b", "winner": n} for n in (1, 2)],
            "column 'winner' holds 1, 2, which",
        ),
        (
            [{"prompt": "Q", "output_1": "a", "output_2": "b", "preference": n} for n in (0, 1)],
            "column 'preference' holds 0, 1, which",
        ),
        (
            [{"instruction": "Q", "completions": [{"response": "a", "score": 1}]}],
            "put the best into chosen and the worst into rejected",
        ),
        ([{"prompt": "Q", "response": "a", "helpfulness": 3}], "put the best into chosen and the worst into rejected"),
        (
            [{"prompt": "Q", "responses": ["a", "b"], "scores": [1]}],
            "row 1, field 'scores': is not a list of as many numbers",
        ),
        ([{"prompt": "Q", "responses": ["a", "b"], "scores": [1, 1]}], "row 1, field 'scores': are all equal"),
        (
            [{"prompt": "Q", "output_1": "a", "output_2": "b", "preference": "c"}],
            "is 'c', which names neither output_1 nor output_2",
        ),
        (
            [{"prompt": "Q", "output_1": "a", "output_2": "b", "preference": n} for n in (1.5, 2)],
            "row 1, field 'preference': is 1.5: no",
        ),
    ],
)
def test_what_is_unclear_is_refused_with_advice(rows, words):
    with pytest.raises(PreferenceError, match=re.escape(words)):
        load_pairs(rows)


@pytest.mark.parametrize(
    ("names", "values", "against", "equal"),
    [
        (("score_chosen", "score_rejected"), [(2, 1), (1, 2), (1, 1)], 1, 1),
        (("chosen-rating", "rejected-rating"), [(5, 1), (None, 2), (3, 3)], 0, 1),
        (("chosen_reward", "reject_reward"), [("1.5", "2"), (0, 1), (True, 2)], 2, 0),
        (("margin", "agreement"), [(1, 0.5), (-0.5, 1), (0, 1)], 1, 1),
        (("confidence", "votes"), [(0.9, 3), (0.5, 2), (0.6, 2)], None, None),
    ],
)
def test_what_a_file_says_of_its_labels_is_reported(names, values, against, equal):
    rows = [
        {"prompt": f"Q{i}", "chosen": "a", "rejected": "b", **dict(zip(names, pair, strict=True))}
        for i, pair in enumerate(values)
    ]
    pairs = load_pairs(rows)
    report = pairs.attrs["report"]
    assert report["label_columns"] == ", ".join(names) and report["pairs"] == 3
    assert (report.get("scores_contradict"), report.get("scores_equal")) == (against or 0, equal or 0)
    if against:
        assert f"{against}  pairs kept whose own scores say otherwise" in describe_report(pairs)


def test_completions_keep_columns_of_any_name():
    rows = [{"prompt": "Q", "completion": c, "label": c == "a", "rank": c, "order": 1, "position": c} for c in "ab"]
    [pair] = load_pairs(rows).to_dict("records")
    assert (pair["chosen"], pair["rank_chosen"], pair["position_rejected"]) == ("a", "a", "b")


# Sources

TABLE = pd.DataFrame(
    [{"prompt": f"Question {i}?", "chosen": f"NA {i}", "rejected": f"Bad {i}", "n": i} for i in range(4)]
)


def in_lines(path):
    TABLE.to_json(path, orient="records", lines=True)


def packed(path, pack, suffix=".jsonl"):
    plain = path.with_name("plain" + suffix)
    in_lines(plain) if suffix == ".jsonl" else TABLE.to_csv(plain, index=False, sep="\t" if suffix == ".tsv" else ",")
    path.write_bytes(pack(plain.read_bytes()))
    plain.unlink()


def folder(path, files):
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        in_lines(path / name)


FILES = {
    "a.JSONL": in_lines,
    "a.Json": lambda path: TABLE.to_json(path, orient="records"),
    "one.json": lambda path: path.write_text(json.dumps({"data": TABLE.to_dict("records")}, indent=1)),
    "list.jsonl": lambda path: path.write_text(json.dumps(TABLE.to_dict("records"), indent=1)),
    "a.jsonl.gz": lambda path: packed(path, gzip.compress),
    "a.json.GZ": lambda path: packed(path, gzip.compress),
    "a.jsonl.bz2": lambda path: packed(path, bz2.compress),
    "a.csv.gz": lambda path: packed(path, gzip.compress, ".csv"),
    "a.tsv": lambda path: packed(path, bytes, ".tsv"),
    "a.tsv.gz": lambda path: packed(path, gzip.compress, ".tsv"),
    "a.parquet": TABLE.to_parquet,
    "saved": lambda path: datasets.Dataset.from_pandas(TABLE).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(
        train=datasets.Dataset.from_pandas(TABLE), test=datasets.Dataset.from_pandas(TABLE[:1])
    ).save_to_disk(path),
    "only_split": lambda path: datasets.DatasetDict(x=datasets.Dataset.from_pandas(TABLE)).save_to_disk(path),
    "folder": lambda path: folder(path, ["data/train_prefs-0.jsonl", "data/test_prefs-0.jsonl", ".cache/train.jsonl"]),
    "held_out": lambda path: folder(path, ["test.jsonl"]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read(name, tmp_path, monkeypatch):
    FILES[name](tmp_path / name)
    pairs = load_pairs(tmp_path / name)
    assert pairs[list(TABLE)].to_dict("list") == TABLE.to_dict("list")
    assert is_local(str(tmp_path / name)) and is_local(name) == (name.rpartition(".")[0] != "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_pairs(f"~/{name}").equals(pairs) and is_local(f"~/{name}")


def test_several_files_and_globs_are_read_in_order(tmp_path):
    for name, part in (("a.jsonl", TABLE[:1]), ("b.jsonl", TABLE[1:])):
        part.to_json(tmp_path / name, orient="records", lines=True)
    assert load_pairs(str(tmp_path / "*.jsonl"))["n"].tolist() == [0, 1, 2, 3]
    assert load_pairs(tmp_path)["n"].tolist() == [0, 1, 2, 3]
    assert load_pairs([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")])["n"].tolist() == [1, 2, 3, 0]
    (tmp_path / "b.jsonl").write_text("{\n")
    with pytest.raises(PreferenceError, match="b.jsonl line 1, broken JSON"):
        load_pairs(str(tmp_path / "*.jsonl"))
    assert is_local("data/*.csv") and is_local("a/b/c") and is_local("./a") and is_local("~/a")
    assert not any(map(is_local, ("org/name", "org/name@v1.0", "name", "org/name.v2")))


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict", "list", "columns", "iterator", "JSON columns"])
def test_what_python_holds_is_read(kind, tmp_path):
    made = datasets.Dataset.from_pandas(TABLE)
    source = {
        "Dataset": made,
        "DatasetDict": datasets.DatasetDict(train=made, test=made),
        "list": TABLE.to_dict("records"),
        "columns": TABLE.to_dict("list"),
        "iterator": iter(TABLE.to_dict("records")),
    }.get(kind)
    if source is not None:
        assert load_pairs(source)[list(TABLE)].to_dict("list") == TABLE.to_dict("list")
    else:  # texts and messages in one column
        rows = [{"prompt": "Q", "chosen": "a", "rejected": [assistant("b")]}, both(ASKED, prompt="Q")]
        features = datasets.Features(dict.fromkeys(("prompt", "chosen", "rejected"), datasets.Json()))
        made = datasets.Dataset.from_list(rows, features=features)
        made.to_parquet(tmp_path / "a.parquet")
        made.save_to_disk(tmp_path / "saved")
        for source in (made, tmp_path / "a.parquet", tmp_path / "saved"):
            assert read(source)[1]["duplicate"] == 1 and read(source)[0] == [ONE]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "x", "files that end in '.txt' cannot be read. Give a table, a .jsonl"),
        ("a.gz", "x", "files that end in '.gz' cannot be read"),
        ("a.jsonl.gz", "no gzip", "cannot be read (BadGzipFile"),
        ("a.csv", "prompt,chosen,rejected\nQ,a, or so,b\n", "cannot be read (ParserWarning"),
        ("empty/a.txt", "x", "the folder holds no file that can be read"),
        ("splits/train.txt", "x", "no split 'train'; it has test, validation. Give split="),
    ],
)
def test_files_that_cannot_be_read_say_why(name, content, words, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    if name.startswith("splits"):
        folder(path.parent, ["test.jsonl", "val.jsonl"])
    with pytest.raises(PreferenceError, match=re.escape(words)):
        load_pairs(path.parent if "/" in name else path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none/*.jsonl", "none/*.jsonl: no such file. Give an existing .jsonl"),
        ("./none", "./none: no such file"),
        (7, "int: Give a table"),
        (b"x", "bytes: Give a table"),
        ([], "no pair is left"),
        (["none.csv"], "list: no such"),
        ("none.txt", "none.txt: no such file"),
        (pd.DataFrame([[1, 2]], columns=["chosen", "chosen"]), "two columns have one name"),
    ],
)
def test_sources_that_are_none_say_what_to_give(source, words):
    with pytest.raises(PreferenceError, match=re.escape(words)):
        load_pairs(source)


def test_a_hub_out_of_reach_is_asked_once(hub_away, caplog):
    words = r"nothing: cannot be read \(ConnectionError: the hub cannot be reached, and the cache lacks its files\)"
    with pytest.raises(PreferenceError, match=words):
        load_pairs("nobody/nothing")
    assert hub_away == [constants.ENDPOINT] and not caplog.records and constants.HF_HUB_OFFLINE is False


def test_a_completion_with_both_labels_is_left_out_whatever_the_space_around_it():
    rows = [("Q", "Yes.", True), ("Q", "Yes. ", False), ("Q", "No.", False), ("Q", "Good.", True)]
    table = load_pairs(pd.DataFrame(rows, columns=["prompt", "completion", "label"]))
    assert table[["chosen", "rejected"]].to_numpy().tolist() == [["Good.", "No."]]
    assert table.attrs["report"]["both_labels"] == 2
