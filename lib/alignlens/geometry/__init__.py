"""Rotation, scaling and noise between the residual streams of two models that read the same rows.

Read one model with another model's direction and a drop has three causes: the signal weakened, it turned, or it drowned
in noise. `compare` keeps the three apart for whole streams, `compare_layers` adds the directions of preference, and
`decompose` splits a change of probe AUROC into what is kept, rotated, attenuated and created. `halves` says what two
disjoint halves of one model give: an angle between two models means nothing without it.

Conventions: y = scale * x R with R orthogonal, rows centred. A map is fitted on one half of the rows and read on the
other, so noise, whose best map differs from half to half, does not pass for rotation. Solvers work in float64.
"""

from alignlens.geometry.comparing import compare, compare_layers, halves
from alignlens.geometry.decomposing import decompose

__all__ = ["compare", "compare_layers", "decompose", "halves"]
