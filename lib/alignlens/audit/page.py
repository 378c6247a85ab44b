"""The audit as files, audit.json and audit.html from a template, and several audits side by side as one page."""

import glob
import json
import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from alignlens.audit import conditions, features, numbers, pictures, verdicts
from alignlens.audit.measure import SCHEMA
from alignlens.core.errors import AuditError
from alignlens.core.files import replacing_folder
from alignlens.core.store import write_json
from alignlens.dictionaries import CUTS

_PAGES = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_PAGES.loader = PackageLoader("alignlens", "audit")
_PAGES.tests["beyond"] = numbers.beyond
_PAGES.filters |= {f.__name__: f for f in (numbers.digits, numbers.percent, numbers.shown)}
_PAGES.globals |= {"draw": pictures, "rules": verdicts, "number": numbers, "features": features, "CUTS": CUTS}
_SCHEMA = Draft202012Validator(json.loads(Path(__file__).with_name("audit.schema.json").read_text(encoding="utf-8")))


def render(result: dict) -> str:
    """The audit as one HTML page without scripts and without anything from elsewhere."""
    return _PAGES.get_template("page.html.jinja").render(result=result, verdict=conditions.verdict(result))


def comparison(results: dict[str, dict]) -> str:
    """Several audits of one base side by side, as one HTML page."""
    lines = list(zip(*map(conditions.verdict, results.values()), strict=True))
    return _PAGES.get_template("comparison.html.jinja").render(results=results, verdicts=lines)


def write(result: dict, folder: str | Path) -> list[Path]:
    """audit.json (the result and its verdict) and audit.html in a folder; paths of both."""
    result = result | {"verdict": conditions.verdict(result)}
    return save(folder, {"audit.html": render(result), "audit.json": result})


def save(folder: str | Path, files: dict[str, str | dict]) -> list[Path]:
    """Write texts and JSON values into a folder, all or none: old ones stay whole until the new ones are."""
    folder = Path(folder).expanduser().absolute()
    try:
        with replacing_folder(folder, merge=True) as beside:
            for name, content in files.items():
                if name.endswith(".json"):
                    write_json(beside / name, content)
                else:
                    (beside / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise AuditError(f"nothing can be written to {folder.name!r}: {error.strerror or error}") from error
    return [folder / name for name in files]


def read(path: str | Path) -> dict:
    """The audit in a file or folder. AuditError if it is missing, damaged or of another schema version."""
    path = Path(path).expanduser()
    file = path / "audit.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AuditError(f"{file} does not exist: give an audit.json or the folder that holds one") from None
    except (OSError, ValueError) as error:
        raise AuditError(f"{file} is no readable audit.json: {error}") from error
    if (found := result.get("schema") if isinstance(result, dict) else None) != SCHEMA:
        raise AuditError(f"{file} has schema {found!r}, this version reads {SCHEMA!r}: make the audit again")
    if problem := best_match(_SCHEMA.iter_errors(result)):
        where = f"{problem.json_path}: {problem.message[:200]}"
        raise AuditError(f"{file} is not what {SCHEMA} describes ({where}): it was cut or edited; make the audit again")
    return result


def find(audits) -> list[Path]:
    """Files of a list, or of text with commas; folders and patterns with * stand for the audit.json in them."""
    parts, out = audits if isinstance(audits, list | tuple) else str(audits or "").split(","), []
    for part in filter(None, (str(part).strip() for part in parts)):
        found = sorted(glob.glob(os.path.expanduser(part))) if glob.has_magic(part) else [part]
        if not found:
            raise AuditError(f"nothing matches {part!r}: give files, folders or a pattern")
        out += map(Path, found)
    if len(out) < 2:
        raise AuditError(f"a comparison needs at least two audits, given: {', '.join(map(str, out)) or 'none'}")
    return out


def gather(paths: list[Path]) -> dict[str, dict]:
    """Audits by the name of their aligned model. AuditError unless all share base, pairs, format and layers."""
    results, first = {}, None
    for path in paths:
        result = read(path)
        facts = {
            "base": result["models"]["base"]["weights"], "pairs": result["pairs"]["hash"],
            "format": result["format"]["fingerprint"], "layers": result["methods"]["layers"],
        }  # fmt: skip
        first = first or facts
        if what := next((what for what in facts if facts[what] != first[what]), None):
            values = f"{what} ({facts[what]} and {first[what]}): compare audits of one base on the same pairs"
            raise AuditError(f"{path} and {paths[0]} differ in their {values}")
        name = result["models"]["aligned"]["name"]
        while name in results:
            name += "′"
        results[name] = result
    return results


def compare(audits, folder: str | Path) -> Path:
    """Write comparison.html of several audits into a folder."""
    return save(folder, {"comparison.html": comparison(gather(find(audits)))})[0]
