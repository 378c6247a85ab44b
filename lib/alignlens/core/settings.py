"""Settings: one typed description of what a study is, its presets as TOML, and what a notebook's parameters mean.

Every field of a preset can be overridden by name, from Python, from a notebook or from papermill, whose ``-p`` gives
lists and mappings as text. Values are checked here once, and nowhere behind this door."""

import difflib
import json
import os
import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from alignlens.core.errors import PresetError

METHODS = ("ppo", "dpo", "simpo", "orpo", "grpo", "kto")
CONTROLS = ("sft", "shuffled")
SPELLING = {"ppo": "PPO", "dpo": "DPO", "simpo": "SimPO", "orpo": "ORPO", "grpo": "GRPO", "kto": "KTO"}
FOLDER = Path(__file__).parent / "presets"


def _from_text(value):
    """Lists and mappings that papermill's -p gives as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip()[:1] in ("{", "[") else value
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}); quote names with double quotes") from None


def _listed(value):
    """A list from a list, from text with commas, or from one value."""
    value = _from_text(value)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _no_bool(value):
    if isinstance(value, bool):
        raise ValueError("give a number")
    return value


def _once(value: tuple) -> tuple:
    if len(set(value)) < len(value):
        raise ValueError("each may be named once")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[Whole, Field(ge=0)]
Real = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
Share = Annotated[Real, Field(gt=0, lt=1)]
# What is whole stays whole: 12.5 latents a token can be asked for, and 10.0 is the same as 10.
Amount = Annotated[Positive, AfterValidator(lambda value: int(value) if value == int(value) else value)]
Yes = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Texts = Annotated[dict[str, str], BeforeValidator(_from_text)]


def several(kind) -> object:
    """The type of a list of ``kind``, none twice, from any form that a command line gives."""
    return Annotated[tuple[kind, ...], BeforeValidator(_listed), AfterValidator(_once)]


def layers(word: str) -> object:
    """The type of a choice of layers: one word, or indices counted from 0."""

    def chosen(value):
        found = _listed(value)
        if value != word and not (found and all(str(v).isdigit() for v in found)):
            raise ValueError(f"give {word!r} or whole numbers counted from 0, for example 0,1,2")
        return value if value == word else tuple(sorted({int(v) for v in found}))

    return Annotated[tuple | str, BeforeValidator(chosen)]


_WORDS = {
    "missing": "it must be given", "extra_forbidden": "it is unknown", "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be above {gt}", "less_than": "it must be below {lt}", "value_error": "{error}",
    "less_than_equal": "it must be at most {le}", "literal_error": "choose one of {expected}",
    "too_short": "give at least one", "finite_number": "give a finite number",
    "multiple_of": "it must be a multiple of {multiple_of}",
}  # fmt: skip
_KINDS = {
    "int": "give a whole number", "float": "give a number", "bool": "give true or false", "dict": "give a mapping",
    "string": "give text",
}  # fmt: skip


class Parameters(BaseModel):
    """A checked set of named values; what cannot be used raises ``error``, which says what, where and what to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, given: dict, *, error: type[Exception] = PresetError) -> Self:
        """The given parameters; None leaves a field at its default. An unknown name raises, with the nearest one."""
        refuse_unknown(given, [name for name in cls.model_fields if name != "name"], error)
        return cls.checked({k: v for k, v in given.items() if v is not None}, error=error)

    @classmethod
    def checked(cls, values: dict, *, error: type[Exception] = PresetError) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as found:
            raise error(_sentence(found.errors()[0])) from None


def _sentence(problem: dict) -> str:
    """One problem that pydantic found, in the words of the house."""
    kind, context = problem["type"], problem.get("ctx", {})
    where = "".join(f"[{part}]" if i else str(part) for i, part in enumerate(problem["loc"]))
    words = _WORDS.get(kind) or _KINDS.get(kind.split("_")[0]) or problem["msg"]
    expected = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
    words = words.format(**{**context, "expected": expected})
    return f"{where} is {problem['input']!r}: {words}" if where else words


def plain_values(names: dict) -> dict:
    """What papermill could have set among a notebook's global names."""
    skip = {"In", "Out", "exit", "quit", "get_ipython", "open"}
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    return {k: v for k, v in names.items() if not k.startswith("_") and k not in skip and isinstance(v, plain)}


def refuse_unknown(names, known, error: type[Exception]) -> None:
    """Raise the error for a name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise error(f"parameter {name!r} is unknown; {hint}")


class Preset(Parameters):
    """All parameters of a study; not explained here is what its name says.

    Compared. families : name -> base, which is a hub id (``id@revision`` pins it), a local folder, or
    ``tiny:ARCHITECTURE``, trained here. methods, controls, seeds : the variants of each family. variants : "auto" takes
    stored ones and trains what is missing; "load" never trains; "train" ignores what is shipped and trains all.
    checkpoints : ready variants, "family:method" (or "family", with ``{method}``) -> hub id or local folder. recipe :
    "study" or "published" (see ``align.PUBLISHED``).
    Pairs. pairs : "tinyworld", a file (.jsonl, .csv, .parquet) or a hub id. prompts, length_bias, label_noise : of the
    tiny world. limit, max_chars, on_bad : of a file or hub data set. reward_share, measure_share, split_seed : how
    prompts are split. measured, sampled : pairs measured and prompts answered, at most.
    Alignment. reward : "model" (trained on the reward split for reward_steps) or "truth" (tiny world).
    Measurement. position : last | mean. layers_measured : "all" or a list.
    Dictionaries. dictionary_layers : "spread" (a quarter, half and three quarters of the depth) or a list; crosscoders
    read the middle one. dictionary_tokens : training tokens of a model. published_pairs : prompts that the published
    crosscoder is trained on. calibration_regimes, calibration_seeds, calibration_samples : see ``calibration``.
    Geometry and causes. null_draws : random LoRA directions behind the null of geometry. dose_shares : parts of the way
    from base to variant that are measured besides the whole way. causal_pairs : pairs scored under each intervention.
    random_directions : norm-matched random directions beside each named one, at least 20. steer_strengths : in units of
    the stream's root-mean-square norm.
    Where. store : folder of made artifacts. shipped : read-only store looked up first. figures : where pictures go.
    device : "auto", "cpu" or "cuda". jobs : processes side by side, 0 for as many as pay."""

    name: str
    families: Annotated[Texts, Field(min_length=1)]
    methods: several(Literal[METHODS])
    controls: several(Literal[CONTROLS])
    seeds: Annotated[several(Seed), Field(min_length=1)]
    variants: Literal["auto", "load", "train"]
    checkpoints: Texts
    recipe: Literal["study", "published"]
    pairs: Text
    prompts: Count
    length_bias: Real
    label_noise: Annotated[Real, Field(ge=0, le=1)]
    limit: Count | None = None
    max_chars: Count | None = None
    on_bad: Literal["refuse", "drop"]
    reward_share: Share
    measure_share: Share
    split_seed: Seed
    measured: Count
    sampled: Count
    layers: Count
    d_model: Annotated[Count, Field(multiple_of=8)]
    vocab_size: Annotated[Whole, Field(ge=300)]
    pretrain_steps: Count
    pretrain_batch: Count
    pretrain_rate: Positive
    steps: Count
    batch_size: Count
    micro_batch_size: Count | None = None
    max_length: Count
    response_tokens: Count
    lora_rank: Count
    learning_rates: Annotated[dict[Literal[*METHODS, *CONTROLS, "reward"], Positive], BeforeValidator(_from_text)]
    stop: Literal["dose", "last"]
    dose: Positive
    check_every: Count
    check_prompts: Count
    reward: Literal["model", "truth"]
    reward_steps: Count
    position: Literal["last", "mean"]
    layers_measured: layers("all")
    read_batch: Count
    folds: Annotated[Whole, Field(ge=3)]  # one to score, one to choose the penalty, one to fit
    bootstrap: Count
    permutations: Count
    dictionary_layers: layers("spread")
    dictionary_width: Count
    dictionary_k: Amount
    dictionary_epochs: Amount
    dictionary_tokens: Count
    published_pairs: Count
    calibration_regimes: several(Literal["easy", "hard"])
    calibration_seeds: Count
    calibration_samples: Count
    null_draws: Count
    dose_shares: several(Share)
    causal_pairs: Count
    random_directions: Annotated[Whole, Field(ge=20)]  # the rank p of fewer cannot fall below 0.05
    steer_strengths: Annotated[several(Real), Field(min_length=1)]
    store: Text
    shipped: Text = ""
    figures: Text
    device: Literal["auto", "cpu", "cuda"]
    jobs: Seed
    trust_remote_code: Yes

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        if self.reward_share + self.measure_share >= 1:
            both = f"reward_share {self.reward_share} and measure_share {self.measure_share}"
            raise ValueError(f"{both} leave no share for training")
        if 0 in self.steer_strengths:
            raise ValueError(f"steer_strengths is {self.steer_strengths}: none may be 0")
        if self.reward == "truth" and self.pairs != "tinyworld":
            raise ValueError("reward 'truth' is the tiny world's utility; pairs from elsewhere have none: use 'model'")
        if all(base.startswith("tiny:") for base in self.families.values()):
            for name in ("layers_measured", "dictionary_layers"):
                check_depth(getattr(self, name), self.layers, name)
        return self


def check_depth(chosen, depth: int, name: str, error: type[Exception] = ValueError) -> None:
    """The error for a layer that a model of ``depth`` blocks does not have."""
    beyond = [layer for layer in chosen if layer >= depth] if not isinstance(chosen, str) else []
    if beyond:
        raise error(f"{name} names layer {beyond[0]}, but the base has layers 0 to {depth - 1}")


def _read(name: str) -> dict:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")) | {"name": name}


# "tiny" is complete; the others name what differs from it.
PRESETS = MappingProxyType(
    {name: Preset.checked(_read("tiny") | _read(name)) for name in ("smoke", "tiny", "small", "paper")}
)


def resolve(preset: str = "tiny", **overrides) -> Preset:
    """The preset of that name with some fields replaced; None leaves a field as it is.

    Raises PresetError for an unknown preset or field (with the nearest name), or a value of the wrong type or range."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise PresetError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    refuse_unknown(overrides, [name for name in Preset.model_fields if name != "name"], PresetError)
    found = PRESETS[preset].model_dump()
    given = {name: value for name, value in overrides.items() if value is not None}
    rates = _from_text(given.get("learning_rates"))
    if isinstance(rates, dict):  # a mapping of some rates replaces those rates only
        given["learning_rates"] = found["learning_rates"] | rates
    return Preset.checked(found | given)


def from_notebook(names: dict) -> Preset:
    """The preset of a notebook from its global names: every plain value must be a parameter.

    Call it before anything else is assigned: of a mistyped parameter papermill only warns, and it would do nothing."""
    given = plain_values(names)
    given.pop("name", None)
    return resolve(given.pop("preset", "tiny") or "tiny", **given)


def home() -> Path:
    """The project's folder, for relative paths: the working directory's nearest parent that holds ``notebooks/``."""
    here = Path.cwd()
    parents = (here, *here.parents)
    return next((p for p in parents if (p / "notebooks").is_dir() and (p / "lib/alignlens").is_dir()), here)


def place(path: str) -> str:
    """A preset's path, relative ones taken from the project's folder; URLs and hub ids stay as they are."""
    return path if "://" in path or os.path.isabs(path) else str(home() / path)
