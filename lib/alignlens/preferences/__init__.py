"""Preference pairs: load them, check them, split them by prompt, and format them for a model.

A prompt is one string, so tables stay plain in any file format: the text of a single user turn, or else (several turns,
a system turn) each turn as ``\\x1e`` role ``\\x1f`` content, which ``join_turns`` writes and ``turns`` reads back.
Responses are the text of one assistant turn."""

from alignlens.preferences.formatting import Encoded, Formatter, collate
from alignlens.preferences.loading import COLUMNS, NOTED, describe_report, load_pairs
from alignlens.preferences.prompts import SPLITS, check_folds, join_turns, prompt_id, split_by_prompt, split_hash, turns
from alignlens.preferences.reading import is_local

__all__ = [
    "COLUMNS", "NOTED", "SPLITS", "Encoded", "Formatter", "check_folds", "collate", "describe_report", "is_local",
    "join_turns", "load_pairs", "prompt_id", "split_by_prompt", "split_hash", "turns",
]  # fmt: skip
