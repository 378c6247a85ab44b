"""More of what practitioners bring: each is read where it can be, and else refused in one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_audit import ask, base, checkpoint, moved, pairs, tokenizer  # noqa: F401  fixtures
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from alignlens import models
from alignlens.core.errors import AlignlensError
from alignlens.preferences import load_pairs, tinyworld

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(base, tmp_path):  # noqa: F811
    return shutil.copytree(base, tmp_path / "copy")


def rewrite(folder, change):
    """Weights of a checkpoint as ``change`` (name, weight) makes them."""
    changed = dict(change(name, weight) for name, weight in load_file(folder / WEIGHTS).items())
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})


def identical(base, folder, pairs):  # noqa: F811
    return ask(base, folder, pairs=pairs).identical


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_that_a_wrapper_left_behind(base, copied, pairs, prefix):  # noqa: F811
    rewrite(copied, lambda name, weight: (prefix + name, weight))
    assert identical(base, copied, pairs)


def test_a_link_and_a_name_with_spaces(base, copied, pairs, tmp_path):  # noqa: F811
    link = tmp_path / "a link, \u00fc"
    link.symlink_to(copied)
    assert identical(base, f"{link}/", pairs)


def test_settings_of_a_tokenizer_that_would_cut_texts(base, copied, pairs):  # noqa: F811
    file = copied / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": cut}))
    file = copied / "tokenizer_config.json"
    words = {"model_max_length": 16, "padding_side": "left", "truncation_side": "left"}
    file.write_text(json.dumps(json.loads(file.read_text()) | words))
    assert ask(base, copied, pairs=pairs).encoded.report["longest_tokens"] > 64


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n"])
def test_answers_that_end_with_the_written_end_token(base, pairs, tmp_path, end):  # noqa: F811
    table = load_pairs(pairs)[["prompt", "chosen", "rejected"]]
    ended = table.assign(chosen=table.chosen + end, rejected=table.rejected + end)
    ended.to_json(tmp_path / "a.json", orient="records")
    found, plain = (ask(base, base, pairs=file) for file in (tmp_path / "a.json", pairs))
    assert found.encoded.chosen_ids == plain.encoded.chosen_ids
    assert found.encoded.rejected_ids == plain.encoded.rejected_ids
    assert any("Of 40 pairs an end-of-turn token" in note for note in found.notes) and not plain.notes


def test_a_file_in_utf_16(pairs, tmp_path):  # noqa: F811
    (tmp_path / "wide.jsonl").write_bytes(pairs.read_text().encode("utf-16"))
    assert load_pairs(tmp_path / "wide.jsonl").equals(load_pairs(pairs))


def test_an_encoder_is_no_causal_model(tmp_path, pairs):  # noqa: F811
    found = tokenizer(chat=True)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    with models.quietly():
        BertForMaskedLM(BertConfig(vocab_size=len(found), **size)).save_pretrained(tmp_path)
        found.save_pretrained(tmp_path)
    with pytest.raises(AlignlensError, match="depends on later ones: it is no causal language model"):
        ask(tmp_path, tmp_path, pairs=pairs)


def test_a_reward_model_writes_no_answers(base, pairs, tmp_path):  # noqa: F811
    with models.quietly():
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path)
        models.load_tokenizer(base).save_pretrained(tmp_path)
    with pytest.raises(AlignlensError, match="is a classifier or reward model, not one that writes answers"):
        ask(base, tmp_path, pairs=pairs)


def test_codes_of_a_quantisation_are_no_weights(base, copied, pairs):  # noqa: F811
    rewrite(copied, lambda name, weight: (name, (weight * 100).to(torch.int8) if weight.dim() > 1 else weight))
    with pytest.raises(AlignlensError, match="holds codes of type I8, and nothing says how to read them"):
        ask(base, copied, pairs=pairs)


@pytest.mark.parametrize("damage", ["cut", "pointer", "tokenizer"])
def test_half_a_download(base, copied, pairs, damage):  # noqa: F811
    if damage == "pointer":
        (copied / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    else:
        file = copied / (WEIGHTS if damage == "cut" else "tokenizer.json")
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(AlignlensError, match="cannot be loaded: .* whole and of one model"):
        ask(base, copied, pairs=pairs)


def test_an_answer_in_a_language_without_spaces_and_beyond_the_vocabulary(base, tmp_path):  # noqa: F811
    table = tinyworld.pairs(30)[["prompt", "chosen", "rejected"]]
    table["chosen"] = "\u6771\u4eac\u3067\u3059\u3002\U0001f5fc" + table.chosen.str[:20]
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    found = ask(base, base, pairs=tmp_path / "a.jsonl")
    assert all(found.format.decode(ids).startswith("\u6771\u4eac") for ids in found.encoded.chosen_ids)
