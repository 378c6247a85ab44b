"""Watch a training run on held-out pairs: its dose, its curves, and where it ends."""

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback

from alignlens import models

# What some trainers call the loss, the reward and the margin that they log.
LOGGED = {"loss/policy_avg": "loss", "objective/scores": "reward", "rewards/margins": "margin"}


class DoseReached(Exception):
    """Leaves the training loop. Not every TRL loop looks at ``should_training_stop``, so an exception does it."""


class Monitor(TrainerCallback):
    """Measures a run on held-out pairs every few steps, and ends it at its dose or when its time has come.

    recipe, format, heldout : the run's ``Recipe``, its ``preferences.Formatter`` and held-out ``Encoded`` pairs.
    rows : one a check: dose (kl, with its standard error), length, chosen and rejected log-probability, margin
    (change of chosen minus change of rejected, relative to the base), all held out and in nats or tokens."""

    def __init__(self, recipe, format, heldout):
        ids = (heldout.prompt_ids, heldout.chosen_ids, heldout.rejected_ids)
        self.prompts, *self.answers = (rows[: recipe.check_prompts] for rows in ids)
        self.recipe, self.format, self.rows, self.stopped_by = recipe, format, [], "last step"

    @property
    def policy(self):
        """The model with its adapter."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)  # ``trainer`` is set once it is built
        return getattr(model, "policy", model)  # PPO's holds the value model too

    @property
    def curves(self) -> pd.DataFrame:
        """One row a check: step, what the trainer logged (loss, reward, margin), and ``rows``."""
        table = pd.DataFrame(self.rows)
        for logged in self.trainer.state.log_history:
            values = {LOGGED.get(key, key): value for key, value in logged.items()}
            for name in {"loss", "reward", "margin"} & values.keys():
                table.loc[table.step == logged["step"], name] = float(values[name])
        return table

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.recipe.check_every == 0 or state.global_step >= self.recipe.steps:
            self.check(state.global_step)

    def check(self, step: int) -> None:
        """Measure the policy after ``step`` steps; past the target dose, land on it and stop.

        Raises ValueError where log-probabilities are not finite."""
        policy, training = self.policy, self.policy.training
        policy.eval()
        row = self._measure(step)
        if over := self.recipe.stop == "dose" and step and row["kl"] >= self.recipe.dose:
            row, self.stopped_by = self._land(step), "dose"
        self.before = self._copies()
        policy.train(training)
        self.rows.append(row)
        if over:
            raise DoseReached

    def kept(self) -> dict:
        """What a killed run needs back, as JSON types."""
        return {"rows": self.rows, "start": self.start}

    def restore(self, kept: dict) -> None:
        """Go on from what ``kept`` gave; the policy has its weights of then."""
        self.rows, self.start = kept["rows"], np.array(kept["start"])
        self.before = self._copies()

    def _weights(self) -> list[torch.Tensor]:
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    def _copies(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self._weights()]

    @torch.no_grad()
    def _land(self, step: int) -> dict:
        """Go back to the target dose on the line between the last two checks' weights; the measured row.

        The dose can double between two checks. Without this, methods would be compared at doses that differ by as
        much as chance has them overshoot."""
        after = self._copies()

        def move(share):
            for weight, start, end in zip(self._weights(), self.before, after, strict=True):
                weight.copy_(torch.lerp(start, end, share))

        low, high, off = 0.0, 1.0, {}
        for _ in range(5):
            middle = (low + high) / 2
            move(middle)
            dose = self._sample(step)[1].mean()
            off[middle] = abs(dose - self.recipe.dose)
            low, high = (low, middle) if dose >= self.recipe.dose else (middle, high)
        move(min(off, key=off.get))
        return self._measure(step)

    def _sample(self, step: int) -> tuple[list[list[int]], np.ndarray]:
        """Responses to the held-out prompts, and the KL of each to the base."""
        pad, end, most = self.format.pad_id, self.format.end_id, self.recipe.response_tokens
        made = models.sample(self.policy, self.prompts, end_id=end, pad_id=pad, max_new_tokens=most, seed=step)
        return made, np.asarray_chkfinite(models.response_kl(self.policy, self.prompts, made, pad_id=pad))

    def _measure(self, step: int) -> dict:
        told = {"pad_id": self.format.pad_id}
        scores = (models.response_logprobs(self.policy, self.prompts, ids, **told) for ids in self.answers)
        chosen, rejected = map(np.asarray_chkfinite, scores)
        margin, (made, kl) = chosen - rejected, self._sample(step)
        self.start = self.start if self.rows else margin
        return {
            "step": step, "loss": np.nan, "reward": np.nan, "margin": np.nan, "kl": kl.mean(),
            "kl_se": kl.std() / np.sqrt(len(kl)), "length": np.mean([len(answer) for answer in made]),
            "chosen_logprob": chosen.mean(), "rejected_logprob": rejected.mean(),
            "heldout_margin": (margin - self.start).mean(),
            "heldout_accuracy": (margin > self.start).mean() if self.rows else 0.5,
        }  # fmt: skip
