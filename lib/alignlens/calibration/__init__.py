"""Calibrations: what an instrument makes of worlds whose answer is known. A dictionary's words (shared, rotated,
attenuated, base only, aligned only) are believed as far as they come back from planted features; ``nulls`` holds noise
and planted effects for the other instruments."""

from alignlens.calibration.planted import INSTRUMENTS, KINDS, REGIMES, Planted, Regime, config_for, run, score

__all__ = ["INSTRUMENTS", "KINDS", "REGIMES", "Planted", "Regime", "config_for", "run", "score"]
