"""Reading rows: cells become turns, turns become pairs or labelled completions, or a ``BadRow`` says why not."""

import ast
import json
import re

import numpy as np
import pandas as pd

from alignlens.preferences.prompts import TURN, join_turns, turns

# The fields of a row of pairs, or of labelled completions.
PAIRS, COMPLETIONS = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label")
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= dict.fromkeys(("human", "prompter"), "user") | dict.fromkeys(("gpt", "bot", "model", "ai"), "assistant")
KEYS = (("role", "content"), ("from", "value"))
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
SPELLED = (
    r"""\s*\[?\s*\{\s*["'](role|content|from|value|type|messages)["']\s*:.*["'](role|content|from|value|text)["']\s*:"""
)
SPEAKER = "(Human|User|Assistant|System|HUMAN|USER|ASSISTANT|SYSTEM):"


class BadRow(Exception):
    """Why one row cannot be used: a kind (counted in the report), the field and the words for a person."""

    def __init__(self, kind, field, words):
        super().__init__(f"field {field!r}: {words}" if field else words)
        self.kind = kind


def is_blank(value):
    """Whether a cell holds nothing: no value, white space, or an empty list."""
    if isinstance(value, str | list):
        return not (value.strip() if isinstance(value, str) else value)
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _text(value, field):
    if is_blank(value) and not isinstance(value, str | list):
        raise BadRow("missing", field, "is missing")
    if not isinstance(value, str):
        raise BadRow("not_text", field, f"is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow("empty", field, "is empty")
    if re.search("[\ud800-\udfff]", value):  # JSON escapes can spell half a character, which no tokenizer takes
        raise BadRow("not_text", field, "holds half a unicode character")
    return value


def _listed(value):
    return [_listed(item) for item in value] if isinstance(value, list | tuple | np.ndarray) else value


def cell(value, field, lists=False):
    """A cell, its arrays made lists, and read where its text spells messages (or any list, if ``lists``) in JSON or as
    Python or numpy print them."""
    if isinstance(value, list | tuple | np.ndarray):
        return [cell(item, field) for item in value]
    if not isinstance(value, str) or not (re.match(SPELLED, value, re.DOTALL) or (lists and value.startswith("["))):
        return value
    text = value.strip()
    try:
        found, end = json.JSONDecoder().raw_decode(text)
        found = found if end == len(text) else None  # an answer that begins with messages and goes on is a text
    except (ValueError, RecursionError):
        try:  # numpy prints no comma between messages
            between = r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\}\s+\{"""
            found = ast.literal_eval(re.sub(between, lambda match: match[1] or "}, {", text))
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            words = "begins like a message list, but is neither whole JSON nor as Python prints it (was it cut?)"
            raise BadRow("turns", field, words) from error
    items = found if isinstance(found, list) else [found]
    return found if items and (lists or all(map(_is_message, items))) else value


# Turns


def _keys(message):
    """The names under which a message holds its role and its content; None if it is no message."""
    known = message if isinstance(message, dict) else {}
    return next((keys for keys in KEYS if set(keys) <= known.keys() and not is_blank(known[keys[0]])), None)


def _is_message(value):
    """Whether a value is a message for certain, a part of one, or holds a list of them."""
    if keys := _keys(value):
        return str(value[keys[0]]).strip().lower() in ROLES
    return isinstance(value, dict) and (value.get("type") == "text" or isinstance(value.get("messages"), list))


def _turn(message, field, number):
    """One checked turn; None for a system turn that says nothing."""
    if not (keys := _keys(message)):
        raise BadRow("turns", field, f"message {number} is not a role and a content")
    given, content = (message[key] for key in keys)
    if (role := ROLES.get(str(given).strip().lower())) is None:
        raise BadRow("turns", field, f"message {number} has the unknown role {given!r}")
    if any(not is_blank(_listed(message.get(calls))) for calls in ("tool_calls", "function_call")):
        raise BadRow("turns", field, f"message {number} calls a tool, and only text can be read")
    if isinstance(content := _listed(content), list) and content:
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        if other := next((kind for part in parts if (kind := part.get("type", "text")) != "text"), None):
            raise BadRow("turns", field, f"message {number} holds a part of type {other!r}, and only text can be read")
        texts = [part.get("text") for part in parts]
        content = "".join(text if isinstance(text, str) else _text(text, field) for text in texts)
    if role == "system" and is_blank(content):
        return None
    return {"role": role, "content": _text(content, field)}


def _messages(value, field):
    """Checked turns of a message list, of one message, of the parts of one, or of a text."""
    if isinstance(value, dict) and "messages" in value:
        value = _listed(value["messages"])
    if isinstance(value, list) and value and not any(map(_keys, value)) and all(map(_is_message, value)):
        value = {"role": "user" if field == "prompt" else "assistant", "content": value}
    if not isinstance(value, list):
        told = turns if field == "prompt" else lambda text: [{"role": "assistant", "content": text}]
        value = [value] if _keys(value) else told(_text(value, field))
    found = [turn for number, message in enumerate(value, 1) if (turn := _turn(message, field, number))]
    if not found:
        raise BadRow("empty", field, "is an empty message list")
    return found


def _dialogue(text):
    """Turns of a text such as "Human: ... Assistant: ...", each on a paragraph, line or none; None of other texts."""
    if not isinstance(text, str) or not re.match(SPEAKER, text.strip()):
        return None
    gap = next((gap for gap in ("\n\n", "\n", " ") if re.search(gap + "(Assistant|ASSISTANT):", text)), "\n\n")
    _, *parts = re.split(f"(?:^|{gap}){SPEAKER}", text.strip())
    said = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[role.lower()], "content": content.strip()} for role, content in said]


def _rest(answer, prompt):
    """What follows the prompt with which an answer begins; '' where it does not."""
    head, body = prompt.strip(), answer.lstrip()
    rest = body[len(head) :] if head and body.startswith(head) else ""
    return rest.strip() if rest[:1].isspace() or not head[-1:].isalnum() else ""


def _key(turn):
    return turn["role"], turn["content"].strip()


def _conversation(prompt, answer, field):
    """The whole conversation, whether the answer repeats the prompt, its end, more than it, or nothing of it."""
    if not prompt or answer[0]["role"] == "assistant":
        return prompt + answer
    asked, said = [*map(_key, prompt)], [*map(_key, answer)]
    if any(said[start : start + len(asked)] == asked for start in range(len(said))):
        return answer
    for size in range(min(len(asked), len(said)), 0, -1):
        if asked[-size:] == said[:size]:
            return prompt[:-size] + answer
    raise BadRow("turns", field, "repeats a prompt that differs from the other fields' prompt")


def _in_context(told, cells, notes):
    """Turns with what other columns add: earlier turns, a system message, the input of an instruction."""
    history, system, given = (cells.get(name) for name in ("history", "system", "input"))
    if not is_blank(history):
        if not isinstance(history, list):
            raise BadRow("turns", "history", "is not a list of messages or of pairs of texts")
        if all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            texts = [text for pair in history for text in pair]
            history = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        notes.add("history_joined")
        told = _messages(history, "history") + told
    if not is_blank(system) and told[0]["role"] != "system":
        notes.add("system_joined")
        told = [{"role": "system", "content": _text(system, "system")}, *told]
    if not is_blank(given) and _text(given, "input").strip() not in told[-1]["content"]:
        notes.add("input_joined")
        told = [*told[:-1], told[-1] | {"content": f"{told[-1]['content']}\n\n{given}"}]
    return told


def _parted(chosen, rejected, notes):
    """Prompt, chosen and rejected of two conversations, from the first turn in which they differ."""
    keys = [[*map(_key, talk)] for talk in (chosen, rejected)]
    shared = next((n for n, (one, other) in enumerate(zip(*keys, strict=False)) if one != other), None)
    if shared is None and len(chosen) == len(rejected):
        raise BadRow("equal", "rejected", "is equal to chosen")
    if shared is None:
        words = "one conversation is the beginning of the other: end both with the answers that are to be compared"
        raise BadRow("turns", "rejected", words)
    if not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        short, long = sorted((key[:-1] for key in keys), key=len)
        if short == long[len(long) - len(short) :]:
            words = "holds a system message or earlier turns that the other answer lacks: put them into the prompt"
            raise BadRow("turns", PAIRS[1 + (len(rejected) > len(chosen))], words)
        words = f"parts from chosen at message {shared + 1}, where not both hold an answer: give both the same prompt"
        raise BadRow("turns", "rejected", words)
    if max(len(chosen), len(rejected)) > shared + 1:
        notes.add("later_turns")
    return _asked(chosen[:shared]), chosen[shared]["content"], rejected[shared]["content"]


def _completed(talk):
    """Prompt and completion of one conversation."""
    if talk[-1]["role"] != "assistant":
        raise BadRow("turns", "completion", "does not end with an assistant turn")
    return _asked(talk[:-1]), talk[-1]["content"]


def _asked(talk):
    """The prompt as one string; it must end with the user's turn."""
    if not talk:
        raise BadRow("missing", "prompt", "is missing")
    if (role := talk[-1]["role"]) != "user":
        raise BadRow("turns", "prompt", f"the prompt ends with a turn of role {role!r}, not 'user'")
    for number, turn in enumerate(talk, 1):
        if TURN in turn["content"]:
            raise BadRow("turns", "prompt", f"message {number} holds the turn separator \\x1e")
    return join_turns(talk)


def _most(flags):
    flags = [bool(flag) for flag in flags]
    return 2 * sum(flags) > len(flags)


class Reader:
    """Reads the rows of one file, given as cells under the names of their fields.

    What most rows do is the way of the file: answers that begin with the text of their prompt lose it, and texts such
    as "Human: ... Assistant: ..." are read as turns. Where few rows do so, each text stays what it is."""

    def __init__(self, fields, rows):
        self.fields, self.answers = fields, [name for name in fields[1:] if name != "label"]
        texts = [([row.get(name) for name in self.answers], row.get("prompt")) for row in rows]
        texts = [(answers, prompt) for answers, prompt in texts if all(isinstance(answer, str) for answer in answers)]
        asked = [(answers, prompt) for answers, prompt in texts if isinstance(prompt, str)]
        self._dialogues = _most(all(map(_dialogue, answers)) for answers, _ in texts)
        self._dialogue_prompts = _most(_dialogue(prompt) for _, prompt in asked)
        self._repeated = _most(all(_rest(answer, prompt) for answer in answers) for answers, prompt in asked)

    def read(self, cells):
        """(what a row holds, as dicts of the fields of its shape; names of what was done to read it)."""
        notes, found = {"messages_spelled"} if "spelled" in cells else set(), []
        label = LABELS.get(str(cells.get("label")).strip().lower())
        if "label" in self.fields and label is None:
            raise BadRow("label", "label", f"is {cells.get('label')!r}, not true or false")
        *_, last = self.answers
        answers = cells.get(last)  # several rejected answers make several pairs
        several = isinstance(answers, list) and answers and not isinstance(answers[0], dict)
        for answer in answers if several else [answers]:
            sides = {name: answer if name == last else cells.get(name) for name in self.answers}
            talks = self._talks(cells, sides, notes)
            texts = _parted(*talks, notes) if len(talks) == 2 else _completed(*talks)
            found.append(dict(zip(self.fields, (*texts, label), strict=False)))
        return found, notes

    def _talks(self, cells, sides, notes):
        """The whole conversation that each answer ends."""
        prompt = self._prompt(cells.get("prompt"), notes)
        if self._repeated and len(prompt) == 1 and all(isinstance(answer, str) for answer in sides.values()):
            rests = {name: _rest(answer, prompt[0]["content"]) for name, answer in sides.items()}
            if all(rests.values()):
                notes.add("prompt_taken_off")
                sides = rests
        said = {name: self._said(answer, name, notes) for name, answer in sides.items()}
        opened = {name: talk for name, talk in said.items() if talk[0]["role"] != "assistant"}
        if not prompt and not opened:
            _messages(cells.get("prompt"), "prompt")  # says what is wrong with it
        if prompt:
            prompt = _in_context(prompt, cells, notes)
        elif opened:
            opened = {name: _in_context(talk, cells, notes) for name, talk in opened.items()}
        if not prompt and len(opened) < len(said):  # the other answer stands alone
            notes.add("one_sided")
            [talk] = opened.values()
            prompt = talk[: max(n for n, turn in enumerate(talk) if turn["role"] == "assistant")]
        return [_conversation(prompt, talk, name) for name, talk in (said | opened).items()]

    def _prompt(self, given, notes):
        """The prompt's turns, none where it is not given."""
        if is_blank(given):
            return []
        if not (self._dialogue_prompts and (told := _dialogue(given))):
            return _messages(given, "prompt")
        notes.add("dialogue_text")
        return _messages(told[:-1] if told[-1]["content"] == "" else told, "prompt")

    def _said(self, answer, field, notes):
        """The turns of an answer: the conversation that it repeats and its own, or its own alone."""
        if self._dialogues and (told := _dialogue(answer)):
            notes.add("dialogue_text")
            answer = told
        told = _messages(answer, field)
        if not any(turn["role"] == "assistant" for turn in told):
            raise BadRow("turns", field, "does not end with an assistant turn")
        return told
