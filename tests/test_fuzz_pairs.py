"""Whatever is given as preferences ends, in time, in pairs that hold what they promise or in an AlignlensError.

The default run draws a few hundred sources; ``FUZZ_EXAMPLES=1000`` draws so many of each kind (six kinds)."""

import bz2
import gzip
import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignlens.core.errors import AlignlensError
from alignlens.preferences import COLUMNS, describe_report, load_pairs, prompt_id, turns

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=2),
    database=None,
    derandomize=EXAMPLES == 40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

NAMES = (
    "prompt chosen rejected completion label instruction input system history conversations messages question "
    "response_j response_k output_1 output_2 preference response_a response_b winner responses scores is_valid margin "
    "score_chosen score_rejected preference_strength prompt_id split rank order position kto_tag"
).split()
ODD = [
    "",
    " ",
    "Q",
    "a",
    "b",
    "Q a",
    "NA",
    "1",
    "tie",
    "true",
    "[",
    "[]",
    "{}",
    "[1]",
    "\x1e",
    "\x1euser\x1fQ",
    "\ud800",
    "a\x00b",
]
ODD += [
    "Human: Q\n\nAssistant: a",
    "Human: Q\n\nAssistant:",
    "Assistant: b",
    "Human:",
    '[{"role": "user", "content": "Q"}',
]
ODD += [
    "[{'role': 'user', 'content': 'Q'}\n {'role': 'assistant', 'content': 'a'}]",
    "[" * 300,
    '[{"role": ["content": ' + "[" * 9999,
]
texts = st.sampled_from(ODD) | st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
roles = st.sampled_from(["user", "assistant", "system", "User", "gpt", "human", "tool", "", "narrator", None, 1])
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", None])}, optional={"text": scalars})
contents = texts | st.lists(parts | texts, max_size=3) | scalars
messages = st.fixed_dictionaries({"role": roles, "content": contents}, optional={"tool_calls": scalars, "from": roles})
messages |= st.fixed_dictionaries({"from": roles, "value": contents})
good = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map(
    lambda said: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
)
talks = good | st.lists(messages, max_size=4)
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
as_text = talks.map(json.dumps) | talks.map(repr) | talks.map(lambda talk: str(np.array(talk, dtype=object)))
cells = texts | talks | messages | as_text | st.lists(texts | talks, max_size=3) | nested
pairs = st.fixed_dictionaries({"prompt": texts | talks, "chosen": cells, "rejected": cells})
named = st.dictionaries(st.sampled_from(NAMES), cells, max_size=8)
wild = st.lists(st.builds(lambda pair, more: pair | more, pairs, named) | named, min_size=1, max_size=6)

# Rows of one layout, most of which can be read, with a few odd ones among them and an odd column beside them.
said, asked = st.text("ab é.", min_size=1, max_size=4), st.sampled_from(["Q", "Q2", "Name a colour."])
heads = good.map(lambda talk: talk[: 1 if len(talk) < 3 else 3])


def talked(head, *answers):
    names = ("chosen", "rejected")
    return {name: [*head, {"role": "assistant", "content": a}] for name, a in zip(names, answers, strict=True)}


def dialogue(row):
    speakers = {"user": "Human", "assistant": "Assistant"}
    return {k: "".join(f"\n\n{speakers[t['role']]}: {t['content']}" for t in talk) for k, talk in row.items()}


answered = st.builds(talked, heads, said, said)
scored = st.fixed_dictionaries({"score_chosen": st.integers(0, 2), "score_rejected": st.integers(0, 2)})
layouts = [
    st.fixed_dictionaries({"prompt": asked, "chosen": said, "rejected": said | st.lists(said, max_size=3)}),
    st.fixed_dictionaries({"question": asked, "input": texts, "system": texts, "response_j": said, "response_k": said}),
    st.builds(lambda row, more: row | more, answered, scored),
    answered.map(lambda row: {name: json.dumps(talk) for name, talk in row.items()}),
    answered.map(lambda row: {name: repr(talk) for name, talk in row.items()}),
    answered.map(dialogue),
    st.builds(lambda q, a, b: {"prompt": q, "chosen": f"{q} {a}", "rejected": f"{q}\n{b}"}, asked, said, said),
    st.fixed_dictionaries({"prompt": asked, "completion": said, "label": st.booleans(), "rank": st.integers(0, 3)}),
    st.fixed_dictionaries(
        {"prompt": asked, "output_1": said, "output_2": said, "preference": st.sampled_from([1, 2, 1.5, "tie"])}
    ),
    st.fixed_dictionaries(
        {"prompt": asked, "responses": st.lists(said, max_size=3), "scores": st.lists(st.integers(0, 5), max_size=3)}
    ),
]
readable = st.sampled_from(layouts).flatmap(lambda layout: st.lists(layout, min_size=1, max_size=6))
mixed = st.builds(
    lambda rows, odd, name, cell: [row | {name: cell} if name else row for row in rows] + odd,
    readable,
    st.lists(named, max_size=2),
    st.none() | st.sampled_from(NAMES),
    cells,
)
rows = readable | mixed | wild
odd_sources = st.recursive(  # no other texts: they would be asked for on the hub
    st.none() | st.booleans() | st.floats() | st.binary(max_size=3) | st.sampled_from(["./none", "none.csv", "*.json"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
splits = st.sampled_from(["train", "test"])


def check(source, **options):
    """The source gives an error of the house, or pairs that are what the docstring says."""
    try:
        table = load_pairs(source, **options)
    except AlignlensError as error:
        assert str(error).strip()
        return
    report = table.attrs["report"]
    assert list(table.columns[:4]) == COLUMNS and report["pairs"] == len(table) > 0
    assert report["prompts"] == table["prompt_id"].nunique() and report["source"] in describe_report(table)
    assert report["rows"] >= 1 and sum(n for kind, n in report.items() if kind.startswith("bad_")) < report["rows"]
    assert not table.duplicated(["prompt_id", "chosen", "rejected"]).any()
    for prompt, chosen, rejected, name in table[COLUMNS].itertuples(index=False):
        assert chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip()
        assert name == prompt_id(prompt) and turns(prompt)[-1]["role"] == "user"
        assert all(turn["content"].strip() for turn in turns(prompt))
        for text in (prompt, chosen, rejected):
            text.encode()


def check_file(name, content, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        check(path, **options)


bad = st.sampled_from(["drop", "drop", "drop", "refuse"])


@fuzz
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".JSONL", ".txt"]),
    st.sampled_from(["", ".gz", ".bz2", ".xz"]),
    st.binary(max_size=200) | texts.map(lambda text: text.encode("utf-8", "replace")),
    bad,
)
def test_bytes(suffix, packed, content, on_bad):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(packed, bytes) if content[:1] < b"a" else bytes
    check_file("pairs" + suffix + packed, pack(content), on_bad=on_bad)


@fuzz
@given(rows, st.sampled_from([".jsonl", ".json"]), st.booleans(), bad)
def test_json(rows, suffix, whole, on_bad):
    content = json.dumps(rows) if whole else "\n".join(map(json.dumps, rows))
    check_file("pairs" + suffix, content.encode(), on_bad=on_bad)


@fuzz
@given(rows, st.sampled_from([",", "\t", ";"]), st.text(max_size=10), bad)
def test_csv(rows, separator, more, on_bad):
    try:
        content = pd.DataFrame(rows).to_csv(index=False, sep=separator) + more
    except ValueError:  # pandas and csv refuse some texts themselves
        content = more
    check_file("pairs.csv", content.encode("utf-8", "replace"), on_bad=on_bad)


@fuzz
@given(rows, bad)
def test_python_lists(rows, on_bad):
    check(rows, on_bad=on_bad)


frames = st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)
columns = st.sampled_from(
    [
        pd.Series([1, 2, None], dtype="Int64"),
        pd.Series(["a", None, "b"], dtype="string"),
        pd.Series(["x", "y", "x"], dtype="category"),
        pd.to_datetime(pd.Series(["2020-01-01", None, "2021-01-01"])),
        pd.Series([True, False, None]),
        pd.Series([1 + 2j, 0, 1]),
        pd.Series([np.array(["a", "b"]), np.array([{"role": "user", "content": "Q"}]), np.nan]),
        pd.Series([b"x", object(), {1}]),
        pd.Series(["Q", "Q2", "Q3"]),
        pd.Series([["a", "b"], ("c",), "d"]),
        pd.Series(pd.arrays.SparseArray([1, 0, 0])),
        pd.Series(["1", "0", "tie"]),
        pd.Series([1.0, np.inf, np.nan]),
        pd.Series([pd.Timedelta(1), pd.NaT, pd.Timestamp(0)]),
    ]
)


@fuzz
@given(
    st.dictionaries(st.sampled_from(NAMES) | st.integers(), columns, max_size=5),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), columns, max_size=3),
    st.sampled_from([True, False, False, False]),
    bad,
)
def test_tables(more, texts, twice, on_bad):
    plain = {"prompt": ["Q", "Q2", "Q3"], "chosen": ["a", "b", "c"], "rejected": ["b", "c", "a"]}
    table = pd.DataFrame(plain | more | texts)
    check(pd.concat([table, table], axis=1) if twice else table, on_bad=on_bad, limit=2 if twice else None)


@fuzz
@given(
    st.lists(
        st.tuples(st.sampled_from(["a.jsonl", "b/test.csv", "train.json", "state.json", "dataset_dict.json"]), rows),
        max_size=4,
    ),
    splits,
    odd_sources,
)
def test_folders_and_odd_sources(files, split, source):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files:
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        check(Path(folder), split=split, on_bad="drop")
    check(source, split=split)
