"""Presets: overrides are checked, mistakes are named, notebooks and command lines give what they mean."""

import pytest

from alignlens.core import settings as presets
from alignlens.core.errors import PresetError
from alignlens.core.settings import from_notebook, resolve

RATES = dict(presets.PRESETS["tiny"].learning_rates)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_resolves_and_is_complete(name):
    preset = resolve(name)
    assert preset.name == name
    assert preset == presets.PRESETS[name]
    for method in (*preset.methods, *preset.controls, "reward"):
        assert preset.learning_rates[method] > 0


def test_a_mistyped_name_gets_a_suggestion():
    with pytest.raises(PresetError, match="'batchsize' is unknown; did you mean 'batch_size'"):
        resolve("tiny", batchsize=4)
    with pytest.raises(PresetError, match="'zzz' is unknown; known are families"):
        resolve("tiny", zzz=4)
    with pytest.raises(PresetError, match="'name' is unknown"):
        resolve("tiny", name="mine")
    with pytest.raises(PresetError, match="preset 'tinny' is unknown; choose one of smoke, tiny"):
        resolve("tinny")


@pytest.mark.parametrize(
    ("field", "given", "meant"),
    [
        ("steps", "20", 20),
        ("steps", 20.0, 20),
        ("dose", "1.5", 1.5),
        ("dose", 2, 2.0),
        ("learning_rates", {"dpo": 1e-4}, {**RATES, "dpo": 1e-4}),
        ("methods", "dpo", ("dpo",)),
        ("methods", ["dpo", "kto"], ("dpo", "kto")),
        ("controls", [], ()),
        ("seeds", 3, (3,)),
        ("seeds", ["0", "1"], (0, 1)),
        ("layers_measured", [0, 5], (0, 5)),
        ("layers_measured", "all", "all"),
        ("limit", "500", 500),
        ("micro_batch_size", 4, 4),
        ("trust_remote_code", True, True),
        ("shipped", "elsewhere", "elsewhere"),
        ("families", {"mine": "folder"}, {"mine": "folder"}),
        ("families", '{"mine": "folder"}', {"mine": "folder"}),
        ("learning_rates", '{"dpo": 1e-4}', {**RATES, "dpo": 1e-4}),
        ("steer_strengths", "0.1,0.5", (0.1, 0.5)),
        ("dose_shares", "0.2,0.5", (0.2, 0.5)),
        ("dictionary_k", 12.5, 12.5),
        ("dictionary_k", "10.0", 10),
        ("layers_measured", "3,0", (0, 3)),
    ],
)
def test_command_line_forms_become_the_fields_type(field, given, meant):
    found = getattr(resolve("tiny", **{field: given}), field)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    ("field", "given", "words"),
    [
        ("steps", "many", "steps is 'many': give a whole number"),
        ("steps", 2.5, "steps is 2.5: give a whole number"),
        ("steps", True, "steps is True"),
        ("steps", 0, "at least 1"),
        ("dose", "nan", "dose is 'nan'"),
        ("trust_remote_code", "yes", "trust_remote_code is 'yes'"),
        ("pairs", 7, "pairs is 7"),
        ("families", "llama", "give a mapping"),
        ("families", {}, "families is {}: give at least one"),
        ("seeds", [], "give at least one"),
        ("folds", 2, "folds is 2: it must be at least 3"),
        ("seeds", [0, 0], "named once"),
        ("limit", 0, "limit is 0: it must be at least 1"),
        ("dose", -1, "dose is -1: it must be above 0"),
        ("reward_share", 2, "reward_share is 2: it must be below 1"),
        ("length_bias", "inf", "length_bias is 'inf': give a finite number"),
        ("methods", ["dpo", "rlhf"], "'rlhf': choose one of ppo, dpo"),
        ("methods", ["sft"], "is 'sft': choose one of ppo"),
        ("controls", ["dpo"], "is 'dpo': choose one of sft, shuffled"),
        ("variants", "maybe", "choose one of auto, load, train"),
        ("recipe", "ours", "choose one of study, published"),
        ("stop", "never", "choose one of dose, last"),
        ("position", "first", "choose one of last, mean"),
        ("device", "tpu", "choose one of auto, cpu, cuda"),
        ("on_bad", "ignore", "choose one of refuse, drop"),
        ("position", "prompt", "position is 'prompt': choose one of last, mean"),
        ("reward_share", 0.9, "leave no share for training"),
        ("layers", 0, "layers is 0: it must be at least 1"),
        ("label_noise", 2, "label_noise is 2: it must be at most 1"),
        ("vocab_size", -1, "vocab_size is -1: it must be at least 300"),
        ("dose", "inf", "dose is 'inf': give a finite number"),
        ("jobs", -3, "jobs is -3: it must be at least 0"),
        ("learning_rates", {"dpo": -1}, r"learning_rates\[dpo\] is -1: it must be above 0"),
        ("learning_rates", {"rlhf": 1}, "rlhf"),
        ("dictionary_layers", -1, "dictionary_layers is -1: give 'spread' or whole numbers"),
        ("layers_measured", "0,6", "layers_measured names layer 6, but the base has layers 0 to 5"),
        ("steer_strengths", "0.1,0", "none may be 0"),
        ("dose_shares", "0.5,1", "it must be below 1"),
        ("random_directions", 19, "at least 20"),
        ("families", '{"a": "b"', "not valid JSON"),
    ],
)
def test_bad_values_are_named(field, given, words):
    with pytest.raises(PresetError, match=words):
        resolve("tiny", **{field: given})


def test_true_reward_needs_the_tiny_world():
    assert resolve("tiny", reward="truth").reward == "truth"
    with pytest.raises(PresetError, match="pairs from elsewhere have none"):
        resolve("tiny", reward="truth", pairs="mine.jsonl")


def test_none_keeps_the_presets_value():
    assert resolve("smoke", steps=None, families=None, limit=None) == presets.PRESETS["smoke"]


def test_an_override_does_not_leak_into_the_preset():
    before = dict(presets.PRESETS["tiny"].learning_rates)
    resolve("tiny", learning_rates={"dpo": 9.0}).learning_rates["kto"] = 9.0
    assert presets.PRESETS["tiny"].learning_rates == before
    assert RATES == before


def test_a_notebooks_globals_are_its_parameters():
    import pandas

    names = {
        "__name__": "__main__", "__builtins__": {}, "_": "", "_i": "x", "_ih": ["", "x"], "_oh": {}, "_dh": ["."],
        "In": ["", "x"], "Out": {}, "exit": object(), "quit": object(), "get_ipython": lambda: None, "open": open,
        "pandas": pandas, "preset": "smoke", "seeds": [4], "steps": None, "store": "there",
    }  # fmt: skip
    found = from_notebook(names)
    assert (found.name, found.seeds, found.store) == ("smoke", (4,), "there")
    assert found.steps == presets.PRESETS["smoke"].steps


def test_a_notebooks_stray_name_stops_it():
    with pytest.raises(PresetError, match="'seed' is unknown; did you mean 'seeds'"):
        from_notebook({"preset": "tiny", "seed": 3})


def test_no_preset_means_the_default():
    assert from_notebook({"preset": None}) == from_notebook({}) == presets.PRESETS["tiny"]


def test_paths_are_taken_from_the_projects_folder(tmp_path, monkeypatch):
    for folder in ("notebooks/exercises", "lib/alignlens"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "exercises")
    assert presets.home() == tmp_path
    assert presets.place("figures") == str(tmp_path / "figures")
    assert presets.place("s3://bucket/x") == "s3://bucket/x"
    assert presets.place(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["layers_measured", "dictionary_layers"])
def test_layers_are_numbers_or_the_one_word(name):
    assert getattr(presets.resolve("tiny", **{name: "1,3"}), name) == (1, 3)
    with pytest.raises(PresetError, match=f"{name} is 'deep': give '(all|spread)' or whole numbers"):
        presets.resolve("tiny", **{name: "deep"})
