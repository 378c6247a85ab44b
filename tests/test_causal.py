"""Interventions with known answers: nothing in, nothing out; a planted effect comes back at its size and place."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from alignlens import activations, causal, preferences
from alignlens.core.errors import ActivationError, CausalError, PreferenceError
from alignlens.dictionaries import Config, Dictionary

GOOD, BAD = "yes", "no"


@pytest.fixture(scope="module")
def format(micro):
    return micro.format


@pytest.fixture(scope="module")
def model(micro):
    return AutoModelForCausalLM.from_pretrained(micro.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def bridged(model):
    return activations.bridge(model)


@pytest.fixture(scope="module")
def pairs(micro):
    """Prompts of several lengths, with the same two answers each."""
    prompts = micro.heldout.prompt.drop_duplicates().head(16)
    return preferences.load_pairs(pd.DataFrame({"prompt": prompts, "chosen": GOOD, "rejected": BAD}))


@pytest.fixture(scope="module")
def toward(model, format, pairs):
    """The direction that the unembedding turns into more of one answer's tokens and less of the other's."""
    encoded = format.encode_pairs(pairs.head(1))
    rows = model.get_output_embeddings().weight.detach()
    weight = model.model.norm.weight.detach()
    chosen, rejected = encoded.chosen_ids[0][:-1], encoded.rejected_ids[0][:-1]
    return ((rows[chosen].mean(0) - rows[rejected].mean(0)) * weight).numpy()


def draw(seed, width=32):
    return np.random.default_rng(seed).standard_normal(width)


def named(table, **where):
    table = table[table.kind == "named"]
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def only(table, **where):
    (row,) = named(table, **where).itertuples()
    return row


def by_hand(model, format, pairs, layer, change=None):
    """Margins and the streams that were changed, one unpadded sequence at a time, without TransformerLens."""
    encoded, seen = format.encode_pairs(pairs), {}
    margins = np.zeros(len(encoded))
    for sign, responses in ((1, encoded.chosen_ids), (-1, encoded.rejected_ids)):
        for i, (prompt, response) in enumerate(zip(encoded.prompt_ids, responses, strict=True)):
            first = len(prompt) - 1

            def hook(module, inputs, output, first=first, key=(*prompt, *response)):
                seen[key] = output[0, first:].clone()
                output = output.clone()
                if change is not None:
                    output[0, first:] = change(output[0, first:])
                return output

            handle = model.model.layers[layer].register_forward_hook(hook)
            with torch.no_grad():
                logp = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            handle.remove()
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            margins[i] += sign * sum(float(logp[t, token]) for t, token in zip(places, response, strict=True))
    return margins, torch.cat(list(seen.values())).double()


def sae(width=32, *, hook=None, seed=0):
    """Three latents: one that never fires, one that always fires and one that fires on some tokens."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Dictionary(
        encoder=rows.T.copy(), encoder_bias=np.array([0, 100, 0], np.float32), decoder=rows,
        decoder_bias=np.zeros(width, np.float32), threshold=np.array([1e6, 0, 0.1], np.float32),
        shapes={"base": (width,)}, config=Config(width=3, k=1), facts={} if hook is None else {"hook": hook},
    )  # fmt: skip


# Nothing in, nothing out ---------------------------------------------------------------------------------------------


def test_strength_zero_changes_nothing(bridged, format, pairs):
    table = causal.steer(
        bridged, format, pairs, {"a": draw(0)}, layer=0, strength=0, sampled=4, response_tokens=6,
        judge=lambda prompts, responses: [len(r) for r in responses],
    )  # fmt: skip
    assert set(table.measure) == {"margin", "accuracy", "kl", "length", "reward"}
    assert (table[["value", "low", "high", "change_norm"]] == 0).all(axis=None)
    assert (named(table).p == 1).all() and not table.beats.any()


def test_ablating_what_never_varies_changes_nothing(model, format, pairs):
    still = copy.deepcopy(model)
    with torch.no_grad():
        still.get_input_embeddings().weight[:, 5] = 0
        for block in still.model.layers:
            block.self_attn.o_proj.weight[5] = block.mlp.down_proj.weight[5] = 0
    axis = np.eye(32)[5]
    table = causal.ablate(still, format, pairs, {"still": axis, "other": draw(0)}, layer=1)
    assert (table[table.name == "still"][["value", "change_norm"]] == 0).all(axis=None)
    assert (table[table.name == "other"].change_norm > 0).all()


def test_a_latent_that_never_fires_is_ablated_without_effect(bridged, format, pairs):
    table = causal.ablate_latents(bridged, format, pairs, sae(), [0, 1], layer=1)
    assert (table[table.name == "0"][["value", "change_norm"]] == 0).all(axis=None)
    assert only(table, name="1", measure="kl").value > 0


def test_random_directions_are_not_named(bridged, format, pairs):
    directions = {f"random {seed}": draw(seed) for seed in range(20)}
    table = named(causal.steer(bridged, format, pairs, directions, layer=0, strength=1, random=40, seed=7))
    assert table.groupby("measure").beats.mean().max() <= 0.15


# Planted effects -----------------------------------------------------------------------------------------------------


def test_steering_toward_an_answer_raises_its_margin_and_beats_random(bridged, format, pairs, toward):
    options = {"layer": 1, "strength": [0.5, -0.5, 1]}
    table = causal.steer(bridged, format, pairs, {"toward": toward, "random": draw(3)}, **options)
    up, down, more = (only(table, name="toward", measure="margin", strength=s) for s in options["strength"])
    assert up.beats and more.beats and up.p == pytest.approx(1 / 21)
    assert up.low > up.random_high and down.high < min(0, down.random_low) and up.value < more.value
    assert not named(table, name="random", measure="margin").beats.any()


def test_columns_of_the_null_come_from_the_random_rows(bridged, format, pairs, toward):
    table = causal.steer(bridged, format, pairs, {"a": toward, "b": draw(1)}, layer=0, strength=[0.5, 2], random=25)
    assert (table.columns == causal.COLUMNS).all()
    assert len(table) == 3 * 2 * (2 + 25)
    for row in named(table).itertuples():
        null = table[(table.kind == "random") & (table.strength == row.strength) & (table.measure == row.measure)].value
        assert len(null) == 25
        assert row.random_mean == pytest.approx(null.mean())
        assert [row.random_low, row.random_high] == pytest.approx(list(np.percentile(null, [2.5, 97.5])))
        centre = (null.sum() + row.value) / 26
        assert row.p == pytest.approx((1 + ((null - centre).abs() >= abs(row.value - centre)).sum()) / 26)
        assert row.low <= row.value <= row.high


def test_a_reference_shifts_the_margin_that_accuracy_asks_about(bridged, model, format, pairs, toward):
    clean, _ = by_hand(model, format, pairs, 1)
    options = {"layer": 1, "strength": 1, "reference": clean + 1e-3}
    table = causal.steer(bridged, format, pairs, {"toward": toward}, **options)
    assert only(table, measure="accuracy").value == 1


@pytest.mark.parametrize("what", ["steer", "ablate", "ablate_latents"])
def test_effects_agree_with_a_plain_forward_hook(model, format, pairs, what):
    layer, unit, latents = 0, draw(0) / np.linalg.norm(draw(0)), sae()
    clean, streams = by_hand(model, format, pairs, layer)
    streams = streams[streams.norm(dim=1) <= 10 * streams.norm(dim=1).median()]
    mean = streams.mean(0)
    norm = float((streams - mean).square().sum(1).mean().sqrt())
    u, row = torch.tensor(unit).float(), torch.tensor(latents.decoder[2])
    changes = {
        "steer": lambda x: x + 0.7 * norm * u,
        "ablate": lambda x: x - ((x - mean.float()) @ u)[:, None] * u,
        "ablate_latents": lambda x: x - torch.where(x @ row > 0.1, x @ row, 0.0)[:, None] * row,
    }
    expected = by_hand(model, format, pairs, layer, changes[what])[0] - clean
    asked = {
        "steer": lambda **o: causal.steer(model, format, pairs, {"a": unit * 5}, strength=0.7, **o),
        "ablate": lambda **o: causal.ablate(model, format, pairs, {"a": unit}, **o),
        "ablate_latents": lambda **o: causal.ablate_latents(model, format, pairs, latents, [2], **o),
    }
    found = only(asked[what](layer=layer), measure="margin")
    assert abs(expected.mean()) > 1e-3
    assert found.value == pytest.approx(expected.mean(), abs=2e-4)
    assert found.stream_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("what", ["ablate", "ablate_latents"])
def test_random_directions_change_the_stream_by_as_much(bridged, format, pairs, what):
    if what == "ablate":
        table = causal.ablate(bridged, format, pairs, {"a": draw(0), "b": draw(1)}, layer=0)
    else:
        table = causal.ablate_latents(bridged, format, pairs, sae(hook="blocks.0.hook_resid_post"), [1, 2], layer=0)
    for _, rows in table.groupby("name"):
        assert np.ptp(rows.change_norm) < 1e-4 * rows.change_norm.mean()
    assert table.groupby("name").change_norm.mean().nunique() == 2


# The run -------------------------------------------------------------------------------------------------------------


def test_batches_and_a_second_call_do_not_change_the_result(bridged, format, micro, toward):
    pairs = micro.heldout.head(6)
    tables = [
        causal.steer(bridged, format, pairs, {"a": toward}, layer=0, strength=1, batch_size=size, bootstrap=50)
        for size in (3, 64, 64)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1], atol=1e-3, rtol=1e-3)
    pd.testing.assert_frame_equal(tables[1], tables[2])


def test_the_model_is_left_as_it_was(model, bridged, format, pairs):
    ids = torch.arange(12)[None] + 20
    before = [m(ids) for m in (model.eval(), bridged)]
    weights = copy.deepcopy(model.state_dict())
    for each in (model, bridged):
        causal.steer(each, format, pairs, {"a": draw(0)}, layer=1, strength=3, sampled=2, response_tokens=4)
        with pytest.raises(CausalError):
            causal.steer(each, format, pairs, {"a": draw(0)}, layer=1, strength=1, sampled=2, judge=lambda p, r: [1])
    assert torch.equal(before[0].logits, model(ids).logits) and torch.equal(before[1], bridged(ids))
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_samples_are_steered_and_come_back_with_the_seed(bridged, model, format, pairs):
    end = (model.get_output_embeddings().weight[format.end_id] * model.model.norm.weight).detach().numpy()
    seen = []

    def judge(prompts, responses):
        seen.append((prompts, responses))
        return np.array([r.count("e") for r in responses])

    options = {"layer": 1, "strength": 3, "sampled": 8, "judge": judge, "response_tokens": 12}
    tables = [causal.steer(bridged, format, pairs, {"end": end}, seed=seed, **options) for seed in (1, 1, 2)]
    length, kl = (only(tables[0], measure=measure) for measure in ("length", "kl"))
    assert length.high < 0 and length.beats and kl.low > 0
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert only(tables[2], measure="length").value != length.value
    clean, steered = seen[0], seen[1]
    assert clean[0] == steered[0] == pairs.prompt.head(8).tolist()
    assert sum(map(len, steered[1])) < sum(map(len, clean[1]))


# Patching ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(model, format, pairs):
    """The model with its second block trained toward the chosen answers; all else is the same."""
    moved = copy.deepcopy(model)
    moved.requires_grad_(False)
    moved.model.layers[1].requires_grad_(True)
    encoded = format.encode_pairs(pairs)
    ids, mask = preferences.collate(
        [p + c for p, c in zip(encoded.prompt_ids, encoded.chosen_ids, strict=True)], format.pad_id
    )
    labels = torch.where(mask.bool(), ids, -100)
    for row, prompt in zip(labels, encoded.prompt_ids, strict=True):
        row[: len(prompt)] = -100
    optimiser = torch.optim.Adam(moved.model.layers[1].parameters(), lr=5e-3)
    for _ in range(8):
        optimiser.zero_grad()
        moved(ids, attention_mask=mask, labels=labels).loss.backward()
        optimiser.step()
    return moved.eval().requires_grad_(False)


def test_a_model_patched_with_itself_is_unchanged(bridged, format, pairs):
    table = causal.patch(bridged, bridged, format, pairs)
    assert table.layer.tolist() == [0, 1]
    assert (table.margin_patched == table.margin_target).all() and (table.margin_source == table.margin_target).all()
    assert (table[["kl_to_source", "kl_to_target"]] == 0).all(axis=None)
    assert table.share.isna().all() and table.reason.str.contains("do not differ").all()


@pytest.mark.parametrize("turned", [False, True])
def test_patching_finds_the_block_that_differs(bridged, moved, format, pairs, turned):
    source, target = (bridged, moved) if turned else (moved, bridged)
    table = causal.patch(source, target, format, pairs, layers=[0, -1])
    before, after = table.itertuples()
    assert (before.layer, after.layer) == (0, 1) and before.reason == after.reason == ""
    assert abs(before.share) < 1e-3 and before.kl_to_target < 1e-5 < before.kl_to_source
    assert [after.share, after.low, after.high] == pytest.approx([1, 1, 1], abs=1e-3)
    assert after.kl_to_source < 1e-5 < after.kl_to_target
    assert after.margin_patched == pytest.approx(after.margin_source, abs=1e-4)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"directions": {"a": draw(0, 31)}}, r"'a' has shape \(31,\): give 32 finite"),
        ({"directions": {"a": draw(0) * np.nan}}, "'a' has shape .* finite"),
        ({"directions": {"a": np.zeros(32)}}, "'a' is zero"),
        ({"directions": {}}, "nothing to intervene on"),
        ({"layer": 2}, "layers=2: .* from 0 to 1"),
        ({"random": 19}, "random=19: at least 20"),
        ({"strength": np.inf}, "strength=inf"),
        ({"strength": []}, r"strength=\[\]"),
        ({"judge": len}, "give sampled"),
        ({"sampled": 2, "judge": lambda p, r: [0.0]}, r"shape \(1,\) for 2 responses"),
        ({"reference": [0.0]}, "one margin for each of 16 pairs"),
        ({"strength": 1e40}, "is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(bridged, format, pairs, changes, words):
    asked = {"directions": {"a": draw(0)}, "layer": 0, "strength": 1} | changes
    with pytest.raises((CausalError, ActivationError), match=words):
        causal.steer(bridged, format, pairs, **asked)


def test_pairs_that_do_not_fit_are_refused(bridged, micro, pairs):
    short = preferences.Formatter(micro.format.tokenizer, max_length=2)
    with pytest.raises(PreferenceError, match="no pair of 16 can be used"):
        causal.ablate(bridged, short, pairs, {"a": draw(0)}, layer=0)


def test_dictionaries_that_do_not_fit_are_refused(bridged, format, pairs):
    both = dataclasses.replace(sae(), shapes={"base": (16,), "aligned": (16,)})
    for dictionary, latents, words in [
        (both, [0], "only one stream of one layer"),
        (sae(), [3], "latent 3 .* from 0 to 2"),
        (sae(width=31), [0], "'latent 0' has shape"),
        (sae(hook="blocks.0.hook_resid_post"), [0], "trained at blocks.0"),
    ]:
        with pytest.raises(CausalError, match=words):
            causal.ablate_latents(bridged, format, pairs, dictionary, latents, layer=1)


def test_a_damaged_model_is_refused(model, format, pairs):
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.model.layers[0].mlp.down_proj.weight[0, 0] = np.nan
    with pytest.raises(CausalError, match="NaN or infinite streams after block 0"):
        causal.steer(damaged, format, pairs, {"a": draw(0)}, layer=0, strength=1)
    with pytest.raises(CausalError, match="margins are NaN"):
        causal.patch(model, damaged, format, pairs)


def test_models_of_other_shapes_are_not_patched(bridged, format, pairs):
    config = copy.deepcopy(bridged.original_model.config)
    config.hidden_size = 16
    with pytest.raises(CausalError, match="patch between models of one shape"):
        causal.patch(AutoModelForCausalLM.from_config(config), bridged, format, pairs)
    with pytest.raises(ActivationError, match=r"layers=\[5\]"):
        causal.patch(bridged, bridged, format, pairs, layers=[5])
