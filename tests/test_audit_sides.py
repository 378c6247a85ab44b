"""What practitioners bring for base and aligned model: other vocabularies, contexts, templates and configurations."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_audit import ask, base, checkpoint, moved, pairs  # noqa: F401  fixtures
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlens import audit, models
from alignlens.core.errors import AlignlensError

CHAT = (
    "{% for m in messages %}{{ '<|open|>' + m['role'] + '\\n' + m['content'] + '<|close|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|open|>assistant\\n' }}{% endif %}"
)


def changed(base: Path, folder: Path, *, tokenizer=None, rows=0, **config) -> Path:  # noqa: F811
    """A copy of a base with another tokenizer, number of embeddings or configuration; the weights are moved."""
    moved(base, folder, size=0.2)
    with models.quietly():
        if rows:
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.resize_token_embeddings(rows, mean_resizing=False)
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def chat_tokens(base: Path):  # noqa: F811
    """A tokenizer with two tokens more than the base's, which its chat template uses."""
    found = AutoTokenizer.from_pretrained(base)
    found.add_tokens([AddedToken(text, special=True) for text in ("<|open|>", "<|close|>")], special_tokens=True)
    found.chat_template = CHAT
    return found


def test_added_chat_tokens_with_resized_embeddings(base, pairs, tmp_path):  # noqa: F811
    """The base is read in the aligned model's format; tokens that it never saw get its mean embedding."""
    tokenizer = chat_tokens(base)
    found = ask(base, changed(base, tmp_path / "a", tokenizer=tokenizer, rows=len(tokenizer)), pairs=pairs)
    assert found.base.rows == found.aligned.rows == len(tokenizer) == found.base.facts["vocabulary"] + 2
    assert found.format.end_id == tokenizer.convert_tokens_to_ids("<|close|>")
    embeddings = found.base.model.get_input_embeddings().weight
    assert embeddings[-1].tolist() == pytest.approx(embeddings[:-2].mean(0).tolist(), abs=1e-6)
    text = found.describe()
    assert "The base never saw 2 tokens of the format (<|open|>, <|close|>)" in text
    assert "2 tokens are only in the aligned model's tokenizer" in text
    assert found.section("behaviour")["numbers"]["kl"]["value"] > 0


@pytest.mark.parametrize("more", [8, -3])
def test_padded_and_cut_embeddings_are_no_other_model(base, pairs, tmp_path, more):  # noqa: F811
    """Rows beyond the last token, as some saving tools add or leave out, change nothing that is read."""
    tokens = len(AutoTokenizer.from_pretrained(base))
    padded = changed(base, tmp_path / "padded", rows=tokens + 8)
    first, second = (padded, base) if more < 0 else (base, padded)
    found = ask(first, second, pairs=pairs)
    assert any("has embeddings for" in note for note in found.notes)
    assert not any("never saw" in note for note in found.notes)


def test_tokens_that_only_the_aligned_tokenizer_has_fit_into_spare_embeddings(base, pairs, tmp_path):  # noqa: F811
    rows = len(AutoTokenizer.from_pretrained(base)) + 8
    spare = changed(base, tmp_path / "spare", rows=rows)
    found = ask(spare, changed(spare, tmp_path / "a", tokenizer=chat_tokens(base)), pairs=pairs)
    assert found.notes[0].startswith("The two tokenizers have different chat templates")
    assert "2 tokens are only in the aligned model's tokenizer" in found.notes[1] and len(found.notes) == 2


def renamed(base: Path, folder: Path, old: str, new: str) -> Path:  # noqa: F811
    """A copy whose tokenizer calls a token by another name."""
    changed(base, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(json.dumps(old), json.dumps(new)))
    return folder


def test_a_renamed_reserved_token_is_noted(base, pairs, tmp_path):  # noqa: F811
    reserved = AutoTokenizer.from_pretrained(base)
    reserved.add_tokens([AddedToken("<|reserved_0|>", special=True)], special_tokens=True)
    spare = changed(base, tmp_path / "spare", tokenizer=reserved, rows=len(reserved))
    found = ask(spare, renamed(spare, tmp_path / "a", "<|reserved_0|>", "<|tool|>"), pairs=pairs)
    assert "1 added tokens have other names" in found.notes[0] and "<|reserved_0|> is <|tool|>" in found.notes[0]


def test_a_token_of_the_text_with_another_name_is_another_vocabulary(base, pairs, tmp_path):  # noqa: F811
    with pytest.raises(AlignlensError, match="tokenizers differ in 1 of .* tokens, '~' first"):
        ask(base, renamed(base, tmp_path / "a", "~", "zz"), pairs=pairs)


def test_of_two_contexts_the_smaller_holds(base, pairs, tmp_path):  # noqa: F811
    found = ask(base, changed(base, tmp_path / "a", max_position_embeddings=160), pairs=pairs)
    assert found.context == found.format.max_length == 160
    assert "The base takes 192 tokens, the aligned model 160: the smaller holds." in found.notes
    assert found.section("behaviour")["status"] == found.section("signal")["status"] == "measured"


@pytest.mark.parametrize(
    ("name", "value", "same"), [("rms_norm_eps", 0.01, False), ("made_up", 3, True), ("attention_dropout", 0.1, None)]
)
def test_the_same_weights_are_identical_only_if_they_compute_the_same(base, pairs, tmp_path, name, value, same):  # noqa: F811
    folder = tmp_path / "a"
    with models.quietly():
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    found = ask(base, folder, pairs=pairs)
    assert found.base.facts["weights"] == found.aligned.facts["weights"]
    assert found.identical is (same is not False)
    assert bool(found.config_differs) is (same is not None)
    noted = [
        note for note in found.notes if re.match(rf"Configurations differ: {name} is .* in the base, {value}", note)
    ]
    assert len(noted) == (same is not None)


def test_a_wrong_model_is_told_before_the_pairs_are_read(base, tmp_path):  # noqa: F811
    with pytest.raises(AlignlensError, match="no such folder"):
        audit.Audit(audit.request(base=str(tmp_path / "none"), aligned=str(base)))


def test_a_model_of_another_size_is_refused(base, pairs, tmp_path):  # noqa: F811
    other = checkpoint(tmp_path / "other", "llama")
    with models.quietly():
        model = AutoModelForCausalLM.from_pretrained(other)
        model.config.intermediate_size = 40
        type(model)(model.config).save_pretrained(other)
    with pytest.raises(AlignlensError, match="weight .*mlp.* is .* in the base and .* in the aligned model"):
        ask(base, other, pairs=pairs)


def test_an_adapter_on_one_end_of_tied_embeddings_changes_the_head_alone(pairs, tmp_path):  # noqa: F811
    base = checkpoint(tmp_path / "base", "qwen3")  # noqa: F811
    with models.quietly():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["lm_head"]))
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn_like(weight) * weight.requires_grad
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = ask(base, adapter=tmp_path / "adapter", pairs=pairs)
    assert any("has weights of its own" in note for note in found.notes)
    moved = {name for name, weight in found.aligned.model.named_parameters()
             if not torch.equal(weight, dict(found.base.model.named_parameters())[name])}  # fmt: skip
    assert moved == {"lm_head.weight"}
    assert found.section("behaviour")["numbers"]["kl"]["value"] > 0
