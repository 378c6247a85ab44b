"""The claims of arXiv 2606.09850 as data: each with its rule, and a verdict that the rule gives from tables.

``reanalysis`` and ``class_shares`` look at the published numbers alone (``data/published``). ``ledger`` sets three
kinds of evidence side by side: what the paper published, what the published protocol gives on this study's models,
and what the sound protocol gives on them. No verdict is written by hand. Rules need two families and compare with what
the paper reports, so a flat result is "not replicated" only where the study could have seen the published effect.
"""

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
