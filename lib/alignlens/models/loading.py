"""Load a base, an aligned checkpoint, an adapter or a reward model, and check what was loaded."""

import re
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from alignlens.core.errors import ModelError
from alignlens.models.session import quietly

Source = str | Path
# What Transformers, PEFT and safetensors raise for a source that is damaged, is no model, or does not fit.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, SafetensorError)


def pinned(source: Source) -> tuple[str, dict[str, str]]:
    """Name and ``{"revision": ...}`` of a hub id that ends in ``@revision``; any other source as it is, and ``{}``."""
    found = re.fullmatch(r"(\w[\w.-]*(?:/[\w.-]+)?)@(\S+)", str(source))
    hub = found and not Path(source).exists()
    return (found[1], {"revision": found[2]}) if hub else (str(source), {})


def load(source: Source, adapter: Source | None = None, *, device: str = "cpu", trust_remote_code: bool = False):
    """Load a causal language model and its tokenizer, and check them.

    source : hub id (``id@revision`` pins it) or local folder of a base or a merged checkpoint.
    adapter : hub id or local folder of a PEFT adapter on ``source``; merged into the weights.
    device : float32 on the CPU, bfloat16 elsewhere.
    Returns (transformers.PreTrainedModel, tokenizer). Raises ModelError when the source is missing or out of reach,
    holds only pickled weights, has non-finite weights, or when its tokenizer has more tokens than the model has
    embeddings or does not give a text back."""
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    options = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16, "trust_remote_code": trust_remote_code}
    model = _weights(transformers.AutoModelForCausalLM, source, **options)
    # Samples come from the unmodified distribution: drop the checkpoint's own temperature, top-k and penalties.
    kept = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**kept)
    model = model if adapter is None else _merged(model, adapter)
    check(model, tokenizer, source)
    return model.to(device).eval(), tokenizer


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model alone; sources and errors as for ``load``."""
    return _fetch(transformers.AutoTokenizer, source, trust_remote_code=trust_remote_code)


def load_reward(base: Source, adapter: Source, *, device: str = "cpu", trust_remote_code: bool = False):
    """Load a reward model: a base with a trained score head, stored as a local adapter that holds the head.

    Raises ModelError when the adapter holds no score head (a fresh one would reward noise) or does not fit the base."""
    model = score_model(base, trust_remote_code=trust_remote_code)
    return _merged(model, adapter, head=True).to(device).eval()


def score_model(source: Source, *, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """A model in float32 with a new score head of one value, to be trained."""
    options = {"num_labels": 1, "dtype": torch.float32, "trust_remote_code": trust_remote_code}
    return _weights(transformers.AutoModelForSequenceClassification, source, **options)


def describe(source: Source, *, trust_remote_code: bool = False) -> dict:
    """Architecture, depth and width of a model without loading its weights."""
    text = _fetch(transformers.AutoConfig, source, trust_remote_code=trust_remote_code).get_text_config()
    return {"model_type": text.model_type, "layers": text.num_hidden_layers, "d_model": text.hidden_size}


def check(model, tokenizer, source="model") -> None:
    """Refuse a model with non-finite weights, or a tokenizer that does not belong to it: ModelError."""
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    text = "A short line, 1 of 2."
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    problems = {
        f"weight {', '.join(broken[:1])} holds NaN or infinite values; it is damaged": broken,
        f"its tokenizer knows token {highest}, it has embeddings for {rows} only; use its own": highest >= rows,
        f"its tokenizer turns {text!r} into {back!r}; responses would change": text not in back,
    }
    if problem := next((problem for problem, found in problems.items() if found), None):
        raise ModelError(f"model {str(source)!r}: {problem}")


def _fetch(kind, source, **options):
    name, revision = pinned(source)
    try:
        with quietly():
            return kind.from_pretrained(name, **revision, **options)
    except UNREADABLE as error:
        raise ModelError(f"model {str(source)!r} cannot be loaded: {_first_line(error)}. {_advice(name)}") from error


def _weights(kind, source, **options):
    """A model from safetensors, all of its weights (but a new score head) from its files."""
    model, found = _fetch(kind, source, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(set(found["missing_keys"]) - {"score.weight"}):
        what = f"its files lack {len(missing)} weights, {missing[0]} first; they would be random"
        raise ModelError(f"model {str(source)!r}: {what}. Fetch or save the model again, with all of its files")
    return model


def _merged(model, adapter, *, head: bool = False):
    """The model with an adapter merged into it. PEFT alone would load what fits and leave the rest."""
    (name, revision), names = pinned(adapter), set()
    try:
        if Path(name).is_dir():
            with safe_open(Path(name) / "adapter_model.safetensors", "pt") as weights:
                names = _compared(weights.keys())
        if head and not any("score" in name for name in names):
            raise ValueError("it holds no trained score head, and a new one rewards noise")
        with quietly():
            model = PeftModel.from_pretrained(model, name, **revision)
            if names and names != _compared(get_peft_model_state_dict(model)):
                raise ValueError("it has other weights than the model has places for")
    except UNREADABLE as error:
        raise ModelError(
            f"adapter {str(adapter)!r} does not fit the model: {_first_line(error)}. It needs adapter_config.json and "
            "adapter_model.safetensors (convert pickled weights first), and the base that it was trained on"
        ) from error
    return model.merge_and_unload()


def _compared(names) -> set[str]:
    return {name for name in names if "lora_" in name or "score" in name}


def _first_line(error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _advice(name: str) -> str:
    """What to do about a source that cannot be loaded."""
    if Path(name).is_dir():
        kinds = {file.suffix for file in Path(name).iterdir()}
        if kinds & {".bin", ".pt", ".pth"} and ".safetensors" not in kinds:
            return "It holds only pickled weights; convert them to safetensors first"
        return "It needs config.json, safetensors weights and the tokenizer's files; give an adapter beside its base"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "There is no such folder; check the path"
    return "Give a local folder, or a hub id that is public or that you are logged in for, with the hub in reach"
