"""Artifacts on disk: content-addressed, verified, written beside their place and renamed into it.

``<root>/<stage>/<label>-<key>/`` holds the files and manifest.json; the key hashes what they depend on (stage, inputs,
parameters, stage version), the label is for readers only. ``<root>/damaged/<stage>/`` holds what no longer matches its
manifest, ``<root>/.locks/`` one lock per key, held while the artifact is made, ``<root>/.resuming/<key>/`` what a long
make keeps so that it can go on after a kill."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePath

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from safetensors.numpy import load_file, save_file

from alignlens import __version__
from alignlens.core.errors import StoreError
from alignlens.core.files import MAKING, replacing_folder

MANIFEST = "manifest.json"
PROGRESS = "progress"  # of a folder in .resuming: how far its make is, in words
KEY_LENGTH = 16
LIBRARIES = ("torch", "transformers", "trl", "peft", "transformer-lens", "numpy", "scikit-learn")
_verified: dict[Path, list] = {}  # folder -> sizes and times of its files when they last matched the manifest


class DamagedArtifact(UserWarning):
    """A stored artifact no longer matches its manifest; the message names the file."""


def _plain(value, where: str, nonfinite_to_null: bool = False):
    """Value as JSON types only; refuses what would not survive a round trip or would tie it to one machine."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not np.isfinite(value):
        if nonfinite_to_null:
            return None
        raise StoreError(f"{where} is {value}: JSON has no such number; leave it out or use None")
    local = isinstance(value, str) and len(value) > 1 and os.path.isabs(value) and os.path.exists(value)
    if local or isinstance(value, PurePath):
        raise StoreError(f"{where} is a path of this machine: pass its content_hash as an input instead")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        if bad := [name for name in value if not isinstance(name, str)]:
            raise StoreError(f"{where} has the key {bad[0]!r}: keys must be strings")
        return {name: _plain(item, f"{where}.{name}", nonfinite_to_null) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", nonfinite_to_null) for i, item in enumerate(value)]
    raise StoreError(f"{where} is a {type(value).__name__}: store only JSON types, numpy values and dataclasses")


def _digest(value) -> str:
    """Sha256 of one byte string per JSON value: keys sorted, floats by repr, so 1, 1.0 and true stay apart."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_file(path: Path) -> str:
    with open(path, "rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Name within the folder -> path, of all files and links, sorted by path."""
    found = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in found}


def content_hash(value) -> str:
    """Hash of what a value holds, for use as an input of an artifact: 16 hex characters.

    value: DataFrame (column names, dtypes of numbers, values; not the index), numpy array (dtype, shape, values),
    `Path` of a file or of a folder such as a local model (relative names and bytes, hidden files and times ignored),
    or JSON types, with any of these inside a dict or list. Raises StoreError for anything else or a missing path."""
    return _digest(_content(value))[:KEY_LENGTH]


def _content(value):
    """What is hashed of a value: JSON types that begin with its kind."""
    if isinstance(value, PurePath):
        if not os.path.exists(value):
            raise StoreError(f"{value} does not exist, so its content cannot be hashed")
        if os.path.isfile(value):
            return ["file", _digest_file(value)]
        shown = [(name, file) for name, file in _files(Path(value)).items() if not re.search(r"(^|/)\.", name)]
        return ["folder", [[name, _digest_file(file)] for name, file in shown]]
    if isinstance(value, pd.DataFrame):
        return ["table", [[str(name), content_hash(value[name])] for name in value.columns]]
    if isinstance(value, pd.Series):
        numeric = pd.api.types.is_numeric_dtype(value.dtype) and isinstance(value.dtype, np.dtype)
        return content_hash(value.to_numpy() if numeric else value.astype(object).tolist())
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OU":
        raw = np.asarray(value, order="C")
        return ["array", raw.dtype.str, list(raw.shape), hashlib.sha256(raw.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return ["dict", {str(name): content_hash(item) for name, item in value.items()}]
    if isinstance(value, list | tuple | np.ndarray):
        return ["list", [item if isinstance(item, str) else content_hash(item) for item in list(value)]]
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and not np.isfinite(value)):
        return ["not finite", str(value)]
    return ["value", value if isinstance(value, str) else _plain(value, "value")]


def write_json(path: Path, value) -> None:
    """Strict JSON, keys in the order given; NaN and infinities become null."""
    text = json.dumps(_plain(value, Path(path).name, nonfinite_to_null=True), indent=1, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Parquet; the index is not kept (reset_index first if it means something)."""
    table.to_parquet(path, index=False, compression="zstd")


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Safetensors of numeric arrays, made C-contiguous first: safetensors ignores strides."""
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A verified artifact: its folder and what its manifest says."""

    path: Path
    manifest: dict

    key = property(lambda self: self.manifest["key"])
    extra = property(lambda self: self.manifest["extra"])

    def file(self, name: str) -> Path:
        """Path of one of its files (or of a folder of them); StoreError if the manifest has no such name."""
        if not any(known == name or known.startswith(f"{name}/") for known in self.manifest["files"]):
            raise StoreError(f"{self.path} has no {name!r}; it has {', '.join(self.manifest['files']) or 'no files'}")
        return self.path / name

    def json(self, name: str):
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.file(name))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.file(name))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this library and of those that results depend on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES} | {"alignlens": __version__}


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout this file is tracked in (with -dirty if edited), None for an installed copy."""
    here = Path(__file__)
    options = {"cwd": here.parent, "stderr": subprocess.DEVNULL, "text": True}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.check_output(["git", "ls-files", "--error-unmatch", here.name], **options)
        described = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.check_output(described, **options).strip()


def _load(folder: Path) -> Artifact:
    """The artifact in a folder; StoreError names the file that is missing or changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("seal") != _digest(manifest):
            raise ValueError("it was changed after it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder / MANIFEST} cannot be used: {error}") from error
    known = {folder / name: facts["sha256"] for name, facts in manifest["files"].items()}
    if missing := [path for path in known if not path.is_file()]:
        raise StoreError(f"{missing[0]} is missing")
    # Hashing gigabytes at every look-up would be slow: once per process, unless a file was touched since.
    marks = [(path, known[path], (s := path.stat()).st_size, s.st_mtime_ns, s.st_ino) for path in known]
    if _verified.get(folder) != marks:
        if changed := [path for path, digest in known.items() if _digest_file(path) != digest]:
            raise StoreError(f"{changed[0]} does not match the sha256 in its manifest")
        _verified[folder] = marks
    return Artifact(folder, manifest)


def _fill(folder: Path, make: Callable[[Path], dict | None], identity: dict) -> None:
    """Have the files made, and write their manifest: whose they are, how they came about, what they hold."""
    name, start = f"{identity['label']}-{identity['key']}", time.perf_counter()
    extra, seconds, files = make(folder), time.perf_counter() - start, _files(folder)
    if bad := [file for file, path in files.items() if path.is_symlink() or file == MANIFEST]:
        raise StoreError(f"make of {name} wrote {bad[0]}: links and {MANIFEST} are not allowed")
    manifest = identity | {
        "seed": identity["parameters"].get("seed"), "versions": versions(), "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "wall_seconds": round(seconds, 3),
        "files": {file: {"sha256": _digest_file(p), "bytes": p.stat().st_size} for file, p in files.items()},
        "extra": dict(extra or {}),
    }  # fmt: skip
    manifest = _plain(manifest, name, nonfinite_to_null=True)
    write_json(folder / MANIFEST, manifest | {"seal": _digest(manifest)})


class Store:
    """A folder of artifacts; ``shipped`` is a read-only store folder that is looked up first.

    Raises StoreError for a URL, or if the shipped folder does not exist."""

    def __init__(self, root: str | Path, shipped: str | Path | None = None):
        if "://" in str(root):
            raise StoreError(f"the store {root} is a URL: give a local folder, and copy or mount it from there")
        self.root = Path(root).expanduser().absolute()
        self.shipped = [] if shipped is None else [Path(shipped).expanduser().absolute()]
        if self.shipped and not self.shipped[0].is_dir():
            raise StoreError(f"the shipped store {shipped} does not exist: check the path or leave it out")
        self._reported: set[Path] = set()
        (self.root / ".locks").mkdir(parents=True, exist_ok=True)
        for folder in self.root.glob(f"*/{MAKING}*"):  # left by a dead maker if nobody holds the lock of its key
            with contextlib.suppress(Timeout), self._lock(folder.name.rsplit("-", 1)[1], timeout=0):
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def key(stage: str, *, inputs: dict[str, str], parameters: dict, version: int | str) -> str:
        """Identity of an artifact: 16 hex characters of the sha256 of its canonical JSON.

        inputs: name -> key or content_hash of what it is made from. parameters: JSON types, dataclasses, numpy values.
        version: raised by hand when the stage's results change. Order of names does not matter, tuples equal lists,
        1, 1.0 and True differ. Raises StoreError for paths, non-finite numbers and other types."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", stage) or stage == "damaged":
            raise StoreError(f"stage {stage!r}: use lower-case letters, digits, _ and -, and not 'damaged'")
        if bad := [name for name, value in inputs.items() if not isinstance(value, str)]:
            raise StoreError(f"input {bad[0]!r} of {stage} is no text: pass a key or a content_hash")
        identity = {"stage": stage, "inputs": inputs, "parameters": parameters, "version": version}
        return _digest(_plain(identity, stage))[:KEY_LENGTH]

    def find(self, stage: str, **identity) -> Artifact | None:
        """The artifact if it is stored and intact, else None; a damaged one is reported. identity: as for ``key``."""
        return self._lookup(stage, self.key(stage, **identity))

    def get(self, stage: str, label: str, make: Callable[[Path], dict | None], **identity) -> Artifact:
        """The stored artifact, or the one that ``make`` writes.

        identity: inputs, parameters and version, as for ``key``. make(folder) writes its files into an empty folder and
        may return a dict of small facts (kept as ``extra``); if it raises, nothing is left behind. Processes that ask
        for the same key wait for the first one. A damaged artifact is reported, set aside under ``damaged/`` (shipped
        ones stay) and made again. Raises StoreError for inputs that cannot be hashed or files that cannot be stored."""
        key = self.key(stage, **identity)
        if found := self._lookup(stage, key):
            return found
        with self._lock(key):
            if found := self._lookup(stage, key):
                return found
            for damaged in (self.root / stage).glob(f"[!.]*-{key}"):
                aside = self.root / "damaged" / stage / f"{damaged.name}-{time.time_ns()}"
                aside.parent.mkdir(parents=True, exist_ok=True)
                damaged.rename(aside)
                self._reported.discard(damaged)
            slug = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.")[:80]
            if not slug:
                raise StoreError(f"label {label!r} has no letter or digit to name a folder with")
            place, named = self.root / stage / f"{slug}-{key}", {"stage": stage, "label": slug, "key": key}
            # If it is there by now, somebody without our lock was first, and theirs is as good as ours.
            with contextlib.suppress(FileExistsError), replacing_folder(place) as folder:
                _fill(folder, make, named | identity)
            shutil.rmtree(self.working(key), ignore_errors=True)
            return _load(place)

    def working(self, key: str) -> Path:
        """Where a long ``make`` keeps what it needs to go on after a kill; removed once its artifact is stored."""
        return self.root / ".resuming" / key

    def _lookup(self, stage: str, key: str) -> Artifact | None:
        """The first intact artifact; damaged ones are reported."""
        roots = (root / stage for root in [*self.shipped, self.root])
        for folder in (folder for root in roots for folder in sorted(root.glob(f"[!.]*-{key}"))):
            try:
                return _load(folder)
            except StoreError as error:
                if folder not in self._reported:
                    self._reported.add(folder)
                    warnings.warn(f"{error}: not used, but made again when needed", DamagedArtifact, stacklevel=3)
        return None

    def _lock(self, key: str, **options) -> FileLock:
        """Exclusive between threads and processes; the system releases it when its holder dies."""
        return FileLock(self.root / ".locks" / f"{key}.lock", **options)


def ship(artifact: Artifact, destination: str | Path) -> Artifact:
    """Copy an undamaged artifact, manifest unchanged, into another store folder; an intact copy there is kept."""
    _load(artifact.path)
    place = Path(destination).absolute() / artifact.manifest["stage"] / artifact.path.name
    with contextlib.suppress(StoreError):
        return _load(place)
    shutil.rmtree(place, ignore_errors=True)
    with replacing_folder(place) as folder:
        shutil.copytree(artifact.path, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return _load(place)
