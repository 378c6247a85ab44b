"""Linear probes on pairs: can a direction tell the chosen answer from the rejected one, and is the number honest?

A probe reads x = chosen - rejected as mirrored rows {x: 1, -x: 0}. `grouped`: logistic regression without intercept,
folds by group (prompt), L2 penalty chosen inside the training folds; noise scores 0.5. `published` (arXiv 2606.09850):
the rows split as if independent, so most test rows have their mirror image in training; noise scores above 0.5."""

from alignlens.probes.checks import leak_check, noise_floor, permuted_sign_null, selectivity
from alignlens.probes.layers import OutOfFold, fit_features, fit_layers, out_of_fold, transfer

__all__ = ["OutOfFold", "fit_features", "fit_layers", "leak_check", "noise_floor", "out_of_fold", "permuted_sign_null",
           "selectivity", "transfer"]  # fmt: skip
