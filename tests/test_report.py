"""The page says what the numbers say, in words that never promise more, in one file that needs nothing else."""

import base64
import copy
import functools
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from alignlens import audit
from alignlens.audit import conditions, verdicts
from alignlens.audit.numbers import beyond, number
from alignlens.audit.page import comparison, render
from alignlens.core.errors import AlignlensError

ROOT = Path(__file__).parents[1]
SCHEMA = Path(audit.__file__).with_name("audit.schema.json")
LAYERS = 4
PARTS = ("embedding", "head", "final norm")


def made(**changes) -> dict:
    """A result in which much happened; changes replace whole sections."""
    auroc = lambda v, floor=0.05: number(v, v - 0.03, v + 0.03, null=0.5, floor=floor, unit="AUROC")  # noqa: E731
    change = lambda v, half=0.01: number(v, v - half, v + half, floor=half, unit="AUROC")  # noqa: E731
    nats = lambda v, half=0.1: number(v, v - half, v + half, floor=0.05, unit="nats")  # noqa: E731
    answer = lambda *tokens: {"tokens": [list(t) for t in tokens], "change": -1.5, "left_out": 7}  # noqa: E731
    flip = {"prompt": "Why <is> it?", "chosen": answer(["It", 0.4], [" <i>is</i>", -2.0]), "base": 1.5,
            "rejected": answer(["No", 0.0]), "aligned": -2.5}  # fmt: skip
    behaviour = {
        "status": "measured",
        "numbers": {
            "kl": nats(3.0), "kl_token": nats(0.1, 0.01), "margin": nats(2.0), "chosen_shift": nats(-1.0),
            "rejected_shift": nats(-3.0), "length_shift": nats(5.0, 1.0), "base_length": nats(10),
            "aligned_length": nats(15),
            "accuracy": number(0.75, 0.7, 0.8, null=0.5, floor=0.04, unit="share of pairs"),
        },
        "answers": 100,
        "cut": {"base": 0.0, "aligned": 0.0},
        "shifts": {side: {"low": -4.0, "high": 2.0, "counts": [1, 2, 3]} for side in ("chosen", "rejected")},
        "margin_quantiles": [-1, 0, 2, 3, 5],
        "flipped": {"lost": {"pairs": 12, "of": 300, "shown": [flip]}, "won": {"pairs": 0, "of": 200, "shown": []}},
    }  # fmt: skip
    signal = {
        "status": "measured",
        "layers": [
            {"layer": i, "base": auroc(0.7), "aligned": auroc(0.7), "difference": change(0.0)} for i in range(LAYERS)
        ],
        "best": {"base": {"layer": 1, "as_good": [1]}, "aligned": {"layer": 2, "as_good": [1, 2, 3]}},
        "baselines": {"length": auroc(0.52), "log_probability": auroc(0.55)},
    }
    parts = {"kept": 0.15, "rotated": 0.05, "rotated_repaired": 0.0, "attenuated": 0.0, "created": 0.0, "gap": 0.05,
             "repair": 0.0, "rotation": 9.0, "scale": 1.0, "cka": 0.9, "direction": 0.8}  # fmt: skip
    rows = [{"layer": i, "verdict": "rotated"} | {n: change(v) for n, v in parts.items()} for i in range(LAYERS)]
    share = number(0.25, 0.2, 0.3, floor=0.0, unit="share of the preference signal")
    change_ = {
        "status": "measured", "layers": rows,
        "means": {n: change(parts[n]) for n in ("kept", "rotated", "attenuated", "created")},
        "shares": {"rotated": {"layers": list(range(LAYERS)), "share": share}},
    }  # fmt: skip
    labels = {name: number(0.0, 0.0, 0.01, floor=0.0, unit="share of live latents") for name in
              ("base_only", "aligned_only", "shared_attenuated")}  # fmt: skip
    labels |= {
        "shared_same": number(0.7, 0.65, 0.75, floor=1.0, unit="share of live latents"),
        "shared_rotated": number(0.3, 0.25, 0.35, floor=0.0, unit="share of live latents"),
    }
    latent = {
        "latent": 3, "label": "shared_rotated", "change": number(0.1, 0.09, 0.11, floor=0.01), "degrees": 40.0,
        "ratio": 1.1, "density": 0.02, "effect": change(0.1), "examples": [["before ", "<b>token</b>", " after"]],
    }  # fmt: skip
    latents = {
        "status": "measured", "layer": 2, "width": 64, "k": 8, "tokens": 5000, "held_out": 5000, "masked": 0,
        "r2": {"base": 0.9, "aligned": 0.9}, "live": 60, "labels": labels, "shuffled": labels, "change_floor": 0.01,
        "planted": {"planted": 30, "recall": number(0.5, 0.33, 0.67, unit="share of planted features"), "labelled": 20,
                    "false_discovery": number(0.25, 0.11, 0.47, unit="share of latents called rotated")},
        "top": [latent],
    }  # fmt: skip

    def test(intervention, value, beats):
        effect = number(value, value - 0.2, value + 0.2, null=0.0, floor=0.3, unit="nats")
        return {"intervention": intervention, "direction": "own", "measure": "margin", "effect": effect, "p": 0.04,
                "beats": beats}  # fmt: skip

    causal = {
        "status": "measured", "layer": 2, "strength": 0.5, "pairs": 64, "random": 20,
        "tests": {"base": [test("steer", 0.1, False), test("ablate", 0.0, False)],
                  "aligned": [test("steer", 2.0, True), test("ablate", 0.0, False)]},
        "patching": {"layers": [{"layer": i, "share": change((i + 1) / LAYERS)} for i in range(LAYERS)], "reason": ""},
    }  # fmt: skip
    side = {"name": "org/base", "revision": None, "weights": "a" * 16, "architecture": "LlamaForCausalLM",
            "layers": LAYERS,
            "d_model": 32, "parameters": 1000, "vocabulary": 99, "dtype": "float32"}  # fmt: skip
    weights = {
        "status": "measured",
        "share": number(0.1, 0.1, 0.1, floor=0.0),
        "layers": [{"layer": i, "share": number(0.1, 0.1, 0.1, floor=0.0)} for i in range(LAYERS)],
        "parts": [{"part": p, "share": number(0.2, 0.2, 0.2, floor=0.0)} for p in PARTS],
    }
    return {
        "schema": audit.SCHEMA,
        "date": None,
        "models": {"base": side, "aligned": side | {"name": "org/<dpo>", "weights": "b" * 16}, "identical": False},
        "pairs": {"source": "pairs.jsonl", "hash": "c" * 16, "pairs": 500, "prompts": 500, "median_tokens": 50,
                  "longest_tokens": 99, "dropped": {"duplicate": 2}},
        "format": {"template": "chat", "max_length": 512, "notes": [], "fingerprint": "d" * 16, "example": "<|user|>"},
        "weights": weights, "behaviour": behaviour, "signal": signal, "change": change_,
        "latents": latents, "causal": causal,
        "power": {"margin": 0.3, "kl": 0.4, "accuracy": 0.05, "length_shift": 1.0, "auroc": 0.03},
        "warnings": [{"code": "few prompts", "text": "Few & <far> between."}],
        "methods": {"versions": {"torch": "2"}, "commit": None, "layers": list(range(LAYERS)), "folds": 5,
                    "equivalence": 0.02, "settings": {"seed": 0}},
    } | changes  # fmt: skip


def said(result: dict) -> dict[str, str]:
    return {line["title"]: line["text"].replace("\u00a0", " ") for line in audit.verdict(result)}


class Links(HTMLParser):
    """All that a page would fetch, its tags, and images without a description."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.tags, self.mute, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.fetched += [attributes[n] for n in ("src", "href", "srcset", "data", "action") if n in attributes]
        if tag == "img" and not attributes.get("alt"):
            self.mute.append(attributes)

    def handle_data(self, data):
        self.words.append(data)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_without_scripts_and_without_requests():
    text = render(made())
    page = Links(text)
    assert page.fetched and all(link.startswith("data:image/svg+xml;base64,") for link in page.fetched)
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)
    for link in page.fetched:
        svg = base64.b64decode(link.split(",")[1]).decode()
        assert not re.search(r'(?:href|src)="(?!#)', svg)


def test_every_figure_has_a_description_and_a_reading():
    text = render(made())
    page = Links(text)
    assert page.tags.count("img") == 7 and not page.mute
    assert text.count("<figcaption>") == 7


def test_the_page_is_readable_on_a_phone_and_without_code():
    text = render(made())
    assert 'name="viewport"' in text
    assert text.count("<table>") == text.count('<div class="box"><table>') and ".box { overflow-x: auto" in text
    assert "import " not in text and "Traceback" not in text


def test_texts_of_models_and_answers_cannot_become_markup():
    text = render(made())
    assert "org/<dpo>" not in text and "org/&lt;dpo&gt;" in text
    assert "<mark>&lt;b&gt;token&lt;/b&gt;</mark>" in text
    assert "Few &amp; &lt;far&gt; between." in text
    result = made()
    result["models"]["base"] |= {"name": "<script>alert()</script>", "revision": "<b>"}
    result["change"]["layers"][0]["verdict"] = "<i>rotated</i>"
    pages = [render(result), comparison({"<u>one</u>": result, "two": made()})]
    assert not {"script", "i", "u"} & {tag for page in pages for tag in Links(page).tags}
    assert '<td class="n">&lt;b&gt;</td>' in pages[0] and "&lt;u&gt;one&lt;/u&gt;" in pages[1]
    opened = [
        t for t in Links(text).tags if t not in ("meta", "img", "br", "html", "head", "body", "title", "style", "main")
    ]
    assert all(text.count(f"<{t}>") + text.count(f"<{t} ") == text.count(f"</{t}>") for t in opened)


def test_the_same_numbers_give_the_same_bytes():
    assert render(made()) == render(copy.deepcopy(made()))


def test_every_section_can_be_missing():
    refused = {"status": "not measured", "reason": "Too few tokens."}
    for name in ("behaviour", "signal", "change", "latents", "causal"):
        result = made(**{name: refused})
        assert "Not measured. Too few tokens." in render(result)
        assert "Too few tokens" in said(result)["Not measured"]
    everything = dict.fromkeys(("behaviour", "signal", "change", "latents", "causal"), refused)
    assert len(said(made(**everything))) == 5
    assert render(made(**everything))


# --- the words --------------------------------------------------------------------------------------------------------


def test_five_lines_say_what_happened():
    found = said(made())
    assert list(found) == ["How far it moved", "Where", "What kind of change", "Within noise", "Not measured"]
    assert "clearly: 3 (2.9 to 3.1) nats" in found["How far it moved"]
    assert "favours the chosen answer in 75 %" in found["How far it moved"]
    assert "likelihood displacement" in found["How far it moved"]
    assert "25 % (20 % to 30 %) points in another direction (at 4 of 4 layers)" in found["What kind of change"]
    assert "30 % rotated" in found["What kind of change"]
    assert "no judge" in found["Not measured"]


def test_a_model_that_moved_the_wrong_way_is_said_to():
    result = made()
    result["behaviour"]["numbers"] |= {
        "margin": number(-2, -2.1, -1.9, floor=0.05),
        "accuracy": number(0.2, 0.15, 0.25, null=0.5, floor=0.04),
    }
    assert "favours the rejected answer in 80 %" in said(result)["How far it moved"]


def test_a_win_rate_beyond_noise_is_said():
    result = made()
    result["behaviour"]["numbers"]["win_rate"] = number(0.4, 0.35, 0.45, null=0.5, floor=0.06, unit="share of prompts")
    assert "win 40 % (35 % to 45 %) of comparisons" in said(result)["How far it moved"]
    assert "no judge" not in said(result)["Not measured"]


def widened(half) -> dict:
    """Nothing kind of happened to the probes; the change of AUROC is known to ± half."""
    result = made()
    for row in result["change"]["layers"]:
        row["verdict"] = "kept"
    result["change"]["shares"] = {}
    for row in result["signal"]["layers"]:
        row["difference"] = number(0.0, -half, half, floor=half)
    return result


def test_silence_is_called_preserved_only_within_the_margin():
    assert "preserved" in said(widened(0.019))["What kind of change"]
    text = render(widened(0.021)) + " ".join(said(widened(0.021)).values())
    assert "changes of AUROC smaller than 0.03 could not have been seen" in text
    assert "preserved" not in text.lower()


def test_noise_is_not_called_preserved():
    result = widened(0.001)
    for row in result["signal"]["layers"]:
        row["base"] = row["aligned"] = number(0.51, 0.45, 0.57, null=0.5, floor=0.05)
    assert "preserved" not in render(result).lower()
    assert "no readable preference signal" in said(result)["What kind of change"]


def test_one_layer_of_many_is_chance():
    result = widened(0.01)
    result["change"]["layers"][2]["verdict"] = "created"
    assert verdicts.changed_layers(result)["created"] == []
    result["change"]["layers"][3]["verdict"] = "rotated+created"
    assert verdicts.changed_layers(result)["created"] == [2, 3]


def test_labels_count_only_beyond_the_base_with_itself():
    result = made()
    result["latents"]["labels"]["shared_rotated"] = number(0.3, 0.25, 0.35, floor=0.26)
    assert verdicts.changed_labels(result) == []


def test_beyond_needs_interval_and_floor():
    assert beyond(number(1, 0.5, 1.5, floor=0.9))
    assert not beyond(number(1, 0.5, 1.5, floor=1.1))
    assert not beyond(number(1, -0.1, 2.1, floor=0.1))
    assert not beyond(number(1))


# --- what to do -------------------------------------------------------------------------------------------------------


def set_number(name, value, half=0.1, **words):
    def change(result):
        result["behaviour"]["numbers"][name] = number(value, value - half, value + half, floor=half / 2, **words)

    return change


def place(half=1, *, low=0.0, best=(2,), reason=""):
    """Half of the change of margin is reached at a block, with intervals of ± low; which blocks may read best."""

    def change(result):
        shares = enumerate([0.1] * half + [0.9] * (LAYERS - half))
        rows = [{"layer": i, "share": number(v, v - low, v + low, floor=0.0)} for i, v in shares]
        result["causal"]["patching"] = {"layers": [] if reason else rows, "reason": reason}
        result["signal"]["best"]["aligned"] = {"layer": best[0], "as_good": sorted(best)}

    return change


def only(*names):
    """Only the weights of some parts moved, and after no block is there any of the change of margin."""

    def change(result):
        for row in result["weights"]["layers"] + result["weights"]["parts"]:
            if row.get("part") not in names:
                row["share"] = number(0.0, 0.0, 0.0, floor=0.0)
        for row in result["causal"]["patching"]["layers"]:
            row["share"] = number(0.0, 0.0, 0.0, floor=0.0)

    return change


def same_weights(result):
    """Another configuration of the same weights."""
    only()(result)
    result["weights"]["share"] = number(0.0, 0.0, 0.0, floor=0.0)
    result["models"] |= {"config_differs": ["rms_norm_eps", "rope_theta"]}


def as_made(result):
    pass


FAR, WHERE, KIND = "How far it moved", "Where", "What kind of change"
SAID = {  # title, what changes, what the line says, what to do
    "displacement": (FAR, set_number("chosen_shift", -1.0), "likelihood displacement", "NLL term"),
    "no displacement": (FAR, set_number("chosen_shift", 1.0), "chosen answer in 75 %", "compare it with other runs"),
    "shrank": (FAR, set_number("length_shift", -5.0), "became shorter: 10 to 15 tokens", "length-normalise the loss"),
    "grew": (FAR, set_number("length_shift", 5.0), "became longer", "length alone tells chosen from rejected"),
    "very far": (FAR, set_number("kl_token", 0.5), "very far", "raise beta or the KL penalty"),
    "rejected": (FAR, set_number("margin", -2.0), "favours the rejected", "not swapped in training"),
    "nothing moved": (FAR, set_number("kl", 0.0), "nothing beyond noise", "adapter or checkpoint was applied"),
    "half placed": (WHERE, place(2), "is there after block 2 (of 0 to 3)", "start at block 2"),
    "half not placed": (WHERE, place(2, low=0.4), "cannot be placed: between blocks 0 and 2 (of", "causal_pairs"),
    "half later": (WHERE, place(2, low=0.45), "cannot be placed: after block 0 or later (of 0 to 3)", "causal_pairs"),
    "half nowhere": (WHERE, place(reason="no difference"), "cannot be located", "causal_pairs"),
    "best": (WHERE, place(best=(2,)), "best after block 2 (of 0 to 3; AUROC 0.7", "monitor of preferences at block 2"),
    "best of two": (WHERE, place(best=(2, 1)), "cannot be placed: any of blocks 1 and 2 (of", "any of these blocks"),
    "best of all": (WHERE, place(best=(0, 1, 2, 3)), "any block (0 to 3) may be the best", "any of these blocks"),
    "head alone": (WHERE, only("head"), "Only the weights of head changed. Less than half of the change of margin is "
                   "there after block 3 (of 0 to 3): the rest comes about behind it, in the head.", "target_modules"),
    "embedding alone": (WHERE, only("embedding"), "Only the weights of embedding changed.", "target_modules"),
    "rotated": (KIND, as_made, "25 % (20 % to 30 %) points in another direction", "Refit probes and steering vectors"),
    "latents": (KIND, as_made, "5,000 training tokens, of planted rotated features 50 % (33 % to 67 %) are found, and "
                "25 % (11 % to 47 %) of what is called rotated there is none of them", "examples of the latents"),
    "configuration": (FAR, same_weights, "The weights are the same. The configurations differ (rms_norm_eps and "
                      "rope_theta). It moved clearly", "the configuration that is served"),
    "prompts": ("Within noise", as_made, "no change detected", "four times as many held-out prompts"),
    "training": ("Not measured", as_made, "trained on", "training set"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_each_line_says_what_it_means_for_what_to_do(case):
    title, change, text, advice = SAID[case]
    result = made()
    result["signal"]["baselines"]["length"] = number(0.7, 0.65, 0.75, null=0.5, floor=0.05)
    change(result)
    line = next(line for line in audit.verdict(result) if line["title"] == title)
    assert text in line["text"].replace("\u00a0", " ")
    assert advice in " ".join(line["advice"]) and "{" not in " ".join(line["advice"])


def test_advice_stands_beside_its_line_and_is_given_only_where_its_condition_holds():
    result = made()
    for change in (set_number("chosen_shift", 1.0), set_number("length_shift", 0.0), set_number("kl_token", 0.01)):
        change(result)
    advice = [advice for line in audit.verdict(result) for advice in line["advice"]]
    for absent in ("NLL", "length", "KL penalty", "swapped", "target_modules", "adapter or checkpoint", "The judge"):
        assert absent not in " ".join(advice)
    page = html.unescape(render(result))
    assert advice and all(sentence in page for sentence in advice)
    assert page.count("What to do.") == 5


def test_nothing_is_not_said_of_equal_weights_that_answer_otherwise():
    result = made()
    same_weights(result)
    result["models"]["identical"] = True
    assert "Not at all" not in " ".join(said(result).values())
    set_number("kl", 0.0)(result)
    assert said(result)[FAR].startswith("Not at all")


def test_every_condition_has_its_sentence_and_every_sentence_its_condition():
    result = made()
    set_number("win_rate", 0.4, null=0.5)(result)
    assert set(conditions.conditions(result)) == set(conditions.FLAGS)


# --- conditions of failure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"kl above": 2, "displacement": True}, {"kl above": 2.0, "displacement": True}),
        ("kl above 2, displacement", {"kl above": 2.0, "displacement": True}),
        ('{"length_shift below": -20.5}', {"length_shift below": -20.5}),
        ({"weights above": 1e-07}, {"weights above": 1e-07}),
        ({}, {}),
    ],
)
def test_conditions_of_failure_are_read(given, read):
    assert audit.request(fail_if=given).fail_if == read


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kl_tokn above": 0.3}, "'kl_tokn' is unknown; did you mean 'kl_token'"),
        ("displacment", "did you mean 'displacement'"),
        ({"kl": 2}, "'kl 2' is no condition; give kl above .or below. NUMBER"),
        ({"kl above": "many"}, "'kl above many' is no condition"),
        ({"kl above": float("nan")}, "no condition"),
        ({"displacement": False}, "give displacement, or displacement: true"),
        ({"displacement above": 1}, "give displacement, or displacement: true"),
        ("kl above 1 displacement", "no condition"),
        (3, "'3' is unknown"),
    ],
)
def test_conditions_that_cannot_be_told_are_refused_before_anything_is_measured(given, words):
    with pytest.raises(AlignlensError, match=words):
        audit.request(fail_if=given)


def test_a_run_fails_by_what_was_measured():
    result = made()
    audit.check(result, None)
    audit.check(result, {"kl above": 3.1, "kl below": 2.9, "favours_rejected": True, "weights above": 0.2})
    with pytest.raises(AlignlensError, match=r"^fail_if: kl is 3 \(2.9 to 3.1\), above 2; displacement holds$"):
        audit.check(result, {"kl above": 2, "accuracy below": 0.55, "displacement": True, "very_far": True})
    with pytest.raises(AlignlensError, match="win_rate below cannot be told, it was not measured"):
        audit.check(result, {"win_rate below": 0.5})
    missing = made(behaviour={"status": "not measured", "reason": "No room."})
    with pytest.raises(AlignlensError, match="kl above cannot be told.*; displacement cannot be told"):
        audit.check(missing, {"kl above": 2, "displacement": True})


def test_the_notebook_ends_with_the_conditions_after_the_report_is_written():
    """So the command's exit status tells of them."""
    cells = [
        c for c in json.loads((ROOT / "notebooks" / "audit.ipynb").read_text())["cells"] if c["cell_type"] == "code"
    ]
    assert any("audit.write(" in "".join(cell["source"]) for cell in cells[:-1])
    names = {"audit": audit, "result": made(), "request": audit.request(fail_if="displacement")}
    with pytest.raises(AlignlensError, match="fail_if: displacement holds"):
        exec("".join(cells[-1]["source"]), names)


# --- flipped pairs ----------------------------------------------------------------------------------------------------


def test_flipped_pairs_are_shown_with_shaded_tokens():
    text = render(made())
    assert "12 of 300 preferences flipped against the chosen answer" in " ".join(text.split())
    assert "Why &lt;is&gt; it?" in text and "&lt;i&gt;is&lt;/i&gt;</span>" in text and "… 7 more tokens" in text
    shades = re.findall(r'background:(#[0-9a-f]{8})">(It| &lt;i&gt;|No)', text)
    assert [shade[:7] for shade, _ in shades] == ["#0072b2", "#d55e00", "#d55e00"]
    opacity = [int(shade[7:], 16) for shade, _ in shades]
    assert opacity[1] > opacity[0] > opacity[2] == 0


# --- the form of audit.json -------------------------------------------------------------------------------------------


def keys(value, path=()):
    """Path and name of every key of every object in a JSON value."""
    if isinstance(value, dict):
        yield from ((path, key) for key in value)
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from keys(below, (*path, key))


def test_the_schema_misses_no_key_that_is_removed_or_renamed(tmp_path):
    """But in what is open by nature: versions, settings, counts of dropped rows."""
    result = audit.read(audit.write(made(), tmp_path)[1])
    valid = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).is_valid
    tried = [(path, key) for path, key in keys(result) if not {"versions", "settings", "dropped"} & set(path)]
    assert len(tried) > 500
    for path, key in tried[::7] + [(path, key) for path, key in tried if len(path) < 3]:
        owner = functools.reduce(lambda found, step: found[step], path, result)
        saved = owner.pop(key)
        optional = path in (("power",), ("change", "shares"))
        assert valid(result) == optional, (path, key)
        owner[f"{key}s"] = saved
        assert not valid(result), (path, key)
        del owner[f"{key}s"]
        owner[key] = saved
    assert valid(result)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    files = audit.write(made(), tmp_path / "new" / "audit")
    assert [f.name for f in files] == ["audit.html", "audit.json"]
    found = audit.read(tmp_path / "new" / "audit")
    assert [line["title"] for line in found["verdict"]] == list(said(made()))
    assert {k: found[k] for k in made()} == json.loads(json.dumps(made()))


def test_a_failure_leaves_the_old_audit_and_nothing_half_written(tmp_path, monkeypatch):
    audit.write(made(date="before"), tmp_path / "audit")
    (tmp_path / "audit" / "notes.txt").write_text("mine")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(AlignlensError, match="nothing can be written to 'audit': disk full"):
        audit.write(made(date="after"), tmp_path / "audit")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit"]
    assert sorted(p.name for p in (tmp_path / "audit").iterdir()) == ["audit.html", "audit.json", "notes.txt"]
    assert audit.read(tmp_path / "audit")["date"] == "before"
    audit.write(made(date="after"), tmp_path / "audit")
    assert audit.read(tmp_path / "audit")["date"] == "after"
    assert (tmp_path / "audit" / "notes.txt").read_text() == "mine"


# --- side by side -----------------------------------------------------------------------------------------------------


def renamed(name: str, **changes) -> dict:
    result = made(**changes)
    result["models"] = result["models"] | {"aligned": result["models"]["aligned"] | {"name": name}}
    return result


@pytest.fixture
def audits(tmp_path) -> Path:
    for name in ("dpo", "kto", "orpo"):
        audit.write(renamed(name), tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_lists_commas_and_patterns_name_the_same_audits(audits):
    names = [audits / n for n in ("dpo", "kto", "orpo")]
    assert audit.find(f"{audits}/*") == audit.find([str(n) for n in names]) == audit.find(", ".join(map(str, names)))
    assert list(audit.gather(names)) == ["dpo", "kto", "orpo"]
    assert list(audit.gather([names[0], names[0] / "audit.json"])) == ["dpo", "dpo′"]


def test_a_comparison_shows_every_model_and_fetches_nothing(audits, tmp_path):
    page = Links(audit.compare(f"{audits}/*", tmp_path / "out").read_text(encoding="utf-8"))
    assert {"dpo", "kto", "orpo"} <= set(page.words)
    assert page.fetched and all(link.startswith("data:") for link in page.fetched) and not page.mute


def broken(path: Path, change) -> Path:
    result = json.loads((path / "audit.json").read_text())
    change(result)
    (path / "audit.json").write_text(json.dumps(result))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(schema="alignlens.audit/1"), "schema 'alignlens.audit/1', this version reads"),
        (lambda r: r["pairs"].update(hash="0"), "differ in their pairs"),
        (lambda r: r["models"]["base"].update(weights="0"), "differ in their base"),
        (lambda r: r["format"].update(fingerprint="0"), "differ in their format"),
        (lambda r: r["methods"].update(layers=[0]), "differ in their layers"),
    ],
)
def test_only_like_is_compared_with_like(audits, tmp_path, change, words):
    broken(audits / "kto", change)
    with pytest.raises(AlignlensError, match=words):
        audit.compare(f"{audits}/*", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_audits_that_cannot_be_read(audits, tmp_path):
    with pytest.raises(AlignlensError, match="does not exist"):
        audit.gather(audit.find(f"{audits}/dpo,{tmp_path}/none"))
    with pytest.raises(AlignlensError, match="needs at least two"):
        audit.find(str(audits / "dpo"))
    with pytest.raises(AlignlensError, match="nothing matches"):
        audit.find(f"{tmp_path}/none*")
    with pytest.raises(AlignlensError, match="'pairs' is a required property.: it was cut or edited"):
        audit.read(broken(audits / "orpo", lambda r: r.pop("pairs")))
    (audits / "kto" / "audit.json").write_text("{")
    with pytest.raises(AlignlensError, match="no readable audit.json"):
        audit.read(audits / "kto")


@pytest.mark.notebook
def test_the_comparison_notebook(audits, tmp_path):
    words = [str(ROOT / "notebooks" / "compare_audits.ipynb"), str(tmp_path / "r.ipynb"), "--no-progress-bar"]
    words += ["-p", "audits", "runs/*", "-p", "out", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert (tmp_path / "out" / "comparison.html").stat().st_size > 5000


def test_a_mistyped_parameter_is_named():
    with pytest.raises(AlignlensError, match="'audit' is unknown; did you mean 'audits'"):
        audit.check_names({"audits": None, "audit": "runs/*", "_": 3, "Path": Path}, "audits", "out")
