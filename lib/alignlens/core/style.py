"""The house style of figures, which notebooks draw with seaborn: one colour a method everywhere, one ``save``."""

import re
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image

from alignlens.core.files import replacing
from alignlens.core.settings import place

# Okabe and Ito's colour-blind-safe palette; dashes and markers carry the same information a second time.
METHODS = {
    "base": "#8c8c8c", "ppo": "#CC79A7", "dpo": "#0072B2", "simpo": "#56B4E9", "orpo": "#009E73", "grpo": "#E69F00",
    "kto": "#D55E00", "sft": "#5b4a3f", "shuffled": "#222222", "self": "#b8b8b8", "seeds": "#999999",
    "random": "#777777",
}  # fmt: skip
MARKERS = dict(zip(METHODS, "oPsD^vXp*h<>", strict=True))
DASHES = dict.fromkeys(METHODS, "") | {"sft": (4, 2), "shuffled": (1, 1.5)}
DASHES |= dict.fromkeys(("self", "seeds", "random"), (4, 1.5, 1, 1.5))
SIDES = {"chosen": "#0072B2", "rejected": "#D55E00"}
PROTOCOLS = {"grouped": "#009E73", "published": "#7a3e9d"}
FATES = {"kept": "#8c8c8c", "rotated": "#0072B2", "attenuated": "#D55E00", "created": "#009E73"}
LABELS = {
    "base_only": "#E69F00", "aligned_only": "#D55E00", "shared_same": "#56B4E9", "shared_rotated": "#0072B2",
    "shared_attenuated": "#009E73",
}  # fmt: skip
CLASSES = {
    "base_only": "#E69F00", "aligned_only": "#D55E00", "shared_aligned": "#56B4E9", "shared_redirected": "#0072B2",
    "shared_intermediate": "#CC79A7", "shared_attenuated": "#009E73", "other": "#c9c9c9",
}  # fmt: skip
FLOOR = "#bdbdbd"
LONG_NUMBERS = re.compile(r"(\d+\.\d\d)\d+")  # a hundredth of a point is finer than any screen
INDENTS = re.compile(r"\n +")


def use() -> None:
    """Set the house style; call it once a notebook."""
    settings = {
        "figure.dpi": 80, "savefig.dpi": 130, "savefig.bbox": "tight", "svg.hashsalt": "alignlens",
        "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.4,
        "legend.frameon": False,
    }  # fmt: skip
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85, rc=settings)


def order(methods) -> list[str]:
    """The methods that occur, in the order of the house."""
    return [m for m in METHODS if m in set(methods)]


def lines(table: pd.DataFrame, y: str, *, x="layer", hue="method", col="family", band=(), **options) -> sns.FacetGrid:
    """``seaborn.relplot``, one line a method (or a value of ``hue``, which then needs a ``palette`` of its own).

    band : values of ``hue`` whose interval, columns ``y_low`` and ``y_high``, is drawn."""
    shown = order(table[hue]) if hue == "method" else list(dict.fromkeys(table[hue]))
    looks = {"palette": METHODS, "markers": MARKERS, "dashes": DASHES} if hue == "method" else {"markers": True}
    looks |= {"height": 3, "aspect": 1.2, "errorbar": None, "legend": "full", "hue_order": shown, "style_order": shown}
    looks |= options
    grid = sns.relplot(table, x=x, y=y, col=col, kind="line", hue=hue, style=hue, **looks)
    grid.set_titles(col_template="{col_name}", row_template="{row_name}")

    def draw(data, color, **_):
        for name in (n for n in shown if n in band):
            rows = data[data[hue] == name].sort_values(x)
            low, high, color = rows[f"{y}_low"], rows[f"{y}_high"], looks["palette"][name]
            plt.fill_between(rows[x], low, high, color=color, alpha=0.15, lw=0)

    if band:
        grid.map_dataframe(draw)
    if x == "layer":
        for axis in grid.axes.flat:
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return grid


def intervals(table: pd.DataFrame, y: str, *, low=None, high=None, x="method", col="family", **options):
    """``seaborn.FacetGrid`` of a point and its 95 % interval (columns ``y_low``, ``y_high``) a method; rows of a panel
    that share their ``x`` (families, say) stand side by side."""
    low, high, shown = low or f"{y}_low", high or f"{y}_high", order(table[x]) or list(dict.fromkeys(table[x]))
    grid = sns.FacetGrid(table, col=col, **{"height": 3, "aspect": 1.1} | options)

    def draw(data, color, **_):
        for place_, name in enumerate(shown):
            rows = data[data[x] == name]
            reach = np.clip([rows[y] - rows[low], rows[high] - rows[y]], 0, None)
            kind = {"color": METHODS.get(name, "#333333"), "marker": MARKERS.get(name, "o")}
            beside = np.linspace(-0.22, 0.22, len(rows)) if len(rows) > 1 else np.zeros(len(rows))
            plt.errorbar(place_ + beside, rows[y], reach, ls="", ms=5, lw=1.3, **kind)
        plt.xticks(range(len(shown)), shown, rotation=60, ha="right")

    grid.map_dataframe(draw)
    grid.set_titles(col_template="{col_name}", row_template="{row_name}")
    return grid.set_axis_labels("", y)


def floor(grid: sns.FacetGrid, table: pd.DataFrame, low: str, high: str, *, x="layer", color=FLOOR) -> None:
    """A band between two columns of a table behind each panel of the same family: what noise alone reaches."""
    for name, axis in grid.axes_dict.items():
        rows = table[table.family == (name if isinstance(name, str) else name[-1])].sort_values(x)
        axis.fill_between(rows[x], rows[low], rows[high], color=color, alpha=0.45, lw=0, zorder=0)


def save(figure, table: pd.DataFrame, name: str, study, *, title: str = "", note: str = "") -> None:
    """Write ``figures/<preset>/<name>`` as .png, .svg and .csv, stamped with preset and run id, and show it.

    figure : matplotlib figure or seaborn grid. title : what is seen; note : n and seeds, below it."""
    figure = getattr(figure, "figure", figure)
    folder, top = _folder(study), 1 + 0.12 / figure.get_figheight()
    if note:
        figure.text(0.01, top, note, ha="left", va="bottom", size=8, alpha=0.75)
    if title:
        figure.text(0.01, top + (0.22 / figure.get_figheight() if note else 0), title, ha="left", va="bottom", size=11)
    stamp = f"alignlens · {study.preset.name} · run {study.run_id}"
    figure.text(0.999, -0.12 / figure.get_figheight(), stamp, ha="right", va="top", size=6, alpha=0.5)
    for suffix, options in ((".png", {}), (".svg", {"metadata": {"Date": None}, "dpi": 100})):
        with replacing(folder / f"{name}{suffix}") as beside:
            figure.savefig(beside, format=suffix[1:], **options)
            if suffix == ".png":
                beside.write_bytes(shrink(beside.read_bytes()))
            else:
                beside.write_text(INDENTS.sub("\n", LONG_NUMBERS.sub(r"\1", beside.read_text())))
    save_table(table, name, study)
    plt.show()


def save_table(table: pd.DataFrame, name: str, study) -> None:
    """Write a table as ``figures/<preset>/<name>.csv``, numbers to five significant digits."""
    with replacing(_folder(study) / f"{name}.csv") as beside:
        table.to_csv(beside, index=False, float_format="%.5g", lineterminator="\n")


def shrink(png: bytes) -> bytes:
    """A picture of few colours needs no more than 256: a third of the size, to the eye the same."""
    with Image.open(BytesIO(png)) as picture, BytesIO() as small:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(small, format="PNG", optimize=True)
        return small.getvalue()


def _folder(study) -> Path:
    folder = Path(place(study.preset.figures)) / study.preset.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
