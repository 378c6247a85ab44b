"""The one text format of a model, for every method and every instrument: pairs as token ids.

Where each method has its own chat format (arXiv 2606.09850, training scripts), differences between methods are partly
differences between formats."""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress, takewhile

import numpy as np
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from alignlens.core.errors import PreferenceError
from alignlens.preferences.prompts import Unusable, attempt, digest, prompt_id, require_columns, require_count, turns

# Some templates print today's date; this macro takes the place of that function, so token ids stay the same every day.
FIXED_DATE = (
    "{%- macro strftime_now(form) -%}{{ form | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%y', '24') | replace('%Y', '2024') }}{%- endmacro -%}"
)
EMPTY_BLOCK = r"\s*<think>\s*(</think>\s*)?"
DROPPED = ("template", "special_token", "boundary", "overlong_prompt", "overlong_response")
THINK, THOUGHT = "<think>", "</think>"  # what opens and closes a reasoning trace in the families that have them
CHUNK = 2048  # texts tokenised at once: bounds the memory of the tokenizer's offsets


@dataclass
class Encoded:
    """Token ids of formatted pairs. Whatever takes pairs takes an ``Encoded`` as well, so they are formatted once.

    prompt_ids, chosen_ids, rejected_ids : of the kept rows, lists of token ids; each response ends with one end-of-turn
    token. kept : bool [input rows]. report : counts of what was dropped and why, and token lengths over all rows that
    could be formatted. prompts, prompt_id : text of each kept row's prompt, and its id, an array of str."""

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

    def take(self, places):
        """Some of the kept rows, by their places among them, rising; the report stays that of all."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "prompts")
        lists = {name: [getattr(self, name)[i] for i in places] for name in names}
        kept = np.isin(np.arange(len(self.kept)), self.rows[places])
        return replace(self, **lists, kept=kept, prompt_id=self.prompt_id[places])


class Formatter:
    """One text format for all methods and all measurements: token ids of a prompt and of its response.

    prompt ids + response ids are the tokens of the rendered conversation up to and including the end-of-turn token, and
    the prompt ids are what generation starts from. Thinking is off, with an empty block in the prompt, but where an
    answer holds a reasoning trace (``</think>``): that belongs to the answer, as in generation, also if the template
    would leave it out. An end-of-turn token that is written out behind an answer is taken off. Templates that print
    today's date get a fixed one. Nothing is ever cut.
    max_length : most tokens of prompt and response together; None for no limit.
    template : "chat" uses the tokenizer's chat template; "plain" writes each turn and a blank line (BOS first if the
    tokenizer itself adds it, end of sequence last); "auto" is chat where there is a template.
    end_id : the end-of-turn token, found by rendering an assistant turn; the end of sequence if the template has none.
    pad_id : the tokenizer's padding token unless it is ``end_id``; else a special token named for padding, the unknown
    token, or another special token that no format uses. Only a tokenizer without any of these pads with ``end_id``.
    Raises PreferenceError for an unusable template, a text holding special tokens, or one over ``max_length``."""

    def __init__(self, tokenizer, *, max_length=None, template="auto"):
        require_count(max_length, "max_length")
        if template not in ("auto", "plain") and not (template == "chat" and tokenizer.chat_template):
            raise PreferenceError(f"template={template!r}: choose 'auto', 'plain' or, if the tokenizer has it, 'chat'.")
        self.template = "chat" if tokenizer.chat_template and template != "plain" else "plain"
        self.tokenizer, self.max_length = tokenizer, max_length
        marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._specials = sorted({*marked, *tokenizer.all_special_tokens} - {""}, key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        self._integers = list(range(max(tokenizer.get_vocab().values()) + 1))  # shared: 8 bytes a token, not 36
        self._bos, self._chat, self._lead, self._unrendered, self._end_text = [], "", "", "", ""
        self.end_id, self._end_ids = tokenizer.eos_token_id, [tokenizer.eos_token_id]
        self._ends = [tokenizer.eos_token or "\n"]  # tokens that end an answer, as some files write them out
        if self.template == "chat":
            self._learn_template()
        elif (first := tokenizer("a")["input_ids"][:1]) == [tokenizer.bos_token_id]:
            self._bos = first
        if self.end_id is None:
            raise PreferenceError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token.")
        self.pad_id = self._choose_pad()

    def _learn_template(self):
        template, question, answer = self.tokenizer.get_chat_template(), "Question1", "Answer1"
        self._chat = FIXED_DATE * ("strftime_now" in template) + template
        try:
            opened = self._render(turns(question), True)
            full = self._render([*turns(question), {"role": "assistant", "content": answer}], False)
        except Unusable as refused:
            raise PreferenceError(f"{refused}. Use template='plain'.") from refused
        before, found, self._after = full.rpartition(answer)
        told = found and question in opened
        if told and before.startswith(opened):
            lead = before[len(opened) :]  # a header or an empty thinking block; a lone space belongs to the answer
            self._lead = lead if lead.strip() else ""
        elif told and opened.startswith(before) and (block := re.fullmatch(EMPTY_BLOCK, opened[len(before) :])):
            self._lead = "" if block[1] else f"\n{THOUGHT}\n\n"
            self._unrendered = block[0] + self._lead  # opens generation only: kept, since answers come after it
        else:
            ends = f"its prompt ends with {opened[-60:]!r} for generation but with {before[-60:]!r} before an answer"
            raise PreferenceError(f"the chat template cannot be split: {ends}. Use template='plain'.")
        if end := self._special.search(self._after):
            self._end_text, self._end_ids = self._after[: end.end()], []
            self.end_id = self.tokenizer.convert_tokens_to_ids(end.group())
            self._ends.append(end.group())
        _usable(self._encode([question], [answer])[0])

    def _choose_pad(self):
        tokenizer, ids = self.tokenizer, self.tokenizer.convert_tokens_to_ids
        if tokenizer.pad_token_id not in (None, self.end_id):
            return tokenizer.pad_token_id
        used = {None, self.end_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        used |= {ids(text) for text in self._specials if text in self._chat}
        named = [text for text in sorted(self._specials) if "pad" in text.lower()]
        spare = [*map(ids, named), tokenizer.unk_token_id, *sorted(map(ids, self._specials))]
        return next((token for token in spare if token not in used), self.end_id)

    def _render(self, messages, generation, thinking=False):
        options = {"enable_thinking": thinking, "chat_template": self._chat, "tokenize": False}
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=generation, **options)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise Unusable(f"the chat template refuses turns of roles {roles}: {error}", kind="template") from error

    def _prompt_text(self, prompt, thinking=False):
        if self.template == "plain":
            return "".join(message["content"] + "\n\n" for message in turns(prompt))
        lead = re.split(f"{THINK}|{THOUGHT}", self._lead)[0] if thinking else self._lead
        return self._render(turns(prompt), True, thinking) + (lead if lead.strip() else "")

    def _whole_text(self, prompt, opened, response, thinking):
        """The conversation up to its end of turn, "" if its prompt is rendered differently; a plain response alone."""
        if self.template == "plain":
            return response
        full = self._render([*turns(prompt), {"role": "assistant", "content": response}], False, thinking)
        shown = opened if thinking else opened.removesuffix(self._unrendered)
        if full.startswith(shown) and full.endswith(self._after):
            answer = full[len(shown) : len(full) - len(self._after)]
        elif thinking:  # the template leaves traces out of what it renders; generation does not
            answer = response
            if opened.rstrip().endswith(THINK):
                answer = re.sub(rf"^\s*{THINK}", "", answer) if THOUGHT in answer else f"{THOUGHT}\n\n{answer}"
        else:
            return ""
        if opened.endswith(f"{THINK}\n"):  # a line break more would merge with the prompt's
            answer = answer.lstrip("\n")
        return opened + answer + self._end_text

    def _tokenize(self, texts):
        """Token ids of each text; none of an Unusable."""
        texts = ["" if isinstance(text, Unusable) else text for text in texts]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        batches = (self.tokenizer(texts[i : i + CHUNK], **options)["input_ids"] for i in range(0, len(texts), CHUNK))
        return [[self._integers[token] for token in row] for batch in batches for row in batch]

    def _encode(self, prompts, responses, thinking=None):
        """(prompt ids, response ids) of each conversation, or the Unusable that says why not. thinking : of each, by
        default whether its response holds a trace."""
        responses = [self._bare(text) for text in responses]
        thinking = [THOUGHT in text for text in responses] if thinking is None else thinking
        asked = list(zip(prompts, responses, thinking, strict=True))
        opened = {key: attempt(self._prompt_text, *key) for key in dict.fromkeys(zip(prompts, thinking, strict=True))}
        texts = [attempt(self._whole_text, p, opened[p, t], r, t) for p, r, t in asked]
        heads = dict(zip(opened, self._tokenize(opened.values()), strict=True))
        rows = zip(asked, texts, self._tokenize(texts), strict=True)
        return [attempt(self._cut, text, p, r, heads[p, t], ids) for (p, r, t), text, ids in rows]

    def _bare(self, response):
        """The response without an end-of-turn token that is written out behind it."""
        text = response.rstrip()
        return next((text.removesuffix(end) for end in self._ends if text.endswith(end) and text != end), response)

    def _cut(self, text, prompt, response, head, whole):
        """The ids of a whole text, parted where those of its prompt end."""
        if found := self._special.search(f"{prompt}\n{response}"):
            raise Unusable(f"the text holds the special token {found.group()!r}", kind="special_token")
        size = len(head) if self.template == "chat" else 0  # plain: prompt and response are tokenised apart
        if whole[:size] != head[:size]:
            end = self.tokenizer.decode(head[-3:])
            words = f"the prompt's end {end!r} is tokenised differently once a response follows"
            raise Unusable(words, kind="boundary")
        return self._bos + head, whole[size:] + self._end_ids

    def _within(self, ids):
        """Ids of a prompt and its responses, or Unusable where they are over ``max_length``."""
        size, longest = len(ids[0]), max(map(len, ids[1:]), default=0)
        if self.max_length is not None and size + longest > self.max_length:
            words = f"the prompt has {size} tokens" + f" and the response {longest}" * (len(ids) > 1)
            kind = "overlong_prompt" if size > self.max_length else "overlong_response"
            raise Unusable(f"{words}, over max_length={self.max_length}", kind=kind)
        return ids

    def prompt_ids(self, prompt):
        """Token ids (list of int) that generation starts from."""
        return _usable(attempt(self._prompt_ids, prompt))

    def _prompt_ids(self, prompt):
        text = self._prompt_text(prompt)
        [ids] = self._tokenize([text])
        return self._within(self._cut(text, prompt, "", ids, ids)[:1])[0]

    def response_ids(self, prompt, response):
        """Token ids (list of int) of the response after this prompt, ending with one end-of-turn token."""
        return self.encode(prompt, response)[1]

    def encode(self, prompt, response):
        """(prompt ids, response ids) of one conversation; PreferenceError if it is over ``max_length``."""
        return _usable(attempt(self._within, *self._encode([prompt], [response])))

    def encode_pairs(self, pairs):
        """``Encoded`` of many pairs (prompt, chosen, rejected; what is one already, as it is).

        Left out and counted are pairs of which either side is over ``max_length``, those with special tokens in a text,
        those whose turns the template refuses, and those whose prompt and response would merge into one token. Both
        answers follow the same prompt: if either holds a reasoning trace, thinking is on for both. Raises
        PreferenceError when no pair is left."""
        if isinstance(pairs, Encoded):
            return pairs
        require_columns(pairs, "prompt", "chosen", "rejected")
        prompts, chosen, rejected = (pairs[name].tolist() for name in ("prompt", "chosen", "rejected"))
        thinking = [THOUGHT in one + other for one, other in zip(chosen, rejected, strict=True)]
        both = self._encode(prompts * 2, chosen + rejected, thinking * 2)
        rows = zip(both[: len(pairs)], both[len(pairs) :], strict=True)
        rows = [attempt(lambda one, other: (*one, other[1]), *sides) for sides in rows]
        lengths = [len(row[0]) + max(map(len, row[1:])) for row in rows if not isinstance(row, Unusable)]
        rows = [attempt(self._within, row) for row in rows]  # prompt, chosen and rejected ids
        bad = [row for row in rows if isinstance(row, Unusable)]
        kept, kinds = np.array([not isinstance(row, Unusable) for row in rows], bool), Counter(row.kind for row in bad)
        report = {"pairs": len(rows), "kept": int(kept.sum())} | {kind: kinds[kind] for kind in DROPPED}
        ended = [any(self._bare(text) != text for text in sides) for sides in zip(chosen, rejected, strict=True)]
        report |= {name: sum(found) for name, found in {"thinking": thinking, "end_token": ended}.items() if any(found)}
        if lengths:
            report |= {"median_tokens": int(np.median(lengths)), "longest_tokens": max(lengths)}
        if not kept.any():
            seen = f"pairs have {min(lengths)} to {max(lengths)} tokens. " if lengths else ""
            seen += f"Row 1: {bad[0]}. " if bad else ""
            limit = f"with max_length={self.max_length}: {seen}Raise it, or load shorter pairs with max_chars."
            raise PreferenceError(f"no pair of {len(rows)} can be used {limit}")
        names = pairs["prompt_id"] if "prompt_id" in pairs else pairs["prompt"].map(prompt_id)
        ids = map(list, zip(*compress(rows, kept), strict=True))
        return Encoded(*ids, kept, report, pairs["prompt"][kept].tolist(), names.to_numpy(str)[kept])

    def decode(self, ids):
        """Text of response token ids, up to the first end token, without special tokens."""
        ends = (self.end_id, self.tokenizer.eos_token_id)
        ids = list(takewhile(lambda token: token not in ends, map(int, ids)))
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def describe(self, prompt, response):
        """One formatted example for people: each token between bars, special tokens in brackets."""
        end, pad = self.tokenizer.convert_ids_to_tokens([self.end_id, self.pad_id])
        lines = [f"{self.template} template, end of turn [{end}], padding [{pad}]"]
        for name, ids in zip(("prompt", "response"), _usable(self._encode([prompt], [response])[0]), strict=True):
            texts = map(self.tokenizer.decode, ids)
            shown = [f"[{text}]" if text in self._specials else repr(text)[1:-1] for text in texts]
            lines.append(f"{name} ({len(ids)} tokens)\n  {'|'.join(shown)}")
        return "\n".join(lines)

    @cached_property
    def fingerprint(self):
        """16 hex digits of vocabulary, merges, template and settings: equal only if every text formats alike."""
        settings = [self.template, None, self.max_length, self.end_id, self.pad_id]  # None: no system turn is added
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        content = {"settings": settings, "template": self._chat or None, "vocabulary": vocabulary}
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            past = ("truncation", "padding")  # left over from the last call; they do not change our ids
            content["backend"] = {k: v for k, v in json.loads(backend.to_str()).items() if k not in past}
        return digest(json.dumps(content, sort_keys=True))


def _usable(result):
    """The result of a step; PreferenceError where it is an Unusable."""
    if isinstance(result, Unusable):
        raise PreferenceError(f"cannot be formatted: {result}. Leave it out, mend it or raise max_length.") from result
    return result


def collate(sequences, pad_id, side="right"):
    """Pad lists of token ids on the "left" or "right": (input_ids, attention_mask), int64 [sequences, longest]."""
    rows = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
    masks = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, pad_id, padding_side=side), pad_sequence(masks, True, padding_side=side)
