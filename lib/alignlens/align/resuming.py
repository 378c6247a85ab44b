"""Let a killed training run go on where it was, and say how far it is.

Transformers saves pickles, and the loop of TRL's PPO cannot go on at all. Here a run's state is one file of tensors,
for every trainer: weights that learn, optimiser, schedule, random numbers, and what the monitor measured."""

import hashlib
import json
import time
import warnings
from dataclasses import asdict
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from tqdm import tqdm
from transformers import TrainerCallback

from alignlens.core.files import replacing
from alignlens.core.store import PROGRESS, DamagedArtifact, versions

EVERY = 60  # seconds from one save to the next: what a kill may cost, besides the steps between two checks
STATE = "state"
DIGEST = 64  # hex digits before the tensors: a file that was cut short or changed is not gone on from


def read(folder: Path | None) -> dict | None:
    """What a killed run left in its folder: tensors, and ``facts``. None, with a word, if it cannot be used."""
    if not folder or not (path := folder / STATE).exists():
        return None
    raw = path.read_bytes()
    if hashlib.sha256(raw[DIGEST:]).hexdigest().encode() == raw[:DIGEST]:
        kept = load(raw[DIGEST:])
        kept["facts"] = json.loads(bytes(kept["facts"].numpy()))
        if kept["facts"]["versions"] == versions():
            return kept
    words = "is damaged or was written with other versions: training starts anew"
    warnings.warn(f"{path} {words}", DamagedArtifact, stacklevel=2)
    return None


class Resumable(TrainerCallback):
    """Trains, and keeps the run's state in a folder after every check that is ``EVERY`` seconds from the last save.

    folder : of this run alone; None keeps nothing. kept : what ``read`` found there. monitor : the run's, if any."""

    def __init__(self, trainer, recipe, folder: Path | None, kept: dict | None, monitor=None):
        self.trainer, self.recipe, self.folder, self.kept, self.monitor = trainer, recipe, folder, kept, monitor
        self.saved = self.told = self.began = time.monotonic()
        self.first = kept["facts"]["state"]["global_step"] if kept else 0
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PROGRESS).write_text(f"from step {self.first} of {recipe.steps}")
            trainer.add_callback(self)
            vars(trainer).update(_save_checkpoint=self._save)  # what every loop calls, once it has logged

    def train(self) -> None:
        """From the state that was kept, else from the start."""
        if self.kept:
            return self._train_rest_of_ppo() if self.recipe.method == "ppo" else self._train_rest()
        if self.monitor:
            self.monitor.check(0)
        return self.trainer.train()

    def on_step_end(self, args, state, control, **_):
        now, step, last = time.monotonic(), state.global_step, self.recipe.steps
        control.should_save = step % self.recipe.check_every == 0 and step < last and now - self.saved >= EVERY
        if now - self.told >= 1:
            dose = f", dose {self.monitor.rows[-1]['kl']:.2g} nats" if self.monitor else ""
            left = tqdm.format_interval((now - self.began) / (step - self.first) * (last - step))
            (self.folder / PROGRESS).write_text(f"step {step} of {last}{dose}, {left} left at most")
            self.told = now

    def _save(self, *_, **__) -> None:
        trainer, optimizer = self.trainer, self.trainer.optimizer.state_dict()
        facts = {
            "versions": versions(), "state": asdict(trainer.state), "groups": optimizer["param_groups"],
            "schedule": trainer.lr_scheduler.state_dict(), "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
            "monitor": self.monitor and self.monitor.kept(),
        }  # fmt: skip
        text = json.dumps(facts, default=lambda array: array.tolist()).encode()
        tensors = {"facts": torch.tensor(list(text), dtype=torch.uint8), "cpu": torch.get_rng_state()}
        tensors |= {f"cuda {i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        tensors |= {f"weight {name}": weight.detach() for name, weight in self._learning()}
        tensors |= {f"moment {i} {n}": v for i, moments in optimizer["state"].items() for n, v in moments.items()}
        with replacing(self.folder / STATE) as path:
            raw = save(tensors)
            path.write_bytes(hashlib.sha256(raw).hexdigest().encode() + raw)
        self.saved = time.monotonic()

    def _learning(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, weight) for name, weight in self.trainer.model.named_parameters() if weight.requires_grad]

    @torch.no_grad()
    def _restore(self, *_) -> None:
        """Weights, optimiser, schedule, and what the monitor measured."""
        kept, facts, moments = self.kept, self.kept["facts"], {}
        for name, weight in self._learning():
            weight.copy_(kept[f"weight {name}"])
        for index, name in [key.split()[1:] for key in kept if key.startswith("moment")]:
            moments.setdefault(int(index), {})[name] = kept[f"moment {index} {name}"]
        self.trainer.optimizer.load_state_dict({"state": moments, "param_groups": facts["groups"]})
        self.trainer.lr_scheduler.load_state_dict(facts["schedule"])
        if self.monitor:
            self.monitor.restore(facts["monitor"])

    def _restore_random(self, *_) -> None:
        np.random.set_state(self.kept["facts"]["numpy"])  # noqa: NPY002
        torch.set_rng_state(self.kept["cpu"])
        for i in range(torch.cuda.device_count()):
            torch.cuda.set_rng_state(self.kept[f"cuda {i}"], i)

    def _train_rest(self) -> None:
        """Transformers' loop skips the data that it had; what it would read from pickles comes from the state."""
        trainer, state, loader = self.trainer, self.kept["facts"]["state"], self.trainer.get_train_dataloader
        place = Path(trainer.args.output_dir)
        (place / "trainer_state.json").write_text(json.dumps(state))

        def advanced():
            found = loader()
            for _ in range(int(state["epoch"])):  # GRPO's sampler draws on and on; the others are seeded by the epoch
                next(iter(found.batch_sampler))
            return found

        vars(trainer).update(
            get_train_dataloader=advanced, _load_from_checkpoint=lambda *_: None,
            _load_optimizer_and_scheduler=self._restore, _load_rng_state=self._restore_random,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(place))

    def _train_rest_of_ppo(self) -> None:
        """TRL's loop counts from 0: it gets the steps that are left, on the data that come next."""
        trainer, batches = self.trainer, chain.from_iterable(repeat(self.trainer.dataloader))
        self._restore()

        def rest():
            for _ in islice(batches, self.first):
                pass
            self._restore_random()  # a new pass over the data drew from them
            yield from batches

        trainer.dataloader, trainer.args.num_total_batches = rest(), trainer.args.num_total_batches - self.first
        trainer.train()

    def on_train_begin(self, args, state, control, **_):
        self.began = time.monotonic()
        if self.kept and self.recipe.method == "ppo":
            vars(state).update(self.kept["facts"]["state"])
