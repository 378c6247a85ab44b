"""The audit: what preference optimisation did inside one model, measured against its base on held-out pairs."""

import copy
import timeit
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch

from alignlens import activations, causal, geometry, models
from alignlens.audit import behaviour, causes, features, requests, sides, signal, verdicts
from alignlens.audit.numbers import EQUIVALENCE, detectable, rounded
from alignlens.core.errors import AuditError, DictionaryError, NotMeasured, ProbeError
from alignlens.core.store import content_hash, git_commit, versions

SCHEMA = "alignlens.audit/2"
SECTIONS = {
    "weights": behaviour.weights, "behaviour": behaviour.behaviour, "signal": signal.signal, "change": signal.change,
    "latents": features.features, "causal": causes.causes,
}  # fmt: skip
MOST_TOKENS = 200_000
CAUSAL_TOKENS = 10_000  # that causal tests read in one pass on a CPU
BATCH_TOKENS = 8192  # in one batch, unless batch_size is given
SMALL = 50e6  # parameters of a model that gains nothing from a second CPU thread


class Audit:
    """Two checked models and their pairs; each section is measured when it is asked for and kept.

    Raises AlignlensError, before any measurement, if a model, a tokenizer, the pairs or a parameter cannot be used."""

    def __init__(self, request: requests.Request):
        self.request, self._sections = request, {}
        self.device = models.default_device() if request.device == "auto" else request.device
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AuditError("device is 'cuda', but no GPU can be reached: use -p device cpu")
        found = sides.sources(request)  # a wrong model is told before the pairs are read, and those before its weights
        pairs, self.source = requests.load_pairs(request)
        self.base, self.aligned, self.notes = sides.load(found, request, self.device)
        self.sides = {"base": self.base, "aligned": self.aligned}
        self.context = min(self.base.context, self.aligned.context)
        self.format, encoded, notes = sides.one_format(self.base, self.aligned, pairs, request)
        self.pairs, self.encoded, self.dropped, done = requests.usable(pairs, encoded, request, self.context)
        self.answer_tokens = sum(map(len, [*self.encoded.chosen_ids, *self.encoded.rejected_ids]))
        depth = self.base.facts["layers"]
        self.layers = requests.chosen_layers(request.layers, depth)
        self.middle = min(self.layers, key=lambda layer: abs(layer - (depth - 1) / 2))
        self.sampling = {"folds": signal.FOLDS, "seed": request.seed}
        longest = self.encoded.report["longest_tokens"] + request.response_tokens
        self.batch_size = request.batch_size or int(np.clip(BATCH_TOKENS // longest, 1, 64))
        if self.device == "cpu" and self.base.facts["parameters"] < SMALL:
            models.one_thread()
        for side in self.sides.values():
            activations.bridge(side.model)  # a copy, checked against the model and thrown away
        fitting = CAUSAL_TOKENS // (2 * self.encoded.report["median_tokens"]) if self.device == "cpu" else 64
        self.causal_pairs = request.causal_pairs or int(np.clip(fitting, 16, 64))
        self.identical = sides.identical(self.base, self.aligned, self.encoded, self.format.pad_id)
        self.config_differs = sides.differing(self.base, self.aligned)
        differ = "Configurations differ: {} is {} in the base, {} in the aligned model."
        self.notes += notes + done + [differ.format(name, *values) for name, values in self.config_differs.items()]

    def describe(self) -> str:
        """What will be compared, on what, in which format, as text."""
        words = "{name}: {architecture}, {layers} x {d_model}, {parameters:,} parameters in {dtype}, weights {weights}"
        lines = [f"{name:<9}{words.format(**side.facts)}" for name, side in self.sides.items()]
        lines.append(f"pairs    {self.source}: {len(self.pairs)} pairs, {self.pairs.prompt_id.nunique()} prompts")
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes), "", self.example])

    @property
    def example(self) -> str:
        """The shortest prompt and chosen answer as the models get them."""
        sizes = np.add(*(list(map(len, ids)) for ids in (self.encoded.prompt_ids, self.encoded.chosen_ids)))
        return self.format.describe(*self.pairs.loc[np.argmin(sizes), ["prompt", "chosen"]])

    def estimate(self) -> str:
        """Memory from the number of parameters, time from a measured rate on a few pairs."""
        facts, count = self.base.facts, len(self.pairs)
        size = facts["parameters"] * self.base.model.dtype.itemsize / 1e9
        streams = 4e-9 * facts["d_model"] * (4 * count * len(self.layers) + min(self.answer_tokens, MOST_TOKENS))
        few = requests.subset(self.encoded, np.linspace(0, count - 1, 8).astype(int))
        options = {"pad_id": self.format.pad_id, "batch_size": self.batch_size}
        score = partial(models.response_logprobs, self.base.model, few.prompt_ids, few.chosen_ids, **options)
        rate = timeit.repeat(score, number=1, repeat=2)[1] / len(few)  # the first time warms up
        # A pair is two answers; both models score, are read at one and at every token; causal tests repeat a part.
        repeats = 4 * (1 + causal.LEAST_RANDOM) + len(self.layers) + 3
        passes = 2 * 2 * 3 * count + 2 * repeats * min(self.causal_pairs, count // 2)
        time = f"time: {1 / rate:.3g} answers a second, about {passes:,} passes: {passes * rate / 60:.1f} minutes"
        memory = f"memory: 3 copies of {size:.3g} GB while bridges are checked, then 2, and {streams:.3g} GB of streams"
        return f"{memory}\n{time}, and as much again for sampling, probes and dictionaries"

    @cached_property
    def bridges(self) -> dict:
        """Both models bridged, in place: log-probabilities, samples and weights are measured before."""
        self.section("behaviour"), self.section("weights")
        if not self.identical and self.answer_tokens >= features.LEAST_TOKENS:  # else no crosscoder needs it
            self.shuffled = self._read_shuffled()
        return {name: activations.bridge(side.model, own=True) for name, side in self.sides.items()}

    def _read_shuffled(self) -> np.ndarray:
        """Streams [tokens, d_model] of the base plus the change of its weights, rows and columns permuted: size,
        spectrum and outliers stay, not the direction."""
        control, rng = copy.deepcopy(self.base.model), np.random.default_rng([self.request.seed, 9])
        theirs = self.aligned.model.state_dict()
        with torch.inference_mode():
            for name, weight in control.named_parameters():
                change = theirs[name] - weight
                for axis, size in enumerate(change.shape):
                    change = change.index_select(axis, torch.from_numpy(rng.permutation(size)).to(change.device))
                weight.add_(change)
        return np.asarray(self._read_tokens(activations.bridge(control, own=True)).at(self.middle), np.float32)

    @cached_property
    def streams(self) -> dict:
        """Streams at the end of the answers, of both models."""
        read = partial(activations.read, layers=self.layers, batch_size=self.batch_size, formatter=self.format)
        return {name: read(bridged, None, self.encoded) for name, bridged in self.bridges.items()}

    @cached_property
    def decomposed(self) -> tuple[pd.DataFrame, dict]:
        """What probes read in both models, one row a layer, and the draws behind its intervals."""
        options = self.sampling | {"bootstrap": self.request.bootstrap}
        table, draws = geometry.decompose_draws(*self.streams.values(), self.encoded.prompt_id, **options)
        return table.assign(layer=self.layers), draws

    @cached_property
    def tokens(self) -> dict:
        """Streams at every token of the answers at the middle layer, of both models."""
        return {name: self._read_tokens(bridged) for name, bridged in self.bridges.items()}

    def _read_tokens(self, bridged) -> activations.Tokens:
        options = {"layers": [self.middle], "limit": MOST_TOKENS, "batch_size": self.batch_size}
        return activations.read_tokens(bridged, None, self.encoded, formatter=self.format, **options)

    def section(self, name: str) -> dict:
        """A section by name, measured once. An instrument that cannot answer gives status "not measured" and why."""
        if name not in self._sections:
            try:
                self._sections[name] = {"status": "measured"} | SECTIONS[name](self)
            except (ProbeError, DictionaryError, NotMeasured) as error:
                self._sections[name] = {"status": "not measured", "reason": str(error)}
        return self._sections[name]

    def table(self, name: str) -> pd.DataFrame:
        """A section's numbers for a notebook, one row a measure, layer or test."""
        section = self.section(name)
        if section["status"] != "measured":
            return pd.DataFrame([section])
        rows = section.get("layers") or section.get("numbers") or section.get("labels") or section["tests"]["aligned"]
        flat = pd.DataFrame(rows).T if isinstance(rows, dict) else pd.json_normalize(rows)
        return flat[[c for c in flat if not c.endswith((".unit", ".null", ".floor"))]]

    def result(self) -> dict:
        """All sections as one dict of JSON types, see ``SCHEMA``."""
        sections, request = {name: self.section(name) for name in SECTIONS}, self.request
        numbers, rows = sections["behaviour"].get("numbers"), sections["signal"].get("layers")
        power = {n: detectable(numbers[n]) for n in ("margin", "kl", "accuracy", "length_shift")} if numbers else {}
        power |= {"auroc": rounded(np.median([detectable(row["difference"]) for row in rows]))} if rows else {}
        settings = request.model_dump(exclude={"base", "aligned", "adapter", "pairs", "out", "date", "layers"})
        out = {
            "schema": SCHEMA, "date": request.date,
            "models": {"base": self.base.facts, "aligned": self.aligned.facts, "identical": self.identical,
                       "config_differs": list(self.config_differs)},
            "pairs": {"source": self.source, "hash": content_hash(self.pairs[["prompt", "chosen", "rejected"]]),
                      "pairs": len(self.pairs), "prompts": int(self.pairs.prompt_id.nunique()), **self.encoded.report,
                      "dropped": self.dropped},
            "format": {"template": self.format.template, "max_length": self.format.max_length, "notes": self.notes,
                       "fingerprint": self.format.fingerprint, "example": self.example},
            **sections, "power": power,
        }  # fmt: skip
        return out | {
            "warnings": verdicts.warnings(out, self.pairs),
            "methods": {"versions": versions(), "commit": git_commit(), "layers": self.layers, "folds": signal.FOLDS,
                        "equivalence": EQUIVALENCE, "settings": settings | {"device": self.device}},
        }  # fmt: skip
