"""Reading rows: cells become turns, turns become pairs or labelled completions, or an ``Unusable`` says why not."""

import ast
import json
import re

import numpy as np
import pandas as pd

from alignlens.preferences.prompts import TURN, Unusable, join_turns, refuse_if, turns

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


def is_blank(value):
    """Whether a cell holds nothing: no value, white space, or an empty list."""
    if isinstance(value, str | list):
        return not (value.strip() if isinstance(value, str) else value)
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _text(value, field):
    refuse_if(is_blank(value) and not isinstance(value, str | list), "is missing", field, "missing")
    refuse_if(not isinstance(value, str), f"is {type(value).__name__}, not text", field, "not_text")
    refuse_if(not value.strip(), "is empty", field, "empty")
    # JSON escapes can spell half a character, which no tokenizer takes
    refuse_if(re.search("[\ud800-\udfff]", value), "holds half a unicode character", field, "not_text")
    return value


def _plain(value):
    """A value, its arrays made lists at any depth."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [*map(_plain, value)] if isinstance(value, list | tuple | np.ndarray) else value


def cell(value, field, lists=False):
    """A cell of lists and texts, and read where its text spells messages (or any list, if ``lists``) in JSON or as
    Python or numpy print them."""
    if isinstance(value := _plain(value), list):
        return [cell(item, field) for item in value]
    if not isinstance(value, str) or not (re.match(SPELLED, value, re.DOTALL) or (lists and value.startswith("["))):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # an answer that begins with messages and goes on is a text
            return value
        try:  # numpy prints no comma between messages
            between = r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\}\s+\{"""
            found = ast.literal_eval(re.sub(between, lambda match: match[1] or "}, {", value.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            words = "begins like a message list, but is neither whole JSON nor as Python prints it (was it cut?)"
            raise Unusable(words, field) from error
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
    keys, words = _keys(message), f"message {number}"
    refuse_if(not keys, f"{words} is not a role and a content", field)
    given, content = (message[key] for key in keys)
    role = ROLES.get(str(given).strip().lower())
    refuse_if(role is None, f"{words} has the unknown role {given!r}", field)
    calls = (message.get(name) for name in ("tool_calls", "function_call"))
    refuse_if(not all(map(is_blank, calls)), f"{words} calls a tool, and only text can be read", field)
    if isinstance(content, list) and content:
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        other = next((kind for part in parts if (kind := part.get("type", "text")) != "text"), None)
        refuse_if(other, f"{words} holds a part of type {other!r}, and only text can be read", field)
        texts = [part.get("text") for part in parts]
        content = "".join(text if isinstance(text, str) else _text(text, field) for text in texts)
    return None if role == "system" and is_blank(content) else {"role": role, "content": _text(content, field)}


def _messages(value, field):
    """Checked turns of a message list, of one message, of the parts of one, or of a text."""
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if isinstance(value, list) and value and not any(map(_keys, value)) and all(map(_is_message, value)):
        value = {"role": "user" if field == "prompt" else "assistant", "content": value}
    if not isinstance(value, list):
        told = turns if field == "prompt" else lambda text: [{"role": "assistant", "content": text}]
        value = [value] if _keys(value) else told(_text(value, field))
    found = [turn for number, message in enumerate(value, 1) if (turn := _turn(message, field, number))]
    refuse_if(not found, "is an empty message list", field, "empty")
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
    asked, said = [*map(_key, prompt)], [*map(_key, answer)]
    if not prompt or answer[0]["role"] == "assistant":
        return prompt + answer
    if any(said[start : start + len(asked)] == asked for start in range(len(said))):
        return answer
    for size in range(min(len(asked), len(said)), 0, -1):
        if asked[-size:] == said[:size]:
            return prompt[:-size] + answer
    raise Unusable("repeats a prompt that differs from the other fields' prompt", field)


def _in_context(told, cells, notes):
    """Turns with what other columns add: earlier turns, a system message, the input of an instruction."""
    history, system, given = (cells.get(name) for name in ("history", "system", "input"))
    if not is_blank(history):
        refuse_if(not isinstance(history, list), "is not a list of messages or of pairs of texts", "history")
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
    one, other = ([*map(_key, talk)] for talk in (chosen, rejected))
    refuse_if(one == other, "is equal to chosen", "rejected", "equal")
    shared = next((n for n, keys in enumerate(zip(one, other, strict=False)) if keys[0] != keys[1]), None)
    refuse_if(shared is None, "one conversation is the beginning of the other: end both with answers", "rejected")
    if not one[shared][0] == other[shared][0] == "assistant":
        short, long = sorted((one[:-1], other[:-1]), key=len)
        words = "holds a system message or earlier turns that the other answer lacks: put them into the prompt"
        refuse_if(short == long[len(long) - len(short) :], words, PAIRS[1 + (len(other) > len(one))])
        words = f"parts from chosen at message {shared + 1}, where not both hold an answer: give both the same prompt"
        raise Unusable(words, "rejected")
    if max(len(one), len(other)) > shared + 1:
        notes.add("later_turns")
    return _asked(chosen[:shared]), chosen[shared]["content"], rejected[shared]["content"]


def _completed(talk):
    """Prompt and completion of one conversation."""
    refuse_if(talk[-1]["role"] != "assistant", "does not end with an assistant turn", "completion")
    return _asked(talk[:-1]), talk[-1]["content"]


def _asked(talk):
    """The prompt as one string; it must end with the user's turn."""
    refuse_if(not talk, "is missing", "prompt", "missing")
    role, held = talk[-1]["role"], [TURN in turn["content"] for turn in talk]
    refuse_if(role != "user", f"the prompt ends with a turn of role {role!r}, not 'user'", "prompt")
    refuse_if(any(held), f"message {[*held, True].index(True) + 1} holds the turn separator \\x1e", "prompt")
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
        texts = [row for row in rows if all(isinstance(row.get(name), str) for name in self.answers)]
        asked = [row for row in texts if isinstance(row.get("prompt"), str)]
        told = _most(all(_dialogue(row[name]) for name in self.answers) for row in texts)
        self._told = dict.fromkeys(self.answers, told) | {"prompt": _most(_dialogue(row["prompt"]) for row in asked)}
        self._repeated = _most(all(_rest(row[name], row["prompt"]) for name in self.answers) for row in asked)

    def read(self, cells):
        """(what a row holds, as dicts of the fields of its shape; names of what was done to read it)."""
        notes, found = {"messages_spelled"} if "spelled" in cells else set(), []
        label = LABELS.get(str(cells.get("label")).strip().lower())
        unread = label is None and "label" in self.fields
        refuse_if(unread, f"is {cells.get('label')!r}, not true or false", "label", "label")
        *_, last = self.answers
        answers = cells.get(last)  # several rejected answers make several pairs
        several = isinstance(answers, list) and answers and not isinstance(answers[0], dict)
        for answer in answers if several else [answers]:
            talk, *other = self._talks(cells | {last: answer}, notes)
            texts = _parted(talk, *other, notes) if other else _completed(talk)
            found.append(dict(zip(self.fields, (*texts, label), strict=False)))
        return found, notes

    def _talks(self, cells, notes):
        """The whole conversation that each answer ends."""
        sides = {name: cells.get(name) for name in self.answers}
        prompt = [] if is_blank(cells.get("prompt")) else self._turns(cells["prompt"], "prompt", notes)
        if self._repeated and len(prompt) == 1 and all(isinstance(answer, str) for answer in sides.values()):
            rests = {name: _rest(answer, prompt[0]["content"]) for name, answer in sides.items()}
            if all(rests.values()):
                notes.add("prompt_taken_off")
                sides = rests
        said = {name: self._turns(answer, name, notes) for name, answer in sides.items()}
        opened = {name: talk for name, talk in said.items() if talk[0]["role"] != "assistant"}
        if prompt:
            prompt = _in_context(prompt, cells, notes)
        elif not opened:
            _messages(cells.get("prompt"), "prompt")  # says what is wrong with it
        else:
            said |= {name: _in_context(talk, cells, notes) for name, talk in opened.items()}
            if len(opened) < len(said):  # the other answer stands alone
                notes.add("one_sided")
                [name] = opened
                prompt = said[name][: max(n for n, turn in enumerate(said[name]) if turn["role"] == "assistant")]
        return [_conversation(prompt, talk, name) for name, talk in said.items()]

    def _turns(self, value, field, notes):
        """The turns of a prompt or of an answer, which may hold the conversation before it too."""
        if self._told[field] and (told := _dialogue(value)):
            notes.add("dialogue_text")
            value = told[:-1] if field == "prompt" and told[-1]["content"] == "" else told
        found = _messages(value, field)
        answers = field == "prompt" or any(turn["role"] == "assistant" for turn in found)
        refuse_if(not answers, "does not end with an assistant turn", field)
        return found
