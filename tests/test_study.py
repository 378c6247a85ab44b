"""The front door: keys, reuse, splits, checkpoints from elsewhere, and what is shipped."""

import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from alignlens import align, calibration, causal, dictionaries, models, study
from alignlens.core import settings, store
from alignlens.core.errors import AlignError, DictionaryError, PreferenceError, PresetError
from alignlens.preferences import tinyworld
from alignlens.published import sparc
from alignlens.study import STAGES, Variant, features, front, measuring, mechanisms, tables

SMOKE = Variant("llama", "dpo", 0)


@pytest.fixture(scope="module")
def smoke(smoke_store):
    return study.open("smoke", store=str(smoke_store), jobs=1, progress=False)


def test_nothing_measured_was_trained_on(smoke):
    splits = {name: set(smoke.split(name).prompt_id) for name in ("train", "reward", "measure")}
    assert not splits["train"] & splits["measure"]
    assert not splits["reward"] & splits["measure"]
    assert set(smoke.measured("llama").prompt_id) <= splits["measure"]
    text = tinyworld.corpus(5000, exclude=smoke.split("measure").prompt)
    assert not set(text.prompt) & set(smoke.split("measure").prompt)


def test_a_result_is_made_once_and_found_again(smoke, smoke_store):
    first = smoke.variant(SMOKE)
    again = study.open("smoke", store=str(smoke_store), progress=False).variant(SMOKE)
    assert first.path == again.path
    assert first.manifest["created"] == again.manifest["created"]


def test_keys_follow_what_a_stage_depends_on(smoke, tmp_path):
    def keys(**changes):
        other = study.open("smoke", store=str(tmp_path), progress=False, **changes)
        return other.key("base", "llama"), other.key("reward_model", "llama", 0), other.split_key("train")

    base, reward, train = keys()
    assert keys() == (base, reward, train)
    assert keys(steps=21) == (base, reward, train), "the methods' steps do not touch the base or the reward model"
    assert keys(reward_steps=21)[0] == base
    assert keys(reward_steps=21)[1] != reward
    assert keys(pretrain_steps=201)[0] != base
    assert keys(split_seed=1)[2] != train


@pytest.mark.parametrize("upstream", ["base", "variant", "tokens", "sae", "latents", "behavior", "activations"])
def test_a_new_version_reaches_everything_downstream(upstream, tmp_path, monkeypatch):
    def key():
        return study.open("smoke", store=str(tmp_path), pretrain_steps=2, progress=False).key("causal", SMOKE)

    before = key()
    monkeypatch.setattr(STAGES[upstream], "version", 99)
    assert key() != before


# Another value of every parameter that may change a result; several where one alone need not change it.
OTHER = {
    "families": "BASE", "methods": (["kto"], ["dpo", "ppo"]), "controls": [], "seeds": [1], "checkpoints":
    {"llama:dpo": "hub/a"}, "recipe": "published", "pairs": "FILE", "split": 1, "measured": 90, "sampled": 30,
    "layers": 3, "d_model": 56, "vocab_size": 900, "pretrain_steps": 150, "pretrain_batch": 40, "pretrain_rate":
    0.003, "steps": 19, "batch_size": 8, "micro_batch_size": 8, "max_length": 100, "response_tokens": 30,
    "lora_rank": 4, "learning_rates": {"dpo": 1e-4, "reward": 1e-4}, "stop": "last", "dose": 1.0, "check_every": 9,
    "check_prompts": 20, "reward": "truth", "reward_steps": 19, "position": "mean", "layers_measured": [0], "folds":
    4, "bootstrap": 100, "permutations": 10, "dictionary_layers": [0], "dictionary_width": 100, "dictionary_k": 5,
    "dictionary_epochs": 4, "dictionary_tokens": 9000, "published_pairs": 100, "dose_shares": [0.5], "causal_pairs":
    20, "random_directions": 30, "steer_strengths": [0.5],
}  # fmt: skip
BY_CONTENT = {"prompts", "length_bias", "label_noise", "limit", "max_chars", "on_bad", "reward_share", "measure_share"}
ONLY_WANTED = {"null_draws", "calibration_regimes", "calibration_seeds", "calibration_samples"}  # arguments of results
ASKED = {
    "reward_model": ("llama", 0), "random": (Variant("llama", "random", 0),), "sae": ("llama", 1, 0),
    "calibration": ("easy", "alignlens", 0, 40000), "base": ("llama",),
    "latents": (SMOKE.base,),
} | dict.fromkeys(("geometry", "crosscoder", "published_crosscoder"), (SMOKE.base, SMOKE))  # fmt: skip


class Made(Exception):
    """What is slow would start now, and has been given all that it depends on."""


@pytest.fixture
def read_by_make(smoke, tmp_path, monkeypatch):
    """read_by_make(stage): names of the preset's fields that its ``make`` reads, besides those of what it asks for."""
    seen, recording = set(), [False]

    def raise_made(*_, **__):
        raise Made

    def told(owner, name, as_field=None):
        """Calls of what has a key of its own are not looked into: they count as a field, if as any."""
        call = getattr(owner, name)

        def wrapped(*words):
            before, recording[0] = recording[0], False
            try:
                return call(*words)
            finally:
                recording[0] = before
                if before and as_field:
                    seen.add(as_field)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in (
        (models, "pretrain"), (align, "train"), (align, "train_reward"), (dictionaries, "train"), (sparc, "train"),
        (calibration, "run"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, raise_made)
    for name in ("steer", "ablate", "ablate_latents", "patch"):
        monkeypatch.setattr(causal, name, lambda *_, **__: pd.DataFrame({"name": ["x"], "measure": ["kl"]}))
    told(study.Study, "get")
    told(study.Study, "key")
    told(study.Study, "split", "split")
    told(study.Study, "measured", "measured")
    told(study.Study, "encoded", "measured")
    told(study.Study, "pattern")  # whose key is an input of what is made after it
    needs = study.Study.needs_reward_model.fget
    monkeypatch.setattr(study.Study, "needs", needs, raising=False)
    told(study.Study, "needs", "methods")
    monkeypatch.setattr(study.Study, "needs_reward_model", property(lambda s: s.needs()))
    read = settings.Preset.__getattribute__

    def recorded(preset, name):
        if recording[0] and name in settings.Preset.model_fields:
            seen.add(name)
        return read(preset, name)

    monkeypatch.setattr(settings.Preset, "__getattribute__", recorded)

    def found(name):
        fresh = study.open("smoke", store=str(smoke.store.root), jobs=1, progress=False)
        folder = tmp_path / name
        folder.mkdir()
        recording[0] = True
        try:
            STAGES[name].make(fresh, folder, *ASKED.get(name, (SMOKE,)))
        except Made:
            pass
        finally:
            recording[0] = False
        return seen

    return found


@pytest.mark.parametrize("name", STAGES)
def test_a_result_has_every_parameter_that_it_reads_in_its_key(name, smoke, read_by_make, tmp_path, monkeypatch):
    fields, args, path = read_by_make(name), ASKED.get(name, (SMOKE,)), tmp_path / "same.jsonl"
    monkeypatch.undo()
    if name not in ("calibration", "random", "probes", "geometry"):
        assert fields, "a stage that reads nothing would pass"
    unexplained = set(settings.Preset.model_fields) - {*OTHER, *BY_CONTENT, *ONLY_WANTED, *front.PLACES, "name"}
    assert unexplained == {"split_seed", "trust_remote_code"}, "give each new field another value in OTHER"
    smoke.pairs[["prompt", "chosen", "rejected"]].to_json(path, orient="records", lines=True)
    base, other = smoke.base("llama").path, tmp_path / "other"
    shutil.copytree(base, other)
    (other / "note").touch()
    files = {"FILE": str(path), "BASE": {"llama": "tiny:qwen3" if name == "base" else str(other)}}
    given = {} if name == "base" else {"families": {"llama": str(base)}}  # a base whose split changes would be trained

    def key(**changes):
        return study.open("smoke", store=str(smoke.store.root), progress=False, **given | changes).key(name, *args)

    def follows(field):
        values = OTHER[field] if isinstance(OTHER[field], tuple) else (OTHER[field],)
        field = "split_seed" if field == "split" else field
        return any(key(**{field: files.get(str(value), value)}) != plain for value in values)

    plain = key()
    fields -= {*front.PLACES, "trust_remote_code"} | ({"recipe"} if name == "reward_model" else set())  # none published
    assert [field for field in sorted(fields) if not follows(field)] == []


def test_samples_drawn_in_several_batches_depend_on_their_size(smoke_store):
    def keys(name, **changes):
        made = [study.open("smoke", store=str(smoke_store), read_batch=n, **changes) for n in (16, 20)]
        return {one.key(name, SMOKE) for one in made}

    assert len(keys("causal")) == 2
    assert len(keys("causal", sampled=12)) == len(keys("activations")) == 1, "one batch, or nothing drawn"


def test_every_stage_says_what_a_study_wants_of_it():
    tiny = study.open("tiny", progress=False)
    for name, stage in STAGES.items():
        assert stage.__doc__, name
        keys = [tiny.key(name, *args) for args in stage.wanted(tiny)] if name != "published_sae" else ["one"]
        assert keys and len(set(keys)) == len(keys), name
    with pytest.raises(AttributeError, match="a study has no 'probez'; its stages are base, reward_model"):
        tiny.probez  # noqa: B018
    with pytest.raises(PresetError, match="stage 'probez' is unknown; choose from bases"):
        tiny.make_all("probez")


def test_run_id_names_results_not_places(tmp_path):
    here = study.open("smoke", store=str(tmp_path), progress=False)
    assert here.run_id == study.open("smoke", store=str(tmp_path), jobs=2, figures="elsewhere").run_id
    assert here.run_id != study.open("smoke", store=str(tmp_path), steps=19).run_id
    given = {
        study.open("smoke", store=str(tmp_path), variants="auto", checkpoints={"llama:dpo": f"hub/{name}"}).run_id
        for name in "ab"
    }
    assert len({here.run_id, *given}) == 3, "another checkpoint under the same name is another run"


def test_load_never_trains(tmp_path, smoke_store):
    loading = study.open("smoke", store=str(smoke_store), variants="load", seeds=[7], progress=False)
    with pytest.raises(AlignError, match=r"llama-dpo-seed7 is neither stored nor given as a checkpoint"):
        loading.variant(Variant("llama", "dpo", 7))


def test_pairs_and_base_from_local_files_and_a_ready_adapter(smoke, tmp_path):
    """What a user brings: a folder with a base, a file with pairs, an adapter trained elsewhere."""
    base = tmp_path / "base"
    shutil.copytree(smoke.base("llama").path, base)
    adapter = tmp_path / "adapter"
    shutil.copytree(smoke.variant(SMOKE).path, adapter)
    rows = smoke.pairs[["prompt", "chosen", "rejected"]].to_dict("records")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = study.open(
        "smoke", families={"mine": str(base)}, pairs=str(tmp_path / "pairs.jsonl"), methods=["dpo"], controls=[],
        checkpoints={"mine:dpo": str(adapter)}, variants="load", store=str(tmp_path / "store"), progress=False,
    )  # fmt: skip
    assert mine.split_hash == smoke.split_hash
    theirs, ours = mine.activations(Variant("mine", "dpo")), smoke.activations(SMOKE)
    np.testing.assert_allclose(theirs.difference, ours.difference, atol=1e-5)
    table = tables.behaviour(mine).set_index(["method", "measure"]).value
    assert table["base", "margin"] == 0
    assert table["dpo", "kl"] > 0
    assert "score" not in table["dpo"].index, "no judge: nothing is trained against a reward, so none is invented"


def test_a_merged_checkpoint_gives_what_its_adapter_gives(smoke, tmp_path):
    model, tokenizer = smoke.load(SMOKE)
    merged = tmp_path / "merged"
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    other = study.open(
        "smoke", checkpoints={"llama:dpo": str(merged)}, variants="auto", methods=["dpo"], controls=[],
        store=str(smoke.store.root), progress=False,
    )  # fmt: skip
    one, two = (s.behavior(SMOKE) for s in (smoke, other))
    np.testing.assert_allclose(one.chosen_logprob, two.chosen_logprob, atol=1e-3)
    np.testing.assert_allclose(one.kl.dropna(), two.kl.dropna(), atol=1e-2)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"pairs": "missing.jsonl"}, PreferenceError, "missing.jsonl does not exist"),
        ({"families": {"x": "./no/such/model"}}, PreferenceError, "no/such/model does not exist"),
        ({"prompts": 9999}, PresetError, "4800 distinct"),
    ],
)
def test_bad_input_is_refused_with_a_reason(changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        study.open("smoke", store=str(tmp_path), progress=False, **changes).run_id  # noqa: B018


def test_too_few_prompts_for_the_folds(tmp_path, smoke):
    few = study.open("smoke", store=str(smoke.store.root), measured=3, progress=False)
    with pytest.raises(PreferenceError, match="3 prompts cannot fill 5 folds"):
        few.measured("llama")


def test_a_base_that_holds_less_than_is_asked_for_is_read_with_a_note(smoke):
    options = {"store": str(smoke.store.root), "max_length": 1024, "response_tokens": 256, "sampled": 4}
    asked = study.open("smoke", **options)
    with pytest.warns(UserWarning, match="llama: max_length or response_tokens is too much.* pairs have at most 128"):
        assert asked.limits("llama") == (128, 64, 64)
    pd.testing.assert_frame_equal(asked.measured("llama"), smoke.measured("llama"))
    np.testing.assert_array_equal(asked.activations(SMOKE.base).chosen, smoke.activations(SMOKE.base).chosen)
    assert asked.behavior(SMOKE.base).length.max() <= 64
    with warnings.catch_warnings(action="error"):
        assert smoke.limits("llama") == (128, 96, 32)


def test_base_against_itself_shows_nothing(smoke):
    table = tables.behaviour(smoke)
    base = table[table.method == "base"].set_index("measure")
    assert (base.loc[["margin", "chosen_shift", "rejected_shift", "kl"], ["value", "low", "high"]] == 0).all(axis=None)
    assert base.value["win_rate"] == 0.5


def test_contrast_sets_are_what_they_say(smoke):
    sets = tables.contrast_sets(smoke, "llama")
    assert not sets["paired"].prompt_id.duplicated().any()
    assert sets["repeated answers"].chosen.duplicated().mean() > 0.5
    assert len(sets["few pairs"]) < smoke.width("llama")


def test_changes_are_counted_with_and_without_correction():
    rows = [
        {
            "family": "f",
            "method": m,
            "layer": i,
            "difference": d,
            "difference_low": d - 0.02,
            "difference_high": d + 0.02,
        }
        for m, values in {"moved": [0.1, 0.09, 0.0], "still": [0.0, 0.021, 0.001]}.items()
        for i, d in enumerate(values)
    ]
    found = tables.changes(pd.DataFrame(rows)).set_index("method")
    assert found.layers_with_change.to_dict() == {"moved": 2, "still": 1}
    assert found.after_correction.to_dict() == {"moved": 2, "still": 0}
    assert found.at_layer["moved"] == 0


def test_objectives_need_an_interval_that_excludes_no_change():
    rows = [
        ("dpo", "accuracy", 0.7, 0.6, 0.8),
        ("kto", "accuracy", 0.52, 0.45, 0.6),
        ("orpo", "accuracy", 0.4, 0.3, 0.45),
        ("ppo", "reward_gain", 1.0, 0.5, 1.5),
    ]
    table = pd.DataFrame(rows, columns=["method", "measure", "value", "low", "high"]).assign(family="f")
    verdicts = tables.objectives(table).set_index("method").moved.to_dict()
    assert verdicts == {"dpo": "moved", "kto": "no change", "orpo": "moved back", "ppo": "moved"}


# --- what is shipped --------------------------------------------------------------------------------------------------


# --- dictionaries -----------------------------------------------------------------------------------------------------


def test_a_random_direction_is_as_large_as_its_pattern_and_points_elsewhere(smoke):
    pattern, random = (
        load_file(smoke.source(v).adapter + "/adapter_model.safetensors") for v in (SMOKE, Variant("llama", "random"))
    )
    for name in [n for n in pattern if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        first, second = (w[other].astype(float) @ w[name].astype(float) for w in (pattern, random))
        assert np.linalg.norm(second) == pytest.approx(np.linalg.norm(first), rel=0.01)
        assert abs((first * second).sum()) < 0.2 * np.linalg.norm(first) ** 2


def test_dictionaries_are_read_where_they_were_trained(smoke):
    layer, other = smoke.crosscoder_layer("llama"), smoke.dictionary_layers("llama")[0]
    artifact = smoke.sae("llama", layer)
    assert features.read_dictionary(artifact, [layer]).facts["hooks"] == [f"blocks.{layer}.hook_resid_post"]
    with pytest.raises(DictionaryError, match=f"blocks.{layer}.hook_resid_post.*not.*blocks.{other}.hook_resid_post"):
        features.read_dictionary(artifact, [other])


def test_a_layer_that_a_given_base_does_not_have_is_refused(smoke, tmp_path):
    folder, store = str(smoke.base("llama").path), str(tmp_path)
    given = study.open("smoke", families={"mine": folder}, dictionary_layers="1,9", store=store, progress=False)
    with pytest.raises(PresetError, match=r"dictionary_layers \(mine\) names layer 9, but the base has layers 0 to 1"):
        given.dictionary_layers("mine")


def test_one_dictionary_reads_all_models_and_the_base_has_not_changed(smoke):
    base = Variant("llama", "base")
    layer = smoke.crosscoder_layer("llama")
    found = features.read_dictionary(smoke.sae("llama", layer), [layer])
    codes = found.codes({"pooled": smoke.tokens(base).at(layer)})
    usage = smoke.latents(base).table("usage.parquet").query("layer == @layer")
    np.testing.assert_allclose(usage.density, np.diff(codes.tocsc().indptr) / codes.shape[0])
    change = smoke.latents(SMOKE).table("change.parquet")
    assert set(change.layer) == set(smoke.dictionary_layers("llama"))
    assert (change.mean_p < 0.05).any(), "the variant did move"


def test_the_base_with_itself_shares_every_live_latent(smoke):
    latents, _ = mechanisms.crosscoders(smoke)
    null = latents[latents.method == "self"]
    assert set(null.label) <= {"shared_same", "dead"}
    np.testing.assert_allclose(null.rho, 0.5, atol=1e-3)


def test_published_labels_do_not_see_whether_anything_changed(smoke):
    """Thresholds that adapt to a run give the base with itself the classes that they give a variant."""
    classes = mechanisms.published_classes(smoke).query("thresholds == 'adaptive'")
    shares = classes.pivot_table(index="method", columns="class", values="share")
    assert shares.loc["self", "shared_aligned"] < 0.5
    assert abs(shares.loc["self"] - shares.loc["dpo"]).max() < 0.2


def test_a_base_does_not_move_from_itself(smoke):
    base = Variant("llama", "base")
    made = smoke.geometry(base, base)
    geometry, parts = (made.table(f"{n}.parquet") for n in ("geometry", "decomposition"))
    assert geometry.rotation_degrees.max() < 1e-3
    np.testing.assert_allclose(geometry[["cka", "norm_ratio", "mean_cosine", "signal_ratio"]], 1, atol=1e-6)
    assert not parts[["rotated", "attenuated", "created", "change", "gap"]].to_numpy().any()


def test_dose_grows_along_the_way_from_the_base(smoke):
    smoke.make_all("probes")
    path = mechanisms.dose_path(smoke)
    assert set(path.share) == {0, 0.4, 0.7, 1}
    for _, way in path.groupby("method"):
        way = way.sort_values("share")
        assert way.kl.iloc[0] == 0
        assert way.kl.is_monotonic_increasing
        assert way.rotation_degrees.iloc[0] == 0
        assert way.change.iloc[0] == way.gap.iloc[0] == 0
        np.testing.assert_allclose(way.margin.iloc[0], 0, atol=1e-9)


def test_a_matched_dose_lies_between_its_neighbours_and_is_not_made_up():
    way = {"family": "f", "method": "dpo", "share": [0, 0.5, 1.0], "kl": [0.0, 1.0, 3.0], "change": [0.0, 2.0, 4.0]}
    path = pd.DataFrame(way).assign(change_low=lambda t: t.change - 1, change_high=lambda t: t.change + 1)
    found = mechanisms.matched_dose(path, 2.0).iloc[0]
    assert (found.value, found.low, found.high, found["last"]) == (3.0, 2.0, 4.0, 4.0)
    beyond = mechanisms.matched_dose(path, 3.5).iloc[0]
    assert not beyond.reached
    assert np.isnan(beyond.value)
    assert beyond["last"] == 4.0


def test_only_parts_that_survive_correction_are_clear():
    def layers(count, gap, change, half):
        rows = {"family": "f", "method": "dpo", "layer": range(count), "gap": gap, "change": change}
        table = pd.DataFrame(rows)
        return table.assign(
            rotated_low=table.gap - half,
            **{f"{n}{s}": table[n] + w * half for n in ("gap", "change") for s, w in (("_low", -1), ("_high", 1))},
        )

    noise = layers(40, 0.0, 0.0, 0.1)
    once = noise.assign(gap=[0.11] + [0.0] * 39, gap_low=[0.01] + [-0.1] * 39, gap_high=[0.21] + [0.1] * 39)
    flags = ["rotated_clear", "attenuated_clear", "created_clear"]
    assert not mechanisms.clear_parts(noise)[flags].to_numpy().any()
    assert not mechanisms.clear_parts(once)[flags].to_numpy().any(), "one interval in forty excludes 0 by chance"
    turned = layers(40, 0.3, 0.0, 0.1)
    assert mechanisms.clear_parts(turned).rotated_clear.all()
    assert not mechanisms.clear_parts(turned.assign(rotated_low=0.0)).rotated_clear.any(), "created, not turned"
    assert mechanisms.clear_parts(layers(40, 0.0, -0.3, 0.1)).attenuated_clear.all()
    assert mechanisms.clear_parts(layers(40, 0.0, 0.3, 0.1)).created_clear.all()


def test_interventions_read_other_prompts_than_their_directions(smoke):
    pairs, fitted = measuring.causal_halves(smoke, "llama")
    seen = set(smoke.measured("llama")[fitted].prompt_id)
    assert len(pairs) == smoke.preset.causal_pairs
    assert not seen & set(pairs.prompt_id)


def test_every_named_direction_stands_beside_twenty_random_ones(smoke):
    smoke.make_all("behavior", "latents")
    table = smoke.causal(SMOKE).table("interventions.parquet")
    named = table[table.kind == "named"]
    assert {"steer", "ablate", "ablate_latents", "steer samples"} == set(named.intervention)
    assert "shift from base" in set(named.name)
    drawn = table[table.kind == "random"].groupby(["intervention", "strength", "measure"]).size()
    assert (drawn % smoke.preset.random_directions == 0).all()
    assert (named.p >= 1 / 21).all()
    patched = smoke.causal(SMOKE).table("patching.parquet")
    last = patched[patched.layer == patched.layer.max()]
    np.testing.assert_allclose(last.margin_patched, last.margin_source, rtol=0.05)


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.ships and name != "published_sae"])
def test_what_is_shipped_is_what_today_asks_for(name):
    """Nothing of data/tiny is out of date, damaged or missing: nothing is trained on a reader's machine."""
    tiny, stage = study.open("tiny", progress=False), STAGES[name]
    for args in stage.wanted(tiny):
        found = tiny.store.find(stage.kind, **stage.identity(tiny, *args))
        assert found is not None and tiny.store.shipped[0] in found.path.parents, stage.label(tiny, *args)


def test_shipped_variants_have_moved_and_shipped_bases_have_learnt():
    tiny = study.open("tiny", variants="load", progress=False)
    assert all(tiny.base(family).extra["loss"] < 1 for family in tiny.families)
    assert tables.doses(tiny).dose.gt(0).all()
    files = {"adapter_config.json", "adapter_model.safetensors", "curves.parquet"}
    assert all(set(tiny.variant(v).manifest["files"]) == files for v in tiny.variants(base=False))


def test_a_damaged_shipped_artifact_is_reported(tmp_path):
    source = next((settings.home() / "data" / "tiny" / "variant").glob("llama-dpo-seed0-*"))
    copy = tmp_path / "shipped" / "variant" / source.name
    shutil.copytree(source, copy)
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    manifest = json.loads((copy / "manifest.json").read_text())
    damaged = store.Store(tmp_path / "own", tmp_path / "shipped")
    with pytest.warns(store.DamagedArtifact, match="llama-dpo-seed0"):
        found = damaged.find("variant", **{n: manifest[n] for n in ("inputs", "parameters", "version")})
    assert found is None
