"""Models: load a base, an aligned checkpoint or an adapter; train a tiny base; score and sample; edit weights.

Everything that runs a language model outside its internals lives here. Prompts and responses arrive as token ids, made
by one ``preferences.Formatter``."""

from alignlens.models.editing import interpolate, random_adapter
from alignlens.models.loading import check, describe, load, load_reward, load_tokenizer, notes, score_model
from alignlens.models.scoring import batches, response_kl, response_logprobs, rewards, sample, token_kl, token_logprobs
from alignlens.models.session import default_device, one_thread, quietly
from alignlens.models.sources import pinned
from alignlens.models.tiny import pretrain, train_tokenizer

__all__ = [
    "batches", "check", "default_device", "describe", "interpolate", "load", "load_reward", "load_tokenizer",
    "notes", "one_thread", "pinned", "pretrain", "quietly", "random_adapter", "response_kl", "response_logprobs",
    "rewards", "sample", "score_model", "token_kl", "token_logprobs", "train_tokenizer",
]  # fmt: skip
