"""What is written beside a place takes it whole, or leaves it as it was."""

import os

import pytest

from alignlens.core.files import replacing, replacing_folder


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with replacing(path) as beside:
        beside.write_text("one")
        assert beside.suffix == ".csv" and not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and os.listdir(path.parent) == ["table.csv"]
    with replacing(path) as beside:
        beside.write_text("two")
    assert path.read_text() == "two" and os.listdir(path.parent) == ["table.csv"]


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()  # an empty one gives way
    with replacing_folder(folder) as beside:
        (beside / "deep").mkdir()
        (beside / "deep/a").write_text("one")
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "failed") as beside:
        (beside / "a").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError, match="made is there already"), replacing_folder(folder) as beside:
        (beside / "a").write_text("two")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "made", "made/deep", "made/deep/a",
    ]  # fmt: skip


def test_new_files_can_join_a_folder(tmp_path):
    (tmp_path / "old").write_text("kept")
    (tmp_path / "page").write_text("one")
    with replacing_folder(tmp_path, merge=True) as beside:
        (beside / "page").write_text("two")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "kept", "page": "two"}
