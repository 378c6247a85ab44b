"""Figures of an audit, drawn from its JSON: each function returns one SVG as text, the same bytes every time.

Small and with large letters, since a page shows them two in a row on a desk and one in a row on a phone.
"""

from __future__ import annotations

from io import StringIO

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from alignlens.figures import CHOSEN, REJECTED, STYLE
from alignlens.mechanism_figures import PARTS

BASE, ALIGNED = STYLE["base"][0], STYLE["dpo"][0]
FLOOR = "#bdbdbd"
HATCHES = {"kept": "", "rotated": "//", "attenuated": "xx", "created": ".."}
LABELS = {
    "shared_same": "same in both",
    "shared_rotated": "rotated",
    "shared_attenuated": "weaker or stronger",
    "base_only": "base only",
    "aligned_only": "aligned only",
}
_RC = {
    "svg.hashsalt": "alignlens", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.35, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9,
    "hatch.linewidth": 0.6, "figure.constrained_layout.use": True,
}  # fmt: skip


def _drawn(draw, *arguments, height=2.9) -> str:
    """The SVG of draw(axis, ...) in the house style, whatever style the caller has set."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_RC}):
        figure = Figure(figsize=(4.6, height))
        draw(figure.add_subplot(), *arguments)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _layers(axis, layers) -> None:
    axis.set_xlabel("block of the model, first to last")
    step = max(1, -(-len(layers) // 8))
    axis.set_xticks(layers[::step])


def _ends(numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """value, low, high as arrays; missing ends are NaN."""
    return tuple(np.array([np.nan if x[k] is None else x[k] for x in numbers]) for k in ("value", "low", "high"))


def _band(axis, layers, numbers, color, marker, label) -> None:
    value, low, high = _ends(numbers)
    axis.fill_between(layers, low, high, color=color, alpha=0.18, lw=0)
    axis.plot(layers, value, color=color, marker=marker, ms=5, lw=1.8, label=label)


def _points(axis, y, numbers, color, marker="o", label=None) -> None:
    value, low, high = _ends(numbers)
    xerr = np.clip([value - low, high - value], 0, None)
    axis.errorbar(value, y, xerr=xerr, color=color, marker=marker, ms=6, ls="", lw=1.6, label=label)


def shifts(behaviour: dict) -> str:
    """How the log-probabilities of chosen and rejected answers moved."""

    def draw(axis):
        for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
            h = behaviour["shifts"][side]
            edges = np.linspace(h["low"], h["high"], len(h["counts"]) + 1)
            density = np.array(h["counts"]) / sum(h["counts"])
            axis.stairs(density, edges, color=color, fill=True, alpha=0.3)
            axis.stairs(density, edges, color=color, lw=1.4, label=side)
            mean = behaviour["numbers"][f"{side}_shift"]["value"]
            axis.axvline(mean, color=color, ls="--" if side == "chosen" else ":", lw=1.6)
        axis.axvline(0, color="#333333", lw=0.9)
        axis.set(xlabel="aligned - base, log-probability (nats)", ylabel="share of answers")
        axis.legend()

    return _drawn(draw)


def signal(section: dict) -> str:
    """AUROC of the probes by layer, base and aligned, and what shuffled labels reach."""

    def draw(axis):
        rows = section["layers"]
        layers = [row["layer"] for row in rows]
        top = [0.5 + max(row["base"]["floor"], row["aligned"]["floor"]) for row in rows]
        axis.fill_between(layers, 1 - np.array(top), top, color=FLOOR, alpha=0.5, lw=0, label="shuffled labels (95 %)")
        _band(axis, layers, [row["base"] for row in rows], BASE, "o", "base")
        _band(axis, layers, [row["aligned"] for row in rows], ALIGNED, "s", "aligned")
        axis.axhline(0.5, color="#333333", lw=0.8)
        axis.set_ylabel("AUROC (0.5 is chance)")
        axis.margins(y=0.2)
        axis.legend(loc="best", ncols=1)
        _layers(axis, layers)

    return _drawn(draw)


def change(section: dict) -> str:
    """What became of the base's preference signal at each layer, and what is new."""

    def draw(axis):
        rows = section["layers"]
        layers = [row["layer"] for row in rows]
        bottom = np.zeros(len(rows))
        width = 0.7 * min(np.diff(layers), default=1)
        for name, color in PARTS.items():
            value = np.array([row[name]["value"] for row in rows])
            style = {"color": color, "hatch": HATCHES[name], "edgecolor": "white", "lw": 0, "label": name}
            axis.bar(layers, value, width, bottom=bottom, **style)
            bottom += value
        axis.set_ylabel("AUROC above chance")
        axis.set_ylim(0, max(1.35 * bottom.max(), 0.01))
        axis.legend(ncols=2, loc="upper center")
        axis.grid(axis="x", visible=False)
        _layers(axis, layers)

    return _drawn(draw)


def labels(section: dict) -> str:
    """Shares of crosscoder latents by label, beside those of the base with itself."""

    def draw(axis):
        names = list(LABELS)
        y = np.arange(len(names))
        found = [section["labels"][name] for name in names]
        axis.barh(y, [x["value"] for x in found], color=ALIGNED, alpha=0.35, height=0.6)
        _points(axis, y, found, ALIGNED, "s", "base with aligned")
        null = [x["floor"] for x in found]
        axis.plot(null, y, color="#333333", marker="|", ms=16, mew=2, ls="", label="base with itself")
        if section["shuffled"]:
            control = [section["shuffled"][name]["value"] for name in names]
            axis.plot(
                control, y, color="#D55E00", marker="D", mfc="none", ms=8, mew=1.6, ls="", label="shuffled change"
            )
        axis.set(yticks=y, yticklabels=list(LABELS.values()), xlabel="share of live latents", xlim=(-0.03, 1.05))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.legend(loc="lower right")

    return _drawn(draw)


def tests(section: dict) -> str:
    """Effects on the margin of the preference direction, beside the range of random directions."""

    def draw(axis):
        rows, names = [], []
        for model in ("base", "aligned"):
            for test in section["tests"][model]:
                if test["measure"] == "margin":
                    rows.append((model, test["effect"]))
                    whose = {"own": "own", "base's": "base's"}[test["direction"]]
                    names.append(f"{'add' if test['intervention'] == 'steer' else 'remove'} {whose}\nin {model}")
        y = np.arange(len(rows))
        for place, (model, effect) in enumerate(rows):
            low = effect["null"] - effect["floor"]
            axis.barh(place, 2 * effect["floor"], left=low, height=0.6, color=FLOOR, alpha=0.7)
            axis.plot([effect["null"]] * 2, [place - 0.3, place + 0.3], color="white", lw=2)
            _points(axis, [place], [effect], BASE if model == "base" else ALIGNED, "o" if model == "base" else "s")
        axis.axvline(0, color="#333333", lw=0.9)
        axis.set(yticks=y, yticklabels=names, xlabel="change of the margin (nats)")
        axis.tick_params(axis="y", labelsize=8.5)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)

    return _drawn(draw, height=3.6)


def patching(section: dict) -> str:
    """How much of the change of margin is there after each block."""

    def draw(axis):
        rows = section["patching"]["layers"]
        layers = [row["layer"] for row in rows]
        _band(axis, layers, [row["share"] for row in rows], ALIGNED, "s", None)
        for level in (0, 1):
            axis.axhline(level, color="#333333", lw=0.8)
        axis.set_ylabel("share of the margin's change")
        _layers(axis, layers)

    return _drawn(draw, height=3.6)


def weights(section: dict) -> str:
    """How far each block's weights moved."""

    def draw(axis):
        rows = section["layers"]
        layers = [row["layer"] for row in rows]
        axis.bar(layers, [100 * row["share"]["value"] for row in rows], 0.7, color=ALIGNED, alpha=0.7)
        axis.set_ylabel("change of the weights (% of norm)")
        axis.grid(axis="x", visible=False)
        _layers(axis, layers)

    return _drawn(draw)


def compared(results: dict[str, dict]) -> str:
    """AUROC of several aligned models by layer, each against the base they share."""

    def draw(axis):
        first = next(iter(results.values()))["signal"]["layers"]
        layers = [row["layer"] for row in first]
        _band(axis, layers, [row["base"] for row in first], BASE, "o", "base")
        for (name, result), (color, line, marker) in zip(results.items(), _styles(results), strict=True):
            rows = result["signal"]["layers"]
            value = [row["aligned"]["value"] for row in rows]
            axis.plot([row["layer"] for row in rows], value, color=color, ls=line, marker=marker, ms=5, label=name)
        axis.set_ylabel("AUROC (0.5 is chance)")
        axis.margins(y=0.25)
        axis.legend(fontsize=8, ncols=2)
        _layers(axis, layers)

    return _drawn(draw)


def _styles(names) -> list[tuple]:
    """A method's own colour for a model that is named after it; the other ones get what is left."""
    methods = [name for name in STYLE if name not in ("base", "self", "seeds", "random")]
    found = [next((m for m in methods if m in name.lower().replace("-", ":").split(":")), None) for name in names]
    spare = [m for m in methods if m not in found] or methods
    return [STYLE[method or spare[place % len(spare)]] for place, method in enumerate(found)]
