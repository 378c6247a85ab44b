"""Reading one row: each shape of row gives pairs or labelled completions, or a ``BadRow`` that says why not."""

import re

import numpy as np
import pandas as pd

from alignlens.preferences.prompts import TURN, join_turns, turns

ROLES = ("system", "developer", "user", "assistant", "tool")
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class BadRow(Exception):
    """Why one row cannot be used: a kind (counted in the report), the field and the words for a person."""

    def __init__(self, kind, field, words):
        super().__init__(f"field {field!r}: {words}" if field else words)
        self.kind = kind


def _missing(value):
    return value is None or value is pd.NA or value != value  # NaN


def _text(value, field):
    if _missing(value):
        raise BadRow("missing", field, "is missing")
    if not isinstance(value, str):
        raise BadRow("not_text", field, f"is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow("empty", field, "is empty")
    if re.search("[\ud800-\udfff]", value):  # JSON escapes can spell half a character, which no tokenizer takes
        raise BadRow("not_text", field, "holds half a unicode character")
    return value


def _messages(value, field):
    """Checked turns of a message list or of a prompt string."""
    if not isinstance(value, list):
        value = turns(_text(value, field))
    if not value:
        raise BadRow("empty", field, "is an empty message list")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow("turns", field, f"message {number} is not a role and a content")
        if message["role"] not in ROLES:
            raise BadRow("turns", field, f"message {number} has the unknown role {message['role']!r}")
        if TURN in _text(message["content"], field):
            raise BadRow("turns", field, f"message {number} holds the turn separator \\x1e")
    return value


def _response(value, field):
    """Prompt turns repeated before the response (none for plain text) and the response itself."""
    if not isinstance(value, list):
        return [], _text(value, field)
    *head, last = _messages(value, field)
    if last["role"] != "assistant":
        raise BadRow("turns", field, "does not end with an assistant turn")
    return head, last["content"]


def _prompt(given, heads):
    """The longest of the prompt and of what the answers repeat of it, if every other one is its ending."""
    if not _missing(given) or not any(heads.values()):
        heads = {"prompt": _messages(given, "prompt"), **heads}
    heads = {field: head for field, head in heads.items() if head}
    longest = max(heads.values(), key=len)
    for field, head in heads.items():
        for ours, theirs in zip(head, longest[-len(head) :], strict=True):
            if (ours["role"], ours["content"].strip()) != (theirs["role"], theirs["content"].strip()):
                raise BadRow("turns", field, "repeats a prompt that differs from the other fields' prompt")
    if (role := longest[-1]["role"]) != "user":
        raise BadRow("turns", next(iter(heads)), f"the prompt ends with a turn of role {role!r}, not 'user'")
    return join_turns(longest)


def _read_pairs(prompt, chosen, rejected):
    """Several pairs when ``rejected`` is a list of answers."""
    head, chosen = _response(chosen, "chosen")
    if not isinstance(rejected, list) or not rejected or isinstance(rejected[0], dict):
        rejected = [rejected]
    for answer in rejected:
        other, answer = _response(answer, "rejected")
        if chosen.strip() == answer.strip():
            raise BadRow("equal", "rejected", "is equal to chosen")
        yield _prompt(prompt, {"chosen": head, "rejected": other}), chosen, answer


def _read_completion(prompt, completion, label):
    head, completion = _response(completion, "completion")
    if (known := LABELS.get(str(label).strip().lower())) is None:
        raise BadRow("label", "label", f"is {label!r}, not true or false")
    yield _prompt(prompt, {"completion": head}), completion, known


# The fields of a row of pairs or of labelled completions, and what reads them, arrays made lists.
SHAPES = {("prompt", "chosen", "rejected"): _read_pairs, ("prompt", "completion", "label"): _read_completion}
PAIRS, COMPLETIONS = SHAPES


def read_row(row, fields):
    """What a row holds, as dicts of the fields of its shape; BadRow if it cannot be used."""
    if not isinstance(row, dict):
        raise row if isinstance(row, BadRow) else BadRow("broken_json", None, "is not a JSON object with named fields")
    found = SHAPES[fields](*(_listed(row.get(field)) for field in fields))
    return [dict(zip(fields, values, strict=True)) for values in found]


def _listed(value):
    return [_listed(item) for item in value] if isinstance(value, list | np.ndarray) else value
