"""Figures of the ledger of claims: the published numbers read again, and the verdicts."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from alignlens import claims
from alignlens.core import settings as presets
from alignlens.figures import NAMES, STYLE, save_table

# Okabe and Ito's colours; each verdict has its own sign as well.
VERDICTS = {
    claims.REPLICATED: ("#0072B2", "o", "●"),
    claims.CHANGED: ("#E69F00", "^", "▲"),
    claims.NOT_REPLICATED: ("#D55E00", "X", "✕"),
    claims.NOT_TESTABLE: ("#8c8c8c", "D", "◇"),
}
COLUMNS = {
    "published": "What the paper published",
    "here_published": "The published protocol, here",
    "here_sound": "The sound protocol, here",
}


def published_changes(table: pd.DataFrame):
    """The paper's changes against base with two standard errors, at the best layer (filled) and at layer 0 (hollow).

    table : ``claims.reanalysis()``.
    """
    families = list(dict.fromkeys(table.family))
    methods = [m for m in STYLE if m in set(table.method) - {"base"}]
    figure, axes = plt.subplots(1, len(families), figsize=(3.7 * len(families), 3.6), sharey=True, squeeze=False)
    for axis, family in zip(axes.flat, families, strict=True):
        for x, method in enumerate(methods):
            row = table[(table.family == family) & (table.method == method)].iloc[0]
            color, _, marker = STYLE[method]
            axis.errorbar(x - 0.12, row.change, 2 * row.change_error, color=color, marker=marker, ms=6, lw=1.4)
            axis.plot(x + 0.18, row.layer0_change, color=color, marker=marker, mfc="none", ms=6, ls="")
        axis.axhline(0, color="#8c8c8c", lw=0.8)
        axis.set(title=family, xticks=range(len(methods)))
        axis.set_xticklabels([NAMES[m] for m in methods], rotation=45, ha="right")
        axis.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("published AUROC, method - base")
    handles = [
        Line2D([], [], color="#444444", marker="o", ls="", label="best layer, ± 2 standard errors"),
        Line2D([], [], color="#444444", marker="o", mfc="none", ls="", label="layer 0"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def published_floors(table: pd.DataFrame, leak_free: pd.DataFrame):
    """The paper's AUROC beside what its protocol gives on pure noise of the same n and d, and without leaked rows.

    table : ``claims.reanalysis()``. leak_free : ``claims.published("leak_free")``.
    """
    families = list(dict.fromkeys(table.family))
    methods = [m for m in STYLE if m in set(table.method)]
    figure, axes = plt.subplots(1, len(families), figsize=(3.7 * len(families), 3.6), sharey=True, squeeze=False)
    clean = leak_free[leak_free.layer == "best"].set_index(["family", "method"])
    for axis, family in zip(axes.flat, families, strict=True):
        for x, method in enumerate(methods):
            row = table[(table.family == family) & (table.method == method)].iloc[0]
            axis.bar(x, row.floor - 0.5, bottom=0.5, color="#d9d9d9", width=0.8)
            axis.plot(x - 0.12, row.auroc, color=STYLE[method][0], marker=STYLE[method][2], ms=6, ls="")
            if (family, method) in clean.index:
                value, low, high = clean.loc[(family, method), ["auroc_clean", "auroc_clean_low", "auroc_clean_high"]]
                error = [[value - low], [high - value]]
                axis.errorbar(x + 0.18, value, error, color="#222222", marker="_", ms=9, lw=1.4)
        axis.set(title=family, xticks=range(len(methods)), ylim=(0.5, 1.01))
        axis.set_xticklabels([NAMES[m] for m in methods], rotation=45, ha="right")
        axis.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("AUROC, best layer")
    handles = [
        Line2D([], [], color="#444444", marker="o", ls="", label="published"),
        Line2D([], [], color="#222222", marker="_", label="only pairs whose mirror was not in training (95 %)"),
        plt.Rectangle((0, 0), 1, 1, color="#d9d9d9", label="pure noise, same n and d"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def at_a_glance(document: dict):
    """One line a claim: its verdict by colour, place and sign. document : ``claims.ledger(...)``."""
    found = document["claims"]
    figure, axis = plt.subplots(figsize=(9.5, 0.42 * len(found) + 1.1))
    y = np.arange(len(found))
    for row, claim in zip(y, found, strict=True):
        x = claims.VERDICTS.index(claim["verdict"])
        color, marker, _ = VERDICTS[claim["verdict"]]
        axis.plot([-0.5, 3.5], [row, row], color="#e6e6e6", lw=0.8, zorder=1)
        axis.scatter(x, row, color=color, marker=marker, s=110, zorder=3)
    axis.set_yticks(y, [f"{claim['id']}  {claim['statement']}" for claim in found])
    axis.set_xticks(range(len(claims.VERDICTS)), claims.VERDICTS)
    axis.xaxis.tick_top()
    axis.set(xlim=(-0.5, 3.5), ylim=(len(found) - 0.5, -0.5))
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    return figure


def page(document: dict):
    """The ledger to read: claim, three columns of evidence, verdict with its reason; a pandas Styler."""
    table = claims.frame(document)
    shown = pd.DataFrame({"claim": table.id + ". " + table.statement})
    for name, words in COLUMNS.items():
        shown[words] = [claim[name]["text"] for claim in document["claims"]]
    shown["verdict"] = table.verdict.map(lambda v: f"{VERDICTS[v][2]} {v}") + ": " + table.because
    colors = [f"border-left: 6px solid {VERDICTS[v][0]}" for v in table.verdict]
    cells = {
        "text-align": "left",
        "vertical-align": "top",
        "white-space": "pre-line",
        "padding": "0.4em 0.7em",
        "min-width": "10em",
    }
    rules = [{"selector": "th, td", "props": list(cells.items())}]
    styler = shown.style.hide(axis="index").set_uuid("claims").set_table_styles(rules)
    return styler.apply(lambda _: colors, subset=["verdict"])


def save_ledger(document: dict, study) -> None:
    """Write ``claims.json`` and ``claims.csv`` into the study's folder of figures."""
    save_table(claims.frame(document), "claims", study)
    folder = Path(presets.place(study.preset.figures)) / study.preset.name
    claims.write(document, folder / ".claims.json")
    (folder / ".claims.json").replace(folder / "claims.json")
