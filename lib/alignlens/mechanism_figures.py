"""Figures of geometry, dose and causes; style and ``save`` are those of ``figures``. Tables in, a figure out."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from alignlens.figures import NAMES, STYLE, _families, _grid, _integer_layers, _legend, _line, _order

NULLS = ("seeds", "random")
GEOMETRY = {
    "cka": "CKA, debiased",
    "rotation_degrees": "rotation (degrees)",
    "norm_ratio": "scale (variant / base)",
    "mean_cosine": "cosine of preference\ndirections",
    "signal_ratio": "preference signal\n(variant / base)",
}
PARTS = {"kept": "#8c8c8c", "rotated": "#0072B2", "attenuated": "#D55E00", "created": "#009E73"}
DOSE = {
    "change": "AUROC: variant - base",
    "gap": "AUROC lost to base's probe",
    "rotation_degrees": "rotation (degrees)",
    "signal_ratio": "preference signal (variant / base)",
    "accuracy": "implicit-reward accuracy",
    "score": "judge's score of samples",
    "length": "response length (tokens)",
}
UNMOVED = {"cka": 1, "rotation_degrees": 0, "norm_ratio": 1, "mean_cosine": 1, "signal_ratio": 1}


PLANTED = {
    "rotation_degrees": ("rotation (degrees)", "true_degrees"),
    "norm_ratio": ("scale", "true_scale"),
    "cka": ("CKA, debiased", None),
    "procrustes_residual": ("variance left after the best\northogonal map and scale", None),
}


def planted_geometry(table: pd.DataFrame):
    """What geometry reads where the change is known: a panel a number, a row a change; ticks are the truth."""
    figure, axes = _grid(1, len(PLANTED), 2.5, 3.1, sharey=True)
    names = list(dict.fromkeys(table.planted))
    for axis, (column, (words, truth)) in zip(axes.flat, PLANTED.items(), strict=True):
        for family, marker in zip(_families(table), "osD^vPX", strict=False):
            rows = table[table.family == family].set_index("planted").loc[names]
            axis.plot(
                rows[column], range(len(names)), ls="", marker=marker, ms=5, mfc="none", mec="#0072B2", label=family
            )
            if truth:
                axis.plot(rows[truth], range(len(names)), ls="", marker="|", ms=16, mew=1.5, color="#333333", zorder=1)
        axis.set_title(words, size=9)
        axis.set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], ls="", marker="|", ms=12, mew=1.5, color="#333333"))
    figure.legend(handles, [*labels, "planted truth"], loc="outside upper center", ncols=len(labels) + 1)
    return figure


def geometry_over_layers(table: pd.DataFrame, floor: pd.DataFrame):
    """How far each variant's streams moved from its base's, layer by layer, in five numbers.

    table : ``figures.over_seeds`` of the geometry table. floor : family, layer, mean_cosine_floor (two halves of the
    base against each other: no cosine can be expected to be higher).
    """
    families, names = _families(table), [n for n in GEOMETRY if n in table]
    figure, axes = _grid(len(families), len(names), 2.6, 2.3, sharex=True, sharey="col")
    for i, family in enumerate(families):
        for axis, name in zip(axes[i], names, strict=True):
            for method in _order(table.method):
                rows = table[(table.family == family) & (table.method == method)]
                _line(axis, rows, "layer", name, method, band=method in NULLS)
            axis.axhline(UNMOVED[name], color="#333333", lw=0.7)
            if name == "mean_cosine":
                rows = floor[floor.family == family].sort_values("layer")
                axis.plot(rows.layer, rows.mean_cosine_floor, color="#333333", lw=1.2, ls=(0, (4, 3)))
            if i == 0:
                axis.set_title(GEOMETRY[name], size=9)
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes[i, 0].set_ylabel(family)
    figure.supxlabel("layer", size=9)
    ceiling = Line2D([], [], color="#333333", lw=1.2, ls=(0, (4, 3)), label="two halves of the base")
    _legend(figure, table.method, [ceiling])
    return figure


def decomposition(table: pd.DataFrame):
    """What became of the base's preference signal: kept, rotated, attenuated, created, one bar a layer.

    table : family, method, layer, base, the four parts and ``rotated_repaired``, in units of AUROC above 0.5, mean over
    seeds; ``tables.clear_parts`` says which parts get a star.
    """
    families, methods = _families(table), _order(table.method)
    figure, axes = _grid(len(families), len(methods), 1.45, 2.0, sharex=True, sharey=True)
    for i, family in enumerate(families):
        for axis, method in zip(axes[i], methods, strict=True):
            rows = table[(table.family == family) & (table.method == method)].sort_values("layer")
            bottom = np.zeros(len(rows))
            for part, color in PARTS.items():
                height = rows[part].to_numpy(float)
                axis.bar(rows.layer, height, bottom=bottom, color=color, width=0.8, lw=0)
                if part == "rotated":
                    repaired = rows.rotated_repaired.to_numpy(float)
                    axis.bar(
                        rows.layer, repaired, bottom=bottom, color="none", width=0.8, lw=0, hatch="/////",
                        edgecolor="white",
                    )  # fmt: skip
                bottom += height
                if f"{part}_clear" in rows:
                    for x, top in zip(rows.layer[rows[f"{part}_clear"]], bottom[rows[f"{part}_clear"]], strict=True):
                        axis.text(x, top, "*", ha="center", va="center", color="#111111", size=11)
            axis.step(
                np.r_[rows.layer - 0.5, rows.layer.max() + 0.5], np.r_[rows.base - 0.5, rows.base.iloc[-1] - 0.5],
                where="post", color="#111111", lw=1,
            )  # fmt: skip
            if i == 0:
                axis.set_title(NAMES[method].replace(" (", "\n("), size=9)
            axis.grid(axis="x", visible=False)
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes[i, 0].set_ylabel(f"{family}\nAUROC above 0.5", size=8.5)
    figure.supxlabel("layer", size=9)
    handles = [mpl.patches.Patch(color=c, label=p) for p, c in PARTS.items()]
    undone = {"facecolor": PARTS["rotated"], "edgecolor": "white", "hatch": "/////"}
    handles.insert(2, mpl.patches.Patch(**undone, label="rotated: one orthogonal map undoes it"))
    handles.append(Line2D([], [], color="#111111", lw=1, label="the base's own signal"))
    handles.append(
        Line2D([], [], color="#111111", marker="$*$", ls="", label="more than chance (5 % false discoveries)")
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def pairs_needed(table: pd.DataFrame):
    """What base's probe loses on the other model, over the number of pairs: the method, and the nulls beside it.

    table : ``mechanism_tables.pairs_needed``. Lower row: AUROC of base's own probe.
    """
    families = _families(table)
    names = {"gap": "AUROC lost to base's probe", "base": "AUROC, base's own probe"}
    figure, axes = _grid(2, len(families), 3.8, 2.3, sharex=True, sharey="row")
    for i, (name, words) in enumerate(names.items()):
        for axis, family in zip(axes[i], families, strict=True):
            for method in _order(table.method):
                rows = table[(table.family == family) & (table.method == method)]
                if name == "gap" or method not in NULLS:
                    _line(axis, rows, "pairs", name, method if name == "gap" else "base")
            if name == "gap":
                axis.axhline(0, color="#333333", lw=0.7)
                axis.set_title(family)
        axes[i, 0].set_ylabel(words, size=8.5)
    figure.supxlabel("pairs, base's best layer", size=9)
    _legend(figure, {*table.method, "base"})
    return figure


def dose_response(path: pd.DataFrame, dose: float | None):
    """Separability, geometry and behaviour against dose, base at the origin: one row a family, one column a measure."""
    families, names = _families(path), [n for n in DOSE if n in path and path[n].notna().any()]
    figure, axes = _grid(len(families), len(names), 2.35, 2.3, sharex=True, sharey="col")
    for i, family in enumerate(families):
        for axis, name in zip(axes[i], names, strict=True):
            for method in _order(path.method):
                rows = path[(path.family == family) & (path.method == method)].sort_values("kl")
                axis.plot(
                    rows.kl, rows[name], color=STYLE[method][0], ls=STYLE[method][1], marker=STYLE[method][2], ms=4,
                    lw=1.5, alpha=0.9,
                )  # fmt: skip
                last = rows[rows.share == 1]
                ends = [last[name] - last[f"{name}_low"], last[f"{name}_high"] - last[name]]
                axis.errorbar(last.kl, last[name], np.clip(ends, 0, None), color=STYLE[method][0], lw=1)
            if dose:
                axis.axvline(dose, color="#333333", lw=0.8, ls=(0, (4, 3)))
            if i == 0:
                axis.set_title(DOSE[name], size=8.5)
        axes[i, 0].set_ylabel(family)
    figure.supxlabel("dose: KL to base (nats a response)", size=9)
    matched = [Line2D([], [], color="#333333", lw=0.8, ls=(0, (4, 3)), label="matched dose")] if dose else []
    _legend(figure, path.method, matched)
    return figure


def matched_dose(table: pd.DataFrame):
    """Every method at the same dose: value with interval, and where it stood at its last step (open)."""
    names = [n for n in DOSE if (table.measure == n).any()]
    families, methods = _families(table), _order(table.method)
    figure, axes = _grid(len(families), len(names), 2.1, 2.3, sharex="col", sharey=True)
    for i, family in enumerate(families):
        for axis, name in zip(axes[i], names, strict=True):
            rows = table[(table.family == family) & (table.measure == name)].set_index("method")
            for y, method in enumerate(methods):
                if method not in rows.index:
                    continue
                row, color = rows.loc[method], STYLE[method][0]
                axis.plot(row["last"], y, marker="o", mfc="none", mec=color, ms=6)
                if row.reached:
                    ends = [[max(0, row.value - row.low)], [max(0, row.high - row.value)]]
                    axis.errorbar(row.value, y, xerr=ends, color=color, marker="o", ms=5, lw=1.4)
            if i == 0:
                axis.set_title(DOSE[name], size=8.5)
            axis.set_yticks(range(len(methods)), methods)
        axes[i, 0].set_ylabel(family)
        axes[i, 0].invert_yaxis()
    handles = [
        Line2D([], [], color="#444444", marker="o", lw=1.4, label="at the matched dose"),
        Line2D([], [], color="#444444", marker="o", mfc="none", ls="", label="at its last step"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def steering(table: pd.DataFrame, measure: str, words: str):
    """Effect of steering against strength: the preference direction and 95 % of norm-matched random directions.

    table : rows of ``tables.causal`` with intervention "steer". One panel a family and direction.
    """
    rows = table[(table.intervention == "steer") & (table.measure == measure) & (table.kind == "named")]
    families, names = _families(rows), list(dict.fromkeys(rows.name))
    figure, axes = _grid(len(families), len(names), 2.7, 2.3, sharex=True, sharey="row")
    for i, family in enumerate(families):
        for axis, name in zip(axes[i], names, strict=True):
            here = rows[(rows.family == family) & (rows.name == name)]
            for method in _order(here.method):
                line = here[here.method == method].sort_values("strength")
                color, style, _ = STYLE[method]
                start = int(np.searchsorted(line.strength, 0))  # no push, no change
                x, y = (np.insert(line[c].to_numpy(float), start, 0.0) for c in ("strength", "value"))
                axis.plot(x, y, color=color, ls=style, lw=1.3, alpha=0.9, zorder=2)
                ends = [line.value - line.low, line.high - line.value]
                axis.errorbar(line.strength, line.value, np.clip(ends, 0, None), color=color, ls="", lw=0.8, alpha=0.6)
                for beats, fill in ((True, STYLE[method][0]), (False, "white")):
                    part = line[line.beats.astype(bool) == beats]
                    axis.plot(
                        part.strength, part.value, ls="", marker=STYLE[method][2], mec=STYLE[method][0], mfc=fill, ms=5
                    )
            band = here.groupby("strength")[["random_low", "random_high"]].agg(
                {"random_low": "min", "random_high": "max"}
            )
            axis.fill_between(
                band.index, band.random_low, band.random_high, color="#bdbdbd", alpha=0.45, lw=0, zorder=1
            )
            axis.axhline(0, color="#8c8c8c", lw=0.7)
            if i == 0:
                axis.set_title(name, size=9)
        axes[i, 0].set_ylabel(f"{family}\n{words}", size=8.5)
    figure.supxlabel("strength (units of the stream's root-mean-square norm)", size=9)
    _legend(figure, rows.method, _causal_handles())
    return figure


def _causal_handles():
    return [
        mpl.patches.Patch(color="#bdbdbd", alpha=0.45, label="95 % of random directions"),
        Line2D([], [], color="#444444", marker="o", ls="", label="beats them"),
        Line2D([], [], color="#444444", marker="o", mfc="white", ls="", label="does not"),
    ]


def ablations(table: pd.DataFrame, measures: dict[str, str]):
    """Effect of removing each named direction or latent, beside random directions of the same size.

    table : rows of ``tables.causal`` with an ablating intervention; each label is intervention and name.
    """
    rows = table[table.intervention.str.startswith("ablate") & (table.kind == "named")]
    families, shown = _families(rows), [m for m in measures if (rows.measure == m).any()]
    tallest = max(len(rows[rows.family == f].drop_duplicates(["method", "name"])) for f in families)
    figure, axes = _grid(len(shown), len(families), 3.6, max(2.4, 0.19 * tallest), sharex="row")
    for i, measure in enumerate(shown):
        for axis, family in zip(axes[i], families, strict=True):
            here = rows[(rows.family == family) & (rows.measure == measure)].reset_index(drop=True)
            for y, row in here.iterrows():
                color = STYLE[row.method][0]
                axis.plot([row.random_low, row.random_high], [y, y], color="#bdbdbd", lw=5, alpha=0.6, zorder=1)
                ends = [[max(0, row.value - row.low)], [max(0, row.high - row.value)]]
                axis.errorbar(
                    row.value, y, xerr=ends, color=color, marker=STYLE[row.method][2], ms=5, lw=1.2,
                    mfc=color if row.beats else "white",
                )  # fmt: skip
            axis.axvline(0, color="#8c8c8c", lw=0.7)
            axis.set_xscale("symlog", linthresh=0.1)
            ticks = (0, 0.1, 1) if measure == "kl" else (-1, 0, 1)
            axis.set_xticks(ticks, ticks)
            axis.set_yticks(range(len(here)), here.method + " · " + here.name, size=6.5)
            axis.set_ylim(len(here) - 0.4, -0.6)
            axis.set_xlabel(measures[measure], size=8.5)
            if i == 0:
                axis.set_title(family)
    figure.legend(handles=_causal_handles(), loc="outside upper center", ncols=3)
    return figure


SAMPLED = {"reward": "change of the judge's score", "length": "change of length (tokens)", "kl": "KL (nats a response)"}


def sampled(table: pd.DataFrame):
    """Effects of the strongest steering on samples: one row a family, one column a measure, random ones in grey."""
    rows = table[(table.intervention == "steer samples") & (table.kind == "named")]
    families, names = _families(rows), list(dict.fromkeys(rows.name))
    figure, axes = _grid(len(families), len(SAMPLED), 3.6, 2.3, sharex="col")
    for i, family in enumerate(families):
        for axis, (measure, words) in zip(axes[i], SAMPLED.items(), strict=True):
            here = rows[(rows.family == family) & (rows.measure == measure)]
            methods = _order(here.method)
            for row in here.itertuples():
                y = names.index(row.name) + 0.7 * (methods.index(row.method) / max(1, len(methods) - 1) - 0.5)
                color = STYLE[row.method][0]
                axis.plot([row.random_low, row.random_high], [y, y], color="#bdbdbd", lw=3, alpha=0.6, zorder=1)
                axis.plot(
                    row.value, y, marker=STYLE[row.method][2], color=color, mfc=color if row.beats else "white", ms=5
                )
            axis.axvline(0, color="#8c8c8c", lw=0.7)
            axis.set_yticks(range(len(names)), names, size=8)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_xlabel(words if i == len(families) - 1 else "", size=8.5)
        axes[i, 0].set_ylabel(family)
        for axis in axes[i, 1:]:
            axis.set_yticklabels([])
    _legend(figure, rows.method, _causal_handles())
    return figure


def patching(table: pd.DataFrame):
    """Which layers carry the behaviour: share of the margin that travels with one layer's stream, both ways.

    table : ``tables.patching``: family, method, into ("variant" or "base"), layer, share, low, high.
    """
    families, ways = (
        _families(table),
        {"base": "variant's stream put into the base", "variant": "base's stream put into the variant"},
    )
    figure, axes = _grid(2, len(families), 3.6, 2.5, sharex=True, sharey=True)
    for i, (into, words) in enumerate(ways.items()):
        for axis, family in zip(axes[i], families, strict=True):
            for method in _order(table.method):
                rows = table[(table.family == family) & (table.method == method) & (table.into == into)]
                if rows.share.notna().any():
                    _line(axis, rows, "layer", "share", method, band=False)
                    ends = [rows.share - rows.low, rows.high - rows.share]
                    axis.errorbar(rows.layer, rows.share, np.clip(ends, 0, None), color=STYLE[method][0], ls="", lw=0.8)
            for level in (0, 1):
                axis.axhline(level, color="#8c8c8c", lw=0.7)
            if i == 0:
                axis.set_title(family)
            else:
                _integer_layers(axis)
        axes[i, 0].set_ylabel(f"share of the margin\n{words}", size=8)
    _legend(figure, table.method)
    return figure
