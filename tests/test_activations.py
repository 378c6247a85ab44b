"""Activations equal the model's own hidden states, whatever the batch, the padding or the order; so do those of tokens.

Replacing streams by themselves changes nothing.
"""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens.model_bridge import sources
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from alignlens import activations
from alignlens.activations import (
    Activations,
    Tokens,
    bridge,
    estimate,
    high_norm,
    read,
    read_tokens,
    reading,
    spliced_loss,
)  # fmt: skip
from alignlens.core.errors import ActivationError
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
    config = copy.deepcopy(CONFIGS[family])  # from_config writes its dtype into the config
    return AutoModelForCausalLM.from_config(config, **overrides).eval()


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
def test_batch_size_does_not_matter(model, tokenizer, pairs, position):
    alone = read(model, tokenizer, pairs, position=position, batch_size=1)
    for batch_size in (2, 32):
        other = read(model, tokenizer, pairs, position=position, batch_size=batch_size)
        assert np.abs(other.chosen - alone.chosen).max() <= 1e-5
        assert np.abs(other.rejected - alone.rejected).max() <= 1e-5


def test_encoded_pairs_are_read_as_they_are(llama, tokenizer, pairs):
    formatter = Formatter(tokenizer, max_length=Formatter(tokenizer).encode_pairs(pairs).report["longest_tokens"] - 1)
    encoded = formatter.encode_pairs(pairs)
    for found, again in (
        (read(llama, tokenizer, pairs, formatter=formatter), read(llama, tokenizer, encoded)),
        (read_tokens(llama, None, pairs, formatter=formatter), read_tokens(llama, None, encoded, formatter=formatter)),
    ):
        assert not found.kept.all() and found.report == again.report
        for name in (
            "prompt_id",
            "kept",
            *(("streams", "row") if isinstance(found, Tokens) else ("chosen", "rejected")),
        ):
            assert np.array_equal(getattr(found, name), getattr(again, name))


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
    damaging(monkeypatch, lambda model: model.model.layers[1].mlp.down_proj.weight.mul_(1.5))
    with pytest.raises(ActivationError, match=r"differs .* at blocks\.1\.hook_resid_post"):
        bridge(llama)


EXACT = {
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=320, n_positions=128, initializer_range=0.05),
    "neox": GPTNeoXConfig(**{n: v for n, v in SIZE.items() if n != "num_key_value_heads"}),
    "opt": OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=320,
                     max_position_embeddings=128, word_embed_proj_dim=32),
    "gemma2": Gemma2Config(**SIZE, head_dim=8, sliding_window=40, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=40, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**SIZE, sliding_window=40),
    "qwen3 experts": Qwen3MoeConfig(**SIZE | {"initializer_range": 0.05}, head_dim=8, num_experts=8,
                                    num_experts_per_tok=2, moe_intermediate_size=32),
    "bloom": BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=320, initializer_range=0.05),
}  # fmt: skip
HALVES = [torch.float32, torch.bfloat16]


def exact(name, dtype):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(EXACT[name]), dtype=dtype).eval()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_bridge_passes_its_check(name, dtype):
    assert bridge(exact(name, dtype)).cfg.n_layers == 3


def damaging(monkeypatch, change):
    """The bridge is built of a model that was changed after it was asked for its own streams."""
    honest = sources.build_bridge_from_module

    def wrong(model, *given, **options):
        with torch.no_grad():
            change(model)
        return honest(model, *given, **options)

    monkeypatch.setattr(sources, "build_bridge_from_module", wrong)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("layer", "where"), [(0, r"blocks\.0\."), (1, r"blocks\.1\."), (2, "logits")])
@pytest.mark.parametrize("damage", ["permuted", "off"])
def test_experts_in_the_wrong_order_or_off_are_found(dtype, layer, where, damage, monkeypatch):
    def change(model):
        for weight in model.model.layers[layer].mlp.experts.parameters():
            weight.copy_(weight.roll(1, 0) * (damage == "permuted"))

    damaging(monkeypatch, change)
    with pytest.raises(ActivationError, match=f"differs .* at {where}.* in dimension"):
        bridge(exact("qwen3 experts", dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_one_dimension_of_one_block_is_enough(dtype, monkeypatch):
    damaging(monkeypatch, lambda model: model.model.layers[1].mlp.down_proj.weight[7].mul_(1.5))
    with pytest.raises(ActivationError, match=r"differs .* at blocks\.1\..* in dimension 7"):
        bridge(random_model("llama", dtype=dtype))


def test_a_window_that_is_not_kept_is_found_beyond_it(monkeypatch):
    damaging(monkeypatch, lambda model: setattr(model.config, "sliding_window", None))
    with pytest.raises(ActivationError, match=r"differs .* at blocks\.0\."):
        bridge(exact("mistral", torch.float32))


def test_a_model_without_a_longest_sequence_is_read(tokenizer, pairs):
    """ALiBi has none."""
    model = exact("bloom", torch.float32)
    found, encoded = (
        read(model, tokenizer, pairs, layers=[0, 1], position="last"),
        Formatter(tokenizer).encode_pairs(pairs),
    )
    for row, ids in enumerate(map(list.__add__, encoded.prompt_ids, encoded.chosen_ids)):
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert np.abs(found.chosen[row] - torch.stack(states[1:3])[:, 0, -1].numpy()).max() <= 1e-5


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
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 100)
    outside = read(llama, tokenizer, pairs)
    assert isinstance(outside.chosen, np.memmap) and np.array_equal(outside.chosen, inside.chosen)
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10}))
    with pytest.raises(ActivationError, match="do not fit"):
        read(llama, tokenizer, pairs)


# Tokens

ARRAYS = ("streams", "token_id", "row", "side", "place", "kept", "prompt_id")


@pytest.fixture
def single(monkeypatch):
    """Streams in float32 from the start, where half precision would hide small differences."""
    monkeypatch.setattr(reading, "HALF_LIMIT", 0)


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def test_tokens_equal_hidden_states_of_transformers(model, tokenizer, pairs, single):
    """Every response token, the end of turn included, in the order of rows, sides and places; each response once."""
    found = read_tokens(model, tokenizer, pairs, batch_size=3)
    encoded = Formatter(tokenizer).encode_pairs(pairs)
    streams, index, seen = [], [], set()
    for row, (prompt, *responses) in enumerate(
        zip(encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids, strict=True)
    ):
        for side, response in enumerate(responses):
            if (*prompt, *response) not in seen:
                seen.add((*prompt, *response))
                streams.append(hidden_states(model, prompt + response)[:, len(prompt) :].swapaxes(0, 1))
                index += [(token, row, side, place) for place, token in enumerate(response)]
                assert response[-1] == tokenizer.eos_token_id
    expected = np.concatenate(streams)
    assert np.abs(found.streams - expected).max() <= 1e-5 * np.abs(expected).max()
    columns = (found.token_id, found.row, found.side, found.place)
    assert list(zip(*columns, strict=True)) == index
    assert [column.dtype.name for column in columns] == ["int32", "int32", "int8", "int32"]
    assert found.prompt_id.tolist() == pairs.prompt_id.tolist() and found.kept.all()
    report = found.report
    assert (report["tokens"], report["sequences"]) == (len(index), 9) and report["bytes"] == expected.nbytes


def test_the_last_token_is_what_read_gives(llama, tokenizer, pairs, single):
    found, last = read_tokens(llama, tokenizer, pairs), read(llama, tokenizer, pairs)
    ends = np.append(np.diff(found.place) <= 0, True)
    for side, name in enumerate(("chosen", "rejected")):
        here = ends & (found.side == side)
        assert np.abs(found.streams[here] - getattr(last, name)[found.row[here]]).max() <= 1e-5


@pytest.mark.parametrize("batch_size", [2, 32])
def test_tokens_do_not_depend_on_batches(model, tokenizer, pairs, single, batch_size):
    alone = read_tokens(model, tokenizer, pairs, batch_size=1)
    other = read_tokens(model, tokenizer, pairs, batch_size=batch_size)
    assert np.abs(other.streams - alone.streams).max() <= 1e-5 * np.abs(alone.streams).max()
    other.streams = alone.streams
    assert equal(other, alone)


def test_tokens_of_chosen_layers(llama, tokenizer, pairs):
    every, some = read_tokens(llama, tokenizer, pairs), read_tokens(llama, tokenizer, pairs, layers=[2, 0])
    assert some.layers == [2, 0] and np.array_equal(some.streams, every.streams[:, [2, 0]])
    assert np.shares_memory(some.at(0), some.streams) and np.array_equal(some.at(0), every.streams[:, 0])
    with pytest.raises(ActivationError, match="layer 1"):
        some.at(1)


def test_a_limit_takes_whole_pairs_in_order(llama, tokenizer, pairs):
    """Pair 2 shares an answer with pair 0, which is not counted twice; a later pair that would fit is not taken."""
    whole = read_tokens(llama, tokenizer, pairs, layers=[0])
    sizes = np.bincount(whole.row)
    for limit in (sizes[:3].sum(), sizes[:4].sum() - 1):
        some = read_tokens(llama, tokenizer, pairs, layers=[0], limit=limit)
        assert np.array_equal(some.streams, whole.streams[: sizes[:3].sum()])
        assert some.kept.tolist() == [True] * 3 + [False] * 2 and some.prompt_id.tolist() == ["p0", "p1", "p0"]
        assert (some.report["kept"], some.report["beyond_limit"]) == (3, 2)
    with pytest.raises(ActivationError, match=f"first pair alone has {sizes[0]} response tokens"):
        read_tokens(llama, tokenizer, pairs, limit=sizes[0] - 1)


def test_dropped_pairs_have_no_row(llama, tokenizer, pairs):
    longest = Formatter(tokenizer).encode_pairs(pairs).report["longest_tokens"]
    found = read_tokens(llama, tokenizer, pairs, max_length=longest - 1, layers=[0])
    alone = read_tokens(llama, tokenizer, pairs[found.kept], layers=[0])
    assert 0 < found.kept.sum() < 5 and found.report["overlong_response"] > 0
    assert found.prompt_id.tolist() == pairs.prompt_id[found.kept].tolist()
    assert np.array_equal(found.row, alone.row) and np.array_equal(found.streams, alone.streams)


@pytest.mark.parametrize("on_disk", [False, True])
def test_streams_are_half_precision_until_a_value_needs_more(tokenizer, pairs, tmp_path, monkeypatch, on_disk):
    """The value that needs more comes in a later batch, when others are already written."""
    model, folder = random_model("llama"), tmp_path if on_disk else None
    pairs = pairs.assign(chosen=[*pairs.chosen[:4], "#"])  # the shortest sequence is run last
    half = read_tokens(model, tokenizer, pairs, layers=[0], batch_size=1)
    monkeypatch.setattr(reading, "HALF_LIMIT", 0)
    single = read_tokens(model, tokenizer, pairs, layers=[0], batch_size=1)
    assert (half.report["dtype"], single.report["dtype"]) == (half.streams.dtype, single.streams.dtype)
    assert half.streams.dtype == np.float16 and np.array_equal(half.streams, single.streams.astype(np.float16))
    monkeypatch.undo()
    rare = Formatter(tokenizer).encode_pairs(pairs).chosen_ids[4][0]
    model.model.embed_tokens.weight.data[rare] *= 1e6
    large = read_tokens(model, tokenizer, pairs, layers=[0], batch_size=1, folder=folder)
    assert large.streams.dtype == np.float32 and np.abs(large.streams).max() > 65504
    early = large.row < 4  # written in half precision before
    assert np.array_equal(large.streams[early], half.streams[early])


def mapped(path) -> bool:
    """Does this process map the file?"""
    return str(path) in Path("/proc/self/maps").read_text()


def test_tokens_in_memory_and_streamed_are_the_same(llama, tokenizer, pairs, tmp_path):
    found = read_tokens(llama, tokenizer, pairs)
    streamed = read_tokens(llama, tokenizer, pairs, folder=tmp_path)
    assert equal(streamed, found) and streamed.report == found.report
    if Path("/proc/self/maps").exists():
        assert mapped(tmp_path / "tokens.safetensors")
    read_tokens(llama, tokenizer, pairs[1:], folder=tmp_path)  # over the file that the first ones are mapped from
    assert equal(streamed, found)
    read_tokens(llama, tokenizer, pairs, folder=tmp_path)
    again = Tokens.load(tmp_path)
    assert equal(again, found) and (again.layers, again.report) == (found.layers, found.report)
    assert np.array_equal(load_file(tmp_path / "tokens.safetensors")["streams"], found.streams)  # others read it too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.json", "tokens.safetensors"]


def test_damaged_tokens_are_refused(llama, tokenizer, pairs, tmp_path):
    read_tokens(llama, tokenizer, pairs, layers=[0], folder=tmp_path)
    facts, arrays = tmp_path / "tokens.json", tmp_path / "tokens.safetensors"
    whole = facts.read_text()
    facts.write_text(whole[:-9])
    with pytest.raises(ActivationError, match="no readable tokens"):
        Tokens.load(tmp_path)
    facts.write_text(whole)
    arrays.write_bytes(arrays.read_bytes()[:-1])
    with pytest.raises(ActivationError, match="no readable tokens"):
        Tokens.load(tmp_path)
    with pytest.raises(ActivationError, match="no readable tokens"):
        Tokens.load(tmp_path / "nothing")


def test_bad_tokens_are_refused_and_leave_no_file(tokenizer, pairs, tmp_path, monkeypatch):
    model = random_model("llama")
    encoded = Formatter(tokenizer).encode_pairs(pairs)
    others = encoded.prompt_ids + encoded.rejected_ids + encoded.chosen_ids[:3] + encoded.chosen_ids[4:]
    token = min(set(encoded.chosen_ids[3]).difference(*others))
    model.model.embed_tokens.weight.data[token] = torch.inf
    with pytest.raises(ActivationError, match=r"after block 0 in \d+ of \d+ tokens .*row 1 \(prompt_id p2\)"):
        read_tokens(model, tokenizer, pairs.iloc[2:], folder=tmp_path)
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10}))
    with pytest.raises(ActivationError, match="do not fit"):
        read_tokens(model, tokenizer, pairs, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_high_norm_finds_the_planted_tokens(dtype, monkeypatch):
    x = np.random.default_rng(0).normal(size=(500, 2, 16)).astype(dtype)
    x[[3, 80], [0, 1]] *= 1000  # their squares overflow float16
    monkeypatch.setattr(reading, "CHUNK_BYTES", 999)
    assert np.flatnonzero(high_norm(x)).tolist() == [3, 80]
    assert np.flatnonzero(high_norm(x[:, 1])).tolist() == [80]
    assert not high_norm(x, factor=1e4).any()
    x[7, 1, 0] = np.nan
    with pytest.raises(ActivationError, match="token 7"):
        high_norm(x)


# Splicing


@pytest.fixture(scope="module")
def spliced(micro):
    """The trained micro base, its bridge, its format and some of its pairs."""
    model = AutoModelForCausalLM.from_pretrained(micro.folder, dtype=torch.float32).eval()
    return model, bridge(model), micro.format, micro.heldout[:8]


def own_loss(model, prompt, response, layer=None, change=None):
    """Mean nats by transformers of the predictions made from response tokens of one sequence, without padding."""

    def hook(module, args, output):
        stream = output[0] if isinstance(output, tuple) else output
        stream[:, len(prompt) :] = change(stream[:, len(prompt) :])

    handle = model.model.layers[layer].register_forward_hook(hook) if change else None
    ids = torch.tensor([prompt + response])
    labels = ids.clone()
    labels[:, : len(prompt) + 1] = -100  # the first response token is predicted from the prompt
    with torch.inference_mode():
        loss = model(ids, labels=labels).loss.item()
    if handle:
        handle.remove()
    return loss


def test_spliced_loss_equals_that_of_transformers(spliced):
    """Clean, and with a change made in transformers' own forward pass."""
    model, bridged, formatter, pairs = spliced
    change = lambda x: 0.5 * x.flip(-1) + 0.1  # noqa: E731
    found = spliced_loss(bridged, formatter, pairs, 0, {"clean": None, "same": lambda x: x, "change": change})
    assert list(found.columns) == ["replacement", "prompt_id", "tokens", "loss"]
    encoded = formatter.encode_pairs(pairs)
    for name, how in (("clean", None), ("same", None), ("change", change)):
        rows = found[found.replacement == name]
        assert rows.prompt_id.tolist() == pairs.prompt_id.tolist()
        for row, prompt, response in zip(rows.itertuples(), encoded.prompt_ids, encoded.chosen_ids, strict=True):
            assert row.tokens == len(response) - 1
            assert row.loss == pytest.approx(own_loss(model, prompt, response, 0, how), abs=1e-5)
    losses = found.groupby("replacement").loss.mean()
    assert losses["change"] > losses["clean"] + 0.1 and not any(p.fwd_hooks for p in bridged.hook_dict.values())


def test_the_loss_of_zeros_is_known_at_the_last_block(spliced):
    """Nothing in the last stream: every token is equally likely. In an earlier one attention still sees the prompt."""
    model, bridged, formatter, pairs = spliced
    zeros = {"clean": None, "zero": lambda x: x.mul_(0), "same": lambda x: x}
    for layer in (0, 1, -1):
        found = spliced_loss(bridged, formatter, pairs, layer, zeros)
        loss = found.pivot_table(index="prompt_id", columns="replacement", values="loss", sort=False)
        assert (loss.zero > loss.clean).all() and np.allclose(loss.same, loss.clean, atol=1e-5, rtol=0)
        if layer:
            assert np.allclose(loss.zero, np.log(model.config.vocab_size), atol=1e-5)


def test_another_models_last_streams_give_its_loss(spliced):
    model, bridged, formatter, pairs = spliced
    torch.manual_seed(0)
    moved = AutoModelForCausalLM.from_config(model.config)
    moved.load_state_dict(model.state_dict())
    for weight in moved.model.layers.parameters():  # the norm and the head after the last block stay the same
        weight.data += 0.05 * torch.randn_like(weight)
    other, encoded = bridge(moved), formatter.encode_pairs(pairs)
    batches = activations.Sequences.of(encoded.prompt_ids, encoded.chosen_ids).batches(3, formatter.pad_id)
    with activations.evaluating(3):
        theirs = iter([batch.streams(other, [1])[:, 0] for batch in batches])
    swap = {"clean": None, "theirs": lambda x: next(theirs)}
    loss = spliced_loss(bridged, formatter, encoded, 1, swap, batch_size=3).groupby("replacement").loss.agg(np.array)
    expected = spliced_loss(other, formatter, encoded, 1, {"clean": None}).loss
    assert len(expected) == len(pairs) and np.abs(loss["clean"] - expected).min() > 1e-4
    assert np.allclose(loss["theirs"], expected, atol=1e-5, rtol=0)


def test_spliced_loss_does_not_depend_on_batches(model, tokenizer, pairs):
    """Of every architecture, also for a response that two rows share: it is measured once."""
    bridged, formatter = bridge(model), Formatter(tokenizer)
    half = {"clean": None, "half": lambda x: x / 2}
    pairs = pd.concat([pairs, pairs[:1]])
    alone = spliced_loss(bridged, formatter, pairs, 1, half, batch_size=1)
    assert len(alone) == 2 * 5
    for batch_size in (2, 4, 32):
        found = spliced_loss(bridged, formatter, pairs, 1, half, batch_size=batch_size)
        assert np.allclose(found.pop("loss"), alone.loss, rtol=1e-5, atol=0)
        assert found.equals(alone.drop(columns="loss"))


def test_splices_that_cannot_be_made_are_refused(tokenizer, pairs):
    model = random_model("llama")
    bridged, formatter = bridge(model, own=True), Formatter(tokenizer)

    def splice(layer=0, replace=None):
        return spliced_loss(bridged, formatter, pairs, layer, {"mine": replace})

    with pytest.raises(ActivationError, match="layers"):
        splice(layer=LAYERS)
    with pytest.raises(ActivationError, match="'mine' is nan"):
        splice(replace=lambda x: x * torch.nan)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ActivationError, match=r"'mine' is nan at prompt_id p0 \(5 of 5"):
        splice()
