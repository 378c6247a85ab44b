"""What claims are judged from: sentences with numbers that know their table, and the tables of a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from alignlens.claims.rules import reference_changes
from alignlens.core.errors import ClaimError

TABLES = {
    "transfer_gaps": "family method layer auroc_base difference difference_low difference_high",
    "layer_metrics_grouped": "family method layer auroc auroc_low auroc_high",
    "layer_metrics_published": "family method layer auroc auroc_low auroc_high",
    "data_matters": "family set protocol auroc",
    "best_layers": "family method seed auroc_grouped",
    "objectives": "family method moved",
    "doses": "family method dose",
    "crosscoder_labels": "family method label share count",
    "published_classes": "family method thresholds class share",
    "geometry": "family method layer rotation_degrees norm_ratio",
    "decomposition_seeds": "family method layer rotated attenuated",
    "dose_response": "family method share kl change change_low change_high",
    "causal": "method name measure beats",
}
"""Tables that the ledger reads, as their CSV in ``figures/<preset>`` is named, with columns; any may be missing."""


@dataclass
class Evidence:
    """Sentences and the numbers in them; each number knows the table it comes from."""

    sentences: list[str] = field(default_factory=list)
    numbers: list[dict] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.sentences.append(text)

    def tell(self, text: str, table: pd.DataFrame, source: str, name: str, column: str = "") -> None:
        """Say text with the numbers of ``each`` in place of "%s"; nothing where the table has no rows."""
        if len(table):
            self.say(text % self.each(table, source, name, column))

    def each(self, table: pd.DataFrame, source: str, name: str, column: str = "") -> str:
        """Keep a number a row, as "family value, family value"; column : as ``name`` unless given.

        table : family, the column, and method, low, high where it has them.
        """
        said = []
        for row in table.to_dict("records"):
            known = {key: row[key] for key in ("family", "method", "low", "high") if key in row}
            said.append(f"{row['family'].split('-Instruct')[0]} {self.add(source, name, row[column or name], **known)}")
        return ", ".join(said)

    def add(self, source: str, name: str, value, *, family="", method="", low=math.nan, high=math.nan) -> str:
        """Keep a number; returns it as text, signed if it is a change, with its interval if it has one.

        source : name of one of ``TABLES``, or of a table of ``data/published``.
        """
        if not math.isfinite(value):
            return "not measured"
        source = f"{source}.csv" if source in TABLES else f"data/published/{source}.csv"
        number = {"name": name, "family": family, "method": method}
        self.numbers.append(number | {"value": float(value), "low": float(low), "high": float(high), "source": source})
        form = "{:+.3f}" if "change" in name else "{:.3g}" if abs(value) >= 10 else "{:.3f}"
        return (f"{form} [{form}, {form}]" if math.isfinite(low) else form).format(value, low, high)

    def plain(self, run: str) -> dict:
        numbers = [{**number, "run": run} for number in self.numbers]
        return {"text": "\n".join(self.sentences) or "Not measured.", "numbers": numbers}


class Tables(dict):
    """The tables of a study under judgement, empty where one was not made, and what claims share of them.

    Raises ClaimError for a table without a column that the rules read.
    """

    def __init__(self, tables: dict[str, pd.DataFrame], dose: float | None):
        super().__init__({name: pd.DataFrame(columns=columns.split()) for name, columns in TABLES.items()})
        self.update({name: table for name, table in tables.items() if name in TABLES and len(table)})
        self.dose = dose
        for name, columns in TABLES.items():
            if missing := [c for c in columns.split() if c not in self[name]]:
                raise ClaimError(
                    f"Table {name} has no column {missing[0]!r}: pass it as {name}.csv in figures/ has it."
                )

    @cached_property
    def learnt(self) -> set[tuple[str, str]]:
        """(family, method) of what moved its objective and went at least half of the target dose."""
        moved = self["objectives"][self["objectives"].moved == "moved"]
        found = set(zip(moved.family, moved.method, strict=True))
        if self.dose and len(self["doses"]):
            mean = self["doses"].groupby(["family", "method"]).dose.mean()
            found &= set(mean.index[mean >= self.dose / 2])
        return found

    @cached_property
    def changes(self) -> pd.DataFrame:
        """``reference_changes`` with trained: whether the method learnt something there."""
        if self["transfer_gaps"].empty:
            return pd.DataFrame(columns=["family", "method", "layer", "change", "low", "high", "p", "q", "trained"])
        found = reference_changes(self["transfer_gaps"])
        return found.assign(trained=[key in self.learnt for key in zip(found.family, found.method, strict=True)])

    @cached_property
    def published_changes(self) -> pd.DataFrame:
        """Best layer against best layer, under the published protocol on this study's own pairs."""
        best = self["layer_metrics_published"].groupby(["family", "method"]).auroc.max().reset_index()
        base = best[best.method == "base"].set_index("family").auroc
        return best.assign(change=best.auroc - best.family.map(base)).dropna(subset="change")

    def at_reference(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows at each family's reference layer, or at the nearest layer that was measured."""
        layers, parts = self.changes.groupby("family").layer.first(), []
        for family, rows in table.groupby("family", sort=False):
            distance = (rows.layer - layers.get(family, rows.layer.median())).abs()
            parts.append(rows[rows.layer == rows.layer[distance.idxmin()]])
        return pd.concat(parts, ignore_index=True)


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of ``TABLES`` that lie in a folder of figures as CSV, for a ledger without a study."""
    return {name: pd.read_csv(path) for name in TABLES if (path := Path(folder) / f"{name}.csv").exists()}
