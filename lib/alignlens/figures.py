"""Figures: one house style, one colour a method everywhere, the base in grey, each picture beside its table.

Every function takes tables and returns a matplotlib figure; ``save`` writes picture, vector picture and table, and
puts the preset and the run's id on it.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D
from PIL import Image

from alignlens.core import settings as presets

# Okabe and Ito's colour-blind-safe palette; line style and marker carry the same information a second time.
STYLE = {
    "base": ("#8c8c8c", "-", "o"),
    "ppo": ("#CC79A7", "-", "P"),
    "dpo": ("#0072B2", "-", "s"),
    "simpo": ("#56B4E9", "-", "D"),
    "orpo": ("#009E73", "-", "^"),
    "grpo": ("#E69F00", "-", "v"),
    "kto": ("#D55E00", "-", "X"),
    "sft": ("#5b4a3f", "--", "p"),
    "shuffled": ("#222222", ":", "*"),
    "self": ("#b8b8b8", "-.", "h"),
    "seeds": ("#999999", "-.", "<"),
    "random": ("#777777", "-.", ">"),
}
NAMES = presets.SPELLING | {"base": "base", "sft": "SFT (control)", "shuffled": "shuffled (control)"} | {
    "self": "base with itself (null)", "seeds": "two seeds (null)", "random": "random direction (null)",
}  # fmt: skip
LONG_NUMBERS = re.compile(r"(\d+\.\d\d)\d+")  # a hundredth of a point is finer than any screen
INDENTS = re.compile(r"\n +")
CHOSEN, REJECTED = "#0072B2", "#D55E00"
PROTOCOL = {"grouped": "#009E73", "published": "#7a3e9d"}


def use_style() -> None:
    """Set the house style; call it once a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85)
    mpl.rcParams.update(
        {
            "figure.dpi": 80,
            "savefig.dpi": 130,
            "svg.hashsalt": "alignlens",
            "svg.fonttype": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.4,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )


def save(figure, table: pd.DataFrame, name: str, study) -> None:
    """Write ``figures/<preset>/<name>`` as .png, .svg and .csv, stamped with preset and run id, and show it."""
    folder = Path(presets.place(study.preset.figures)) / study.preset.name
    folder.mkdir(parents=True, exist_ok=True)
    room = 0.13 / figure.get_figheight()  # below the axes' own labels
    if figure.get_layout_engine() is not None:
        figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.text(
        0.999,
        0.002,
        f"alignlens · {study.preset.name} · run {study.run_id}",
        ha="right",
        va="bottom",
        size=6,
        alpha=0.5,
    )
    for suffix, options in ((".png", {}), (".svg", {"metadata": {"Date": None}, "dpi": 100})):
        beside = folder / f".{name}{suffix}"
        figure.savefig(beside, format=suffix[1:], **options)
        if suffix == ".png":
            beside.write_bytes(shrink(beside.read_bytes()))
        else:
            beside.write_text(INDENTS.sub("\n", LONG_NUMBERS.sub(r"\1", beside.read_text())))
        beside.replace(folder / f"{name}{suffix}")
    save_table(table, name, study)
    plt.show()


def shrink(png: bytes) -> bytes:
    """A picture of few colours needs no more than 256: a third of the size, to the eye the same."""
    small = BytesIO()
    with Image.open(BytesIO(png)) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(small, format="PNG", optimize=True)
    return small.getvalue()


def save_table(table: pd.DataFrame, name: str, study) -> None:
    """Write a table as ``figures/<preset>/<name>.csv``, numbers to five significant digits."""
    folder = Path(presets.place(study.preset.figures)) / study.preset.name
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{name}.csv"
    table.to_csv(beside, index=False, float_format="%.5g", lineterminator="\n")
    beside.replace(folder / f"{name}.csv")


def over_seeds(table: pd.DataFrame, names: list[str], keys=("family", "method", "layer")) -> pd.DataFrame:
    """Mean over seeds with a 95 % interval from prompts and seeds: keys, and for each name: name, _low, _high.

    Seeds share their prompts, so the error from prompts does not average out; the spread between seeds does:
    variance = mean variance over prompts + variance between seeds / number of seeds.
    """
    out = []
    for key, rows in table.groupby(list(keys), sort=False):
        row = dict(zip(keys, key, strict=True))
        for name in names:
            values = rows[name].to_numpy(float)
            between = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
            if f"{name}_low" in rows:
                within = np.mean(((rows[f"{name}_high"] - rows[f"{name}_low"]) / 3.92) ** 2)
            else:
                within = 0.0
            half = 1.96 * np.sqrt(within + between)
            row |= {name: values.mean(), f"{name}_low": values.mean() - half, f"{name}_high": values.mean() + half}
        out.append(row)
    return pd.DataFrame(out)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _order(methods) -> list[str]:
    return [m for m in STYLE if m in set(methods)]


def _families(table) -> list[str]:
    return list(dict.fromkeys(table.family))


def _grid(rows: int, columns: int, width: float, height: float, **options):
    """Panels of a size in inches, with room above for a legend; few panels are widened so that it fits."""
    size = (max(7.0, width * columns), max(2.6, height * rows) + 0.45)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def _legend(figure, methods, extra=(), columns: int | None = None) -> None:
    handles = [
        Line2D([], [], color=STYLE[m][0], ls=STYLE[m][1], marker=STYLE[m][2], ms=5, label=NAMES[m])
        for m in _order(methods)
    ]
    handles += list(extra)
    fits = int(figure.get_figwidth() / 1.35)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns or max(1, min(fits, len(handles))))


def _line(axis, rows, x, y, method, band=True) -> None:
    color, style, marker = STYLE[method]
    rows = rows.sort_values(x)
    axis.plot(rows[x], rows[y], color=color, ls=style, marker=marker, ms=4, lw=1.6, zorder=3)
    if band and f"{y}_low" in rows:
        axis.fill_between(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], color=color, alpha=0.13, lw=0)


def _integer_layers(axis) -> None:
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axis.set_xlabel("layer")


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair_overview(lengths: pd.DataFrame, factors: pd.DataFrame | None):
    """Length of chosen and rejected answers, and how often each factor favours the chosen one.

    lengths : side (chosen, rejected), tokens. factors : factor, share of pairs that favour chosen / tie / rejected.
    """
    figure, axes = _grid(1, 2 if factors is not None else 1, 5.2, 3.4)
    axis = axes[0, 0]
    sns.histplot(
        lengths, x="tokens", hue="side", hue_order=["chosen", "rejected"], palette=[CHOSEN, REJECTED], discrete=True,
        element="step", stat="density", common_norm=False, alpha=0.25, ax=axis,
    )  # fmt: skip
    axis.set(xlabel="tokens of the answer", title="Chosen and rejected answers by length")
    if factors is not None:
        axis = axes[0, 1]
        left = np.zeros(len(factors))
        for name, color in (("chosen", CHOSEN), ("tie", "#c9c9c9"), ("rejected", REJECTED)):
            axis.barh(factors.factor, factors[name], left=left, color=color, label=f"favours {name}")
            left += factors[name].to_numpy()
        axis.set(xlabel="share of pairs", xlim=(0, 1), title="Which answer each planted factor favours")
        axis.invert_yaxis()
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    return figure


def pretraining(curves: pd.DataFrame):
    """Pretraining loss of the tiny bases over steps."""
    figure, axes = _grid(1, 1, 6, 3.2)
    axis = axes[0, 0]
    for (family, rows), style in zip(curves.groupby("family", sort=False), ("-", "--", ":", "-."), strict=False):
        axis.plot(rows.step, rows.loss, color="#333333", ls=style, label=family)
    axis.set(xlabel="step", ylabel="loss (nats a token)", yscale="log", title="Pretraining on the tiny world's text")
    axis.legend()
    return figure


# --- alignment and behaviour ------------------------------------------------------------------------------------------

CURVES = {
    "kl": "dose: KL to base per response (nats)",
    "heldout_margin": "held-out margin (nats)",
    "chosen_logprob": "log p(chosen) (nats)",
    "rejected_logprob": "log p(rejected) (nats)",
    "reward": "reward in training",
    "loss": "training loss",
    "length": "response length (tokens)",
}


def training_curves(curves: pd.DataFrame, dose: float | None):
    """Training curves, mean over seeds with their range: one row a family, one column a quantity."""
    families, names = _families(curves), [n for n in CURVES if n in curves and curves[n].notna().any()]
    figure, axes = _grid(len(families), len(names), 2.9, 2.3, sharex=True)
    for i, family in enumerate(families):
        for j, name in enumerate(names):
            axis = axes[i, j]
            for method in _order(curves.method):
                rows = curves[(curves.family == family) & (curves.method == method)].dropna(subset=[name])
                if name == "loss" and method in ("ppo", "grpo"):
                    continue  # a policy-gradient surrogate is not a loss that falls
                for _, run in rows.groupby("seed"):
                    axis.plot(run.step, run[name], color=STYLE[method][0], ls=STYLE[method][1], lw=1, alpha=0.75)
            if name == "kl" and dose:
                axis.axhline(dose, color="#333333", lw=0.8, ls=(0, (4, 3)))
            if i == 0:
                axis.set_title(CURVES[name], size=8.5)
            if j == 0:
                axis.set_ylabel(family)
            if i == len(families) - 1:
                axis.set_xlabel("optimiser step")
    target = [Line2D([], [], color="#333333", lw=0.8, ls=(0, (4, 3)), label="target dose")] if dose else []
    _legend(figure, curves.method, target)
    return figure


def behaviour_panel(table: pd.DataFrame, names: dict[str, str]):
    """One panel a measure: each variant's value with its 95 % interval, families side by side."""
    shown = [n for n in names if (table.measure == n).any()]
    methods = _order(table.method)
    columns = min(4, len(shown))
    figure, axes = _grid(-(-len(shown) // columns), columns, 3.3, 2.7)
    families = _families(table)
    offsets = np.linspace(-0.22, 0.22, len(families)) if len(families) > 1 else [0.0]
    neutral = {"accuracy": 0.5, "win_rate": 0.5, "margin": 0, "chosen_shift": 0, "rejected_shift": 0}
    for axis, name in zip(axes.flat, shown, strict=False):
        for family, offset, marker in zip(families, offsets, "osD^vPX", strict=False):
            for x, method in enumerate(methods):
                row = table[(table.family == family) & (table.method == method) & (table.measure == name)]
                if row.empty:
                    continue
                value, low, high = row.iloc[0][["value", "low", "high"]].astype(float)
                axis.errorbar(
                    x + offset, value, [[max(0, value - low)], [max(0, high - value)]], color=STYLE[method][0],
                    marker=marker, ms=4.5, lw=1.2,
                )  # fmt: skip
        if name in neutral:
            axis.axhline(neutral[name], color="#8c8c8c", lw=0.8)
        axis.set_title(names[name], size=8.5)
        axis.set_xticks(range(len(methods)), methods, rotation=60, ha="right", size=8)
        axis.grid(axis="x", visible=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    handles = [
        Line2D([], [], color="#444444", ls="", marker=m, label=f) for f, m in zip(families, "osD^vPX", strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(families), title="family")
    return figure


# --- probes -----------------------------------------------------------------------------------------------------------

METRICS = {"accuracy": "accuracy", "f1": "F1", "auroc": "AUROC", "auprc": "AUPRC"}


def layer_metrics(table: pd.DataFrame, null: pd.DataFrame, title: str):
    """Four probe metrics over layers: one row a family, one column a metric; the null band under AUROC."""
    families = _families(table)
    figure, axes = _grid(len(families), len(METRICS), 3.0, 2.4, sharex=True, sharey="row")
    for i, family in enumerate(families):
        for j, (name, words) in enumerate(METRICS.items()):
            axis = axes[i, j]
            for method in _order(table.method):
                rows = table[(table.family == family) & (table.method == method)]
                _line(axis, rows, "layer", name, method, band=method == "base")
            if name == "auroc":
                _null_band(axis, null[null.family == family])
            axis.axhline(0.5, color="#8c8c8c", lw=0.7)
            if i == 0:
                axis.set_title(words)
            if j == 0:
                axis.set_ylabel(family)
            if i == len(families) - 1:
                _integer_layers(axis)
    _legend(figure, table.method, [_null_handle()])
    figure.supylabel(title, size=9)
    return figure


def _null_band(axis, null, color="#bdbdbd"):
    null = null.sort_values("layer")
    axis.fill_between(null.layer, null.auroc_low, null.auroc_high, color=color, alpha=0.45, lw=0, zorder=1)


def _null_handle(color="#bdbdbd", label="noise floor: signs permuted (95 %)"):
    return mpl.patches.Patch(color=color, alpha=0.45, label=label)


def coefficient_norms(table: pd.DataFrame):
    """L2 norm of the probe's weights (standardised units) over layers, one panel a family."""
    families = _families(table)
    figure, axes = _grid(1, len(families), 3.8, 3.0)
    for axis, family in zip(axes.flat, families, strict=True):
        for method in _order(table.method):
            rows = table[(table.family == family) & (table.method == method)]
            _line(axis, rows, "layer", "coef_norm", method, band=method == "base")
        axis.set(title=family, ylabel="L2 norm of the weights" if axis is axes[0, 0] else "")
        _integer_layers(axis)
    _legend(figure, table.method)
    return figure


def score_histograms(scores: pd.DataFrame):
    """Held-out probe probability of (chosen - rejected), one small panel a model; right of the line is right.

    scores : ``tables.held_out_probabilities``. The mirrored half, (rejected - chosen), is left out: it would be the
    same picture seen in a mirror.
    """
    families, methods = _families(scores), _order(scores.method)
    figure, axes = _grid(len(families), len(methods), 1.55, 1.6, sharex=True, sharey="row")
    for i, family in enumerate(families):
        for j, method in enumerate(methods):
            axis = axes[i, j]
            rows = scores[(scores.family == family) & (scores.method == method)]
            axis.stairs(rows.share, [*rows.low, rows.high.iloc[-1]], fill=True, color=STYLE[method][0], alpha=0.75)
            axis.axvline(0.5, color="#333333", lw=0.8)
            axis.text(0.04, 0.9, f"{rows.right.iloc[0]:.0%} right", transform=axis.transAxes, size=6.5)
            axis.set_yticks([])
            axis.set_xticks([0, 1])
            if i == 0:
                axis.set_title(method, size=9)
            if j == 0:
                axis.set_ylabel(family)
    figure.supxlabel("held-out probability that the pair is (chosen - rejected)", size=9)
    return figure


def roc_curves(curves: pd.DataFrame, areas: pd.DataFrame):
    """ROC at the base's best layer, one panel a family.

    curves : family, method, false_positive, true_positive. areas : family, method, layer, auroc.
    """
    families = _families(curves)
    figure, axes = _grid(1, len(families), 3.9, 4.4)
    for axis, family in zip(axes.flat, families, strict=True):
        handles = []
        for method in _order(curves.method):
            rows = curves[(curves.family == family) & (curves.method == method)]
            area = areas[(areas.family == family) & (areas.method == method)].iloc[0]
            color, style, _ = STYLE[method]
            label = f"{NAMES[method]}  {area.auroc:.3f}"
            handles += axis.plot(rows.false_positive, rows.true_positive, color=color, ls=style, lw=1.5, label=label)
        axis.plot([0, 1], [0, 1], color="#8c8c8c", lw=0.8, ls=":")
        axis.set(title=f"{family}, layer {int(area.layer)}", xlabel="false positive rate", aspect="equal")
        axis.legend(handles=handles, loc="lower right", fontsize=6.8, title="AUROC", title_fontsize=7)
    axes[0, 0].set_ylabel("true positive rate")
    return figure


def pca_scatter(points: pd.DataFrame):
    """First two principal components of the raw states at the base's best layer; labels only colour the points.

    points : family, method, side, pc1, pc2, and the explained variance shares ev1, ev2.
    """
    families, methods = _families(points), _order(points.method)
    figure, axes = _grid(len(families), len(methods), 1.7, 1.85)
    for i, family in enumerate(families):
        for j, method in enumerate(methods):
            axis = axes[i, j]
            rows = points[(points.family == family) & (points.method == method)]
            colors = rows.side.map({"chosen": CHOSEN, "rejected": REJECTED})
            axis.scatter(rows.pc1, rows.pc2, c=colors, s=3, alpha=0.45, lw=0, rasterized=True)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"{rows.ev1.iloc[0]:.0%} · {rows.ev2.iloc[0]:.0%}", size=7)
            if i == 0:
                axis.set_title(method, size=9)
            if j == 0:
                axis.set_ylabel(family)
    handles = [
        Line2D([], [], color=c, marker="o", ls="", ms=4, label=s)
        for s, c in (("chosen", CHOSEN), ("rejected", REJECTED))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    figure.supxlabel("PC1 (across) and PC2 (up); below each panel, their shares of variance", size=8)
    return figure


def baselines(table: pd.DataFrame):
    """What needs no depth against what does: AUROC of baselines, layer 0 and the best layer of the base.

    table : family, baseline, auroc, auroc_low, auroc_high.
    """
    names = list(dict.fromkeys(table.baseline))
    families = _families(table)
    figure, axes = _grid(1, len(families), 3.6, 2.9, sharex=True, sharey=True)
    for axis, family in zip(axes.flat, families, strict=True):
        rows = table[table.family == family].set_index("baseline").loc[names]
        y = np.arange(len(names))
        axis.barh(y, rows.auroc - 0.5, left=0.5, color=["#c9c9c9"] * (len(names) - 1) + ["#8c8c8c"])
        axis.errorbar(
            rows.auroc,
            y,
            xerr=[rows.auroc - rows.auroc_low, rows.auroc_high - rows.auroc],
            color="#333333",
            ls="",
            lw=1.2,
        )
        axis.axvline(0.5, color="#333333", lw=0.8)
        axis.set(yticks=y, yticklabels=names, title=family, xlabel="AUROC")
        axis.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()
    return figure


def transfer_matrix(table: pd.DataFrame, layers: dict[str, int]):
    """Whose probe reads whom, at one layer a family: AUROC of own and crossed probes for each variant."""
    columns = {
        "auroc_base": "base probe\nreads base",
        "auroc_aligned": "own probe\nreads variant",
        "auroc_base_to_aligned": "base probe\nreads variant",
        "auroc_aligned_to_base": "variant probe\nreads base",
    }
    families = _families(table)
    figure, axes = _grid(1, len(families), 3.9, 3.6, sharey=True)
    high = table[list(columns)].to_numpy().max()
    for axis, family in zip(axes.flat, families, strict=True):
        rows = table[(table.family == family) & (table.layer == layers[family])].set_index("method")
        rows = rows.loc[_order(rows.index)]
        sns.heatmap(
            rows[list(columns)].rename(columns=columns), annot=True, fmt=".3f", cmap="cividis",
            vmin=0.5, vmax=high,
            cbar=axis is axes.flat[-1], ax=axis, annot_kws={"size": 7.5}, linewidths=0.5,
        )  # fmt: skip
        axis.set(title=f"{family}, layer {layers[family]}", ylabel="")
        axis.tick_params(axis="x", labelsize=7, rotation=0)
    return figure


def transfer_gaps(table: pd.DataFrame):
    """Paired differences over layers with 95 % bands: what changed, and what only moved.

    Upper row: own probe on the variant minus own probe on the base. Lower row: what the variant loses when the base's
    probe reads it.
    """
    families = _families(table)
    names = {
        "difference": "variant - base, own probes",
        "gap_base_to_aligned": "own probe - base's probe,\non the variant",
    }
    figure, axes = _grid(2, len(families), 3.8, 2.6, sharex=True, sharey="row")
    for i, (name, words) in enumerate(names.items()):
        for axis, family in zip(axes[i], families, strict=True):
            for method in _order(table.method):
                rows = table[(table.family == family) & (table.method == method)]
                _line(axis, rows, "layer", name, method, band=method in ("shuffled",))
            axis.axhline(0, color="#8c8c8c", lw=0.8)
            if i == 0:
                axis.set_title(family)
            else:
                _integer_layers(axis)
        axes[i, 0].set_ylabel(f"AUROC: {words}", size=8)
    _legend(
        figure, table.method, [mpl.patches.Patch(color="#222222", alpha=0.15, label="95 % of the shuffled control")]
    )
    return figure


def protocol_matters(table: pd.DataFrame, null: pd.DataFrame, floors: pd.DataFrame):
    """The same base, the same pairs, two protocols: AUROC over layers with intervals, null bands and noise floors.

    table : family, protocol, layer, auroc, auroc_low, auroc_high. null : the same of permuted signs.
    floors : family, protocol, floor (Gaussian noise of the same shape).
    """
    families = _families(table)
    figure, axes = _grid(1, len(families), 3.9, 3.4, sharey=True)
    for axis, family in zip(axes.flat, families, strict=True):
        for protocol, color in PROTOCOL.items():
            rows = table[(table.family == family) & (table.protocol == protocol)].sort_values("layer")
            axis.plot(rows.layer, rows.auroc, color=color, marker="o", ms=4, lw=1.8)
            axis.fill_between(rows.layer, rows.auroc_low, rows.auroc_high, color=color, alpha=0.15, lw=0)
            _null_band(axis, null[(null.family == family) & (null.protocol == protocol)], color)
            floor = floors[(floors.family == family) & (floors.protocol == protocol)].floor.iloc[0]
            axis.axhline(floor, color=color, lw=1, ls=(0, (4, 3)))
        axis.axhline(0.5, color="#333333", lw=0.7)
        axis.set(title=family, ylabel="AUROC" if axis is axes[0, 0] else "")
        _integer_layers(axis)
    handles = []
    for protocol, color in PROTOCOL.items():
        handles += [
            Line2D([], [], color=color, marker="o", ms=4, label=f"{protocol}: base, 95 % band"),
            _null_handle(color, f"{protocol}: labels permuted"),
            Line2D([], [], color=color, lw=1, ls=(0, (4, 3)), label=f"{protocol}: pure noise, same n and d"),
        ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=8.5)
    return figure


def data_matters(table: pd.DataFrame):
    """One unaligned base read on three sets of pairs: the published protocol sees three models, the grouped one."""
    sets = list(dict.fromkeys(table.set))
    families = _families(table)
    shades = dict(zip(sets, ("-", "--", ":"), strict=False))
    figure, axes = _grid(len(PROTOCOL), len(families), 3.9, 2.7, sharex=True, sharey=True)
    for i, (protocol, color) in enumerate(PROTOCOL.items()):
        for axis, family in zip(axes[i], families, strict=True):
            for name in sets:
                where = (table.family == family) & (table.protocol == protocol) & (table.set == name)
                rows = table[where].sort_values("layer")
                if rows.empty:
                    continue
                axis.plot(rows.layer, rows.auroc, color=color, ls=shades[name], marker="o", ms=3.5)
                axis.fill_between(rows.layer, rows.auroc_low, rows.auroc_high, color=color, alpha=0.1, lw=0)
                axis.axhline(rows.floor.iloc[0], color="#8c8c8c", ls=shades[name], lw=1)
            if i == 0:
                axis.set_title(family)
            else:
                _integer_layers(axis)
        axes[i, 0].set_ylabel(f"AUROC, {protocol}")
    counts = table.drop_duplicates("set").set_index("set").pairs
    handles = [
        Line2D([], [], color="#333333", ls=shades[s], marker="o", ms=3.5, label=f"{s} ({counts[s]})") for s in sets
    ]
    handles.append(Line2D([], [], color="#8c8c8c", lw=1, label="pure noise, same n and d"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=8.5)
    return figure
