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
    (table, draws), rows, best, baselines = audit.decomposed, [], {}, {}
    floors = {name: _floors(audit, read.chosen, read.rejected) for name, read in audit.streams.items()}
    for place, (_, row) in enumerate(table.iterrows()):
        own = {name: of_row(row, name, null=0.5, floor=floor[place], unit="AUROC") for name, floor in floors.items()}
        rows.append({"layer": row.layer} | own | {"difference": changed(row, "change", unit="AUROC")})
    for name in floors:
        first, equal = draws[name][:, 0].argmax(), as_good(draws[name])
        best[name] = {"layer": audit.layers[first], "as_good": [audit.layers[place] for place in equal]}
    lengths = [np.array(list(map(len, ids)), float) for ids in (audit.encoded.chosen_ids, audit.encoded.rejected_ids)]
    words = audit.sampling | {"bootstrap": audit.request.bootstrap}
    for name, sides in (("length", lengths), ("log_probability", audit.base_logprobs.T)):
        row = probes.fit_features(*sides, audit.encoded.prompt_id, **words)
        floor = _floors(audit, *(side[:, None, None] for side in sides))[0]
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
        direction = {"null": 1.0, "floor": 1 - whole.mean_cosine_floor, "unit": "cosine"}
        rows.append({
            "layer": row.layer, "verdict": row.verdict,
            **{name: changed(row, name, unit=unit) for name, unit in PARTS.items()},
            "rotation": changed(whole, "rotation_degrees", unit="degrees"),
            "scale": changed(whole, "norm_ratio", null=1.0, unit="ratio"),
            "cka": changed(whole, "cka", null=1.0, unit="similarity"),
            "direction": of_row(whole, "mean_cosine", **direction),
        })  # fmt: skip
    means = {name: drawn(draws[name].mean(0), floor=0.0, unit=PARTS[name]) for name in FATES}
    return {"layers": rows, "means": means, "shares": _shares(draws, rows)}


def _shares(draws: dict, rows: list[dict]) -> dict:
    """Of each kind of change: at which layers, and what share of their signal it is, summed within each draw."""
    out = {}
    for kind, layers in changed_layers({"change": {"layers": rows}}).items():
        places = [place for place, row in enumerate(rows) if row["layer"] in layers]
        whole = ("kept", "rotated", "created" if kind == "created" else "attenuated")
        part, *parts = (draws[name][places].sum(0) for name in (kind, *whole))
        share = drawn(part / np.maximum(sum(parts), 1e-12), floor=0.0, unit="share of the preference signal")
        out |= {kind: {"layers": layers, "share": share}} if layers else {}
    return out
