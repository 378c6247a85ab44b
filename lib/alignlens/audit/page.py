"""The audit as a page: verdict and sentences by rule from the JSON of ``audit``, one HTML file that needs nothing else.

``write`` puts audit.json and audit.html into a folder, complete or not at all; ``compare`` sets several audits of one
base on the same pairs side by side. Every sentence here is made from numbers by a fixed rule: what lies within noise is
said to, and "preserved" is said only of changes whose whole interval is small.
"""

from __future__ import annotations

import glob
import html
import json
import os
import shutil
import tempfile
from base64 import b64encode
from pathlib import Path

from alignlens.audit import pictures as draw
from alignlens.audit.measure import (
    EQUIVALENCE,
    FEW_PROMPTS,
    LEAST_TOKENS,
    READABLE,
    SCHEMA,
    SECTIONS,
    beyond,
    preserved,
)
from alignlens.core.errors import ReportError
from alignlens.core.store import write_json
from alignlens.dictionaries import CUTS

# --- Files ------------------------------------------------------------------------------------------------------------


def write(result: dict, folder: str | Path) -> list[Path]:
    """audit.json (the result and its verdict) and audit.html in a folder; paths of both.

    Both are written beside the folder first, so an old audit stays whole until the new one is.
    """
    result = result | {"verdict": verdict(result)}
    text = page(result)

    def fill(place: Path) -> None:
        write_json(place / "audit.json", result)
        (place / "audit.html").write_text(text, encoding="utf-8")

    return _place(folder, fill)


def _place(folder: str | Path, fill) -> list[Path]:
    folder = Path(folder).expanduser().absolute()
    if folder.is_file():
        raise ReportError(f"{folder.name} is a file: give a folder for the report")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ReportError(f"nothing can be written beside {folder.name!r}: {error.strerror}") from error
    try:
        fill(beside)
        names = sorted(file.name for file in beside.iterdir())
        beside.chmod(0o755)
        if not folder.exists():
            os.rename(beside, folder)
        else:
            for name in names:
                os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [folder / name for name in names]


def read(path: str | Path) -> dict:
    """The audit in a file or folder. ReportError if it is missing, damaged or of another schema version."""
    path = Path(path).expanduser()
    file = path / "audit.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{file} does not exist: give an audit.json or the folder that holds one") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} is no readable audit.json: {error}") from error
    found = result.get("schema") if isinstance(result, dict) else None
    if found != SCHEMA:
        raise ReportError(f"{file} has schema {found!r}, this version reads {SCHEMA!r}: make the audit again")
    if missing := [name for name in ("models", "pairs", "format", "methods", *SECTIONS) if name not in result]:
        raise ReportError(f"{file} has no {missing[0]!r}: it was cut or edited; make the audit again")
    return result


# --- Words for numbers ------------------------------------------------------------------------------------------------


def _n(value, sign=False) -> str:
    """A number in three significant digits."""
    if value is None:
        return "unknown"
    if value == 0:
        return "0"
    text = f"{value:+.3g}" if sign else f"{value:.3g}"
    if "e" in text:
        text = f"{value:+.1e}" if sign else f"{value:.1e}"
    return text.replace("-", "−")


def _pc(value) -> str:
    return "unknown" if value is None else f"{100 * value:.3g}\u00a0%"


def _ci(x: dict, show=_n) -> str:
    """value (low to high)"""
    return f"{show(x['value'])} ({show(x['low'])} to {show(x['high'])})"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _measured(result: dict, name: str) -> bool:
    return result[name]["status"] == "measured"


# --- Findings: what lies beyond noise ---------------------------------------------------------------------------------

BEHAVIOUR = {
    "kl": ("KL to the base", "nats an answer; 0 means the same answers with the same probabilities"),
    "kl_token": ("KL to the base, a token", "nats a token"),
    "accuracy": (
        "implicit-reward accuracy",
        "share of pairs where alignment favours the chosen answer; 50 % is chance",
    ),
    "margin": ("implicit-reward margin", "nats; how much more the chosen answer gained than the rejected one"),
    "chosen_shift": ("shift of log p(chosen)", "nats; below 0: even chosen answers became less likely"),
    "rejected_shift": ("shift of log p(rejected)", "nats"),
    "length_shift": ("change of answer length", "tokens of a sampled answer, aligned - base"),
    "win_rate": ("win rate against the base", "share of prompts, by the toy world's true utility; 50 % is a draw"),
}


def changed_layers(result: dict) -> dict[str, list[int]]:
    """Layers with a change of the preference signal, by kind; none of a kind that only one of many layers shows.

    Layers are tested one by one at 5 %, so a lone layer is what chance would give.
    """
    rows = result["change"]["layers"] if _measured(result, "change") else []
    out = {}
    for kind in ("rotated", "attenuated", "created"):
        found = [row["layer"] for row in rows if kind in row["verdict"].split("+")]
        out[kind] = found if len(found) > 1 or len(rows) < 3 else []
    return out


def changed_labels(result: dict) -> list[str]:
    """Labels of latents whose share lies above that of the base with itself."""
    if not _measured(result, "latents"):
        return []
    found = result["latents"]["labels"].items()
    return [name for name, x in found if name != "shared_same" and x["low"] > x["floor"]]


def _beside_shuffled(result: dict, label: str) -> str:
    """What a change of the same size in a random direction shows of a label."""
    x = result["latents"]["shuffled"].get(label)
    return f" (a shuffled change of the same size: {_pc(x['value'])})" if x else ""


def findings(result: dict) -> dict[str, list[str]]:
    """Names of all comparisons of base and aligned: "beyond" noise and "within" it."""
    out = {"beyond": [], "within": []}

    def sort(holds, name):
        out["beyond" if holds else "within"].append(name)

    if _measured(result, "behaviour"):
        for name, (words, _) in BEHAVIOUR.items():
            if name in result["behaviour"]["numbers"] and name != "kl_token":
                sort(beyond(result["behaviour"]["numbers"][name]), words)
    if _measured(result, "signal"):
        rows = result["signal"]["layers"]
        moved = [row["layer"] for row in rows if beyond(row["difference"])]
        sort(len(moved) > 1 or (moved and len(rows) < 3), "probe AUROC")
    if _measured(result, "change"):
        sort(any(changed_layers(result).values()), "kind of the preference signal")
    if _measured(result, "latents"):
        sort(bool(changed_labels(result)), "latents' labels")
        sort(bool(result["latents"]["top"]), "single latents")
    if _measured(result, "causal"):
        sort(not result["causal"]["patching"]["reason"], "change of margin in the causal check")
        sort(_steering_changed(result), "effect of the preference direction")
    return out


def _steering(result: dict, model: str, intervention="steer") -> dict:
    return next(
        t for t in result["causal"]["tests"][model]
        if (t["intervention"], t["direction"], t["measure"]) == (intervention, "own", "margin")
    )  # fmt: skip


def _steering_changed(result: dict) -> bool:
    """Whether the direction's effect on the margin differs between the models: intervals that do not meet."""
    for intervention in ("steer", "ablate"):
        base, aligned = (_steering(result, m, intervention)["effect"] for m in ("base", "aligned"))
        if base["low"] > aligned["high"] or aligned["low"] > base["high"]:
            return True
    return False


# --- The verdict ------------------------------------------------------------------------------------------------------

FAR = ((0.003, "hardly at all"), (0.03, "a little"), (0.3, "clearly"), (float("inf"), "very far"))  # nats a token


def verdict(result: dict) -> list[dict]:
    """Five lines, each a title and a text, by rule."""
    lines = {
        "How far it moved": how_far(result),
        "Where": where(result),
        "What kind of change": what_kind(result),
        "Within noise": within_noise(result),
        "Not measured": not_measured(result),
    }
    return [{"title": title, "text": text} for title, text in lines.items()]


def how_far(result: dict) -> str:
    if result["models"]["identical"]:
        return "Not at all: the two models have the same weights, and nothing lies beyond noise."
    if not _measured(result, "behaviour"):
        return "Not known: the models' answers could not be measured."
    numbers = result["behaviour"]["numbers"]
    if not beyond(numbers["kl"]):
        return "The weights differ, but the answers do not: the KL to the base is nothing beyond noise."
    words = next(text for limit, text in FAR if numbers["kl_token"]["value"] < limit)
    text = f"It moved {words}: {_ci(numbers['kl'])} nats of KL an answer, {_n(numbers['kl_token']['value'])} a token. "
    if beyond(numbers["accuracy"]) or beyond(numbers["margin"]):
        side = "chosen" if numbers["margin"]["value"] > 0 else "rejected"
        share = numbers["accuracy"]["value"] if side == "chosen" else 1 - numbers["accuracy"]["value"]
        text += f"Against the base it now favours the {side} answer in {_pc(share)} of the held-out pairs."
    else:
        return text + "It favours neither chosen nor rejected answers more than the base did, beyond noise."
    shift = numbers["chosen_shift"]
    if side == "chosen" and beyond(shift) and shift["value"] < 0:
        text += f" Even the chosen answers became less likely (by {_n(-shift['value'])} nats): likelihood displacement."
    if "win_rate" in numbers and beyond(numbers["win_rate"]):
        text += f" Its sampled answers win {_ci(numbers['win_rate'], _pc)} of comparisons with the base's."
    return text


def where(result: dict) -> str:
    if result["models"]["identical"]:
        return "Nowhere: nothing lies beyond noise at any layer."
    parts, depth = [], result["models"]["base"]["layers"]
    if _measured(result, "causal"):
        patching = result["causal"]["patching"]
        if patching["reason"]:
            pairs = result["causal"]["pairs"]
            parts.append(f"On the {pairs} pairs of the causal check the change of margin cannot be located.")
        else:
            half = next((r["layer"] for r in patching["layers"] if (r["share"]["value"] or 0) >= 0.5), None)
            if half is None:
                parts.append("No measured block alone carries half of the change of margin.")
            else:
                parts.append(f"Half of the change of margin is there after block {half} of {depth} (0 to {depth - 1}).")
    if _measured(result, "signal"):
        rows, best = result["signal"]["layers"], result["signal"]["best"]["aligned"]
        row = next(r for r in rows if r["layer"] == best)
        if beyond(row["aligned"]):
            parts.append(f"Preferences are read best after block {best} (AUROC {_n(row['aligned']['value'])}).")
        else:
            parts.append("No probe reads preferences beyond noise at any layer.")
    return " ".join(parts) or "Not known: neither probes nor patching could be measured."


KINDS = {"rotated": "points in another direction", "attenuated": "is gone", "created": "is new"}


def _kinds(result: dict) -> str:
    """What share of the preference signal changed, by kind, over the layers where it did; empty if nowhere."""
    rows, found = {row["layer"]: row for row in result["change"]["layers"]}, []
    for kind, layers in changed_layers(result).items():
        if layers:
            whole = ("kept", "rotated", "created" if kind == "created" else "attenuated")
            parts = [[rows[layer][name]["value"] for layer in layers] for name in (kind, *whole)]
            share = sum(parts[0]) / max(sum(map(sum, parts[1:])), 1e-12)
            found.append(f"{_pc(round(share, 2))} {KINDS[kind]} (at {len(layers)} of {len(rows)} layers)")
    return f"Of the preference signal, {_list(found)}." if found else ""


def what_kind(result: dict) -> str:
    if result["models"]["identical"]:
        return "None: nothing lies beyond noise."
    parts = []
    if _measured(result, "change"):
        changed = changed_layers(result)
        parts.append(_kinds(result))
        if not changed["attenuated"] and not changed["created"]:
            parts.append(_auroc_sentence(result))
    if _measured(result, "latents"):
        labels = changed_labels(result)
        shares = result["latents"]["labels"]
        total = [f"{_pc(shares[n]['value'])} {draw.LABELS[n]}{_beside_shuffled(result, n)}" for n in labels]
        shown = f"{_list(total)}, more than in the base with itself" if total else "nothing beyond noise"
        parts.append(f"Crosscoder latents: {shown}.")
    return " ".join(part for part in parts if part) or "Not known: neither probes nor latents could be measured."


def _auroc_sentence(result: dict) -> str:
    """Of probe accuracy that shows no change: preserved, or not enough data to tell."""
    rows = result["signal"]["layers"] if _measured(result, "signal") else []
    if not rows:
        return ""
    if not any(beyond(row["base"]) for row in rows):
        return "The base has no readable preference signal that could have changed."
    if all(preserved(row["difference"]) for row in rows):
        return f"How well it can be read is preserved: every layer's change of AUROC lies within ±{EQUIVALENCE}."
    return (
        "How well it can be read: no change detected; changes of AUROC smaller than "
        f"{_n(result['power'].get('auroc'))} could not have been seen."
    )


def within_noise(result: dict) -> str:
    within = findings(result)["within"]
    if not within:
        return "None of the comparisons."
    if not findings(result)["beyond"]:
        return f"Everything: {_list(within)}."
    words = _list(within)
    power = result["power"]
    seen = [f"{_n(power[name])} {unit}" for name, unit in
            (("margin", "nats of margin"), ("kl", "nats of KL"), ("auroc", "AUROC")) if power.get(name)]  # fmt: skip
    text = f"{words[0].upper() + words[1:]}: no change detected."
    return text + (f" Smallest changes that would have been seen: {_list(seen)}." if seen else "")


def not_measured(result: dict) -> str:
    names = {"behaviour": "behaviour", "signal": "probes", "change": "kinds of change", "latents": "latents",
             "causal": "causal tests"}  # fmt: skip
    parts = [f"{words}: {result[name]['reason']}" for name, words in names.items() if not _measured(result, name)]
    if _measured(result, "behaviour") and "win_rate" not in result["behaviour"]["numbers"]:
        parts.append("whether the answers got better (there is no judge)")
    parts.append("whether these prompts were trained on")
    return f"{'; '.join(part.rstrip('.') for part in parts)[:1].upper()}{'; '.join(p.rstrip('.') for p in parts)[1:]}."


# --- The page ---------------------------------------------------------------------------------------------------------

CSS = """
:root { --ink: #1d2329; --soft: #5b6670; --line: #dde2e6; --tint: #f5f7f8; --blue: #0072B2; --amber: #8a5a00; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 48px 0 8px; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 8px 0; max-width: 74ch; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { margin: 24px 0 8px; border-left: 4px solid var(--blue); background: var(--tint); padding: 8px 20px; }
.verdict div { display: grid; grid-template-columns: 11rem 1fr; gap: 4px 16px; padding: 8px 0; }
.verdict div + div { border-top: 1px solid var(--line); }
.verdict dt { font-weight: 600; } .verdict dd { margin: 0; overflow-wrap: anywhere; }
.says { font-weight: 600; }
.warnings { list-style: none; padding: 0; margin: 12px 0; }
.warnings li { border-left: 4px solid #E69F00; background: #fdf7ea; padding: 6px 14px; margin: 6px 0; max-width: 80ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px 28px; }
figure { margin: 12px 0; } figure img { display: block; width: 100%; max-width: 540px; height: auto; }
.box { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td.n { white-space: nowrap; } td.wide { min-width: 12.5rem; }
tr.noise td { color: var(--soft); }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--blue); }
pre { overflow-x: auto; background: var(--tint); padding: 12px; font-size: .82rem; }
mark { background: #cfe4f2; padding: 0 2px; border-radius: 2px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px; }
.cards > div { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; } .cards p { margin: 4px 0; }
@media (max-width: 620px) {
  main { padding: 20px 16px 48px; } h1 { font-size: 1.4rem; }
  td.n { white-space: normal; min-width: 5.6rem; } td.wide { min-width: 9rem; } th, td { padding-right: 10px; }
  .verdict { padding: 4px 14px; } .verdict div { grid-template-columns: 1fr; }
}
@media print { main { max-width: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def page(result: dict) -> str:
    """The audit as one HTML page without scripts and without anything from elsewhere."""
    base, aligned = (result["models"][m]["name"] for m in ("base", "aligned"))
    p = result["pairs"]
    head = [
        f"<h1>{_e(aligned)}</h1>",
        f'<p class="soft">Alignment audit against {_e(base)} on {p["pairs"]:,} held-out pairs '
        f"({p['prompts']:,} prompts) of {_e(p['source'])}{', ' + _e(result['date']) if result['date'] else ''}. All "
        "ranges are 95 % intervals over prompts.</p>",
        _verdict_box(result.get("verdict") or verdict(result)),
        _warning_list(result["warnings"]),
    ]
    sections = [_behaviour, _signal, _change, _latents, _causal, _power, _methods]
    return _document(f"Audit of {aligned}", [*head, *(part for section in sections for part in section(result))])


def _document(title: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _e(text) -> str:
    return html.escape(str(text))


def _verdict_box(lines: list[dict]) -> str:
    rows = "".join(f"<div><dt>{_e(line['title'])}</dt><dd>{_e(line['text'])}</dd></div>" for line in lines)
    return f'<dl class="verdict">{rows}</dl>'


def _warning_list(warnings: list[dict]) -> str:
    rows = "".join(f"<li>{_e(w['text'])}</li>" for w in warnings)
    return f'<ul class="warnings" aria-label="Warnings">{rows}</ul>'


def _figure(svg: str, alt: str, reading: str) -> str:
    data = b64encode(svg.encode()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{_e(alt)}">'
        f"<figcaption>{_e(reading)}</figcaption></figure>"
    )


def _figures(*figures: str) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _table(head: list[str], rows: list[tuple], caption="", noise=()) -> str:
    """A table in a box of its own; cells that start with "<" are HTML already."""
    cells = [
        "".join(f'<td class="wide">{c}</td>' if str(c)[:1] == "<" else f'<td class="n">{_e(c)}</td>' for c in row)
        for row in rows
    ]
    body = "".join(f"<tr{' class=noise' if i in noise else ''}>{row}</tr>" for i, row in enumerate(cells))
    header = "".join(f"<th>{_e(h)}</th>" for h in head)
    top = f'<p class="soft">{_e(caption)}</p>' if caption else ""  # outside of what scrolls
    return (
        f'<div>{top}<div class="box"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div></div>'
    )


def _section(title: str, intro: str, result: dict, name: str, fill) -> list[str]:
    head = [f"<h2>{_e(title)}</h2>", f"<p>{_e(intro)}</p>"]
    if not _measured(result, name):
        return [*head, f'<p class="says">Not measured. {_e(result[name]["reason"])}</p>']
    return [*head, *fill(result[name])]


def _says(text: str) -> str:
    return f'<p class="says">{_e(text)}</p>'


def _behaviour(result: dict) -> list[str]:
    intro = (
        "What a user of the model would notice. The implicit reward of an answer is how much more likely alignment "
        "made it; a pair is right when the chosen answer gained more than the rejected one."
    )

    def fill(section):
        numbers = section["numbers"]
        names = [name for name in BEHAVIOUR if name in numbers]
        noise = [i for i, name in enumerate(names) if not beyond(numbers[name])]
        rows = [
            (
                f"<b>{_e(BEHAVIOUR[name][0])}</b><br><span class=soft>{_e(BEHAVIOUR[name][1])}</span>",
                f"<span>{_ci(numbers[name], _pc if numbers[name]['unit'].startswith('share') else _n)}</span><br>"
                f"<span class=soft>{'within' if i in noise else 'beyond'} noise</span>",
            )
            for i, name in enumerate(names)
        ]
        table = _table(["measure", "value (95 % interval)"], rows, noise=noise)
        alt = (
            f"Histograms of shifts: chosen on average {_n(numbers['chosen_shift']['value'])}, rejected "
            f"{_n(numbers['rejected_shift']['value'])} nats."
        )
        reading = (
            "Right of 0: the answer became more likely. Alignment works as meant where orange lies left of blue; "
            "both left of 0 is likelihood displacement. Dashed and dotted: means."
        )
        weights = result["weights"]
        figures = _figures(
            _figure(draw.shifts(section), alt, reading),
            _figure(
                draw.weights(weights),
                f"Change of the weights by block, {_pc(weights['share']['value'])} over all.",
                "How far each block's weights moved. Large changes need not matter, and small ones may.",
            ),
        )
        return [_says(_behaviour_says(result)), table, figures]

    return _section("Behaviour", intro, result, "behaviour", fill)


def _behaviour_says(result: dict) -> str:
    numbers = result["behaviour"]["numbers"]
    moved = [name for name in BEHAVIOUR if name in numbers and beyond(numbers[name])]
    if not moved:
        return "Nothing beyond noise: the two models behave alike on these prompts."
    shift = numbers["length_shift"]
    length = f"answers are {_n(abs(shift['value']))} tokens {'longer' if shift['value'] > 0 else 'shorter'}"
    length = length if beyond(shift) else "no change of answer length was detected"
    chosen, rejected = numbers["chosen_shift"], numbers["rejected_shift"]
    return (
        f"Chosen answers moved by {_n(chosen['value'], True)} nats, rejected ones by {_n(rejected['value'], True)}; "
        f"{length} (base {_n(numbers['base_length']['value'])}, aligned {_n(numbers['aligned_length']['value'])} "
        "tokens)."
    )


def _signal(result: dict) -> list[str]:
    intro = (
        "A probe is a linear classifier that tells the chosen from the rejected answer by the model's internal state "
        "at the end of the answer. It is trained and tested on different prompts, so 0.5 means that nothing can be "
        "told."
    )

    def fill(section):
        rows = section["layers"]
        baselines = section["baselines"]
        peak = max(rows, key=lambda row: row["aligned"]["value"])
        table = _table(
            ["layer", "base AUROC", "aligned AUROC", "change", "noise reaches"],
            [
                (row["layer"], _ci(row["base"]), _ci(row["aligned"]), _ci(row["difference"]),
                 _n(0.5 + max(row["base"]["floor"], row["aligned"]["floor"])))
                for row in rows
            ],
            noise=[i for i, row in enumerate(rows) if not beyond(row["difference"])],
            caption="Grey rows: the change between the models is within noise.",
        )  # fmt: skip
        base = _table(
            ["without looking inside", "AUROC"],
            [("answer length alone", _ci(baselines["length"])),
             ("the base's log-probability alone", _ci(baselines["log_probability"]))],
            caption="What a probe must beat to be interesting.",
        )  # fmt: skip
        alt = f"AUROC by layer; aligned at best {_n(peak['aligned']['value'])} at layer {peak['layer']}."
        reading = (
            "Height: how well preferences can be read. Inside the grey band is noise. Two lines that run together "
            "mean that alignment left the signal as readable as it was."
        )
        return [_says(_signal_says(result)), _figures(_figure(draw.signal(section), alt, reading), base), _more(table)]

    return _section("Where the preference signal sits", intro, result, "signal", fill)


def _signal_says(result: dict) -> str:
    rows = result["signal"]["layers"]
    if not any(beyond(row[model]) for row in rows for model in ("base", "aligned")):
        return "Nothing beyond noise: preferences cannot be read from either model on these pairs."
    moved = [row["layer"] for row in rows if beyond(row["difference"])]
    if len(moved) > 1 or (moved and len(rows) < 3):
        change = max((row["difference"] for row in rows), key=lambda x: abs(x["value"]))
        return f"The signal changed at {_plural(len(moved), 'layer')}, by up to {_n(change['value'], True)} AUROC."
    start = "Both models hold a readable preference signal; between them nothing lies beyond noise. "
    return start + _auroc_sentence(result)


def _more(table: str) -> str:
    return f"<details><summary>All numbers</summary>{table}</details>"


def _change(result: dict) -> list[str]:
    intro = (
        "The base's probe is applied to the aligned model. Kept: it still reads the signal. Rotated: the signal is "
        "there, but along another direction, so probes and steering vectors made for the base read less of it. "
        "Attenuated: it got weaker. Created: signal that the base did not have."
    )

    def fill(section):
        rows = section["layers"]
        table = _table(
            ["layer", "finding", "kept", "rotated", "attenuated", "created", "whole stream turned by", "scale"],
            [
                (row["layer"], row["verdict"].replace("+", " + "),
                 *(_ci(row[n]) for n in ("kept", "rotated", "attenuated", "created")),
                 f"{_n(row['rotation']['value'])}°", _n(row["scale"]["value"]))
                for row in rows
            ],
            caption="AUROC above chance (0.5 would be all). The last columns describe the whole internal state.",
        )  # fmt: skip
        parts = {n: sum(row[n]["value"] for row in rows) / len(rows) for n in draw.PARTS}
        alt = "Stacked bars by layer; on average " + ", ".join(f"{n} {_n(v)}" for n, v in parts.items()) + "."
        reading = (
            "Each bar is the preference signal at one layer. Grey is what the base's probe still reads; the other "
            "colours are what alignment did. Small slivers are within noise: see the finding above."
        )
        return [_says(_change_says(result)), _figures(_figure(draw.change(section), alt, reading)), _more(table)]

    return _section("Kept, rotated, attenuated or created", intro, result, "change", fill)


def _change_says(result: dict) -> str:
    if found := _kinds(result):
        return found
    if all(row["verdict"] == "none" for row in result["change"]["layers"]):
        return "Nothing beyond noise: there is no readable preference signal whose change could be described."
    return f"Nothing beyond noise. {_auroc_sentence(result)}"


def _latents(result: dict) -> list[str]:
    intro = (
        "A crosscoder is a sparse dictionary that explains both models at once: each latent is a feature with one "
        "direction in the base and one in the aligned model. It was trained on one half of the prompts and read on "
        "the other. The same dictionary trained on the base and itself shows what training alone produces."
    )

    def fill(section):
        labels = section["labels"]
        alt = (
            "Shares of latents: " + ", ".join(f"{draw.LABELS[n]} {_pc(labels[n]['value'])}" for n in draw.LABELS) + "."
        )
        reading = (
            "Blue: share of latents of each kind. Black stroke: the base with itself, where nothing happened. "
            "Orange: the same change of the weights, its direction shuffled; only what differs from it is particular "
            "to this alignment."
        )
        facts = (
            f"Layer {section['layer']}, {section['live']} live latents of {section['width']}, {section['tokens']:,} "
            f"training tokens; held-out variance explained: base {_pc(section['r2']['base'])}, aligned "
            f"{_pc(section['r2']['aligned'])}. Latents are not named: a name would need a causal test of each."
        )
        out = [_says(_latents_says(result)), _figures(_figure(draw.labels(section), alt, reading))]
        out.append(f'<p class="soft">{_e(facts)}</p>')
        if section["top"]:
            caption = (
                "The latents that changed most: by how much their writing differs between the models, as a share of "
                "the stream's spread, more than any latent under the shuffled change "
                f"({_pc(section['change_floor'])}). Below, where they fire most. Same in both: turned by less than "
                f"{CUTS.rotated:g}°."
            )
            out.append(f'<p class="soft">{_e(caption)}</p>')
            out.append(f'<div class="cards">{"".join(map(_card, section["top"]))}</div>')
        return out

    return _section("Features", intro, result, "latents", fill)


def _latents_says(result: dict) -> str:
    labels, found = result["latents"]["labels"], changed_labels(result)
    if not found and not result["latents"]["top"]:
        return "Nothing beyond noise: the dictionary finds the same features in both models."
    parts = [f"{_ci(labels[n], _pc)} of the latents are {draw.LABELS[n]}{_beside_shuffled(result, n)}" for n in found]
    start = f"{_list(parts)}. " if parts else "No kind of latent is more frequent than in the base with itself. "
    return start + f"{_pc(labels['shared_same']['value'])} are the same in both models."


def _card(latent: dict) -> str:
    """One latent: what became of it, whose answers it marks, and texts where it fires."""
    facts = (
        f"changed by {_ci(latent['change'], _pc)}, turned by {_n(latent['degrees'])}°, fires on "
        f"{_pc(latent['density'])} of tokens, chosen − rejected {_ci(latent['effect'])}"
    )
    texts = "".join(f"<p>{_e(a)}<mark>{_e(token)}</mark>{_e(b)}</p>" for a, token, b in latent["examples"])
    kind = draw.LABELS.get(latent["label"], latent["label"])
    return f'<div><b>Latent {latent["latent"]}: {_e(kind)}</b><p class="soft">{_e(facts)}</p>{texts}</div>'


def _causal(result: dict) -> list[str]:
    intro = (
        "Does the model use what the probe reads? The preference direction (mean state of chosen minus rejected "
        "answers, from one half of the prompts) is added to the state or removed from it, on other prompts. The same "
        "is done with random directions of the same size: only what they do not reach is an effect of the direction."
    )

    def fill(section):
        patching = section["patching"]
        alt = "Effects on the margin: " + "; ".join(
            f"{t['intervention']} {t['direction']} in {m} {_n(t['effect']['value'], True)}"
            for m in ("base", "aligned") for t in section["tests"][m] if t["measure"] == "margin"
        )  # fmt: skip
        figures = [
            _figure(
                draw.tests(section), alt,
                "Points: effect of the preference direction. Grey: 95 % of random directions, white their mean. A "
                "point outside the grey whose range leaves out the white is an effect of the direction.",
            )
        ]  # fmt: skip
        if not patching["reason"]:
            at = ", ".join(f"{_n(r['share']['value'])} at {r['layer']}" for r in patching["layers"])
            figures.append(
                _figure(
                    draw.patching(section), f"Share of the change of margin by block: {at}.",
                    "The base gets the aligned model's state after one block. 1: the whole change of margin is "
                    "there; a steep rise is where it comes about.",
                )
            )  # fmt: skip
        rows = [
            (m, {"steer": "add", "ablate": "remove"}[t["intervention"]], t["direction"], t["measure"], _ci(t["effect"]),
             f"{_n(t['effect']['null'] - t['effect']['floor'])} to {_n(t['effect']['null'] + t['effect']['floor'])}",
             "yes" if t["beats"] else "no")
            for m in ("base", "aligned") for t in section["tests"][m]
        ]  # fmt: skip
        table = _table(["model", "what", "direction", "measure", "effect", "random", "beats random"], rows)
        note = (
            f"Block {section['layer']}, {section['pairs']} pairs, {section['random']} random directions; a direction "
        )
        note += f"is added at {section['strength']} times the spread of the state."
        out = [_says(_causal_says(result)), _figures(*figures), f'<p class="soft">{_e(note)}</p>', _more(table)]
        if patching["reason"]:
            out.insert(1, f"<p>{_e('Patching by layer shows nothing beyond noise: ' + patching['reason'] + '.')}</p>")
        return out

    return _section("Causal check", intro, result, "causal", fill)


def _causal_says(result: dict) -> str:
    words = []
    for model in ("base", "aligned"):
        beats = [
            {"steer": "adding", "ablate": "removing"}[i]
            for i in ("steer", "ablate")
            if _steering(result, model, i)["beats"]
        ]
        words.append(
            f"in the {model} model {_list(beats)} it beats" if beats else f"in the {model} model it does not beat"
        )
    text = f"Effect of the preference direction on the margin: {words[0]} random directions; {words[1]} them. "
    if result["models"]["identical"] or not _steering_changed(result):
        return text + "Between the two models nothing lies beyond noise."
    return text + "The effect differs between the two models."


def _power(result: dict) -> list[str]:
    intro = (
        "The smallest changes that these pairs would have shown in 80 of 100 audits. Where no change was detected, one "
        "smaller than this may still be there: silence alone proves nothing."
    )
    units = {"margin": "margin (nats)", "kl": "KL (nats an answer)", "accuracy": "implicit-reward accuracy",
             "length_shift": "answer length (tokens)", "auroc": "probe AUROC (median over layers)"}  # fmt: skip
    rows = [(units[name], _n(value) if value else "—") for name, value in result["power"].items()]
    return [
        "<h2>What could have been seen</h2>",
        f"<p>{_e(intro)}</p>",
        _table(["change of", "smallest detectable"], rows),
    ]


def _methods(result: dict) -> list[str]:
    models, p, m = result["models"], result["pairs"], result["methods"]
    rows = [(what, models[what]["name"], models[what]["weights"], models[what]["revision"] or "local",
             f"{models[what]['architecture']}, {models[what]['layers']} × {models[what]['d_model']}",
             f"{models[what]['parameters']:,}", models[what]["dtype"]) for what in ("base", "aligned")]  # fmt: skip
    lost = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in p["dropped"].items()) or "none"
    settings = ", ".join(f"{k} {v}" for k, v in m["settings"].items() if v is not None)
    rules = (
        f"Folds keep all pairs of a prompt together ({m['folds']} folds). Behaviour: bootstrap over prompts, floor "
        "from flipped signs of whole prompts; KL is exact at each token of answers sampled from the aligned model, "
        "its floor is rounding. Probes: logistic regression on chosen - rejected at the end-of-turn token, floor "
        "from swapped labels; a difference of two models has half of its interval as its floor. A finding at a "
        "single layer of many is counted as noise. The shuffled change is the base plus the change of each weight "
        f"with its rows and columns permuted. Crosscoders need {LEAST_TOKENS:,} training tokens and a held-out R² of "
        f"{READABLE}. Below {FEW_PROMPTS} prompts the page warns. How "
        "far: "
        + ", ".join(f"under {limit:g} nats a token {words}" for limit, words in FAR[:-1]) + f", else {FAR[-1][1]}."
    )  # fmt: skip
    example = result["format"]["example"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return [
        "<h2>Methods and versions</h2>",
        _table(["", "name", "weights", "revision", "architecture", "parameters", "precision"], rows),
        f"<p>Pairs {_e(p['source'])}, hash {_e(p['hash'])}: {p['pairs']:,} pairs, {p['prompts']:,} prompts, at most "
        f"{p['longest_tokens']} tokens. Left out: {_e(lost)}.</p>",
        *(f"<p>{_e(note)}</p>" for note in result["format"]["notes"]),
        f"<p>{_e(rules)}</p>",
        f'<p class="soft">{_e(result["schema"])}. {_e(versions)}. Code {_e(m["commit"] or "without a commit")}. Layers '
        f"{_e(', '.join(map(str, m['layers'])))}. {_e(settings)}.</p>",
        f"<details><summary>One pair as the models read it</summary><pre>{_e(example)}</pre></details>",
    ]


# --- Several audits ---------------------------------------------------------------------------------------------------


def find(audits) -> list[Path]:
    """Files of a list, or of text with commas; folders and patterns with * stand for the audit.json in them."""
    parts = audits if isinstance(audits, list | tuple) else [p.strip() for p in str(audits or "").split(",")]
    out = []
    for part in filter(None, map(str, parts)):
        found = sorted(glob.glob(os.path.expanduser(part))) if any(c in part for c in "*?[") else [part]
        if not found:
            raise ReportError(f"nothing matches {part!r}: give files, folders or a pattern")
        out += [Path(f) for f in found]
    if len(out) < 2:
        raise ReportError(f"{_plural(len(out), 'audit')} given: a comparison needs at least two")
    return out


def gather(paths: list[Path]) -> dict[str, dict]:
    """Audits by the name of their aligned model. ReportError unless all share base, pairs, format and layers."""
    results, first = {}, None
    for path in paths:
        result = read(path)
        first = first or (path, result)
        for what, one, other in (
            ("base", first[1]["models"]["base"]["weights"], result["models"]["base"]["weights"]),
            ("pairs", first[1]["pairs"]["hash"], result["pairs"]["hash"]),
            ("format", first[1]["format"]["fingerprint"], result["format"]["fingerprint"]),
            ("layers", first[1]["methods"]["layers"], result["methods"]["layers"]),
        ):
            if one != other:
                raise ReportError(
                    f"{path} and {first[0]} differ in their {what} ({other} and {one}): compare audits of one base on "
                    "the same pairs"
                )
        name = result["models"]["aligned"]["name"]
        while name in results:
            name += "′"
        results[name] = result
    return results


def comparison(results: dict[str, dict]) -> str:
    """Several audits of one base side by side, as one HTML page."""
    first = next(iter(results.values()))
    names = list(results)
    intro = (
        f"{len(names)} models aligned from {first['models']['base']['name']}, measured on the same "
        f"{first['pairs']['pairs']:,} held-out pairs of {first['pairs']['source']}. They moved by different amounts "
        "(see KL): a model that moved further shows more of everything."
    )
    parts = [
        "<h1>Audits side by side</h1>",
        f"<p><b>{_e(' · '.join(names))}</b></p>",
        f'<p class="soft">{_e(intro)}</p>',
    ]
    rows = []
    for words, (what, unit) in BEHAVIOUR.items():
        shown = [r["behaviour"].get("numbers", {}).get(words) for r in results.values()]
        if any(shown):
            cells = ["not measured" if x is None else _marked(x) for x in shown]
            rows.append((f"<b>{_e(what)}</b><br><span class=soft>{_e(unit)}</span>", *cells))
    parts.append(
        _table(["", *names], rows, caption="Behaviour. In brackets 95 % intervals; ° marks what is within noise.")
    )
    titles = [line["title"] for line in verdict(first)][:-1]
    lines = {name: {line["title"]: line["text"] for line in verdict(r)} for name, r in results.items()}
    rows = [(f"<b>{_e(t)}</b>", *(f"<span>{_e(lines[n][t])}</span>" for n in names)) for t in titles]
    parts += ["<h2>Verdicts</h2>", _table(["", *names], rows)]
    if all(_measured(r, "signal") for r in results.values()):
        reading = "Height: how well preferences can be read by layer; grey is the base with its interval."
        alt = "AUROC by layer of " + ", ".join(names)
        parts += ["<h2>Where the preference signal sits</h2>", _figures(_figure(draw.compared(results), alt, reading))]
    rows = []
    for label, words in draw.LABELS.items():
        shown = [r["latents"]["labels"][label] if _measured(r, "latents") else None for r in results.values()]
        rows.append((words, *("not measured" if x is None else _ci(x, _pc) for x in shown)))
    parts += ["<h2>Features</h2>", _table(["share of latents", *names], rows)]
    rows = [
        (name, r["models"]["aligned"]["weights"], str(r["warnings"] and len(r["warnings"])))
        for name, r in results.items()
    ]
    parts += ["<h2>Sources</h2>", _table(["model", "weights", "warnings"], rows)]
    return _document("Audits side by side", parts)


def _marked(x: dict) -> str:
    return _ci(x, _pc if x["unit"].startswith("share") else _n) + ("" if beyond(x) else " °")


def compare(audits, folder: str | Path) -> Path:
    """Write comparison.html of several audits into a folder."""
    text = comparison(gather(find(audits)))
    return _place(folder, lambda place: (place / "comparison.html").write_text(text, encoding="utf-8"))[0]
