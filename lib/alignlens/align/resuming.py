"""Let a killed training run go on where it was, and say how far it is.

Transformers saves pickles, and the loop of TRL's PPO goes on from nothing. So a run's state is one file of tensors here,
the same for every trainer: weights that learn, optimiser, schedule, random numbers, and what was measured on the way."""

import hashlib
import json
import random
import time
import warnings
from dataclasses import asdict
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from transformers import TrainerCallback

from alignlens.core.files import replacing
from alignlens.core.store import DamagedArtifact, versions

EVERY = 60  # seconds from one save to the next: what a kill may cost, besides the steps between two checks
STATE, PROGRESS = "state", "progress"  # files of a resumable folder
DIGEST = 64  # hex digits before the tensors: a file cut short or changed is not gone on from


def read(folder: Path | None) -> dict[str, torch.Tensor] | None:
    """What a killed run left in its folder; a file that cannot be used is reported, and None is returned."""
    path = folder and folder / STATE
    if not path or not path.exists():
        return None
    raw = path.read_bytes()
    whole = hashlib.sha256(raw[DIGEST:]).hexdigest().encode() == raw[:DIGEST]
    tensors = load(raw[DIGEST:]) if whole else {}
    if whole and _facts(tensors)["versions"] == versions():
        return tensors
    why = "was written with other versions" if whole else "is damaged"
    warnings.warn(f"{path} {why}: training starts anew", DamagedArtifact, stacklevel=2)
    return None


class Resumable(TrainerCallback):
    """Trains, and keeps the run's state in a folder after every check that is ``EVERY`` seconds from the last save.

    folder : of this run alone; None keeps nothing. kept : what ``read`` found there. monitor : the run's, if any."""

    def __init__(self, trainer, recipe, folder: Path | None, kept=None, monitor=None):
        self.trainer, self.recipe, self.folder, self.kept, self.monitor = trainer, recipe, folder, kept, monitor
        self.saved = self.told = self.began = time.monotonic()
        self.first = 0  # step that this process began at
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            trainer.add_callback(self)
            trainer._save_checkpoint = self._save  # called by every loop, after it has logged

    def train(self) -> None:
        """From the state that was kept, else from the start."""
        if not self.kept:
            if self.monitor:
                self.monitor.check(0)
            self.trainer.train()
        elif self.recipe.method == "ppo":
            self._train_rest_of_ppo()
        else:
            self._train_rest()

    def on_step_end(self, args, state, control, **_):
        now, at_check = time.monotonic(), state.global_step % self.recipe.check_every == 0
        control.should_save = at_check and state.global_step < self.recipe.steps and now - self.saved >= EVERY
        if now - self.told >= 1:
            self.told = now
            (self.folder / PROGRESS).write_text(self._progress(state.global_step, now), encoding="utf-8")

    def _progress(self, step: int, now: float) -> str:
        left = (now - self.began) / (step - self.first) * (self.recipe.steps - step) / 60
        dose = f", dose {self.monitor.rows[-1]['kl']:.2g} nats" if self.monitor else ""
        return f"step {step} of {self.recipe.steps}{dose}, {left:.0f} min left at most"

    def _save(self, *_, **__) -> None:
        trainer, optimizer = self.trainer, self.trainer.optimizer.state_dict()
        facts = {
            "versions": versions(), "state": asdict(trainer.state), "groups": optimizer["param_groups"],
            "schedule": trainer.lr_scheduler.state_dict(), "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False), "monitor": self.monitor and self.monitor.kept(),  # noqa: NPY002
        }  # fmt: skip
        text = json.dumps(facts, default=lambda value: value.tolist()).encode()
        tensors = {"facts": torch.frombuffer(bytearray(text), dtype=torch.uint8), "cpu": torch.get_rng_state()}
        tensors |= {f"cuda {i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        tensors |= {f"weight {n}": w.detach().contiguous() for n, w in self._learning()}
        tensors |= {f"moment {n} {i}": v for i, values in optimizer["state"].items() for n, v in values.items()}
        with replacing(self.folder / STATE) as path:
            raw = save(tensors)
            path.write_bytes(hashlib.sha256(raw).hexdigest().encode() + raw)
        self.saved = time.monotonic()

    def _learning(self):
        return [(name, weight) for name, weight in self.trainer.model.named_parameters() if weight.requires_grad]

    @torch.no_grad()
    def _restore(self, *_) -> None:
        """Weights, optimiser, schedule, and what the monitor had measured."""
        kept, facts = self.kept, _facts(self.kept)
        for name, weight in self._learning():
            weight.copy_(kept[f"weight {name}"])
        moments: dict[int, dict] = {}
        for key in [key for key in kept if key.startswith("moment ")]:
            _, name, index = key.split()
            moments.setdefault(int(index), {})[name] = kept[key]
        self.trainer.optimizer.load_state_dict({"state": moments, "param_groups": facts["groups"]})
        self.trainer.lr_scheduler.load_state_dict(facts["schedule"])
        self.first = facts["state"]["global_step"]
        if self.monitor:
            self.monitor.restore(facts["monitor"])

    def _restore_random(self, *_) -> None:
        facts = _facts(self.kept)
        version, numbers, gauss = facts["python"]
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state(facts["numpy"])  # noqa: NPY002
        torch.set_rng_state(self.kept["cpu"])
        for i in range(torch.cuda.device_count()):
            torch.cuda.set_rng_state(self.kept[f"cuda {i}"], i)

    def _train_rest(self) -> None:
        """Transformers' loop skips the data it had; what it would load from pickles comes from the state."""
        trainer, state = self.trainer, _facts(self.kept)["state"]
        place, sampler = Path(trainer.args.output_dir), trainer._get_train_sampler
        (place / "trainer_state.json").write_text(json.dumps(state))

        def advanced(*dataset):
            found = sampler(*dataset)
            if self.recipe.method == "grpo":  # its sampler draws on and on, the others are seeded anew each epoch
                for _ in range(int(state["epoch"])):
                    next(iter(found))
            return found

        trainer._get_train_sampler = advanced
        trainer._load_from_checkpoint = lambda *_: None
        trainer._load_optimizer_and_scheduler, trainer._load_rng_state = self._restore, self._restore_random
        trainer.train(resume_from_checkpoint=str(place))

    def _train_rest_of_ppo(self) -> None:
        """TRL's loop counts from 0: it gets the steps that are left, on the data that come next."""
        trainer, batches = self.trainer, chain.from_iterable(repeat(self.trainer.dataloader))
        self._restore()

        def rest():
            for _ in islice(batches, self.first):
                pass
            self._restore_random()  # skipping may draw random numbers, too
            yield from batches

        trainer.dataloader, trainer.args.num_total_batches = rest(), trainer.args.num_total_batches - self.first
        trainer.train()

    def on_train_begin(self, args, state, control, **_):
        self.began = time.monotonic()
        if self.kept and self.recipe.method == "ppo":
            vars(state).update(_facts(self.kept)["state"])


def _facts(tensors) -> dict:
    return json.loads(bytes(tensors["facts"].numpy()))
