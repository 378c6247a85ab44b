"""The audit measures any bridged architecture, finds nothing where nothing happened, refuses what does not compare."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
    SmolLM3Config,
)

from alignlens import audit, behavior, dictionaries, models
from alignlens.audit import behaviour, features, signal
from alignlens.audit.numbers import as_good, beyond, detectable, mean, number, preserved
from alignlens.core.errors import AlignlensError
from alignlens.preferences import Formatter, tinyworld

ROOT = Path(__file__).parents[1]
FAST = {
    "bootstrap": 60,
    "permutations": 3,
    "sampled": 8,
    "response_tokens": 6,
    "limit": 40,
    "batch_size": 32,
    "causal_pairs": 6,
}
D, LAYERS = 32, 2
GROUPED = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 192}  # fmt: skip
FAMILIES = {
    "llama": lambda v: LlamaConfig(vocab_size=v, **GROUPED),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, tie_word_embeddings=True, **GROUPED),
    "smollm3": lambda v: SmolLM3Config(vocab_size=v, **GROUPED, pad_token_id=0),
    "gemma": lambda v: GemmaConfig(vocab_size=v, **GROUPED),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=192),
    "pythia": lambda v: GPTNeoXConfig(
        vocab_size=v, hidden_size=D, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=192,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Pairs of 60 tiny-world prompts as a file."""
    path = tmp_path_factory.mktemp("pairs") / "held.jsonl"
    tinyworld.pairs(60)[["prompt", "chosen", "rejected"]].to_json(path, orient="records", lines=True)
    return path


def tokenizer(*, chat: bool, bos=False, words="Where do people live, and what do they eat?"):
    found = models.train_tokenizer([words] * 3, vocab_size=275, bos=bos)
    if not chat:
        found.chat_template = None
    return found


def checkpoint(folder: Path, family: str, *, chat=True, seed=0, **options) -> Path:
    """A tiny random checkpoint of an architecture with a tokenizer of its own."""
    torch.manual_seed(seed)
    found = tokenizer(chat=chat, bos=family in ("llama", "gemma"))
    config = FAMILIES[family](len(found))
    config.eos_token_id, config.bos_token_id = found.eos_token_id, found.bos_token_id
    with models.quietly():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
        found.save_pretrained(folder)
    return folder


def moved(base: Path, folder: Path, size=0.5, **options) -> Path:
    """A copy whose weights were moved in a random direction."""
    torch.manual_seed(1)
    with models.quietly():
        model = AutoModelForCausalLM.from_pretrained(base)
        for weight in model.parameters():
            weight.data += size * weight.data.abs().mean() * torch.randn_like(weight)
        model.save_pretrained(folder, **options)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def aligned(base, tmp_path_factory) -> Path:
    return moved(base, tmp_path_factory.mktemp("aligned"))


def ask(base, aligned="", **options) -> audit.Audit:
    words = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return audit.Audit(audit.request(base=str(base), aligned=str(aligned), **(FAST | words)))


def numbers(value):
    """All measured numbers in a result."""
    if isinstance(value, dict) and "floor" in value and "value" in value:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)


# --- architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_audited(family, pairs, tmp_path):
    """With and without a chat template; a moved model is found to have moved."""
    base = checkpoint(tmp_path / "base", family, chat=family not in ("gpt2", "pythia"))
    result = ask(base, moved(base, tmp_path / "aligned"), pairs=pairs).result()
    assert result["format"]["template"] == ("plain" if family in ("gpt2", "pythia") else "chat")
    assert [result[name]["status"] for name in audit.SECTIONS] == ["measured"] * 4 + ["not measured", "measured"]
    assert "response tokens" in result["latents"]["reason"]
    kl = result["behaviour"]["numbers"]["kl"]
    assert beyond(kl) and kl["value"] > 100 * kl["floor"]
    assert [row["layer"] for row in result["change"]["layers"]] == list(range(LAYERS))


def test_sharded_safetensors_are_the_same_model(base, pairs, tmp_path):
    with models.quietly():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert ask(base, tmp_path, pairs=pairs).identical


def test_half_precision_is_measured(base, aligned, pairs, monkeypatch):
    """bfloat16, as on a GPU."""
    load = models.load

    def narrow(*args, **options):
        model, tokenizer = load(*args, **options)
        return model.bfloat16(), tokenizer

    monkeypatch.setattr(models, "load", narrow)
    found = ask(base, aligned, pairs=pairs)
    assert found.base.facts["dtype"] == "bfloat16"
    assert beyond(found.section("behaviour")["numbers"]["kl"])
    assert found.section("causal")["status"] == found.section("change")["status"] == "measured"


def test_an_adapter_is_found_in_either_parameter(base, pairs, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    model.save_pretrained(tmp_path)
    audits = [ask(base, adapter=tmp_path, pairs=pairs), ask(base, tmp_path, pairs=pairs)]
    assert len({a.aligned.weights_hash for a in audits}) == 1
    assert not audits[0].identical
    with pytest.raises(AlignlensError, match="is an adapter and -p adapter is given too"):
        ask(base, tmp_path, adapter=tmp_path, pairs=pairs)


# --- what must come out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(base, aligned, pairs) -> dict:
    return ask(base, aligned, pairs=pairs).result()


@pytest.fixture(scope="module")
def nothing(base, pairs) -> dict:
    """The base with itself, with latents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "LEAST_TOKENS", 100)
        return ask(base, base, pairs=pairs).result()


def test_the_base_with_itself_shows_nothing(nothing):
    assert nothing["models"]["identical"]
    found = audit.findings(nothing)
    assert not found["beyond"] and len(found["within"]) >= 12
    assert nothing["latents"]["status"] == "measured" and not nothing["latents"]["top"]
    for x in numbers({name: nothing[name] for name in ("weights", "behaviour")}):
        assert not beyond(x) or x["unit"] == "tokens"
    assert nothing["causal"]["patching"]["reason"]
    advised = [line["title"] for line in audit.verdict(nothing) if line["advice"]]
    assert advised == ["How far it moved", "Within noise", "Not measured"]


def test_every_number_has_its_interval_and_floor(result):
    found = list(numbers(result))
    assert len(found) > 50
    for x in found:
        assert set(x) == {"value", "low", "high", "null", "floor", "unit"}
        assert x["floor"] is not None and x["floor"] >= 0
        assert x["low"] <= x["value"] * (1 + 1e-9) + 1e-9 and x["value"] <= x["high"] + 1e-9 + 1e-9 * abs(x["value"]), x


def test_the_same_request_gives_the_same_bytes(base, aligned, pairs, result, tmp_path, monkeypatch):
    """And the pairs are formatted once by each tokenizer."""
    formatted, encode = [], Formatter.encode_pairs
    counted = lambda self, given, **o: formatted.append(type(given)) or encode(self, given, **o)  # noqa: E731
    monkeypatch.setattr(Formatter, "encode_pairs", counted)
    for name, one in (("a", result), ("b", ask(base, aligned, pairs=pairs).result())):
        audit.write(one, tmp_path / name)
    for file in ("audit.json", "audit.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert formatted.count(pd.DataFrame) == 1


def test_a_report_names_no_folder_of_this_machine(result, pairs):
    assert str(pairs.parent) not in json.dumps(result)


def test_a_planted_shift_of_chosen_answers_is_found(pairs, base, aligned, monkeypatch):
    """log p of chosen answers raised by exactly 2 nats: margin 2, accuracy 1, chosen shift 2, rejected shift 0."""
    measure = behavior.measure

    def planted(model, *args, reference=None, **options):
        table = measure(model, *args, reference=reference, **options)
        table["chosen_logprob"], table["rejected_logprob"] = (2.0 if reference is not None else 0.0), 0.0
        return table

    monkeypatch.setattr(behavior, "measure", planted)
    found = ask(base, aligned, pairs=pairs).section("behaviour")["numbers"]
    assert {n: found[n]["value"] for n in ("margin", "accuracy", "chosen_shift", "rejected_shift")} == {
        "margin": 2, "accuracy": 1, "chosen_shift": 2, "rejected_shift": 0,
    }  # fmt: skip
    assert beyond(found["margin"]) and not beyond(found["rejected_shift"])


def test_the_floor_of_a_mean_is_reached_by_noise_in_five_of_a_hundred():
    rng = np.random.default_rng(0)
    hits = [beyond(mean(rng.normal(size=60), np.arange(60), seed=i)) for i in range(300)]
    assert 0.01 < np.mean(hits) < 0.11


def test_power_is_what_repeated_experiments_find():
    """A change as large as the smallest detectable one is seen in about 80 of 100 repetitions."""
    rng = np.random.default_rng(1)
    size = detectable(mean(rng.normal(size=200), np.arange(200)))
    seen = [mean(rng.normal(size, 1, size=200), np.arange(200), seed=i)["low"] > 0 for i in range(200)]
    assert 0.68 < np.mean(seen) < 0.92


def test_preserved_needs_the_whole_interval_within_the_margin():
    inside = number(0.0, -0.02, 0.019)
    assert preserved(inside)
    assert not preserved(number(0.0, -0.021, 0.01))
    assert not preserved(number(0.0))


def test_repeated_prompts_count_once():
    """Ten copies of every value: the interval does not shrink."""
    values = np.random.default_rng(2).normal(size=50)
    one = mean(values, np.arange(50))
    ten = mean(np.repeat(values, 10), np.repeat(np.arange(50), 10))
    assert ten["high"] - ten["low"] == pytest.approx(one["high"] - one["low"], rel=1e-6)


def test_a_different_template_is_noted_and_both_read_alike(base, aligned, pairs, tmp_path):
    shutil.copytree(base, tmp_path / "bare")
    bare = AutoTokenizer.from_pretrained(base)
    bare.chat_template = None
    shutil.rmtree(tmp_path / "bare")
    with models.quietly():
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "bare")
        bare.save_pretrained(tmp_path / "bare")
    found = ask(tmp_path / "bare", aligned, pairs=pairs)
    assert found.format.template == "chat"
    assert "the aligned model's format" in found.notes[0]


def warned(result) -> set[str]:
    return {w["code"] for w in result["warnings"]}


def test_warnings_say_what_is_wrong_with_the_data(base, aligned, tmp_path):
    """Few prompts, repeated prompts and answers, copies, cut answers; length that gives the label away."""
    table = tinyworld.pairs(60)[["prompt", "chosen", "rejected"]]
    table["rejected"] = table.chosen.str.rstrip(".") + " and more and more"
    twice = table.assign(rejected=table.rejected + " words")
    path = tmp_path / "bad.jsonl"
    pd.concat([table, table.head(5), twice]).to_json(path, orient="records", lines=True)
    result = ask(base, aligned, pairs=path, limit=200, max_length=150).result()
    assert {"few prompts", "repeated prompts", "repeated answers", "duplicates", "too long", "unfinished answers",
            "length confound", "training prompts"} <= warned(result)  # fmt: skip


def test_identical_weights_are_warned_of(nothing):
    assert "identical" in warned(nothing)


# --- what an engineer can act on --------------------------------------------------------------------------------------


def test_what_is_written_has_the_form_that_the_schema_describes(result, nothing, tmp_path):
    """`read` refuses anything else."""
    for name, one in (("moved", result), ("same", nothing)):
        assert audit.read(audit.write(one, tmp_path / name)[1])["schema"] == audit.SCHEMA
    assert nothing["latents"]["planted"]["planted"] >= 8


def moved_only(base: Path, folder: Path, *, tied: bool, change) -> list[Path]:
    """A base, tied or not, and a copy in which a part was changed."""
    torch.manual_seed(3)
    with models.quietly():
        model = AutoModelForCausalLM.from_pretrained(base)
        if tied:
            model.config.tie_word_embeddings, model.lm_head.weight = True, model.model.embed_tokens.weight
        for name in ("before", "after"):
            model.save_pretrained(folder / name)
            AutoTokenizer.from_pretrained(base).save_pretrained(folder / name)
            with torch.no_grad():
                change(model).add_(0.1 * torch.randn_like(change(model)))
    return [folder / "before", folder / "after"]


@pytest.mark.parametrize(
    ("tied", "change", "part"),
    [
        (False, lambda m: m.lm_head.weight, "head"),
        (False, lambda m: m.model.embed_tokens.weight, "embedding"),
        (True, lambda m: m.model.embed_tokens.weight, "embedding and head (tied)"),
        (True, lambda m: m.model.norm.weight, "final norm"),
    ],
)
def test_parts_in_no_block_have_their_rows(base, pairs, tmp_path, tied, change, part):
    found = ask(*moved_only(base, tmp_path, tied=tied, change=change), pairs=pairs).section("weights")
    moved = {row["part"]: row["share"]["value"] for row in found["parts"]}
    assert set(moved) == ({"embedding and head (tied)", "final norm"} if tied else {"embedding", "head", "final norm"})
    assert [name for name, share in moved.items() if share > 0] == [part]
    assert not any(row["share"]["value"] for row in found["layers"])


def test_a_model_of_which_only_the_head_changed_is_told_so(base, pairs, tmp_path):
    result = ask(*moved_only(base, tmp_path, tied=False, change=lambda m: m.lm_head.weight), pairs=pairs).result()
    where = audit.verdict(result)[1]["text"]
    assert where.startswith("Only the weights of head changed.")
    assert result["causal"]["patching"]["reason"] or "the rest comes about behind it, in the head" in where


def test_flipped_pairs_hold_the_change_of_every_token(base, pairs, tmp_path):
    """The shown tokens' changes add up to the change of the whole answer; both ways are counted."""
    found = ask(base, moved(base, tmp_path, size=4.0), pairs=pairs)
    flipped = found.section("behaviour")["flipped"]
    assert sum(way["of"] for way in flipped.values()) == len(found.pairs)
    shown = [(sign, pair) for sign, way in ((1, "lost"), (-1, "won")) for pair in flipped[way]["shown"]]
    assert shown
    for sign, pair in shown:
        assert sign * pair["base"] > 0 > sign * pair["aligned"]
        assert pair["aligned"] - pair["base"] == pytest.approx(
            pair["chosen"]["change"] - pair["rejected"]["change"], abs=1e-3
        )
        for side in ("chosen", "rejected"):
            tokens = pair[side]["tokens"]
            assert pair[side]["left_out"] or sum(c for _, c in tokens) == pytest.approx(pair[side]["change"], abs=0.05)
            assert "\ufffd" not in "".join(text for text, _ in tokens)


def test_a_letter_of_several_tokens_is_shown_whole(base):
    """Byte-level tokens that each hold a part of a letter are joined, with the sum of their changes."""
    side = SimpleNamespace(model=AutoModelForCausalLM.from_pretrained(base))
    words = AutoTokenizer.from_pretrained(base)
    given = words("ab 漢 c", add_special_tokens=False).input_ids
    owner = SimpleNamespace(base=side, aligned=side, format=SimpleNamespace(tokenizer=words))
    found = behaviour._answer(owner, given[:2], given)
    assert "".join(text for text, _ in found["tokens"]) == "ab 漢 c" and len(found["tokens"]) < len(given)
    assert found["change"] == 0 and found["left_out"] == 0
    assert behaviour._answer(owner, given[:2], given * 30)["left_out"] == 30 * len(given) - 120


def test_layers_that_differ_by_chance_cannot_be_told_apart():
    """Equal ones all remain in 95 of 100 sets or more; one that lies clearly above is alone."""
    rng, kept = np.random.default_rng(0), 0
    for _ in range(100):
        scores = rng.normal(size=(6, 80))
        weights = rng.multinomial(80, np.full(80, 1 / 80), size=300) / 80
        draws = np.column_stack([scores.mean(1), scores @ weights.T])
        kept += as_good(draws) == list(range(6))
    assert kept >= 90
    shared = rng.normal(size=80)  # what layers share does not count: the difference is paired
    scores = shared + 0.1 * rng.normal(size=(6, 80)) + 0.2 * (np.arange(6) == 4)[:, None]
    assert as_good(np.column_stack([scores.mean(1), scores @ weights.T])) == [4]


def test_a_mean_over_layers_has_the_interval_of_joint_draws(result):
    change = result["change"]
    for name, mean_ in change["means"].items():
        assert mean_["value"] == pytest.approx(np.mean([row[name]["value"] for row in change["layers"]]), abs=1e-5)
        assert mean_["low"] <= mean_["value"] <= mean_["high"]
    rng = np.random.default_rng(1)
    one = rng.normal(0.7, 0.05, size=501)
    parts = {"kept": 0.6, "rotated": 0.4, "attenuated": 0.0, "created": 0.0}
    draws = {name: np.stack([one * part] * 2) for name, part in parts.items()}
    rows = [{"layer": layer, "verdict": "rotated"} for layer in (3, 5)]
    found = signal._shares(draws, rows)["rotated"]
    assert found["layers"] == [3, 5]
    assert [found["share"][end] for end in ("value", "low", "high")] == pytest.approx([0.4] * 3)  # a ratio of draws


@pytest.mark.parametrize(("label", "own", "recall", "wrong"), [
    ("shared_rotated", True, 1.0, 0.0), ("shared_same", True, 0.0, None), ("shared_rotated", False, 0.0, 1.0),
])  # fmt: skip
def test_planted_features_tell_what_rotated_is_worth(label, own, recall, wrong):
    """A crosscoder that finds exactly what was planted, one that calls it otherwise, one that finds other things."""
    table = pd.DataFrame({"label": ["shared_same"] * 10, "density": 0.1})

    def crosscoder(x, y):
        streams = np.hstack([dictionaries.unit(x), dictionaries.unit(y)])
        alone, count = np.unique(streams[np.abs(x).sum(1) > 0].round(4), axis=0, return_counts=True)
        alone = alone[count >= 10]  # tokens at which one feature fires
        assert len(alone) == 8
        degrees = np.degrees(np.arccos((alone[:, :12] * alone[:, 12:]).sum(1)))
        assert (degrees > 29).all() and (degrees < 61).all()
        rows = dict(zip(("base", "aligned"), np.split(alone if own else alone[:, ::-1], 2, axis=1), strict=True))
        return SimpleNamespace(rows=rows, table=pd.DataFrame({"label": [label] * 8, "degrees": degrees, "ratio": 1.0}))

    null = SimpleNamespace(table=table, strength=np.ones(10))
    found = features._planted(np.zeros((600, 12), np.float32), null, crosscoder, 0)
    assert found["planted"] == 8 and found["recall"]["value"] == recall
    assert found["false_discovery"]["value"] == wrong and found["labelled"] == (label == "shared_rotated") * 8


# --- bad input --------------------------------------------------------------------------------------------------------


def refuses(match, *args, **options):
    with pytest.raises(AlignlensError, match=match) as caught:
        ask(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600


def test_models_that_cannot_be_loaded(base, pairs, tmp_path):
    refuses("There is no such folder", tmp_path / "missing", base, pairs=pairs)
    refuses("public or that you are logged in for", "nobody/no-such-model", base, pairs=pairs)
    refuses("no shipped toy model", "tiny:llama:dbo", base, pairs=pairs)
    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    refuses("only pickled weights", base, pickled, pairs=pairs)
    damaged = shutil.copytree(base, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:4000])
    refuses("cannot be loaded", base, damaged, pairs=pairs)


def test_nan_weights(base, pairs, tmp_path):
    with models.quietly():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    refuses("NaN or infinite", base, tmp_path, pairs=pairs)


def test_an_architecture_without_a_bridge(pairs, tmp_path):
    from transformers import CTRLConfig

    found = tokenizer(chat=True)
    with models.quietly():
        config = CTRLConfig(vocab_size=len(found), n_embd=16, n_layer=2, n_head=2, dff=32, n_positions=192)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        found.save_pretrained(tmp_path)
    refuses("CTRL", tmp_path, tmp_path, pairs=pairs)


def test_models_that_do_not_belong_together(base, pairs, tmp_path):
    qwen = checkpoint(tmp_path / "qwen", "qwen3")
    refuses("the model is LlamaForCausalLM in the base and Qwen3ForCausalLM in the aligned", base, qwen, pairs=pairs)
    other = checkpoint(tmp_path / "other", "llama")
    tokenizer(chat=True, bos=True, words="zebras quietly juggle vexing onyx boxes").save_pretrained(other)
    refuses("tokenizers differ in", base, other, pairs=pairs)


def test_pairs_that_cannot_be_used(base, aligned, pairs, tmp_path):
    refuses("no such file", base, aligned, pairs=tmp_path / "none.jsonl")
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(pairs.read_text().splitlines()[:9]))
    refuses(r"^\d prompts are left", base, aligned, pairs=few)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(pairs.read_text() + '{"prompt": "a", "chosen": "b"}\n')
    refuses("line 61, field 'rejected': is missing", base, aligned, pairs=broken)
    refuses("no pair of 40 can be used with max_length=5", base, aligned, pairs=pairs, max_length=5)
    named = tmp_path / "named.csv"
    pd.DataFrame({"question": ["a"], "good": ["b"]}).to_csv(named)
    refuses("no column 'chosen'", base, aligned, pairs=named)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layres": 3}, "'layres' is unknown; did you mean 'layers'"),
        ({"layers": "first"}, "layers is 'first'"),
        ({"layers": -1}, "layers is -1"),
        ({"trust_remote_code": "yes"}, "trust_remote_code is 'yes'"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": "many"}, "limit is 'many'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"aligned": None}, "no aligned model is given"),
        ({"base": None}, "no base is given"),
        ({"out": __file__}, "which is a file"),
    ],
)  # fmt: skip
def test_parameters_that_cannot_be_used(options, words):
    with pytest.raises(AlignlensError, match=words.replace("(", r"\(")):
        audit.from_notebook({"base": "a", "aligned": "b"} | options)


def test_layers_beyond_the_model(base, aligned, pairs):
    refuses("block indices from 0 to 1", base, aligned, pairs=pairs, layers="0,7")
    refuses("max_length is 4000, the models take 192 tokens", base, aligned, pairs=pairs, max_length=4000)


@pytest.mark.notebook
def test_the_command_refuses_with_a_message_and_leaves_nothing(base, pairs, tmp_path):
    words = [str(ROOT / "notebooks" / "audit.ipynb"), str(tmp_path / "report.ipynb"), "-p", "base", str(base)]
    words += ["-p", "aligned", str(tmp_path / "none"), "-p", "pairs", str(pairs), "-p", "out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *words, "--no-progress-bar"], cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "There is no such folder; check the path" in done.stderr
    assert not (tmp_path / "out").exists()
