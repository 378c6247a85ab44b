"""What an audit is asked for, and its pairs as loaded and checked, before anything is measured."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, WrapValidator, model_validator

from alignlens import preferences, study
from alignlens.audit import conditions
from alignlens.core import settings
from alignlens.core.errors import AuditError
from alignlens.core.settings import Count, Parameters, Whole, Yes
from alignlens.preferences import Encoded

PAIRS = "argilla/ultrafeedback-binarized-preferences-cleaned"
TOYS = "tiny world, held-out split"  # the source of the toy models' pairs
SHIPPED = Path(__file__).parents[3] / "data" / "tiny"
LEAST_PROMPTS = 20
MOST_LAYERS = 12  # unless all are asked for
ENCODED = {  # what was done to format pairs, as the report of their encoding counts it
    "thinking": "{} pairs hold a reasoning trace: their prompts were read with thinking switched on.",
    "end_token": "Of {} pairs an end-of-turn token that was written into an answer was taken off.",
}
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")

scratch = cache(tempfile.TemporaryDirectory)  # one folder a process, made when it is needed, gone when that ends
Word = Annotated[str, BeforeValidator(str)]
# A table, a list of files or a data set object stays what it is.
Pairs = Annotated[Any, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
Blocks = Annotated[settings.layers("auto"), WrapValidator(lambda x, check: x if x == "all" else check(x))]


class Request(Parameters):
    """Parameters of an audit; without base, aligned and adapter it is one of the shipped toy models.

    base, aligned : hub id, local folder or toy model (``tiny:llama``, ``tiny:llama:dpo``, ``:1`` for another seed).
    adapter : PEFT adapter on top of ``aligned``, by default of base. pairs : held-out pairs, a hub id or file (.jsonl,
    .csv, .parquet); toy models bring theirs. layers : "auto" (all, or 12 evenly spread), "all" or block indices.
    limit : most pairs. sampled : most prompts that are answered. causal_pairs : by default 64, on a CPU 16 or more, by
    how long answers are. on_bad : what is done with unusable rows, by default "drop" in hub data. batch_size : by
    default about 8,192 tokens, at most 64. fail_if : what ends the run as failed, see ``conditions.parse``. date :
    shown as given; none by default, so that bytes repeat."""

    base: Word
    aligned: Word
    adapter: Word | None = None
    pairs: Pairs = None
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
        base, aligned, adapter = map(given.get, ("base", "aligned", "adapter"))
        if not {"base", "aligned", "adapter"} & given.keys():
            base, aligned = "tiny:llama", "tiny:llama:dpo"  # a first look, without any download
        if not base:
            raise ValueError("no base is given: pass -p base with a hub id or a folder")
        if not aligned and not adapter:
            raise ValueError("no aligned model is given: pass -p aligned with a hub id or a folder, or -p adapter")
        return given | {"base": base, "aligned": aligned or base}


def request(**given) -> Request:
    """A checked ``Request``; None leaves a parameter at its default. AuditError names what cannot be used."""
    return Request.read(given, error=AuditError)


def from_notebook(names: dict) -> Request:
    """The request of a notebook from its global names, before it assigns others: every plain value is a parameter."""
    return request(**settings.plain_values(names))


def check_names(names: dict, *known: str) -> None:
    """AuditError for a plain value among a notebook's global names that is not one of the known parameters."""
    settings.refuse_unknown(settings.plain_values(names), known, AuditError)


@cache
def toys() -> study.Study:
    """The study of the shipped toy models."""
    if not SHIPPED.is_dir():
        raise AuditError("the toy models are not where alignlens was installed from: give -p base and -p aligned")
    return study.open("tiny", variants="load", shipped=str(SHIPPED), store=scratch().name, progress=False)


def chosen_layers(asked: str | tuple, depth: int) -> list[int]:
    """Block indices of a model of that depth."""
    if isinstance(asked, str):
        count = depth if asked == "all" else min(depth, MOST_LAYERS)
        return np.linspace(0, depth - 1, count).round().astype(int).tolist()
    if asked[-1] >= depth:
        raise AuditError(f"layers is {asked}; give block indices from 0 to {depth - 1}")
    return list(asked)


def public(source: str) -> str:
    """A hub id or toy name as it is; of a local path only the last part, since reports travel."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def load_pairs(request: Request) -> tuple[pd.DataFrame, str]:
    """The pairs as loaded, and the name of their source."""
    if request.pairs is None and request.base.startswith("tiny:"):
        pairs = toys().split("measure")
        kept = pairs.prompt_id.isin(sorted(set(pairs.prompt_id))[: request.limit])
        return pairs[kept].head(request.limit).reset_index(drop=True), TOYS
    source = PAIRS if request.pairs is None else request.pairs
    on_bad = request.on_bad or ("refuse" if preferences.is_local(source) else "drop")
    name = public(source) if isinstance(source, str) else type(source).__name__
    return preferences.load_pairs(source, limit=request.limit, on_bad=on_bad), name


def usable(pairs: pd.DataFrame, encoded: Encoded, request: Request, context: int):
    """(pairs, encoded, dropped, notes): those that fit the format and leave room for an answer, counts of the others,
    and what was done to read them."""
    skip = {"pairs", "kept", "median_tokens", "longest_tokens", "source", "prompts", "rows", "over_limit"}
    words = {name: f"Of the file: {text}: {{}}." for name, text in preferences.NOTED.items()} | ENCODED
    reports = {name: found for name, found in (encoded.report | pairs.attrs.get("report", {})).items() if found}
    dropped = {name: count for name, count in reports.items() if name not in skip | words.keys()}
    notes = [text.format(reports[name]) for name, text in words.items() if name in reports]
    room = context - min(request.response_tokens, context // 8)  # the rest is left free for an answer
    fits = np.array([len(ids) <= room for ids in encoded.prompt_ids])
    dropped |= {} if fits.all() else {"no_room_to_answer": int((~fits).sum())}
    pairs = pairs[encoded.kept][fits].reset_index(drop=True)
    if (prompts := pairs.prompt_id.nunique()) < LEAST_PROMPTS:
        advice = "give more held-out pairs, raise limit, or raise max_length if pairs were dropped for their length"
        raise AuditError(f"{prompts} prompts are left, and an audit needs at least {LEAST_PROMPTS}: {advice}")
    return pairs, subset(encoded, np.flatnonzero(fits)), dropped, notes


def subset(encoded: Encoded, rows) -> Encoded:
    """Some of the encoded pairs, by their place among the kept ones, as if they were all."""
    found = encoded.take(rows)
    ids = zip(found.prompt_ids, found.chosen_ids, found.rejected_ids, strict=True)
    sizes = [len(p) + max(len(c), len(r)) for p, c, r in ids]
    report = {"median_tokens": int(np.median(sizes)), "longest_tokens": max(sizes)}
    return replace(found, report=report, kept=np.ones(len(sizes), bool))
