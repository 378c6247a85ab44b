"""Pictures of an audit, drawn from its JSON: small with large letters, for a page on a desk or a phone."""

from base64 import b64encode
from io import BytesIO

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from alignlens.audit.verdicts import LABELS
from alignlens.core.style import DASHES, FATES, FLOOR, MARKERS, METHODS, SIDES

BASE, ALIGNED, INK = METHODS["base"], METHODS["dpo"], "#333333"
MODELS = (("base", BASE, "o"), ("aligned", ALIGNED, "s"))
FULL = 2.0  # nats of change at which a token has the full colour: the same on every page
VERBS = {"steer": "add", "ablate": "remove"}
HATCHES = {"kept": "", "rotated": "//", "attenuated": "xx", "created": ".."}
_RC = {
    "svg.hashsalt": "alignlens", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.35, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9,
    "hatch.linewidth": 0.6, "figure.constrained_layout.use": True,
}  # fmt: skip


def drawn(picture, data, height: float = 2.9) -> str:
    """The SVG of picture(axis, data) as a data URL: the same bytes whatever style the caller has set."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_RC}):
        figure, text = Figure(figsize=(4.6, height)), BytesIO()
        picture(figure.add_subplot(), data)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{b64encode(text.getvalue()).decode()}"


def _layers(axis, rows: list[dict], label: str) -> list[int]:
    """Name the axes by layer; returns the layers."""
    layers = [row["layer"] for row in rows]
    axis.set(xlabel="block of the model, first to last", xticks=layers[:: max(1, -(-len(layers) // 8))], ylabel=label)
    return layers


def _rows(axis, names: list[str], label: str) -> None:
    """Name the axes of a picture with one thing a row, the first on top."""
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel=label)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)


def _ends(numbers) -> np.ndarray:
    """value, low, high [3, numbers]; missing ends are NaN."""
    return np.array([[x[k] for x in numbers] for k in ("value", "low", "high")], float)


def _band(axis, layers, numbers, color=ALIGNED, marker="s", label=None) -> None:
    value, *ends = _ends(numbers)
    axis.fill_between(layers, *ends, color=color, alpha=0.18, lw=0)
    axis.plot(layers, value, color=color, marker=marker, ms=5, lw=1.8, label=label)


def _points(axis, y, numbers, color=ALIGNED, marker="s", label=None) -> None:
    value, low, high = _ends(numbers)
    reach = np.clip([value - low, high - value], 0, None)
    axis.errorbar(value, y, xerr=reach, color=color, marker=marker, ms=6, ls="", lw=1.6, label=label)


def shade(change: float) -> str:
    """The colour behind a token whose log-probability changed (nats), as CSS: blue for more likely, orange for less."""
    opacity = 0.6 * min(abs(change) / FULL, 1)
    return to_hex((SIDES["chosen" if change > 0 else "rejected"], opacity), keep_alpha=True)


def shifts(axis, behaviour: dict) -> None:
    """How the log-probabilities of chosen and rejected answers moved."""
    for (side, color), line in zip(SIDES.items(), ("--", ":"), strict=True):
        low, high, counts = (behaviour["shifts"][side][name] for name in ("low", "high", "counts"))
        bars = np.array(counts) / sum(counts), np.linspace(low, high, len(counts) + 1)
        axis.stairs(*bars, color=color, fill=True, alpha=0.3)
        axis.stairs(*bars, color=color, lw=1.4, label=side)
        axis.axvline(behaviour["numbers"][f"{side}_shift"]["value"], color=color, ls=line, lw=1.6)
    axis.axvline(0, color=INK, lw=0.9)
    axis.set(xlabel="aligned - base, log-probability (nats)", ylabel="share of answers")
    axis.legend()


def signal(axis, section: dict) -> None:
    """AUROC of the probes by layer, base and aligned, and what shuffled labels reach."""
    rows = section["layers"]
    layers = _layers(axis, rows, "AUROC (0.5 is chance)")
    top = np.array([0.5 + max(row["base"]["floor"], row["aligned"]["floor"]) for row in rows])
    axis.fill_between(layers, 1 - top, top, color=FLOOR, alpha=0.5, lw=0, label="shuffled labels (95 %)")
    for model, color, marker in MODELS:
        _band(axis, layers, [row[model] for row in rows], color, marker, model)
    axis.axhline(0.5, color=INK, lw=0.8)
    axis.margins(y=0.2)
    axis.legend(loc="best", ncols=1)


def change(axis, section: dict) -> None:
    """What became of the base's preference signal at each layer, and what is new."""
    rows = section["layers"]
    layers = _layers(axis, rows, "AUROC above chance")
    bottom, style = np.zeros(len(rows)), {"width": 0.7 * min(np.diff(layers), default=1), "edgecolor": "white", "lw": 0}
    for name, color in FATES.items():
        value = [row[name]["value"] for row in rows]
        axis.bar(layers, value, bottom=bottom, color=color, label=name, hatch=HATCHES[name], **style)
        bottom += value
    axis.set_ylim(0, max(1.35 * bottom.max(), 0.01))
    axis.legend(ncols=2, loc="upper center")
    axis.grid(axis="x", visible=False)


def labels(axis, section: dict) -> None:
    """Shares of crosscoder latents by label, beside those of the base with itself."""
    found, y = [section["labels"][name] for name in LABELS], np.arange(len(LABELS))
    axis.barh(y, [x["value"] for x in found], color=ALIGNED, alpha=0.35, height=0.6)
    _points(axis, y, found, label="base with aligned")
    axis.plot([x["floor"] for x in found], y, color=INK, marker="|", ms=16, mew=2, ls="", label="base with itself")
    if control := [section["shuffled"][name]["value"] for name in LABELS if section["shuffled"]]:
        style = {"marker": "D", "mfc": "none", "ms": 8, "mew": 1.6, "ls": "", "label": "shuffled change"}
        axis.plot(control, y, color=SIDES["rejected"], **style)
    axis.set_xlim(-0.03, 1.05)
    axis.legend(loc="lower right")
    _rows(axis, list(LABELS.values()), "share of live latents")


def tests(axis, section: dict) -> None:
    """Effects on the margin of the preference direction, beside the range of random directions."""
    names = []
    for model, *style in MODELS:
        for test in (t for t in section["tests"][model] if t["measure"] == "margin"):
            place, null, floor = len(names), test["effect"]["null"], test["effect"]["floor"]
            axis.barh(place, 2 * floor, left=null - floor, height=0.6, color=FLOOR, alpha=0.7)
            axis.plot([null] * 2, [place - 0.3, place + 0.3], color="white", lw=2)
            _points(axis, [place], [test["effect"]], *style)
            names.append(f"{VERBS[test['intervention']]} {test['direction']}\nin {model}")
    axis.axvline(0, color=INK, lw=0.9)
    axis.tick_params(axis="y", labelsize=8.5)
    _rows(axis, names, "change of the margin (nats)")


def patching(axis, section: dict) -> None:
    """How much of the change of margin is there after each block."""
    rows = section["patching"]["layers"]
    layers = _layers(axis, rows, "share of the margin's change")
    _band(axis, layers, [row["share"] for row in rows])
    axis.axhline(0, color=INK, lw=0.8)
    axis.axhline(1, color=INK, lw=0.8)


def weights(axis, section: dict) -> None:
    """How far each block's weights moved."""
    layers = _layers(axis, section["layers"], "change of the weights (% of norm)")
    axis.bar(layers, [100 * row["share"]["value"] for row in section["layers"]], 0.7, color=ALIGNED, alpha=0.7)
    axis.grid(axis="x", visible=False)


def compared(axis, results: dict[str, dict]) -> None:
    """AUROC of several aligned models by layer, each against the base they share."""
    first = next(iter(results.values()))["signal"]["layers"]
    layers = _layers(axis, first, "AUROC (0.5 is chance)")
    _band(axis, layers, [row["base"] for row in first], BASE, "o", "base")
    # A model has the colour of the method that it is named after; the others get what is left.
    methods = [name for name in METHODS if name not in ("base", "self", "seeds", "random")]
    named = [next((m for m in methods if m in name.lower().replace("-", ":").split(":")), None) for name in results]
    spare = [m for m in methods if m not in named] or methods
    for place, (name, result) in enumerate(results.items()):
        method, rows = named[place] or spare[place % len(spare)], result["signal"]["layers"]
        style = {"color": METHODS[method], "ls": (0, DASHES[method] or ()), "marker": MARKERS[method], "label": name}
        axis.plot(layers, [row["aligned"]["value"] for row in rows], ms=5, **style)
    axis.margins(y=0.25)
    axis.legend(fontsize=8, ncols=2)
