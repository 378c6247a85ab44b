"""What holds of a result, by name: what to do about it, and whether it ends a run as failed."""

import re
import tomllib
from pathlib import Path

from alignlens.audit import verdicts
from alignlens.audit.numbers import beyond, digits, measured, percent, preserved, shown
from alignlens.core.errors import AuditError
from alignlens.core.settings import refuse_unknown

ADVICE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FLAGS = tuple(name for lines in ADVICE.values() for name in lines if name != "always")
NUMBERS = (*verdicts.BEHAVIOUR, "base_length", "aligned_length", "weights")
SIGN = {"above": 1, "below": -1}


def verdict(result: dict) -> list[dict]:
    """Five lines, each a title, a text, and advice, a list of sentences on what to do."""
    holds, out = {"always": True} | conditions(result), []
    facts = {"weights": percent(result["weights"]["share"]["value"]), "half": verdicts.halfway(result)[0]}
    if measured(result, "signal"):
        facts["best"] = result["signal"]["best"]["aligned"]["layer"]
        facts["length"] = digits(result["signal"]["baselines"]["length"]["value"])
    same = verdicts.NOTHING if result["models"]["identical"] and holds.get("nothing_moved", True) else {}
    told = {"always", "nothing_moved"} if same else holds.keys()  # of one model, nothing is to be built or refitted
    for title, says in verdicts.LINES.items():
        advice = [words.format(**facts) for name, words in ADVICE[title].items() if name in told and holds.get(name)]
        out.append({"title": title, "text": same.get(title) or says(result, holds), "advice": advice})
    return out


def conditions(result: dict) -> dict[str, bool]:
    """What holds, by the names of FLAGS; without those of sections that were not measured."""
    moved, signal, parts = False, result["signal"], verdicts.moved_parts(result)
    kinds = {kind: bool(layers) for kind, layers in verdicts.changed_layers(result).items()}
    found = {
        "configuration_differs": bool(result["models"].get("config_differs")),
        "outside_blocks": bool(parts) and not any(part.startswith("block") for part in parts),
        "few_tokens": "token" in result["latents"].get("reason", "").lower(),
    } | (kinds if measured(result, "change") else {})
    if measured(result, "behaviour"):
        numbers, side = result["behaviour"]["numbers"], verdicts.favours(result)
        moved, length, shift = beyond(numbers["kl"]), beyond(numbers["length_shift"]), numbers["chosen_shift"]
        displaced = side == "chosen" and shift["value"] < 0 and beyond(shift)  # favoured, and less likely all the same
        biased = measured(result, "signal") and beyond(signal["baselines"]["length"])
        held = {
            "displacement": displaced, "learned": side == "chosen" and not displaced, "favours_neither": side is None,
            "favours_rejected": side == "rejected", "length_bias": length and biased,
            "length_drift": length and not biased, "very_far": numbers["kl_token"]["value"] >= verdicts.FAR[-2][0],
        }  # fmt: skip
        found |= {"nothing_moved": not moved} | {name: moved and holds for name, holds in held.items()}
        if wins := numbers.get("win_rate"):
            found["judged_worse"] = beyond(wins) and wins["value"] < 0.5
    if measured(result, "causal"):
        (first, sure), unclear = verdicts.halfway(result), result["causal"]["patching"]["reason"]
        found["change_placed"] = placed = first is not None and first == sure
        found["change_unplaced"] = moved and not placed and bool(unclear or first is not None)
    if measured(result, "signal"):
        rows, one = signal["layers"], len(signal["best"]["aligned"]["as_good"]) == 1
        read, same = beyond(verdicts.best_auroc(result)), all(preserved(row["difference"]) for row in rows)
        quiet = measured(result, "change") and not any(kinds.values()) and any(beyond(row["base"]) for row in rows)
        found |= {"probe_placed": read and one, "probe_unplaced": read and not one, "unreadable": not read}
        found |= {"preserved": quiet and same, "undecided": quiet and not same}
    if measured(result, "latents"):
        found["latents_changed"] = bool(verdicts.changed_labels(result) or result["latents"]["top"])
    return found


def parse(fail_if: dict | str) -> dict[str, float | bool]:
    """Conditions as checked, {"kl above": 2.0, "displacement": True}, from a mapping or from text with commas: names of
    NUMBERS with a limit, names of FLAGS. AuditError for anything else."""
    text = ",".join(f"{k} {v}" for k, v in fail_if.items()) if isinstance(fail_if, dict) else str(fail_if)
    out = {}
    for words in filter(None, map(str.split, re.split("[,{}]", re.sub("[:\"']", " ", text)))):
        name, part = words[0], " ".join(words)
        refuse_unknown([name], FLAGS + NUMBERS, lambda problem: AuditError(f"fail_if: {problem}"))
        limit = re.fullmatch(r"(\w+ (?:above|below)) (-?\d*\.?\d+(?:e[-+]?\d+)?)", part)
        if name in NUMBERS and limit:
            out[limit[1]] = float(limit[2])
        elif name in FLAGS and part.lower() in (name, f"{name} true"):
            out[name] = True
        else:
            form = f"{name} above (or below) NUMBER" if name in NUMBERS else f"{name}, or {name}: true"
            raise AuditError(f"fail_if: {part!r} is no condition; give {form}")
    return out


def check(result: dict, fail_if: dict | None) -> None:
    """AuditError if any condition holds, naming all that do. One that cannot be told counts as one that does."""
    numbers = result["behaviour"].get("numbers", {}) | {"weights": result["weights"]["share"]}
    holds, failed = conditions(result), []
    for condition, limit in parse(fail_if or {}).items():
        name, *side = condition.split()
        found = numbers.get(name) if side else holds.get(name)
        if found is None:
            failed.append(f"{condition} cannot be told, it was not measured")
        elif side and SIGN[side[0]] * (found["value"] - limit) > 0:
            failed.append(f"{name} is {shown(found)}, {side[0]} {limit:g}")
        elif found and not side:
            failed.append(f"{name} holds")
    if failed:
        raise AuditError(f"fail_if: {'; '.join(failed)}")
