"""What an audit is asked for, and its two models and pairs as loaded and checked, before anything is measured."""

import copy
import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BeforeValidator, WrapValidator, model_validator

from alignlens import models, preferences, study
from alignlens.audit import conditions
from alignlens.core import settings
from alignlens.core.errors import AuditError
from alignlens.core.settings import Count, Parameters, Whole, Yes
from alignlens.preferences import Encoded, Formatter

PAIRS = "argilla/ultrafeedback-binarized-preferences-cleaned"
TOYS = "tiny world, held-out split"  # the source of the toy models' pairs
SHIPPED = Path(__file__).parents[3] / "data" / "tiny"
LEAST_PROMPTS = 20
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
GIVE = "give the base that the aligned model was trained from"


Word = Annotated[str, BeforeValidator(str)]
Blocks = Annotated[settings.layers("auto"), WrapValidator(lambda x, check: x if x == "all" else check(x))]


class Request(Parameters):
    """Parameters of an audit; without base, aligned and adapter it is one of the shipped toy models.

    base, aligned : hub id, local folder or toy model (``tiny:llama``, ``tiny:llama:dpo``, ``:1`` for another seed).
    adapter : PEFT adapter on top of ``aligned``, by default of base. pairs : held-out pairs, a hub id or file (.jsonl,
    .csv, .parquet); toy models bring theirs. layers : "auto" (all, or 12 evenly spread), "all" or block indices.
    limit : most pairs. sampled : most prompts that are answered. causal_pairs : by default 64, on a CPU fewer (16 at
    least) where answers are long, as causal tests pass over them about 100 times. on_bad : "refuse" or "drop" rows that
    cannot be used; by default drop in hub data. batch_size : by default about 8,192 tokens, at most 64. template :
    "auto", "chat" or "plain". date : shown as given; none by default, so that bytes repeat."""

    base: Word
    aligned: Word
    adapter: Word | None = None
    pairs: Word | None = None
    layers: Blocks = "auto"
    limit: Count = 1000
    sampled: Count = 200
    causal_pairs: Count | None = None
    response_tokens: Count = 64
    max_length: Count | None = None
    template: Literal["auto", "chat", "plain"] = "auto"
    on_bad: Literal["refuse", "drop"] | None = None
    batch_size: Count | None = None
    bootstrap: Count = 1000
    permutations: Count = 40
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: Yes = False
    seed: Whole = 0
    date: Word | None = None
    out: Word = "audit"
    fail_if: Annotated[dict | None, BeforeValidator(conditions.parse)] = None

    @model_validator(mode="before")
    @classmethod
    def _two_models(cls, given: dict) -> dict:
        if (out := Path(str(given.get("out", ""))).expanduser()).is_file():
            raise ValueError(f"out is {str(out)!r}, which is a file: give a folder")
        if not {"base", "aligned", "adapter"} & given.keys():
            return given | {"base": "tiny:llama", "aligned": "tiny:llama:dpo"}  # a first look, without any download
        if not given.get("base"):
            raise ValueError("no base is given: pass -p base with a hub id or a folder")
        if not given.get("aligned") and not given.get("adapter"):
            raise ValueError("no aligned model is given: pass -p aligned with a hub id or a folder, or -p adapter")
        return given | {"aligned": given.get("aligned") or given["base"]}


def request(**given) -> Request:
    """A checked ``Request``; None leaves a parameter at its default. AuditError names what cannot be used."""
    return Request.read(given, error=AuditError)


def from_notebook(names: dict) -> Request:
    """The request of a notebook from its global names, before it assigns others: every plain value must be a parameter,
    since papermill only warns of parameters that it does not know."""
    return request(**settings.plain_values(names))


def check_names(names: dict, *known: str) -> None:
    """AuditError for a plain value among a notebook's global names that is not one of the known parameters."""
    settings.refuse_unknown(settings.plain_values(names), known, AuditError)


@dataclass
class Side:
    """One of the two models, as given and as loaded."""

    name: str
    model: object
    tokenizer: object

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
            "name": self.name, "revision": getattr(self.model.config, "_commit_hash", None),
            "weights": self.weights_hash, "architecture": type(self.model).__name__,
            "layers": config.num_hidden_layers, "d_model": config.hidden_size,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": self.model.get_input_embeddings().weight.shape[0],
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }  # fmt: skip

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048


def load_sides(request: Request, toys: study.Study | None, device: str) -> list[Side]:
    """Base and aligned model, which must be of one shape. An adapter may stand in ``adapter`` or in ``aligned``."""
    aligned, adapter, folder = request.aligned, request.adapter, Path(request.aligned).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        if adapter:
            raise AuditError(f"aligned {_public(aligned)!r} is an adapter and -p adapter is given too: give one")
        aligned, adapter = request.base, str(folder)
    sides, options = [], {"device": device, "trust_remote_code": request.trust_remote_code}
    for source, own in ((request.base, None), (aligned, adapter)):
        name = _public(source) + (f" + {_public(own)}" if own else "")
        if source.startswith("tiny:"):
            found = _toy(source, toys)
            if own and found.adapter:
                raise AuditError(f"{source!r} is an adapter on its base already: give either it or -p adapter")
            source, own = found.model, own or found.adapter
        sides.append(Side(name, *models.load(os.path.expanduser(source), own, **options)))
    one, other = (
        {"the model": side.facts["architecture"]}
        | {f"weight {name}": tuple(weight.shape) for name, weight in side.model.state_dict().items()}
        for side in sides
    )
    for name in (name for name in one | other if one.get(name) != other.get(name)):
        raise AuditError(f"{name} is {one.get(name)} in the base and {other.get(name)} in the aligned model: {GIVE}")
    return sides


def _toy(source: str, toys: study.Study):
    """Where the weights of a shipped toy model such as tiny:llama:dpo:1 are."""
    parts = source.split(":")[1:]
    family, method, seed, *rest = [*parts, *["base", "0"][len(parts) - 1 :]]
    if rest or family not in toys.families or method not in ["base", *toys.methods] or not seed.isdigit():
        known = f"tiny:{'|'.join(toys.families)}, or that and :{'|'.join(toys.methods)}"
        raise AuditError(f"{source!r} is no shipped toy model: give {known}")
    return toys.source(study.Variant(family, method, int(seed)))


def open_toys(folder: str) -> study.Study:
    """The study of the shipped toy models; what it might write goes into the folder."""
    if not SHIPPED.is_dir():
        raise AuditError("the toy models are not where alignlens was installed from: give -p base and -p aligned")
    return study.open("tiny", variants="load", shipped=str(SHIPPED), store=folder, progress=False)


def _public(source: str) -> str:
    """A hub id or toy name as it is; of a local path only the last part, since reports travel."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def load_pairs(request: Request, toys: study.Study | None) -> tuple[pd.DataFrame, str]:
    """The pairs as loaded, and the name of their source."""
    if request.pairs is None and request.base.startswith("tiny:"):
        pairs = toys.split("measure")
        kept = pairs.prompt_id.isin(sorted(pairs.prompt_id.unique())[: request.limit])
        return pairs[kept].head(request.limit).reset_index(drop=True), TOYS
    source = request.pairs or PAIRS
    path = Path(source).expanduser()
    local = path.suffix in preferences.SUFFIXES or path.exists()
    on_bad = request.on_bad or ("refuse" if local else "drop")
    return preferences.load_pairs(str(path) if local else source, limit=request.limit, on_bad=on_bad), _public(source)


def one_format(base: Side, aligned: Side, pairs, request: Request) -> tuple[Formatter, Encoded, list[str]]:
    """One formatter for both models, the encoded pairs, and harmless differences of the tokenizers, which must give the
    same ids on the real pairs. Of two chat templates the aligned model's is taken, since that is the one in use."""
    tokenizers, notes = [copy.deepcopy(side.tokenizer) for side in (base, aligned)], []
    words, templates = [t.get_vocab() for t in tokenizers], [t.chat_template for t in tokenizers]
    if wrong := sorted(token for token, place in words[0].items() if words[1].get(token) != place):
        raise AuditError(f"the tokenizers differ in {len(wrong)} of {len(words[0])} tokens, {wrong[0]!r} first: {GIVE}")
    if len(words[1]) > len(words[0]):
        notes.append(f"The aligned model's tokenizer has {len(words[1]) - len(words[0])} tokens more than the base's.")
    if templates[0] != templates[1] and request.template != "plain":
        read = f"both models were read in {'the aligned model' if templates[1] else 'the base'}'s format."
        notes.append(f"The two tokenizers have different chat templates (or only one has any): {read}")
    limit = request.max_length or min(1024, base.context)
    if limit > base.context:
        raise AuditError(f"max_length is {limit}, the models take {base.context} tokens: lower it")
    for tokenizer in tokenizers:
        tokenizer.chat_template = templates[1] or templates[0]
    formats = [Formatter(t, max_length=limit, template=request.template) for t in tokenizers]
    one, other = (format.encode_pairs(pairs) for format in formats)
    if any(getattr(one, name) != getattr(other, name) for name in IDS):
        raise AuditError(f"the two tokenizers turn the pairs into different ids: {GIVE}")
    return formats[1], other, notes


def usable(pairs: pd.DataFrame, encoded: Encoded, request: Request, context: int):
    """(pairs, encoded, dropped): those that fit the format and leave room for an answer, and counts of the others."""
    skip = ("pairs", "kept", "median_tokens", "longest_tokens", "source", "prompts", "rows", "over_limit")
    reports = [*encoded.report.items(), *pairs.attrs.get("report", {}).items()]
    dropped = {name: count for name, count in reports if count and name not in skip}
    room = context - min(request.response_tokens, context // 8)  # the rest is left free for an answer
    fits = np.array([len(ids) <= room for ids in encoded.prompt_ids])
    if not fits.all():
        dropped["no_room_to_answer"] = int((~fits).sum())
    pairs = pairs[encoded.kept][fits].reset_index(drop=True)
    if (prompts := pairs.prompt_id.nunique()) < LEAST_PROMPTS:
        advice = "give more held-out pairs, raise limit, or raise max_length if pairs were dropped for their length"
        raise AuditError(f"{prompts} prompts are left, and an audit needs at least {LEAST_PROMPTS}: {advice}")
    return pairs, subset(encoded, np.flatnonzero(fits)), dropped


def subset(encoded: Encoded, rows) -> Encoded:
    """Some of the encoded pairs, by their place among the kept ones."""
    lists: dict = {name: [getattr(encoded, name)[i] for i in rows] for name in (*IDS, "prompts")}
    sizes = [len(p) + max(len(c), len(r)) for p, c, r in zip(*map(lists.get, IDS), strict=True)]
    lists["report"] = {"median_tokens": int(np.median(sizes)), "longest_tokens": max(sizes)}
    return replace(encoded, **lists, kept=np.ones(len(sizes), bool), prompt_id=encoded.prompt_id[rows])
