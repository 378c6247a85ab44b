"""Models: what is loaded is checked, and scores and samples do not depend on batches or padding."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
)

from alignlens import models
from alignlens.core.errors import ModelError
from alignlens.models.tiny import ARCHITECTURES


@pytest.fixture(scope="module")
def loaded(micro):
    return models.load(micro.folder)[0]


@pytest.fixture(scope="module")
def rows(micro):
    """Twelve pairs' (prompt ids, chosen ids), of many lengths."""
    table, f = micro.train.head(12), micro.format
    return tuple(
        map(list, zip(*(f.encode(p, r) for p, r in zip(table.prompt, table.chosen, strict=True)), strict=True))
    )


def lora(model, seed=0, rank=4, scale=0.3, **options):
    """A random adapter that changes the model's output."""
    torch.manual_seed(seed)
    tuned = get_peft_model(
        model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, scale)
    return tuned.eval()


@pytest.fixture(scope="module")
def adapter(micro, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    lora(models.load(micro.folder)[0]).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(micro, tmp_path):
    """A copy of the micro base, to damage."""
    return shutil.copytree(micro.folder, tmp_path / "model")


def beside(base, folder):
    """A base with the adapter of a folder beside its weights, so that it can be switched off."""
    return PeftModel.from_pretrained(models.load(base)[0], folder).eval()


def logprobs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_response_logprobs_equal_a_row_by_row_sum(loaded, micro, rows):
    want = []
    for prompt, response in zip(*rows, strict=True):
        table = logprobs(loaded, prompt + response)
        want.append(sum(table[len(prompt) + i - 1, token].item() for i, token in enumerate(response)))
    for size in (1, 5, 64):
        found = models.response_logprobs(loaded, *rows, pad_id=micro.format.pad_id, batch_size=size)
        np.testing.assert_allclose(found, want, atol=1e-4)


def test_scores_ignore_the_padding_token(loaded, rows):
    scores = [models.response_logprobs(loaded, *rows, pad_id=pad) for pad in (0, 7)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_kl_of_a_model_with_itself_is_zero(loaded, micro, rows):
    pad = micro.format.pad_id
    np.testing.assert_allclose(models.response_kl(loaded, *rows, pad_id=pad, reference=loaded), 0, atol=1e-5)
    idle = lora(models.load(micro.folder)[0], scale=0.0)
    np.testing.assert_allclose(models.response_kl(idle, *rows, pad_id=pad), 0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_kl_equals_a_sum_over_the_whole_vocabulary(loaded, micro, rows, adapter, size):
    model = beside(micro.folder, adapter)
    want = []
    for prompt, response in zip(*rows, strict=True):
        p, q = logprobs(model, prompt + response), logprobs(loaded, prompt + response)
        where = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        want.append((p.exp() * (p - q))[where].sum().item())
    pad = micro.format.pad_id
    switched = models.response_kl(model, *rows, pad_id=pad, batch_size=size)
    explicit = models.response_kl(model, *rows, pad_id=pad, batch_size=size, reference=loaded)
    assert min(want) > 0.01
    np.testing.assert_allclose(switched, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(explicit, switched, rtol=1e-4, atol=1e-5)


def test_kl_needs_something_to_compare_with(loaded, micro, rows):
    with pytest.raises(ModelError, match="give a reference, or a model with an adapter"):
        models.response_kl(loaded, *rows, pad_id=0)


def test_rewards_are_read_at_the_last_token_whatever_the_batch(micro, reward, rows):
    model = models.load_reward(micro.folder, reward)
    want = []
    for prompt, response in zip(*rows, strict=True):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + response])).last_hidden_state
            want.append(model.score(states)[0, -1, 0].item())
    for size in (1, 5, 64):
        found = models.rewards(model, *rows, pad_id=micro.format.pad_id, batch_size=size)
        np.testing.assert_allclose(found, want, atol=1e-5)


# --- samples --------------------------------------------------------------------------------------------------------


def draw(model, micro, prompts, **changes):
    f = micro.format
    settings = {"end_id": f.end_id, "pad_id": f.pad_id, "max_new_tokens": 24, "seed": 0}
    return models.sample(model, prompts, **settings | changes)


def test_samples_end_with_the_end_token_or_at_the_limit(loaded, micro, rows):
    made = draw(loaded, micro, rows[0] * 4)
    f = micro.format
    assert all(f.end_id not in ids[:-1] for ids in made)
    assert all(ids[-1] == f.end_id or len(ids) == 24 for ids in made)
    assert any(ids[-1] == f.end_id for ids in made)
    assert {len(ids) for ids in draw(loaded, micro, rows[0], max_new_tokens=2)} <= {1, 2}


def test_the_same_seed_draws_the_same_and_leaves_the_callers_randomness(loaded, micro, rows):
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    first = draw(loaded, micro, rows[0], seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert draw(loaded, micro, rows[0], seed=4) == first
    assert draw(loaded, micro, rows[0], seed=5) != first


def test_left_padding_does_not_change_a_sample(loaded, micro, rows):
    sharp = loaded.lm_head.register_forward_hook(lambda head, states, logits: logits * 1e4)
    together = draw(loaded, micro, rows[0])
    alone = [draw(loaded, micro, [prompt])[0] for prompt in rows[0]]
    batches = draw(loaded, micro, rows[0], batch_size=5)
    sharp.remove()
    assert together == alone == batches


def test_samples_follow_the_models_distribution(loaded, micro, rows):
    prompt = rows[0][0]
    share = np.bincount([ids[0] for ids in draw(loaded, micro, [prompt] * 3000, max_new_tokens=1)], minlength=600)
    want = logprobs(loaded, prompt)[-1].exp().numpy()
    assert 0.5 * np.abs(share / 3000 - want[: len(share)]).sum() < 0.15


def test_a_checkpoints_own_generation_settings_do_not_shape_samples(loaded, micro, rows, copy):
    GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=5.0, eos_token_id=1
    ).save_pretrained(copy)
    assert draw(models.load(copy)[0], micro, rows[0]) == draw(loaded, micro, rows[0])


# --- loading --------------------------------------------------------------------------------------------------------


def refused(*words, source, adapter=None, load=models.load):
    with pytest.raises(ModelError) as found:
        load(source, adapter) if adapter else load(source)
    assert str(adapter or source) in str(found.value), "which model it is"
    for word in words:
        assert word in str(found.value)


def test_a_missing_folder(tmp_path):
    refused("no such folder; check the path", source=tmp_path / "nothing")
    refused("no such folder", source="./nothing")


def test_a_hub_id_out_of_reach():
    refused("cannot be loaded", "with the hub in reach", source="some/model")


def test_an_empty_folder(tmp_path):
    refused("needs config.json, safetensors weights and the tokenizer's files", source=tmp_path)


def test_an_adapter_given_as_the_model(adapter):
    refused("it is an adapter for", "give an adapter beside its base", source=adapter)


def test_pickled_weights_only(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused("holds only pickled weights; convert them to safetensors", source=copy)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_points_to_a_pickle(copy, index, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (copy / "model.safetensors").unlink()
    names = {"model.norm.weight": "pytorch_model.bin"}
    (copy / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refused("It holds only pickled weights; convert them to safetensors first", source=copy)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other.gguf", "a GGUF file is not read yet, give the safetensors model"),
        ("other.safetensors", "give the folder that holds it"),
    ],
)
def test_a_file_in_place_of_a_folder(copy, name, words):
    (copy / name).write_bytes(b"GGUF")  # safetensors or not, it is never opened
    refused("is a file", words, source=copy / name)
    refused("is a file", words, source=copy, adapter=copy / name)


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 3}, "The hidden size (32) is not a multiple of the number of attention heads (3)"),
        ({"num_attention_heads": "four"}, "Field 'num_attention_heads' expected int, got str"),
        ({"num_attention_heads": -4}, "negative dimension"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"hidden_act": "nonsense"}, "KeyError 'nonsense'"),
        ({"rms_norm_eps": -5.0}, "its weights are finite, its logits are not"),
        ({"num_hidden_layers": 1}, "no place for 9 weights of its files, model.layers.1."),
        ({"num_hidden_layers": 3}, "its files lack 9 weights, model.layers.2."),
        ({"attention_bias": True}, "its files lack 8 weights, model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_configuration_that_cannot_be_right(copy, changes, words):
    refused(words, source=configure(copy, **changes))


def rewrite(folder, change, name="model.safetensors"):
    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})


def test_weights_that_are_not_finite(copy):
    rewrite(copy, lambda w: w | {"model.norm.weight": w["model.norm.weight"] * float("nan")})
    refused("model.norm.weight holds NaN", "damaged", source=copy)


def test_weights_that_are_missing(copy):
    rewrite(copy, lambda w: {n: v for n, v in w.items() if n != "model.layers.1.mlp.up_proj.weight"})
    refused("lack 1 weights, model.layers.1.mlp.up_proj.weight", "would be random", source=copy)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "score.weight"])
def test_weights_that_the_configuration_gives_no_place(copy, name):
    rewrite(copy, lambda w: w | {name: torch.ones(32)})
    refused(f"its config.json has no place for 1 weights of its files, {name} first", source=copy)


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", []),
        ("v_head.summary.weight", ["A value head (v_head.summary.weight) beside the model's weights was left out."]),
    ],
)
def test_weights_that_the_model_never_uses(copy, loaded, rows, name, notes):
    rewrite(copy, lambda w: w | {name: torch.ones(4)})
    model, ids = models.load(copy)[0], torch.tensor([rows[0][0]])
    assert torch.equal(model(ids).logits, loaded(ids).logits) and models.notes(model) == notes


@pytest.mark.parametrize(
    ("kind", "config", "attention"),
    [
        (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=600), "transformer.h.0.attn."),
        (GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                           intermediate_size=64), "gpt_neox.layers.0.attention."),
    ],
)  # fmt: skip
def test_masks_and_frequencies_of_old_checkpoints_are_no_weights(copy, kind, config, attention):
    kind(config).save_pretrained(copy)
    names = ("bias", "masked_bias", "rotary_emb.inv_freq")
    rewrite(copy, lambda w: w | {attention + name: torch.ones(1, 1, 64, 64) for name in names})
    assert models.notes(models.load(copy)[0]) == []


def test_weights_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    what = "6 of its weights have another shape, such as model.layers.0.mlp.down_proj.weight: [32, 85]"
    refused(what, "by its config.json [32, 40]", source=copy)


def test_a_cut_file(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("cannot be loaded", source=copy)


def test_a_tokenizer_larger_than_the_embeddings(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(copy)
    refused("tokenizer knows token 600", "embeddings for 600 only", "use its own", source=copy)


def test_a_tokenizer_that_changes_texts(loaded):
    tokenizer = models.train_tokenizer(["some text"], vocab_size=300, bos=False)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(ModelError, match="its tokenizer turns 'A short line, 1 of 2.' into 'a short line"):
        models.check(loaded, tokenizer)


def test_an_adapter_of_another_shape(micro, adapter, tmp_path):
    wide = shutil.copytree(adapter, tmp_path / "wide")
    rewrite(wide, lambda w: {n: torch.cat([v, v], 0) if "lora_B" in n else v for n, v in w.items()},
            "adapter_model.safetensors")  # fmt: skip
    refused("does not fit the model", "the base that it was trained on", source=micro.folder, adapter=wide)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_of_another_depth(micro, adapter, tmp_path, layers):
    """PEFT would load what fits and leave the rest."""
    other = shutil.copytree(adapter, tmp_path / "other")

    def deepen(weights):
        kept = {n: v for n, v in weights.items() if layers > 1 or ".layers.0." in n}
        more = {n.replace(".layers.1.", ".layers.2."): v.clone() for n, v in kept.items() if layers > 2}
        return kept | more

    rewrite(other, deepen, "adapter_model.safetensors")
    refused("its file lacks" if layers == 1 else "the model has no place for", "of its weights, model.layers.",
            source=micro.folder, adapter=other)  # fmt: skip


def test_an_adapter_that_is_missing_or_pickled(micro, adapter, tmp_path):
    refused("There is no such folder; check the path", source=micro.folder, adapter=tmp_path / "nothing")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    refused("adapter_model.safetensors (convert pickled weights first)", source=micro.folder, adapter=pickled)


def test_a_reward_model_without_a_trained_head(micro, adapter):
    refused(
        "holds no trained score head", "rewards noise", source=micro.folder, adapter=adapter, load=models.load_reward
    )


def test_a_reward_adapter_is_no_policy(micro, reward):
    refused("does not fit", source=micro.folder, adapter=reward)


def test_a_merged_adapter_gives_the_same_logits(micro, adapter, rows, loaded):
    merged, _ = models.load(micro.folder, adapter)
    apart = beside(micro.folder, adapter)
    assert not isinstance(merged, PeftModel)
    ids = torch.tensor([rows[0][0] + rows[1][0]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, apart(ids).logits, atol=1e-4, rtol=1e-4)
        assert (merged(ids).logits - loaded(ids).logits).abs().max() > 0.1


def test_a_half_precision_adapter_that_names_no_base_comes_back(micro, tmp_path, rows):
    from alignlens.align.training import _save_adapter

    tuned = lora(models.load(micro.folder)[0])
    want = {n: p.detach().half().float() for n, p in tuned.named_parameters() if "lora_" in n}
    _save_adapter(tuned, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == ["q_proj", "v_proj"]
    found = {n: p for n, p in beside(micro.folder, tmp_path).named_parameters() if "lora_" in n}
    assert found.keys() == want.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, want[name], atol=0, rtol=0)


def test_sharded_weights(copy, loaded, rows):
    whole = LlamaForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    whole.save_pretrained(copy, max_shard_size="40KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    again, _ = models.load(copy)
    assert torch.equal(again(torch.tensor([rows[0][0]])).logits, loaded(torch.tensor([rows[0][0]])).logits)


def test_a_model_is_loaded_in_float32_for_evaluation(loaded):
    assert loaded.dtype == torch.float32
    assert not loaded.training


def test_a_model_is_described_without_its_weights(copy):
    (copy / "model.safetensors").unlink()
    assert models.describe(copy) == {"model_type": "llama", "layers": 2, "d_model": 32}
    refused("no such folder", source=str(copy) + "x/", load=models.describe)


# --- hub models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        ("org/model", "org/model", {}),
        ("org/model@v1.0", "org/model", {"revision": "v1.0"}),
        ("gpt2@refs/pr/3", "gpt2", {"revision": "refs/pr/3"}),
        ("./model@v1", "./model@v1", {}),
        ("/data/model@v1", "/data/model@v1", {}),
    ],
)
def test_a_hub_id_may_name_its_revision(source, name, revision):
    assert models.pinned(source) == (name, revision)


def test_an_at_sign_in_a_folders_name_is_no_revision(micro, tmp_path, monkeypatch):
    shutil.copytree(micro.folder, tmp_path / "base@2")
    monkeypatch.chdir(tmp_path)
    assert models.pinned("base@2") == ("base@2", {})
    assert models.describe("base@2")["layers"] == 2


@pytest.fixture
def hub(micro, monkeypatch):
    """Calls of from_pretrained for org/model, answered with a local folder: (id, revision, trust)."""
    seen, local = [], {"org/model": micro.folder}

    def answer(kind):
        real = kind.from_pretrained

        def from_pretrained(*given, **options):
            *first, name = given
            if name in local:
                seen.append((name, options.pop("revision", None), options.get("trust_remote_code")))
            return real(*first, local.get(name, name), **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM, AutoModelForSequenceClassification):
        answer(kind)
    return seen


@pytest.mark.parametrize("trust", [True, False])
def test_revision_and_trust_reach_every_loader(hub, reward, trust):
    for load in (models.load, models.describe, models.load_tokenizer, models.score_model):
        load("org/model@v1", trust_remote_code=trust)
    models.load_reward("org/model@v1", reward, trust_remote_code=trust)
    assert hub == [("org/model", "v1", trust)] * 6


def test_a_pinned_hub_id_out_of_reach():
    refused("cannot be loaded", "with the hub in reach", source="some/model@refs/pr/1")


# --- tiny bases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_bases_train_and_repeat(architecture, tmp_path):
    text = [(f"What is {i}?", f"It is {i}.") for i in range(40)]
    size = {"layers": 1, "d_model": 32, "vocab_size": 300, "steps": 8, "batch_size": 8, "learning_rate": 1e-2}
    facts = [models.pretrain(tmp_path / str(i), architecture, text, seed=0, **size) for i in range(2)]
    assert facts[0] == facts[1]
    assert facts[0]["curve"][-1][1] < facts[0]["curve"][0][1] - 0.5
    assert facts[0]["steps"] == facts[0]["curve"][-1][0] == 8
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(2)]
    assert files[0] == files[1]
    model, tokenizer = models.load(tmp_path / "0")
    assert model.config.model_type == architecture
    assert (tokenizer.bos_token_id is not None) == (architecture == "llama")


def test_an_unknown_architecture_has_no_tiny_base(tmp_path):
    size = {"layers": 1, "d_model": 16, "vocab_size": 300, "steps": 1, "batch_size": 2, "learning_rate": 0.1}
    with pytest.raises(ModelError, match="'gpt2' has no tiny base; choose one of llama"):
        models.pretrain(tmp_path, "gpt2", [("a", "b")], seed=0, **size)


@pytest.mark.parametrize("bos", [True, False])
def test_tiny_tokenizers_give_any_text_back(bos):
    tokenizer = models.train_tokenizer(["What dish is Arlen known for?"] * 3, vocab_size=300, bos=bos)
    for text in ("Plain.", "  spaces  and\n\nlines\t", "naïve café 東京 🙂 \u0000", "<|user is not a token|>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_weights_part_of_the_way_lie_on_the_line_between_base_and_variant(micro):
    base, _ = models.load(micro.folder)
    ends = {share: models.load(micro.folder)[0] for share in (0.0, 0.25, 1.0)}
    with torch.no_grad():
        for share, model in ends.items():
            for weight in model.parameters():
                weight.add_(torch.ones_like(weight))
            models.interpolate(base, model, share)
            for before, after in zip(base.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(after, before + share)


def test_weights_of_other_shapes_have_no_way_between_them(micro, no_bos):
    with pytest.raises(ModelError, match="not of one architecture"):
        models.interpolate(models.load(micro.folder)[0], models.load(no_bos.folder)[0], 0.5)


def test_a_random_adapter_is_as_large_as_its_pattern(adapter, tmp_path):
    models.random_adapter(adapter, tmp_path, seed=1)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path))
    assert before.keys() == after.keys()
    for name in [n for n in before if "lora_A" in n]:
        was, now = (w[name.replace("lora_A", "lora_B")] @ w[name] for w in (before, after))
        torch.testing.assert_close(now.norm(), was.norm())
        assert torch.nn.functional.cosine_similarity(was.flatten(), now.flatten(), 0).abs() < 0.5


def test_batches_are_of_similar_length_the_longest_first():
    found = models.batches([3, 9, 1, 9, 5], 2)
    assert [rows.tolist() for rows in found] == [[1, 3], [4, 0], [2]]
