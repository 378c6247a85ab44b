"""Activations equal the model's own hidden states, whatever the batch, the padding or the order."""

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, SmolLM3Config

from alignlens import activations
from alignlens.activations import Activations, bridge, estimate, read
from alignlens.errors import ActivationError
from alignlens.preferences import Formatter

LAYERS, WIDTH = 3, 32
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SIZE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "initializer_range": 0.15,  # the default makes blocks that do next to nothing at this width
}
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "smollm3": SmolLM3Config(**SIZE, no_rope_layers=[1, 0, 1]),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|start|>", "<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["the town of a quiet river and the bread of a town"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def pairs():
    rows = [
        ("what is the town?", "the town of bread", "no"),
        ("a river?", "quiet", "the river and the town and the river of the town"),
        ("what is the town?", "no", "bread and a quiet river"),  # repeats a prompt and one of its answers
        ("and the bread of the quiet town?", "é\nbread", "town"),
        ("b?", "a", "b"),
    ]
    return pd.DataFrame(rows, columns=["prompt", "chosen", "rejected"]).assign(prompt_id=["p0", "p1", "p0", "p2", "p3"])


def random_model(family, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family], **overrides).eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


def hidden_states(model, ids):
    """[layers, tokens, d_model] by transformers, of one sequence; the last layer is caught before the final norm."""
    caught = {}
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, output: caught.update(last=output))
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    last = caught["last"][0] if isinstance(caught["last"], tuple) else caught["last"]
    return torch.stack([*states[1:-1], last])[:, 0].numpy()


@pytest.mark.parametrize("position", ["last", "mean", "prompt"])
def test_equals_hidden_states_of_transformers(model, tokenizer, pairs, position):
    found = read(model, tokenizer, pairs, position=position)
    assert found.chosen.shape == found.rejected.shape == (5, LAYERS, WIDTH) and found.chosen.dtype == np.float32
    assert found.layers == [0, 1, 2] and found.prompt_id.tolist() == pairs["prompt_id"].tolist() and found.kept.all()
    encoded = Formatter(tokenizer).encode_pairs(pairs)
    for side, responses in ((found.chosen, encoded.chosen_ids), (found.rejected, encoded.rejected_ids)):
        for row, (prompt, response) in enumerate(zip(encoded.prompt_ids, responses, strict=True)):
            # The whole sequence is run here, also for the prompt: its stream must not depend on the response.
            states = hidden_states(model, prompt + response)
            assert response[-1] == tokenizer.eos_token_id
            expected = {
                "last": states[:, -1],
                "mean": states[:, len(prompt) :].mean(1),
                "prompt": states[:, len(prompt) - 1],
            }[position]
            assert np.abs(side[row] - expected).max() <= 1e-5


@pytest.mark.parametrize("position", ["last", "mean", "prompt"])
def test_batch_size_and_padding_side_do_not_matter(model, tokenizer, pairs, position):
    alone = read(model, tokenizer, pairs, position=position, batch_size=1)
    for batch_size in (2, 32):
        for side in ("left", "right"):
            other = read(model, tokenizer, pairs, position=position, batch_size=batch_size, padding_side=side)
            assert np.abs(other.chosen - alone.chosen).max() <= 1e-5
            assert np.abs(other.rejected - alone.rejected).max() <= 1e-5


def test_a_row_does_not_depend_on_the_others(llama, tokenizer, pairs):
    whole, turned = read(llama, tokenizer, pairs), read(llama, tokenizer, pairs[::-1])
    assert np.abs(whole.chosen - turned.chosen[::-1]).max() <= 1e-5
    assert turned.prompt_id.tolist() == pairs["prompt_id"].tolist()[::-1]


def test_layers_can_be_chosen(llama, tokenizer, pairs):
    every = read(llama, tokenizer, pairs)
    for layers, expected in (([1], [1]), ([2, 0], [2, 0]), ([-1], [2]), (0, [0]), (np.array([0, 1]), [0, 1])):
        some = read(llama, tokenizer, pairs, layers=layers)
        assert some.layers == expected and np.abs(some.chosen - every.chosen[:, expected]).max() <= 1e-6
    chosen, rejected = every.at(1)
    assert (chosen - rejected == every.difference[:, 1]).all()
    with pytest.raises(ActivationError, match="layer 7"):
        every.at(7)


@pytest.mark.parametrize("layers", [[3], [-4], [0, 0], [], "some", [0, -3]])
def test_wrong_layers_are_refused(llama, tokenizer, pairs, layers):
    with pytest.raises(ActivationError, match="layers"):
        read(llama, tokenizer, pairs, layers=layers)


def count_rows(bridged, reader):
    rows, blocks = [], set()
    first = bridged.hook_dict[activations.hook_name(0)]
    handle = first.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    head = bridged.original_model.lm_head.register_forward_hook(lambda m, args, out: blocks.add(out.shape[1]))
    result = reader()
    handle.remove()
    head.remove()
    return result, sum(rows), blocks


def test_the_same_text_is_read_once_and_the_head_is_not_computed(llama, tokenizer, pairs):
    bridged = bridge(llama)
    twice = pd.concat([pairs, pairs])
    result, rows, head = count_rows(bridged, lambda: read(bridged, tokenizer, twice))
    assert rows == result.report["sequences_read"] == 9 and result.report["sequences"] == 20 and head == {1}
    assert (result.chosen[:5] == result.chosen[5:]).all() and (result.rejected[0] == result.chosen[2]).all()
    _, rows, _ = count_rows(bridged, lambda: read(bridged, tokenizer, twice, position="prompt"))
    assert rows == 4
    _, _, head = count_rows(bridged, lambda: read(bridged, tokenizer, twice, layers=[0]))
    assert head == set()
    assert not any(point.fwd_hooks for point in bridged.hook_dict.values())


def test_the_model_given_is_left_alone(llama, tokenizer, pairs):
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    llama.train()
    read(llama, tokenizer, pairs)
    assert llama.training and list(llama.state_dict()) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    llama.eval()


def test_own_bridges_the_model_itself(tokenizer, pairs):
    model = random_model("llama")
    copied = read(model, tokenizer, pairs)
    assert np.array_equal(read(model, tokenizer, pairs, own=True).chosen, copied.chosen)
    assert model.config._attn_implementation == "eager"


def test_bfloat16_gives_float32_close_to_the_truth(model, tokenizer, pairs):
    exact = read(model, tokenizer, pairs).chosen
    half = read(random_model(model.config.model_type, dtype=torch.bfloat16), tokenizer, pairs).chosen
    assert half.dtype == np.float32 and np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


# What is refused


def test_nan_names_layer_row_and_prompt(tokenizer, pairs):
    model = random_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ActivationError, match=r"after block 1 .*row 0 \(prompt_id p0\)"):
        read(model, tokenizer, pairs)
    read(model, tokenizer, pairs, layers=[0])


def test_nan_in_one_token_names_its_row(tokenizer, pairs):
    model = random_model("llama")
    encoded = Formatter(tokenizer).encode_pairs(pairs)
    others = encoded.prompt_ids + encoded.rejected_ids + encoded.chosen_ids[:3] + encoded.chosen_ids[4:]
    token = min(set(encoded.chosen_ids[3]).difference(*others))
    model.model.embed_tokens.weight.data[token] = torch.inf
    with pytest.raises(ActivationError, match=r"after block 0 in 1 of .*row 1 \(prompt_id p2\)"):
        read(model, tokenizer, pairs.iloc[2:])


def test_overlong_pairs_are_dropped_and_counted(llama, tokenizer, pairs):
    longest = Formatter(tokenizer).encode_pairs(pairs).report["longest_tokens"]
    found = read(llama, tokenizer, pairs, max_length=longest - 1)
    assert 0 < found.kept.sum() < 5 and found.kept.shape == (5,) and found.report["overlong_response"] > 0
    assert found.prompt_id.tolist() == pairs["prompt_id"][found.kept].tolist()
    assert np.abs(found.chosen - read(llama, tokenizer, pairs).chosen[found.kept]).max() <= 1e-5


def test_what_the_model_cannot_hold_is_refused(llama, tokenizer, pairs):
    with pytest.raises(ActivationError, match="the model takes 128"):
        read(llama, tokenizer, pairs.assign(chosen="a river " * 60))
    small = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE | {"vocab_size": 40}))
    with pytest.raises(ActivationError, match="not its tokenizer"):
        read(small, tokenizer, pairs)
    with pytest.raises(ActivationError, match="prompt_id"):
        read(llama, tokenizer, pairs.drop(columns="prompt_id"))
    with pytest.raises(ActivationError, match="position"):
        read(llama, tokenizer, pairs, position="first")
    with pytest.raises(ActivationError, match="not both"):
        read(llama, tokenizer, pairs, max_length=9, formatter=Formatter(tokenizer))


def test_adapters_must_be_merged(tokenizer, pairs):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(random_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ActivationError, match="merge_and_unload"):
        read(wrapped, tokenizer, pairs)


def test_a_bridge_that_disagrees_is_refused(llama, monkeypatch):
    from transformer_lens.model_bridge import sources

    honest = sources.build_bridge_from_module

    def wrong(model, *args, **kwargs):
        model.model.layers[1].mlp.down_proj.weight.data *= 1.5
        return honest(model, *args, **kwargs)

    monkeypatch.setattr(sources, "build_bridge_from_module", wrong)
    with pytest.raises(ActivationError, match=r"differs .* at blocks\.1\.hook_resid_post"):
        bridge(llama)


# Keeping


@pytest.mark.parametrize("position", ["last", "prompt"])
def test_saved_and_loaded_are_the_same(llama, tokenizer, pairs, tmp_path, position):
    found = read(llama, tokenizer, pairs, layers=[0, 2], position=position)
    found.save(tmp_path)
    again = Activations.load(tmp_path)
    for name in ("chosen", "rejected", "prompt_id", "kept"):
        assert np.array_equal(getattr(found, name), getattr(again, name))
    assert (again.layers, again.position, again.report) == ([0, 2], position, found.report)
    (tmp_path / "activations.json").unlink()
    with pytest.raises(ActivationError, match="no readable activations"):
        Activations.load(tmp_path)


def test_a_large_result_goes_to_a_file(llama, tokenizer, pairs, monkeypatch):
    inside = read(llama, tokenizer, pairs)
    assert inside.chosen.nbytes + inside.rejected.nbytes == estimate(5, LAYERS, WIDTH)
    monkeypatch.setattr(activations, "MEMORY_LIMIT", 100)
    outside = read(llama, tokenizer, pairs, progress=True)
    assert isinstance(outside.chosen, np.memmap) and np.array_equal(outside.chosen, inside.chosen)
