"""Where the preference signal sits in both models, and what kind of change it shows."""

import numpy as np

from alignlens import geometry, probes
from alignlens.audit.numbers import as_good, changed, drawn, of_row
from alignlens.audit.verdicts import changed_layers
from alignlens.core.style import FATES

FOLDS = 5
PARTS = dict.fromkeys(("kept", "rotated", "rotated_repaired", "attenuated", "created"), "AUROC above chance")
PARTS |= {"gap": "AUROC", "repair": "AUROC"}


def signal(audit) -> dict:
    """Where chosen and rejected answers can be told apart, in base and aligned; baselines that need no depth."""
    table, draws = audit.decomposed
    floors = {name: _floors(audit, read.chosen, read.rejected) for name, read in audit.streams.items()}
    rows = []
    for place, (_, row) in enumerate(table.iterrows()):
        own = {n: of_row(row, n, null=0.5, floor=floors[n][place], unit="AUROC") for n in floors}
        rows.append({"layer": row.layer} | own | {"difference": changed(row, "change", unit="AUROC")})
    best = {}
    for name in floors:
        equal = [audit.layers[place] for place in as_good(draws[name])]
        best[name] = {"layer": audit.layers[int(draws[name][:, 0].argmax())], "as_good": equal}
    sides, baselines = (audit.encoded.chosen_ids, audit.encoded.rejected_ids), {}
    lengths = [np.array([len(ids) for ids in side], float) for side in sides]
    words = audit.sampling | {"bootstrap": audit.request.bootstrap}
    for name, (chosen, rejected) in (("length", lengths), ("log_probability", audit.base_logprobs.T)):
        row = probes.fit_features(chosen, rejected, audit.encoded.prompt_id, **words)
        floor = _floors(audit, chosen[:, None, None], rejected[:, None, None])[0]
        baselines[name] = of_row(row, "auroc", null=0.5, floor=floor, unit="AUROC")
    return {"layers": rows, "best": best, "baselines": baselines}


def _floors(audit, chosen, rejected) -> list[float]:
    """By layer, how far from 0.5 probes of swapped labels reach."""
    words = audit.sampling | {"permutations": audit.request.permutations}
    null = probes.permuted_sign_null(chosen, rejected, audit.encoded.prompt_id, **words)
    return (null.auroc_high - 0.5).clip(lower=0).tolist()


def change(audit) -> dict:
    """What kind of change each layer shows: signal kept, rotated, attenuated or created; and whole streams."""
    streams = geometry.compare_layers(*audit.streams.values(), audit.encoded.prompt_id, seed=audit.request.seed)
    (table, draws), rows = audit.decomposed, []
    for (_, row), (_, whole) in zip(table.iterrows(), streams.iterrows(), strict=True):
        found = {"layer": row.layer, "verdict": row.verdict}
        found |= {name: changed(row, name, unit=unit) for name, unit in PARTS.items()}
        found["rotation"] = changed(whole, "rotation_degrees", unit="degrees")
        found["scale"] = changed(whole, "norm_ratio", null=1.0, unit="ratio")
        found["cka"] = changed(whole, "cka", null=1.0, unit="similarity")
        floor = 1 - whole.mean_cosine_floor
        rows.append(found | {"direction": of_row(whole, "mean_cosine", null=1.0, floor=floor, unit="cosine")})
    means = {name: drawn(draws[name].mean(0), floor=0.0, unit=PARTS[name]) for name in FATES}
    return {"layers": rows, "means": means, "shares": _shares(draws, rows)}


def _shares(draws: dict, rows: list[dict]) -> dict:
    """Of each kind of change: at which layers, and what share of their preference signal it is, layers added up within
    each draw of prompts."""
    out = {}
    for kind, layers in changed_layers({"change": {"layers": rows}}).items():
        places = [place for place, row in enumerate(rows) if row["layer"] in layers]
        whole = ("kept", "rotated", "created" if kind == "created" else "attenuated")
        part, *parts = (draws[name][places].sum(0) for name in (kind, *whole))
        share = drawn(part / np.maximum(sum(parts), 1e-12), floor=0.0, unit="share of the preference signal")
        out |= {kind: {"layers": layers, "share": share}} if layers else {}
    return out
