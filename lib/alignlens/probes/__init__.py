"""Linear probes on pairs: can a direction tell the chosen answer from the rejected one, and is the number honest?

A probe reads x = chosen - rejected. Two protocols, both on the mirrored rows {x: 1, -x: 0}:

`grouped`    logistic regression without intercept, folds by group (one group per prompt), L2 penalty chosen inside the
             training folds. Both signs, all answers and all copies of a prompt share a fold. Noise scores 0.5.
`published`  the protocol of arXiv 2606.09850: the 2N mirrored rows are split as if they were independent, so a test row
             usually has its sign-flipped copy in training. Kept to reproduce; noise scores above 0.5 (`noise_floor`).

All folds, penalties and permutations of a layer are solved at once, one column each: features are float32 [pairs,
layers, d_model], solvers float64, one layer in memory at a time. Other instruments build on the public pieces of
`inputs` (`Differences`, `same_rows`, `plan_folds`), `solver` (`fit`) and `scores` (`metrics`).
"""

from alignlens.probes.checks import leak_check, noise_floor, permuted_sign_null, selectivity
from alignlens.probes.layers import OutOfFold, fit_features, fit_layers, out_of_fold, transfer

__all__ = [
    "OutOfFold", "fit_features", "fit_layers", "leak_check", "noise_floor", "out_of_fold", "permuted_sign_null",
    "selectivity", "transfer",
]  # fmt: skip
