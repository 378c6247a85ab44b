"""Pictures of dictionaries: tables in, matplotlib figures out, in the house style of ``figures``.

Methods keep their colours; nulls are greys. Dead latents are always shown apart, as a share, never as a dot among
others.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from alignlens.figures import NAMES, STYLE, _families, _grid, _integer_layers, _legend, _line, _order

# Shared labels in blues and greens, exclusive ones in warm colours, Okabe and Ito's palette.
LABEL_COLORS = {
    "base_only": "#E69F00",
    "aligned_only": "#D55E00",
    "shared_same": "#56B4E9",
    "shared_rotated": "#0072B2",
    "shared_attenuated": "#009E73",
}
CLASS_COLORS = {
    "base_only": "#E69F00", "aligned_only": "#D55E00", "shared_aligned": "#56B4E9", "shared_redirected": "#0072B2",
    "shared_intermediate": "#CC79A7", "shared_attenuated": "#009E73", "other": "#c9c9c9",
}  # fmt: skip
INSTRUMENTS = {"alignlens": ("#0072B2", "o"), "l1": ("#E69F00", "s"), "published": ("#7a3e9d", "^")}


def _short(method: str) -> str:
    return {"self": "null: self", "seeds": "null: seeds", "random": "null: random"}.get(method, method)


def _panels(count: int, width: float, height: float, columns: int = 4, **options):
    """Panels in rows of at most ``columns``; those left over are switched off."""
    columns = min(columns, count)
    figure, axes = _grid(-(-count // columns), columns, width, height, **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.ravel()[:count]


def _labels_legend(figure, colors) -> None:
    handles = [Patch(color=color, label=name.replace("_", " ")) for name, color in colors.items()]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(colors), int(figure.get_figwidth() / 1.6)),
        fontsize=8.5,
    )


# --- planted truth ----------------------------------------------------------------------------------------------------


def planted_truth(scores: pd.DataFrame):
    """Recall (filled) and false discovery (hollow) of each label, one dot a seed; one panel a regime."""
    full = scores[scores.samples == scores.groupby("regime").samples.transform("max")]
    regimes = list(dict.fromkeys(full.regime))
    figure, axes = _grid(1, len(regimes), 5.4, 3.5, sharey=True)
    kinds = [k for k in LABEL_COLORS if k in set(full.kind)]
    for axis, regime in zip(axes.flat, regimes, strict=True):
        for i, (instrument, (color, marker)) in enumerate(INSTRUMENTS.items()):
            rows = full[(full.regime == regime) & (full.instrument == instrument)]
            for x, kind in enumerate(kinds):
                found = rows[rows.kind == kind]
                at = x + (i - 1) * 0.24 + np.linspace(-0.06, 0.06, len(found)) if len(found) > 1 else x + (i - 1) * 0.24
                axis.scatter(np.broadcast_to(at, len(found)), found.recall, color=color, marker=marker, s=22, zorder=3)
                axis.scatter(
                    np.broadcast_to(at, len(found)), found.false_discovery, facecolor="none", edgecolor=color,
                    marker=marker, s=22, zorder=3,
                )  # fmt: skip
        axis.set(title=f"{regime} regime", ylim=(-0.04, 1.04))
        axis.set_xticks(range(len(kinds)), [k.replace("_", "\n") for k in kinds], size=8)
    axes[0, 0].set_ylabel("recall (filled), false discovery (hollow)")
    handles = [Line2D([], [], color=c, ls="", marker=m, label=n) for n, (c, m) in INSTRUMENTS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def samples_needed(scores: pd.DataFrame):
    """Recall of our labels against the number of training tokens, mean over seeds; one panel a regime."""
    ours = scores[scores.instrument == "alignlens"]
    regimes = list(dict.fromkeys(ours.regime))
    figure, axes = _grid(1, len(regimes), 4.6, 3.2, sharey=True)
    for axis, regime in zip(axes.flat, regimes, strict=True):
        for kind, color in LABEL_COLORS.items():
            rows = ours[(ours.regime == regime) & (ours.kind == kind)].groupby("samples").recall.mean()
            axis.plot(rows.index, rows, color=color, marker="o", ms=4)
        axis.set(title=f"{regime} regime", xlabel="training tokens", xscale="log", ylim=(-0.04, 1.04))
    axes[0, 0].set_ylabel("recall")
    _labels_legend(figure, LABEL_COLORS)
    return figure


# --- autoencoders -----------------------------------------------------------------------------------------------------

QUALITY = {
    "r2": "R² about the mean",
    "cosine": "cosine",
    "l2_ratio": "norm ratio out / in",
    "recovered": "cross-entropy recovered",
    "loss_increase": "cross-entropy added (nats)",
    "l0": "latents firing a token (L0)",
    "dead_share": "share never firing",
}


def quality(table: pd.DataFrame, names=QUALITY):
    """Quality of one shared dictionary on every model: bars by method, one cluster a family, middle layer."""
    shown = [n for n in names if n in table]
    methods = _order(table.method)
    families = _families(table)
    figure, axes = _panels(len(shown), 3.6, 2.5)
    width = 0.8 / len(methods)
    for axis, name in zip(axes, shown, strict=True):
        for i, method in enumerate(methods):
            found = table[table.method == method].groupby("family", sort=False)[name].mean().reindex(families)
            at = np.arange(len(families)) + (i - (len(methods) - 1) / 2) * width
            axis.bar(at, found, width, color=STYLE[method][0])
        axis.set_title(names[name], size=9)
        axis.set_xticks(range(len(families)), families)
        axis.grid(axis="x", visible=False)
    handles = [Patch(color=STYLE[m][0], label=NAMES[m]) for m in methods]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(9, len(methods)), fontsize=8)
    return figure


def training(history: pd.DataFrame):
    """Energy left, L0 and share of silent latents over training steps; a colour a layer, a column a family."""
    names = {"loss": "energy left (share)", "l0": "latents firing a token", "dead_share": "share silent"}
    families, layers = _families(history), sorted(history.layer.unique())
    figure, axes = _grid(len(names), len(families), 3.6, 1.9, sharex="col", sharey="row")
    colors = sns.color_palette("crest", len(layers))
    for i, (name, words) in enumerate(names.items()):
        for axis, family in zip(axes[i], families, strict=True):
            for color, layer in zip(colors, layers, strict=True):
                rows = history[(history.family == family) & (history.layer == layer)]
                axis.plot(rows.step, rows[name], color=color, lw=1.4)
            if name == "loss":
                axis.set(title=family, yscale="log")
        axes[i, 0].set_ylabel(words, size=8.5)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles = [Line2D([], [], color=c, label=f"layer {n}") for c, n in zip(colors, layers, strict=True)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(layers))
    return figure


def density_against_mean(usage: pd.DataFrame, names: pd.DataFrame | None = None):
    """Density against mean code of every live latent of the base; a row a layer, a column a family.

    names : family, layer, latent, name: latents that tell a planted factor, coloured by it.
    """
    families, layers = _families(usage), sorted(usage.layer.unique())
    figure, axes = _grid(len(layers), len(families), 3.6, 2.5, sharex=True, sharey=True)
    told = [] if names is None or names.empty else sorted({n.removeprefix("not ") for n in names.name})
    colors = dict(zip(told, sns.color_palette("colorblind", len(told)), strict=True))
    for i, layer in enumerate(layers):
        for axis, family in zip(axes[i], families, strict=True):
            rows = usage[(usage.family == family) & (usage.layer == layer)]
            live = rows[rows.density > 0]
            axis.scatter(live.density, live["mean"], s=7, color="#b8b8b8", lw=0, rasterized=True)
            if told:
                here = names[(names.family == family) & (names.layer == layer)].merge(live, on="latent")
                for name, color in colors.items():
                    part = here[here.name.str.removeprefix("not ") == name]
                    axis.scatter(part.density, part["mean"], s=13, color=color, lw=0, rasterized=True)
            axis.set(xscale="log", yscale="log")
            axis.text(0.03, 0.93, f"{len(live)} live, {len(rows) - len(live)} dead", transform=axis.transAxes, size=7.5)
            axis.set_title(f"{family}, layer {layer}", size=9)
    for axis in axes[-1]:
        axis.set_xlabel("density")
    for axis in axes[:, 0]:
        axis.set_ylabel("mean code")
    if told:
        handles = [Line2D([], [], color=c, ls="", marker="o", ms=5, label=f"tells {n}") for n, c in colors.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(told))
    return figure


def factors(table: pd.DataFrame, ceiling: pd.DataFrame):
    """How well the best single latent tells each planted factor, by layer; the hollow mark is the permutation
    ceiling.
    """
    table = table.assign(strength=(table.auroc - 0.5).abs() + 0.5)
    best = table.groupby(["family", "layer", "factor"], sort=False).strength.max().reset_index()
    families, names = _families(best), list(dict.fromkeys(best.factor))
    figure, axes = _grid(1, len(families), 3.7, 2.9, sharey=True)
    colors = sns.color_palette("crest", best.layer.nunique())
    for axis, family in zip(axes.flat, families, strict=True):
        for color, (layer, rows) in zip(colors, best[best.family == family].groupby("layer"), strict=True):
            x = [names.index(f) for f in rows.factor]
            axis.plot(x, rows.strength, color=color, marker="o", ms=5, ls="", label=f"layer {layer}")
        null = ceiling[ceiling.family == family].groupby("factor").ceiling.max().reindex(names)
        axis.plot(range(len(names)), null, color="#333333", marker="_", ms=18, ls="", label="permuted labels (95 %)")
        axis.set(title=family, ylim=(0.48, 1.02))
        axis.set_xticks(range(len(names)), [n.replace("_", " ") for n in names], size=8.5)
    axes[0, 0].set_ylabel("AUROC of the best latent")
    handles, words = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside upper center", ncols=len(words))
    return figure


def changes(table: pd.DataFrame):
    """Share of live latents that changed against the base, by method and layer; the grey line is a random direction."""
    measures = {"density": "how often it fires", "mean": "mean code", "effect": "preference effect"}
    families = _families(table)
    figure, axes = _grid(len(measures), len(families), 3.6, 2.1, sharex=True, sharey="row")
    for i, (measure, words) in enumerate(measures.items()):
        for axis, family in zip(axes[i], families, strict=True):
            rows = table[(table.family == family) & (table.measure == measure)]
            for method in _order(rows.method):
                mean = rows[rows.method == method].groupby("layer").share.mean().reset_index()
                _line(axis, mean, "layer", "share", method, band=False)
            if i == 0:
                axis.set_title(family)
        axes[i, 0].set_ylim(bottom=-0.02)  # shared by the row
        axes[i, 0].set_ylabel(f"share changed:\n{words}", size=8.5)
    for axis in axes[-1]:
        _integer_layers(axis)
    _legend(figure, table.method)
    return figure


def shift_map(table: pd.DataFrame):
    """95th percentile of the absolute change of a latent's mean code: a row a method, a column a family and layer."""
    rows = table[table.measure == "mean"]
    grid = rows.groupby(["method", "family", "layer"], sort=False).p95.mean().unstack(["family", "layer"])
    grid = grid.loc[_order(grid.index)]
    grid.columns = [f"{family}\nlayer {layer}" for family, layer in grid.columns]
    figure, axis = plt.subplots(figsize=(max(7, 0.95 * grid.shape[1] + 1.5), 0.42 * len(grid) + 1.6))
    sns.heatmap(grid, annot=True, fmt=".2g", cmap="crest", ax=axis, cbar_kws={"label": "95 % of |change| (code units)"})
    axis.set(ylabel="", xlabel="")
    axis.set_yticks(np.arange(len(grid)) + 0.5, [_short(m) for m in grid.index], rotation=0)
    axis.tick_params(axis="x", labelsize=7.5, rotation=0)
    return figure


def anchors(table: pd.DataFrame):
    """Strong latents at their strongest tokens, variant over base: read where the base is strongest (left box of each
    pair, as published, biased downwards) and symmetrically (right, filled). A diamond is the published single
    latent."""
    families = _families(table)
    methods = [m for m in _order(table.method) if m != "base"]
    figure, axes = _grid(1, len(families), 4.2, 3.2, sharey=True)
    boxes = {"showfliers": False, "widths": 0.34, "patch_artist": True, "medianprops": {"color": "#333333"}}
    for axis, family in zip(axes.flat, families, strict=True):
        for x, method in enumerate(methods):
            rows = table[(table.family == family) & (table.method == method)]
            if rows.empty:
                continue
            for name, offset, alpha in (("forward", -0.2, 0.15), ("ratio", 0.2, 0.75)):
                made = axis.boxplot([rows[name].dropna()], positions=[x + offset], **boxes)
                made["boxes"][0].set(facecolor=STYLE[method][0], alpha=alpha)
            one = rows[rows.published].forward.mean()
            axis.plot(x - 0.2, one, marker="D", color="#333333", ms=4, zorder=4)
        axis.axhline(1, color="#8c8c8c", lw=1)
        axis.set_title(family)
        axis.set_xticks(range(len(methods)), [_short(m) for m in methods], rotation=60, ha="right", size=8)
    axes[0, 0].set_ylabel("code in the variant / in the base")
    return figure


def stability(table: pd.DataFrame):
    """Cosine of each live latent with its partner in a dictionary trained from another seed, beside random rows."""
    families = _families(table)
    figure, axes = _grid(1, len(families), 3.6, 2.6, sharey=True)
    for axis, family in zip(axes.flat, families, strict=True):
        for kind, color in (("another seed", "#0072B2"), ("chance", "#b8b8b8")):
            rows = table[(table.family == family) & (table.kind == kind)]
            label = f"{kind}: {(rows.cosine >= 0.9).mean():.0%} at 0.9 or more"
            axis.hist(rows.cosine, bins=np.linspace(-0.1, 1, 45), color=color, alpha=0.7, label=label)
        axis.set(title=family, xlabel="cosine of matched latents")
        axis.legend(fontsize=7.5, loc="upper left")
    axes[0, 0].set_ylabel("latents")
    return figure


def top_latents(table: pd.DataFrame):
    """The latents with the clearest preference effect on each base: bar with its 95 % interval, and the factor it
    tells.
    """
    families = _families(table)
    figure, axes = _grid(1, len(families), 4.4, 3.0)
    for axis, family in zip(axes.flat, families, strict=True):
        rows = table[table.family == family].iloc[::-1]
        y = np.arange(len(rows))
        axis.barh(y, rows.effect, color=np.where(rows.effect > 0, "#0072B2", "#D55E00"))
        error = [rows.effect - rows.effect_low, rows.effect_high - rows.effect]
        axis.errorbar(rows.effect, y, xerr=error, color="#333333", ls="", lw=1)
        axis.set_yticks(y, [f"{n}  {name}" for n, name in zip(rows.latent, rows.name, strict=True)], size=8)
        axis.axvline(0, color="#333333", lw=0.8)
        axis.set(title=f"{family}, layer {rows.layer.iloc[0]}", xlabel="mean code, chosen − rejected")
    return figure


def published_deltas(table: pd.DataFrame):
    """Own autoencoder per model at its own best layer, as published: alive latents against the base, layer on the
    bar.
    """
    rows = table[table.method != "base"]
    families = _families(rows)
    figure, axes = _grid(1, len(families), 3.7, 2.8, sharey=True)
    for axis, family in zip(axes.flat, families, strict=True):
        part = rows[rows.family == family].set_index("method")
        part = part.loc[_order(part.index)]
        axis.bar(range(len(part)), part.delta_alive, color=[STYLE[m][0] for m in part.index])
        for x, (alive, layer) in enumerate(zip(part.delta_alive, part.layer, strict=True)):
            axis.text(x, alive, f"L{layer}", ha="center", va="bottom" if alive >= 0 else "top", size=7.5)
        base = table[(table.family == family) & (table.method == "base")].iloc[0]
        axis.set_title(f"{family} (base: {base.alive:.0f} alive, L{base.layer})", size=9)
        axis.set_xticks(range(len(part)), part.index, rotation=60, ha="right", size=8)
        axis.axhline(0, color="#333333", lw=0.8)
    axes[0, 0].set_ylabel("alive latents − base")
    return figure


# --- crosscoders ------------------------------------------------------------------------------------------------------


def _comparison_grid(latents: pd.DataFrame, width: float, height: float, **options):
    """One panel a family (row) and comparison (column)."""
    families, methods = _families(latents), _order(latents.method)
    figure, axes = _grid(len(families), len(methods), width, height, sharex=True, sharey=True, **options)
    for j, method in enumerate(methods):
        axes[0, j].set_title(_short(method), size=9)
    for i, family in enumerate(families):
        axes[i, 0].set_ylabel(family)
    cells = {(f, m): axes[i, j] for i, f in enumerate(families) for j, m in enumerate(methods)}
    return figure, axes, cells


def rho_histograms(latents: pd.DataFrame, cuts: dict):
    """rho of live latents (log count); dead ones are counted in the corner, never drawn."""
    figure, axes, cells = _comparison_grid(latents, 1.75, 1.75)
    for (family, method), axis in cells.items():
        rows = latents[(latents.family == family) & (latents.method == method)]
        live = rows[rows.label != "dead"]
        if rows.empty:
            axis.set_axis_off()
            continue
        axis.hist(live.rho, bins=np.linspace(0, 1, 41), color=STYLE[method][0])
        axis.set(yscale="log", ylim=(0.7, None), xlim=(0, 1))
        for x in (cuts["exclusive"], 1 - cuts["exclusive"]):
            axis.axvline(x, color="#333333", ls=":", lw=1)
        axis.text(0.03, 0.9, f"{(rows.label == 'dead').mean():.0%} dead", transform=axis.transAxes, size=7)
    figure.supxlabel("rho: 0 base only, ½ equal norms, 1 aligned only", size=9)
    return figure


def rho_theta(latents: pd.DataFrame, cuts: dict):
    """Norm share against angle of live latents, coloured by label; dotted lines are the cut-offs."""
    figure, axes, cells = _comparison_grid(latents, 1.75, 1.75)
    for (family, method), axis in cells.items():
        rows = latents[(latents.family == family) & (latents.method == method) & (latents.label != "dead")]
        if rows.empty:
            axis.set_axis_off()
            continue
        colors = rows.label.map(LABEL_COLORS)
        axis.scatter(rows.rho, rows.degrees, s=6, lw=0, alpha=0.8, color=colors, rasterized=True)
        axis.axhline(cuts["rotated"], color="#333333", ls=":", lw=0.8)
        for x in (cuts["exclusive"], 1 - cuts["exclusive"]):
            axis.axvline(x, color="#333333", ls=":", lw=0.8)
        axis.set(xlim=(0, 1), ylim=(-5, 180), yticks=(0, 90, 180))
    figure.supxlabel("rho", size=9)
    figure.supylabel("degrees between the decoder rows", size=9)
    _labels_legend(figure, LABEL_COLORS)
    return figure


def composition(shares: pd.DataFrame, colors=None, name: str = "label", words: str = "share of live latents"):
    """Stacked bars of labels by comparison, nulls at the right, one panel a family."""
    colors = colors or LABEL_COLORS
    families, methods = _families(shares), _order(shares.method)
    figure, axes = _grid(1, len(families), 4.1, 3.1, sharey=True)
    for axis, family in zip(axes.flat, families, strict=True):
        grid = shares[shares.family == family].pivot_table(index="method", columns=name, values="share", sort=False)
        grid = grid.reindex([m for m in methods if m in grid.index])
        low = np.zeros(len(grid))
        for label, color in colors.items():
            if label in grid:
                axis.bar(range(len(grid)), grid[label], bottom=low, color=color, width=0.85)
                low += grid[label].to_numpy()
        axis.set_title(family)
        axis.set_xticks(range(len(grid)), [_short(m) for m in grid.index], rotation=60, ha="right", size=8)
        axis.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel(words)
    _labels_legend(figure, colors)
    return figure


def published_composition(table: pd.DataFrame):
    """Classes of the published crosscoder under its adaptive thresholds (above) and under fixed ones (below)."""
    families, methods = _families(table), _order(table.method)
    figure, axes = _grid(2, len(families), 4.1, 2.4, sharey=True, sharex=True)
    for i, kind in enumerate(("adaptive", "fixed")):
        for axis, family in zip(axes[i], families, strict=True):
            rows = table[(table.family == family) & (table.thresholds == kind)]
            grid = rows.pivot_table(index="method", columns="class", values="share").reindex(methods)
            low = np.zeros(len(grid))
            for label, color in CLASS_COLORS.items():
                axis.bar(range(len(grid)), grid[label], bottom=low, color=color, width=0.85)
                low += grid[label].to_numpy()
            if i == 0:
                axis.set_title(family)
            axis.set_xticks(range(len(grid)), [_short(m) for m in grid.index], rotation=60, ha="right", size=8)
            axis.grid(axis="x", visible=False)
        axes[i, 0].set_ylabel(f"share, {kind} thresholds")
    _labels_legend(figure, CLASS_COLORS)
    return figure


def sensitivity(table: pd.DataFrame):
    """Share of live latents under the label that each cut-off decides, as the cut-off moves; the line is where it
    stands.
    """
    from alignlens.dictionaries import CUTS

    decides = {
        "exclusive": ["base_only", "aligned_only"],
        "scaling": ["base_only", "aligned_only"],
        "rotated": ["shared_rotated"],
        "attenuated": ["shared_attenuated"],
    }
    families = _families(table)
    figure, axes = _grid(len(families), len(decides), 2.9, 2.0, sharex="col")
    for j, (cut, labels) in enumerate(decides.items()):
        for i, family in enumerate(families):
            axis = axes[i, j]
            rows = table[(table.cut == cut) & (table.family == family) & table.label.isin(labels)]
            sums = rows.groupby(["method", "value"], sort=False).share.sum().reset_index()
            for method in _order(sums.method):
                _line(axis, sums[sums.method == method], "value", "share", method, band=False)
            axis.axvline(getattr(CUTS, cut), color="#333333", ls=":", lw=1)
            if i == 0:
                axis.set_title(" or ".join(n.replace("_", " ") for n in labels), size=8.5)
        axes[-1, j].set_xlabel(f"cut-off: {cut}")
    for i, family in enumerate(families):
        axes[i, 0].set_ylabel(f"{family}\nshare", size=8.5)
    _legend(figure, table.method)
    return figure


def window(latents: pd.DataFrame):
    """A multi-layer crosscoder: decoder norms by layer (base, aligned), where each latent is strongest, angle by
    layer.
    """
    families, layers = _families(latents), sorted(latents.layer.unique())
    figure, axes = _grid(len(families), 4, 3.2, 2.5)
    for i, family in enumerate(families):
        live = latents[(latents.family == family) & (latents.label != "dead")]
        norms = {n: live.pivot_table(index="latent", columns="layer", values=f"norm_{n}") for n in ("base", "aligned")}
        layers = list(norms["base"].columns)
        order = np.lexsort((-norms["base"].max(axis=1), norms["base"].to_numpy().argmax(1)))
        for j, name in enumerate(("base", "aligned")):
            axes[i, j].imshow(norms[name].to_numpy()[order], aspect="auto", cmap="magma", interpolation="nearest")
            axes[i, j].set_xticks(range(len(layers)), layers)
            axes[i, j].set(title=f"{family}: |{name} row|", xlabel="layer", yticks=[])
            axes[i, j].grid(visible=False)
        top = [n.to_numpy().argmax(1) for n in norms.values()]
        matrix = np.zeros((len(layers), len(layers)), int)
        np.add.at(matrix, tuple(top), 1)
        sns.heatmap(
            matrix, annot=True, fmt="d", cmap="Blues", cbar=False, xticklabels=layers, yticklabels=layers, ax=axes[i, 2]
        )
        axes[i, 2].set(title="strongest layer", xlabel="in aligned", ylabel="in base")
        angle = live.assign(degrees=np.degrees(np.arccos(live.theta.clip(-1, 1))))
        angle = angle[(angle.norm_base > 0.1) & (angle.norm_aligned > 0.1)]
        for latent in angle.groupby("latent").density.first().nlargest(12).index:
            rows = angle[angle.latent == latent]
            axes[i, 3].plot(rows.layer, rows.degrees, color="#b8b8b8", lw=0.8)
        median = angle.groupby("layer").degrees.median()
        axes[i, 3].plot(median.index, median, color="#0072B2", marker="o")
        axes[i, 3].set(title="degrees (median; 12 latents)", xlabel="layer", xticks=layers, ylim=(0, None))
    return figure
