"""The store never shows half an artifact, never trusts a damaged one, and makes each one once."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignlens.core import store as store_module
from alignlens.core.errors import StoreError
from alignlens.core.store import DamagedArtifact, Store, content_hash, ship, write_arrays, write_json, write_table

ASKED = {"inputs": {"pairs": "00ff"}, "parameters": {"rate": 1e-4, "seed": 3}, "version": 1}
fork = multiprocessing.get_context("fork")


def make_number(folder: Path, number: int = 7) -> dict:
    write_json(folder / "number.json", {"number": number})
    return {"loss": 0.5}


def refuse(folder: Path):
    raise AssertionError("the artifact was made again")


def flip_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def names(root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if ".locks" not in p.parts]


# Keys


def test_key_is_stable_across_releases():
    # A literal: if this changes, every store in the world is orphaned.
    parameters = {"rate": 0.1, "layers": (0, 2), "name": "é", "chat": True, "limit": None}
    assert Store.key("probes", inputs={"a": "1f"}, parameters=parameters, version=2) == "f60ef6d24025a900"


def test_key_ignores_order_and_sequence_type_but_not_value_or_type():
    def key(**parameters):
        return Store.key("probes", inputs={}, parameters=parameters, version=1)

    assert key(a=1, b=[2, 3]) == key(b=(2, 3), a=1) == key(b=np.array([2, 3]), a=np.int64(1))
    assert len({key(a=1), key(a=1.0), key(a=True), key(a="1"), key(a=None), key()}) == 6


def test_key_separates_stage_version_and_inputs():
    keys = {
        Store.key(stage, inputs={"x": x}, parameters={}, version=version)
        for stage in ("probes", "geometry")
        for x in ("a", "b")
        for version in (1, 2)
    }
    assert len(keys) == 8


@pytest.mark.parametrize("value", [Path("x"), float("nan"), {1: 2}, object(), os.getcwd(), {"deep": [Path("x")]}])
def test_key_refuses_what_is_not_portable(value):
    with pytest.raises(StoreError, match=r"probes\.parameters\.p"):
        Store.key("probes", inputs={}, parameters={"p": value}, version=1)


def test_key_accepts_dataclasses():
    @dataclass
    class Config:
        width: int = 4

    asked = [Store.key("probes", inputs={}, parameters={"c": c}, version=1) for c in (Config(), {"width": 4})]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("stage", ["", "Probes", "a/b", "damaged", "../up"])
def test_stage_names_are_checked(stage):
    with pytest.raises(StoreError, match="stage"):
        Store.key(stage, inputs={}, parameters={}, version=1)


# Making and finding


def test_get_makes_once_and_find_never_makes(tmp_path):
    store = Store(tmp_path)
    assert store.find("variants", **ASKED) is None
    made = store.get("variants", "llama dpo/seed 3", make_number, **ASKED)
    assert made.path.name == f"llama-dpo-seed-3-{made.key}" and made.json("number.json") == {"number": 7}
    # The label is not part of the identity.
    assert Store(tmp_path).get("variants", "other", refuse, **ASKED).path == made.path
    assert store.find("variants", **ASKED).extra == {"loss": 0.5}


def test_manifest_says_where_it_comes_from(tmp_path):
    manifest = Store(tmp_path).get("variants", "v", make_number, **ASKED).manifest
    assert manifest["inputs"] == {"pairs": "00ff"} and manifest["seed"] == 3 and manifest["version"] == 1
    assert manifest["versions"]["torch"] and manifest["versions"]["alignlens"]
    assert manifest["files"]["number.json"]["bytes"] > 0 and manifest["wall_seconds"] >= 0
    text = json.dumps(manifest)
    assert str(tmp_path) not in text and str(Path.home()) + "/" not in text and os.getcwd() not in text


def test_a_path_in_extra_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"extra\.where"):
        Store(tmp_path).get("variants", "v", lambda folder: {"where": str(folder)}, **ASKED)
    assert names(tmp_path) == ["variants"]


@pytest.mark.parametrize("label", ["", "//", "..."])
def test_empty_labels_are_refused(tmp_path, label):
    with pytest.raises(StoreError, match="label"):
        Store(tmp_path).get("variants", label, make_number, **ASKED)


def test_files_come_back_as_they_went_in(tmp_path):
    table = pd.DataFrame({"text": ["a", "é"], "score": [0.1, np.nan]})
    arrays = {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scalar": np.float64(2.5) * np.ones(())}

    def make(folder):
        (folder / "deep").mkdir()
        write_json(
            folder / "deep/facts.json", {"nan": np.nan, "inf": -np.inf, "many": np.arange(2), "x": np.float32(1)}
        )
        write_table(folder / "table.parquet", table)
        write_arrays(folder / "arrays.safetensors", arrays)

    made = Store(tmp_path).get("probes", "p", make, **ASKED)
    assert made.json("deep/facts.json") == {"nan": None, "inf": None, "many": [0, 1], "x": 1.0}
    assert made.file("deep").is_dir()
    assert made.table("table.parquet").equals(table)
    for name, array in made.arrays("arrays.safetensors").items():
        assert array.shape == arrays[name].shape and (array == arrays[name]).all()
    with pytest.raises(StoreError, match="missing.json"):
        made.file("missing.json")


# Nothing half-written


def test_a_failed_make_leaves_nothing(tmp_path):
    def make(folder):
        make_number(folder)
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get("variants", "v", make, **ASKED)
    assert names(tmp_path) == ["variants"]
    assert store.get("variants", "v", make_number, **ASKED).json("number.json") == {"number": 7}


def test_what_a_long_make_keeps_is_there_after_a_kill_and_gone_after_its_end(tmp_path):
    made = Store(tmp_path)
    identity = {"inputs": {}, "parameters": {}, "version": 1}
    working = made.working(Store.key("thing", **identity))

    def make(folder, end=True):
        working.mkdir(parents=True, exist_ok=True)
        (working / "state").touch()
        if not end:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.get("thing", "a", lambda folder: make(folder, end=False), **identity)
    assert (working / "state").exists()
    Store(tmp_path)
    assert (working / "state").exists(), "opening a store clears away what is half made, not this"
    made.get("thing", "a", make, **identity)
    assert not working.exists()


def test_links_and_foreign_manifests_are_refused(tmp_path):
    store = Store(tmp_path)
    for make in (lambda f: (f / "link").symlink_to(__file__), lambda f: write_json(f / "manifest.json", {})):
        with pytest.raises(StoreError, match="not allowed"):
            store.get("variants", "v", make, **ASKED)
    assert names(tmp_path) == ["variants"]


def slow_make(folder: Path):
    write_json(folder / "half.json", {})
    time.sleep(60)


def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
    child = fork.Process(target=lambda: Store(tmp_path).get("variants", "v", slow_make, **ASKED))
    child.start()
    deadline = time.time() + 20
    while not list(tmp_path.glob("variants/.making-*/half.json")) and time.time() < deadline:
        time.sleep(0.01)
    Store(tmp_path)  # opening a store leaves the folder of a live maker alone
    assert list(tmp_path.glob("variants/.making-*"))
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    store = Store(tmp_path)
    assert names(tmp_path) == ["variants"]
    assert store.get("variants", "v", make_number, **ASKED).json("number.json") == {"number": 7}


def count_and_make(root: Path, barrier) -> None:
    def make(folder):
        with open(root / "count", "a") as stream:
            stream.write("x")
        time.sleep(0.3)
        make_number(folder)

    barrier.wait()
    Store(root).get("variants", "v", make, **ASKED)


def test_processes_that_ask_together_make_it_once(tmp_path):
    barrier = fork.Barrier(3)
    children = [fork.Process(target=count_and_make, args=(tmp_path, barrier)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "x"


# Damage


def lose_file(path):
    (path / "number.json").unlink()


def lose_manifest(path):
    (path / "manifest.json").unlink()


def flip_file(path):
    flip_byte(path / "number.json")


def edit_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"loss": 0.5', '"loss": 0.1'))


@pytest.mark.parametrize("harm", [lose_file, lose_manifest, flip_file, edit_manifest])
def test_damage_is_reported_set_aside_and_made_again(tmp_path, harm):
    store = Store(tmp_path)
    made = store.get("variants", "v", make_number, **ASKED)
    harm(made.path)
    named = "number.json" if harm in (lose_file, flip_file) else "manifest.json"
    with pytest.warns(DamagedArtifact, match=named) as seen:
        again = store.get("variants", "v", make_number, **ASKED)
    assert len(seen) == 1 and again.json("number.json") == {"number": 7}
    assert len(list((tmp_path / "damaged/variants").iterdir())) == 1


def test_find_reports_damage_and_changes_nothing(tmp_path):
    store = Store(tmp_path)
    made = store.get("variants", "v", make_number, **ASKED)
    flip_file(made.path)
    before = names(tmp_path)
    with pytest.warns(DamagedArtifact):
        assert store.find("variants", **ASKED) is None
    assert names(tmp_path) == before


def test_files_are_hashed_once_per_process(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.get("variants", "v", make_number, **ASKED)
    monkeypatch.setattr(store_module, "_digest_file", lambda path: pytest.fail("hashed again"))
    assert store.find("variants", **ASKED)


# Shipped stores


def test_shipped_comes_first_and_is_never_written(tmp_path):
    origin = Store(tmp_path / "origin").get("variants", "v", make_number, **ASKED)
    shipped = ship(origin, tmp_path / "shipped")
    assert shipped.manifest == origin.manifest and ship(origin, tmp_path / "shipped").path == shipped.path
    before = names(tmp_path / "shipped")
    store = Store(tmp_path / "root", tmp_path / "shipped")
    assert store.get("variants", "other", refuse, **ASKED).path == shipped.path

    flip_file(shipped.path)
    with pytest.warns(DamagedArtifact, match="number.json") as seen:
        again = store.get("variants", "v", lambda folder: make_number(folder, 8), **ASKED)
    assert len(seen) == 1 and again.json("number.json") == {"number": 8}
    assert tmp_path / "root" in again.path.parents and names(tmp_path / "shipped") == before
    assert ship(origin, tmp_path / "shipped").json("number.json") == {"number": 7}


def test_a_missing_shipped_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        Store(tmp_path, tmp_path / "nowhere")


def test_a_url_is_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="s3://bucket/study is a URL: give a local folder"):
        Store("s3://bucket/study")
    assert not list(tmp_path.iterdir())


def test_every_shipped_artifact_is_found_by_its_identity(tmp_path):
    folder = Path(__file__).parents[1] / "data" / "tiny"
    store = Store(tmp_path, folder)
    manifests = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/manifest.json"))]
    assert manifests
    for known in manifests:
        found = store.find(known["stage"], **{name: known[name] for name in ("inputs", "parameters", "version")})
        assert found.key == known["key"] and found.path.name == f"{known['label']}-{known['key']}"


# Content hashes


def test_content_hash_follows_content_only(tmp_path):
    table = pd.DataFrame({"text": ["a", "b"], "score": [1.0, np.nan]})
    assert content_hash(table) == content_hash(table.set_index(pd.Index([5, 9])))
    assert content_hash(table) == content_hash(table.astype({"text": object}))
    changed = [table.rename(columns={"text": "t"}), table.assign(score=[1, 2]), table[::-1], table.to_dict("list")]
    assert len({content_hash(t) for t in [table, *changed]}) == 5
    array = np.arange(6.0).reshape(2, 3)
    assert content_hash(array) == content_hash(array.T.copy().T)
    assert len({content_hash(a) for a in (array, array.reshape(3, 2), array.astype("float32"), array + 1)}) == 4
    assert content_hash({"a": array, "b": "x"}) == content_hash({"b": "x", "a": array.copy()})
    assert len({content_hash(v) for v in ("1", 1, 1.0, True, None, ["1"], {"1": "1"}, np.nan)}) == 8
    with pytest.raises(StoreError):
        content_hash(object())


def test_content_hash_of_a_folder(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep/weights").write_bytes(b"123")
    os.utime(one / "deep/weights", (1, 1))
    (two / ".cache").write_text("ignored")
    assert content_hash(one) == content_hash(two) != content_hash(one / "deep/weights")
    (two / "deep/weights").rename(two / "deep/other")
    assert content_hash(one) != content_hash(two)
    with pytest.raises(StoreError, match="does not exist"):
        content_hash(tmp_path / "nowhere")
