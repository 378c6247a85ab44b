"""The claims of the paper with the rules that judge them, and the ledger: every verdict with its evidence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from alignlens.claims import cases
from alignlens.claims.evidence import Evidence, Tables
from alignlens.claims.rules import LEVEL, MARGIN, VERDICTS
from alignlens.core import store
from alignlens.core.errors import ClaimError
from alignlens.core.files import replacing

SCHEMA = "alignlens.claims/1"
PAPER = "arXiv 2606.09850"
PARTS = ("published", "here_published", "here_sound")


class Claim(NamedTuple):
    """A claim: what it says, the function that judges it (see ``cases``) with its arguments, and a note on the rule."""

    id: str
    statement: str
    judge: Callable[..., tuple[str, str]]  # verdict, because
    arguments: tuple = ()
    note: str = ""

    @property
    def rule(self) -> str:
        """The docstring of the function that applies it."""
        return " ".join([*self.judge.__doc__.split(), *self.note.split()]).format(LEVEL=LEVEL, MARGIN=MARGIN)


COMMON = "Two methods: their common verdict; changed if only one holds."
RISE = "KTO raises the separability of chosen and rejected answers."
CLAIMS = (
    Claim("C1", RISE, cases.change, (("kto",), 1, "few pairs")),
    Claim("C2", "GRPO raises separability.", cases.change, (("grpo",), 1, "repeated answers")),
    Claim("C3", "DPO and ORPO lower separability.", cases.change, (("dpo", "orpo"), -1), COMMON),
    Claim("C4", "DPO and ORPO lower it through rotation and attenuation.", cases.mechanism),
    Claim("C5", "PPO and SimPO preserve separability.", cases.preserve),
    Claim("C6", "The preference signal sits in early-middle to middle-late layers.", cases.depth),
    Claim("C7", "The effects depend on the architecture.", cases.families),
    Claim("C8", "DPO, SimPO and GRPO add many exclusive latents, KTO and ORPO few.", cases.breadth),
)


def ledger(tables: dict[str, pd.DataFrame], *, run_id: str, preset: str, dose: float | None = None) -> dict:
    """Judge every claim by its rule; raises ClaimError for a table without the columns that a rule reads.

    tables : by the names in ``TABLES``; missing or empty ones were not measured. dose : target in nats, half of which a
    method that learnt something has gone (None: its objective moved). Returns {"schema", "run_id", "preset",
    "claims": [{"id", "statement", "rule", "published": {"text", "numbers"}, "here_published", "here_sound", "verdict",
    "because", "sources"}]}; each number has name, family, method, value, low, high, source and run."""
    study, found = Tables(tables, dose), []
    for claim in CLAIMS:
        evidence = {name: Evidence(PAPER if name == "published" else run_id) for name in PARTS}
        verdict, because = claim.judge(study, *evidence.values(), *claim.arguments)
        parts = {name: part.plain() for name, part in evidence.items()}
        sources = list(dict.fromkeys(number["source"] for part in parts.values() for number in part["numbers"]))
        words = {"id": claim.id, "statement": claim.statement, "rule": claim.rule}
        found.append(words | parts | {"verdict": verdict, "because": because, "sources": sources})
    return {"schema": SCHEMA, "run_id": run_id, "preset": preset, "claims": found}


def frame(document: dict) -> pd.DataFrame:
    """A ledger as a table of text, one row a claim."""
    table = pd.DataFrame(check(document)["claims"]).assign(run_id=document["run_id"])
    table[[*PARTS]] = table[[*PARTS]].map(lambda part: part["text"].replace("\n", " "))
    table["sources"] = table.sources.map("; ".join)
    return table[["id", "statement", "verdict", "because", *PARTS, "rule", "sources", "run_id"]]


def write(document: dict, path: str | Path) -> None:
    """Write a ledger as JSON, beside its place first; numbers that do not exist become null."""
    with replacing(path) as beside:
        store.write_json(beside, check(document))


def read(path: str | Path) -> dict:
    """Read and check what ``write`` wrote."""
    return check(json.loads(Path(path).read_text(encoding="utf-8")))


def check(document: dict) -> dict:
    """The document; raises ClaimError unless it is a ledger of this version, with a known verdict for every claim."""
    if (schema := document.get("schema")) != SCHEMA:
        raise ClaimError(f"The ledger says schema {schema!r}, this version reads {SCHEMA!r}: make it anew.")
    for claim in document.get("claims", []):
        if claim.get("verdict") not in VERDICTS:
            raise ClaimError(f"Claim {claim.get('id')} has the verdict {claim.get('verdict')!r}: one of {VERDICTS}.")
    return document
