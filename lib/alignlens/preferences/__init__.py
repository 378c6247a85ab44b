"""Preference pairs: load them, check them, split them by prompt, and format them for a model.

A prompt is always one string, so tables stay plain in any file format. A single user turn is that turn's text. Any
other prompt (several turns, a system turn) is written turn by turn as ``\\x1e`` role ``\\x1f`` content, without loss:
``join_turns`` writes it and ``turns`` reads it back. Responses are the text of one assistant turn.
"""

from alignlens.preferences.formatting import Encoded, Formatter, collate
from alignlens.preferences.loading import COLUMNS, SUFFIXES, describe_report, load_pairs
from alignlens.preferences.prompts import SPLITS, check_folds, join_turns, prompt_id, split_by_prompt, split_hash, turns

__all__ = [
    "COLUMNS", "SPLITS", "SUFFIXES", "Encoded", "Formatter", "check_folds", "collate", "describe_report", "join_turns",
    "load_pairs", "prompt_id", "split_by_prompt", "split_hash", "turns",
]  # fmt: skip
