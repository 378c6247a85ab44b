"""Prompts: as one string of one or several turns, by their ids, and whole in splits and folds."""

import hashlib
import json
import unicodedata
from numbers import Integral

import numpy as np

from alignlens.core.errors import PreferenceError

SPLITS = ("train", "reward", "measure")
TURN, CONTENT = "\x1e", "\x1f"  # ASCII record and unit separators: they do not occur in written text


class Unusable(PreferenceError):
    """Why one row cannot be used, the field if it is one, and of which kind (counted in the report) that is."""

    def __init__(self, words, field=None, kind="turns"):
        super().__init__(f"field {field!r}: {words}" if field else words)
        self.kind = kind


def refuse_if(found, words, field=None, kind="turns"):
    """Raise Unusable where a problem was found."""
    if found:
        raise Unusable(words, field, kind)


def attempt(step, *given):
    """What a step makes of one row, or the Unusable that it raises or that an earlier step left."""
    try:
        return next((one for one in given if isinstance(one, Unusable)), None) or step(*given)
    except Unusable as refused:
        return refused


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


def digest(text):
    """16 hex digits that name a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prompt_id(prompt):
    """16 hex digits from the prompt's turns; unicode form (NFC) and runs of white space do not count."""
    parts = ((turn["role"], unicodedata.normalize("NFC", turn["content"])) for turn in turns(prompt))
    return digest(TURN.join(role + CONTENT + " ".join(content.split()) for role, content in parts))


def require_columns(pairs, *names):
    """PreferenceError for the first of ``names`` that the table of pairs lacks, saying what makes it."""
    if missing := [name for name in names if name not in pairs.columns]:
        maker = "split_by_prompt" if missing[0] == "split" else "load_pairs"
        raise PreferenceError(f"the pairs have no column {missing[0]!r}: make them with {maker}.")


def require_count(value, name):
    """PreferenceError unless ``value`` is None or a whole number of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise PreferenceError(f"{name}={value!r}: give a whole number of at least 1, or None.")


def check_folds(pairs, folds):
    """Raise PreferenceError when ``pairs`` holds fewer prompts than ``folds``."""
    require_columns(pairs, "prompt_id")
    if (prompts := pairs["prompt_id"].nunique()) < folds:
        raise PreferenceError(f"{prompts} prompts cannot fill {folds} folds, since none is cut: load more.")


def split_by_prompt(pairs, *, reward=0.2, measure=0.3, seed=0):
    """A copy with the column ``split``: whole prompts assigned to train, reward and measure.

    A prompt's place depends on the hash of (seed, prompt_id) alone, so it stays when rows come and go, and shares are
    met up to chance (about 1 percentage point at 2 000 prompts). No method and no reward model trains on ``measure``.
    Raises PreferenceError for an empty split."""
    if min(reward, measure) < 0 or reward + measure >= 1:
        raise PreferenceError(f"reward={reward}, measure={measure}: shares are at least 0 and add up to less than 1.")
    require_columns(pairs, "prompt_id")
    ids = pairs["prompt_id"].unique()
    place = np.array([int(digest(f"{seed}:{one}"), 16) for one in ids]) / 2.0**64
    names = np.select([place < measure, place < measure + reward], ["measure", "reward"], "train")
    for name, share in zip(SPLITS, (1 - reward - measure, reward, measure), strict=True):
        if share > 0 and name not in names:
            few = f"{len(ids)} prompts at a share of {share:.2g}"
            raise PreferenceError(f"split {name!r} would be empty: {few}. Load more prompts or raise its share.")
    return pairs.assign(split=pairs["prompt_id"].map(dict(zip(ids, names, strict=True))))


def split_hash(pairs):
    """16 hex digits that name the assignment of prompts to splits, whatever the row order."""
    require_columns(pairs, "prompt_id", "split")
    return digest(json.dumps(sorted(set(zip(pairs["prompt_id"], pairs["split"], strict=True)))))
