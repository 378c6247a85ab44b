"""Conversations that templates treat in ways of their own: reasoning traces, turns that a template refuses."""

import pandas as pd
import pytest
from test_preferences import CHATML, make_tokenizer

from alignlens.preferences import Formatter, join_turns

MESSAGE = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
SPLIT = "{% set parts = m['content'].split('</think>') %}"
SHOWN = (
    SPLIT + "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + parts[-1].lstrip('\\n')"
    " + '<|im_end|>\\n' }}"
)
HIDDEN = SPLIT + "{{ '<|im_start|>assistant\\n' + parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
SWITCH = "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"


def template(answer, opens):
    """A template whose last answer is written by ``answer``, and whose generation prompt ends with ``opens``."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}" + answer
        + "{% else %}" + MESSAGE
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + opens
        + "{% endif %}"
    )  # fmt: skip


ALWAYS = "{{ '<think>\\n' }}"
# How the families write traces: a switch with an empty block, always thinking, always thinking and no traces rendered.
KINDS = {"switch": (SHOWN, SWITCH), "always": (SHOWN, ALWAYS), "hidden": (HIDDEN, ALWAYS), "none": (MESSAGE, "")}
TRACE = "<think>\nA dog runs.\n</think>\n\nBlue."


@pytest.mark.parametrize("kind", KINDS)
def test_a_reasoning_trace_belongs_to_the_answer_that_holds_it(kind):
    formatter = Formatter(make_tokenizer(template(*KINDS[kind])))
    pairs = [(TRACE, TRACE.replace("dog", "friend")), (TRACE, "A dog."), ("Blue.", "A dog.")]
    pairs = pd.DataFrame([{"prompt": "Name a colour.", "chosen": c, "rejected": r} for c, r in pairs])
    encoded = formatter.encode_pairs(pairs)
    assert encoded.kept.all() and encoded.report["thinking"] == 2
    prompts, chosen, rejected = (
        [formatter.tokenizer.decode(ids) for ids in lists]
        for lists in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)
    )
    opened = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    opens = "<think>\n" if kind in ("always", "hidden") else ""
    closed = "" if kind == "none" else "<think>\n\n</think>\n\n"
    assert prompts == [opened + opens, opened + opens, opened + closed]
    assert chosen == [TRACE.removeprefix(opens) + "<|im_end|>"] * 2 + ["Blue.<|im_end|>"]
    assert rejected[0] == chosen[0].replace("dog", "friend")
    # beside a trace, an answer without one thinks of nothing
    assert rejected[1] == {"switch": closed, "none": ""}.get(kind, "</think>\n\n") + "A dog.<|im_end|>"
    assert rejected[2] == "A dog.<|im_end|>"


def test_what_one_answer_holds_changes_no_other_pair():
    formatter = Formatter(make_tokenizer(template(*KINDS["switch"])))
    plain = pd.DataFrame([{"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "A dog."}])
    both = pd.concat([plain, plain.assign(chosen=TRACE)], ignore_index=True)
    alone, beside = formatter.encode_pairs(plain), formatter.encode_pairs(both)
    assert (alone.prompt_ids[0], alone.chosen_ids[0]) == (beside.prompt_ids[0], beside.chosen_ids[0])


def test_turns_that_a_template_refuses_are_dropped_and_counted():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    system = join_turns([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}])
    pairs = pd.DataFrame({"prompt": ["Hi", system], "chosen": "Blue.", "rejected": "A dog."})
    formatter = Formatter(make_tokenizer(strict))
    encoded = formatter.encode_pairs(pairs)
    assert encoded.kept.tolist() == [True, False] and encoded.report["template"] == 1
    with pytest.raises(Exception, match="Row 1: the chat template refuses turns of roles system, user: no system turn"):
        formatter.encode_pairs(pairs[1:])
