"""Load a base, an aligned checkpoint, an adapter or a reward model, and check what was loaded."""

import json
import re
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from alignlens.core.errors import ModelError
from alignlens.models.adapters import merge, own_tokenizer
from alignlens.models.sources import Source, file_of, opening

HEADS = ("v_head.", "value_head.")  # of PPO's value models: no part of the policy
WRAPPERS = {r"^(_orig_mod|module)\.": ""}  # what compiling or parallel training puts before names
BUFFERS = r".*\.(attn|attention)(\.attention)?\.(masked_)?bias|.*\.inv_freq"  # masks and frequencies of old checkpoints


def load(source: Source, adapter: Source | None = None, *, device: str = "cpu", trust_remote_code: bool = False):
    """Load a causal language model and its tokenizer, and check them.

    source : hub id (``id@revision`` pins it) or local folder of a base or a merged checkpoint.
    adapter : hub id or local folder of a PEFT adapter on ``source``; merged into the weights.
    device : float32 on the CPU, bfloat16 elsewhere.
    Returns (transformers.PreTrainedModel, tokenizer), the tokenizer being the adapter's own if it brings one; ``notes``
    gives what a user should know of the model. Raises ModelError when the source is missing or out of reach, holds
    pickled or non-finite weights, or others than its configuration has places for, when an adapter does not fit, or
    when the tokenizer has more tokens than the model has embeddings or does not give a text back."""
    tokenizer, found = load_tokenizer(source, trust_remote_code=trust_remote_code), []
    options = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16, "trust_remote_code": trust_remote_code}
    model = _weights(transformers.AutoModelForCausalLM, source, found, **options).to(device)
    # Samples come from the unmodified distribution: drop the checkpoint's own temperature, top-k and penalties.
    kept = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**kept)
    if adapter is not None:
        model, told = merge(model, adapter, source)
        tokenizer, more = own_tokenizer(adapter, tokenizer, trust_remote_code=trust_remote_code)
        found += told + more
    check(model, tokenizer, source)
    model.alignlens_notes = found
    return model.eval(), tokenizer


def notes(model) -> list[str]:
    """What a user should know of a model that ``load`` gave, one sentence each; empty for any other."""
    return list(getattr(model, "alignlens_notes", []))


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model alone; sources and errors as for ``load``."""
    return _fetch(transformers.AutoTokenizer, source, trust_remote_code=trust_remote_code)


def load_reward(base: Source, adapter: Source, *, device: str = "cpu", trust_remote_code: bool = False):
    """Load a reward model: a base with a trained score head, stored as an adapter that holds the head.

    Raises ModelError when the adapter holds no score head (a fresh one would reward noise) or does not fit the base."""
    model = score_model(base, trust_remote_code=trust_remote_code)
    return merge(model, adapter, base, head=True)[0].to(device).eval()


def score_model(source: Source, *, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """A model in float32 with a new score head of one value, to be trained."""
    options = {"num_labels": 1, "dtype": torch.float32, "trust_remote_code": trust_remote_code}
    return _weights(transformers.AutoModelForSequenceClassification, source, [], **options)


def describe(source: Source, *, trust_remote_code: bool = False) -> dict:
    """Architecture, depth and width of a model without loading its weights."""
    text = _fetch(transformers.AutoConfig, source, trust_remote_code=trust_remote_code).get_text_config()
    return {"model_type": text.model_type, "layers": text.num_hidden_layers, "d_model": text.hidden_size}


def check(model, tokenizer, source="model") -> None:
    """Refuse a model with non-finite weights or logits, or a tokenizer that does not belong to it: ModelError."""
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    text = "A short line, 1 of 2."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids)
    problems = {
        f"weight {', '.join(broken[:1])} holds NaN or infinite values; it is damaged": broken,
        f"its tokenizer knows token {highest}, it has embeddings for {rows} only; use its own": highest >= rows,
        f"its tokenizer turns {text!r} into {back!r}; responses would change": text not in back,
    }
    if problem := next((problem for problem, found in problems.items() if found), None):
        raise ModelError(f"model {str(source)!r}: {problem}")
    with opening(source), torch.inference_mode():
        ids = (8 * ids)[:16]
        both = torch.tensor([ids, [*ids[:-1], (ids[-1] + 1) % rows]], device=model.device)
        logits = model(input_ids=both).logits
        if not torch.isfinite(logits).all():
            raise ValueError("its weights are finite, its logits are not: check the values in config.json")
        if logits.dim() < 3:  # one value a text, of a score head
            return
        apart = (logits[0, :-1] - logits[1, :-1]).abs().max()  # the two texts differ in the last token only
        if apart > 100 * torch.finfo(logits.dtype).eps * logits.abs().max():  # more than rounding
            raise ValueError("what it says of a token depends on later ones: it is no causal language model")


def _fetch(kind, source, **options):
    with opening(source) as (name, revision):
        return kind.from_pretrained(name, **revision, **options)


def _weights(kind, source, notes: list[str], **options):
    """A model from safetensors, all of its weights (but a new score head) from its files, and all of theirs in it."""
    policy = kind is transformers.AutoModelForCausalLM
    with opening(source) as (name, revision):
        files = ("config.json", "model.safetensors.index.json", "adapter_config.json")
        config, index, beside = (file_of(name, file, revision) for file in files)
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else ["model.safetensors"]
        if pickled := [shard for shard in shards if not shard.endswith(".safetensors")]:
            raise ValueError(f"its index points to {pickled[0]}, and pickled weights are not loaded")
        if config and "quantization_config" not in json.loads(config.read_text()):
            for file in filter(None, (file_of(name, shard, revision) for shard in shards)):
                _refuse_codes(file)
        # Transformers would put an adapter that lies beside the weights on top of them: it finds none in this folder.
        options |= {"adapter_kwargs": {"subfolder": "no-adapter"}, "ignore_mismatched_sizes": True}
        options |= {"use_safetensors": True, "output_loading_info": True, "key_mapping": WRAPPERS}
        model, found = kind.from_pretrained(name, **revision, **options)
    if policy and "SequenceClassification" in str(model.config.architectures):
        raise ModelError(f"model {str(source)!r} is a classifier or reward model, not one that writes answers")
    extra = [weight for weight in sorted(found["unexpected_keys"]) if policy and not re.fullmatch(BUFFERS, weight)]
    values = [weight for weight in extra if weight.startswith(HEADS)]
    missing = sorted(set(found["missing_keys"]) - (set() if policy else {"score.weight"}))
    wrong = [f"{weight}: {list(own)}, by its config.json {list(due)}" for weight, own, due in found["mismatched_keys"]]
    problems = {
        "its files lack {} weights, {} first; they would be random": missing,
        "{} of its weights have another shape, such as {}": sorted(wrong),
        "its config.json has no place for {} weights of its files, {} first": [n for n in extra if n not in values],
    }
    for problem, names in problems.items():
        if names:
            what = problem.format(len(names), names[0])
            raise ModelError(f"model {str(source)!r}: {what}. Fetch or save the model again, with all of its files")
    if beside:
        notes.append("Adapter files beside the model's weights were not applied; to apply them, give them as adapter.")
    if values:
        notes.append(f"A value head ({values[0]}) beside the model's weights was left out.")
    return model


def _refuse_codes(file: Path) -> None:
    """Weights that are kept as whole numbers are codes of a quantisation: read as they are, they would be noise."""
    with safe_open(file, "pt") as weights:
        kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    if wrong := [name for name, kind in kinds.items() if name.endswith(".weight") and kind[0] in "IU"]:
        raise ValueError(f"{wrong[0]} holds codes of type {kinds[wrong[0]]}, and nothing says how to read them")
