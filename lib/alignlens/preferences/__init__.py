"""Preference pairs: load them, check them, split them by prompt, and format them for a model.

A prompt is always one string, so tables stay plain in any file format. A single user turn is that turn's text. Any
other prompt (several turns, a system turn) is written turn by turn as ``\\x1e`` role ``\\x1f`` content, without loss:
``join_turns`` writes it and ``turns`` reads it back. Responses are the text of one assistant turn.

Every method and every instrument formats text with the one ``Formatter`` here: where each method has its own chat
format (arXiv 2606.09850, training scripts), differences between methods are partly differences between formats.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from alignlens.core.errors import PreferenceError

COLUMNS = ["prompt", "chosen", "rejected", "prompt_id"]
SPLITS = ("train", "reward", "measure")
ROLES = ("system", "developer", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TURN, CONTENT = "\x1e", "\x1f"  # ASCII record and unit separators: they do not occur in written text
# Some templates print today's date; this macro takes the place of that function, so token ids stay the same every day.
FIXED_DATE = (
    "{%- macro strftime_now(form) -%}{{ form | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%y', '24') | replace('%Y', '2024') }}{%- endmacro -%}"
)
ROWS_SHOWN = 5
WHOLE_CHECKS = 16  # rows of a batch on which the split into prompt and response is compared with the whole
CHUNK = 1024  # pairs tokenised at once: bounds the memory of the tokenizer's offsets


# Prompts ------------------------------------------------------------------------------------------------------------


def join_turns(messages):
    """One string for ``{"role", "content"}`` turns; a single user turn is its own text. ``turns`` undoes it."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "".join(f"{TURN}{m['role']}{CONTENT}{m['content']}" for m in messages)


def turns(prompt):
    """The ``{"role", "content"}`` turns of a prompt string, as chat templates and TRL take them."""
    if not prompt.startswith(TURN):
        return [{"role": "user", "content": prompt}]
    parts = (part.partition(CONTENT) for part in prompt[1:].split(TURN))
    return [{"role": role, "content": content} for role, _, content in parts]


def prompt_id(prompt):
    """16 hex digits from the prompt's turns; unicode form (NFC) and runs of white space do not count."""
    normal = (
        turn["role"] + CONTENT + " ".join(unicodedata.normalize("NFC", turn["content"]).split())
        for turn in turns(prompt)
    )
    return hashlib.blake2b(TURN.join(normal).encode(), digest_size=8).hexdigest()


# Reading one row ----------------------------------------------------------------------------------------------------


class _BadRow(Exception):
    """Why one row cannot be used: a kind (counted in the report), the field and the words for a person."""

    def __init__(self, kind, field, words):
        super().__init__(words)
        self.kind, self.field, self.words = kind, field, words


def _listed(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def _missing(value):
    return value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value))


def _text(value, name):
    if _missing(value):
        raise _BadRow("missing", name, "is missing")
    if not isinstance(value, str):
        raise _BadRow("not_text", name, f"is {type(value).__name__}, not text")
    if not value.strip():
        raise _BadRow("empty", name, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON escapes can spell half a character, which no tokenizer takes
        raise _BadRow("not_text", name, f"holds half a unicode character at {error.start}") from None
    return value


def _read_turns(value, name):
    """Checked turns of a message list or of a prompt string."""
    if isinstance(value, str):
        value = turns(_text(value, name))
    if not value:
        raise _BadRow("empty", name, "is an empty message list")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise _BadRow("turns", name, f"message {number} is not a role and a content")
        if message["role"] not in ROLES:
            raise _BadRow("turns", name, f"message {number} has the unknown role {message['role']!r}")
        content = _text(message["content"], name)
        if TURN in content:
            raise _BadRow("turns", name, f"message {number} holds the turn separator \\x1e")
        messages.append({"role": message["role"], "content": content})
    return messages


def _read_prompt(value):
    value = _listed(value)
    return _read_turns(value if isinstance(value, list) else _text(value, "prompt"), "prompt")


def _read_response(value, name):
    """Prompt turns repeated before the response (none for plain text) and the response itself."""
    value = _listed(value)
    if not isinstance(value, list):
        return [], _text(value, name)
    messages = _read_turns(value, name)
    if messages[-1]["role"] != "assistant":
        raise _BadRow("turns", name, "does not end with an assistant turn")
    return messages[:-1], messages[-1]["content"]


def _agree(heads):
    """The longest of the prompts given for one row, if every other is its ending; heads maps field to turns."""
    heads = {name: head for name, head in heads.items() if head}
    if not heads:
        raise _BadRow("missing", "prompt", "is missing, and the answers repeat no prompt")
    longest = max(heads.values(), key=len)
    bare = [(turn["role"], turn["content"].strip()) for turn in longest]
    for name, head in heads.items():
        if [(turn["role"], turn["content"].strip()) for turn in head] != bare[len(bare) - len(head) :]:
            raise _BadRow("turns", name, "repeats a prompt that differs from the other fields' prompt")
    if longest[-1]["role"] != "user":
        role = longest[-1]["role"]
        raise _BadRow("turns", next(iter(heads)), f"the prompt ends with a turn of role {role!r}, not 'user'")
    return join_turns(longest)


def _prompt_of(row, heads):
    given = row.get("prompt")
    if _missing(given) and any(heads.values()):
        return _agree(heads)
    return _agree({"prompt": _read_prompt(given), **heads})


def _read_pairs(row):
    """The pairs of one row: several when ``rejected`` is a list of answers."""
    head, chosen = _read_response(row.get("chosen"), "chosen")
    answers = _listed(row.get("rejected"))
    several = isinstance(answers, list) and not (answers and isinstance(answers[0], dict))
    if several and not answers:
        raise _BadRow("empty", "rejected", "is an empty list")
    found = []
    for answer in answers if several else [answers]:
        other, rejected = _read_response(answer, "rejected")
        if chosen.strip() == rejected.strip():
            raise _BadRow("equal", "rejected", "is equal to chosen")
        prompt = _prompt_of(row, {"chosen": head, "rejected": other})
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def _read_completion(row):
    head, completion = _read_response(row.get("completion"), "completion")
    label = str(row.get("label")).strip().lower()
    if label not in ("true", "false", "1", "0", "1.0", "0.0"):
        raise _BadRow("label", "label", f"is {row.get('label')!r}, not true or false")
    prompt = _prompt_of(row, {"completion": head})
    return [{"prompt": prompt, "completion": completion, "label": label[0] in "t1"}]


# Reading a source ---------------------------------------------------------------------------------------------------


def _read_json(path):
    """Rows of a .jsonl or .json file as (place, row or _BadRow)."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from None
    if path.suffix == ".json" and content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise PreferenceError(f"{path}: broken JSON at line {error.lineno}: {error.msg}.") from None
        places = [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    else:
        places = []
        # split("\n"), not splitlines(): that one also breaks at \x1e and at unicode line ends inside texts
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    places.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    bad = _BadRow("broken_json", None, f"broken JSON ({error.msg} at column {error.colno})")
                    places.append((f"line {number}", bad))
    odd = _BadRow("broken_json", None, "is not a JSON object with named fields")
    return [(place, row if isinstance(row, (dict, _BadRow)) else odd) for place, row in places]


def _read_hub(source, split):
    import datasets

    name, _, revision = source.partition("@")
    try:
        return datasets.load_dataset(name, split=split, revision=revision or None).to_pandas()
    except Exception as error:  # the hub client raises many unrelated types; the user needs one clear sentence
        reason = str(error).strip().split("\n")[0] or "no reason given"
        raise PreferenceError(
            f"{source}: split {split!r} cannot be loaded as a data set ({type(error).__name__}: {reason}). "
            "Check the id, the split and the network, or give a local .jsonl, .json, .csv or .parquet file."
        ) from error


def _read_source(source, split):
    """Name of the source and its rows as (place, row or _BadRow)."""
    if isinstance(source, pd.DataFrame):
        name, table = "DataFrame", source
    else:
        name, path = str(source), Path(source)
        if path.suffix in SUFFIXES and not path.is_file():
            raise PreferenceError(f"{name}: no such file. Give an existing {', '.join(SUFFIXES)} file or a hub id.")
        if path.suffix in (".jsonl", ".json"):
            return name, _read_json(path)
        try:
            if path.suffix == ".csv":
                # answers such as "NA" or "12" are text, not missing values or numbers
                text = dict.fromkeys(("prompt", "chosen", "rejected", "completion"), str)
                table = pd.read_csv(path, dtype=text, keep_default_na=False)
            elif path.suffix == ".parquet":
                table = pd.read_parquet(path)
            else:
                table = _read_hub(name, split)
        except (ValueError, OSError) as error:
            raise PreferenceError(f"{name}: cannot be read as {path.suffix[1:]} ({error}).") from error
    return name, [(f"row {number}", row) for number, row in enumerate(table.to_dict("records"), 1)]


def _columns(name, rows):
    """Columns that occur in any row; refuses a source that holds neither pairs nor labelled completions."""
    columns = list(dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row))
    if not rows:
        raise PreferenceError(f"{name}: holds no rows.")
    unpaired = {"completion", "label"} <= set(columns) and not {"chosen", "rejected"} & set(columns)
    missing = [] if unpaired else [column for column in ("chosen", "rejected") if column not in columns]
    if missing and columns:
        raise PreferenceError(
            f"{name}: no column {' and no column '.join(map(repr, missing))}; it has {', '.join(map(str, columns))}. "
            "Name them prompt, chosen, rejected (or prompt, completion, label)."
        )
    return columns, unpaired


def _pair_completions(rows, report):
    """Pairs from labelled completions, within a prompt, each completion used once, in the order of a content hash."""
    report["repeated_completion"] = int(rows.duplicated(["prompt_id", "completion", "label"]).sum())
    rows = rows.drop_duplicates(["prompt_id", "completion", "label"])
    both = rows.duplicated(["prompt_id", "completion"], keep=False)
    report["both_labels"] = int(both.sum())
    rows = rows[~both].rename_axis("position").reset_index()
    rows["order"] = [hashlib.blake2b(text.encode()).hexdigest() for text in rows["completion"]]
    rows = rows.sort_values(["order", "position"])
    rows["rank"] = rows.groupby(["prompt_id", "label"]).cumcount()
    good, bad = rows[rows["label"]].drop(columns="label"), rows[~rows["label"]].drop(columns="label")
    pairs = good.merge(bad, on=["prompt_id", "rank"], suffixes=("_chosen", "_rejected"))
    report["prompts_with_one_label"] = int(rows["prompt_id"].nunique() - pairs["prompt_id"].nunique())
    report["unpaired_completion"] = len(rows) - 2 * len(pairs)
    pairs = pairs.sort_values("position_chosen").rename(
        columns={"prompt_chosen": "prompt", "completion_chosen": "chosen", "completion_rejected": "rejected"}
    )
    spare = [f"{name}_{side}" for name in ("order", "position") for side in ("chosen", "rejected")]
    return pairs.drop(columns=["rank", "prompt_rejected", *spare])


def _require(pairs, *names):
    missing = [name for name in names if name not in pairs.columns]
    if missing:
        maker = "split_by_prompt" if missing == ["split"] else "load_pairs"
        raise PreferenceError(f"the pairs have no column {missing[0]!r}: make them with {maker}.")


def _count(value, name):
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
        raise PreferenceError(f"{name}={value!r}: give a whole number of at least 1, or None.")


def load_pairs(source, *, limit=None, max_chars=None, split="train", on_bad="refuse"):
    """Preference pairs from a file, a hub data set or a table, checked row by row.

    Parameters
    ----------
    source : path of a .jsonl, .json, .csv or .parquet file; a hub data set id (``org/name`` or ``org/name@revision``)
        or a local data set folder; or a DataFrame. Columns: ``prompt, chosen, rejected`` or ``prompt, completion,
        label``. Texts are strings or message lists. Prompt turns repeated in ``chosen`` and ``rejected`` are taken off,
        and stand in for a missing prompt. A list of rejected answers makes one pair each. Labelled completions (KTO)
        are paired within their prompt, desirable with undesirable in the order of a content hash, each used at most
        once; their extra columns come twice, ``*_chosen`` and ``*_rejected``.
    limit : at most this many pairs, as whole prompts in the order of ``prompt_id`` (a hash, so not the first rows);
        a smaller limit gives a subset of a larger one.
    max_chars : pairs with a longer prompt (all its turns), chosen or rejected are dropped.
    split : the data set's split; files and tables have none.
    on_bad : "refuse" raises on unusable rows, "drop" leaves them out and counts them.

    Returns
    -------
    DataFrame ``prompt, chosen, rejected, prompt_id``, then the extra columns, in file order. ``attrs["report"]`` counts
    what was dropped and why (see ``describe_report``). Exact duplicates are dropped; contradictory pairs (the same two
    answers, chosen and rejected swapped) are kept and counted.

    Raises
    ------
    PreferenceError naming source, row (line of a .jsonl) and field.
    """
    _count(limit, "limit")
    _count(max_chars, "max_chars")
    if on_bad not in ("refuse", "drop"):
        raise PreferenceError(f"on_bad={on_bad!r}: choose 'refuse' or 'drop'.")
    name, rows = _read_source(source, split)
    columns, unpaired = _columns(name, rows)
    read = _read_completion if unpaired else _read_pairs
    extra = [c for c in columns if c not in (*COLUMNS, *(("completion", "label") if unpaired else ()))]

    records, problems = [], []
    for place, row in rows:
        try:
            if isinstance(row, _BadRow):
                raise row
            kept = {column: row.get(column) for column in extra}
            records += [{**found, **kept} for found in read(row)]
        except _BadRow as bad:
            problems.append((place, bad))
    if problems and on_bad == "refuse":
        shown = [
            f"{place}, field {bad.field!r}: {bad.words}" if bad.field else f"{place}: {bad.words}"
            for place, bad in problems[:ROWS_SHOWN]
        ]
        more = f"; and {len(problems) - ROWS_SHOWN} more" if len(problems) > ROWS_SHOWN else ""
        raise PreferenceError(
            f"{name}: {len(problems)} of {len(rows)} rows cannot be used. {'; '.join(shown)}{more}. "
            "Mend them, or pass on_bad='drop' to leave them out and count them."
        )

    report = {"source": name, "rows": len(rows)}
    kinds = Counter(bad.kind for _, bad in problems)
    report |= {f"bad_{kind}": kinds[kind] for kind in sorted(kinds)}
    fields = ("prompt", "completion", "label") if unpaired else ("prompt", "chosen", "rejected")
    pairs = pd.DataFrame(records, columns=[*fields, *extra])
    known = {text: prompt_id(text) for text in pairs["prompt"].unique()}
    pairs.insert(len(fields), "prompt_id", pairs["prompt"].map(known))
    if unpaired:
        pairs = _pair_completions(pairs, report)
    pairs = _select(pairs, limit, max_chars, report)
    if pairs.empty:
        raise PreferenceError(f"{name}: no pair is left. " + _counts_line(report))
    pairs = pairs[[*COLUMNS, *(c for c in pairs.columns if c not in COLUMNS)]].reset_index(drop=True)
    pairs.attrs["report"] = report
    return pairs


def _select(pairs, limit, max_chars, report):
    copies = pairs.duplicated(["prompt_id", "chosen", "rejected"])
    report["duplicate"] = int(copies.sum())
    pairs = pairs[~copies]
    if max_chars is not None:
        long = (pairs[["prompt", "chosen", "rejected"]].map(len) > max_chars).any(axis=1)
        report["too_long"] = int(long.sum())
        pairs = pairs[~long]
    if limit is not None:
        sizes = pairs["prompt_id"].value_counts().sort_index()
        drawn = pairs["prompt_id"].isin(sizes.index[sizes.cumsum() <= limit])
        report["over_limit"] = int((~drawn).sum())
        pairs = pairs[drawn]
    keys = set(zip(pairs["prompt_id"], pairs["chosen"], pairs["rejected"], strict=True))
    report["contradictory"] = sum((same, rejected, chosen) in keys for same, chosen, rejected in keys) // 2
    report["pairs"], report["prompts"] = len(pairs), int(pairs["prompt_id"].nunique())
    return pairs


_REPORT_WORDS = {
    "rows": "rows read",
    "bad_missing": "rows dropped: a field is missing",
    "bad_empty": "rows dropped: a field is empty",
    "bad_not_text": "rows dropped: a field is not text",
    "bad_turns": "rows dropped: message list not usable",
    "bad_equal": "rows dropped: chosen equals rejected",
    "bad_label": "rows dropped: label is not true or false",
    "bad_broken_json": "rows dropped: broken JSON",
    "repeated_completion": "repeated completions dropped",
    "both_labels": "completions dropped: labelled both ways",
    "prompts_with_one_label": "prompts dropped: only one label",
    "unpaired_completion": "completions left without a partner",
    "duplicate": "duplicate pairs dropped",
    "too_long": "pairs dropped: longer than max_chars",
    "over_limit": "pairs not drawn: over the limit",
    "contradictory": "contradictory pairs kept (same answers, swapped)",
    "pairs": "pairs",
    "prompts": "prompts",
}


def _counts_line(report):
    return ", ".join(f"{words}: {report[key]}" for key, words in _REPORT_WORDS.items() if report.get(key))


def describe_report(pairs):
    """The loading report of ``load_pairs`` as lines of text, one count a line, zeros left out."""
    report = pairs.attrs.get("report")
    if report is None:
        raise PreferenceError("this table has no loading report: load it with load_pairs.")
    lines = [f"{report[key]:>8,}  {words}" for key, words in _REPORT_WORDS.items() if report.get(key)]
    return "\n".join([f"{report['source']}", *lines])


# Splitting ----------------------------------------------------------------------------------------------------------


def check_folds(pairs, folds):
    """Raise PreferenceError when ``pairs`` holds fewer prompts than ``folds``."""
    _require(pairs, "prompt_id")
    prompts = pairs["prompt_id"].nunique()
    if prompts < folds:
        raise PreferenceError(
            f"{prompts} prompts cannot fill {folds} folds, since none is cut. Load more or ask for fewer folds."
        )


def split_by_prompt(pairs, *, reward=0.2, measure=0.3, seed=0):
    """Assign whole prompts to the splits train, reward and measure.

    A prompt's place depends on the hash of (seed, prompt_id) alone, so it stays when rows are added or removed, and
    shares are met up to chance (about 1 percentage point at 2 000 prompts). ``measure`` is never trained on, neither by
    a method nor by the reward model. Returns a copy with the column ``split``; PreferenceError for an empty split.
    """
    if min(reward, measure) < 0 or reward + measure >= 1:
        raise PreferenceError(f"reward={reward}, measure={measure}: shares are at least 0 and add up to less than 1.")
    _require(pairs, "prompt_id")
    ids = pairs["prompt_id"].unique()
    hashes = [hashlib.blake2b(f"{seed}:{one}".encode(), digest_size=8).digest() for one in ids]
    place = np.array([int.from_bytes(value) for value in hashes]) / 2.0**64
    names = np.select([place < measure, place < measure + reward], ["measure", "reward"], "train")
    for name, share in zip(SPLITS, (1 - reward - measure, reward, measure), strict=True):
        if share > 0 and name not in names:
            raise PreferenceError(
                f"split {name!r} would be empty: {len(ids)} prompts at a share of {share:.2g}. Load more prompts or "
                "raise its share."
            )
    return pairs.assign(split=pairs["prompt_id"].map(dict(zip(ids, names, strict=True))))


def split_hash(pairs):
    """16 hex digits that name the assignment of prompts to splits, whatever the row order."""
    _require(pairs, "prompt_id", "split")
    assignment = sorted(set(zip(pairs["prompt_id"], pairs["split"], strict=True)))
    return hashlib.blake2b(json.dumps(assignment).encode(), digest_size=8).hexdigest()


# Formatting for a model ---------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """Token ids of formatted pairs; the three lists run over the kept rows.

    prompt_ids, chosen_ids, rejected_ids : lists of lists of token ids; each response ends with one end-of-turn token
    kept : bool [input rows]
    report : counts of what was dropped and why, and token lengths over all rows that could be formatted
    prompts, prompt_id : text of each prompt, and its id, an array of str

    Whatever takes pairs takes an ``Encoded`` as well, so that pairs are formatted once.
    """

    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    kept: np.ndarray
    report: dict
    prompts: list
    prompt_id: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Which input rows are kept: int [kept rows]."""
        return np.flatnonzero(self.kept)

    def __len__(self):
        return len(self.prompt_ids)


class _Unusable(Exception):
    """Why one text cannot be formatted: kind (counted) and words."""

    def __init__(self, kind, words):
        super().__init__(words)
        self.kind, self.words = kind, words


class Formatter:
    """One text format for all methods and all measurements: token ids of a prompt and of its response.

    prompt ids + response ids are the tokens of the rendered conversation up to and including the end-of-turn token, and
    the prompt ids are what generation starts from. Thinking is switched off; an empty thinking block belongs to the
    prompt. Templates that print today's date get a fixed one. Nothing is ever cut.

    Parameters
    ----------
    tokenizer : a transformers tokenizer.
    max_length : most tokens of prompt and response together; None for no limit.
    template : "chat" uses the tokenizer's chat template; "plain" writes each turn and a blank line (BOS first if the
        tokenizer itself adds it, end of sequence last); "auto" is chat where there is a template.
    system : a system turn for prompts that bring none.

    Attributes
    ----------
    end_id : the end-of-turn token, found by rendering an assistant turn; the end of sequence if the template has none.
    pad_id : the tokenizer's padding token unless it is ``end_id``; else a special token named for padding, the unknown
        token, or another special token that no format uses. Only a tokenizer without any of these pads with ``end_id``.

    Raises
    ------
    PreferenceError for a template that cannot be used, a text holding special tokens, or one over ``max_length``.
    """

    def __init__(self, tokenizer, *, max_length=None, template="auto", system=None):
        _count(max_length, "max_length")
        if template not in ("auto", "chat", "plain"):
            raise PreferenceError(f"template={template!r}: choose 'auto', 'chat' or 'plain'.")
        if template == "chat" and not tokenizer.chat_template:
            raise PreferenceError("template='chat': this tokenizer has no chat template. Use 'plain' or 'auto'.")
        self.tokenizer, self.max_length, self.system = tokenizer, max_length, system
        self.template = template if template != "auto" else ("chat" if tokenizer.chat_template else "plain")
        marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._specials = sorted({*marked, *tokenizer.all_special_tokens} - {""}, key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        # shared objects: a token in a list costs 8 bytes, not 36
        self._integers = list(range(max(tokenizer.get_vocab().values()) + 1))
        self._tails = {"": []}
        if self.template == "chat":
            self._learn_template()
        else:
            self._learn_plain()
        self.pad_id = self._choose_pad()

    # What the template does, found by rendering one conversation

    def _learn_plain(self):
        bos = self.tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []
        self.end_id = self._end_of_sequence()
        self._end_ids = [self.end_id]

    def _learn_template(self):
        self._bos = []  # a chat template writes its own
        question, answer = "Question1", "Answer1"
        asked = turns(question)
        if self.system is not None:
            asked = [{"role": "system", "content": self.system}, *asked]
        conversation = [*asked, {"role": "assistant", "content": answer}]
        opened, full = self._render(asked, True), self._render(conversation, False)
        at = full.rfind(answer)
        if at < 0 or question not in opened:
            raise PreferenceError("the chat template leaves out the turns it is given: use template='plain'.")
        before, after = full[:at], full[at + len(answer) :]
        self._lead = self._unrendered = ""
        if before.startswith(opened):
            lead = before[len(opened) :]  # a header or an empty thinking block; a lone space belongs to the answer
            self._lead = lead if lead.strip() else ""
        elif opened.startswith(before) and re.fullmatch(r"\s*<think>\s*</think>\s*", opened[len(before) :]):
            self._unrendered = opened[len(before) :]  # opens generation only: kept, since answers come after it
        else:
            raise PreferenceError(
                f"the chat template ends the prompt with {opened[-60:]!r} for generation but with {before[-60:]!r} "
                "before an answer, so prompt and response cannot be told apart. Use another template or 'plain'."
            )
        end = self._special.search(after)
        self._after, self._end_text = after, after[: end.end()] if end else ""
        self.end_id = self.tokenizer.convert_tokens_to_ids(end.group()) if end else self._end_of_sequence()
        self._end_ids = [] if end else [self.end_id]
        if not self._unrendered:
            ids = self.tokenizer.apply_chat_template(conversation, return_dict=False, **self._switches)
            try:
                ours = sum(self._encode(join_turns(asked), answer), [])
            except PreferenceError as error:
                raise PreferenceError(
                    f"the prompt's end {opened[-12:]!r} is tokenised differently once a response follows: the "
                    "pre-tokenizer splits trailing line breaks by what comes next. Mend it or use template='plain'."
                ) from error
            rendered = len(ours) - len(self._end_ids)
            if ours[:rendered] != ids[:rendered]:
                raise PreferenceError("prompt and response ids differ from the tokenizer's own chat tokens.")

    def _end_of_sequence(self):
        if self.tokenizer.eos_token_id is None:
            raise PreferenceError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token.")
        return self.tokenizer.eos_token_id

    def _choose_pad(self):
        tokenizer, ids = self.tokenizer, self.tokenizer.convert_tokens_to_ids
        named = [text for text in sorted(self._specials) if "pad" in text.lower()]
        used = {self.end_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        template = self._switches["chat_template"] if self.template == "chat" else ""
        used |= {ids(text) for text in self._specials if text in template}
        if tokenizer.pad_token_id not in (None, self.end_id):
            return tokenizer.pad_token_id
        spare = [*map(ids, named), tokenizer.unk_token_id, *sorted(map(ids, self._specials))]
        return next((token for token in spare if token is not None and token not in used), self.end_id)

    # Text

    @cached_property
    def _switches(self):
        template = self.tokenizer.get_chat_template()
        return {"enable_thinking": False, "chat_template": FIXED_DATE * ("strftime_now" in template) + template}

    def _render(self, messages, generation):
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **self._switches
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise PreferenceError(f"the chat template refuses turns of roles {roles}: {error}.") from error

    def _turns(self, prompt):
        messages = turns(prompt)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages

    def _prompt_text(self, prompt):
        found = self._special.search(prompt)
        if found:
            raise _Unusable("special_token", f"the prompt holds the special token {found.group()!r}")
        if self.template == "plain":
            return "".join(message["content"] + "\n\n" for message in self._turns(prompt))
        return self._render(self._turns(prompt), True) + self._lead

    def _response_text(self, prompt, prompt_text, response):
        """The rendered response with its end of turn, as it follows ``prompt_text``."""
        found = self._special.search(response)
        if found:
            raise _Unusable("special_token", f"the response holds the special token {found.group()!r}")
        if self.template == "plain":
            return response
        full = self._render([*self._turns(prompt), {"role": "assistant", "content": response}], False)
        shown = prompt_text[: len(prompt_text) - len(self._unrendered)]
        if not (full.startswith(shown) and full.endswith(self._after)):
            raise _Unusable("boundary", "the template renders the prompt differently once the response follows")
        return full[len(shown) : len(full) - len(self._after)] + self._end_text

    def _tail(self, prompt_text):
        """The end of a prompt that can influence how the response is tokenised: from its last special token on.

        Special tokens cut a text before anything else happens to it, so this short tail stands for the whole prompt.
        A plain prompt and its response are tokenised apart, by definition.
        """
        if self.template == "plain":
            return ""
        last = max((prompt_text.rfind(text) for text in self._used_specials), default=-1)
        return prompt_text[max(last, 0) :]

    @cached_property
    def _used_specials(self):
        probe = self._render(turns("Question1"), True)
        return [text for text in self._specials if text in probe]

    # Token ids

    def _tokenize(self, texts):
        if not texts:
            return []
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [list(map(self._integers.__getitem__, row)) for row in ids]

    def _tail_ids(self, tail):
        if tail not in self._tails:
            self._tails[tail] = self._tokenize([tail])[0]
        return self._tails[tail]

    def _prompts(self, prompts):
        """For each prompt its text and ids, or the _Unusable that says why not."""
        texts = [_attempt(self._prompt_text, prompt) for prompt in prompts]
        good = [text for text in texts if isinstance(text, str)]
        ids = iter(self._tokenize(good))
        return [(text, self._bos + next(ids)) if isinstance(text, str) else text for text in texts]

    def _responses(self, prompts, formatted, responses):
        """For each response its ids, or an _Unusable; ``formatted`` comes from ``_prompts``."""
        texts = [
            done if isinstance(done, _Unusable) else _attempt(self._response_text, prompt, done[0], response)
            for prompt, done, response in zip(prompts, formatted, responses, strict=True)
        ]
        tails = [self._tail(done[0]) if isinstance(done, tuple) else None for done in formatted]
        good = [tail + text for tail, text in zip(tails, texts, strict=True) if isinstance(text, str)]
        ids = iter(self._tokenize(good))
        out = []
        for done, tail, text in zip(formatted, tails, texts, strict=True):
            if isinstance(text, _Unusable):
                out.append(text)
                continue
            row, start = next(ids), done[1] if tail == done[0] else self._tail_ids(tail)
            if row[: len(start)] != start or done[1][len(done[1]) - len(start) :] != start:
                words = f"the prompt's end {done[0][-12:]!r} is tokenised differently once the response follows"
                out.append(_Unusable("boundary", words))
            else:
                out.append(row[len(start) :] + self._end_ids)
        return out

    def _encode(self, prompt, response):
        formatted = self._prompts([prompt])
        prompt_ids = _or_raise(formatted[0])[1]
        return prompt_ids, _or_raise(self._responses([prompt], formatted, [response])[0])

    def prompt_ids(self, prompt):
        """Token ids (list of int) that generation starts from."""
        ids = _or_raise(self._prompts([prompt])[0])[1]
        if self.max_length is not None and len(ids) > self.max_length:
            raise PreferenceError(
                f"the prompt has {len(ids)} tokens, over max_length={self.max_length}. Raise it or leave it out."
            )
        return ids

    def response_ids(self, prompt, response):
        """Token ids (list of int) of the response after this prompt, ending with one end-of-turn token."""
        return self.encode(prompt, response)[1]

    def encode(self, prompt, response):
        """(prompt ids, response ids) of one conversation; PreferenceError if it is over ``max_length``."""
        prompt_ids, response_ids = self._encode(prompt, response)
        total = len(prompt_ids) + len(response_ids)
        if self.max_length is not None and total > self.max_length:
            raise PreferenceError(
                f"prompt and response have {len(prompt_ids)} + {len(response_ids)} tokens, over "
                f"max_length={self.max_length}. Raise it or leave the pair out; nothing is cut."
            )
        return prompt_ids, response_ids

    def encode_pairs(self, pairs, *, overlong="drop"):
        """Token ids of many pairs at once.

        pairs : DataFrame with prompt, chosen, rejected. overlong : "drop" leaves out and counts pairs of which either
        side is over ``max_length``; "refuse" raises. Pairs with special tokens in a text, or whose prompt and response
        would merge into one token, are dropped and counted too. Returns ``Encoded`` (what is one already, as it is);
        PreferenceError if none is left.
        """
        if isinstance(pairs, Encoded):
            return pairs
        if overlong not in ("drop", "refuse"):
            raise PreferenceError(f"overlong={overlong!r}: choose 'drop' or 'refuse'.")
        _require(pairs, "prompt", "chosen", "rejected")
        columns = [pairs[name].tolist() for name in ("prompt", "chosen", "rejected")]
        parts = []
        for start in range(0, len(pairs), CHUNK):
            prompts, chosen, rejected = (column[start : start + CHUNK] for column in columns)
            unique = list(dict.fromkeys(prompts))
            formatted = dict(zip(unique, self._prompts(unique), strict=True))
            formatted = [formatted[prompt] for prompt in prompts]
            answers = self._responses([*prompts, *prompts], [*formatted, *formatted], [*chosen, *rejected])
            parts += zip(formatted, answers[: len(prompts)], answers[len(prompts) :], strict=True)
        names = pairs["prompt_id"] if "prompt_id" in pairs else pairs["prompt"].map(prompt_id)
        return self._gather([*columns, names.to_numpy(str)], parts, overlong)

    def _gather(self, columns, parts, overlong):
        limit = self.max_length if self.max_length is not None else np.inf
        reasons, lengths, first = [], [], None
        for row, (prompt, chosen, rejected) in enumerate(parts, 1):
            bad = next((part for part in (prompt, chosen, rejected) if isinstance(part, _Unusable)), None)
            if bad is not None:
                reasons.append(bad.kind)
                first = first or f"row {row}: {bad.words}"
                continue
            size = len(prompt[1])
            total = size + max(len(chosen), len(rejected))
            lengths.append(total)
            reasons.append("overlong_prompt" if size > limit else "overlong_response" if total > limit else "")
        reasons = np.array(reasons, dtype=object)
        kept = reasons == ""
        kinds = ("special_token", "boundary", "overlong_prompt", "overlong_response")
        report = {"pairs": len(parts), "kept": int(kept.sum())} | {kind: int((reasons == kind).sum()) for kind in kinds}
        if lengths:
            report |= {"median_tokens": int(np.median(lengths)), "longest_tokens": max(lengths)}
        over = np.flatnonzero((reasons == "overlong_prompt") | (reasons == "overlong_response")) + 1
        if overlong == "refuse" and len(over):
            raise PreferenceError(
                f"{len(over)} of {len(parts)} pairs are over max_length={self.max_length}, first rows "
                f"{', '.join(map(str, over[:ROWS_SHOWN]))}; the longest has {max(lengths)} tokens. "
                "Raise max_length or pass overlong='drop'."
            )
        if not kept.any():
            seen = f"pairs have {min(lengths)} to {max(lengths)} tokens. " if lengths else ""
            raise PreferenceError(
                f"no pair of {len(parts)} can be used with max_length={self.max_length}: {seen}"
                + (f"First problem: {first}. " if first else "")
                + "Raise max_length, or load shorter pairs with max_chars."
            )
        rows = [part for part, keep in zip(parts, kept, strict=True) if keep]
        self._check_whole(columns, parts, np.flatnonzero(kept))
        prompt_ids = [list(prompt[1]) for prompt, _, _ in rows]  # copies: rows of one prompt must not share a list
        prompts = [prompt for prompt, keep in zip(columns[0], kept, strict=True) if keep]
        chosen, rejected = ([row[side] for row in rows] for side in (1, 2))
        return Encoded(prompt_ids, chosen, rejected, kept, report, prompts, columns[3][kept])

    def _check_whole(self, columns, parts, kept):
        """On a few rows, prompt ids + response ids must be the tokens of the whole rendered conversation."""
        if self.template == "plain":
            return
        for row in np.unique(np.linspace(0, len(kept) - 1, WHOLE_CHECKS).astype(int)):
            (text, ids), chosen, _ = parts[kept[row]]
            prompt, response = columns[0][kept[row]], columns[1][kept[row]]
            whole = self._tokenize([text + self._response_text(prompt, text, response)])[0]
            if ids + chosen != whole + self._end_ids:
                raise PreferenceError(
                    f"row {kept[row] + 1}: prompt ids + response ids are not the tokens of the whole conversation: "
                    "this tokenizer does not cut a text at its special tokens. Use template='plain'."
                )

    def decode(self, ids):
        """Text of response token ids, up to the first end token, without special tokens."""
        ids = [int(token) for token in ids]
        ends = {self.end_id, self.tokenizer.eos_token_id}
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return self.tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def describe(self, prompt, response):
        """One formatted example for people: each token between bars, special tokens in brackets."""
        parts = []
        for name, ids in zip(("prompt", "response"), self._encode(prompt, response), strict=True):
            shown = (self.tokenizer.decode([token]) for token in ids)
            tokens = [f"[{text}]" if text in self._specials else repr(text)[1:-1] for text in shown]
            parts.append(f"{name} ({len(ids)} tokens)\n  {'|'.join(tokens)}")
        end, pad = self.tokenizer.convert_ids_to_tokens([self.end_id, self.pad_id])
        return "\n".join([f"{self.template} template, end of turn [{end}], padding [{pad}]", *parts])

    @cached_property
    def fingerprint(self):
        """16 hex digits of vocabulary, merges, template and settings: equal only if every text formats alike."""
        settings = [self.template, self.system, self.max_length, self.end_id, self.pad_id]
        template = self._switches["chat_template"] if self.template == "chat" else None
        content = {"settings": settings, "template": template, "vocabulary": sorted(self.tokenizer.get_vocab().items())}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state = json.loads(backend.to_str())
            # truncation and padding are left over from the last call; they do not change our ids
            content["backend"] = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _attempt(function, *arguments):
    """The result, or the _Unusable that was raised: batches go on and count."""
    try:
        return function(*arguments)
    except _Unusable as reason:
        return reason


def _or_raise(result):
    if isinstance(result, _Unusable):
        raise PreferenceError(f"cannot be formatted: {result.words}. Leave the pair out or mend its text.")
    return result


def collate(sequences, pad_id, side="right"):
    """Pad lists of token ids: (input_ids, attention_mask), int64 tensors [sequences, longest]."""
    import torch

    if side not in ("left", "right"):
        raise PreferenceError(f"side={side!r}: choose 'left' or 'right'.")
    longest = max((len(ids) for ids in sequences), default=0)
    if longest == 0:
        raise PreferenceError("nothing to collate: every sequence is empty.")
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        input_ids[row, place] = torch.as_tensor(ids, dtype=torch.long)
        mask[row, place] = 1
    return input_ids, mask
