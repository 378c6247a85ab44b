"""What claims are judged from: sentences with numbers that know their table, and the tables of a study."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from alignlens.claims.rules import reference_changes
from alignlens.core.errors import ClaimError
from alignlens.core.settings import METHODS

TABLES = {  # that the ledger reads, as their CSV in figures/<preset> is named, with columns; any may be missing
    "transfer_gaps": "family method layer auroc_base difference difference_low difference_high",
    "layer_metrics_grouped": "family method layer auroc auroc_low auroc_high",
    "layer_metrics_published": "family method layer auroc auroc_low auroc_high",
    "data_matters": "family set protocol auroc", "best_layers": "family method seed auroc_grouped",
    "objectives": "family method moved", "doses": "family method dose", "causal": "method name measure beats",
    "crosscoder_labels": "family method label share count",
    "published_classes": "family method thresholds class share",
    "geometry": "family method layer rotation_degrees norm_ratio",
    "decomposition_seeds": "family method layer rotated attenuated",
    "dose_response": "family method share kl change change_low change_high",
}  # fmt: skip


def of(table: pd.DataFrame, *methods: str) -> pd.DataFrame:
    """Rows of these methods."""
    return table[table.method.isin(methods)]


@dataclass
class Evidence:
    """Sentences and the numbers in them; each number knows the table it comes from."""

    run: str = ""  # what made the numbers
    sentences: list[str] = field(default_factory=list)
    numbers: list[dict] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.sentences.append(text)

    def tell(self, text: str, table: pd.DataFrame, source: str, name: str, column: str = "") -> None:
        """Say text with the numbers of ``each`` in place of "%s"; nothing where the table has no rows."""
        if len(table):
            self.say(text % self.each(table, source, name, column))

    def each(self, table: pd.DataFrame, source: str, name: str, column: str = "") -> str:
        """Keep a number a row, with method, low, high where the table has them; returns "family value, ..."."""
        said = []
        for row in table.to_dict("records"):
            known = {key: row[key] for key in ("family", "method", "low", "high") if key in row}
            said.append(f"{row['family'].split('-Instruct')[0]} {self.add(source, name, row[column or name], **known)}")
        return ", ".join(said)

    def add(self, source: str, name: str, value, *, family="", method="", low=math.nan, high=math.nan) -> str:
        """Keep a number of one of ``TABLES`` or of ``data/published``; returns it as text, signed if it is a change."""
        if not math.isfinite(value):
            return "not measured"
        source = f"{source}.csv" if source in TABLES else f"data/published/{source}.csv"
        number = {"name": name, "family": family, "method": method, "value": float(value), "low": float(low)}
        self.numbers.append(number | {"high": float(high), "source": source, "run": self.run})
        form = "{:+.3f}" if "change" in name else "{:.3g}" if abs(value) >= 10 else "{:.3f}"
        return (f"{form} [{form}, {form}]" if math.isfinite(low) else form).format(value, low, high)

    def plain(self) -> dict:
        return {"text": "\n".join(self.sentences) or "Not measured.", "numbers": self.numbers}


class Tables(dict):
    """The tables of a study under judgement, empty where one was not made, and what claims share of them."""

    def __init__(self, tables: dict[str, pd.DataFrame], dose: float | None):
        self.dose = dose
        for name, columns in TABLES.items():
            table, columns = tables.get(name), columns.split()
            self[name] = pd.DataFrame(columns=columns, dtype=float) if table is None or table.empty else table
            if missing := [c for c in columns if c not in self[name]]:
                raise ClaimError(f"Table {name} has no column {missing[0]!r}: pass it as figures/ has it.")

    @cached_property
    def changes(self) -> pd.DataFrame:
        """``reference_changes``, method by method; trained : objective moved, and half of the target dose reached."""
        key, doses = ["family", "method"], self["doses"]
        found = reference_changes(self["transfer_gaps"]).merge(self["objectives"][[*key, "moved"]], how="left", on=key)
        found["trained"] = found.moved == "moved"
        if self.dose and len(doses):
            mean = doses.groupby(key, as_index=False).dose.mean()
            found["trained"] &= found[key].merge(mean, how="left", on=key).dose >= self.dose / 2
        return pd.concat([of(found, method) for method in METHODS])

    @cached_property
    def published_changes(self) -> pd.DataFrame:
        """Best layer against best layer, under the published protocol on this study's own pairs; method by method."""
        best = self["layer_metrics_published"].groupby(["family", "method"]).auroc.max().reset_index()
        base = of(best, "base").set_index("family").auroc
        best = best.assign(change=best.auroc - best.family.map(base)).dropna(subset="change")
        return pd.concat([of(best, method) for method in METHODS])


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of ``TABLES`` that lie in a folder of figures as CSV, for a ledger without a study."""
    return {name: pd.read_csv(path) for name in TABLES if (path := Path(folder) / f"{name}.csv").exists()}
