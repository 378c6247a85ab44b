"""A study: everything that a preset describes, made when it is asked for. ``study.open("tiny")`` is the front door."""

from alignlens.study import features, measuring, training  # noqa: F401  they declare the stages
from alignlens.study.front import Study, from_notebook, open
from alignlens.study.stages import STAGES, Source, Stage, Variant

__all__ = ["STAGES", "Source", "Stage", "Study", "Variant", "from_notebook", "open"]
