"""The claims of arXiv 2606.09850 as data: each with its rule, and a verdict that the rule gives from tables.

``reanalysis`` and ``class_shares`` look at published numbers alone. ``ledger`` sets side by side what was published,
and what the published and the sound protocol give on this study's models. No verdict is written by hand."""

from alignlens.claims.evidence import TABLES, read_tables
from alignlens.claims.judging import CLAIMS, PAPER, check, frame, ledger, read, write
from alignlens.claims.paper import auroc_error, class_shares, published, reanalysis
from alignlens.claims.rules import CHANGED, NOT_REPLICATED, NOT_TESTABLE, REPLICATED, VERDICTS, reference_changes
from alignlens.core.errors import ClaimError

__all__ = [
    "CHANGED", "CLAIMS", "NOT_REPLICATED", "NOT_TESTABLE", "PAPER", "REPLICATED", "TABLES", "VERDICTS", "ClaimError",
    "auroc_error", "check", "class_shares", "frame", "ledger", "published", "read", "read_tables", "reanalysis",
    "reference_changes", "write",
]  # fmt: skip
