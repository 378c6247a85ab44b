"""Several audits of one base on the same pairs, side by side."""

import glob
import os
from pathlib import Path

from alignlens.audit.page import comparison, read, save
from alignlens.core.errors import AuditError


def find(audits) -> list[Path]:
    """Files of a list, or of text with commas; folders and patterns with * stand for the audit.json in them."""
    parts = audits if isinstance(audits, list | tuple) else [p.strip() for p in str(audits or "").split(",")]
    out = []
    for part in filter(None, map(str, parts)):
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
        if differ := [what for what in facts if facts[what] != first[what]]:
            raise AuditError(
                f"{path} and {paths[0]} differ in their {differ[0]} ({facts[differ[0]]} and {first[differ[0]]}): "
                "compare audits of one base on the same pairs"
            )
        name = result["models"]["aligned"]["name"]
        while name in results:
            name += "′"
        results[name] = result
    return results


def compare(audits, folder: str | Path) -> Path:
    """Write comparison.html of several audits into a folder."""
    return save(folder, {"comparison.html": comparison(gather(find(audits)))})[0]
