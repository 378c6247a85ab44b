"""Dictionaries in SAELens' layout, a folder with cfg.json and sae_weights.safetensors; SAELens itself is not needed.

A sparse autoencoder with a threshold is a JumpReLU SAE there, whatever it was trained with. SAELens knows one stream at
one hook: crosscoders and windows of layers have no place in it. As of SAELens 6.54.12.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignlens.core.errors import DictionaryError, StoreError
from alignlens.core.store import write_arrays, write_json
from alignlens.dictionaries import Config, Dictionary, check_facts

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # of the layout; below 6 SAELens reads the file as an older one
UNIT = 2e-6  # a decoder row this near to norm 1 is left as it is, so that what we wrote comes back to the bit

NORMALISED = {  # what no fixed weights can do, or what the folder does not say
    "expected_average_only_in": "the factor that it scales inputs by is not in the folder",
    "constant_norm_rescale": "it scales each row by its own norm, which no fixed weights can do",
    "layer_norm": "it scales each row by its own spread, which no fixed weights can do",
    "covariance_whitening": "the matrix that it whitens inputs with is not in the folder",
}


def to_saelens(
    dictionary: Dictionary, folder: str | Path, *, model: str, hook: str, context: int | None = None
) -> Path:
    """Write a sparse autoencoder as a JumpReLU SAE that SAELens opens with ``SAE.load_from_disk(folder)``.

    Parameters
    ----------
    dictionary : of one stream with rows of shape (d,). The bias taken off the input is folded in already, so
        apply_b_dec_to_input is false and the weights go out unchanged: W_enc [d, w], W_dec [w, d], b_enc and threshold
        [w], b_dec [d], float32. The history of the training stays behind.
    folder : made by this call, whole or not at all; one that exists must be empty.
    model, hook : names of the model and of the hook whose activations it reads, such as "blocks.3.hook_resid_post".
    context : tokens of context the activations were read with.

    Returns the folder. Raises DictionaryError for a crosscoder or a window, for a hook or model that differs from the
    dictionary's facts, for a local path as the model's name, and for a folder that holds something.
    """
    folder = Path(folder)
    if len(dictionary.shapes) != 1 or len(next(iter(dictionary.shapes.values()))) != 1:
        raise DictionaryError(
            f"this dictionary reads {_say(dictionary.shapes)}; SAELens has no architecture for several streams or "
            "layers: keep it with Dictionary.save"
        )
    for name, value in {"model": model, "hook": hook}.items():
        if not isinstance(value, str) or not value.strip():
            raise DictionaryError(f"{name} is {value!r}: give its name, as SAELens users will look for it")
    if Path(model).is_absolute():
        raise DictionaryError(f"model is the local path {model!r}: give the name it has for other people")
    said = {"model": model, "hook": hook} | ({"context": context} if context is not None else {})
    check_facts(dictionary.facts, {name: said[name] for name in said if name in dictionary.facts}, "memory")
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": model,
        "hook_name": hook,
        "context_size": context,
        "alignlens": {"config": dataclasses.asdict(dictionary.config), "facts": dictionary.facts | said},
    }
    d, width = dictionary.encoder.shape
    words = {
        "architecture": "jumprelu",
        "d_in": d,
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    arrays = {
        "W_enc": dictionary.encoder,
        "b_enc": dictionary.encoder_bias,
        "W_dec": dictionary.decoder,
        "b_dec": dictionary.decoder_bias,
        "threshold": dictionary.threshold,
    }
    with _beside(folder) as made:
        write_arrays(made / WEIGHTS, {name: np.asarray(array, np.float32) for name, array in arrays.items()})
        try:
            write_json(made / CONFIG, words)
        except StoreError as error:
            raise DictionaryError(f"the dictionary's facts cannot be written: {error}") from error
    return folder


def from_saelens(folder: str | Path, *, stream: str = "base") -> Dictionary:
    """Read a folder that ``to_saelens`` or SAELens wrote (``save_inference_model``, ``save_model`` of a loaded SAE).

    Standard (ReLU) SAEs get a threshold of 0. The decoder's bias that SAELens takes off the input is folded into the
    encoder's, and decoder rows are given norm 1 with codes scaled to match, as SAELens does when it loads with
    ``fold_W_dec_norm=True``: what the dictionary rebuilds does not change. Half precision is read as float32. What
    ``to_saelens`` wrote comes back to the bit, but for the history. An SAE of attention heads (hook_z) reads rows with
    the heads side by side.

    stream : the name its input gets. Facts hold model, hook, context and, for SAEs trained elsewhere, what SAELens says
    of their training (``Config`` then holds width and k only): compare them with ``dictionaries.check_facts``.

    Raises DictionaryError naming file and field: missing or damaged files, an architecture without a fixed threshold,
    normalised inputs, weights that are missing, misshapen or not finite.
    """
    folder = Path(folder)
    try:
        words = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        arrays = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DictionaryError(f"{folder} holds no readable SAELens folder: {error}") from error
    if not isinstance(words, dict):
        raise DictionaryError(f"{folder / CONFIG} is no SAELens configuration: it holds a {type(words).__name__}")
    arrays = {name: array.numpy() for name, array in _weights(words, arrays, folder).items()}

    encoder, decoder, threshold = arrays["W_enc"], arrays["W_dec"], arrays["threshold"]
    bias = arrays["b_enc"]
    if words.get("apply_b_dec_to_input", True):
        bias = bias - arrays["b_dec"].astype(np.float64) @ encoder
    norms = np.maximum(np.linalg.norm(decoder.astype(np.float64), axis=1), 1e-8)  # the floor is SAELens' own
    norms[np.abs(norms - 1) < UNIT] = 1
    config, facts = _training(words, len(norms))
    folded = {
        "encoder": encoder * norms,
        "encoder_bias": bias * norms,
        "decoder": decoder / norms[:, None],
        "decoder_bias": arrays["b_dec"],
        "threshold": threshold * norms,
    }
    folded = {name: np.ascontiguousarray(array, np.float32) for name, array in folded.items()}
    return Dictionary(**folded, shapes={stream: (len(encoder),)}, config=config, facts=facts)


def _weights(words: dict, found: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The five arrays, float32 and checked; DictionaryError says what a fixed threshold cannot do."""
    # Before version 6 the activation function had its own field and normalize_activations could be a bool.
    activation = words.get("activation_fn", words.get("activation_fn_str", "relu"))
    architecture = words.get("architecture", "standard")
    if architecture not in ("standard", "jumprelu") or activation != "relu":
        what = architecture if activation == "relu" else f"{architecture} with {activation}"
        raise DictionaryError(
            f"{folder / CONFIG} describes a {what} SAE, whose codes no fixed threshold gives; standard and jumprelu "
            "can be read (a BatchTopK training is written as jumprelu by save_inference_model)"
        )
    normalised = {False: "none", None: "none", True: "expected_average_only_in"}
    how = words.get("normalize_activations")
    how = how if isinstance(how, str) else normalised.get(how, "unknown")
    if how != "none":
        raise DictionaryError(
            f"{folder / CONFIG} has normalize_activations {how!r}: {NORMALISED.get(how, 'it is unknown here')}. "
            "Fold it in SAELens, then save with normalize_activations 'none'"
        )
    names = ("W_enc", "b_enc", "W_dec", "b_dec") + (("threshold",) if architecture == "jumprelu" else ())
    if missing := [name for name in names if name not in found]:
        raise DictionaryError(f"{folder / WEIGHTS} has no {', '.join(missing)}; it has {', '.join(found) or 'nothing'}")
    scaled = found.get("scaling_factor")
    if scaled is not None and not torch.allclose(scaled.float(), torch.ones(())):
        raise DictionaryError(
            f"{folder / WEIGHTS} holds a scaling_factor: multiply the codes' decoder by it in SAELens, and save again"
        )
    out = {name: found[name].float() for name in names}
    if architecture == "standard":
        out["threshold"] = torch.zeros_like(out["b_enc"])
    d, width = (words.get(name, size) for name, size in zip(("d_in", "d_sae"), out["W_enc"].shape, strict=False))
    shapes = {"W_enc": (d, width), "b_enc": (width,), "W_dec": (width, d), "b_dec": (d,), "threshold": (width,)}
    for name, shape in shapes.items():
        if tuple(out[name].shape) != shape:
            raise DictionaryError(f"{folder / WEIGHTS}: {name} has shape {tuple(out[name].shape)}, not {shape}")
        if not torch.isfinite(out[name]).all():
            raise DictionaryError(f"{folder / WEIGHTS}: {name} holds NaN or infinite values; get the folder again")
    return out


def _training(words: dict, width: int) -> tuple[Config, dict]:
    """Config and facts: our own, or what SAELens says of a training it did."""
    said = {**words, **words.get("metadata", {})}
    names = {"model": ("model_name",), "hook": ("hook_name", "hook_point"), "context": ("context_size",)}
    facts = {name: next((said[key] for key in keys if said.get(key) is not None), None) for name, keys in names.items()}
    facts = {name: value for name, value in facts.items() if value is not None}
    own = said.get("alignlens")
    if own:
        known = {field.name for field in dataclasses.fields(Config)}
        return Config(**{name: value for name, value in own["config"].items() if name in known}), own["facts"] | facts
    details = said.get("training_architecture_details") or {}
    trained = {
        "saelens": said.get("sae_lens_training_version") or said.get("sae_lens_version"),
        "architecture": said.get("training_architecture") or said.get("architecture", "standard"),
        **{name: value for name, value in details.items() if isinstance(value, bool | int | float | str)},
    }
    k = details.get("k")
    return Config(width=width, **({"k": k} if k else {})), facts | {"trained_by": trained}


def _say(shapes: dict) -> str:
    return " and ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())


@contextlib.contextmanager
def _beside(folder: Path):
    """An empty folder beside ``folder`` that takes its name when all went well, and is gone when not."""
    if folder.is_dir() and any(folder.iterdir()):
        raise DictionaryError(f"{folder} holds files already: name a new folder, or empty it first")
    if folder.exists() and not folder.is_dir():
        raise DictionaryError(f"{folder} is a file: name a folder")
    made = folder.parent / f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    made.mkdir(parents=True)
    try:
        yield made
        try:
            os.replace(made, folder)  # takes the place of an empty folder, never of one with files
        except OSError as error:
            raise DictionaryError(f"{folder} could not be put in place: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
