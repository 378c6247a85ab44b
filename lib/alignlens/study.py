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
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import pandas as pd

from . import preferences, presets, store, tinyworld
from .errors import AlignError, PreferenceError, PresetError
from .presets import Preset
from .store import Artifact, Store, content_hash

# Raised by hand when the results of a stage change.
VERSIONS = {
    "base": 1, "reward": 1, "variant": 1, "activations": 1, "behavior": 1, "probes": 1, "random": 1, "tokens": 1,
    "dictionary": 1, "latents": 1, "published_crosscoder": 1, "published_sae": 1, "calibration": 1,
}  # fmt: skip
POOLED = 4  # a pooled dictionary sees this many times the tokens of one model, in equal parts from all its models
SPLICED_PAIRS = 100


@dataclass(frozen=True, order=True)
class Variant:
    """One model of a study: a family, a method, a control or "base", and a seed."""

    family: str
    method: str
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.family}-base" if self.method == "base" else f"{self.family}-{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what Transformers loads, an adapter on top if any, and the hash of both."""

    model: str
    adapter: str | None
    key: str


class Study:
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
        from .models import default_device

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
            return Store.key("base", **self._base_identity(family))
        local = _existing(base)
        return content_hash(local) if local else base  # a hub id; give "id" at a fixed revision in checkpoints

    def _base_identity(self, family: str) -> dict:
        p = self.preset
        architecture = p.families[family].removeprefix("tiny:")
        names = ("layers", "d_model", "vocab_size", "pretrain_steps", "pretrain_batch", "pretrain_rate")
        # Held-out prompts are kept out of the pretraining text as well, so the split is one of its inputs.
        inputs = {"held out": content_hash(sorted(self.split("measure").prompt)) if self.tiny_world else "none"}
        parameters = {"architecture": architecture, "seed": 0} | {n: getattr(p, n) for n in names}
        return {"inputs": inputs, "parameters": parameters, "version": VERSIONS["base"]}

    def base(self, family: str) -> Artifact:
        """A tiny base, trained from scratch on the tiny world's text."""
        identity = self._base_identity(family)
        p = self.preset

        def make(folder: Path) -> dict:
            from . import models

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
        from . import models

        source = self.source(variant)
        return models.load(
            source.model,
            source.adapter,
            device=self.device,
            trust_remote_code=self.preset.trust_remote_code,
        )

    def recipe(self, method: str, seed: int):
        """The training recipe of a method (or "reward") under this preset."""
        from . import align

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
        from . import align

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
        from . import align, models

        recipe = self.recipe(variant.method, variant.seed)
        online = variant.method in align.ONLINE
        inputs = {"base": self._base_keys[variant.family], "pairs": self._split_keys["train"]}
        inputs["heldout"] = self._split_keys["reward"]
        reward = None
        if online and self.preset.reward == "model":
            inputs["reward"] = self._reward_key(variant.family, variant.seed)
        elif online:
            inputs["reward"] = "true utility"
        identity = {
            "inputs": inputs,
            "parameters": dataclasses.asdict(recipe),
            "version": VERSIONS["variant"],
        }
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

    # --- measurements -----------------------------------------------------------------------------------------------

    def activations(self, variant: Variant):
        """Residual streams of the family's measured pairs: ``activations.Activations``."""
        return self.read(variant, self.measured(variant.family), "measured")

    def read(self, variant: Variant, pairs: pd.DataFrame, what: str):
        """Residual streams of any pairs; ``what`` names them in the store."""
        from . import activations

        p = self.preset
        layers = p.layers_measured if p.layers_measured == "all" else list(p.layers_measured)

        def make(folder: Path) -> dict:
            model, tokenizer = self.load(variant)
            found = activations.read(
                model, tokenizer, pairs, layers=layers, position=p.position, batch_size=p.read_batch,
                formatter=self.format(variant.family), own=True,
            )  # fmt: skip
            found.save(folder)
            return {"pairs": len(found.prompt_id), "what": what}

        made = self.store.get(
            "activations",
            f"{variant.label}-{what}",
            make,
            inputs={"model": self.source(variant).key, "pairs": content_hash(pairs[["prompt", "chosen", "rejected"]])},
            parameters={"position": p.position, "layers": layers, "max_length": p.max_length},
            version=VERSIONS["activations"],
        )
        return activations.Activations.load(made.path)

    def judge(self, family: str):
        """Who scores samples: the tiny world's true utility, else the family's reward model (seed 0).

        Where variants are trained against reward models, tiny-world samples also get that model's ``reward``.
        """
        from . import behavior

        reward = self._reward_function(family) if self.needs_reward_model else None
        if not self.tiny_world:
            return behavior.Judge("reward model", lambda p, r: pd.DataFrame({"score": reward(p, r)}))

        def score(prompts, responses):
            table = tinyworld.score(prompts, responses).rename(columns={"utility": "score"})
            return table.assign(reward=reward(prompts, responses)) if reward else table

        return behavior.Judge("true utility", score)

    def _reward_function(self, family: str):
        from . import models

        base = self.source(Variant(family, "base")).model
        reward = models.load_reward(base, self.reward_model(family).path, device=self.device)
        format = self.format(family)

        def rewards(prompts, responses):
            ids = [format.encode(p, r or " ") for p, r in zip(prompts, responses, strict=True)]
            return models.rewards(reward, [p for p, _ in ids], [r for _, r in ids], pad_id=format.pad_id)

        return rewards

    def behavior(self, variant: Variant) -> pd.DataFrame:
        """Log-probabilities and samples of one model on the measured pairs, one row a pair."""
        from . import behavior

        p = self.preset
        pairs = self.measured(variant.family)
        judged = self.tiny_world or self.needs_reward_model

        def make(folder: Path) -> dict:
            model, _ = self.load(variant)
            # A merged model samples about twice as fast as one with its adapter beside it, so the base is loaded too.
            reference = self.load(Variant(variant.family, "base"))[0] if variant.method != "base" else None
            table = behavior.measure(
                model, self.format(variant.family), pairs, self.judge(variant.family) if judged else None,
                reference=reference, sampled=p.sampled, response_tokens=p.response_tokens,
                seed=variant.seed, batch_size=p.read_batch,
            )  # fmt: skip
            store.write_table(folder / "behavior.parquet", table)
            return {}

        inputs = {"model": self.source(variant).key, "pairs": self._measured_key(variant.family)}
        if self.needs_reward_model:
            inputs["judge"] = self._reward_key(variant.family, 0)
        parameters = {"sampled": p.sampled, "tokens": p.response_tokens, "seed": variant.seed, "max": p.max_length}
        made = self.store.get(
            "behavior", variant.label, make, inputs=inputs, parameters=parameters, version=VERSIONS["behavior"]
        )
        return made.table("behavior.parquet")

    def probes(self, variant: Variant) -> Artifact:
        """All probe tables of one model.

        Tables: ``grouped``, ``published`` (``probes.fit_layers`` under each protocol); for a base ``null_grouped`` and
        ``null_published`` (permuted signs), for a variant ``transfer`` against its base. ``scores.safetensors`` holds
        out-of-fold scores, labels, folds and pairs of both protocols.
        """
        from . import probes

        p = self.preset
        base = Variant(variant.family, "base") if variant.method != "base" else None

        def make(folder: Path) -> dict:
            own = self.activations(variant)
            sides = (own.chosen, own.rejected, own.prompt_id)
            draws = {"folds": p.folds, "bootstrap": p.bootstrap}
            tables = {
                "grouped": probes.fit_layers(*sides, protocol="grouped", **draws),
                "published": probes.fit_layers(*sides, protocol="published", **draws),
            }
            if base is None:
                for protocol in ("grouped", "published"):
                    null = probes.permuted_sign_null(
                        *sides, protocol=protocol, folds=p.folds, permutations=p.permutations
                    )
                    tables[f"null_{protocol}"] = null.assign(layer=own.layers)
            else:
                tables["transfer"] = probes.transfer(self.activations(base), own, own.prompt_id, **draws)
            for name, table in tables.items():
                store.write_table(folder / f"{name}.parquet", table.assign(layer=own.layers))
            arrays = {}
            for protocol in ("grouped", "published"):
                out = probes.out_of_fold(*sides, protocol=protocol, folds=p.folds)
                for name in ("scores", "labels", "fold_ids", "pair_ids"):
                    arrays[f"{protocol}.{name}"] = np.ascontiguousarray(getattr(out, name))
            store.write_arrays(folder / "scores.safetensors", arrays)
            return {}

        inputs = {"activations": self._activations_key(variant)}
        if base is not None:
            inputs["base"] = self._activations_key(base)
        parameters = {"folds": p.folds, "bootstrap": p.bootstrap}
        if base is None:
            parameters["permutations"] = p.permutations
        return self.store.get(
            "probes", variant.label, make, inputs=inputs, parameters=parameters, version=VERSIONS["probes"]
        )

    def _activations_key(self, variant: Variant) -> str:
        p = self.preset
        pairs = self._measured_key(variant.family)
        return content_hash([self.source(variant).key, pairs, p.position, list(p.layers_measured)])

    # --- dictionaries -----------------------------------------------------------------------------------------------

    def random_direction(self, variant: Variant) -> Artifact:
        """The null of a comparison: an adapter of random direction, each module's update as large as a variant's.

        The pattern is the first seed of dpo, else of the first method that has an adapter.
        """
        from . import models

        patterns = [Variant(variant.family, m, self.seeds_of(variant.family, m)[0]) for m in self.methods]
        patterns.sort(key=lambda v: v.method != "dpo")
        found = next((s for s in map(self.source, patterns) if s.adapter), None)
        if found is None:
            raise AlignError(
                f"a random direction for {variant.family} needs a variant with a LoRA adapter as its pattern: "
                "merged checkpoints have none"
            )
        return self.store.get(
            "random",
            variant.label,
            lambda folder: models.random_adapter(found.adapter, folder, seed=variant.seed),
            inputs={"pattern": found.key},
            parameters={"seed": variant.seed},
            version=VERSIONS["random"],
        )

    def dictionary_layers(self, family: str) -> list[int]:
        """The layers at which dictionaries of a family are trained and read, the same for all its models."""
        from . import models

        if self.preset.dictionary_layers != "spread":
            return sorted(self.preset.dictionary_layers)
        depth = models.describe(self.source(Variant(family, "base")).model)["layers"]
        return sorted({int(depth * share) for share in (0.25, 0.5, 0.75)})

    def crosscoder_layer(self, family: str) -> int:
        """The middle one of the dictionary layers."""
        layers = self.dictionary_layers(family)
        return layers[len(layers) // 2]

    def tokens(self, variant: Variant, split: str = "measure", *, layers=None, limit: int | None = None, keep=True):
        """Residual streams at every response token, ``activations.Tokens``, memory-mapped from the store.

        split : "measure" (the family's measured pairs) or "train" (all other pairs: what dictionaries are trained on).
        keep : False reads them into memory and stores nothing, for what is looked at once.
        """
        from . import activations

        p = self.preset
        layers = layers or self.dictionary_layers(variant.family)
        pairs = self.measured(variant.family) if split == "measure" else self._dictionary_pairs

        def read(folder: Path | None):
            model, tokenizer = self.load(variant)
            return activations.read_tokens(
                model, tokenizer, pairs, layers=layers, limit=limit, folder=folder, batch_size=p.read_batch,
                formatter=self.format(variant.family), own=True,
            )  # fmt: skip

        def make(folder: Path) -> dict:
            return {"tokens": len(read(folder).row), "split": split}

        if not keep:
            return read(None)

        made = self.store.get(
            "tokens",
            f"{variant.label}-{split}",
            make,
            inputs={"model": self.source(variant).key, "pairs": content_hash(pairs[["prompt", "chosen", "rejected"]])},
            parameters={"layers": layers, "limit": limit, "max_length": p.max_length},
            version=VERSIONS["tokens"],
        )
        return activations.Tokens.load(made.path)

    @cached_property
    def _dictionary_pairs(self) -> pd.DataFrame:
        return self.pairs[self.pairs.split != "measure"].reset_index(drop=True)

    @cached_property
    def _dictionary_pairs_key(self) -> str:
        return content_hash(self._dictionary_pairs[["prompt", "chosen", "rejected"]])

    def sae(self, family: str, layer: int, seed: int = 0) -> Artifact:
        """One sparse autoencoder for the base and all variants of a family, pooled: latent i is the same in all."""
        models = self.variants(family)
        limit = POOLED * self.preset.dictionary_tokens // len(models)
        layers = self.dictionary_layers(family)

        def streams() -> dict[str, np.ndarray]:
            parts = [self._kept(self.tokens(m, "train", layers=layers, limit=limit), layer) for m in models]
            return {"pooled": np.concatenate([x[keep] for x, keep in parts])}, _masked([keep for _, keep in parts])

        return self._dictionary(f"{family}-pooled-layer{layer}", models, [layer], streams, limit, seed)

    def crosscoder(self, first: Variant, second: Variant, *, window: bool = False, seed: int = 0) -> Artifact:
        """A crosscoder of two models of a family, streams base and aligned, at the middle layer or over all layers."""
        layers = self.dictionary_layers(first.family)
        layers = layers if window else [self.crosscoder_layer(first.family)]

        def streams() -> dict[str, np.ndarray]:
            limit = self.preset.dictionary_tokens
            read = [self.tokens(m, "train", layers=layers, limit=limit) for m in (first, second)]
            parts = [self._kept(t, None if window else layers[0]) for t in read]
            keep = parts[0][1] & parts[1][1]
            return {"base": parts[0][0][keep], "aligned": parts[1][0][keep]}, _masked([keep])

        label = f"{first.label}-vs-{second.label}{'-window' if window else ''}"
        return self._dictionary(label, [first, second], layers, streams, self.preset.dictionary_tokens, seed)

    def _kept(self, tokens, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(streams at a layer, or at all for None; which tokens no high norm spoils). Special tokens are no
        responses.
        """
        from . import activations

        x = tokens.streams if layer is None else tokens.at(layer)
        return x, ~activations.high_norm(x)

    def _dictionary(self, label: str, models: list[Variant], layers, streams, limit: int, seed: int) -> Artifact:
        from . import activations, dictionaries

        p = self.preset
        config = dictionaries.Config(width=p.dictionary_width, k=p.dictionary_k, epochs=p.dictionary_epochs, seed=seed)
        hooks = [activations.hook_name(layer) for layer in layers]
        facts = {"hooks": hooks, "models": [self.source(m).key for m in models]}
        identity = {
            "inputs": {"pairs": self._dictionary_pairs_key, "models": content_hash(facts["models"])},
            "parameters": {"config": dataclasses.asdict(config), "layers": layers, "limit": limit, "seed": seed},
            "version": VERSIONS["dictionary"],
        }

        def make(folder: Path) -> dict:
            rows, masked = streams()
            checkpoint = self.store.root / ".locks" / f"{Store.key('dictionary', **identity)}.training"
            found = dictionaries.train(rows, config, facts=facts, device=self.device, checkpoint=checkpoint)
            found.save(folder, half=True)
            return {"tokens": len(next(iter(rows.values()))), "masked": masked, **found.history.iloc[-1].to_dict()}

        return self.store.get("dictionary", label if seed == 0 else f"{label}-seed{seed}", make, **identity)

    def read_dictionary(self, artifact: Artifact, layers: list[int]):
        """The dictionary of an artifact; DictionaryError if it was trained at other layers."""
        from . import activations, dictionaries

        expect = {"hooks": [activations.hook_name(layer) for layer in layers]}
        return dictionaries.Dictionary.load(artifact.path, expect=expect)

    def latents(self, variant: Variant) -> Artifact:
        """What the family's pooled dictionaries read in one model on the measured pairs.

        Tables, all with a column layer: ``usage``, ``quality``; of a variant also ``change`` and ``anchors`` against
        its base, of a base ``factors`` and ``factor_null`` (tiny world). See the module ``latents``.
        """
        layers, base = self.dictionary_layers(variant.family), Variant(variant.family, "base")
        saes = {layer: self.sae(variant.family, layer) for layer in layers}

        def make(folder: Path) -> dict:
            shown = variant.seed == self.seeds_of(variant.family, variant.method)[0]  # others are read once only
            own, reference = self.tokens(variant, keep=shown), self.tokens(base)
            parts = [
                self._latent_tables(variant, layer, saes[layer], own, reference, spliced=shown) for layer in layers
            ]
            for name in parts[0]:
                table = pd.concat([part[name].assign(layer=layer) for part, layer in zip(parts, layers, strict=True)])
                store.write_table(folder / f"{name}.parquet", table)
            return {}

        return self.store.get(
            "latents",
            variant.label,
            make,
            inputs={"model": self.source(variant).key, "pairs": self._measured_key(variant.family)}
            | {f"sae {layer}": artifact.key for layer, artifact in saes.items()},
            parameters={"max_length": self.preset.max_length},
            version=VERSIONS["latents"],
        )

    def _latent_tables(self, variant, layer, sae, own, reference, *, spliced: bool) -> dict[str, pd.DataFrame]:
        from . import dictionaries, latents

        found = self.read_dictionary(sae, [layer])
        streams = {"pooled": own.at(layer)}
        codes = found.codes(streams)
        quality = dictionaries.evaluate(found, streams)
        if spliced:
            quality |= self._spliced(variant, layer, found, own)
        tables = {"usage": latents.usage(codes, own), "quality": pd.DataFrame([quality])}
        if variant.method != "base":
            before = found.codes({"pooled": reference.at(layer)})
            tables |= {
                "change": latents.change(before, codes, own),
                "anchors": latents.anchors(before, codes, own),
            }
        elif self.tiny_world:
            factors = tinyworld.factor_columns(self.measured(variant.family))[own.kept].reset_index(drop=True)
            tables["factors"], tables["factor_null"] = latents.factor_auroc(codes, own, factors)
        return tables

    def _spliced(self, variant: Variant, layer: int, dictionary, tokens) -> dict[str, float]:
        """Cross-entropy of the first measured pairs with the stream replaced: clean, by the dictionary, by its mean."""
        import torch

        from . import activations

        model, _ = self.load(variant)
        mean = torch.from_numpy(np.asarray(tokens.at(layer), np.float32).mean(0))

        def rebuilt(streams):
            x = streams["model"]
            return {
                "model": torch.from_numpy(dictionary.reconstruct({"pooled": x.cpu().numpy()})["pooled"]).to(x.device)
            }

        table = activations.spliced_loss(
            {"model": activations.bridge(model, own=True)},
            self.format(variant.family),
            self.measured(variant.family).head(SPLICED_PAIRS),
            layer,
            {
                "clean": None,
                "dictionary": rebuilt,
                "mean": lambda s: {"model": mean.to(s["model"]).expand_as(s["model"])},
            },
            batch_size=self.preset.read_batch,
        )
        loss = table.assign(total=table.loss * table.tokens).groupby("replacement")[["total", "tokens"]].sum()
        loss = loss.total / loss.tokens
        recovered = (loss["mean"] - loss["dictionary"]) / max(loss["mean"] - loss["clean"], 1e-9)
        return {
            "loss_clean": loss["clean"],
            "loss_increase": loss["dictionary"] - loss["clean"],
            "recovered": recovered,
        }

    def comparisons(self, family: str) -> list[tuple[str, Variant, Variant]]:
        """What crosscoders compare: (name, first, second) of every method's first seed and of the nulls.

        Nulls: "self" (the base with itself), "seeds" (two seeds of one method), "random" (a random direction).
        """
        base = Variant(family, "base")
        out = [(m, base, Variant(family, m, self.seeds_of(family, m)[0])) for m in self.methods]
        out.append(("self", base, base))
        several = [m for m in self.methods if len(self.seeds_of(family, m)) > 1]
        if several:
            method = "dpo" if "dpo" in several else several[0]
            out.append(("seeds", *[Variant(family, method, s) for s in self.seeds_of(family, method)[:2]]))
        if any(self.source(second).adapter for _, _, second in out):
            out.append(("random", base, Variant(family, "random")))
        return out

    def published_crosscoder(self, first: Variant, second: Variant) -> Artifact:
        """The published study's crosscoder of two models, at the middle layer: its tables only.

        Trained, as published, on one vector a prompt (its last token). Tables: ``classes`` (``sparc.classify``),
        history, ``lasso_*`` and ``geometry_*``, each published and corrected; ``facts.json``: quality, sharing ratio,
        thresholds.
        """
        from . import activations, sparc

        layer, p = self.crosscoder_layer(first.family), self.preset
        pairs = self._dictionary_pairs.drop_duplicates("prompt_id").head(p.published_pairs).reset_index(drop=True)
        config = sparc.Config(topk=min(sparc.Config().topk, 4 * self.width(first.family)))

        def make(folder: Path) -> dict:
            streams = {}
            for name, variant in zip(sparc.STREAMS, (first, second), strict=True):
                model, tokenizer = self.load(variant)
                streams[name] = activations.read(
                    model, tokenizer, pairs, layers=[layer], position="prompt", batch_size=p.read_batch,
                    formatter=self.format(variant.family), own=True,
                ).chosen[:, 0]  # fmt: skip
            found = sparc.train(streams, config, device=self.device)
            table = sparc.classify(found, streams)
            tables = {"classes": table, "history": found.history}
            for name, corrected in (("published", False), ("corrected", True)):
                tables[f"lasso_{name}"] = sparc.superposition(
                    found, table, corrected=corrected, max_latents=16, draws=20
                )
                tables[f"geometry_{name}"] = sparc.shared_geometry(found, table, corrected=corrected, permutations=10)
            for name, part in tables.items():
                store.write_table(folder / f"{name}.parquet", part)
            facts = {"quality": sparc.quality(found, streams), "sharing": sparc.feature_sharing_ratio(table)}
            store.write_json(folder / "facts.json", facts | {"thresholds": table.attrs["thresholds"]})
            return {}

        return self.store.get(
            "published_crosscoder",
            f"{first.label}-vs-{second.label}",
            make,
            inputs={
                "first": self.source(first).key,
                "second": self.source(second).key,
                "pairs": content_hash(pairs[["prompt", "chosen", "rejected"]]),
            },
            parameters={"config": dataclasses.asdict(config), "layer": layer, "max_length": p.max_length},
            version=VERSIONS["published_crosscoder"],
        )

    def published_sae(self, variant: Variant) -> Artifact:
        """The published study's autoencoder of one model at that model's own best layer: quality and usage only.

        Width 8 x d, k and steps in the published proportions to d and to the width.
        """
        from . import dictionaries, latents

        p, d = self.preset, self.width(variant.family)
        probes = self.probes(variant).table("published.parquet")
        layer = int(probes.layer[probes.auroc.idxmax()])
        config = dictionaries.published(d, width=8 * d, k=max(2, round(64 * d / 2048)), batch_size=64, epochs=2)

        def make(folder: Path) -> dict:
            train = self.tokens(variant, "train", layers=[layer], limit=p.dictionary_tokens)
            held_out = self.tokens(variant, layers=[layer])
            found = dictionaries.train({"pooled": train.at(layer)}, config, device=self.device)
            streams = {"pooled": held_out.at(layer)}
            store.write_table(folder / "usage.parquet", latents.usage(found.codes(streams), held_out))
            store.write_table(folder / "history.parquet", found.history)
            quality = dictionaries.evaluate(found, streams)
            store.write_json(folder / "quality.json", quality | {"layer": layer})
            return {}

        pairs = [self._dictionary_pairs, self.measured(variant.family)]
        return self.store.get(
            "published_sae",
            variant.label,
            make,
            inputs={
                "model": self.source(variant).key,
                "pairs": content_hash([content_hash(t[["prompt", "chosen", "rejected"]]) for t in pairs]),
            },
            parameters={"config": dataclasses.asdict(config), "layer": layer, "limit": p.dictionary_tokens},
            version=VERSIONS["published_sae"],
        )

    def calibrations(self) -> list[tuple[str, str, int, int]]:
        """What ``calibration`` is asked for: (regime, instrument, seed, samples) of the comparison and of the curve."""
        p = self.preset
        out = [
            (regime, instrument, seed, p.calibration_samples)
            for regime in p.calibration_regimes
            for instrument in ("alignlens", "l1", "published")
            for seed in range(p.calibration_seeds)
        ]
        fewer = [p.calibration_samples // share for share in (8, 4, 2)]
        return out + [(r, "alignlens", s, n) for r in p.calibration_regimes for n in fewer for s in (0, 1)]

    def calibration(self, regime: str, instrument: str, seed: int, samples: int) -> Artifact:
        """Labels against planted truth, ``score.parquet`` of ``calibration.run``; independent of the study's models."""
        # One pass of 200,000 rows in batches of 32 is about as many steps as the published crosscoder was trained for.
        epochs = {"alignlens": 8, "l1": 4, "published": 1}[instrument]
        from . import calibration

        parameters = {"regime": regime, "instrument": instrument, "seed": seed, "samples": samples, "epochs": epochs}

        def make(folder: Path) -> dict:
            table = calibration.run(regime, seed, instrument, samples=samples, epochs=epochs)
            store.write_table(folder / "score.parquet", table)
            return {}

        return self.store.get(
            "calibration", f"{regime}-{instrument}-{samples}-seed{seed}", make,
            inputs={}, parameters=parameters, version=VERSIONS["calibration"],
        )  # fmt: skip

    def ship(self, folder: str | Path) -> int:
        """Copy all bases, reward models and variants of this study into a store to ship; returns how many."""
        made = [self.base(f) for f in self.families if self.preset.families[f].startswith("tiny:")]
        if self.needs_reward_model:
            made += [self.reward_model(f, s) for f in self.families for s in self.preset.seeds]
        made += [self.variant(v) for v in self._slowest_first()]
        made += [getattr(self, method)(*words) for tasks in self._dictionary_plan() for _, method, words in tasks]
        made += [self.calibration(*words) for words in self.calibrations()]
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
            else:
                raise PresetError(
                    f"stage {stage!r} is unknown; choose from variants, behavior, probes, calibration, dictionaries, "
                    "latents"
                )
        self._run(plan)

    def _dictionary_plan(self) -> list[list[tuple[str, str, tuple]]]:
        """Everything that dictionaries need trained: random directions first, then all that is independent."""
        plan = [[], []]
        for family in self.families:
            found = self.comparisons(family)
            plan[0] += [("random direction", "random_direction", (v,)) for _, _, v in found if v.method == "random"]
            plan[1] += [("autoencoder", "sae", (family, layer)) for layer in self.dictionary_layers(family)]
            plan[1].append(("autoencoder", "sae", (family, self.crosscoder_layer(family), 1)))
            plan[1] += [("crosscoder", "crosscoder", pair) for _, *pair in found]
            plan[1].append(("window", "window", (family,)))
            plan[1] += [("published crosscoder", "published_crosscoder", pair) for _, *pair in found]
            own = [Variant(family, m, self.seeds_of(family, m)[0]) for m in ["base", *self.methods]]
            plan[1] += [("published autoencoder", "published_sae", (v,)) for v in own]
        return plan

    def window(self, family: str) -> Artifact:
        """The multi-layer crosscoder of a family: its base and the first seed of its first method (dpo, if there)."""
        _, first, second = min(self.comparisons(family), key=lambda c: c[0] != "dpo")
        return self.crosscoder(first, second, window=True)

    @property
    def needs_reward_model(self) -> bool:
        """Whether a variant of this study is trained against a reward model."""
        online = {"ppo", "grpo"} & {v.method for v in self.variants() if not self.checkpoint(v.family, v.method)}
        return bool(online) and self.preset.reward == "model" and self.preset.variants != "load"

    def width(self, family: str) -> int:
        """Dimensions of a family's residual stream."""
        from . import models

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
    _one_thread()


def _one_thread() -> None:
    """Processes share the cores: each keeps to one thread, or they slow each other down many times over."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


def _masked(kept: list[np.ndarray]) -> float:
    """Share of tokens left out."""
    return float(1 - np.concatenate(kept).mean())


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
        _one_thread()
    return found
