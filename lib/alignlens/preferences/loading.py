"""Pairs from files, hub data sets and tables: read, checked row by row, drawn, and what was dropped counted."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pandas as pd

from alignlens.core.errors import PreferenceError
from alignlens.preferences.prompts import prompt_id, require_count
from alignlens.preferences.rows import COMPLETIONS, PAIRS, SHAPES, BadRow, read_row

COLUMNS = ["prompt", "chosen", "rejected", "prompt_id"]


def _read_json(path):
    """A list of objects, or one object a line."""
    content = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and content.lstrip().startswith("["):
        return _places(json.loads(content))
    # split("\n"), not splitlines(): that one also breaks at \x1e and at unicode line ends inside texts
    return [(f"line {n}", _read_line(line)) for n, line in enumerate(content.split("\n"), 1) if line.strip()]


def _read_line(line):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow("broken_json", None, f"broken JSON ({error.msg} at column {error.colno})")


def _read_csv(path):
    text = dict.fromkeys((*PAIRS, "completion"), str)  # "NA" or "12" are text, not a missing value or a number
    return pd.read_csv(path, dtype=text, keep_default_na=False)


def _read_hub(name, split):
    import datasets  # noqa: PLC0415  slow to import, and needed for the hub only

    name, _, revision = name.partition("@")
    return datasets.load_dataset(name, split=split, revision=revision or None).to_pandas()


READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": pd.read_parquet}
SUFFIXES = tuple(READERS)


def _places(rows):
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _read_source(source, split):
    """Name of the source and its rows."""
    if isinstance(source, pd.DataFrame):
        return "DataFrame", _places(source.to_dict("records"))
    name, path = str(source), Path(source)
    if path.suffix in READERS and not path.is_file():
        raise PreferenceError(f"{name}: no such file. Give an existing {', '.join(SUFFIXES)} file or a hub id.")
    try:
        found = READERS[path.suffix](path) if path.suffix in READERS else _read_hub(name, split)
    except Exception as error:  # readers and the hub raise many unrelated types; the user needs one clear sentence
        advice = f"Give a table, a {', '.join(SUFFIXES)} file, or a hub id whose data set has a split {split!r}."
        raise PreferenceError(f"{name}: cannot be read ({type(error).__name__}: {error}). {advice}") from error
    return name, found if isinstance(found, list) else _places(found.to_dict("records"))


def load_pairs(source, *, limit=None, max_chars=None, split="train", on_bad="refuse"):
    """Preference pairs from a file, a hub data set or a table, checked row by row.

    source : path of a .jsonl, .json, .csv or .parquet file; a hub data set id (``org/name`` or ``org/name@revision``)
    or a local data set folder; or a DataFrame. Columns: ``prompt, chosen, rejected`` or ``prompt, completion, label``.
    Texts are strings or message lists. Prompt turns repeated in ``chosen`` and ``rejected`` are taken off, and stand in
    for a missing prompt. A list of rejected answers makes one pair each. Labelled completions (KTO) are paired within
    their prompt, desirable with undesirable in the order of a content hash, each used at most once; their extra columns
    come twice, ``*_chosen`` and ``*_rejected``.
    limit : at most this many pairs, as whole prompts in the order of ``prompt_id`` (a hash), so that a smaller limit
    gives a subset. max_chars : pairs with a longer prompt (all its turns) or answer are dropped. split : of a data set.
    on_bad : "refuse" raises on unusable rows, "drop" leaves them out and counts them.
    Returns ``prompt, chosen, rejected, prompt_id``, then the extra columns, in file order. ``attrs["report"]`` counts
    what was dropped and why (see ``describe_report``). Exact duplicates are dropped; contradictory pairs (the same two
    answers, swapped) are kept and counted. Raises PreferenceError naming source, row (line of a .jsonl) and field."""
    require_count(limit, "limit")
    require_count(max_chars, "max_chars")
    if on_bad not in ("refuse", "drop"):
        raise PreferenceError(f"on_bad={on_bad!r}: choose 'refuse' or 'drop'.")
    name, rows = _read_source(source, split)
    columns = dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row)
    fields = next((fields for fields in SHAPES if {*fields[1:]} <= columns.keys()), None if columns else PAIRS)
    if fields is None:
        missing = " and no column ".join(repr(column) for column in PAIRS[1:] if column not in columns)
        advice = "Name them prompt, chosen, rejected (or prompt, completion, label)."
        raise PreferenceError(f"{name}: no column {missing}; it has {', '.join(map(str, columns))}. {advice}")
    extra = [column for column in columns if column not in (*COLUMNS, *fields)]
    records, problems = [], []
    for place, row in rows:
        try:
            records += [found | {column: row.get(column) for column in extra} for found in read_row(row, fields)]
        except BadRow as bad:
            problems.append((place, bad))
    if problems and on_bad == "refuse":
        shown = "; ".join(f"{place}, {bad}" for place, bad in problems[:5])
        advice = "Mend them, or pass on_bad='drop' to leave them out and count them."
        raise PreferenceError(f"{name}: {len(problems)} of {len(rows)} rows cannot be used. {shown}. {advice}")
    report = {"source": name, "rows": len(rows)}
    report |= {f"bad_{kind}": count for kind, count in sorted(Counter(bad.kind for _, bad in problems).items())}
    pairs = pd.DataFrame(records, columns=[*fields, *extra])
    pairs["prompt_id"] = pairs["prompt"].map({text: prompt_id(text) for text in pairs["prompt"].unique()})
    if fields == COMPLETIONS:
        pairs = _pair_completions(pairs, report)
    pairs = _select(pairs, limit, max_chars, report)
    if pairs.empty:
        raise PreferenceError(f"{name}: no pair is left. {', '.join(f'{words}: {n}' for words, n in _counts(report))}")
    pairs = pairs[[*COLUMNS, *(column for column in pairs if column not in COLUMNS)]].reset_index(drop=True)
    pairs.attrs["report"] = report
    return pairs


def _drop(rows, bad, name, report):
    """Rows without the bad ones, which are counted under a name."""
    report[name] = int(bad.sum())
    return rows[~bad]


def _pair_completions(rows, report):
    """Pairs from labelled completions, within a prompt, each completion used once, in the order of a content hash."""
    rows = _drop(rows, rows.duplicated(["prompt_id", "completion", "label"]), "repeated_completion", report)
    rows = _drop(rows, rows.duplicated(["prompt_id", "completion"], keep=False), "both_labels", report)
    rows = rows.rename_axis("position").reset_index()
    rows["order"] = [hashlib.blake2b(text.encode()).hexdigest() for text in rows["completion"]]
    rows = rows.sort_values(["order", "position"])
    rows["rank"] = rows.groupby(["prompt_id", "label"]).cumcount()
    good, bad = (rows[rows["label"] == label].drop(columns=["label", "order"]) for label in (True, False))
    pairs = good.merge(bad, on=["prompt_id", "rank"], suffixes=("_chosen", "_rejected")).sort_values("position_chosen")
    report["prompts_with_one_label"] = int(rows["prompt_id"].nunique() - pairs["prompt_id"].nunique())
    report["unpaired_completion"] = len(rows) - 2 * len(pairs)
    names = {"prompt_chosen": "prompt", "completion_chosen": "chosen", "completion_rejected": "rejected"}
    return pairs.rename(columns=names).drop(columns=["rank", "prompt_rejected", "position_chosen", "position_rejected"])


def _select(pairs, limit, max_chars, report):
    pairs = _drop(pairs, pairs.duplicated(["prompt_id", "chosen", "rejected"]), "duplicate", report)
    if max_chars is not None:
        longest = pairs[["prompt", "chosen", "rejected"]].map(len).max(axis=1)
        pairs = _drop(pairs, longest > max_chars, "too_long", report)
    if limit is not None:
        sizes = pairs["prompt_id"].value_counts().sort_index()
        pairs = _drop(pairs, ~pairs["prompt_id"].isin(sizes.index[sizes.cumsum() <= limit]), "over_limit", report)
    keys = set(zip(pairs["prompt_id"], pairs["chosen"], pairs["rejected"], strict=True))
    report["contradictory"] = sum((same, rejected, chosen) in keys for same, chosen, rejected in keys) // 2
    report["pairs"], report["prompts"] = len(pairs), int(pairs["prompt_id"].nunique())
    return pairs


REPORT_WORDS = {
    "rows": "rows read", "bad_missing": "rows dropped: a field is missing",
    "bad_empty": "rows dropped: a field is empty", "bad_not_text": "rows dropped: a field is not text",
    "bad_turns": "rows dropped: message list not usable", "bad_equal": "rows dropped: chosen equals rejected",
    "bad_label": "rows dropped: label is not true or false", "bad_broken_json": "rows dropped: broken JSON",
    "repeated_completion": "repeated completions dropped", "both_labels": "completions dropped: labelled both ways",
    "prompts_with_one_label": "prompts dropped: only one label",
    "unpaired_completion": "completions left without a partner", "duplicate": "duplicate pairs dropped",
    "too_long": "pairs dropped: longer than max_chars", "over_limit": "pairs not drawn: over the limit",
    "contradictory": "contradictory pairs kept (same answers, swapped)", "pairs": "pairs", "prompts": "prompts",
}  # fmt: skip


def _counts(report):
    """(words, count) of all that was counted, zeros left out."""
    return [(words, report[key]) for key, words in REPORT_WORDS.items() if report.get(key)]


def describe_report(pairs):
    """The loading report of ``load_pairs`` as lines of text, one count a line, zeros left out."""
    if (report := pairs.attrs.get("report")) is None:
        raise PreferenceError("this table has no loading report: load it with load_pairs.")
    return "\n".join([report["source"], *(f"{count:>8,}  {words}" for words, count in _counts(report))])
