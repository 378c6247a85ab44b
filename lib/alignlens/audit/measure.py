"""The audit: what preference optimisation did inside one model, measured against its base on held-out pairs.

``Audit`` loads and checks two models, then measures section by section; ``Audit.result`` is one dict of JSON types
(``SCHEMA``) that ``report`` turns into a page. Every measured number is a dict ``{value, low, high, null, floor,
unit}``: its 95 % interval, the value that "nothing happened" would have, and how far from it noise alone reaches in
95 % of cases.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import math
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

from alignlens import activations, behavior, causal, dictionaries, geometry, models, preferences, probes
from alignlens.audit.request import Request, check_shapes, context, is_adapter, load, one_format, shown
from alignlens.core.errors import AuditError, DictionaryError, NotMeasured, ProbeError
from alignlens.core.store import LIBRARIES, content_hash, git_commit
from alignlens.dictionaries import latents

SCHEMA = "alignlens.audit/1"
PAIRS = "argilla/ultrafeedback-binarized-preferences-cleaned"
EQUIVALENCE = 0.02  # AUROC: a change is called preserved only if its whole interval lies within
LEAST_PROMPTS = 20
FEW_PROMPTS = 200
LEAST_TOKENS = 4000  # response tokens of the training half, below which no crosscoder is trained
MOST_TOKENS = 200_000
READABLE = 0.5  # held-out R2 below which a crosscoder's labels are not shown
MOST_LAYERS = 12
FOLDS = 5
TOP_LATENTS = 8
POWER = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)  # effect over standard error that is seen with 80 % power
CAUSAL_TOKENS = 10_000  # that causal tests read in one pass on a CPU
BATCH_TOKENS = 8192  # in one batch, unless batch_size is given
SMALL = 50e6  # parameters of a model that gains nothing from a second CPU thread


# --- Numbers ----------------------------------------------------------------------------------------------------------


def number(value, low=math.nan, high=math.nan, *, null=0.0, floor=math.nan, unit="") -> dict:
    """One measured number: ``floor`` is the distance from ``null`` that noise alone reaches."""
    out = {"value": value, "low": low, "high": high, "null": null, "floor": floor}
    return {name: _round(v) for name, v in out.items()} | {"unit": unit}


def beyond(x: dict) -> bool:
    """Whether a number is more than noise: its interval leaves out the null, and it lies farther off than the floor."""
    if x["low"] is None or x["high"] is None:
        return False
    apart = x["low"] > x["null"] or x["high"] < x["null"]
    return apart and abs(x["value"] - x["null"]) > (x["floor"] or 0.0)


def preserved(x: dict) -> bool:
    """Whether a change of AUROC is small for certain: its whole interval lies within the equivalence margin."""
    return x["low"] is not None and -EQUIVALENCE <= x["low"] and x["high"] <= EQUIVALENCE


def detectable(x: dict) -> float | None:
    """The smallest change that would have been seen in 80 of 100 repetitions, from the interval's half-width."""
    if x["low"] is None:
        return None
    return _round(POWER * (x["high"] - x["low"]) / 2 / stats.norm.ppf(0.975))


def _round(value):
    """Six significant digits: what a page needs, and the same bytes where the last bits of a sum differ."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _exact(value, unit: str) -> dict:
    """A number that is counted, not estimated."""
    return number(value, value, value, floor=0.0, unit=unit)


def _of_row(row, name, **words) -> dict:
    """The number ``name`` of a table's row, with its ``_low`` and ``_high``."""
    return number(row[name], row[f"{name}_low"], row[f"{name}_high"], **words)


def _changed(row, name, **words) -> dict:
    """A difference of two models: noise alone would reach half of its interval's width."""
    return _of_row(row, name, floor=(row[f"{name}_high"] - row[f"{name}_low"]) / 2, **words)


def _by_prompt(values, prompt_id) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts over prompts of the finite values."""
    _, index = np.unique(prompt_id, return_inverse=True)
    known = np.isfinite(values)
    sums, counts = (np.bincount(index[known], w, minlength=index.max() + 1) for w in (values[known], None))
    return sums[counts > 0], counts[counts > 0].astype(float)


def _mean(values, prompt_id, *, null=0.0, floor=None, unit="", seed=0, draws=2000) -> dict:
    """Mean of values [rows] with a bootstrap over prompts; floor by flipping the signs of whole prompts about null.

    A sign flip is the exact null of a difference whose sides are exchangeable.
    """
    sums, counts = _by_prompt(np.asarray(values, float), prompt_id)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    low, high = np.percentile(weights @ sums / (weights @ counts), (2.5, 97.5))
    if floor is None:
        signs = rng.choice((-1.0, 1.0), size=(draws, len(sums)))
        floor = np.percentile(np.abs(signs @ (sums - null * counts)) / counts.sum(), 95)
    return number(sums.sum() / counts.sum(), low, high, null=null, floor=floor, unit=unit)


def _shares(table: pd.DataFrame, null: pd.DataFrame | None = None) -> dict[str, dict]:
    """Shares of live latents by label with Wilson's interval; the floor is the upper end of the null's interval."""
    out = {}
    for name in dictionaries.LABELS[1:]:
        value, low, high = _wilson(table.label, name)
        floor = 0.0 if null is None else _wilson(null.label, name)[2]
        out[name] = number(value, low, high, floor=floor, unit="share of live latents")
    return out


def _wilson(labels: pd.Series, name: str) -> tuple[float, float, float]:
    live = labels[labels != "dead"]
    count, total = int((live == name).sum()), max(len(live), 1)
    low, high = stats.binomtest(count, total).proportion_ci(method="wilson")
    return count / total, low, high


# --- The audit --------------------------------------------------------------------------------------------------------


class Audit:
    """Two checked models and their pairs; each section is measured when it is asked for and kept.

    Raises
    ------
    AlignlensError in one sentence if a model, a tokenizer, the pairs or a parameter cannot be used; nothing is measured
    before all checks have passed.
    """

    def __init__(self, request: Request):
        self.request = request
        self.device = models.default_device() if request.device == "auto" else request.device
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AuditError("device is 'cuda', but no GPU can be reached: use -p device cpu")
        toy = any(source.startswith("tiny:") for source in (request.base, request.aligned))
        self._scratch = tempfile.TemporaryDirectory(prefix="alignlens-") if toy else None
        self.study = _study(self._scratch.name) if toy else None
        self.pairs, self.source = self._load_pairs()
        aligned, adapter = request.aligned, request.adapter
        if is_adapter(aligned):
            if adapter:
                raise AuditError(f"aligned {shown(aligned)!r} is an adapter and -p adapter is given too: give one")
            aligned, adapter = request.base, str(Path(aligned).expanduser())
        self.base = load(request.base, None, request, self.study, self.device)
        self.aligned = load(aligned, adapter, request, self.study, self.device)
        check_shapes(self.base, self.aligned)
        self.format, self.notes = one_format(self.base, self.aligned, self.pairs, request)
        self._keep_usable()
        self.layers = self._chosen_layers()
        longest = self.encoded.report["longest_tokens"] + request.response_tokens
        self.batch_size = request.batch_size or int(np.clip(BATCH_TOKENS // longest, 1, 64))
        if self.device == "cpu" and self.base.facts["parameters"] < SMALL:
            models.one_thread()
        for side in (self.base, self.aligned):
            activations.bridge(side.model)  # a copy, checked against the model and thrown away
        fitting = CAUSAL_TOKENS // (2 * self.encoded.report["median_tokens"]) if self.device == "cpu" else 64
        self.causal_pairs = request.causal_pairs or int(np.clip(fitting, 16, 64))
        self.identical = self.base.weights_hash == self.aligned.weights_hash
        self._sections: dict[str, dict] = {}
        self._bridged: dict[str, object] = {}

    def _load_pairs(self):
        r = self.request
        if r.pairs is None and self.study is not None and r.base.startswith("tiny:"):
            pairs = self.study.split("measure")
            kept = pairs.prompt_id.isin(sorted(pairs.prompt_id.unique())[: r.limit])
            return pairs[kept].head(r.limit).reset_index(drop=True), "tiny world, held-out split"
        source = r.pairs or PAIRS
        path = Path(source).expanduser()
        local = path.suffix in preferences.SUFFIXES or path.exists()
        on_bad = r.on_bad or ("refuse" if local else "drop")
        pairs = preferences.load_pairs(str(path) if local else source, limit=r.limit, on_bad=on_bad)
        return pairs, shown(source)

    def _keep_usable(self) -> None:
        """Pairs that fit the format, whole; what was dropped is counted."""
        encoded = self.format.encode_pairs(self.pairs)
        facts = ("pairs", "kept", "median_tokens", "longest_tokens")
        self.dropped = {k: v for k, v in encoded.report.items() if v and k not in facts}
        loaded = self.pairs.attrs.get("report", {})
        facts = ("source", "pairs", "prompts", "rows", "over_limit")
        self.dropped |= {k: v for k, v in loaded.items() if v and k not in facts}
        least = min(self.request.response_tokens, context(self.base.model) // 8)  # tokens left free for an answer
        room = context(self.base.model) - least
        answerable = np.array([len(ids) <= room for ids in encoded.prompt_ids])
        if not answerable.all():
            self.dropped["no_room_to_answer"] = int((~answerable).sum())
        self.pairs = self.pairs[encoded.kept][answerable].reset_index(drop=True)
        if self.pairs.empty:
            raise AuditError(f"no prompt leaves room for {least} tokens of an answer: give pairs of shorter prompts")
        self.encoded = self.format.encode_pairs(self.pairs)
        prompts = self.pairs.prompt_id.nunique()
        if prompts < LEAST_PROMPTS:
            raise AuditError(
                f"{prompts} prompts are left of {self.source!r}, and an audit needs at least {LEAST_PROMPTS}: give "
                "more held-out pairs, raise limit, or raise max_length if pairs were dropped for their length"
            )

    def _chosen_layers(self) -> list[int]:
        depth, asked = self.base.facts["layers"], self.request.layers
        if asked == "auto":
            return np.unique(np.linspace(0, depth - 1, min(depth, MOST_LAYERS)).round().astype(int)).tolist()
        if asked == "all":
            return list(range(depth))
        found = sorted(layer + depth * (layer < 0) for layer in asked)
        if not found or len(set(found)) < len(found) or not all(0 <= layer < depth for layer in found):
            raise AuditError(f"layers is {asked}; give distinct block indices from 0 to {depth - 1}")
        return found

    # --- before measuring -----------------------------------------------------------------------------------------

    def describe(self) -> str:
        """What will be compared, on what, in which format, as text."""
        lines = []
        for what, side in (("base", self.base), ("aligned", self.aligned)):
            f = side.facts
            lines.append(
                f"{what:8} {f['name']}: {f['architecture']}, {f['layers']} layers x {f['d_model']}, "
                f"{f['parameters']:,} parameters in {f['dtype']}, weights {f['weights']}"
            )
        lines.append(f"pairs    {self.source}: {len(self.pairs)} pairs, {self.pairs.prompt_id.nunique()} prompts")
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines + ["", self.example])

    @property
    def example(self) -> str:
        """The shortest prompt and chosen answer as the models get them."""
        sizes = [len(p) + len(c) for p, c in zip(self.encoded.prompt_ids, self.encoded.chosen_ids, strict=True)]
        short = int(np.argmin(sizes))
        return self.format.describe(self.pairs.prompt[short], self.pairs.chosen[short])

    def estimate(self) -> str:
        """Memory from the number of parameters, time from a measured rate on a few pairs."""
        size = self.base.facts["parameters"] * self.base.model.dtype.itemsize
        d_model = self.base.facts["d_model"]
        streams = 2 * activations.estimate(len(self.pairs), len(self.layers), d_model)
        tokens = sum(map(len, [*self.encoded.chosen_ids, *self.encoded.rejected_ids]))
        streams += 2 * 2 * min(tokens, MOST_TOKENS) * d_model
        few = np.unique(np.linspace(0, len(self.pairs) - 1, 8).astype(int))
        ids = [[part[i] for i in few] for part in (self.encoded.prompt_ids, self.encoded.chosen_ids)]
        for _ in range(2):  # the first time warms up
            start = time.perf_counter()
            models.response_logprobs(self.base.model, *ids, pad_id=self.format.pad_id, batch_size=self.batch_size)
            rate = (time.perf_counter() - start) / len(few)
        # A pair is two answers; both models score, are read at one and at every token; causal tests repeat a part.
        repeats = 4 * (1 + causal.LEAST_RANDOM) + len(self.layers) + 3
        passes = 2 * 2 * 3 * len(self.pairs) + 2 * repeats * min(self.causal_pairs, len(self.pairs) // 2)
        return (
            f"memory: 3 copies of {size / 1e9:.3g} GB while bridges are checked, 2 afterwards, "
            f"and {streams / 1e9:.3g} GB of residual streams\n"
            f"time: {1 / rate:.3g} answers a second, about {passes:,} passes: {passes * rate / 60:.1f} minutes, and as "
            "much again for sampling, probes and dictionaries"
        )

    # --- sections -------------------------------------------------------------------------------------------------

    def section(self, name: str) -> dict:
        """A section by name, measured once. An instrument that cannot answer gives status "not measured" and why."""
        if name not in self._sections:
            try:
                self._sections[name] = {"status": "measured"} | getattr(self, f"_{name}")()
            except (ProbeError, DictionaryError, NotMeasured) as error:
                self._sections[name] = {"status": "not measured", "reason": str(error)}
        return self._sections[name]

    @cached_property
    def _judge(self):
        if self.study is None or "tiny world" not in self.source:
            return None
        return self.study.judge(self.study.families[0])  # the tiny world's utility is the same for all families

    def _behaviour(self) -> dict:
        """What the model does differently: log-probabilities of the pairs, sampled answers."""
        r, format, pairs = self.request, self.format, self.pairs
        options = {
            "sampled": r.sampled, "response_tokens": self._answer_tokens, "seed": r.seed, "batch_size": self.batch_size,
        }  # fmt: skip
        base = behavior.measure(self.base.model, format, pairs, self._judge, **options)
        aligned = behavior.measure(self.aligned.model, format, pairs, self._judge, reference=self.base.model, **options)
        self.base_logprobs = base[["chosen_logprob", "rejected_logprob"]].to_numpy()
        chosen = aligned.chosen_logprob - base.chosen_logprob
        rejected = aligned.rejected_logprob - base.rejected_logprob
        words = {"prompt_id": base.prompt_id.to_numpy(), "seed": r.seed}
        rounding = self._rounding()
        numbers = {
            "kl": _mean(aligned.kl, floor=rounding, unit="nats an answer", **words),
            "kl_token": _mean(aligned.kl / aligned.length, floor=rounding, unit="nats a token", **words),
            "accuracy": _mean((np.sign(chosen - rejected) + 1) / 2, null=0.5, unit="share of pairs", **words),
            "margin": _mean(chosen - rejected, unit="nats", **words),
            "chosen_shift": _mean(chosen, unit="nats", **words),
            "rejected_shift": _mean(rejected, unit="nats", **words),
            "length_shift": _mean(aligned.length - base.length, unit="tokens", **words),
            "base_length": _mean(base.length, floor=0.0, unit="tokens", **words),
            "aligned_length": _mean(aligned.length, floor=0.0, unit="tokens", **words),
        }
        if "score" in aligned:
            better = ((np.sign(aligned.score - base.score) + 1) / 2).where(aligned.score.notna())
            numbers["win_rate"] = _mean(better, null=0.5, unit="share of prompts", **words)
        cut = {n: _round(1 - t.ended.mean()) for n, t in (("base", base), ("aligned", aligned))}
        margin = (chosen - rejected).to_numpy()
        return {
            "numbers": numbers,
            "answers": int(aligned.kl.notna().sum()),
            "cut": cut,
            "shifts": {"chosen": _histogram(chosen), "rejected": _histogram(rejected)},
            "margin_quantiles": [_round(q) for q in np.percentile(margin, (5, 25, 50, 75, 95))],
        }

    @property
    def _answer_tokens(self) -> int:
        longest = max(map(len, self.encoded.prompt_ids))
        return min(self.request.response_tokens, context(self.base.model) - longest)

    def _rounding(self) -> float:
        """Nats by which a log-probability of the base depends on who shares its batch: the floor of exact numbers."""
        few = list(range(min(8, len(self.encoded))))
        ids = [[part[i] for i in few] for part in (self.encoded.prompt_ids, self.encoded.chosen_ids)]
        one, many = (
            models.response_logprobs(self.base.model, *ids, pad_id=self.format.pad_id, batch_size=n) for n in (1, 8)
        )
        return float(np.abs(one - many).max())

    def _weights(self) -> dict:
        """How far each block's weights moved, as a share of their norm."""
        moved, size = {}, {}
        theirs = self.aligned.model.state_dict()
        for name, weight in self.base.model.state_dict().items():
            if weight.is_floating_point():
                block = next((int(p) for p in name.split(".") if p.isdigit()), -1)
                moved[block] = moved.get(block, 0.0) + float((theirs[name].float() - weight.float()).square().sum())
                size[block] = size.get(block, 0.0) + float(weight.float().square().sum())
        share = {b: math.sqrt(moved[b] / max(size[b], 1e-30)) for b in sorted(moved)}
        whole = math.sqrt(sum(moved.values()) / sum(size.values()))
        blocks = [{"layer": b, "share": _exact(v, "share of the norm")} for b, v in share.items() if b >= 0]
        return {"share": _exact(whole, "share of the norm"), "layers": blocks}

    def _bridge(self, name: str):
        """The bridge of a side, made in place once log-probabilities and samples are measured."""
        self.section("behaviour"), self.section("weights")
        if not self._bridged and not self.identical:
            self._shuffled = self._read_shuffled()
        if name not in self._bridged:
            self._bridged[name] = activations.bridge(getattr(self, name).model, own=True)
        return self._bridged[name]

    def _read_shuffled(self) -> np.ndarray | None:
        """Streams [tokens, d_model] of the base plus the change of its weights, shuffled: what any such change does.

        Rows and columns of each weight's change are permuted, so its size, spectrum and outliers stay, and only its
        direction is lost. None where there are too few tokens for a crosscoder.
        """
        if sum(map(len, [*self.encoded.chosen_ids, *self.encoded.rejected_ids])) < LEAST_TOKENS:
            return None
        control, rng = copy.deepcopy(self.base.model), np.random.default_rng([self.request.seed, 9])
        theirs = self.aligned.model.state_dict()
        with torch.inference_mode():
            for name, weight in control.named_parameters():
                change = theirs[name] - weight
                for axis, size in enumerate(change.shape):
                    change = change.index_select(axis, torch.from_numpy(rng.permutation(size)).to(change.device))
                weight.add_(change)
        bridged = activations.bridge(control, own=True)
        return np.asarray(self._read_tokens(bridged).at(self.middle), np.float32)

    @cached_property
    def _streams(self) -> dict:
        options = {"layers": self.layers, "batch_size": self.batch_size, "formatter": self.format}
        return {n: activations.read(self._bridge(n), None, self.pairs, **options) for n in ("base", "aligned")}

    @property
    def _sampling(self) -> dict:
        return {"folds": FOLDS, "seed": self.request.seed}

    @cached_property
    def _decomposed(self) -> pd.DataFrame:
        base, aligned = self._streams["base"], self._streams["aligned"]
        return geometry.decompose(
            base, aligned, base.prompt_id, bootstrap=self.request.bootstrap, **self._sampling
        ).assign(layer=self.layers)

    def _signal(self) -> dict:
        """Where chosen and rejected answers can be told apart, in base and aligned; baselines that need no depth."""
        floors = {}
        for name, found in self._streams.items():
            null = probes.permuted_sign_null(
                found.chosen, found.rejected, found.prompt_id, permutations=self.request.permutations, **self._sampling
            )
            floors[name] = (null.auroc_high - 0.5).clip(lower=0).tolist()
        rows = []
        for place, row in self._decomposed.iterrows():
            own = {n: _of_row(row, n, null=0.5, floor=floors[n][place], unit="AUROC") for n in ("base", "aligned")}
            rows.append({"layer": row.layer} | own | {"difference": _changed(row, "change", unit="AUROC")})
        best = {name: max(rows, key=lambda row: row[name]["value"])["layer"] for name in ("base", "aligned")}
        return {"layers": rows, "best": best, "baselines": self._baselines()}

    def _change(self) -> dict:
        """What kind of change each layer shows: signal kept, rotated, attenuated or created; and whole streams."""
        base, aligned = self._streams["base"], self._streams["aligned"]
        streams = geometry.compare_layers(base, aligned, base.prompt_id, seed=self.request.seed)
        rows = []
        for (_, row), (_, whole) in zip(self._decomposed.iterrows(), streams.iterrows(), strict=True):
            names = ("kept", "rotated", "rotated_repaired", "attenuated", "created")
            parts = {n: _changed(row, n, unit="AUROC above chance") for n in names}
            parts |= {n: _changed(row, n, unit="AUROC") for n in ("gap", "repair")}
            rows.append(
                {"layer": row.layer, "verdict": row.verdict} | parts
                | {
                    "rotation": _changed(whole, "rotation_degrees", unit="degrees"),
                    "scale": _changed(whole, "norm_ratio", null=1.0, unit="ratio"),
                    "cka": _changed(whole, "cka", null=1.0, unit="similarity"),
                    "direction": _of_row(
                        whole, "mean_cosine", null=1.0, floor=1 - whole.mean_cosine_floor, unit="cosine"
                    ),
                }
            )  # fmt: skip
        return {"layers": rows}

    def _baselines(self) -> dict:
        sides = (self.encoded.chosen_ids, self.encoded.rejected_ids)
        lengths = [np.array([len(ids) for ids in side], float) for side in sides]
        features = {"length": lengths, "log_probability": list(self.base_logprobs.T)}
        out = {}
        for name, sides in features.items():
            row = probes.fit_features(
                *sides, self.pairs.prompt_id.to_numpy(), bootstrap=self.request.bootstrap, **self._sampling
            )
            null = probes.permuted_sign_null(
                *(side[:, None, None] for side in sides), self.pairs.prompt_id.to_numpy(),
                permutations=self.request.permutations, **self._sampling,
            )  # fmt: skip
            out[name] = _of_row(row, "auroc", null=0.5, floor=max(null.auroc_high[0] - 0.5, 0), unit="AUROC")
        return out

    # --- dictionaries ---------------------------------------------------------------------------------------------

    @property
    def middle(self) -> int:
        """The measured layer nearest to half of the depth."""
        return min(self.layers, key=lambda layer: abs(layer - (self.base.facts["layers"] - 1) / 2))

    @cached_property
    def _tokens(self) -> dict:
        return {name: self._read_tokens(self._bridge(name)) for name in ("base", "aligned")}

    def _read_tokens(self, bridged):
        options = {"layers": [self.middle], "limit": MOST_TOKENS, "batch_size": self.batch_size}
        return activations.read_tokens(bridged, None, self.pairs, formatter=self.format, **options)

    def _latents(self) -> dict:
        """A crosscoder of base and aligned at the middle layer, beside one of the base with itself."""
        layer, read = self.middle, self._tokens
        tokens = read["base"]
        streams = {name: np.asarray(found.at(layer), np.float32) for name, found in read.items()}
        keep = ~(activations.high_norm(streams["base"]) | activations.high_norm(streams["aligned"]))
        half = _halves(tokens.prompt_id, self.request.seed)[tokens.row]
        train, test = keep & (half == 0), keep & (half == 1)
        if train.sum() < LEAST_TOKENS:
            raise NotMeasured(
                f"The training half has {train.sum():,} response tokens; a crosscoder needs at least {LEAST_TOKENS:,}."
            )
        config = _crosscoder_config(int(train.sum()), streams["base"].shape[1], self.request.seed)
        found = self._crosscoder(streams, train, test, config)
        null = self._crosscoder({"base": streams["base"], "aligned": streams["base"]}, train, test, config)
        facts = {
            "layer": layer, "width": config.width, "k": config.k, "tokens": int(train.sum()),
            "held_out": int(test.sum()), "masked": int((~keep).sum()),
            "r2": {n: _round(found["quality"][f"r2_{n}"]) for n in ("base", "aligned")},
        }  # fmt: skip
        if (worst := min(facts["r2"].values())) < READABLE:
            raise NotMeasured(
                f"The crosscoder explains {worst:.2f} of the variance of held-out tokens, under {READABLE}: with "
                f"{facts['tokens']:,} training tokens its latents are not read."
            )
        shuffled = None
        if not self.identical:
            shuffled = self._crosscoder({"base": streams["base"], "aligned": self._shuffled}, train, test, config)
        labels = _shares(found["table"], null["table"])
        # A latent counts as changed if none changed as much where nothing or nothing meant happened.
        floor = max(float(part["change"].max()) for part in (null, shuffled) if part is not None)
        return facts | {
            "live": int((found["table"].label != "dead").sum()),
            "labels": labels,
            "shuffled": {} if shuffled is None else _shares(shuffled["table"]),
            "change_floor": _round(floor),
            "top": self._top_latents(found, tokens, test, floor),
        }

    def _crosscoder(self, streams, train, test, config) -> dict:
        fitted = dictionaries.train({n: x[train] for n, x in streams.items()}, config, device=self.device)
        held_out = {n: x[test] for n, x in streams.items()}
        table = dictionaries.classify(fitted, held_out)
        codes = fitted.codes(held_out).tocsc()
        rows = fitted.rows()
        # How much the latent's own writing differs between the models on an average token, over the stream's spread.
        spread = held_out["base"].std(0)
        energy = np.sqrt(np.asarray(codes.multiply(codes).mean(0)).ravel())
        change = energy * np.linalg.norm(rows["aligned"] - rows["base"], axis=1) / np.linalg.norm(spread)
        change[table.label == "dead"] = 0.0
        return {"table": table, "codes": codes, "change": change, "quality": dictionaries.evaluate(fitted, held_out)}

    def _top_latents(self, found, tokens, test, floor) -> list[dict]:
        table, index = found["table"], np.flatnonzero(test)
        part = _Rows(tokens.row[index], tokens.side[index], tokens.prompt_id)
        use = latents.usage(found["codes"].tocsr(), part)
        top = [i for i in np.argsort(-found["change"], kind="stable")[:TOP_LATENTS] if found["change"][i] > floor]
        out = []
        for i in map(int, top):
            examples = latents.examples(found["codes"].tocsr(), part, i, bands=1, per_band=3, seed=self.request.seed)
            row = table.iloc[i]
            out.append(
                {
                    "latent": i, "label": row.label, "change": self._change_of(found, i, part, floor),
                    "degrees": _round(row.degrees), "ratio": _round(row.ratio), "density": _round(row.density),
                    "effect": _changed(use.iloc[i], "effect", unit="mean code, chosen - rejected"),
                    "examples": [self._context(tokens, int(index[k])) for k in examples["index"]],
                }
            )  # fmt: skip
        return out

    def _change_of(self, found, latent: int, tokens, floor: float) -> dict:
        """A latent's change with a bootstrap over prompts: it grows with the root of the mean square of its code."""
        squares = found["codes"][:, [latent]].toarray().ravel() ** 2
        prompts = tokens.prompt_id[tokens.row]
        mean = _mean(squares, prompts, floor=0.0, seed=self.request.seed)
        scale = found["change"][latent] / max(math.sqrt(mean["value"]), 1e-30)
        low, high = (scale * math.sqrt(max(mean[end], 0.0)) for end in ("low", "high"))
        return number(found["change"][latent], low, high, floor=floor, unit="share of the stream's spread")

    def _context(self, tokens, at: int, around: int = 10) -> list[str]:
        """Text before a token, the token, and text after it, within its answer."""
        same = (tokens.row == tokens.row[at]) & (tokens.side == tokens.side[at])
        inside = np.flatnonzero(same)
        before, after = inside[(inside < at) & (inside >= at - around)], inside[(inside > at) & (inside <= at + around)]
        parts = [tokens.token_id[part].tolist() for part in (before, [at], after)]
        before, token, after = map(self.format.tokenizer.decode, parts)
        bare = token.lstrip()  # a mark looks ragged with the space of its word
        return [before + token[: len(token) - len(bare)], bare, after]

    # --- causes -----------------------------------------------------------------------------------------------------

    def _causal(self) -> dict:
        """Does the preference direction drive preferences, and after which block does the change of margin come about?

        The direction is the mean over one half of the prompts of (mean stream of the chosen answer - of the rejected
        one) at the middle layer; interventions are measured on the other half.
        """
        directions = {name: _direction(found, self.request.seed) for name, found in self._tokens.items()}
        held = self.pairs[_halves(self.pairs.prompt_id.to_numpy(), self.request.seed) == 1].head(self.causal_pairs)
        held = held.reset_index(drop=True)
        options = {"layer": self.middle, "batch_size": self.batch_size, "seed": self.request.seed}
        options["bootstrap"] = self.request.bootstrap
        out = {}
        for model in ("base", "aligned"):
            own = {"own": directions[model]}
            both = own | ({"base's": directions["base"]} if model == "aligned" else {})
            tables = [
                causal.steer(self._bridge(model), self.format, held, both, strength=STRENGTH, **options),
                causal.ablate(self._bridge(model), self.format, held, own, **options),
            ]
            out[model] = [
                _test(row)
                for table in tables
                for row in table.itertuples()
                if row.kind == "named" and row.measure in _UNITS
            ]
        options = {"layers": self.layers, "batch_size": self.batch_size, "bootstrap": self.request.bootstrap}
        patched = causal.patch(self._bridge("aligned"), self._bridge("base"), self.format, held, **options)
        patching = [
            {"layer": row.layer, "share": number(row.share, row.low, row.high, floor=0.0, unit="share of the change")}
            for row in patched.itertuples()
        ]
        reason = patched.reason.iloc[0]
        return {
            "layer": self.middle, "strength": STRENGTH, "pairs": len(held), "random": causal.LEAST_RANDOM,
            "tests": out, "patching": {"layers": [] if reason else patching, "reason": reason},
        }  # fmt: skip

    def table(self, name: str) -> pd.DataFrame:
        """A section's numbers for a notebook, one row a measure, layer or test."""
        section = self.section(name)
        if section["status"] != "measured":
            return pd.DataFrame([section])
        rows = section.get("layers") or section.get("numbers") or section.get("labels") or section["tests"]["aligned"]
        if isinstance(rows, dict):
            return pd.DataFrame(rows).T
        flat = pd.json_normalize(rows)
        return flat[[c for c in flat if not c.endswith((".unit", ".null", ".floor"))]]

    # --- the whole ----------------------------------------------------------------------------------------------------

    def result(self) -> dict:
        """All sections as one dict of JSON types, see ``SCHEMA``."""
        sections = {name: self.section(name) for name in SECTIONS}
        out = {
            "schema": SCHEMA,
            "date": self.request.date,
            "models": {"base": self.base.facts, "aligned": self.aligned.facts, "identical": self.identical},
            "pairs": {
                "source": self.source,
                "hash": content_hash(self.pairs[["prompt", "chosen", "rejected"]]),
                "pairs": len(self.pairs),
                "prompts": int(self.pairs.prompt_id.nunique()),
                "median_tokens": int(self.encoded.report["median_tokens"]),
                "longest_tokens": int(self.encoded.report["longest_tokens"]),
                "dropped": self.dropped,
            },
            "format": {
                "template": self.format.template, "max_length": self.format.max_length, "notes": self.notes,
                "fingerprint": self.format.fingerprint, "example": self.example,
            },
            **sections,
            "power": _power(sections),
            "warnings": [],
            "methods": self._methods(),
        }  # fmt: skip
        out["warnings"] = _warnings(out, self.pairs)
        return out

    def _methods(self) -> dict:
        skip = ("base", "aligned", "adapter", "pairs", "out", "date", "layers")
        settings = {k: v for k, v in dataclasses.asdict(self.request).items() if k not in skip}
        return {
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "commit": git_commit(),
            "layers": self.layers,
            "folds": FOLDS,
            "equivalence": EQUIVALENCE,
            "settings": settings | {"device": self.device},
        }


SECTIONS = ("weights", "behaviour", "signal", "change", "latents", "causal")
STRENGTH = 0.5  # of a steering vector, in units of the stream's spread


@dataclass
class _Rows:
    """The part of ``activations.Tokens`` that ``latents`` reads."""

    row: np.ndarray
    side: np.ndarray
    prompt_id: np.ndarray


SHIPPED = Path(__file__).parents[3] / "data" / "tiny"


def _study(folder: str):
    """The study of the shipped toy models; what it might write goes into the folder."""
    from alignlens import study

    found = study.open("tiny", variants="load", shipped=str(SHIPPED), store=folder, progress=False)
    for family in found.families if SHIPPED.is_dir() else ():
        if found.store.find("base", **found.base_identity(family)) is None:
            break
    else:
        if SHIPPED.is_dir():
            return found
    raise AuditError("the toy models are not where alignlens was installed from: give -p base and -p aligned")


def _halves(prompt_id: np.ndarray, seed: int) -> np.ndarray:
    """0 or 1 for each pair by the hash of its prompt, so that any part of the pairs is cut alike."""
    return np.array([hashlib.blake2b(f"{seed}:{one}".encode(), digest_size=1).digest()[0] % 2 for one in prompt_id])


def _crosscoder_config(tokens: int, d_model: int, seed: int) -> dictionaries.Config:
    """Width and epochs by the number of training tokens: about 60 tokens a latent, about 300 steps."""
    width = int(2 ** np.clip(round(math.log2(tokens / 60)), 6, 11))
    width = min(width, 8 * d_model)
    batch = int(min(512, tokens // 8))
    return dictionaries.Config(
        width=width,
        k=min(12, width // 8),
        epochs=float(np.clip(300 * batch / tokens, 3, 30)),
        batch_size=batch,
        seed=seed,
    )


def _direction(tokens, seed: int) -> np.ndarray:
    """Mean over the first half's pairs of mean chosen stream - mean rejected stream: float [d_model]."""
    pairs = len(tokens.prompt_id)
    place = tokens.side.astype(int) * pairs + tokens.row
    streams = np.asarray(tokens.streams[:, 0], np.float64)
    sums = np.zeros((2 * pairs, streams.shape[1]))
    np.add.at(sums, place, streams)
    counts = np.bincount(place, minlength=2 * pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums / counts[:, None]).reshape(2, pairs, -1)
    use = (counts.reshape(2, pairs) > 0).all(0) & (_halves(tokens.prompt_id, seed) == 0)
    return (means[0] - means[1])[use].mean(0)


def _test(row) -> dict:
    """One intervention's effect beside random directions of the same size."""
    reach = max(abs(row.random_low - row.random_mean), abs(row.random_high - row.random_mean))
    effect = number(row.value, row.low, row.high, null=row.random_mean, floor=reach, unit=_UNITS[row.measure])
    return {
        "intervention": row.intervention, "direction": row.name, "measure": row.measure, "effect": effect,
        "p": _round(row.p), "beats": bool(row.beats),
    }  # fmt: skip


_UNITS = {"margin": "nats", "accuracy": "share of pairs"}


def _histogram(values) -> dict:
    """Counts over 40 equal bins between the 0.5 and 99.5 percentiles."""
    values = np.asarray(values, float)
    low, high = np.percentile(values, (0.5, 99.5))
    counts, edges = np.histogram(values.clip(low, high), 40, (low, high) if high > low else (low - 0.5, low + 0.5))
    return {"low": _round(edges[0]), "high": _round(edges[-1]), "counts": counts.tolist()}


def _power(sections: dict) -> dict:
    """The smallest changes that these pairs could have shown, with 80 % power at the 5 % level."""
    out = {}
    if sections["behaviour"]["status"] == "measured":
        numbers = sections["behaviour"]["numbers"]
        out |= {name: detectable(numbers[name]) for name in ("margin", "kl", "accuracy", "length_shift")}
    if sections["signal"]["status"] == "measured":
        found = [detectable(row["difference"]) for row in sections["signal"]["layers"]]
        out["auroc"] = _round(float(np.median(found)))
    return out


# --- Warnings ---------------------------------------------------------------------------------------------------------


def _warnings(result: dict, pairs: pd.DataFrame) -> list[dict]:
    """What a reader must know before trusting the numbers: code, text; the gravest first."""
    out = []

    def warn(holds, code, text):
        if holds:
            out.append({"code": code, "text": text})

    p, behaviour, signal = result["pairs"], result["behaviour"], result["signal"]
    warn(result["models"]["identical"], "identical", "Both models have exactly the same weights.")
    moved = result["weights"]["share"]["value"]
    warn(
        moved > 0.5, "far",
        f"The weights differ by {_percent(moved)} of their norm: the aligned model may not come from this base.",
    )  # fmt: skip
    warn(
        p["prompts"] < FEW_PROMPTS, "few prompts",
        f"{p['prompts']} prompts only: intervals are wide, and small changes cannot be seen (see power).",
    )  # fmt: skip
    repeated = p["pairs"] - p["prompts"]
    warn(
        repeated > 0.1 * p["pairs"], "repeated prompts",
        f"{repeated} of {p['pairs']} pairs repeat a prompt; they count as one in folds and intervals.",
    )  # fmt: skip
    dropped = p["dropped"]
    warn(dropped.get("duplicate"), "duplicates", f"{dropped.get('duplicate')} exact copies of pairs were dropped.")
    warn(
        dropped.get("contradictory"), "contradictory",
        f"{dropped.get('contradictory')} pairs occur in both orders, chosen and rejected swapped.",
    )  # fmt: skip
    swapped = _shared_answers(pairs)
    warn(swapped > 0.1, "repeated answers", f"{_percent(swapped)} of the answers occur in more than one pair.")
    long = sum(dropped.get(n, 0) for n in ("overlong_prompt", "overlong_response", "too_long", "no_room_to_answer"))
    warn(
        long, "too long",
        f"{long} pairs were left out because they are longer than {result['format']['max_length']} tokens: nothing is "
        "said of long answers.",
    )  # fmt: skip
    bad = sum(v for name, v in dropped.items() if name.startswith("bad_") or name in ("special_token", "boundary"))
    warn(bad, "unusable rows", f"{bad} rows could not be used and were left out.")
    ends = _unfinished(pairs)
    warn(
        ends > 0.3, "unfinished answers",
        f"{_percent(ends)} of the answers end without a punctuation mark: the data may have been cut.",
    )  # fmt: skip
    if behaviour["status"] == "measured":
        cut = max(behaviour["cut"].values())
        warn(
            cut > 0.2, "cut samples",
            f"{_percent(cut)} of the sampled answers were cut at the length limit: length and KL are underestimated.",
        )  # fmt: skip
    if signal["status"] == "measured":
        best = max(row["aligned"]["value"] for row in signal["layers"])
        for name, words in (("length", "answer length alone"), ("log_probability", "the base's own log-probability")):
            found = signal["baselines"][name]
            warn(
                beyond(found) and abs(found["value"] - 0.5) > best - 0.5 - 0.05, f"{name} confound",
                f"{words[0].upper() + words[1:]} tells chosen from rejected with AUROC {found['value']:.3f}, the best "
                f"probe with {best:.3f}: the probe may read nothing else.",
            )  # fmt: skip
    warn(
        True, "training prompts",
        "The pairs must be held out: prompts that the aligned model was trained on would inflate every number. This "
        "cannot be checked from the models.",
    )  # fmt: skip
    return out


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _shared_answers(pairs: pd.DataFrame) -> float:
    answers = pd.concat([pairs.chosen, pairs.rejected])
    return float(answers.duplicated(keep=False).mean())


def _unfinished(pairs: pd.DataFrame) -> float:
    last = pd.concat([pairs.chosen, pairs.rejected]).str.rstrip().str[-1:]
    return float((last.str.isalnum() | last.isin([",", ";"])).mean())
