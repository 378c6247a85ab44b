"""Rules give the verdict that planted tables ask for; the published numbers say what they are cited for."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from alignlens import claims, probes
from alignlens.claims import CHANGED, NOT_REPLICATED, NOT_TESTABLE, REPLICATED, rules
from alignlens.core.settings import METHODS

FAMILIES = ("llama", "qwen3", "smollm3")


def changes(values, half, **columns):
    """One row a family: change and interval; q as if each were tested alone."""
    values, half = np.asarray(values, float), np.broadcast_to(half, len(values))
    table = pd.DataFrame(
        {"family": FAMILIES[: len(values)], "change": values, "low": values - half, "high": values + half}
    )
    clear = np.abs(values) > half
    return table.assign(q=np.where(clear, 0.01, 0.6), trained=True).assign(**columns)


def transfer(planted, half=0.01, layers=4):
    """``transfer_gaps``: the base is best at layer 2, where each method has its planted change; elsewhere none."""
    rows = []
    for family in FAMILIES:
        for method in METHODS:
            for layer in range(layers):
                change = planted.get(method, 0.0) if layer == 2 else 0.0
                base = 0.8 if layer == 2 else 0.7
                interval = {"difference_low": change - half, "difference_high": change + half}
                row = {"family": family, "method": method, "layer": layer, "auroc_base": base}
                rows.append(row | {"difference": change} | interval)
    return pd.DataFrame(rows)


def study(planted, half=0.01, **more):
    """The tables that a verdict on change needs, with methods that all moved their objective."""
    moved = [{"family": f, "method": m, "moved": "moved"} for f in FAMILIES for m in METHODS]
    return {"transfer_gaps": transfer(planted, half), "objectives": pd.DataFrame(moved)} | more


def verdicts(tables, **options):
    document = claims.ledger(tables, run_id="r", preset="test", **options)
    return {claim["id"]: claim["verdict"] for claim in document["claims"]}


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "half", "expected"),
    [
        ([0.1, 0.1, 0.1], 0.02, REPLICATED),
        ([0.1, 0.1, 0.0], 0.02, REPLICATED),
        ([0.1, 0.0, 0.0], 0.02, CHANGED),
        ([-0.1, -0.1, -0.1], 0.02, CHANGED),
        ([0.1, 0.1, -0.1], 0.02, CHANGED),
        ([0.0, 0.0, 0.0], 0.02, NOT_REPLICATED),
        ([0.0, 0.0, 0.0], 0.08, NOT_TESTABLE),
        ([0.0, 0.0, 0.0], [0.02, 0.08, 0.08], NOT_TESTABLE),
        ([0.1], 0.02, NOT_TESTABLE),
        ([0.0, math.nan, math.nan], 0.02, NOT_TESTABLE),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_claimed_change_is_judged_by_sign_interval_and_power(values, half, expected, sign):
    """A fall is judged as the mirror image of a rise."""
    table = changes(sign * np.array(values), half)
    assert rules.judge_change(table, sign, effect=0.05)[0] == expected


def test_a_method_that_learnt_nothing_refutes_nothing():
    assert rules.judge_change(changes([0, 0, 0], 0.02, trained=False), 1, 0.05)[0] == NOT_TESTABLE


def test_a_published_effect_of_the_other_sign_cannot_be_refuted():
    assert rules.judge_change(changes([0, 0, 0], 0.01), 1, effect=-0.03)[0] == NOT_TESTABLE


@pytest.mark.parametrize(
    ("values", "half", "trained", "expected"),
    [
        ([0.0, 0.005, -0.005], 0.01, True, REPLICATED),
        ([0.0, 0.0, 0.0], 0.03, True, NOT_TESTABLE),
        ([0.0, 0.0, 0.0], 0.01, False, NOT_TESTABLE),
        ([0.06, -0.06, 0.0], 0.01, True, NOT_REPLICATED),
        ([0.015, 0.015, 0.015], 0.01, True, NOT_TESTABLE),
        ([0.0, 0.0, math.nan], 0.01, True, REPLICATED),
    ],
)
def test_preserving_needs_an_interval_inside_the_margin(values, half, trained, expected):
    assert rules.judge_equivalence(changes(values, half, trained=trained))[0] == expected


@pytest.mark.parametrize(
    ("curve", "half", "expected"),
    [
        ([0.6, 0.7, 0.9, 0.9, 0.7, 0.6], 0.02, REPLICATED),
        ([0.6, 0.6, 0.7, 0.7, 0.8, 0.9], 0.02, CHANGED),
        ([0.7, 0.7, 0.7, 0.7, 0.7, 0.7], 0.01, NOT_REPLICATED),
        ([0.6, 0.7, 0.8, 0.8, 0.7, 0.6], 0.25, NOT_TESTABLE),
    ],
)
def test_depth_is_judged_by_the_plateau(curve, half, expected):
    curve = np.array(curve)
    rows = pd.DataFrame({"layer": range(6), "auroc": curve, "auroc_low": curve - half, "auroc_high": curve + half})
    table = pd.concat([rows.assign(family=f) for f in FAMILIES])
    assert rules.judge_depth(table)[0] == expected


def test_families_differ_only_beyond_their_errors():
    def judge(values, half):
        return rules.judge_families(changes(values, half).assign(method="dpo"), spread=0.05)[0]

    assert judge([0.0, 0.1, 0.2], 0.02) == REPLICATED
    assert judge([0.0, 0.0, 0.0], 0.02) == NOT_REPLICATED
    assert judge([0.0, 0.0, 0.0], 0.2) == NOT_TESTABLE
    assert judge([0.0], 0.02) == NOT_TESTABLE


def test_heterogeneity_is_rarely_claimed_where_there_is_none():
    rng = np.random.default_rng(0)
    tables = [
        pd.concat([changes(rng.normal(0, 0.01, 3), 0.0196).assign(method=m) for m in METHODS]) for _ in range(200)
    ]
    found = np.mean([rules.judge_families(t, 0.05)[0] == REPLICATED for t in tables])
    assert found < 0.1


def labels(shares, live=500):
    rows = []
    for family in FAMILIES:
        for method, share in shares.items():
            row = {"family": family, "method": method}
            rows.append(row | {"label": "aligned_only", "share": share, "count": round(share * live)})
            rows.append(row | {"label": "shared_same", "share": 1 - share, "count": live - round(share * live)})
    return pd.DataFrame(rows)


def test_breadth_needs_order_and_nulls():
    broad, narrow, null = dict.fromkeys(rules.BROAD, 0.2), {"kto": 0.02, "orpo": 0.03}, {"seeds": 0.01, "self": 0.0}
    assert rules.judge_breadth(labels(broad | narrow | null), 0.12)[0] == REPLICATED
    assert rules.judge_breadth(labels(broad | narrow | {"seeds": 0.2}), 0.12)[0] != REPLICATED
    flat = dict.fromkeys(METHODS, 0.002)
    assert rules.judge_breadth(labels(flat | null), 0.12)[0] == NOT_REPLICATED
    assert rules.judge_breadth(labels(flat | null, live=10), 0.12)[0] == NOT_TESTABLE
    assert rules.judge_breadth(labels(narrow | {"kto": 0.3, "dpo": 0.2} | null), 0.12)[0] == CHANGED


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_planted_changes_come_back_as_verdicts():
    found = verdicts(study({"kto": 0.08, "grpo": -0.05, "dpo": -0.05, "orpo": -0.05}))
    assert found["C1"] == REPLICATED
    assert found["C2"] == CHANGED
    assert found["C3"] == REPLICATED
    assert found["C5"] == REPLICATED
    still = verdicts(study({}))
    assert [still[c] for c in ("C1", "C2", "C3")] == [NOT_REPLICATED] * 3
    wide = verdicts(study({}, half=0.09))
    assert [wide[c] for c in ("C1", "C2", "C3", "C5")] == [NOT_TESTABLE] * 4
    assert verdicts(study({"dpo": -0.05}))["C3"] == CHANGED, "one of two methods"


def test_preserving_needs_half_of_the_dose():
    doses = pd.DataFrame([{"family": f, "method": m, "dose": 0.1} for f in FAMILIES for m in METHODS])
    assert verdicts(study({}, doses=doses), dose=1.5)["C5"] == NOT_TESTABLE
    assert verdicts(study({}, doses=doses), dose=0.15)["C5"] == REPLICATED


def decomposition(rotated, half=0.01):
    """Rotation of each method (two seeds) and of the nulls, at every layer."""
    rows = [
        {"family": f, "method": m, "seed": s, "layer": layer, "rotated": value, "rotated_low": value - half,
         "rotated_high": value + half, "attenuated": 0.0, "attenuated_low": -half, "attenuated_high": half}
        for f in FAMILIES for m, value in rotated.items() for s in (0, 1) for layer in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_mechanism_needs_the_fall_and_the_rotation_beyond_its_nulls():
    fall = {"dpo": -0.05, "orpo": -0.05}
    null = {"seeds": 0.02, "random": 0.0}
    turned = decomposition({"dpo": 0.1, "orpo": 0.1} | null)
    assert verdicts(study(fall, decomposition_seeds=turned))["C4"] == REPLICATED
    assert (
        verdicts(study(fall, decomposition_seeds=decomposition({"dpo": 0.02, "orpo": 0.02} | null)))["C4"]
        == NOT_REPLICATED
    )
    assert verdicts(study(fall, decomposition_seeds=decomposition({"dpo": 0.1, "orpo": 0.02} | null)))["C4"] == CHANGED
    assert verdicts(study({}, decomposition_seeds=turned))["C4"] == NOT_REPLICATED, "nothing fell"
    assert verdicts(study(fall))["C4"] == NOT_TESTABLE, "no table of rotation"
    no_nulls = decomposition({"dpo": 0.1, "orpo": 0.1})
    assert verdicts(study(fall, decomposition_seeds=no_nulls))["C4"] == NOT_TESTABLE


def c4(tables):
    (found,) = [c for c in claims.ledger(tables, run_id="abc", preset="tiny")["claims"] if c["id"] == "C4"]
    return found


def test_the_share_of_interventions_counts_named_directions_only():
    """Two of eight effects beat their random directions; those stand beside them and bear an ablation's name."""
    facts = {"family": "llama", "method": ["dpo", "orpo"] * 4, "name": "preference (mean)", "measure": "margin"}
    named = pd.DataFrame(facts | {"kind": "named", "beats": [True] * 2 + [False] * 6})
    random = pd.concat([named.assign(kind="random", beats=False)] * 20)
    others = named.assign(name="latent 3", beats=True)
    as_csv = pd.concat([named, others]).drop(columns="kind")
    for causal in (pd.concat([named, random, others]), as_csv):
        said = c4(study({}, causal=causal))["here_sound"]
        assert "of 8 effects on the margin a share of 0.250 beats" in said["text"]
        assert [n["value"] for n in said["numbers"] if n["source"] == "causal.csv"] == [0.25]


def test_a_family_without_nulls_counts_among_the_families():
    turned = decomposition({"dpo": 0.1, "orpo": 0.1, "seeds": 0.02})
    part = turned[(turned.family != "smollm3") | (turned.method != "seeds")]
    text = c4(study({}, decomposition_seeds=part))["here_sound"]["text"]
    assert "(beyond in 2 of 3)" in text
    assert "smollm3 not measured" in text


def test_nothing_measured_is_said_and_judged_as_nothing():
    document = claims.ledger({}, run_id="r", preset="test")
    assert {c["verdict"] for c in document["claims"]} == {NOT_TESTABLE}
    for claim in document["claims"]:
        assert claim["published"]["numbers"]
        assert not claim["here_sound"]["numbers"]
        assert "ot measured" in claim["here_sound"]["text"]


def test_nan_supports_nothing_and_breaks_nothing():
    tables = study({"kto": 0.08})
    gaps = tables["transfer_gaps"]
    gaps.loc[gaps.family == "llama", ["difference", "difference_low", "difference_high"]] = math.nan
    gaps.loc[gaps.family == "qwen3", "auroc_base"] = math.nan
    document = claims.ledger(tables, run_id="r", preset="test")
    kto = document["claims"][0]
    assert "llama not measured" in kto["here_sound"]["text"]
    assert kto["verdict"] == CHANGED, "one clear family of three, since qwen3's layer is unknown and shows no change"


def test_more_tables_add_sentences():
    path = []
    for family in FAMILIES:
        for method in METHODS:
            for share in (0.0, 0.5, 1.0):
                kl, change = share * (1 if method == "ppo" else 2), 0.1 * share
                row = {"family": family, "method": method, "seed": 0, "share": share, "kl": kl, "change": change}
                path.append(row | {"change_low": change - 0.01, "change_high": change + 0.01})
    causal = pd.DataFrame({"method": ["dpo", "orpo", "kto", "dpo", "dpo"], "beats": [True, False, True, np.nan, True]})
    causal = causal.assign(name=["preference (mean)"] * 4 + ["random"], measure="margin")
    tables = study({}, dose_response=pd.DataFrame(path), causal=causal)
    found = {c["id"]: c for c in claims.ledger(tables, run_id="r", preset="test")["claims"]}
    matched = [n for n in found["C1"]["here_sound"]["numbers"] if n["source"] == "dose_response.csv"]
    assert [round(n["value"], 9) for n in matched] == [0.05] * 3, "ppo stops at 1 nat, where kto has half of its change"
    beats = next(n for n in found["C4"]["here_sound"]["numbers"] if n["source"] == "causal.csv")
    assert beats["value"] == 0.5, "named directions of dpo and orpo, NaN left out"


def test_a_table_without_a_column_is_refused_by_name():
    with pytest.raises(claims.ClaimError, match="transfer_gaps has no column 'difference_high'"):
        verdicts({"transfer_gaps": transfer({}).drop(columns="difference_high")})


def test_correction_counts_families_and_methods_but_no_controls():
    table = transfer({"kto": 0.0115})
    alone = claims.reference_changes(table[table.method == "kto"])
    among = claims.reference_changes(table).query("method == 'kto'")
    control = pd.concat([table, table[table.method == "dpo"].assign(method="shuffled")])
    assert (alone.q.to_numpy() < among.q.to_numpy()).all()
    assert np.allclose(claims.reference_changes(control).query("method == 'kto'").q, among.q)
    assert set(among.layer) == {2}


def test_the_ledger_survives_json(tmp_path):
    document = claims.ledger(study({"kto": 0.08}), run_id="abc", preset="test")
    claims.write(document, tmp_path / "claims.json")
    again = claims.read(tmp_path / "claims.json")
    json.dumps(again, allow_nan=False)
    assert again["schema"] == "alignlens.claims/1"
    pd.testing.assert_frame_equal(claims.frame(again), claims.frame(document))
    for ours, theirs in zip(document["claims"], again["claims"], strict=True):
        for part in ("published", "here_published", "here_sound"):
            assert [n["value"] for n in ours[part]["numbers"]] == [n["value"] for n in theirs[part]["numbers"]]
            run = claims.PAPER if part == "published" else "abc"
            assert {n["run"] for n in theirs[part]["numbers"]} <= {run}
    assert [c["id"] for c in again["claims"]] == [f"C{i}" for i in range(1, 9)]


@pytest.mark.parametrize("damage", [{"schema": "alignlens.claims/0"}, {"claims": [{"id": "C1", "verdict": "maybe"}]}])
def test_another_ledger_is_refused(tmp_path, damage):
    document = claims.ledger({}, run_id="r", preset="test") | damage
    (tmp_path / "claims.json").write_text(json.dumps(document))
    with pytest.raises(claims.ClaimError):
        claims.read(tmp_path / "claims.json")


# --- the published numbers --------------------------------------------------------------------------------------------


def test_published_changes_are_those_of_the_paper():
    table = claims.reanalysis().set_index(["method", "family"])
    smol, llama, qwen = "SmolLM3-3B", "Llama-3.2-3B-Instruct", "Qwen3-4B-Instruct-2507"
    expected = {
        "base": (0.0, 0.0, 0.0), "ppo": (0.001, 0.001, 0.001), "simpo": (0.002, 0.0, 0.001),
        "dpo": (0.003, -0.030, -0.027),
        "orpo": (0.004, -0.046, -0.026), "grpo": (0.055, 0.053, 0.029), "kto": (0.122, 0.074, 0.053),
    }  # fmt: skip
    for method, values in expected.items():
        assert table.loc[method].change[[smol, llama, qwen]].tolist() == pytest.approx(values, abs=6e-4)
    base, kto = table.loc["base"], table.loc["kto"]
    assert base.auroc[[smol, llama, qwen]].tolist() == pytest.approx([0.8507, 0.9064, 0.9380], abs=5e-5)
    assert base.best_layer[[smol, llama, qwen]].tolist() == [19, 11, 24]
    assert base.layer0[[smol, llama, qwen]].tolist() == pytest.approx([0.742, 0.863, 0.845], abs=6e-4)
    assert kto.layer0[[smol, llama, qwen]].tolist() == pytest.approx([0.920, 0.943, 0.950], abs=6e-4)
    assert (table.loc["kto"].share_at_layer0 > 1).all() and (table.loc["grpo"].share_at_layer0 > 1).all()
    assert set(table.index[table.beyond_noise].get_level_values(0)) == {"dpo", "orpo", "grpo", "kto"}
    assert not table.loc[("dpo", smol)].beyond_noise and math.isnan(table.loc[("dpo", smol)].share_at_layer0)
    assert (kto.above_floor_change < 0).all(), "above its own floor, KTO's number is lower than base's"


def test_published_classes_hold_what_is_forced():
    table = claims.class_shares().set_index(["family", "method", "run"])
    assert np.allclose(table.xs("SmolLM3-3B").forced * 16384, 983)
    assert np.allclose(table.xs("Llama-3.2-3B-Instruct").forced * 24576, 1474)
    both = table.drop(index="Qwen3-4B-Instruct-2507")
    assert (both.shared_aligned - both.forced).abs().max() < 0.001
    assert both.shared_redirected.between(0.67, 0.82).all()
    total = claims.published("crosscoder_classes").groupby(["family", "method", "run"]).share.sum()
    assert np.allclose(total, 1, atol=1e-4)


def test_standard_error_of_mirrored_rows_is_what_sampling_gives():
    rng, pairs, shift = np.random.default_rng(0), 300, 0.75
    found = []
    for _ in range(400):
        score = np.sort(rng.normal(shift, 1, pairs))
        found.append(1 - np.searchsorted(score, -score).mean() / pairs)
    assert claims.auroc_error(np.mean(found), pairs) == pytest.approx(np.std(found), rel=0.15)


def test_stored_floors_are_what_the_protocol_gives_on_noise():
    stored = claims.published("noise_floors").set_index(["pairs", "d_model", "seed"]).floor
    again = probes.noise_floor(897, 2048, protocol="published", seed=0)
    assert again == pytest.approx(stored[897, 2048, 0], abs=2e-3)
    assert stored.xs(10000).max() < stored.xs(897).min(), "fewer pairs, more room for memory"


def test_a_missing_published_table_is_named():
    with pytest.raises(claims.ClaimError, match="data/published/nothing.csv is missing"):
        claims.published("nothing")


def test_one_family_is_never_judged():
    tables = study(
        {"kto": 0.1, "dpo": -0.1, "orpo": -0.1}, crosscoder_labels=labels({"dpo": 0.2, "kto": 0.1, "self": 0.0})
    )
    tables["decomposition_seeds"] = decomposition({"dpo": 0.1, "orpo": 0.1, "seeds": 0.0})
    one = {name: table[table.family == "llama"] for name, table in tables.items()}
    assert set(verdicts(one).values()) == {NOT_TESTABLE}
