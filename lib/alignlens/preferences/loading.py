"""Pairs from files, hub data sets and tables: read, checked row by row, drawn, and what was dropped counted."""

import hashlib
from collections import Counter

import pandas as pd

from alignlens.core.errors import PreferenceError
from alignlens.preferences.layouts import Layout, judge_labels
from alignlens.preferences.prompts import Unusable, attempt, prompt_id, require_count
from alignlens.preferences.reading import read_source
from alignlens.preferences.rows import COMPLETIONS, Reader

COLUMNS = ["prompt", "chosen", "rejected", "prompt_id"]
PLACE, RANK = "\x1eplace", "\x1erank"  # names that no column of a file has


def load_pairs(source, *, limit=None, max_chars=None, split="train", on_bad="refuse"):
    """Preference pairs from a file, a hub data set or a table, checked row by row.

    source : a .jsonl, .json, .csv, .tsv or .parquet file (also as .gz, .bz2, .xz), a folder of them or one that
    ``datasets`` saved, a glob, a list of files or of dicts, a DataFrame, a ``Dataset``, or a hub id (``org/name`` or
    ``org/name@revision``), with columns ``prompt, chosen, rejected``, or ``prompt, completion, label``, or of another
    of the ``layouts``. Texts are strings or message lists, also as JSON or Python text. Both answers must have one
    prompt; turns that they repeat of it are taken off, or stand in for a missing one. Conversations are compared at the
    first assistant turn in which they differ, and what follows is left off. A text is a dialogue ("Human: ...
    Assistant: ..."), or begins with its prompt, only if most rows of the file do so. A list of rejected answers makes
    one pair each. Labelled completions (KTO) are paired within their prompt, desirable with undesirable in the order of
    a content hash, each used at most once; their extra columns come twice, ``*_chosen`` and ``*_rejected``.
    limit : at most this many pairs, as whole prompts in the order of ``prompt_id`` (a hash), so that a smaller limit
    gives a subset. max_chars : pairs with a longer prompt (all its turns) or answer are dropped. split : of a data set,
    or of a folder whose file names tell it; the only one if there is one.
    on_bad : "refuse" raises on unusable rows, among them those that the file marks as invalid or tied; "drop" leaves
    them out and counts them. Pairs whose own scores contradict them or are equal are kept and counted.
    Returns ``prompt, chosen, rejected, prompt_id``, then the extra columns, in file order, without exact duplicates.
    ``attrs["report"]`` counts what was dropped and why, and what was done to read the file (keys in ``NOTED``; see
    ``describe_report``). Raises PreferenceError naming source, row (line of a .jsonl) and field."""
    require_count(limit, "limit")
    require_count(max_chars, "max_chars")
    if on_bad not in ("refuse", "drop"):
        raise PreferenceError(f"on_bad={on_bad!r}: choose 'refuse' or 'drop'.")
    name, places, rows = read_source(source, split)
    layout = Layout(name, rows)
    cells = [attempt(layout.cells, row) for row in rows]
    reader = Reader(layout.fields, [cell for cell in cells if isinstance(cell, dict)])
    read = [attempt(reader.read, cell) for cell in cells]
    problems = [(place, bad) for place, bad in zip(places, read, strict=True) if isinstance(bad, Unusable)]
    if problems and on_bad == "refuse":
        shown = "; ".join(f"{place}, {bad}" for place, bad in problems[:5])
        advice = "Mend them, or pass on_bad='drop' to leave them out and count them."
        raise PreferenceError(f"{name}: {len(problems)} of {len(rows)} rows cannot be used. {shown}. {advice}")
    usable = [(row, *found) for row, found in zip(rows, read, strict=True) if not isinstance(found, Unusable)]
    records = [pair | {other: row.get(other) for other in layout.others} for row, found, _ in usable for pair in found]
    bad = Counter(f"bad_{problem.kind}" for _, problem in problems)
    done = Counter(note for *_, notes in usable for note in notes)
    report = {"source": name, "rows": len(rows), **dict(sorted(bad.items())), **dict(sorted(done.items()))}
    if words := layout.words:
        report["columns_read"] = words
    pairs = pd.DataFrame(records, columns=[*layout.fields, *layout.others])
    pairs["prompt_id"] = pairs["prompt"].map({text: prompt_id(text) for text in pairs["prompt"].unique()})
    if layout.fields == COMPLETIONS:
        pairs = _pair_completions(pairs, report)
    pairs = _select(pairs, limit, max_chars, report)
    if pairs.empty:
        raise PreferenceError(f"{name}: no pair is left. {', '.join(f'{words}: {n}' for words, n in _counts(report))}")
    judge_labels(pairs, layout.others, report)
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
    said = rows.assign(said=rows["completion"].str.strip()).groupby(["prompt_id", "said"])["label"]
    rows = _drop(rows, said.transform("nunique") > 1, "both_labels", report)
    rows = rows.assign(**{PLACE: range(len(rows))})
    order = rows["completion"].map(lambda text: hashlib.blake2b(text.encode()).hexdigest())
    rows = rows.loc[order.sort_values(kind="stable").index]
    rows[RANK] = rows.groupby(["prompt_id", "label"]).cumcount()
    good, bad = (rows[rows["label"] == label].drop(columns="label") for label in (True, False))
    pairs = good.merge(bad, on=["prompt_id", RANK], suffixes=("_chosen", "_rejected")).sort_values(f"{PLACE}_chosen")
    report["prompts_with_one_label"] = int(rows["prompt_id"].nunique() - pairs["prompt_id"].nunique())
    report["unpaired_completion"] = len(rows) - 2 * len(pairs)
    names = {"prompt_chosen": "prompt", "completion_chosen": "chosen", "completion_rejected": "rejected"}
    return pairs.rename(columns=names).drop(columns=[RANK, "prompt_rejected", f"{PLACE}_chosen", f"{PLACE}_rejected"])


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
    "bad_label": "rows dropped: label cannot be read", "bad_broken_json": "rows dropped: broken JSON",
    "bad_invalid": "rows dropped: the file itself marks them", "bad_tie": "rows dropped: no answer is preferred",
    "repeated_completion": "repeated completions dropped", "both_labels": "completions dropped: labelled both ways",
    "prompts_with_one_label": "prompts dropped: only one label",
    "unpaired_completion": "completions left without a partner", "duplicate": "duplicate pairs dropped",
    "too_long": "pairs dropped: longer than max_chars", "over_limit": "pairs not drawn: over the limit",
    "contradictory": "contradictory pairs kept (same answers, swapped)", "pairs": "pairs", "prompts": "prompts",
}  # fmt: skip
# What was done to read a file, and what it says of its labels: nothing was dropped for it.
NOTED = {
    "messages_spelled": "rows whose message lists were given as text",
    "dialogue_text": "rows read from texts such as Human: ... Assistant: ...",
    "prompt_taken_off": "rows whose answers began with the prompt, which was taken off",
    "input_joined": "rows whose input was joined to the prompt",
    "system_joined": "rows with a system turn from its column",
    "history_joined": "rows with earlier turns from the column history",
    "one_sided": "rows whose conversation stands in one of the answers only",
    "later_turns": "rows whose turns after the compared answers were left off",
    "scores_contradict": "pairs kept whose own scores say otherwise",
    "scores_equal": "pairs kept whose own scores are equal",
    "label_columns": "columns about how sure the labels are", "columns_read": "columns read",
}  # fmt: skip


def _counts(report):
    """(words, count) of all that was counted, zeros left out."""
    return [(words, report[key]) for key, words in (REPORT_WORDS | NOTED).items() if report.get(key)]


def describe_report(pairs):
    """The loading report of ``load_pairs`` as lines of text, one count a line, zeros left out."""
    if (report := pairs.attrs.get("report")) is None:
        raise PreferenceError("this table has no loading report: load it with load_pairs.")
    lines = [f"{n:>8,}  {words}" if isinstance(n, int) else f"{words}: {n}" for words, n in _counts(report)]
    return "\n".join([report["source"], *lines])
