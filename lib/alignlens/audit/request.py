"""What an audit is asked for, and its two models as loaded and checked, before anything is measured."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from alignlens import models
from alignlens.core import settings as presets
from alignlens.core.errors import AuditError
from alignlens.preferences import Formatter

# --- What is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Parameters of an audit; without base, aligned and adapter it is one of the shipped toy models.

    base, aligned : hub id, local folder, or a shipped toy model (``tiny:llama``, ``tiny:llama:dpo``, ``:1`` for another
        seed). adapter : PEFT adapter on top of ``aligned``, which is the base unless it is given.
    pairs : held-out pairs, a hub id or .jsonl/.csv/.parquet file; the toy models bring theirs.
    layers : "auto" (all, or 12 evenly spread), "all" or block indices. limit : most pairs. sampled : most prompts that
        are answered. causal_pairs : pairs of the causal tests, which repeat about 100 passes over them; by default 64,
        on a CPU fewer (16 at least) where answers are long.
    on_bad : rows that cannot be used, "refuse" or "drop"; by default drop in hub data, else refuse.
    batch_size : by default as many as make about 8,192 tokens, at most 64. template : "auto", "chat" or "plain".
    date : shown on the page as given; none by default, so that bytes repeat.
    """

    base: str
    aligned: str = ""
    adapter: str | None = None
    pairs: str | None = None
    layers: str | tuple[int, ...] = "auto"
    limit: int = 1000
    sampled: int = 200
    causal_pairs: int | None = None
    response_tokens: int = 64
    max_length: int | None = None
    template: str = "auto"
    on_bad: str | None = None
    batch_size: int | None = None
    bootstrap: int = 1000
    permutations: int = 40
    device: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0
    date: str | None = None
    out: str = "audit"


def from_notebook(names: dict) -> Request:
    """The request of a notebook from its global names; every plain value must be a parameter.

    Call it before anything else is assigned: papermill sets parameters that it does not know with a warning only.
    """
    return request(**given(names, [field.name for field in dataclasses.fields(Request)]))


def given(names: dict, known: list[str]) -> dict:
    """The plain values among a notebook's global names; AuditError for one that is no known parameter."""
    found = presets.plain_values(names)
    presets.refuse_unknown(found, known, AuditError)
    return found


def request(**given) -> Request:
    """A checked ``Request``; None leaves a parameter at its default. AuditError names what cannot be used."""
    known = {field.name: field for field in dataclasses.fields(Request)}
    given = {name: value for name, value in given.items() if value is not None}
    if not {"base", "aligned", "adapter"} & given.keys():
        given |= {"base": "tiny:llama", "aligned": "tiny:llama:dpo"}  # a first look, without any download
    if not given.get("base"):
        raise AuditError("no base is given: pass -p base with a hub id or a folder")
    if not given.get("aligned"):
        if not given.get("adapter"):
            raise AuditError("no aligned model is given: pass -p aligned with a hub id or a folder, or -p adapter")
        given["aligned"] = given["base"]
    given["layers"] = _layers(given.get("layers", "auto"))
    counts = (
        "limit",
        "sampled",
        "causal_pairs",
        "response_tokens",
        "max_length",
        "batch_size",
        "bootstrap",
        "permutations",
    )
    for name in counts:
        value = given.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AuditError(f"{name} is {value!r}; give a whole number of at least 1")
    choices = {"on_bad": ("refuse", "drop"), "device": ("auto", "cpu", "cuda"), "template": ("auto", "chat", "plain")}
    for name, allowed in choices.items():
        if name in given and given[name] not in allowed:
            raise AuditError(f"{name} is {given[name]!r}; choose one of {', '.join(allowed)}")
    if isinstance(given.get("seed", 0), bool) or not isinstance(given.get("seed", 0), int):
        raise AuditError(f"seed is {given['seed']!r}; give a whole number")
    out = Path(given.get("out", "audit")).expanduser()
    if out.is_file():
        raise AuditError(f"out is {str(out)!r}, which is a file; give a folder")
    return Request(**{name: str(v) if known[name].type.startswith("str") and name != "layers" else v
                      for name, v in given.items()})  # fmt: skip


def _layers(value) -> str | tuple[int, ...]:
    if value in ("auto", "all"):
        return value
    listed = str(value).strip("[]() ").split(",") if not isinstance(value, list | tuple) else value
    try:
        return tuple(int(str(layer)) for layer in listed)
    except ValueError:
        raise AuditError(f"layers is {value!r}; give 'auto', 'all' or block indices such as 0,4,8") from None


# --- Models and pairs -------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the two models, as given and as loaded."""

    name: str
    model: object
    tokenizer: object
    revision: str | None = None

    @cached_property
    def weights_hash(self) -> str:
        """16 hex digits of names, shapes and bytes of all weights, an adapter merged."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
            digest.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def facts(self) -> dict:
        config = self.model.config.get_text_config()
        return {
            "name": self.name,
            "revision": self.revision,
            "weights": self.weights_hash,
            "architecture": type(self.model).__name__,
            "layers": config.num_hidden_layers,
            "d_model": config.hidden_size,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": self.model.get_input_embeddings().weight.shape[0],
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def _toy(source: str, study):
    """The study's source of a shipped toy model such as tiny:llama:dpo:1."""
    from alignlens.study import Variant

    parts = source.split(":")[1:]
    family, method, seed = [*parts, *["base", "0"][len(parts) - 1 :]] if len(parts) in (1, 2, 3) else ("", "", "")
    if family not in study.families or method not in ["base", *study.methods] or not seed.isdigit():
        raise AuditError(
            f"{source!r} is no shipped toy model: give tiny:FAMILY or tiny:FAMILY:METHOD, family one of "
            f"{', '.join(study.families)}, method one of {', '.join(study.methods)}"
        )
    return study.source(Variant(family, method, int(seed)))


def load(source: str, adapter: str | None, request: Request, study, device: str) -> Side:
    name = shown(source) + (f" + {shown(adapter)}" if adapter else "")
    if source.startswith("tiny:"):
        found = _toy(source, study)
        if adapter and found.adapter:
            raise AuditError(f"{source!r} is an adapter on its base already: give either it or -p adapter")
        source, adapter = found.model, adapter or found.adapter
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder)
    model, tokenizer = models.load(source, adapter, device=device, trust_remote_code=request.trust_remote_code)
    return Side(name, model, tokenizer, getattr(model.config, "_commit_hash", None))


def shown(source: str) -> str:
    """A hub id or toy name as it is; of a local path only the last part, since reports travel."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def is_adapter(source: str) -> bool:
    folder = Path(source).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def check_shapes(base: Side, aligned: Side) -> None:
    for name, words in (("architecture", "is a"), ("layers", "has layers:"), ("d_model", "has d_model"),
                        ("vocabulary", "has token embeddings:")):  # fmt: skip
        if base.facts[name] != aligned.facts[name]:
            raise AuditError(
                f"the aligned model {aligned.name!r} {words} {aligned.facts[name]}, the base {base.name!r} "
                f"{base.facts[name]}: give the base that it was trained from"
            )
    shapes = [{n: tuple(w.shape) for n, w in side.model.state_dict().items()} for side in (base, aligned)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise AuditError(
                f"weight {name} is {shapes[0].get(name)} in the base and {shapes[1].get(name)} in the aligned model: "
                "give the base that it was trained from"
            )


def one_format(base: Side, aligned: Side, pairs, request: Request) -> tuple[Formatter, list[str]]:
    """One formatter for both models, and what differed between their tokenizers without doing harm.

    Both tokenizers must give the same ids on the real pairs. Where only one of them has a chat template, or the two
    differ, both models are read in the aligned model's format, since that is the one it will be used in.
    """
    words, notes = [side.tokenizer.get_vocab() for side in (base, aligned)], []
    wrong = sorted(token for token, place in words[0].items() if words[1].get(token) != place)
    if wrong:
        raise AuditError(
            f"the two tokenizers differ in {len(wrong)} of {len(words[0])} tokens, {wrong[0]!r} first: the models "
            "cannot be compared token for token; give the base that the aligned model was trained from"
        )
    if len(words[1]) > len(words[0]):
        notes.append(f"The aligned model's tokenizer has {len(words[1]) - len(words[0])} tokens more than the base's.")
    template = aligned.tokenizer.chat_template or base.tokenizer.chat_template
    if base.tokenizer.chat_template != aligned.tokenizer.chat_template and request.template != "plain":
        notes.append(
            "The two tokenizers have different chat templates (or only one has any): both models were read in "
            f"{'the aligned model' if aligned.tokenizer.chat_template else 'the base'}'s format."
        )
    limit = request.max_length or min(1024, context(base.model))
    if limit > context(base.model):
        raise AuditError(f"max_length is {limit}, the models take {context(base.model)} tokens: lower it")
    formats = []
    for side in (base, aligned):
        tokenizer = copy.deepcopy(side.tokenizer)
        tokenizer.chat_template = template
        formats.append(Formatter(tokenizer, max_length=limit, template=request.template))
    encoded = [format.encode_pairs(pairs) for format in formats]
    same = all(
        getattr(encoded[0], name) == getattr(encoded[1], name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    if not same:
        raise AuditError(
            "the two tokenizers turn the pairs into different ids: the models cannot be compared token for token; give "
            "the base that the aligned model was trained from"
        )
    return formats[1], notes


def context(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
