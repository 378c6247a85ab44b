"""One class a stage: all that a kind of result is (name, version, what it depends on, how it is made) in one place.

A stage is declared by subclassing ``Stage``; nothing else knows of it. Its key hashes the keys of its inputs, its
parameters and its version, so a change anywhere upstream reaches everything downstream. ``STAGES`` holds them in the
order of their declaration, which is the order of work."""

from dataclasses import dataclass
from pathlib import Path

STAGES: dict[str, "Stage"] = {}
TEXTS = ["prompt", "chosen", "rejected"]


@dataclass(frozen=True, order=True)
class Variant:
    """One model of a study: a family, a method, a control, "base" or "random" (a null), and a seed."""

    family: str
    method: str
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.family}-base" if self.method == "base" else f"{self.family}-{self.method}-seed{self.seed}"

    @property
    def base(self) -> "Variant":
        return Variant(self.family, "base")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what Transformers loads, and an adapter on top if any."""

    model: str
    adapter: str | None = None


class Stage:
    """A kind of result. ``study.NAME(*args)`` gives it, from the store or made now; args are hashable.

    name : attribute of the study that asks for it. version : raised by hand when results change. kind : folder in the
    store, by default the name. group : what ``Study.make_all`` calls it. title : in the progress bar. after : stages to
    finish before its tasks run side by side. each : the study's method that lists the models it is wanted of. fields :
    of the preset, that are parameters. ships : whether ``Study.ship`` copies it. resumes : whether ``make`` goes on
    after a kill, from ``Study.working``, and says there how far it is."""

    name: str
    version: int = 1
    kind: str = ""
    group: str = ""
    title: str = ""
    after: tuple[str, ...] = ("variant",)
    each: str = "variants"
    fields: tuple[str, ...] = ()
    ships: bool = False
    resumes: bool = False

    def __init_subclass__(cls):
        if "name" in vars(cls):  # not what several stages only have in common
            cls.kind, cls.group, cls.title = cls.kind or cls.name, cls.group or cls.name, cls.title or cls.name
            STAGES[cls.name] = cls()

    def wanted(self, s) -> list[tuple]:
        """Arguments of all results that a whole study has."""
        return [(variant,) for variant in getattr(s, self.each)()]

    def label(self, s, *args) -> str:
        """Names the artifact's folder, for readers only."""
        return "-vs-".join(arg.label for arg in args if isinstance(arg, Variant))

    def made_from(self, s, *args) -> tuple[dict[str, str], dict]:
        """Inputs, name -> key of everything it is made from; and parameters besides ``fields``."""
        return {}, {}

    def make(self, s, folder: Path, *args) -> dict | None:
        """Write the files into the folder; returns small facts for the manifest."""
        raise NotImplementedError

    def read(self, artifact):
        """What ``study.NAME(...)`` returns."""
        return artifact

    def identity(self, s, *args) -> dict:
        inputs, parameters = self.made_from(s, *args)
        parameters |= {name: getattr(s.preset, name) for name in self.fields}
        return {"inputs": inputs, "parameters": parameters, "version": self.version}
