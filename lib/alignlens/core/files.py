"""Write beside, then rename: a reader finds the old file or folder or the new one, never half of one."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

MAKING = ".making-"  # unfinished files and folders are called .making-<8 hex digits>-<name>


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside ``path``: takes its place when the block ends well, is removed when it does not."""
    path = Path(path)
    beside = _beside(path)
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path, *, merge: bool = False) -> Iterator[Path]:
    """An empty folder beside ``path``, as ``replacing``. One at ``path`` gives way if it is empty; if it holds files,
    raises FileExistsError, or with ``merge`` puts the new files (none in folders) among them one by one."""
    path = Path(path)
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        for made in [*beside.rglob("*"), beside]:
            _sync(made)
        if merge and path.is_dir():
            for made in beside.iterdir():
                os.replace(made, path / made.name)
        else:
            try:
                os.replace(beside, path)
            except OSError as error:
                raise (FileExistsError(f"{path} is there already") if path.exists() else error) from None
        _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{MAKING}{uuid.uuid4().hex[:8]}-{path.name}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
