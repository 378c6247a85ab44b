"""The front door: ask a study for a result; it comes from the store or is made, with all that it depends on.

Every result is an artifact keyed by what it depends on, so notebooks run alone and in any order, a killed run goes on
where it stopped, and two studies can share a store."""

import glob
import warnings
from functools import cached_property, wraps
from pathlib import Path

import pandas as pd
from transformers import AutoConfig

from alignlens import align, models, preferences
from alignlens.core import settings, store
from alignlens.core.errors import PreferenceError, PresetError
from alignlens.core.store import Artifact, Store, content_hash
from alignlens.preferences import tinyworld
from alignlens.study import runner
from alignlens.study.stages import STAGES, TEXTS, Source, Variant

# Where and how fast a study runs does not name its results.
PLACES = ("store", "figures", "jobs", "device", "shipped", "variants", "read_batch")


def _once(method):
    """The method, called once with the same arguments: keys, formats and sources are asked for thousands of times."""

    @wraps(method)
    def kept(self, *args):
        if (method, args) not in self._kept:
            self._kept[method, args] = method(self, *args)
        return self._kept[method, args]

    return kept


class Study:
    """Everything a preset describes, made when asked for: ``study.probes(variant)`` and so on, one name a stage.

    preset : see ``settings.resolve``. progress : show one progress bar for long work."""

    def __init__(self, preset: settings.Preset, *, progress: bool = True):
        self.preset, self.progress = preset, progress
        shipped = settings.place(preset.shipped) if preset.shipped and preset.variants != "train" else ""
        self.store = Store(settings.place(preset.store), shipped if Path(shipped or "-").is_dir() else None)
        self._kept: dict[tuple, object] = {}
        self.device = models.default_device() if preset.device == "auto" else preset.device
        self._trust = {"trust_remote_code": preset.trust_remote_code}
        self.placed = {"device": self.device, **self._trust}  # how models are loaded

    def __getattr__(self, name: str):
        if name in STAGES:
            return lambda *args: STAGES[name].read(self.get(name, *args))
        raise AttributeError(f"a study has no {name!r}; its stages are {', '.join(STAGES)}")

    def get(self, name: str, *args) -> Artifact:
        """The artifact of a stage, from the store or made now."""
        stage = STAGES[name]
        label, identity = stage.label(self, *args), stage.identity(self, *args)
        return self.store.get(stage.kind, label, lambda folder: stage.make(self, folder, *args), **identity)

    @_once
    def key(self, name: str, *args) -> str:
        """The key of a result, without making it."""
        return Store.key(STAGES[name].kind, **STAGES[name].identity(self, *args))

    def working(self, name: str, *args) -> Path:
        """Where a result that takes long keeps what it needs to go on after a kill."""
        return self.store.working(self.key(name, *args))

    def make_all(self, *groups: str) -> None:
        """Make what these groups of stages hold ("variants", "probes", ..., or all), several results side by side.

        Shows one progress bar with what is being made. Later calls find everything in the store."""
        known = list(dict.fromkeys(stage.group for stage in STAGES.values()))
        if unknown := [group for group in groups if group not in known]:
            raise PresetError(f"stage {unknown[0]!r} is unknown; choose from {', '.join(known)}")
        runner.run(self, runner.plan(self, groups or known))

    def ship(self, folder: str | Path) -> int:
        """Copy what is shipped of this study into a store to ship; returns how many artifacts."""
        made = [self.get(n, *args) for n, stage in STAGES.items() if stage.ships for args in stage.wanted(self)]
        for artifact in made:
            store.ship(artifact, settings.place(str(folder)))
        return len(made)

    @property
    def run_id(self) -> str:
        """Names this study's parameters and data: eight hex digits, on every figure."""
        fields = {name: value for name, value in self.preset.model_dump().items() if name not in PLACES}
        ready = {v.label: place for v in self.variants() if (place := self.checkpoint(v.family, v.method))}
        fields["checkpoints"] = {label: self._content(place) for label, place in ready.items()}
        fields["families"] = {family: self.weights(Variant(family, "base")) for family in self.families}
        fields["pairs"] = content_hash(self.pairs[TEXTS])
        return content_hash(fields)[:8]

    @property
    def draws(self) -> dict:
        return {"folds": self.preset.folds, "bootstrap": self.preset.bootstrap}

    def reading(self, family: str) -> dict:
        """How ``activations`` reads a model that this study has loaded for it."""
        return {"batch_size": self.preset.read_batch, "formatter": self.format(family), "own": True}

    @property
    def tiny_world(self) -> bool:
        return self.preset.pairs == "tinyworld"

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """All pairs with their split; tiny-world pairs carry factors and utilities."""
        p, source = self.preset, self.preset.pairs
        if self.tiny_world:
            source = tinyworld.pairs(p.prompts, length_bias=p.length_bias, label_noise=p.label_noise)
        elif local := _existing(source):
            source = str(local)
        loaded = preferences.load_pairs(source, limit=p.limit, max_chars=p.max_chars, on_bad=p.on_bad)
        split = preferences.split_by_prompt(loaded, reward=p.reward_share, measure=p.measure_share, seed=p.split_seed)
        split.attrs["report"] = loaded.attrs["report"] | ({"source": "tiny world"} if self.tiny_world else {})
        return split

    def split(self, *names: str) -> pd.DataFrame:
        """The pairs of splits: train (methods), reward (reward model, dose checks) or measure (all measurements)."""
        return self.pairs[self.pairs.split.isin(names)].reset_index(drop=True)

    @cached_property
    def split_hash(self) -> str:
        return preferences.split_hash(self.pairs)

    @_once
    def split_key(self, *names: str) -> str:
        return content_hash(self.split(*names)[TEXTS])

    @_once
    def measured(self, family: str) -> pd.DataFrame:
        """The measured pairs of a family: the same for all its models, whole prompts, none cut by ``max_length``."""
        pairs = self.split("measure")
        pairs = pairs[align.answerable(self.format(family).encode_pairs(pairs), self.limits(family).prompt).kept]
        sizes = pairs.groupby("prompt_id", sort=False).size().cumsum()
        pairs = pairs[pairs.prompt_id.isin(sizes.index[sizes <= self.preset.measured])].reset_index(drop=True)
        preferences.check_folds(pairs, self.preset.folds)
        return pairs

    @_once
    def encoded(self, family: str) -> preferences.Encoded:
        """The measured pairs as token ids, formatted once."""
        return self.format(family).encode_pairs(self.measured(family))

    @_once
    def measured_key(self, family: str) -> str:
        return content_hash(self.measured(family)[TEXTS])

    @_once
    def format(self, family: str) -> preferences.Formatter:
        """The one formatter of a family, for training and for measuring."""
        tokenizer = models.load_tokenizer(self.source(Variant(family, "base")).model, **self._trust)
        return preferences.Formatter(tokenizer, max_length=self.limits(family).pair)

    @_once
    def limits(self, family: str) -> align.Limits:
        """Tokens of a pair, a prompt and a sampled answer at most: as the preset says, or what the base can hold."""
        p, (name, revision) = self.preset, models.pinned(self.source(Variant(family, "base")).model)
        config = AutoConfig.from_pretrained(name, **revision, **self._trust)
        found = align.limits(config, p.max_length, p.response_tokens)
        if self.progress and (found.pair, found.answer) != (p.max_length, p.response_tokens):
            told = f"pairs have at most {found.pair} tokens, prompts {found.prompt}, sampled answers {found.answer}"
            warnings.warn(f"{family}: max_length or response_tokens is too much for its base: {told}", stacklevel=3)
        return found

    @property
    def families(self) -> list[str]:
        return list(self.preset.families)

    @property
    def methods(self) -> list[str]:
        """Methods and controls, without the base."""
        return [*self.preset.methods, *self.preset.controls]

    def variants(self, family: str | None = None, *, base: bool = True) -> list[Variant]:
        """All models of the study (or of one family), each base first."""
        names = [*(["base"] if base else []), *self.methods]
        families = [family] if family else self.families
        return [Variant(f, m, seed) for f in families for m in names for seed in self.seeds_of(f, m)]

    def first_seeds(self, *, base: bool = True) -> list[Variant]:
        """The first seed of every method and control in every family, each base first."""
        return [v for v in self.variants(base=base) if v.seed == self.seeds_of(v.family, v.method)[0]]

    def seeds_of(self, family: str, method: str) -> tuple[int, ...]:
        """Seeds of a variant; a ready checkpoint has one."""
        return (0,) if method in ("base", "random") or self.checkpoint(family, method) else self.preset.seeds

    def checkpoint(self, family: str, method: str) -> str | None:
        """The ready checkpoint of a variant (hub id or folder), if the preset names one."""
        if self.preset.variants == "train" or method in ("base", "random"):
            return None
        found = self.preset.checkpoints.get(f"{family}:{method}") or self.preset.checkpoints.get(family)
        return found.format(method=settings.SPELLING.get(method, method)) if found else None

    @property
    def needs_reward_model(self) -> bool:
        """Whether a variant of this study is trained against a reward model."""
        online = {"ppo", "grpo"} & {v.method for v in self.variants() if not self.checkpoint(v.family, v.method)}
        return bool(online) and self.preset.reward == "model" and self.preset.variants != "load"

    @property
    def judged(self) -> bool:
        """Whether samples can be scored at all."""
        return self.tiny_world or self.needs_reward_model

    @_once
    def _content(self, place: str) -> str:
        """What a base or checkpoint is known by: the hash of a local one's files, the id (and revision) of a hub's."""
        local = _existing(place)
        return content_hash(local) if local else place

    def weights(self, variant: Variant) -> str:
        """The key of a model's weights, without making them."""
        base = self.preset.families[variant.family]
        if variant.method == "base":
            return self.key("base", variant.family) if base.startswith("tiny:") else self._content(base)
        if place := self.checkpoint(variant.family, variant.method):
            return self._content(place)
        return self.key("random" if variant.method == "random" else "variant", variant)

    @_once
    def source(self, variant: Variant) -> Source:
        """Where a variant's weights are, after making them if need be."""
        if variant.method == "base":
            place = self.preset.families[variant.family]
            return Source(str(self.base(variant.family).path if place.startswith("tiny:") else _found(place)))
        parent, place = self.source(variant.base).model, self.checkpoint(variant.family, variant.method)
        if not place:
            made = self.get("random" if variant.method == "random" else "variant", variant)
            return Source(parent, str(made.path))
        return Source(parent, _found(place)) if self._has_adapter(variant) else Source(_found(place))

    def load(self, variant: Variant):
        """(model, tokenizer) of a variant, an adapter merged into its base."""
        return models.load(self.source(variant).model, self.source(variant).adapter, **self.placed)

    @_once
    def _shape(self, family: str) -> dict:
        return models.describe(self.source(Variant(family, "base")).model, **self._trust)

    def width(self, family: str) -> int:
        """Dimensions of a family's residual stream."""
        return self._shape(family)["d_model"]

    def dictionary_layers(self, family: str) -> tuple[int, ...]:
        """The layers at which dictionaries of a family are trained and read, the same for all its models."""
        depth, chosen = self._shape(family)["layers"], self.preset.dictionary_layers
        settings.check_depth(chosen, depth, f"dictionary_layers ({family})", PresetError)
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4})) if chosen == "spread" else chosen

    def crosscoder_layer(self, family: str) -> int:
        """The middle one of the dictionary layers."""
        layers = self.dictionary_layers(family)
        return layers[len(layers) // 2]

    def comparisons(self, family: str | None = None, *, every: bool = False) -> list[tuple[str, Variant, Variant]]:
        """What is compared, of one family or all: (name, first, second) of every method's first seed and of the nulls.

        Nulls: "self" (the base with itself), "seeds" (two seeds of one method), "random" (a random direction).
        every : as geometry compares, all seeds and several random directions, but no "self"."""
        if family is None:
            return [compared for f in self.families for compared in self.comparisons(f, every=every)]
        base, seeds = Variant(family, "base"), {m: self.seeds_of(family, m) for m in self.methods}
        own = [v for v in self.variants(family, base=False) if every or v.seed == seeds[v.method][0]]
        out = [(v.method, base, v) for v in own] + ([] if every else [("self", base, base)])
        if several := [m for m in self.methods if len(seeds[m]) > 1]:
            method = min(several, key=lambda m: m != "dpo")
            out.append(("seeds", *[Variant(family, method, seed) for seed in seeds[method][:2]]))
        if self.pattern(family):
            draws = range(self.preset.null_draws if every else 1)
            out += [("random", base, Variant(family, "random", draw)) for draw in draws]
        return out

    def pattern(self, family: str) -> Variant | None:
        """The variant whose adapter a random direction is as large as: dpo, else the first method that has one."""
        own = [v for v in self.first_seeds(base=False) if v.family == family and self._has_adapter(v)]
        return min(own, key=lambda v: v.method != "dpo", default=None)

    def _has_adapter(self, variant: Variant) -> bool:
        place = self.checkpoint(variant.family, variant.method)
        return not place or bool((local := _existing(place)) and (local / "adapter_config.json").exists())


def _existing(path: str) -> Path | None:
    """The local file or folder that a parameter names, from the working directory or the project's folder."""
    for candidate in (Path(path).expanduser(), Path(settings.place(path))):
        if candidate.exists() or any(glob.iglob(str(candidate))):
            return candidate.absolute()
    if preferences.is_local(path):
        raise PreferenceError(f"{path} does not exist, neither from the working directory nor in the project's folder")
    return None


def _found(place: str) -> str:
    return str(_existing(place) or place)


def open(preset: str = "tiny", *, progress: bool = True, **overrides) -> Study:
    """A study by the name of its preset, any field overridden: ``study.open("tiny", seeds=[0])``."""
    return Study(settings.resolve(preset, **overrides), progress=progress)


def from_notebook(names: dict) -> Study:
    """The study that a notebook's parameters describe; call it right after them (see ``settings.from_notebook``)."""
    found = Study(settings.from_notebook(names))
    if found.device == "cpu":
        models.one_thread()
    return found
