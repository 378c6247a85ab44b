"""Merge a PEFT adapter of any kind into its base, and check that nothing of it was lost on the way."""

import copy
import json
from dataclasses import fields
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import AutoTokenizer

from alignlens.core.errors import ModelError
from alignlens.models.session import quietly
from alignlens.models.sources import Source, file_of, first_line, opening, pinned

PREFIX = "base_model.model."
TOLERANCE = 1e-3, 0.1  # of the logits' size, between an adapter beside its base and merged: float32, half precision


def merge(model, adapter: Source, base: Source, *, head: bool = False):
    """Merge an adapter into its base: (model, notes), the notes being what a user should know.

    Every weight of the adapter must be in its file, and of its file in the model (by PEFT's account), and the merge
    must leave logits as they were. Tied embeddings are untied if the adapter changes one end. ``head``: it must hold a
    trained score head. Otherwise, and for a kind of adapter that is no change of weights, ModelError."""
    with opening(adapter, "adapter") as (name, revision):
        files = [file_of(name, file, revision) for file in ("adapter_config.json", "adapter_model.safetensors")]
        if None in files:
            raise FileNotFoundError("one of its two files is missing")
        given, folder = json.loads(files[0].read_text()), str(files[0].parent)
        config, weights = PeftConfig.from_pretrained(folder), load_peft_weights(folder, device="cpu")
    if problem := _unmergeable(config):
        raise ModelError(f"adapter {str(adapter)!r} {problem}")
    notes = _notes(config, given, base)
    try:
        if head and not any("score" in name for name in weights):
            raise ValueError("it holds no trained score head, and a new one rewards noise")
        if broken := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
            raise ValueError(f"its {broken[0].removeprefix(PREFIX)} holds NaN or infinite values")
        with quietly():
            merged, untied = _merged(model, config, weights)
    except Exception as error:  # every kind of adapter raises its own
        advice = f"It needs the base that it was trained on ({given.get('base_model_name_or_path') or 'not named'})"
        raise ModelError(f"adapter {str(adapter)!r} does not fit the model: {first_line(error)}. {advice}") from error
    if untied:
        notes.append("The adapter changes one end of tied embeddings: merged, the head has weights of its own.")
    return merged, notes


def own_tokenizer(adapter: Source, tokenizer, *, trust_remote_code: bool = False):
    """The tokenizer that an adapter brings, with what it lacks from its base's: (tokenizer, notes).

    Raises ModelError where the two give one token different ids: then the adapter was trained on other ids."""
    with opening(adapter, "adapter") as (name, revision):
        files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "chat_template.jinja")
        *whole, settings, template = (file_of(name, file, revision) for file in files)
        if any(whole):
            own = AutoTokenizer.from_pretrained(name, **revision, trust_remote_code=trust_remote_code)
        else:
            own, told = copy.deepcopy(tokenizer), json.loads(settings.read_text()) if settings else {}
            own.chat_template = template.read_text() if template else told.get("chat_template")
    own.chat_template = own.chat_template or tokenizer.chat_template
    ids, base = own.get_vocab(), tokenizer.get_vocab()
    if wrong := sorted(token for token in ids.keys() & base.keys() if ids[token] != base[token]):
        differ = f"its tokenizer and the base's give {len(wrong)} tokens different ids, {wrong[0]!r} first"
        raise ModelError(f"adapter {str(adapter)!r} does not fit the model: {differ}. It needs its own base")
    parts = {
        "tokens": ids != base, "chat template": own.chat_template != tokenizer.chat_template,
        "special tokens": own.special_tokens_map != tokenizer.special_tokens_map,
    }  # fmt: skip
    differ = ", ".join(part for part, found in parts.items() if found)
    return own, [f"The adapter's own tokenizer is used; it differs from the base's in: {differ}."] if differ else []


def _unmergeable(config) -> str | None:
    """Why an adapter is no change of its base's weights that its files tell, if it is none."""
    kind, train = config.peft_type.value.replace("_", " ").lower(), "train an adapter that can be merged, such as LoRA"
    if config.is_prompt_learning or config.is_adaption_prompt:
        return f"is of kind {kind}: it adds virtual tokens and changes no weights; {train}"
    if getattr(config, "alora_invocation_tokens", None):
        return f"is an activated LoRA: it acts only after some tokens and cannot be merged into weights; {train}"
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start.startswith(("pissa_niter", "corda", "lora_ga")):  # PEFT would draw another base, or take the unchanged one
        how = "save it with path_initial_model_for_weight_conversion"
        return f"was trained on a base that its start ({start}) changed in a way that its files do not tell; {how}"


def _notes(config, given: dict, base: Source) -> list[str]:
    notes, named = [], given.get("base_model_name_or_path")
    if named and _name(named) != _name(base):
        notes.append(f"The adapter names {_name(named)!r} as its base and was put on {_name(base)!r}: check that they "
                     "are the same weights.")  # fmt: skip
    known = {field.name for field in fields(config)}
    if unknown := sorted(key for key, value in given.items() if value and key not in known):
        notes.append(f"The installed PEFT does not know the adapter's settings {', '.join(unknown)}; they are ignored.")
    return notes


def _name(source: Source) -> str:
    """The last part of a hub id or path; of a folder in the hub's cache the model's name."""
    path = Path(pinned(source)[0])
    path = path.resolve() if path.exists() else path
    cached = [part for part in path.parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else path.name).lower()


def _merged(model, config, weights):
    """(merged model, whether its embeddings were untied)."""
    _resize(model, weights)
    head, config.inference_mode = model.get_output_embeddings(), True
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    tuned = get_peft_model(model, config).eval()
    if problem := _unloaded(tuned, weights):
        raise ValueError(problem)
    ids = (torch.arange(16, device=model.device)[None] * 7919 + 13) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        before = tuned(input_ids=ids).logits.double()
        _untie(tuned)
        merged = tuned.merge_and_unload()
        after = merged(input_ids=ids).logits.double()
    off = float((after - before).norm() / before.norm())
    if not off <= TOLERANCE[torch.finfo(model.dtype).bits < 32]:
        raise ValueError(f"merged into the weights it gives other logits than beside them (by {off:.2g} of their size)")
    return merged, tied and not _tie_equals(merged)


def _resize(model, weights) -> None:
    """As many embeddings as the adapter's file holds, if it holds any. Rows that it does not hold become NaN."""
    embedding = model.get_input_embeddings()
    prefix = PREFIX + next(name for name, module in model.named_modules() if module is embedding) + "."
    rows = next((len(w) for n, w in weights.items() if n.startswith(prefix) and n.endswith(".weight") and w.dim() == 2),
                had := len(embedding.weight))  # fmt: skip
    if rows != had:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for end in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            end.weight.data[had:] = torch.nan


def _unloaded(tuned, weights) -> str | None:
    """Fill the adapter with its weights; what PEFT says is missing, or has no place."""
    try:
        found = set_peft_model_state_dict(tuned, weights)
    except KeyError as error:  # a whole module that the adapter was to save
        return f"its file lacks {str(error.args[0]).removeprefix(PREFIX)}"
    places = {name: weight.data_ptr() for name, weight in tuned.state_dict().items()}
    own = {weight.data_ptr() for weight in get_peft_model_state_dict(tuned, save_embedding_layers=False).values()}
    own -= {places[name] for name in places.keys() - found.missing_keys}  # shared weights are filled by one name
    lost = {
        "its file lacks {} of its weights, {} first": [name for name in found.missing_keys if places[name] in own],
        "the model has no place for {} of its weights, {} first": found.unexpected_keys,
    }
    return next((text.format(len(names), names[0].removeprefix(PREFIX)) for text, names in lost.items() if names), None)


def _untie(tuned) -> None:
    """Give each layer weights of its own: where an adapter changes one of two tied ends, a merge would change both."""
    seen = set()
    for layer in tuned.modules():
        if isinstance(layer, torch.nn.Embedding | torch.nn.Linear):
            if id(layer.weight) in seen:
                layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            seen.add(id(layer.weight))


def _tie_equals(model) -> bool:
    """Tie head and embeddings again if they are still equal; the configuration tells which."""
    head, start = model.get_output_embeddings(), model.get_input_embeddings()
    if same := torch.equal(head.weight, start.weight):
        head.weight = start.weight
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = same
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return same
