"""The front door: ask a study for a result; it comes from the store or is made, with all that it depends on.

Every result is an artifact keyed by what it depends on, so notebooks run alone and in any order, a killed run goes on
where it stopped, and two studies can share a store. ``Study.make_all`` makes many artifacts side by side beforehand.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import pandas as pd

from alignlens import preferences
from alignlens.core import settings as presets
from alignlens.core import store
from alignlens.core.errors import AlignError, PreferenceError, PresetError
from alignlens.core.settings import Preset
from alignlens.core.store import Artifact, Store, content_hash
from alignlens.preferences import tinyworld
from alignlens.study.measurements import Measurements
from alignlens.study.stages import VERSIONS, Source, Variant
from alignlens.study.trained_dictionaries import TrainedDictionaries


class Study(Measurements, TrainedDictionaries):
    """Everything a preset describes, made when asked for.

    Parameters
    ----------
    preset : see ``presets.resolve``.
    progress : show one progress bar for long work.
    """

    def __init__(self, preset: Preset, *, progress: bool = True):
        self.preset, self.progress = preset, progress
        shipped = presets.place(preset.shipped) if preset.shipped and preset.variants != "train" else None
        if shipped and not Path(shipped).is_dir():
            shipped = None
        self.store = Store(presets.place(preset.store), shipped)
        self._formats: dict[str, preferences.Formatter] = {}
        self._measured: dict[str, tuple[pd.DataFrame, str]] = {}
        self._sources: dict[Variant, Source] = {}

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def families(self) -> list[str]:
        return list(self.preset.families)

    @property
    def methods(self) -> list[str]:
        """Methods and controls, without the base."""
        return [*self.preset.methods, *self.preset.controls]

    def variants(self, family: str | None = None, *, base: bool = True) -> list[Variant]:
        """All models of the study (or of one family), each base first."""
        out = []
        for name in [family] if family else self.families:
            out += [Variant(name, "base")] if base else []
            out += [Variant(name, m, s) for m in self.methods for s in self.seeds_of(name, m)]
        return out

    def first_seeds(self, *, base: bool = True) -> list[Variant]:
        """The first seed of every method and control in every family, each base first."""
        names = [*(["base"] if base else []), *self.methods]
        return [Variant(f, m, self.seeds_of(f, m)[0]) for f in self.families for m in names]

    def seeds_of(self, family: str, method: str) -> tuple[int, ...]:
        """Seeds of a variant; a ready checkpoint has one."""
        return (0,) if method == "base" or self.checkpoint(family, method) else self.preset.seeds

    @property
    def run_id(self) -> str:
        """Names this study's parameters and data: eight hex digits, on every figure."""
        fields = dataclasses.asdict(self.preset)
        for name in ("store", "figures", "jobs", "device", "shipped", "variants", "read_batch"):
            fields.pop(name)
        fields |= {"families": self._base_keys, "pairs": self.split_hash, "checkpoints": sorted(fields["checkpoints"])}
        return content_hash(fields)[:8]

    @cached_property
    def device(self) -> str:
        if self.preset.device != "auto":
            return self.preset.device
        from alignlens.models import default_device

        return default_device()

    # --- pairs ------------------------------------------------------------------------------------------------------

    @property
    def tiny_world(self) -> bool:
        return self.preset.pairs == "tinyworld"

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """All pairs with their split; tiny-world pairs carry factors and utilities."""
        p = self.preset
        if self.tiny_world:
            source = tinyworld.pairs(p.prompts, length_bias=p.length_bias, label_noise=p.label_noise)
        else:
            local = _existing(p.pairs)
            source = str(local) if local else p.pairs
        loaded = preferences.load_pairs(source, limit=p.limit, max_chars=p.max_chars, on_bad=p.on_bad)
        split = preferences.split_by_prompt(loaded, reward=p.reward_share, measure=p.measure_share, seed=p.split_seed)
        split.attrs["report"] = loaded.attrs["report"] | ({"source": "tiny world"} if self.tiny_world else {})
        return split

    def split(self, name: str) -> pd.DataFrame:
        """The pairs of one split: train (methods), reward (reward model, dose checks) or measure (all measurements)."""
        return self.pairs[self.pairs.split == name].reset_index(drop=True)

    @cached_property
    def split_hash(self) -> str:
        return preferences.split_hash(self.pairs)

    @cached_property
    def _split_keys(self) -> dict[str, str]:
        columns = ["prompt", "chosen", "rejected"]
        return {name: content_hash(self.split(name)[columns]) for name in preferences.SPLITS}

    def measured(self, family: str) -> pd.DataFrame:
        """The measured pairs of a family: the same for all its models, whole prompts, none cut by ``max_length``."""
        if family not in self._measured:
            pairs = self.split("measure")
            pairs = pairs[self.format(family).encode_pairs(pairs).kept]
            sizes = pairs.groupby("prompt_id", sort=False).size().cumsum()
            few = pairs.prompt_id.isin(sizes.index[sizes <= self.preset.measured])
            pairs = pairs[few].reset_index(drop=True)
            preferences.check_folds(pairs, self.preset.folds)
            self._measured[family] = pairs, content_hash(pairs[["prompt", "chosen", "rejected"]])
        return self._measured[family][0]

    def _measured_key(self, family: str) -> str:
        self.measured(family)
        return self._measured[family][1]

    def format(self, family: str) -> preferences.Formatter:
        """The one formatter of a family, for training and for measuring."""
        if family not in self._formats:
            from transformers import AutoTokenizer

            base = self.source(Variant(family, "base")).model
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=self.preset.trust_remote_code)
            self._formats[family] = preferences.Formatter(tokenizer, max_length=self.preset.max_length)
        return self._formats[family]

    # --- models -----------------------------------------------------------------------------------------------------

    @cached_property
    def _base_keys(self) -> dict[str, str]:
        return {family: self._base_key(family) for family in self.families}

    def _base_key(self, family: str) -> str:
        base = self.preset.families[family]
        if base.startswith("tiny:"):
            return Store.key("base", **self.base_identity(family))
        local = _existing(base)
        return content_hash(local) if local else base  # a hub id; give "id" at a fixed revision in checkpoints

    def base_identity(self, family: str) -> dict:
        p = self.preset
        architecture = p.families[family].removeprefix("tiny:")
        names = ("layers", "d_model", "vocab_size", "pretrain_steps", "pretrain_batch", "pretrain_rate")
        # Held-out prompts are kept out of the pretraining text as well, so the split is one of its inputs.
        inputs = {"held out": content_hash(sorted(self.split("measure").prompt)) if self.tiny_world else "none"}
        parameters = {"architecture": architecture, "seed": 0} | {n: getattr(p, n) for n in names}
        return {"inputs": inputs, "parameters": parameters, "version": VERSIONS["base"]}

    def base(self, family: str) -> Artifact:
        """A tiny base, trained from scratch on the tiny world's text."""
        identity = self.base_identity(family)
        p = self.preset

        def make(folder: Path) -> dict:
            from alignlens import models

            held_out = self.split("measure").prompt if self.tiny_world else ()
            text = tinyworld.corpus(min(100_000, p.pretrain_steps * p.pretrain_batch), exclude=held_out)
            facts = models.pretrain(
                folder,
                identity["parameters"]["architecture"],
                list(zip(text.prompt, text.response, strict=True)),
                layers=p.layers,
                d_model=p.d_model,
                vocab_size=p.vocab_size,
                steps=p.pretrain_steps,
                batch_size=p.pretrain_batch,
                learning_rate=p.pretrain_rate,
                seed=0,
            )
            return facts

        return self.store.get("base", f"{family}-base", make, **identity)

    def source(self, variant: Variant) -> Source:
        """Where a variant's weights are, after making them if need be."""
        if variant not in self._sources:  # asked for thousands of times: a pooled dictionary depends on every model
            self._sources[variant] = self._find_source(variant)
        return self._sources[variant]

    def _find_source(self, variant: Variant) -> Source:
        base = self.preset.families[variant.family]
        key = self._base_keys[variant.family]
        if variant.method == "base":
            if base.startswith("tiny:"):
                base = str(self.base(variant.family).path)
            return Source(str(_existing(base) or base), None, key)
        parent = self.source(Variant(variant.family, "base")).model
        if variant.method == "random":
            made = self.random_direction(variant)
            return Source(parent, str(made.path), made.key)
        checkpoint = self.checkpoint(variant.family, variant.method)
        if checkpoint:
            local = _existing(checkpoint)
            if local and (local / "adapter_config.json").exists():
                return Source(parent, str(local), content_hash(local))
            return Source(str(local or checkpoint), None, content_hash(local) if local else checkpoint)
        made = self.variant(variant)
        return Source(parent, str(made.path), made.key)

    def checkpoint(self, family: str, method: str) -> str | None:
        """The ready checkpoint of a variant (hub id or folder), if the preset names one."""
        if self.preset.variants == "train" or method == "base":
            return None
        found = self.preset.checkpoints.get(f"{family}:{method}") or self.preset.checkpoints.get(family)
        return found.format(method=presets.SPELLING.get(method, method)) if found else None

    def load(self, variant: Variant):
        """(model, tokenizer) of a variant, an adapter merged into its base."""
        from alignlens import models

        source = self.source(variant)
        return models.load(
            source.model, source.adapter, device=self.device, trust_remote_code=self.preset.trust_remote_code
        )

    def recipe(self, method: str, seed: int):
        """The training recipe of a method (or "reward") under this preset."""
        from alignlens import align

        p = self.preset
        recipe = align.Recipe(
            method=method,
            learning_rate=p.learning_rates[method],
            steps=p.reward_steps if method == "reward" else p.steps,
            batch_size=p.batch_size,
            micro_batch_size=p.micro_batch_size,
            max_length=p.max_length,
            response_tokens=p.response_tokens,
            lora_rank=p.lora_rank,
            lora_alpha=2 * p.lora_rank,
            stop=p.stop,
            dose=p.dose,
            check_every=p.check_every,
            check_prompts=p.check_prompts,
            seed=seed,
        )
        if p.recipe == "published" and method in presets.METHODS:
            return align.published(recipe, len(self.split("train")))
        return recipe

    def reward_model(self, family: str, seed: int = 0) -> Artifact:
        """A reward model trained on the reward split; ``extra["accuracy"]`` is on held-out prompts of that split."""
        from alignlens import align

        recipe = self.recipe("reward", seed)
        return self.store.get(
            "reward",
            f"{family}-reward-seed{seed}",
            lambda folder: align.train_reward(
                folder, self.source(Variant(family, "base")).model, self.split("reward"), recipe, device=self.device
            ),
            inputs={"base": self._base_keys[family], "pairs": self._split_keys["reward"]},
            parameters=dataclasses.asdict(recipe),
            version=VERSIONS["reward"],
        )

    def variant(self, variant: Variant) -> Artifact:
        """A trained adapter with its curves (``table("curves.parquet")``) and its dose (``extra``)."""
        from alignlens import align, models

        recipe = self.recipe(variant.method, variant.seed)
        online = variant.method in align.ONLINE
        inputs = {"base": self._base_keys[variant.family], "pairs": self._split_keys["train"]}
        inputs["heldout"] = self._split_keys["reward"]
        reward = None
        if online and self.preset.reward == "model":
            inputs["reward"] = self._reward_key(variant.family, variant.seed)
        elif online:
            inputs["reward"] = "true utility"
        identity = {"inputs": inputs, "parameters": dataclasses.asdict(recipe), "version": VERSIONS["variant"]}
        if self.preset.variants == "load":
            found = self.store.find("variant", **identity)
            if found is None:
                raise AlignError(
                    f"variant {variant.label} is neither stored nor given as a checkpoint, and variants is 'load'; "
                    "use variants 'auto' to train it, or name it in checkpoints"
                )
            return found

        def make(folder: Path) -> dict:
            nonlocal reward
            base = self.source(Variant(variant.family, "base")).model
            if online:
                reward = _true_utility
                if self.preset.reward == "model":
                    adapter = self.reward_model(variant.family, variant.seed).path
                    reward = models.load_reward(base, adapter, device=self.device)
            return align.train(
                folder, base, self.split("train"), self.split("reward"), recipe,
                reward=reward, device=self.device, trust_remote_code=self.preset.trust_remote_code,
            )  # fmt: skip

        return self.store.get("variant", variant.label, make, **identity)

    def _reward_key(self, family: str, seed: int) -> str:
        return Store.key(
            "reward",
            inputs={"base": self._base_keys[family], "pairs": self._split_keys["reward"]},
            parameters=dataclasses.asdict(self.recipe("reward", seed)),
            version=VERSIONS["reward"],
        )

    def ship(self, folder: str | Path) -> int:
        """Copy all bases, reward models and variants of this study into a store to ship; returns how many."""
        made = [self.base(f) for f in self.families if self.preset.families[f].startswith("tiny:")]
        if self.needs_reward_model:
            made += [self.reward_model(f, s) for f in self.families for s in self.preset.seeds]
        made += [self.variant(v) for v in self._slowest_first()]
        made += [getattr(self, method)(*words) for tasks in self._dictionary_plan() for _, method, words in tasks]
        made += [self.calibration(*words) for words in self.calibrations()]
        made += [self.causal(v) for v in self.first_seeds()] + [self.dose(v) for v in self.first_seeds(base=False)]
        for artifact in made:
            store.ship(artifact, presets.place(str(folder)))
        return len(made)

    # --- making many at once ----------------------------------------------------------------------------------------

    def make_all(self, *stages: str) -> None:
        """Make what these stages need, several models side by side: "variants", "behavior", "probes".

        Shows one progress bar with what is being made. Later calls find everything in the store.
        """
        p = self.preset
        bases = [f for f in self.families if p.families[f].startswith("tiny:")]
        plan = [[("base", "base", (f,)) for f in bases]]
        if self.needs_reward_model and "variants" in stages:
            plan.append([("reward model", "reward_model", (f, s)) for f in self.families for s in p.seeds])
        for stage in stages:
            if stage == "variants":
                plan.append([("variant", "variant", (v,)) for v in self._slowest_first()])
            elif stage == "behavior":
                plan.append([("behavior", "behavior", (v,)) for v in self.variants()])
            elif stage == "probes":  # a base's streams are an input of all its variants' transfer
                tasks = [("activations and probes", "probes", (v,)) for v in self.variants()]
                plan.append([t for t in tasks if t[2][0].method == "base"])
                plan.append([t for t in tasks if t[2][0].method != "base"])
            elif stage == "dictionaries":
                plan += self._dictionary_plan()
            elif stage == "calibration":
                plan.append([("planted truth", "calibration", words) for words in self.calibrations()])
            elif stage == "latents":
                null = [v for f in self.families for name, _, v in self.comparisons(f) if name == "random"]
                tasks = [("latents", "latents", (v,)) for v in [*self.variants(), *null]]
                plan.append([t for t in tasks if t[2][0].method == "base"])
                plan.append([t for t in tasks if t[2][0].method != "base"])
            elif stage == "geometry":
                found = [c for f in self.families for c in self.geometry_comparisons(f)]
                plan.append([("geometry", "geometry", (first, second)) for _, first, second in found])
            elif stage == "dose":
                plan.append([("part of the way", "dose", (v,)) for v in self.first_seeds(base=False)])
            elif stage == "causal":
                plan.append([("interventions", "causal", (v,)) for v in self.first_seeds()])
            else:
                raise PresetError(
                    f"stage {stage!r} is unknown; choose from variants, behavior, probes, calibration, dictionaries, "
                    "latents, geometry, dose, causal"
                )
        self._run(plan)

    @property
    def needs_reward_model(self) -> bool:
        """Whether a variant of this study is trained against a reward model."""
        online = {"ppo", "grpo"} & {v.method for v in self.variants() if not self.checkpoint(v.family, v.method)}
        return bool(online) and self.preset.reward == "model" and self.preset.variants != "load"

    def width(self, family: str) -> int:
        """Dimensions of a family's residual stream."""
        from alignlens import models

        return models.describe(self.source(Variant(family, "base")).model)["d_model"]

    def _slowest_first(self):
        order = {"ppo": 0, "grpo": 1}
        trained = [v for v in self.variants(base=False) if not self.checkpoint(v.family, v.method)]
        return sorted(trained, key=lambda v: (order.get(v.method, 2), v))

    @property
    def jobs(self) -> int:
        if self.preset.jobs:
            return self.preset.jobs
        return 1 if self.device != "cpu" else min(2, os.cpu_count() or 1)

    def _run(self, plan: list[list[tuple[str, str, tuple]]]) -> None:
        """Make each step's tasks (what, method of this class, arguments), all of a step before the next."""
        # A plain bar, not a widget: widgets stand at 0 % for ever in an executed copy.
        from tqdm import tqdm

        total, start = sum(map(len, plan)), time.perf_counter()
        bar = tqdm(total=total, disable=not self.progress or not total, file=sys.stdout, leave=False)
        with bar, self._pool(total) as pool:
            for tasks in plan:
                futures = {pool.submit(_work, self.preset, *task[1:]): task for task in tasks} if pool else {}
                try:
                    for done in as_completed(futures) if pool else tasks:
                        what, method, arguments = futures[done] if pool else done
                        bar.set_description(f"{what} {_name(arguments)}")
                        if pool:
                            done.result()
                        else:
                            getattr(self, method)(*arguments)
                        bar.update()
                except BaseException:
                    if pool:
                        pool.shutdown(cancel_futures=True)
                    raise
        if self.progress and total:
            print(f"{total} results ready after {time.perf_counter() - start:.0f} s (made, or found in the store)")

    def _pool(self, tasks: int):
        if self.jobs == 1 or tasks < 2:
            return nullcontext()
        return ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """A worker ends with the notebook that started it: a killed kernel leaves nobody training."""
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    from alignlens.models import one_thread

    one_thread()


_studies: dict[str, Study] = {}


def _work(preset: Preset, method: str, arguments: tuple) -> None:
    """One task in a worker; what it makes goes to the store, so nothing is sent back."""
    key = repr(preset)
    if key not in _studies:
        _studies[key] = Study(preset, progress=False)
    getattr(_studies[key], method)(*arguments)


def _name(arguments) -> str:
    first = arguments[0]
    return first.label if isinstance(first, Variant) else " ".join(map(str, arguments))


def _existing(path: str) -> Path | None:
    """The local file or folder that a parameter names, from the working directory or the project's folder."""
    for candidate in (Path(path).expanduser(), Path(presets.place(path))):
        if candidate.exists():
            return candidate.absolute()
    looks_local = path.startswith((".", "/", "~")) or path.endswith((".jsonl", ".json", ".csv", ".parquet"))
    if looks_local:
        raise PreferenceError(
            f"{path} does not exist, neither from the working directory nor from the project's folder"
        )
    return None


def _true_utility(prompts, responses) -> np.ndarray:
    return tinyworld.score(list(prompts), list(responses)).utility.to_numpy()


def open(preset: str = "tiny", *, progress: bool = True, **overrides) -> Study:
    """A study by the name of its preset, any field overridden: ``study.open("tiny", seeds=[0])``."""
    return Study(presets.resolve(preset, **overrides), progress=progress)


def from_notebook(names: dict) -> Study:
    """The study that a notebook's parameters describe; call it right after them (see ``presets.from_notebook``)."""
    found = Study(presets.from_notebook(names))
    if found.device == "cpu":
        from alignlens.models import one_thread

        one_thread()
    return found
