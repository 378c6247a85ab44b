"""Where models and adapters are: local folders and hub ids. What cannot be opened becomes one ModelError."""

import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import cached_file

from alignlens.core.errors import AlignlensError, ModelError
from alignlens.core.hub import asked_once
from alignlens.models.session import quietly

Source = str | Path
HUB_ID = r"\w[\w.-]*(?:/[\w.-]+)?"
GIVE = "Give a local folder, or a hub id that is public or that you are logged in for, with the hub in reach"
NEEDS = {
    "model": "config.json, safetensors weights and the tokenizer's files, whole and of one model",
    "adapter": "adapter_config.json and adapter_model.safetensors (convert pickled weights first)",
}


def pinned(source: Source) -> tuple[str, dict[str, str]]:
    """Name and ``{"revision": ...}`` of a hub id that ends in ``@revision``; any other source as it is (``~`` is the
    home folder), and ``{}``."""
    found = re.fullmatch(rf"({HUB_ID})@(\S+)", str(source))
    hub = found and not Path(source).exists()
    return (found[1], {"revision": found[2]}) if hub else (os.path.expanduser(source), {})


@contextmanager
def opening(source: Source, what: str = "model"):
    """Open a source, yielding its name and revision; whatever a library says against it becomes one ModelError."""
    name, revision = pinned(source)
    if Path(name).is_file():
        advice = "give the folder that holds it, with config.json and the tokenizer's files"
        if name.endswith(".gguf"):
            advice = "a GGUF file is not read yet, give the safetensors model that it was made from"
        raise ModelError(f"{what} {str(source)!r} is a file: {advice}")
    hub = bool(re.fullmatch(HUB_ID, name)) and not Path(name).exists()
    with asked_once(hub) as away:
        try:
            with quietly():
                yield name, revision
        except AlignlensError:
            raise
        except Exception as error:  # configurations, kernels and tokenizers raise anything
            why = away if away and isinstance(error, OSError) else first_line(error)
            if what == "model" and (base := _adapted(name, revision)):
                why = f"it is an adapter for {base}; give an adapter beside its base"
            else:
                why = f"{why}. {GIVE}" if hub else _local(Path(name), what, why)
            raise ModelError(f"{what} {str(source)!r} cannot be loaded: {why}") from error


def file_of(name: str, file: str, revision: dict[str, str]) -> Path | None:
    """One file of a local folder or of the hub; None where there is no such file."""
    quiet = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors")}
    found = cached_file(name, file, **revision, **quiet)
    return Path(found) if found else None


def first_line(error: Exception) -> str:
    """What an error says, on one line: the first, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return (said if " " in said else f"{type(error).__name__} {said}").strip().rstrip(".")


def _local(folder: Path, what: str, why: str) -> str:
    """Why a folder cannot be opened, and what to do about it."""
    if not folder.is_dir():
        return "it was not found. There is no such folder; check the path"
    kinds = {file.suffix for file in folder.iterdir()}
    if what == "model" and kinds & {".bin", ".pt", ".pth"} and ".safetensors" not in kinds:
        return f"{why}. It holds only pickled weights; convert them to safetensors first"
    return f"{why}. It needs {NEEDS[what]}"


def _adapted(name: str, revision: dict) -> str | None:
    """The base of a source that is an adapter and no model."""
    with suppress(Exception):  # the error that led here is the one to report
        found, model = (file_of(name, file, revision) for file in ("adapter_config.json", "config.json"))
        return found and not model and (json.loads(found.read_text()).get("base_model_name_or_path") or "a base")
