"""alignlens: what preference optimisation does inside language models, measured with calibrated instruments."""

__version__ = "0.1.0"
