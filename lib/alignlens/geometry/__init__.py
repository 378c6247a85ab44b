"""Rotation, scaling and noise between the residual streams of two models that read the same rows.

Model: y = scale * x R, R orthogonal, rows centred. A map is fitted on one half of the rows and read on the other, so
that noise, whose best map differs from half to half, does not pass for rotation. An angle between two models means
nothing without that between two `halves` of one model. Solvers work in float64."""

from alignlens.geometry.comparing import compare, compare_layers, halves
from alignlens.geometry.decomposing import decompose, decompose_draws

__all__ = ["compare", "compare_layers", "decompose", "decompose_draws", "halves"]
