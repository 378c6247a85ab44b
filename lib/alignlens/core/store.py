"""Artifacts on disk: content-addressed, verified, written beside their place and renamed into it.

    <root>/<stage>/<label>-<key>/     the files and manifest.json
    <root>/damaged/<stage>/           artifacts whose bytes no longer match their manifest
    <root>/.locks/                    one lock per key, held while the artifact is made

The key hashes what an artifact depends on (stage, inputs, parameters, stage version); the label is for readers only.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import subprocess
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePath

import fsspec
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from safetensors.numpy import load_file, save_file

from alignlens.core.errors import StoreError

MANIFEST = "manifest.json"
KEY_LENGTH = 16
LIBRARIES = ("torch", "transformers", "trl", "peft", "transformer-lens", "numpy", "scikit-learn", "alignlens")

log = logging.getLogger(__name__)
_verified: dict[Path, tuple] = {}  # folder -> sizes and times of its files when they last matched the manifest


class DamagedArtifact(UserWarning):
    """A stored artifact no longer matches its manifest; the message names the file."""


# Hashing -------------------------------------------------------------------------------------------------------------


def _plain(value, where: str, nonfinite_to_null: bool = False):
    """Value as JSON types only; refuses what would not survive a round trip or would tie it to one machine."""
    if isinstance(value, PurePath):
        raise StoreError(f"{where} is the path {value.name!r}: pass content_hash(path) as an input instead of a path")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, str) and len(value) > 1 and os.path.isabs(value) and os.path.exists(value):
        raise StoreError(f"{where} is the path of a local file or folder: pass its content_hash as an input instead")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if nonfinite_to_null:
            return None
        raise StoreError(f"{where} is {value}: JSON has no such number; leave it out or use None")
    if isinstance(value, dict):
        if bad := [name for name in value if not isinstance(name, str)]:
            raise StoreError(f"{where} has the key {bad[0]!r}: keys must be strings")
        return {name: _plain(item, f"{where}.{name}", nonfinite_to_null) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", nonfinite_to_null) for i, item in enumerate(value)]
    raise StoreError(
        f"{where} is a {type(value).__name__}: only JSON types, numpy values and dataclasses can be stored"
    )


def _canonical(value) -> bytes:
    """One byte string per JSON value: keys sorted, floats by repr, so 1, 1.0 and true stay apart."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _digest_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def content_hash(value) -> str:
    """Hash of what a value holds, for use as an input of an artifact: 16 hex characters.

    value: DataFrame (column names, dtypes of numbers, values; not the index), numpy array (dtype, shape, values),
    `Path` of a file or of a folder such as a local model (relative names and bytes, hidden files and times ignored),
    or JSON types, with any of these inside a dict or list. Raises StoreError for anything else or a missing path.
    """
    if isinstance(value, PurePath):
        path = Path(value)
        if not path.exists():
            raise StoreError(f"{path} does not exist, so its content cannot be hashed")
        if path.is_file():
            body = ["file", _digest_file(path)]
        else:
            names = [(file, file.relative_to(path)) for file in _files(path)]
            shown = [(file, name) for file, name in names if not any(part.startswith(".") for part in name.parts)]
            body = ["folder", [[name.as_posix(), _digest_file(file)] for file, name in shown]]
    elif isinstance(value, pd.DataFrame):
        body = ["table", [[str(name), content_hash(value[name])] for name in value.columns]]
    elif isinstance(value, pd.Series):
        numeric = pd.api.types.is_numeric_dtype(value.dtype) and isinstance(value.dtype, np.dtype)
        body = content_hash(value.to_numpy()) if numeric else content_hash(value.astype(object).tolist())
    elif isinstance(value, np.ndarray) and value.dtype.kind not in "OU":
        raw = np.asarray(value, order="C")
        body = ["array", raw.dtype.str, list(raw.shape), hashlib.sha256(raw.tobytes()).hexdigest()]
    elif isinstance(value, dict):
        body = ["dict", {str(name): content_hash(item) for name, item in value.items()}]
    elif isinstance(value, list | tuple | np.ndarray):
        body = ["list", [content_hash(item) if not isinstance(item, str) else item for item in list(value)]]
    elif value is pd.NA or value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)):
        body = ["not finite", str(value)]
    else:
        body = ["value", value if isinstance(value, str) else _plain(value, "value")]
    return hashlib.sha256(_canonical(body)).hexdigest()[:KEY_LENGTH]


# Files ---------------------------------------------------------------------------------------------------------------


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

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def label(self) -> str:
        return self.manifest["label"]

    @property
    def extra(self) -> dict:
        return self.manifest["extra"]

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


# Manifests -----------------------------------------------------------------------------------------------------------


@functools.cache
def _versions() -> dict[str, str | None]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout this file is tracked in (with -dirty if edited), None for an installed copy."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _sealed(manifest: dict) -> str:
    """Digest of a manifest without its own seal."""
    return hashlib.sha256(_canonical({name: v for name, v in manifest.items() if name != "seal"})).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(folder: Path) -> Artifact:
    """The artifact in a folder; StoreError names the file that is missing or changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        intact = manifest["seal"] == _sealed(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not intact:
        raise StoreError(f"{folder / MANIFEST} was changed after it was written")
    marks = []
    for name, known in manifest["files"].items():
        if not (folder / name).is_file():
            raise StoreError(f"{folder / name} is missing")
        stat = (folder / name).stat()
        if stat.st_size != known["bytes"]:
            raise StoreError(f"{folder / name} has {stat.st_size} bytes, its manifest says {known['bytes']}")
        marks.append((name, known["sha256"], stat.st_mtime_ns, stat.st_ino))
    # Hashing gigabytes at every look-up would be slow: once per process, unless a file was touched since.
    if _verified.get(folder) != tuple(marks):
        for name, known in manifest["files"].items():
            if _digest_file(folder / name) != known["sha256"]:
                raise StoreError(f"{folder / name} does not match the sha256 in its manifest")
        _verified[folder] = tuple(marks)
    return Artifact(folder, manifest)


# The store -----------------------------------------------------------------------------------------------------------


class Store:
    """A folder of artifacts.

    root: local folder, or an fsspec URL such as s3://bucket/study, mirrored through a local cache folder (locks then
    hold between processes of one machine only). shipped: read-only store folders that are looked up first.
    Raises StoreError if a shipped folder does not exist.
    """

    def __init__(self, root: str | Path, shipped: str | Path | list | None = None):
        root = str(root).removeprefix("file://")
        self._remote = None
        self._reported: set[tuple[Path, str]] = set()
        if "://" in root:
            self._remote = fsspec.core.url_to_fs(root)
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignlens"
            root = cache / hashlib.sha256(root.encode()).hexdigest()[:KEY_LENGTH]
        self.root = Path(root).expanduser().absolute()
        shipped = [] if shipped is None else [shipped] if isinstance(shipped, str | Path) else shipped
        self.shipped = [Path(folder).expanduser().absolute() for folder in shipped]
        for folder in self.shipped:
            if not folder.is_dir():
                raise StoreError(f"the shipped store {folder} does not exist: check the path or leave it out")
        (self.root / ".locks").mkdir(parents=True, exist_ok=True)
        self._sweep()

    @staticmethod
    def key(stage: str, *, inputs: dict[str, str], parameters: dict, version: int | str) -> str:
        """Identity of an artifact: 16 hex characters of the sha256 of its canonical JSON.

        inputs: name → key or content_hash of what it is made from. parameters: JSON types, dataclasses, numpy values.
        version: raised by hand when the stage's results change. Order of names does not matter, tuples equal lists,
        1, 1.0 and True differ. Raises StoreError for paths, non-finite numbers and other types.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", stage) or stage == "damaged":
            raise StoreError(f"stage {stage!r}: use lower-case letters, digits, _ and -, and not 'damaged'")
        for name, value in inputs.items():
            if not isinstance(value, str):
                raise StoreError(f"input {name!r} of {stage} is a {type(value).__name__}: pass a key or a content_hash")
        identity = {"stage": stage, "inputs": inputs, "parameters": parameters, "version": version}
        return hashlib.sha256(_canonical(_plain(identity, stage))).hexdigest()[:KEY_LENGTH]

    def find(self, stage: str, *, inputs: dict[str, str], parameters: dict, version: int | str) -> Artifact | None:
        """The artifact if it is stored and intact, else None; a damaged one is reported. Makes nothing."""
        key = self.key(stage, inputs=inputs, parameters=parameters, version=version)
        found = self._lookup(stage, key)
        if found is None and self._remote is not None:
            with self._lock(key):
                found = self._fetch(stage, key)
        return found

    def get(
        self,
        stage: str,
        label: str,
        make: Callable[[Path], dict | None],
        *,
        inputs: dict[str, str],
        parameters: dict,
        version: int | str,
    ) -> Artifact:
        """The stored artifact, or the one that `make` writes.

        make(folder) writes its files into an empty folder and may return a dict of small facts (kept as `extra`).
        If it raises, nothing is left behind. Processes that ask for the same key wait for the first one. A damaged
        artifact is reported, set aside under `damaged/` (shipped ones stay) and made again. `label` names the folder.
        Raises StoreError for inputs that cannot be hashed or files that cannot be stored.
        """
        key = self.key(stage, inputs=inputs, parameters=parameters, version=version)
        found = self._lookup(stage, key, "defer")
        if found is None:
            with self._lock(key):
                found = self._lookup(stage, key, "set aside") or self._fetch(stage, key)
                if found is None:
                    identity = {"stage": stage, "label": _slug(label), "key": key, "version": version}
                    identity |= {"inputs": inputs, "parameters": parameters}
                    if "seed" in parameters:
                        identity["seed"] = parameters["seed"]
                    found = self._make(identity, make)
        self._push(found)
        return found

    def _make(self, identity: dict, make: Callable[[Path], dict | None]) -> Artifact:
        place = self.root / identity["stage"] / f"{identity['label']}-{identity['key']}"
        with _beside(place) as folder:
            start = time.perf_counter()
            extra = make(folder)
            seconds = time.perf_counter() - start
            if extra is not None and not isinstance(extra, dict):
                raise StoreError(f"make of {place.name} returned a {type(extra).__name__}: return a dict or None")
            files = _files(folder)
            for file in files:
                if file.is_symlink() or file.name == MANIFEST and file.parent == folder:
                    raise StoreError(f"make of {place.name} wrote {file.name}: links and {MANIFEST} are not allowed")
                _sync(file)
            named = {file.relative_to(folder).as_posix(): file for file in files}
            manifest = identity | {
                "versions": _versions(),
                "git_commit": git_commit(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "wall_seconds": round(seconds, 3),
                "files": {name: {"sha256": _digest_file(f), "bytes": f.stat().st_size} for name, f in named.items()},
                "extra": extra or {},
            }
            manifest = _plain(manifest, place.name, nonfinite_to_null=True)
            write_json(folder / MANIFEST, manifest | {"seal": _sealed(manifest)})
            _sync(folder / MANIFEST)
            _sync(folder)
            _move_in(folder, place)
        return _load(place)

    def _lookup(self, stage: str, key: str, damaged: str = "report") -> Artifact | None:
        """The first intact artifact. damaged: report | set aside (with the lock only) | defer to a second look-up."""
        for root in [*self.shipped, self.root]:
            for folder in sorted((root / stage).glob(f"[!.]*-{key}")):
                try:
                    return _load(folder)
                except StoreError as error:
                    outcome = "not used"
                    if root == self.root and damaged == "defer":
                        continue
                    if root == self.root and damaged == "set aside":
                        aside = self.root / "damaged" / stage / f"{folder.name}-{uuid.uuid4().hex[:8]}"
                        aside.parent.mkdir(parents=True, exist_ok=True)
                        os.rename(folder, aside)
                        outcome = f"set aside in {aside} and made again"
                    if (folder, outcome) not in self._reported:
                        self._reported.add((folder, outcome))
                        warnings.warn(f"damaged artifact: {error}; {outcome}", DamagedArtifact, stacklevel=3)
        return None

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Exclusive between threads and processes; the system releases it when its holder dies."""
        lock = FileLock(self.root / ".locks" / f"{key}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s is being made by another process: waiting for it", key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Remove temporary folders whose maker is dead, that is, whose key nobody holds the lock of."""
        for folder in self.root.glob("*/.making-*"):
            key = folder.name.split("-")[1]
            with contextlib.suppress(Timeout), FileLock(self.root / ".locks" / f"{key}.lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)

    # A URL is a mirror of the local root: artifacts are copied whole, the manifest last, so half a copy is never seen.

    def _fetch(self, stage: str, key: str) -> Artifact | None:
        if self._remote is None:
            return None
        files, base = self._remote
        for source in files.glob(f"{base}/{stage}/*-{key}/{MANIFEST}"):
            source = source.removesuffix(f"/{MANIFEST}")
            place = self.root / stage / source.rsplit("/", 1)[1]
            with _beside(place) as folder:
                files.get_file(f"{source}/{MANIFEST}", str(folder / MANIFEST))
                for name in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    files.get_file(f"{source}/{name}", str(folder / name))
                _move_in(folder, place)
        found = self._lookup(stage, key, "set aside")
        if found is None:
            for source in files.glob(f"{base}/{stage}/*-{key}"):
                files.rm(source, recursive=True)
        return found

    def _push(self, artifact: Artifact) -> None:
        if self._remote is None or self.root not in artifact.path.parents:
            return
        files, base = self._remote
        target = f"{base}/{artifact.stage}/{artifact.path.name}"
        if files.exists(f"{target}/{MANIFEST}"):
            return
        for name in [*artifact.manifest["files"], MANIFEST]:
            files.makedirs(f"{target}/{name}".rsplit("/", 1)[0], exist_ok=True)
            files.put_file(str(artifact.path / name), f"{target}/{name}")


def _slug(label: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.")[:80]
    if not slug:
        raise StoreError(f"label {label!r} has no letter or digit to name a folder with")
    return slug


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """Temporary folder on the same disk as its place, gone afterwards unless it was renamed into place."""
    key = place.name.rsplit("-", 1)[1]
    folder = place.parent / f".making-{key}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_in(folder: Path, place: Path) -> None:
    try:
        os.rename(folder, place)
    except OSError:
        if not (place / MANIFEST).is_file():  # otherwise somebody without our lock was first: theirs is as good
            raise
    _sync(place.parent)


def ship(artifact: Artifact, destination: str | Path) -> Artifact:
    """Copy an artifact, manifest unchanged, into another local store folder; an intact copy there is kept.

    Raises StoreError if the artifact is damaged.
    """
    _load(artifact.path)
    place = Path(destination).absolute() / artifact.stage / artifact.path.name
    if place.is_dir():
        try:
            return _load(place)
        except StoreError:
            shutil.rmtree(place)
    with _beside(place) as folder:
        for name in [*artifact.manifest["files"], MANIFEST]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, folder / name)
        _move_in(folder, place)
    return _load(place)
