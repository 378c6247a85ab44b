"""SAELens folders: their layout, both ways, and the codes that SAELens itself gives.

The last part needs an interpreter with SAELens (tests/saelens/requirements.txt), named by ALIGNLENS_SAELENS_PYTHON.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from alignlens import dictionaries
from alignlens.core.errors import DictionaryError, StoreError
from alignlens.dictionaries import Config, Dictionary
from alignlens.dictionaries import saelens as interchange
from alignlens.dictionaries.saelens import from_saelens, to_saelens

D, WIDTH = 24, 64
NAMES = {"model": "tiny-llama", "hook": "blocks.1.hook_resid_post"}
ARRAYS = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold")
PYTHON = os.environ.get("ALIGNLENS_SAELENS_PYTHON")
with_saelens = pytest.mark.skipif(
    not PYTHON, reason="set ALIGNLENS_SAELENS_PYTHON to a python that has tests/saelens/requirements.txt"
)


def drawn(seed=0, shapes=None, facts=None) -> Dictionary:
    """A dictionary with random weights and decoder rows of norm 1."""
    rng = np.random.default_rng(seed)
    decoder = rng.standard_normal((WIDTH, D))
    arrays = {
        "encoder": rng.standard_normal((D, WIDTH)) / np.sqrt(D),
        "encoder_bias": rng.standard_normal(WIDTH),
        "decoder": decoder / np.linalg.norm(decoder, axis=1, keepdims=True),
        "decoder_bias": rng.standard_normal(D),
        "threshold": rng.uniform(-0.2, 0.5, WIDTH),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return Dictionary(**arrays, shapes=shapes or {"base": (D,)}, config=Config(width=WIDTH, k=9), facts=facts or {})


def foreign(folder, seed=0, architecture="jumprelu", weights=None, **changes) -> Path:
    """A folder as SAELens saves it: decoder rows of any norm, the decoder's bias taken off the input."""
    rng = np.random.default_rng(seed)
    arrays = {
        "W_enc": rng.standard_normal((D, WIDTH)) / np.sqrt(D),
        "b_enc": rng.standard_normal(WIDTH),
        "W_dec": rng.standard_normal((WIDTH, D)) * rng.uniform(0.1, 2, (WIDTH, 1)) / np.sqrt(D),
        "b_dec": rng.standard_normal(D),
    }
    if architecture == "jumprelu":
        arrays["threshold"] = rng.uniform(0, 0.5, WIDTH)
    arrays = {name: array.astype(np.float32) for name, array in (arrays | (weights or {})).items() if array is not None}
    words = {
        "architecture": architecture, "d_in": D, "d_sae": WIDTH, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre"},
    }  # fmt: skip
    folder.mkdir()
    save_file(arrays, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(words | changes))
    return folder


def formula(folder, x):
    """Codes and rows rebuilt as SAELens' documentation states them, float64, decoder rows as they are."""
    words = json.loads((folder / "cfg.json").read_text())
    w = {name: array.astype(np.float64) for name, array in load_file(folder / "sae_weights.safetensors").items()}
    pre = (x - w["b_dec"] * words["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    codes = np.maximum(pre, 0) * (pre > w.get("threshold", 0))
    return codes, codes @ w["W_dec"] + w["b_dec"], np.linalg.norm(w["W_dec"], axis=1)


def rows(n=500, seed=5):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, D)) + 1).astype(np.float32)


def agree(dictionary, x, codes, rebuilt, tolerance=1e-5):
    """Both give the same codes and rows; where a code lies on its threshold, either may keep it."""
    found = dictionary.codes({"base": x}).toarray()
    tied = np.abs(np.maximum(found, codes) - np.maximum(dictionary.threshold, 0)) < tolerance
    tied &= (found > 0) != (codes > 0)
    assert tied.mean() < 1e-4
    assert np.abs(found - codes)[~tied].max() < tolerance and (found > 0).mean() > 0.05
    clear = ~tied.any(1)
    assert np.abs(dictionary.decode(found) - rebuilt)[clear].max() < tolerance


# Writing


def test_layout(tmp_path):
    folder = to_saelens(drawn(), tmp_path / "deep/sae", **NAMES, context=64)
    assert folder == tmp_path / "deep/sae"
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["sae"]
    arrays = load_file(folder / "sae_weights.safetensors")
    shapes = {"W_enc": (D, WIDTH), "b_enc": (WIDTH,), "W_dec": (WIDTH, D), "b_dec": (D,), "threshold": (WIDTH,)}
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    words = json.loads((folder / "cfg.json").read_text())
    metadata = words.pop("metadata")
    assert words == {
        "architecture": "jumprelu", "d_in": D, "d_sae": WIDTH, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    assert metadata["model_name"] == NAMES["model"] and metadata["hook_name"] == NAMES["hook"]
    assert metadata["context_size"] == 64 and int(metadata["sae_lens_version"].split(".")[0]) >= 6


def test_weights_give_the_same_codes_by_the_formula(tmp_path):
    x = rows()
    codes, rebuilt, _ = formula(to_saelens(drawn(), tmp_path / "sae", **NAMES), x)
    agree(drawn(), x, codes, rebuilt)


def test_the_round_trip_is_exact(tmp_path):
    facts = {"hook": NAMES["hook"], "models": {"base": "00ff"}, "rows": 7}
    there = drawn(facts=facts)
    back = from_saelens(to_saelens(there, tmp_path / "sae", **NAMES))
    for name in ARRAYS:
        found, expected = getattr(back, name), getattr(there, name)
        assert found.dtype == np.float32 and found.flags.c_contiguous and (found == expected).all()
    assert back.shapes == {"base": (D,)} and back.config == there.config
    assert back.facts == facts | NAMES
    assert from_saelens(tmp_path / "sae", stream="aligned").shapes == {"aligned": (D,)}


@pytest.mark.parametrize("seed", range(3))
def test_trained_dictionaries_round_trip_too(tmp_path, seed):
    there = dictionaries.train({"base": rows(2048, seed)}, Config(width=WIDTH, k=6, epochs=1, seed=seed))
    back = from_saelens(to_saelens(there, tmp_path / "sae", **NAMES))
    assert all((getattr(back, name) == getattr(there, name)).all() for name in ARRAYS)


@pytest.mark.parametrize("shapes", [{"base": (D // 2,), "aligned": (D // 2,)}, {"base": (2, D // 2)}, {"base": (1, D)}])
def test_crosscoders_and_windows_are_refused(tmp_path, shapes):
    with pytest.raises(DictionaryError, match=r"SAELens has no architecture .* Dictionary\.save"):
        to_saelens(drawn(shapes=shapes), tmp_path / "sae", **NAMES)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled_and_others_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (to_saelens(drawn(), tmp_path / "empty", **NAMES) / "cfg.json").is_file()
    before = (tmp_path / "empty/cfg.json").read_bytes()
    with pytest.raises(DictionaryError, match="is there already: name a new folder, or empty it first"):
        to_saelens(drawn(1), tmp_path / "empty", **NAMES)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DictionaryError, match="is there already"):
        to_saelens(drawn(), tmp_path / "file", **NAMES)
    assert (tmp_path / "empty/cfg.json").read_bytes() == before and (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_names_are_checked(tmp_path):
    with pytest.raises(DictionaryError, match="hook is ''"):
        to_saelens(drawn(), tmp_path / "sae", model="m", hook="")
    with pytest.raises(DictionaryError, match="local path"):
        to_saelens(drawn(), tmp_path / "sae", model=str(tmp_path), hook="h")
    with pytest.raises(DictionaryError, match="trained with hook 'blocks.0.hook_mlp_out'"):
        to_saelens(drawn(facts={"hook": "blocks.0.hook_mlp_out"}), tmp_path / "sae", **NAMES)
    with pytest.raises(StoreError, match="facts.rows"):
        to_saelens(drawn(facts={"rows": object()}), tmp_path / "sae", **NAMES)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, value):
        raise OSError("disk full")

    monkeypatch.setattr(interchange, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        to_saelens(drawn(), tmp_path / "sae", **NAMES)
    assert not list(tmp_path.iterdir())


# Reading


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("bias_off_input", [True, False])
def test_foreign_folders_by_the_formula(tmp_path, architecture, bias_off_input):
    folder = foreign(tmp_path / "sae", architecture=architecture, apply_b_dec_to_input=bias_off_input)
    x, found = rows(), from_saelens(folder)
    codes, rebuilt, norms = formula(folder, x)
    agree(found, x, codes * norms, rebuilt)
    assert np.allclose(np.linalg.norm(found.decoder, axis=1), 1, atol=1e-6)
    assert (found.threshold == 0).all() == (architecture == "standard")
    assert {name: found.facts[name] for name in ("model", "hook")} == {
        "model": "gpt2",
        "hook": "blocks.3.hook_resid_pre",
    }


def test_what_saelens_says_of_its_training_is_kept(tmp_path):
    details = {"k": 12.0, "aux_loss_coefficient": 1.0, "l0_warm_up_steps": None}
    metadata = {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.1.0", "context_size": 128}
    metadata |= {"training_architecture": "batchtopk", "training_architecture_details": details}
    found = from_saelens(foreign(tmp_path / "sae", metadata=metadata))
    assert found.config.k == 12 and found.config.width == WIDTH
    assert found.facts == {
        "context": 128,
        "trained_by": {"saelens": "6.1.0", "architecture": "batchtopk", "k": 12.0, "aux_loss_coefficient": 1.0},
    }


def test_half_precision_is_read_as_float32(tmp_path):
    folder = foreign(tmp_path / "sae")
    arrays = {n: torch.from_numpy(a).bfloat16() for n, a in load_file(folder / "sae_weights.safetensors").items()}
    save_torch(arrays, folder / "sae_weights.safetensors")
    found = from_saelens(folder)
    assert {getattr(found, name).dtype for name in ARRAYS} == {np.dtype(np.float32)}
    assert (found.decoder_bias == arrays["b_dec"].float().numpy()).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "'architecture': 'topk'}: only standard and jumprelu SAEs of raw inputs"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"activation_fn_str": "topk", "architecture": "standard"}, "'activation_fn_str': 'topk'"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"normalize_activations": "layer_norm"}, "'normalize_activations': 'layer_norm'"),
        ({"normalize_activations": True}, "'normalize_activations': True"),
        ({"d_sae": WIDTH + 1}, r"W_enc has shape \(24, 64\), not \(24, 65\)"),
        ({"weights": {"threshold": None}}, r"threshold has shape .*, not \(64,\)"),
        ({"weights": {"b_enc": np.full(WIDTH, np.nan)}}, "b_enc holds NaN"),
        ({"weights": {"b_dec": np.zeros(D + 1)}}, "b_dec has shape"),
        ({"weights": {"scaling_factor": np.full(WIDTH, 2.0)}}, "scaling_factor"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, changes, message):
    with pytest.raises(DictionaryError, match=message):
        from_saelens(foreign(tmp_path / "sae", **changes))


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(DictionaryError, match="holds no readable SAELens folder"):
        from_saelens(tmp_path / "nowhere")
    for name in ("cfg.json", "sae_weights.safetensors"):
        folder = foreign(tmp_path / name.split(".")[0])
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
        with pytest.raises(DictionaryError, match="holds no readable SAELens folder"):
            from_saelens(folder)
    (folder / "cfg.json").write_text("[]")
    save_file({"x": np.zeros(1)}, folder / "sae_weights.safetensors")
    with pytest.raises(DictionaryError, match="holds no readable SAELens folder"):
        from_saelens(folder)


# SAELens itself


def saelens(script, *words) -> dict:
    """Run a script of tests/saelens in the other interpreter; the JSON of its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [PYTHON, str(Path(__file__).parent / "saelens" / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def checked(tmp_path, folder, x, *words):
    """Metadata, codes and rows rebuilt of a folder that SAELens has loaded."""
    save_file({"x": x}, tmp_path / "rows.safetensors")
    metadata = saelens("check.py", folder, tmp_path / "rows.safetensors", tmp_path / "out.safetensors", *words)
    out = load_file(tmp_path / "out.safetensors")
    return metadata, out["codes"], out["rebuilt"]


@with_saelens
@pytest.mark.parametrize("made", ["drawn", "trained"])
def test_saelens_opens_ours(tmp_path, made):
    x = rows(4096)
    config = Config(width=WIDTH, k=6, epochs=2)
    dictionary = drawn() if made == "drawn" else dictionaries.train({"base": x}, config)
    folder = to_saelens(dictionary, tmp_path / "sae", **NAMES, context=64)
    metadata, codes, rebuilt = checked(tmp_path, folder, x, "--again", tmp_path / "again")
    agree(dictionary, x, codes, rebuilt)
    assert metadata["class"] == "JumpReLUSAE"
    assert (metadata["model_name"], metadata["hook_name"]) == (NAMES["model"], NAMES["hook"])
    again = from_saelens(tmp_path / "again")
    assert again.config == dictionary.config and again.facts == {**dictionary.facts, **NAMES, "context": 64}
    assert all((getattr(again, name) == getattr(dictionary, name)).all() for name in ARRAYS)


@with_saelens
@pytest.mark.parametrize(("architecture", "bias_off_input"), [("standard", True), ("jumprelu", True)])
def test_we_open_what_saelens_opens(tmp_path, architecture, bias_off_input):
    folder, x = foreign(tmp_path / "sae", architecture=architecture, apply_b_dec_to_input=bias_off_input), rows()
    _, codes, rebuilt = checked(tmp_path, folder, x, "--fold")
    agree(from_saelens(folder), x, codes, rebuilt)


@with_saelens
def test_we_open_what_saelens_trained(tmp_path):
    x = rows(4096)
    save_file({"x": x}, tmp_path / "train.safetensors")
    settings = {"width": WIDTH, "k": 6, "batch": 256, "passes": 2, "rate": 3e-3, "seed": 0}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    told = saelens("train.py", tmp_path / "train.safetensors", tmp_path / "sae", *words)
    assert told["samples"] == 8192 and told["seconds"] > 0
    _, codes, rebuilt = checked(tmp_path, tmp_path / "sae", x)
    found = from_saelens(tmp_path / "sae")
    agree(found, x, codes, rebuilt)
    assert found.config.k == 6 and found.facts["trained_by"]["architecture"] == "batchtopk"
