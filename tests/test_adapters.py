"""Adapters of every kind: merged they give the logits that they give beside their base, or a sentence says why not."""

import copy
import json
import shutil

import peft
import pytest
import torch
from huggingface_hub import constants
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3MoeConfig

from alignlens import activations, models
from alignlens.core.errors import ModelError

SIZE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip
IDS = (torch.arange(24) * 37 % 260).reshape(2, 12)
ATTENTION = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
TEXT = {"task_type": "CAUSAL_LM"}
KINDS = {
    "lora": peft.LoraConfig(**ATTENTION),
    "dora": peft.LoraConfig(use_dora=True, **ATTENTION),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TEXT),
    "loha": peft.LoHaConfig(**ATTENTION),
    "lokr": peft.LoKrConfig(**ATTENTION),
    "adalora": peft.AdaLoraConfig(total_step=10, **ATTENTION),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, **ATTENTION),
    "boft": peft.BOFTConfig(boft_block_size=4, **ATTENTION),
    "layer norm": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"], **TEXT),
    "shira": peft.ShiraConfig(r=2, **ATTENTION),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **TEXT),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **ATTENTION),
    "hra": peft.HRAConfig(r=4, **ATTENTION),
    "pissa": peft.LoraConfig(init_lora_weights="pissa", **ATTENTION),
}
WHOLE = {  # of which no layer can be missing
    "tokens": peft.TrainableTokensConfig(token_indices=[0, 37, 74], target_modules=["embed_tokens"], **TEXT),
    "lora and a norm": peft.LoraConfig(modules_to_save=["norm"], **ATTENTION),
    "biases": peft.LoraConfig(bias="lora_only", **ATTENTION),
}
TIED = {
    "embeddings": peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], **TEXT),
    "head": peft.LoraConfig(target_modules=["lm_head", "q_proj"], **TEXT),
    "saved embeddings": peft.LoraConfig(modules_to_save=["embed_tokens"], **ATTENTION),
    "saved head": peft.LoraConfig(modules_to_save=["lm_head"], **ATTENTION),
}
VIRTUAL = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, **TEXT),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, **TEXT),
    "p tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **TEXT),
    "adaption prompt": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **TEXT),
    "activated LoRA": peft.LoraConfig(alora_invocation_tokens=[5, 6], **ATTENTION),
}


def save_base(folder, config):
    tokenizer = models.train_tokenizer(["a quiet town"] * 9, vocab_size=300, bos=True)
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama whose embeddings and head are one weight."""
    return save_base(tmp_path_factory.mktemp("models") / "base", LlamaConfig(**SIZE, tie_word_embeddings=True))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits[:, -IDS.shape[1] :]


def save_adapter(base, config, folder):
    """A random adapter in the folder; returns the logits that it gives beside its base."""
    with models.quietly():
        tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in (w for w in tuned.parameters() if w.requires_grad and w.is_floating_point()):
                weight.add_(0.2 * torch.randn_like(weight))
        tuned.save_pretrained(folder)
        return logits(tuned)


def adapter(base, config, folder):
    save_adapter(base, config, folder)
    return folder


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def settings(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def on_hub(folder, repo, cache, monkeypatch, revision="main"):
    """The folder as the hub's cache holds it."""
    commit = "0123456789" * 4
    place = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return repo


# --- every kind -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS | WHOLE)
def test_every_kind_merges_exactly(base, kind, tmp_path):
    beside = save_adapter(base, (KINDS | WHOLE)[kind], tmp_path)
    merged, _ = models.load(base, tmp_path)
    torch.testing.assert_close(logits(merged), beside, atol=1e-4, rtol=1e-4)
    assert (beside - logits(models.load(base)[0])).abs().max() > 0.01
    assert models.notes(merged) == []
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("kind", KINDS | {"tokens": 0})
def test_a_foreign_prefix_is_refused_wherever_it_is(base, kind, place, tmp_path, monkeypatch):
    source = adapter(base, (KINDS | WHOLE)[kind], tmp_path / "own")
    rewrite(source, lambda w: {name.replace("base_model.model.", "base_model.net."): v for name, v in w.items()})
    if place == "hub":
        source = on_hub(source, "org/adapter", tmp_path / "cache", monkeypatch)
    with pytest.raises(ModelError, match="does not fit the model: its file lacks .*It needs the base"):
        models.load(base, source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_layer_is_refused_and_named(base, kind, tmp_path):
    rewrite(adapter(base, KINDS[kind], tmp_path), lambda w: {n: v for n, v in w.items() if ".layers.1." not in n})
    with pytest.raises(ModelError, match=r"its file lacks \d+ of its weights, model\.layers\.1\..* first"):
        models.load(base, tmp_path)


def test_a_layer_too_many_is_refused_and_named(base, tmp_path):
    rewrite(adapter(base, KINDS["lora"], tmp_path), lambda w: w | {
        name.replace(".layers.1.", ".layers.2."): v.clone() for name, v in w.items() if ".layers.1." in name
    })  # fmt: skip
    with pytest.raises(ModelError, match=r"the model has no place for 4 of its weights, model\.layers\.2\."):
        models.load(base, tmp_path)


@pytest.mark.parametrize(("kind", "lost"), [("lora and a norm", "norm.weight"), ("biases", "q_proj.base_layer.bias")])
def test_what_an_adapter_saves_besides_is_looked_for_too(base, kind, lost, tmp_path):
    config = LlamaConfig(**SIZE, attention_bias=True)
    biased = save_base(tmp_path / "biased", config)
    folder = adapter(biased, WHOLE[kind], tmp_path / "adapter")
    rewrite(folder, lambda w: {name: v for name, v in w.items() if not name.endswith(lost)})
    with pytest.raises(ModelError, match=f"its file lacks .*{lost}"):
        models.load(biased, folder)


def test_an_adapter_by_hub_id_and_revision(base, tmp_path, monkeypatch):
    beside = save_adapter(base, KINDS["lora"], tmp_path / "own")
    on_hub(tmp_path / "own", "org/adapter", tmp_path / "cache", monkeypatch, revision="v2")
    torch.testing.assert_close(logits(models.load(base, "org/adapter@v2")[0]), beside, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="'org/adapter' cannot be loaded: the hub cannot be reached"):
        models.load(base, "org/adapter")


@pytest.mark.parametrize("kind", VIRTUAL)
def test_what_is_no_change_of_weights_is_refused_by_its_kind(base, kind, tmp_path):
    folder = adapter(base, VIRTUAL[kind], tmp_path)
    with pytest.raises(ModelError, match=f"is .*{kind}: it .* weights.*; train an adapter that can be merged"):
        models.load(base, folder)


@pytest.mark.parametrize("start", ["pissa_niter_4", "lora_ga", "corda"])
def test_a_start_that_changed_the_base_and_is_not_stored_is_refused(base, start, tmp_path):
    settings(adapter(base, KINDS["lora"], tmp_path), init_lora_weights=start)
    with pytest.raises(ModelError, match=f"{start}.* changed in a way that its files do not tell"):
        models.load(base, tmp_path)


def test_lora_biases_need_a_bias_to_go_into(base, tmp_path):
    config = peft.LoraConfig(lora_bias=True, **ATTENTION)
    with pytest.raises(ModelError, match="does not fit the model: .*base layer has no bias"):
        models.load(base, adapter(base, config, tmp_path / "none"))
    biased = save_base(tmp_path / "biased", LlamaConfig(**SIZE, attention_bias=True))
    beside = save_adapter(biased, config, tmp_path / "own")
    torch.testing.assert_close(logits(models.load(biased, tmp_path / "own")[0]), beside, atol=1e-4, rtol=1e-4)


def test_a_merge_that_changes_the_model_is_refused(base, tmp_path, monkeypatch):
    adapter(base, KINDS["lora"], tmp_path)
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda self, **options: None)
    with pytest.raises(ModelError, match="merged into the weights it gives other logits than beside them"):
        models.load(base, tmp_path)


def test_per_expert_keys_of_a_mixture_are_fused_exactly(tmp_path):
    """Checkpoints from before experts were fused hold one LoRA an expert: each adds B @ A to its own expert."""
    size = SIZE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    base = save_base(tmp_path / "moe", Qwen3MoeConfig(**size))
    names = ["gate_proj", "up_proj", "down_proj"]
    weights, want = {}, AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(2)
    for layer, block in enumerate(want.model.layers):
        for expert in range(4):
            for name in names:
                inner, outer = (16, 32) if name == "down_proj" else (32, 16)
                a, b = 0.2 * torch.randn(2, inner), 0.2 * torch.randn(outer, 2)
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                weights |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                fused = block.mlp.experts.down_proj if name == "down_proj" else block.mlp.experts.gate_up_proj
                rows = slice(16, None) if name == "up_proj" else slice(None, outer)
                fused.data[expert, rows] += b @ a
    folder = tmp_path / "adapter"
    peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, **TEXT).save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(models.load(base, folder)[0]), logits(want), atol=1e-4, rtol=1e-4)
    rewrite(folder, lambda w: {n: v for n, v in w.items() if ".layers.1." not in n})
    with pytest.raises(ModelError, match=r"its file lacks \d+ of its weights, model\.layers\.1\.mlp\.experts"):
        models.load(base, folder)


# --- tied embeddings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TIED)
def test_an_adapter_on_one_end_of_tied_embeddings_leaves_the_other(base, kind, tmp_path):
    beside = save_adapter(base, TIED[kind], tmp_path / "adapter")
    start = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    merged, _ = models.load(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), beside, atol=1e-4, rtol=1e-4)
    ends = [merged.state_dict()[name] for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert [torch.equal(end, start) for end in ends] == (["head" in kind, "head" not in kind])
    assert not merged.config.tie_word_embeddings
    assert "head has weights of its own" in models.notes(merged)[0]
    with torch.no_grad():
        torch.testing.assert_close(activations.bridge(merged)(IDS), beside, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), beside)
    other, _ = models.load(base, tmp_path / "adapter")
    models.interpolate(models.load(base)[0], other, 0.0)
    torch.testing.assert_close(logits(other), logits(models.load(base)[0]))


def test_an_adapter_elsewhere_leaves_embeddings_tied(base, tmp_path):
    merged, _ = models.load(base, adapter(base, WHOLE["tokens"], tmp_path))
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight


# --- what lies beside it --------------------------------------------------------------------------------------------


def test_an_adapter_beside_merged_weights_is_not_applied_again(base, tmp_path):
    folder = adapter(base, KINDS["lora"], tmp_path / "adapter")
    models.load(base, folder)[0].save_pretrained(tmp_path / "merged")
    for file in [*folder.glob("adapter_*"), *base.glob("token*"), *base.glob("*.jinja")]:
        shutil.copy(file, tmp_path / "merged")
    again, _ = models.load(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(models.load(base, folder)[0]))
    assert models.notes(again) == [
        "Adapter files beside the model's weights were not applied; to apply them, give them as adapter."
    ]


def test_a_resized_vocabulary_comes_with_its_adapter(base, tmp_path):
    model, tokenizer = models.load(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    model.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    tuned = peft.get_peft_model(model, copy.deepcopy(KINDS["lora"])).eval()
    tuned.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    merged, own = models.load(base, tmp_path)
    torch.testing.assert_close(logits(merged), logits(tuned), atol=1e-4, rtol=1e-4)
    assert len(own) == len(tokenizer) and "it differs from the base's in: tokens" in models.notes(merged)[0]
    rewrite(tmp_path, lambda w: {n: v[:-1] if n.endswith("embed_tokens.weight") else v for n, v in w.items()})
    with pytest.raises(ModelError, match="does not fit the model"):
        models.load(base, tmp_path)


@pytest.mark.parametrize("form", ["tokenizer", "template", "settings"])
def test_an_adapters_own_format_is_used_and_noted(base, form, tmp_path):
    adapter(base, KINDS["lora"], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    own = tokenizer.chat_template.replace("<|user|>", "<|user|>Q: ")
    if form == "template":
        (tmp_path / "chat_template.jinja").write_text(own)
    elif form == "settings":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
    else:
        tokenizer.chat_template = own
        tokenizer.save_pretrained(tmp_path)
    model, found = models.load(base, tmp_path)
    assert found.chat_template == own
    assert models.notes(model) == ["The adapter's own tokenizer is used; it differs from the base's in: chat template."]


def test_an_adapters_tokenizer_like_its_bases_is_no_news(base, tmp_path):
    adapter(base, KINDS["lora"], tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    assert models.notes(models.load(base, tmp_path)[0]) == []


def test_an_adapter_trained_on_other_ids_is_refused(base, tmp_path):
    adapter(base, KINDS["lora"], tmp_path)
    shutil.copy(base / "tokenizer_config.json", tmp_path)
    swapped = json.loads((base / "tokenizer.json").read_text())
    words = swapped["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(ModelError, match="its tokenizer and the base's give 2 tokens different ids, 'a' first"):
        models.load(base, tmp_path)


@pytest.mark.parametrize(("named", "noted"), [(None, 0), ("org/Base", 0), ("/gone/base", 0), ("org/other", 1)])
def test_an_adapter_made_for_another_base_is_noted(base, named, noted, tmp_path):
    settings(adapter(base, KINDS["lora"], tmp_path), base_model_name_or_path=named)
    notes = models.notes(models.load(base, tmp_path)[0])
    assert len(notes) == noted and all("names 'other' as its base and was put on 'base'" in note for note in notes)


def test_settings_that_peft_does_not_know_are_noted(base, tmp_path):
    settings(adapter(base, KINDS["lora"], tmp_path), use_tomorrow=True, enable_nothing=None)
    assert "settings use_tomorrow; they are ignored" in models.notes(models.load(base, tmp_path)[0])[0]


def test_a_damaged_adapter_is_refused(base, tmp_path):
    rewrite(adapter(base, KINDS["lora"], tmp_path), lambda w: {name: v * torch.nan for name, v in w.items()})
    with pytest.raises(ModelError, match=r"its model\.layers\.0\..* holds NaN"):
        models.load(base, tmp_path)


def test_an_unknown_kind_is_refused(base, tmp_path):
    settings(adapter(base, KINDS["lora"], tmp_path), peft_type="TOMORROW")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*TOMORROW"):
        models.load(base, tmp_path)


def test_nothing_of_an_adapter_is_said_in_the_log(base, tmp_path, caplog, recwarn, capfd):
    adapter(base, TIED["head"], tmp_path)
    recwarn.clear()
    caplog.clear()
    capfd.readouterr()
    models.load(base, tmp_path)
    assert not recwarn.list and not caplog.records and capfd.readouterr() == ("", "")


# --- places ---------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(base, tmp_path, monkeypatch):
    adapter(base, KINDS["lora"], tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "base")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert logits(models.load("~/base", "~/adapter")[0]).shape == (2, 12, len(AutoTokenizer.from_pretrained(base)))
    assert models.describe("~/base")["layers"] == 2


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_adapter_in_place_of_a_model_names_its_base(base, place, tmp_path, monkeypatch):
    source = adapter(base, KINDS["lora"], tmp_path / "adapter")
    settings(source, base_model_name_or_path="org/base")
    if place == "hub":
        source = on_hub(source, "org/adapter", tmp_path / "cache", monkeypatch)
    with pytest.raises(ModelError, match="it is an adapter for org/base; give an adapter beside its base"):
        models.load(source)


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_a_hub_out_of_reach_is_asked_once(base, what, hub_away, caplog):
    with pytest.raises(ModelError, match=rf"^{what} 'some/thing' cannot be loaded: the hub cannot be reached, and the"):
        models.load(*(["some/thing"] if what == "model" else [base, "some/thing"]))
    assert hub_away == [constants.ENDPOINT] and not caplog.records and constants.HF_HUB_OFFLINE is False
