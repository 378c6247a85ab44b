"""Shared by the tests: no network, one thread, and a micro base that is trained once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlens import align, models, preferences
from alignlens.core import hub
from alignlens.preferences import Formatter, tinyworld

torch.set_num_threads(1)


@dataclass
class Micro:
    """A micro base, the pairs of its world, and its formatter."""

    folder: Path
    train: pd.DataFrame
    heldout: pd.DataFrame

    @property
    def format(self) -> Formatter:
        return Formatter(AutoTokenizer.from_pretrained(self.folder), max_length=96)

    def recipe(self, method: str, **changes) -> align.Recipe:
        settings = {
            "learning_rate": 3e-3, "steps": 3, "batch_size": 8, "max_length": 96, "response_tokens": 16,
            "lora_rank": 4, "lora_alpha": 8, "stop": "last", "check_every": 2, "check_prompts": 6,
        }  # fmt: skip
        return align.Recipe(method, **settings | changes)


@pytest.fixture(scope="session")
def smoke_store(tmp_path_factory) -> Path:
    """One store for all tests that run the smoke preset: its models are trained once."""
    return tmp_path_factory.mktemp("smoke") / "store"


@pytest.fixture(scope="session")
def world() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs to train on and held-out pairs of the tiny world."""
    pairs = preferences.split_by_prompt(preferences.load_pairs(tinyworld.pairs(160)), reward=0.25, measure=0.25)
    return tuple(pairs[pairs.split == name].reset_index(drop=True) for name in ("train", "reward"))


def _micro(folder, architecture, world, steps) -> Micro:
    text = tinyworld.corpus(16 * steps, exclude=world[1].prompt)
    models.pretrain(
        folder, architecture, list(zip(text.prompt, text.response, strict=True)), layers=2, d_model=32,
        vocab_size=600, steps=steps, batch_size=16, learning_rate=1e-2, seed=0,
    )  # fmt: skip
    return Micro(folder, *world)


@pytest.fixture(scope="session")
def micro(tmp_path_factory, world) -> Micro:
    """A micro Llama: two layers of width 32, with a begin-of-text token."""
    return _micro(tmp_path_factory.mktemp("llama"), "llama", world, 80)


@pytest.fixture(scope="session")
def no_bos(tmp_path_factory, world) -> Micro:
    """A micro Qwen3, whose format has no begin-of-text token."""
    return _micro(tmp_path_factory.mktemp("qwen3"), "qwen3", world, 80)


@pytest.fixture(scope="session")
def two_ends(micro, tmp_path_factory) -> Micro:
    """The micro Llama where turns end with another token than texts do, and without a padding token, as Llama 3 has."""
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer = AutoTokenizer.from_pretrained(micro.folder)
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    tokenizer.pad_token = None
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|user|>\n\n")
    tokenizer.save_pretrained(folder)
    with models.quietly():
        model = AutoModelForCausalLM.from_pretrained(micro.folder)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
    return Micro(folder, micro.train, micro.heldout)


@pytest.fixture(scope="session")
def reward(micro, tmp_path_factory) -> Path:
    """A reward adapter of the micro base."""
    folder = tmp_path_factory.mktemp("reward")
    align.train_reward(folder, micro.folder, micro.train, micro.recipe("reward", steps=6))
    return folder


def utility(prompts, responses):
    """The tiny world's judge, as a reward."""
    return tinyworld.score(list(prompts), list(responses)).utility.to_numpy()


@pytest.fixture
def hub_away(monkeypatch):
    """A hub that does not answer; the addresses that were asked."""
    asked = []

    class Session:
        def head(self, url, **options):
            asked.append(url)
            raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "get_session", Session)
    return asked
