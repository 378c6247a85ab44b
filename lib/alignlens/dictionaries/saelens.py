"""Dictionaries in SAELens' layout, a folder with cfg.json and sae_weights.safetensors; SAELens itself is not needed.

A sparse autoencoder with a threshold is a JumpReLU SAE there, whatever it was trained with. SAELens knows one stream at
one hook: crosscoders and windows of layers have no place in it. As of SAELens 6.54.12.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignlens.core.errors import DictionaryError
from alignlens.core.files import replacing_folder
from alignlens.core.store import write_arrays, write_json
from alignlens.dictionaries.config import Config
from alignlens.dictionaries.model import Dictionary, check_facts

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # of the layout; below 6 SAELens reads the file as an older one
UNIT = 2e-6  # a decoder row this near to norm 1 is left as it is, so that what we wrote comes back to the bit
NAMES = {"model": "model_name", "hook": "hook_name", "context": "context_size"}  # of facts -> of SAELens' metadata
SUPPORTED = {  # field of cfg.json -> what a fixed threshold and fixed weights can do
    "architecture": ("standard", "jumprelu"), "activation_fn": (None, "relu"), "activation_fn_str": (None, "relu"),
    "normalize_activations": (None, False, "none"),
}  # fmt: skip


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
    (d, width), said = dictionary.encoder.shape, {"model": model, "hook": hook, "context": context}
    if [len(shape) for shape in dictionary.shapes.values()] != [1]:
        several = f"{dictionary.shapes}; SAELens has no architecture for several streams or layers"
        raise DictionaryError(f"this dictionary reads {several}: keep it with Dictionary.save")
    if not model or not hook or Path(model).is_absolute():
        given = f"model is {model!r} and hook is {hook!r}"
        raise DictionaryError(f"{given}: give the names that SAELens users will look for, not a local path")
    said = {name: value for name, value in said.items() if value is not None}
    check_facts(dictionary.facts, {name: said[name] for name in said if name in dictionary.facts}, "memory")
    own = {"config": dataclasses.asdict(dictionary.config), "facts": dictionary.facts | said}
    words = {
        "architecture": "jumprelu", "d_in": d, "d_sae": width, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION, "sae_lens_training_version": None, "model_name": model, "hook_name": hook,
            "context_size": context, "alignlens": own,
        },
    }  # fmt: skip
    arrays = {
        "W_enc": dictionary.encoder, "b_enc": dictionary.encoder_bias, "W_dec": dictionary.decoder,
        "b_dec": dictionary.decoder_bias, "threshold": dictionary.threshold,
    }  # fmt: skip
    try:
        with replacing_folder(folder) as made:
            write_arrays(made / WEIGHTS, {name: np.asarray(array, np.float32) for name, array in arrays.items()})
            write_json(made / CONFIG, words)
    except FileExistsError as error:
        raise DictionaryError(f"{error}: name a new folder, or empty it first") from error
    return Path(folder)


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
        words = {**words, **words.get("metadata", {})}
        arrays = {name: array.float().numpy() for name, array in load_file(folder / WEIGHTS).items()}
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise DictionaryError(f"{folder} holds no readable SAELens folder: {error}") from error
    _check(words, arrays, folder)
    encoder, decoder, bias = arrays["W_enc"], arrays["W_dec"], arrays["b_enc"]
    if words.get("apply_b_dec_to_input", True):
        bias = bias - arrays["b_dec"].astype(np.float64) @ encoder
    norms = np.maximum(np.linalg.norm(decoder.astype(np.float64), axis=1), 1e-8)  # the floor is SAELens' own
    norms[np.abs(norms - 1) < UNIT] = 1
    folded = {
        "encoder": encoder * norms, "encoder_bias": bias * norms, "decoder": decoder / norms[:, None],
        "decoder_bias": arrays["b_dec"], "threshold": arrays["threshold"] * norms,
    }  # fmt: skip
    folded = {name: np.ascontiguousarray(array, np.float32) for name, array in folded.items()}
    config, facts = _training(words)
    return Dictionary(**folded, shapes={stream: (len(encoder),)}, config=config, facts=facts)


def _check(words: dict, arrays: dict[str, np.ndarray], folder: Path) -> None:
    """Raise DictionaryError for what cannot be read; a standard SAE gets its threshold of 0."""
    d, width = words.get("d_in"), words.get("d_sae")
    shapes = {"W_enc": (d, width), "b_enc": (width,), "W_dec": (width, d), "b_dec": (d,), "threshold": (width,)}
    found = {name: words.get(name) for name in SUPPORTED}
    wrong = {name: value for name, value in found.items() if value not in SUPPORTED[name]}
    wrong |= {name: "in the weights" for name in set(arrays) - set(shapes)}
    if wrong:
        can = "standard and jumprelu SAEs of raw inputs can be read (save_inference_model writes a BatchTopK one so)"
        raise DictionaryError(f"{folder} has {wrong}: only {can}; convert it in SAELens and save it again")
    if words["architecture"] == "standard":
        arrays["threshold"] = np.zeros(width, np.float32)
    for name, shape in shapes.items():
        array = arrays.get(name, np.empty(0))
        if array.shape != shape or not np.isfinite(array).all():
            is_so = f"has shape {array.shape}, not {shape}" if array.shape != shape else "holds NaN or infinite values"
            raise DictionaryError(f"{folder / WEIGHTS}: {name} {is_so}; get the folder again")


def _training(words: dict) -> tuple[Config, dict]:
    """Config and facts: our own, or what SAELens says of a training it did."""
    facts = {name: words[key] for name, key in NAMES.items() if words.get(key) is not None}
    if own := words.get("alignlens"):
        return Config(**own["config"]), own["facts"] | facts
    details = words.get("training_architecture_details") or {}
    trained = {
        "saelens": words.get("sae_lens_training_version") or words.get("sae_lens_version"),
        "architecture": words.get("training_architecture") or words["architecture"],
        **{name: value for name, value in details.items() if isinstance(value, bool | int | float | str)},
    }
    return Config(width=words["d_sae"], k=details.get("k") or Config.k), facts | {"trained_by": trained}
