"""Dictionaries in SAELens' layout, a folder with cfg.json and sae_weights.safetensors; SAELens itself is not needed.

A sparse autoencoder with a threshold is a JumpReLU SAE there; crosscoders and windows of layers have no place in it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignlens.core.errors import DictionaryError
from alignlens.core.files import replacing_folder
from alignlens.core.store import write_arrays, write_json
from alignlens.dictionaries.model import ARRAYS, Config, Dictionary, check_facts

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
THEIRS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")  # the weights' names, in the order of ARRAYS
VERSION = "6.54.12"  # of the layout; below 6 SAELens reads the file as an older one
UNIT = 2e-6  # a decoder row this near to norm 1 is left as it is, so that what we wrote comes back to the bit
NAMES = {"model": "model_name", "hook": "hook_name", "context": "context_size"}  # of facts -> of SAELens' metadata
SUPPORTED = {  # field of cfg.json -> what a fixed threshold and fixed weights can do
    "architecture": ("standard", "jumprelu"), "activation_fn": (None, "relu"), "activation_fn_str": (None, "relu"),
    "normalize_activations": (None, False, "none"),
}  # fmt: skip


def to_saelens(dictionary: Dictionary, folder, *, model: str, hook: str, context: int | None = None) -> Path:
    """Write a sparse autoencoder as a JumpReLU SAE that SAELens opens with ``SAE.load_from_disk(folder)``.

    dictionary : of one stream [rows, d]; weights go out unchanged, the history stays behind. folder : made by this
    call, whole or not at all; one that exists must be empty. model, hook : names, such as "blocks.3.hook_resid_post".
    context : tokens of context. Returns the folder. Raises DictionaryError for a crosscoder or a window, for a hook or
    model that differs from the facts, for a local path as the model's name, and for a folder that holds something."""
    (d, width), said = dictionary.encoder.shape, {"model": model, "hook": hook, "context": context}
    if [len(shape) for shape in dictionary.shapes.values()] != [1]:
        raise DictionaryError(f"SAELens has no architecture for {dictionary.shapes}: keep it with Dictionary.save")
    if not model or not hook or Path(model).is_absolute():
        raise DictionaryError(f"model is {model!r}, hook is {hook!r}: give the names users look for, not a local path")
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
    arrays = {t: np.asarray(getattr(dictionary, o), np.float32) for t, o in zip(THEIRS, ARRAYS, strict=True)}
    try:
        with replacing_folder(folder) as made:
            write_arrays(made / WEIGHTS, arrays)
            write_json(made / CONFIG, words)
    except FileExistsError as error:
        raise DictionaryError(f"{error}: name a new folder, or empty it first") from error
    return Path(folder)


def from_saelens(folder: str | Path, *, stream: str = "base") -> Dictionary:
    """Read a folder that ``to_saelens`` or SAELens wrote (``save_inference_model``, ``save_model`` of a loaded SAE).

    Standard (ReLU) SAEs get a threshold of 0; a decoder's bias taken off the input is folded into the encoder's,
    decoder rows get norm 1 with codes scaled to match. What ``to_saelens`` wrote comes back to the bit, but for the
    history. stream : the name its input gets (heads of a hook_z side by side). Facts hold model, hook, context and, for
    SAEs trained elsewhere, what SAELens says of their training: compare them with ``check_facts``. Raises
    DictionaryError naming file and field for folders that are damaged or no SAE of raw inputs with fixed thresholds."""
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
    wrong = {name: words.get(name) for name, values in SUPPORTED.items() if words.get(name) not in values}
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
