"""From a source (file, folder, glob, hub data set, table, list) to its rows, each with the place that names it."""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet

from alignlens.core.errors import PreferenceError
from alignlens.core.hub import asked_once
from alignlens.preferences.layouts import TEXT_COLUMNS
from alignlens.preferences.prompts import Unusable

UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SPLIT_FORMS = {"train(ing)?": "train", "test|eval": "test", "val(id(ation)?)?|dev": "validation"}  # in files' names


def _datasets():
    import datasets  # noqa: PLC0415  slow to import, and needed for few sources

    return datasets


def _read_json(content):
    """A list of objects, one object that may hold the list, or one object a line."""
    text = content.decode(json.detect_encoding(content))  # spreadsheets on Windows write UTF-16
    try:
        found = json.loads(text)
    except ValueError:
        if re.match(r"\s*\[\s*[{\]]", text):
            raise
        # split("\n"), not splitlines(): that one also breaks at \x1e and at unicode line ends inside texts
        return [(f"line {n}", _read_line(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(found, dict) and len(found) == 1 and isinstance(*found.values(), list):
        [found] = found.values()
    return found if isinstance(found, list) else [("line 1", found)]


def _read_line(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also of a number of thousands of digits
        words = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return Unusable(f"broken JSON ({words})", kind="broken_json")


def _read_csv(content, separator=","):
    header = pd.read_csv(io.BytesIO(content), sep=separator, nrows=0, index_col=False).columns
    text = {column: str for column in header if column.strip().lower() in TEXT_COLUMNS}  # there "NA" and "12" are texts
    options = {"sep": separator, "dtype": text, "keep_default_na": False, "index_col": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more fields than the header would lose them
        return pd.read_csv(io.BytesIO(content), **options)


def _read_parquet(content):
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    if b'"Json"' not in (table.schema.metadata or {}).get(b"huggingface", b""):
        return table.to_pandas()
    return _datasets().Dataset(table).to_pandas()  # it alone reads back what its JSON columns hold


READERS = {
    ".jsonl": _read_json, ".json": _read_json, ".ndjson": _read_json, ".csv": _read_csv,
    ".tsv": lambda content: _read_csv(content, "\t"), ".parquet": _read_parquet,
}  # fmt: skip
ADVICE = f"Give a table, a {', '.join(READERS)} file (also as .gz, .bz2 or .xz), a folder or glob of them, or a hub id"


def _suffix(path):
    """The suffix of a file in lower case, without that of its packing."""
    path = Path(str(path).lower())
    return Path(path.stem if path.suffix in UNPACK else path.name).suffix


def is_local(source):
    """Whether a source of pairs is meant to be here (a path, a glob, a table) rather than a data set on the hub."""
    if not isinstance(source, str):
        return True
    path = os.path.expanduser(source)
    looks = path.startswith((".", "/")) or path.count("/") > 1 or glob.has_magic(path)
    known = path.lower().endswith((*READERS, *UNPACK, ".txt", ".xlsx", ".zip", ".pkl", ".arrow"))
    return known or os.path.exists(path) or (looks and "://" not in path)


def _one_split(splits, wanted):
    """The split that was asked for, or the only one there is."""
    name = next((name for name in (f"{wanted}_prefs", wanted) if name in splits), None)
    if name is None and len(splits) != 1:
        raise PreferenceError(f"no split {wanted!r}; it has {', '.join(map(str, splits)) or 'none'}. Give split=")
    return splits[name or next(iter(splits))]


def _folder(path):
    """The files of a folder that can be read, by the split that their names tell."""
    splits = {}
    for file in sorted(path.rglob("*")):
        inside = str(file.relative_to(path)).lower()
        if _suffix(file) in READERS and not re.search(r"(^|/)(\.|dataset_info)", inside):
            words = re.findall("[a-z]+", inside)
            split = next((name for word in words for form, name in SPLIT_FORMS.items() if re.fullmatch(form, word)), "")
            splits.setdefault(split + "_prefs" * ("prefs" in words), []).append(file)
    if not splits:
        raise PreferenceError(f"the folder holds no file that can be read. {ADVICE}")
    return splits


def _read_path(source, split):
    """The (place, row) list of a file; for any other path what it stands for: a data set, or a list of files."""
    path = Path(source).expanduser()
    if path.is_file():
        if (suffix := _suffix(path)) not in READERS:
            raise PreferenceError(f"files that end in {path.suffix!r} cannot be read. {ADVICE}")
        with UNPACK.get(path.suffix.lower(), open)(path, "rb") as file:
            return READERS[suffix](file.read())
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _datasets().load_from_disk(path)
    if path.is_dir():
        return _one_split(_folder(path), split)
    if found := sorted(glob.glob(str(path), recursive=True)):
        return found
    if is_local(source):
        raise PreferenceError(f"no such file. Give an existing {', '.join(READERS)} file or a hub id")
    return _read_hub(*source.partition("@")[::2], split)


def _read_hub(name, revision, split):
    with asked_once() as away:
        try:
            return _datasets().load_dataset(name, split=split, revision=revision or None)
        except ValueError as error:
            if f"{split}_prefs" not in str(error):  # as some call the pairs beside texts for fine-tuning
                raise
            return _datasets().load_dataset(name, split=f"{split}_prefs", revision=revision or None)
        except OSError as error:
            if not away:
                raise
            raise ConnectionError(away) from error


def _read(source, split):
    """(place, row) of the rows of any source."""
    if isinstance(source, str | Path):
        source = _read_path(source, split)
    if hasattr(source, "to_pandas"):  # a Dataset, a polars or an Arrow table
        source = source.to_pandas()
    if isinstance(source, Mapping):
        if not all(isinstance(values, list) for values in source.values()):
            return _read(_one_split(source, split), split)
        source = pd.DataFrame(dict(source))
    if isinstance(source, pd.DataFrame):
        if len(set(map(str, source.columns))) < len(source.columns):
            raise PreferenceError(f"two columns have one name: {', '.join(map(str, source.columns))}. Rename one")
        source = source.to_dict("records")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise PreferenceError(ADVICE)
    rows = []
    for number, item in enumerate(source, 1):
        if isinstance(item, str | Path):
            rows += [(f"{Path(item).name} {place}", row) for place, row in _read(item, split)]
        else:
            rows.append(item if isinstance(item, tuple) and len(item) == 2 else (f"row {number}", item))
    return rows


def read_source(source, split):
    """The name of a source, the places that name its rows, and the rows: dicts, or an Unusable where one is broken.

    Raises PreferenceError, which names the source, for what cannot be read."""
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    try:
        found = _read(source, split)
        places, rows = [place for place, _ in found], [row for _, row in found]
    except PreferenceError as error:
        raise PreferenceError(f"{name}: {error}.") from error
    except Exception as error:  # readers and the hub raise many unrelated types; the user needs one clear sentence
        has = f"{ADVICE} whose data set has a split {split!r}."
        raise PreferenceError(f"{name}: cannot be read ({type(error).__name__}: {error}). {has}") from error
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):  # its columns are called by text that can be written
            rows[number] = {str(column).encode(errors="replace").decode(): value for column, value in row.items()}
    return name, places, rows
