"""Causal tests: change the residual stream after a block and see what that does to the model's preferences.

A direction, latent or layer that merely correlates with a preference changes nothing when it is pushed, removed or
exchanged. Each intervention runs beside random directions that change the stream by as much, since any large enough
change does something (the null that arXiv 2606.09850 lacks)."""

from alignlens.causal.interventions import COLUMNS, LEAST_RANDOM, ablate, ablate_latents, patch, steer

__all__ = ["COLUMNS", "LEAST_RANDOM", "ablate", "ablate_latents", "patch", "steer"]
