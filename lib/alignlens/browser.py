"""A latent browser for notebooks: pick a latent, see its examples, what it tells and how each variant changed it."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd

from alignlens.figures import STYLE
from alignlens.study import Study, Variant, mechanisms

BLUE = "0, 114, 178"


def show(study: Study, family: str, layer: int, latent: int) -> None:
    """Display the page of a latent, and controls that replace it; without a live kernel the first page stays."""
    import ipywidgets
    from IPython.display import HTML, display

    reader = mechanisms.latent_reader(study, Variant(family, "base"), layer)
    changes = _changes(study, family, layer)
    live = [int(i) for i in np.flatnonzero(np.diff(reader.codes.tocsc().indptr))]
    names = {f"{i}  {reader.names.get(i, '')}".strip(): i for i in live}
    start = latent if latent in live else live[0]
    pick = ipywidgets.Dropdown(options=names, value=start, description="latent")
    display(pick)
    page = display(HTML(render(reader, changes, start)), display_id=True)
    pick.observe(lambda change: page.update(HTML(render(reader, changes, change["new"]))), names="value")


def _changes(study: Study, family: str, layer: int) -> pd.DataFrame:
    """Change of every latent in every variant of a family at a layer, seeds averaged."""
    variants = study.variants(family, base=False)
    table = mechanisms.collect(study, lambda v: study.latents(v).table("change.parquet"), variants)
    names = ["mean_change", "density_change", "effect_change", "effect_p"]
    return table[table.layer == layer].groupby(["method", "latent"], sort=False)[names].mean().reset_index()


def render(reader: mechanisms.LatentReader, changes: pd.DataFrame, latent: int) -> str:
    """The page of one latent as HTML: what it tells, examples by quantile band with shaded tokens, change by method."""
    column = reader.codes[:, [latent]].toarray().ravel()
    fires, told = (column > 0).mean(), reader.names.get(latent, "no planted factor beyond chance")
    parts = [f"<h4>Latent {latent}: tells {html.escape(told)}; fires on {fires:.2%} of response tokens</h4>"]
    for band, rows in reader.examples(latent).groupby("band"):
        words = ("strongest quarter", "second", "third", "weakest quarter")[int(band)]
        texts = "<br>".join(_shaded(reader, column, int(i)) for i in rows["index"])
        parts.append(f"<p><b>{words}</b><br>{texts}</p>")
    return "".join(parts) + _change_table(changes[changes.latent == latent])


def _shaded(reader: mechanisms.LatentReader, column: np.ndarray, index: int) -> str:
    first, last = reader.response(index)
    top = max(float(column.max()), 1e-9)
    spans = []
    for i in range(first, last):
        text = html.escape(reader.tokenizer.decode(reader.tokens.token_id[i : i + 1]))
        spans.append(f'<span style="background: rgba({BLUE}, {0.75 * column[i] / top:.2f})">{text}</span>')
    return "".join(spans)


def _change_table(rows: pd.DataFrame) -> str:
    cells = "".join(
        f'<tr><td style="color: {STYLE[r.method][0]}">{r.method}</td><td>{r.density_change:+.4f}</td>'
        f"<td>{r.mean_change:+.4f}</td><td>{r.effect_change:+.4f}</td></tr>"
        for r in rows.itertuples()
    )
    head = "".join(f"<th>{h}</th>" for h in ("method", "density", "mean code", "preference effect"))
    return f"<table><caption>change against the base, mean over seeds</caption><tr>{head}</tr>{cells}</table>"
