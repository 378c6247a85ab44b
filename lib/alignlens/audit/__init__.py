"""Any base and its aligned checkpoint: what is asked for, measurements, verdict, page; several audits side by side."""

from alignlens.audit.conditions import check, verdict
from alignlens.audit.measure import SCHEMA, SECTIONS, Audit
from alignlens.audit.page import compare, find, gather, read, write
from alignlens.audit.requests import Request, check_names, from_notebook, request
from alignlens.audit.verdicts import findings

__all__ = [
    "SCHEMA", "SECTIONS", "Audit", "Request", "check", "check_names", "compare", "find", "findings", "from_notebook",
    "gather", "read", "request", "verdict", "write",
]  # fmt: skip
