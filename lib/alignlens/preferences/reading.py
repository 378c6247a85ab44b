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
from alignlens.preferences.layouts import TEXT_COLUMNS
from alignlens.preferences.rows import BadRow

UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "eval": "test"}
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def _read_json(content):
    """A list of objects, one object, or one object a line."""
    text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig").read()
    try:
        found = json.loads(text)
    except ValueError:
        if re.match(r"\s*\[\s*[{\]]", text):
            raise
        # split("\n"), not splitlines(): that one also breaks at \x1e and at unicode line ends inside texts
        return [(f"line {n}", _read_line(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else [found]
    if len(lists) == len(found) == 1 and lists[0] and isinstance(lists[0][0], dict):
        found = lists[0]  # {"data": [rows]}
    return _places(found if isinstance(found, list) else [found])


def _read_line(line):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow("broken_json", None, f"broken JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists within lists within lists
        return BadRow("broken_json", None, f"broken JSON ({error})")


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
    import datasets  # noqa: PLC0415  slow to import; it alone reads back what its JSON columns hold

    return datasets.Dataset(table).to_pandas()


READERS = {
    ".jsonl": _read_json, ".json": _read_json, ".ndjson": _read_json, ".csv": _read_csv,
    ".tsv": lambda content: _read_csv(content, "\t"), ".parquet": _read_parquet,
}  # fmt: skip
SUFFIXES = tuple(READERS)
ADVICE = f"Give a table, a {', '.join(SUFFIXES)} file (also as .gz, .bz2 or .xz), a folder or glob of them, or a hub id"


def _suffix(path):
    """The suffix in lower case without that of its packing, and what opens the file."""
    name = Path(str(path).lower())
    packed = name.suffix in UNPACK
    return Path(name.stem).suffix if packed else name.suffix, UNPACK[name.suffix] if packed else open


def is_local(source):
    """Whether a source of pairs is meant to be here (a path, a glob, a table) rather than a data set on the hub."""
    if not isinstance(source, str):
        return True
    path = os.path.expanduser(source)
    looks = path.startswith((".", "/")) or path.count("/") > 1 or glob.has_magic(path)
    return _suffix(path)[0] in READERS or os.path.exists(path) or (looks and "://" not in path)


def _places(rows):
    if isinstance(rows, pd.DataFrame):
        if len(set(map(str, rows.columns))) < len(rows.columns):
            raise PreferenceError(f"two columns have one name: {', '.join(map(str, rows.columns))}. Rename one")
        rows = rows.to_dict("records")
    rows = [{str(k): v for k, v in row.items()} if isinstance(row, Mapping) else row for row in rows]
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _one_split(splits, wanted):
    """Name and content of the split that was asked for, or of the only one there is."""
    name = next((name for name in (wanted, f"{wanted}_prefs") if name in splits), None)
    if name is None and len(splits) != 1:
        raise PreferenceError(f"no split {wanted!r}; it has {', '.join(map(str, splits)) or 'none'}. Give split=")
    name = name or next(iter(splits))
    return f" ({name})" if name else "", splits[name]


def _read_hub(name, split):
    import datasets  # noqa: PLC0415  slow to import, and needed for data sets only

    name, _, revision = name.partition("@")
    try:
        return datasets.load_dataset(name, split=split, revision=revision or None)
    except ValueError as error:
        if f"{split}_prefs" not in str(error):  # the name of the split beside one for fine-tuning
            raise
        return datasets.load_dataset(name, split=f"{split}_prefs", revision=revision or None)


def _read_folder(path, split):
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        import datasets  # noqa: PLC0415  slow to import, and needed for data sets only

        return _read(datasets.load_from_disk(path), split)
    if (path / "README.md").is_file():  # a clone of a data set on the hub: its card says which files are which
        return "", _read(_read_hub(str(path), split), split)[1]
    splits = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if _suffix(file)[0] in READERS and not str(inside).startswith(("dataset_info", ".")):
            words = [SPLIT_WORDS[word] for word in re.findall("[a-z]+", str(inside).lower()) if word in SPLIT_WORDS]
            splits.setdefault(words[0] if words else "", []).append(file)
    if not splits:
        raise PreferenceError(f"the folder holds no file that can be read. {ADVICE}")
    name, files = _one_split(splits, split)
    return name, _read(files, split)[1]


def _read_path(source, split):
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        suffix, opened = _suffix(path)
        if suffix not in READERS:
            raise PreferenceError(f"files that end in {path.suffix!r} cannot be read. {ADVICE}")
        with opened(path, "rb") as file:
            found = READERS[suffix](file.read())
        return "", found if isinstance(found, list) else _places(found)
    if found := sorted(glob.glob(str(path), recursive=True)):
        return "", _read(found, split)[1]
    if is_local(source):
        raise PreferenceError(f"no such file. Give an existing {', '.join(SUFFIXES)} file or a hub id")
    return "", _read(_read_hub(source, split), split)[1]


def _read(source, split):
    """What to add to the source's name, and (place, row) of its rows."""
    if isinstance(source, str | Path):
        return _read_path(source, split)
    if isinstance(source, pd.DataFrame):
        return "", _places(source)
    if hasattr(source, "to_pandas"):  # a Dataset, a polars or Arrow table
        return "", _places(source.to_pandas())
    if isinstance(source, Mapping):  # a DatasetDict, or columns by their names
        if all(isinstance(values, list) for values in source.values()):
            return "", _places(pd.DataFrame(dict(source)))
        name, found = _one_split(source, split)
        return name, _read(found, split)[1]
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise PreferenceError(ADVICE)
    items = list(source)
    if not any(isinstance(item, str | Path) for item in items):
        return "", _places(items)
    several = [(Path(str(item)).name, _read(item, split)[1]) for item in items]
    return "", [(f"{name} {place}", row) for name, rows in several for place, row in rows]


def read_source(source, split):
    """The name of a source and (place, row) of each of its rows, a row being a dict, or a BadRow where it is broken.

    Raises PreferenceError, which names the source, for what cannot be read."""
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    try:
        added, rows = _read(source, split)
    except PreferenceError as error:
        raise PreferenceError(f"{name}: {error}.") from error
    except Exception as error:  # readers and the hub raise many unrelated types; the user needs one clear sentence
        has = f"{ADVICE} whose data set has a split {split!r}."
        raise PreferenceError(f"{name}: cannot be read ({type(error).__name__}: {error}). {has}") from error
    return name + added, rows
