"""Presets: what a study is. Every field can be overridden by name, from a notebook or from papermill."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from alignlens.core.errors import AlignlensError, PresetError

METHODS = ("ppo", "dpo", "simpo", "orpo", "grpo", "kto")
CONTROLS = ("sft", "shuffled")

# Of the tiny bases' adapters: each reaches the target dose in 30 to 120 steps, where its loss can reach it at all.
TINY_RATES = {
    "ppo": 7e-4, "dpo": 1e-3, "simpo": 1e-3, "orpo": 2e-3, "grpo": 1e-3, "kto": 1.5e-3, "sft": 3e-3, "shuffled": 1e-3,
    "reward": 2e-3,
}  # fmt: skip
LORA_RATES = {
    "ppo": 2e-5, "dpo": 2e-5, "simpo": 2e-5, "orpo": 5e-5, "grpo": 2e-5, "kto": 2e-5, "sft": 1e-4, "shuffled": 2e-5,
    "reward": 1e-4,
}  # fmt: skip

# The merged checkpoints of arXiv 2606.09850, as its result files name them.
PUBLISHED_CHECKPOINTS = {
    "smollm3": "MInAlA/SmolLM3-3B-{method}-merged",
    "llama": "MInAlA/Llama-3.2-3B-{method}-merged",
    "llama:ppo": "MInAlA/Llama-3.2-3B-Instruct-PPO-merged",
    "llama:grpo": "MInAlA/Llama-3.2-3B-Instruct-GRPO-merged",
    "llama:kto": "MInAlA/Llama-3.2-3B-Instruct-KTO-merged",
    "qwen3": "MInAlA/Qwen3-4B-Instruct-2507-{method}-merged",
    "qwen3:orpo": "MInAlA/Qwen3-4B-ORPO-merged",
}
SPELLING = {"ppo": "PPO", "dpo": "DPO", "simpo": "SimPO", "orpo": "ORPO", "grpo": "GRPO", "kto": "KTO"}


@dataclass(frozen=True)
class Preset:
    """All parameters of a study.

    What is compared
        families : name -> base. A base is a hub id, a local folder, or ``tiny:ARCHITECTURE``, trained here.
        methods, controls, seeds : the variants of each family.
        variants : "auto" takes stored variants and trains what is missing; "load" never trains; "train" ignores what
            is shipped and trains all.
        checkpoints : ready variants, "family:method" (or "family", with ``{method}``) -> hub id or local folder.
        recipe : "study" or "published" (see ``align.PUBLISHED``).
    Pairs
        pairs : "tinyworld", a file (.jsonl, .csv, .parquet) or a hub id.
        prompts, length_bias, label_noise : of the tiny world. limit, max_chars, on_bad : of a file or hub data set.
        reward_share, measure_share, split_seed : how prompts are split.
        measured, sampled : pairs measured and prompts answered, at most.
    Tiny bases
        layers, d_model, vocab_size, pretrain_steps, pretrain_batch, pretrain_rate.
    Alignment
        steps, batch_size, micro_batch_size, max_length, response_tokens, lora_rank, learning_rates, stop, dose,
        check_every, check_prompts; reward : "model" (trained on the reward split) or "truth" (tiny world);
        reward_steps.
    Measurement
        position : last | mean | prompt. layers_measured : "all" or a list. read_batch, folds, bootstrap, permutations.
    Dictionaries
        dictionary_layers : "spread" (a quarter, half and three quarters of the depth) or a list; crosscoders read the
            middle one. dictionary_width, dictionary_k, dictionary_epochs. dictionary_tokens : training tokens of a
            model. published_pairs : prompts that the published crosscoder is trained on. calibration_regimes,
            calibration_seeds, calibration_samples : of the planted truth, see ``calibration``.
    Geometry and causes
        null_draws : random LoRA directions behind the null of geometry. dose_shares : parts of the way from base to
            variant that are measured besides the whole way. causal_pairs : pairs scored under each intervention.
            random_directions : norm-matched random directions beside each named one, at least 20. steer_strengths : in
            units of the stream's root-mean-square norm.
    Where
        store : folder or URL of made artifacts. shipped : read-only store looked up first. figures : where pictures go.
        device : "auto", "cpu" or "cuda". jobs : processes side by side. trust_remote_code.
    """

    name: str = "tiny"
    families: dict = field(
        default_factory=lambda: {"llama": "tiny:llama", "qwen3": "tiny:qwen3", "smollm3": "tiny:smollm3"}
    )
    methods: tuple = METHODS
    controls: tuple = CONTROLS
    seeds: tuple = (0, 1, 2)
    variants: str = "auto"
    checkpoints: dict = field(default_factory=dict)
    recipe: str = "study"

    pairs: str = "tinyworld"
    prompts: int = 4800
    length_bias: float = 0.0
    label_noise: float = 0.0
    limit: int | None = None
    max_chars: int | None = None
    on_bad: str = "refuse"
    reward_share: float = 0.2
    measure_share: float = 0.2
    split_seed: int = 0
    measured: int = 1000
    sampled: int = 200

    layers: int = 6
    d_model: int = 96
    vocab_size: int = 1024
    pretrain_steps: int = 1000
    pretrain_batch: int = 64
    pretrain_rate: float = 4e-3

    steps: int = 120
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_length: int = 128
    response_tokens: int = 48
    lora_rank: int = 8
    learning_rates: dict = field(default_factory=lambda: dict(TINY_RATES))
    stop: str = "dose"
    dose: float = 1.5
    check_every: int = 5
    check_prompts: int = 64
    reward: str = "model"
    reward_steps: int = 200

    position: str = "last"
    layers_measured: str | tuple = "all"
    read_batch: int = 64
    folds: int = 5
    bootstrap: int = 1000
    permutations: int = 100

    dictionary_layers: str | tuple = "spread"
    dictionary_width: int = 256
    dictionary_k: float = 10
    dictionary_epochs: float = 8
    dictionary_tokens: int = 60_000
    published_pairs: int = 1600
    calibration_regimes: tuple = ("easy", "hard")
    calibration_seeds: int = 5
    calibration_samples: int = 200_000

    null_draws: int = 3
    dose_shares: tuple = (0.33, 0.67)
    causal_pairs: int = 48
    random_directions: int = 20
    steer_strengths: tuple = (-0.25, 0.25, 0.5)

    store: str = ".alignlens"
    shipped: str | None = "data/tiny"
    figures: str = "figures"
    device: str = "auto"
    jobs: int = 0
    trust_remote_code: bool = False


PRESETS = MappingProxyType(
    {
        "smoke": Preset(
            name="smoke",
            families={"llama": "tiny:llama"},
            methods=("dpo", "kto"),
            controls=("shuffled",),
            seeds=(0,),
            variants="train",
            prompts=600,
            measured=100,
            sampled=40,
            layers=2,
            d_model=48,
            pretrain_steps=200,
            pretrain_batch=48,
            steps=20,
            batch_size=16,
            response_tokens=32,
            reward_steps=20,
            check_every=10,
            check_prompts=24,
            bootstrap=200,
            permutations=20,
            dictionary_width=128,
            dictionary_k=6,
            dictionary_epochs=8,
            dictionary_tokens=12_000,
            published_pairs=200,
            calibration_regimes=("easy",),
            calibration_seeds=1,
            calibration_samples=40_000,
            null_draws=1,
            dose_shares=(0.4, 0.7),
            causal_pairs=24,
            steer_strengths=(-0.25, 0.25),
            shipped=None,
        ),
        "tiny": Preset(),
        "small": Preset(
            name="small",
            families={
                "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "qwen3": "Qwen/Qwen3-0.6B",
                "llama": "meta-llama/Llama-3.2-1B-Instruct",
            },
            seeds=(0,),
            pairs="argilla/ultrafeedback-binarized-preferences-cleaned",
            on_bad="drop",
            limit=12_000,
            measured=2000,
            sampled=256,
            steps=300,
            batch_size=32,
            micro_batch_size=4,
            max_length=1024,
            response_tokens=256,
            lora_rank=16,
            learning_rates=dict(LORA_RATES),
            dose=10.0,
            check_every=25,
            check_prompts=64,
            read_batch=16,
            dictionary_width=8192,
            dictionary_k=64,
            dictionary_tokens=500_000,
            published_pairs=8000,
            shipped=None,
        ),
        "paper": Preset(
            name="paper",
            families={
                "smollm3": "HuggingFaceTB/SmolLM3-3B",
                "llama": "meta-llama/Llama-3.2-3B-Instruct",
                "qwen3": "Qwen/Qwen3-4B-Instruct-2507",
            },
            controls=(),
            seeds=(0,),
            variants="load",
            checkpoints=dict(PUBLISHED_CHECKPOINTS),
            recipe="published",
            pairs="argilla/ultrafeedback-binarized-preferences-cleaned",
            on_bad="drop",
            limit=20_000,
            measured=5000,
            sampled=256,
            measure_share=0.4,
            micro_batch_size=4,
            max_length=1024,
            response_tokens=256,
            lora_rank=16,
            learning_rates=dict(LORA_RATES),
            stop="last",
            dose=10.0,
            check_every=50,
            check_prompts=64,
            read_batch=16,
            dictionary_width=16_384,
            dictionary_k=64,
            dictionary_tokens=500_000,
            published_pairs=20_000,
            shipped=None,
        ),
    }
)

_CHOICES = {
    "variants": ("auto", "load", "train"),
    "recipe": ("study", "published"),
    "stop": ("dose", "last"),
    "reward": ("model", "truth"),
    "position": ("last", "mean", "prompt"),
    "device": ("auto", "cpu", "cuda"),
    "on_bad": ("refuse", "drop"),
}


_OF_DICTIONARIES = ("dictionary_width", "dictionary_k", "dictionary_epochs", "dictionary_tokens", "published_pairs")
_OF_DICTIONARIES += ("calibration_seeds", "calibration_samples")
_OF_CAUSES = ("null_draws", "causal_pairs")


def resolve(preset: str = "tiny", **overrides) -> Preset:
    """The preset of that name with some fields replaced; None leaves a field as it is.

    Raises
    ------
    PresetError
        for an unknown preset or field (with the nearest name), or a value of the wrong type or outside its range.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise PresetError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    found = PRESETS[preset]
    known = {f.name: f for f in dataclasses.fields(Preset) if f.name != "name"}
    refuse_unknown(overrides, known, PresetError)
    changes = {k: _cast(k, v, getattr(found, k)) for k, v in overrides.items() if v is not None}
    if "learning_rates" in changes:  # a mapping of some rates replaces those rates only
        changes["learning_rates"] = found.learning_rates | changes["learning_rates"]
    mappings = {k: dict(v) for k, v in vars(found).items() if isinstance(v, dict)}  # a preset's own stay untouched
    result = dataclasses.replace(found, **(mappings | changes))
    _check(result)
    return result


def from_notebook(names: dict) -> Preset:
    """The preset of a notebook from its global names: every plain value must be a parameter.

    Call it before anything else is assigned: papermill puts parameters it does not know into the notebook with a
    warning only, and a mistyped one would silently do nothing.
    """
    given = plain_values(names)
    given.pop("name", None)
    return resolve(given.pop("preset", "tiny") or "tiny", **given)


def plain_values(names: dict) -> dict:
    """What papermill could have set among a notebook's global names."""
    skip = {"In", "Out", "exit", "quit", "get_ipython", "open"}
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    return {k: v for k, v in names.items() if not k.startswith("_") and k not in skip and isinstance(v, plain)}


def refuse_unknown(names, known, error: type[AlignlensError]) -> None:
    """Raise the error for a name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise error(f"parameter {name!r} is unknown; {hint}")


def _cast(name, value, default):
    """Check one value against the kind of its default, accepting the forms that a command line gives."""
    if name in ("methods", "controls", "seeds", "calibration_regimes"):
        value = _listed(value)
        if name != "seeds":
            return value
        if not all(str(v).lstrip("-").isdigit() for v in value):
            raise PresetError(f"seeds is {list(value)!r}; give whole numbers, for example 0,1,2")
        return tuple(int(v) for v in value)
    if name in ("layers_measured", "dictionary_layers"):
        word = {"layers_measured": "all", "dictionary_layers": "spread"}[name]
        if value == word:
            return value
        value = _listed(value)
        if not value or not all(str(v).lstrip("-").isdigit() for v in value):
            raise PresetError(f"{name} is {list(value)!r}; give {word!r} or whole numbers, for example 0,1,2")
        return tuple(int(v) for v in value)
    if name in ("families", "checkpoints", "learning_rates"):
        value = _read_json(value)
        if not isinstance(value, dict):
            raise PresetError(f'{name} is {value!r}; give a mapping, for example {{"llama": "path/of/the/base"}}')
        if name != "learning_rates":
            return dict(value)
        unknown = set(value) - set(LORA_RATES)
        if unknown:
            raise PresetError(f"learning_rates names {sorted(unknown)[0]!r}; choose from {', '.join(LORA_RATES)}")
        return {key: _cast(f"learning_rates[{key}]", rate, 0.0) for key, rate in value.items()}
    number = {"limit": int, "max_chars": int, "micro_batch_size": int}.get(name, type(default))
    if number in (int, float) and not isinstance(value, bool):
        try:
            cast = number(value)
        except (TypeError, ValueError):
            cast = None
        if cast is not None and cast == float(value):
            return cast
    elif number is bool and isinstance(value, bool):
        return value
    elif number in (str, type(None)) and isinstance(value, str):
        return value
    raise PresetError(f"{name} is {value!r}; it must be {'a number' if number in (int, float) else number.__name__}")


def _read_json(value):
    """Papermill's -p gives mappings and lists as text."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise PresetError(f"{value!r} is not valid JSON ({error}); quote names with double quotes") from None
    return value


def _listed(value) -> tuple:
    value = _read_json(value)
    if isinstance(value, str):
        value = [v.strip() for v in value.split(",") if v.strip()]
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check(preset: Preset) -> None:
    for name, choices in _CHOICES.items():
        if getattr(preset, name) not in choices:
            raise PresetError(f"{name} is {getattr(preset, name)!r}; choose one of {', '.join(choices)}")
    regimes = ("easy", "hard")
    for name, choices in (("methods", METHODS), ("controls", CONTROLS), ("calibration_regimes", regimes)):
        for method in getattr(preset, name):
            if method not in choices:
                raise PresetError(f"{name} holds {method!r}; choose from {', '.join(choices)}")
    if not preset.families or not all(isinstance(base, str) for base in preset.families.values()):
        raise PresetError(f"families is {preset.families}; give at least one base, each a hub id or a folder's path")
    for name in ("methods", "controls", "seeds"):
        if len(set(getattr(preset, name))) < len(getattr(preset, name)):
            raise PresetError(f"{name} is {getattr(preset, name)}; each may be named once")
    if not preset.seeds:
        raise PresetError("seeds is empty; give at least one")
    if min(preset.reward_share, preset.measure_share) <= 0 or preset.reward_share + preset.measure_share >= 1:
        raise PresetError(
            f"reward_share {preset.reward_share} and measure_share {preset.measure_share} must be positive and leave a "
            "share for training"
        )
    if preset.dose <= 0:
        raise PresetError(f"dose is {preset.dose}; give a positive number of nats")
    if not math.isfinite(preset.length_bias):
        raise PresetError(f"length_bias is {preset.length_bias}; give a finite number")
    if preset.folds < 3:
        raise PresetError(
            f"folds is {preset.folds}; at least 3 are needed: penalties are chosen inside the training folds"
        )
    counts = ("steps", "batch_size", "bootstrap", "measured", "sampled", "check_every", "check_prompts", "max_length")
    for name in (
        *counts,
        "response_tokens",
        "permutations",
        "read_batch",
        "limit",
        "max_chars",
        "micro_batch_size",
        *_OF_DICTIONARIES,
        *_OF_CAUSES,
    ):
        if getattr(preset, name) is not None and getattr(preset, name) < 1:
            raise PresetError(f"{name} is {getattr(preset, name)}; it must be at least 1")
    if not all(0 < share < 1 for share in preset.dose_shares):
        raise PresetError(f"dose_shares is {preset.dose_shares}; give parts of the way, each above 0 and below 1")
    if preset.random_directions < 20:
        raise PresetError(
            f"random_directions is {preset.random_directions}; with fewer than 20 nothing can be told apart"
        )
    if 0 in preset.steer_strengths or not preset.steer_strengths:
        raise PresetError(f"steer_strengths is {preset.steer_strengths}; give at least one, none of them 0")
    if preset.reward == "truth" and preset.pairs != "tinyworld":
        raise PresetError("reward 'truth' is the tiny world's utility; pairs from elsewhere have none: use 'model'")


def home() -> Path:
    """The project's folder, for relative paths: the working directory's nearest parent that holds ``notebooks/``."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "lib" / "alignlens").is_dir():
            return folder
    return here


def place(path: str) -> str:
    """A preset's path, relative ones taken from the project's folder; URLs and hub ids as they are."""
    if "://" in path or os.path.isabs(path):
        return path
    return str(home() / path)
