"""What an audit's numbers say, by fixed rules: findings, verdict, sentences of verdict and page, warnings."""

import tomllib
from pathlib import Path

import pandas as pd

from alignlens.audit.numbers import EQUIVALENCE, beyond, digits, listed, measured, percent, preserved, shown

WARNINGS = tomllib.loads(Path(__file__).with_name("warnings.toml").read_text(encoding="utf-8"))
FEW_PROMPTS = 200
TOO_LONG = ("overlong_prompt", "overlong_response", "too_long", "no_room_to_answer")  # why rows were dropped
UNUSABLE = ("special_token", "boundary")
FAR = ((0.003, "hardly at all"), (0.03, "a little"), (0.3, "clearly"), (float("inf"), "very far"))  # nats a token
NOTHING = {  # the verdict on two models with the same weights
    "How far it moved": "Not at all: the two models have the same weights, and nothing lies beyond noise.",
    "Where": "Nowhere: nothing lies beyond noise at any layer.",
    "What kind of change": "None: nothing lies beyond noise.",
}
KINDS = {"rotated": "points in another direction", "attenuated": "is gone", "created": "is new"}
BEHIND = ("final norm", "head", "embedding and head (tied)")  # what is behind the last block
LABELS = {"shared_same": "same in both", "shared_rotated": "rotated", "shared_attenuated": "weaker or stronger"}
LABELS |= {"base_only": "base only", "aligned_only": "aligned only"}
BEHAVIOUR = {
    "kl": "KL to the base", "kl_token": "KL to the base, a token", "accuracy": "implicit-reward accuracy",
    "margin": "implicit-reward margin", "chosen_shift": "shift of log p(chosen)",
    "rejected_shift": "shift of log p(rejected)", "length_shift": "change of answer length",
    "win_rate": "win rate against the base",
}  # fmt: skip


def _several(layers: list[int], rows: list) -> list[int]:
    """Layers that show something; none of many if it is one alone: tested one by one at 5 %, that is chance."""
    return layers if len(layers) > 1 or len(rows) < 3 else []


def moved_layers(result: dict) -> list[int]:
    """Layers at which the probes' AUROC changed."""
    rows = result["signal"]["layers"]
    return _several([row["layer"] for row in rows if beyond(row["difference"])], rows)


def changed_layers(result: dict) -> dict[str, list[int]]:
    """Layers with a change of the preference signal, by kind."""
    rows = result["change"].get("layers", [])
    return {kind: _several([r["layer"] for r in rows if kind in r["verdict"].split("+")], rows) for kind in KINDS}


def changed_labels(result: dict) -> list[str]:
    """Labels of latents whose share lies above that of the base with itself."""
    found = result["latents"].get("labels", {})
    return [name for name, x in found.items() if name != "shared_same" and x["low"] > x["floor"]]


def findings(result: dict) -> dict[str, list[str]]:
    """Names of all comparisons of base and aligned: "beyond" noise and "within" it."""
    numbers = result["behaviour"].get("numbers", {})
    found = {BEHAVIOUR[n]: beyond(numbers[n]) for n in BEHAVIOUR if n in numbers and n != "kl_token"}
    if measured(result, "signal"):
        found["probe AUROC"] = moved_layers(result)
    if measured(result, "change"):
        found["kind of the preference signal"] = any(changed_layers(result).values())
    if measured(result, "latents"):
        found |= {"latents' labels": changed_labels(result), "single latents": result["latents"]["top"]}
    if measured(result, "causal"):
        found["change of margin in the causal check"] = not result["causal"]["patching"]["reason"]
        found["effect of the preference direction"] = steering_changed(result)
    return {"beyond": [name for name in found if found[name]], "within": [name for name in found if not found[name]]}


def steering(result: dict, intervention: str) -> list[dict]:
    """The tests of each model's own direction on the margin: base, aligned."""
    wanted = {"intervention": intervention, "direction": "own", "measure": "margin"}
    return [next(t for t in tests if wanted.items() <= t.items()) for tests in result["causal"]["tests"].values()]


def steering_changed(result: dict) -> bool:
    """Whether the direction's effect on the margin differs between the models: intervals that do not meet."""
    pairs = ([test["effect"] for test in steering(result, name)] for name in ("steer", "ablate"))
    return any(one["low"] > other["high"] or other["low"] > one["high"] for one, other in pairs)


def _how_far(result: dict, holds: dict) -> str:
    if not measured(result, "behaviour"):
        return "Not known: the models' answers could not be measured."
    numbers, differ = result["behaviour"]["numbers"], result["models"].get("config_differs")
    text = "" if result["weights"]["share"]["value"] else "The weights are the same. "
    text += f"The configurations differ ({listed(differ)}). " if differ else ""
    if holds["nothing_moved"]:
        return f"{text or 'The weights differ. '}The answers do not: the KL to the base is nothing beyond noise."
    values, side = {name: x["value"] for name, x in numbers.items()}, favours(result)
    far = next(words for limit, words in FAR if values["kl_token"] < limit)
    text += f"It moved {far}: {shown(numbers['kl'])} nats of KL an answer, {digits(values['kl_token'])} a token. "
    share = percent(values["accuracy"] if side == "chosen" else 1 - values["accuracy"])
    towards = f"Against the base it now favours the {side} answer in {share} of the held-out pairs."
    text += towards if side else "It favours neither chosen nor rejected answers more than the base did, beyond noise."
    if holds["displacement"]:
        less = digits(-values["chosen_shift"])
        text += f" Even the chosen answers became less likely (by {less} nats): likelihood displacement."
    if holds["length_bias"] or holds["length_drift"]:
        ends = f"{digits(values['base_length'])} to {digits(values['aligned_length'])} tokens"
        text += f" Its answers became {'longer' if values['length_shift'] > 0 else 'shorter'}: {ends}."
    if "win_rate" in numbers and beyond(numbers["win_rate"]):
        text += f" Its sampled answers win {shown(numbers['win_rate'])} of comparisons with the base's."
    return text


def favours(result: dict) -> str | None:
    """Which answers the model favours against the base, "chosen" or "rejected"; None if neither beyond noise."""
    share, margin = (result["behaviour"]["numbers"][n] for n in ("accuracy", "margin"))
    return ("chosen" if margin["value"] > 0 else "rejected") if beyond(share) or beyond(margin) else None


def moved_parts(result: dict) -> list[str]:
    """Names of the blocks and parts whose weights changed; empty if all did."""
    rows = [*result["weights"]["layers"], *result["weights"]["parts"]]
    names = [row["part"] if "part" in row else f"block {row['layer']}" for row in rows if row["share"]["value"]]
    return names if len(names) < len(rows) else []


def halfway(result: dict) -> tuple[int | None, int | None]:
    """The first block after which half of the change of margin may be there, and the first where it is for certain."""
    rows = result["causal"].get("patching", {"layers": []})["layers"]
    return tuple(next((r["layer"] for r in rows if (r["share"][end] or 0) >= 0.5), None) for end in ("high", "low"))


def _where(result: dict, holds: dict) -> str:
    moved, last = moved_parts(result), result["models"]["base"]["layers"] - 1
    parts = [f"Only the weights of {listed(moved)} changed."] if 0 < len(moved) <= 3 else []
    parts += [_half(result, holds, last)] if measured(result, "causal") else []
    parts += [_best_read(result, holds, last)] if measured(result, "signal") else []
    return " ".join(parts) or "Not known: neither probes nor patching could be measured."


def _half(result: dict, holds: dict, last: int) -> str:
    found, (first, sure) = result["causal"]["patching"], halfway(result)
    if found["reason"]:
        return f"On the {result['causal']['pairs']} pairs of the causal check the change of margin cannot be located."
    if first is None:
        behind = [r["part"] for r in result["weights"]["parts"] if r["part"] in BEHIND and r["share"]["value"]]
        place = found["layers"][-1]["layer"]
        rest = f": the rest comes about behind it, in the {listed(behind)}" if behind and place == last else ""
        return f"Less than half of the change of margin is there after block {place} (of 0 to {last}){rest}."
    if holds["change_placed"]:
        return f"Half of the change of margin is there after block {first} (of 0 to {last})."
    ends = f"between blocks {first} and {sure}" if sure is not None else f"after block {first} or later"
    return f"Where half of the change of margin comes about cannot be placed: {ends} (of 0 to {last})."


def best_auroc(result: dict) -> dict:
    """The aligned model's AUROC where it is read best."""
    best = result["signal"]["best"]["aligned"]["layer"]
    return next(row["aligned"] for row in result["signal"]["layers"] if row["layer"] == best)


def _best_read(result: dict, holds: dict, last: int) -> str:
    equal, auroc = result["signal"]["best"]["aligned"]["as_good"], best_auroc(result)
    if holds["unreadable"]:
        return "No probe reads preferences beyond noise at any layer."
    if holds["probe_placed"]:
        return f"Preferences are read best after block {equal[0]} (of 0 to {last}; AUROC {shown(auroc)})."
    between = [row["layer"] for row in result["signal"]["layers"] if equal[0] <= row["layer"] <= equal[-1]]
    which = f"{equal[0]} to {equal[-1]}" if between == equal and len(equal) > 2 else listed(list(map(str, equal)))
    which = f"block ({which})" if len(equal) > last else f"of blocks {which} (of 0 to {last})"
    best = f"any {which} may be the best, with AUROC up to {shown(auroc)}"
    return f"Where preferences are read best cannot be placed: {best}."


def _what_kind(result: dict, holds: dict) -> str:
    parts = []
    if measured(result, "change"):
        parts += [kinds_say(result), "" if holds["attenuated"] or holds["created"] else auroc_says(result)]
    if measured(result, "latents"):
        found = labels_say(result)
        seen = f"{listed(found)}, more than in the base with itself" if found else "nothing beyond noise"
        parts += [f"Crosscoder latents: {seen}.", trust_says(result) * ("shared_rotated" in changed_labels(result))]
    return " ".join(filter(None, parts)) or "Not known: neither probes nor latents could be measured."


def _within_noise(result: dict, _: dict) -> str:
    found, power = findings(result), result["power"]
    if not found["within"]:
        return "None of the comparisons."
    words = listed(found["within"])
    if not found["beyond"]:
        return f"Everything: {words}."
    units = {"margin": "nats of margin", "kl": "nats of KL", "auroc": "AUROC"}
    seen = [f"{digits(power[name])} {unit}" for name, unit in units.items() if power.get(name)]
    text = f"{words[0].upper() + words[1:]}: no change detected."
    return text + (f" Smallest changes that would have been seen: {listed(seen)}." if seen else "")


def _not_measured(result: dict, _: dict) -> str:
    names = {"signal": "probes", "change": "kinds of change", "causal": "causal tests"}
    sections = ("behaviour", "signal", "change", "latents", "causal")
    parts = [f"{names.get(n, n)}: {result[n]['reason']}" for n in sections if not measured(result, n)]
    if measured(result, "behaviour") and "win_rate" not in result["behaviour"]["numbers"]:
        parts.append("whether the answers got better (there is no judge)")
    text = "; ".join(part.rstrip(".") for part in [*parts, "whether these prompts were trained on"])
    return f"{text[:1].upper()}{text[1:]}."


LINES = {  # of the verdict
    "How far it moved": _how_far, "Where": _where, "What kind of change": _what_kind, "Within noise": _within_noise,
    "Not measured": _not_measured,
}  # fmt: skip


def auroc_says(result: dict) -> str:
    """Of probe accuracy that shows no change: preserved, or not enough data to tell."""
    rows, start = result["signal"].get("layers"), "How well it can be read"
    if not rows:
        return ""
    if not any(beyond(row["base"]) for row in rows):
        return "The base has no readable preference signal that could have changed."
    if all(preserved(row["difference"]) for row in rows):
        return f"{start} is preserved: every layer's change of AUROC lies within ±{EQUIVALENCE}."
    least = digits(result["power"].get("auroc"))
    return f"{start}: no change detected; changes of AUROC smaller than {least} could not have been seen."


def kinds_say(result: dict) -> str:
    """What share of the preference signal changed, by kind, over the layers where it did; empty if nowhere."""
    shares, words = result["change"]["shares"], f"{{}} {{}} (at {{}} of {len(result['change']['layers'])} layers)"
    found = [words.format(shown(x["share"]), KINDS[kind], len(x["layers"])) for kind, x in shares.items()]
    return f"Of the preference signal, {listed(found)}." if found else ""


def trust_says(result: dict) -> str:
    """What "rotated" is worth at this audit's number of tokens, by features planted into its streams."""
    tokens, planted = result["latents"]["tokens"], result["latents"]["planted"]
    found, rest = shown(planted["recall"]), "nothing else is called so"
    if planted["labelled"]:
        rest = f"{shown(planted['false_discovery'])} of what is called rotated there is none of them"
    return f"At {tokens:,} training tokens, of planted rotated features {found} are found, and {rest}."


def labels_say(result: dict, words: str = "{value} {label}") -> list[str]:
    """Shares of latents with a changed label, and what a change of the same size in a random direction shows of it."""
    labels, shuffled, out = result["latents"]["labels"], result["latents"]["shuffled"], []
    for name in changed_labels(result):
        text = words.format(value=percent(labels[name]["value"]), interval=shown(labels[name]), label=LABELS[name])
        beside = f" (a shuffled change of the same size: {percent(shuffled[name]['value'])})" if shuffled else ""
        out.append(text + beside)
    return out


def warnings(result: dict, pairs: pd.DataFrame) -> list[dict]:
    """What a reader must know before trusting the numbers: code, text; the gravest first."""
    p, models, signal, dropped = result["pairs"], result["models"], result["signal"], result["pairs"]["dropped"]
    answers, repeated = pd.concat([pairs.chosen, pairs.rejected]), p["pairs"] - p["prompts"]
    last = answers.str.rstrip().str[-1:]
    best = max([row["aligned"]["value"] for row in signal.get("layers", [])], default=1.0)
    baselines = {f"{name} confound": x for name, x in signal.get("baselines", {}).items() if beyond(x)}
    shares = {  # code -> share, from which on it is told
        "far": (result["weights"]["share"]["value"], 0.5),
        "repeated answers": (float(answers.duplicated(keep=False).mean()), 0.1),
        "unfinished answers": (float((last.str.isalnum() | last.isin([",", ";"])).mean()), 0.3),
        "cut samples": (max(result["behaviour"].get("cut", {"": 0}).values()), 0.2),
    }
    found = {  # code -> what its sentence shows, if it holds
        "identical": models["identical"], "configuration": listed(models.get("config_differs") or [""]),
        "few prompts": p["prompts"] < FEW_PROMPTS and p["prompts"],
        "repeated prompts": repeated > 0.1 * p["pairs"] and repeated,
        "duplicates": dropped.get("duplicate"), "contradictory": dropped.get("contradictory"),
        "too long": sum(dropped.get(why, 0) for why in TOO_LONG),
        "unusable rows": sum(dropped[why] for why in dropped if why.startswith("bad_") or why in UNUSABLE),
        "training prompts": True,
    }  # fmt: skip
    found |= {code: percent(round(share, 2)) for code, (share, least) in shares.items() if share > least}
    found |= {code: x["value"] for code, x in baselines.items() if abs(x["value"] - 0.5) > best - 0.5 - 0.05}
    facts = {"pairs": p["pairs"], "limit": result["format"]["max_length"], "best": best}
    told = {code: text.format(found[code], **facts) for code, text in WARNINGS.items() if found.get(code)}
    return [{"code": code, "text": text} for code, text in told.items()]
