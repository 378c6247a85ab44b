"""Causal tests: change the residual stream after a block and see what that does to the model's preferences.

A direction, latent or layer that merely correlates with a preference changes nothing when it is pushed, removed or
exchanged. Each intervention runs beside random directions that change the stream by as much, since any large enough
change does something (the null that arXiv 2606.09850 lacks).

*Tokens.* Steering and ablation change the stream at the last prompt token, which predicts the first response token, and
at every response token; patching changes it at every token of prompt and response.

*Effects* are intervened minus clean, paired by prompt:

margin : mean over pairs of log p(chosen) - log p(rejected), nats. Against any fixed reference this is also the change
    of the implicit-reward margin.
accuracy : share of pairs with a positive margin, relative to the reference's if there is one; ties count half.
kl : KL(intervened || clean), nats, summed over the tokens of the chosen response; when samples are drawn, over those
    of the intervened model's samples.
length : tokens of a sample. reward : what ``judge`` says of it.
"""

from alignlens.causal.interventions import COLUMNS, LEAST_RANDOM, ablate, ablate_latents, steer
from alignlens.causal.patching import patch

__all__ = ["COLUMNS", "LEAST_RANDOM", "ablate", "ablate_latents", "patch", "steer"]
