"""Behaviour: what alignment did outside the model, on prompts that no variant was trained on.

``measure`` makes one row a pair for one model; ``compare`` turns the rows of a variant's seeds and of its base into
numbers with 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from alignlens import models
from alignlens.core.errors import PreferenceError
from alignlens.core.statistics import by_group, interval, resample
from alignlens.preferences import Formatter

# name -> what it is, short enough for a panel's title; the order is the order of tables and panels
MEASURES = {
    "accuracy": "implicit-reward accuracy",
    "margin": "implicit-reward margin (nats)",
    "chosen_shift": "shift of log p(chosen) (nats)",
    "rejected_shift": "shift of log p(rejected) (nats)",
    "kl": "dose: KL to base (nats a response)",
    "win_rate": "win rate against base (ties half)",
    "score": "judge's score of samples",
    "reward_gain": "gain in learned reward",
    "length": "response length (tokens)",
    "distinct_1": "distinct words / words",
    "distinct_2": "distinct word pairs / word pairs",
}


@dataclass(frozen=True)
class Judge:
    """Who scores sampled responses. ``score``: (prompts, responses) -> DataFrame with the column ``score``."""

    name: str
    score: object


def measure(
    model, format: Formatter, pairs: pd.DataFrame, judge: Judge | None, *, reference=None, sampled: int,
    response_tokens: int, seed: int, batch_size: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """Score the pairs and sample answers to the first ``sampled`` prompts.

    reference : the base; not needed for a model with an adapter that can be switched off. Without either the model is
    the base itself, and its KL is 0. Returns one row a pair that fits ``format.max_length``: row (in ``pairs``),
    prompt_id, chosen_logprob and rejected_logprob (nats), chosen_length and rejected_length (tokens); and for rows with
    a sample: response, length, ended (0 when cut at ``response_tokens``), kl (nats) and the judge's columns."""
    encoded = format.encode_pairs(pairs)
    kept = np.flatnonzero(encoded.kept)
    options = {"pad_id": format.pad_id, "batch_size": batch_size}
    table = pd.DataFrame(
        {
            "row": kept,
            "prompt_id": encoded.prompt_id,
            "chosen_logprob": models.response_logprobs(model, encoded.prompt_ids, encoded.chosen_ids, **options),
            "rejected_logprob": models.response_logprobs(model, encoded.prompt_ids, encoded.rejected_ids, **options),
            "chosen_length": [len(r) for r in encoded.chosen_ids],
            "rejected_length": [len(r) for r in encoded.rejected_ids],
        }
    )
    asked = table.drop_duplicates("prompt_id").index[:sampled]
    prompts = [encoded.prompt_ids[i] for i in asked]
    made = models.sample(
        model, prompts, end_id=format.end_id, pad_id=format.pad_id, max_new_tokens=response_tokens, seed=seed
    )
    samples = pd.DataFrame(
        {
            "response": [format.decode(ids) for ids in made],
            "length": [len(ids) for ids in made],
            "ended": [int(ids[-1] == format.end_id) for ids in made],
        },
        index=asked,
    )
    moved = reference is not None or hasattr(model, "disable_adapter")
    samples["kl"] = models.response_kl(model, prompts, made, reference=reference, **options) if moved else 0.0
    if judge is not None:
        texts = [encoded.prompts[i] for i in asked]
        samples = samples.join(judge.score(texts, samples.response.tolist()).set_index(asked))
    return table.join(samples)


def compare(variants: list[pd.DataFrame], base: pd.DataFrame, *, bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Behaviour of a variant against its base, with intervals over prompts and seeds.

    variants : the tables of ``measure``, one a seed, on the same pairs as ``base``. Returns one row a measure
    (``MEASURES``, and the tiny world's factors where they were judged): measure, value, low, high. The bootstrap draws
    prompts, and seeds where there are several."""
    for table in variants:
        if list(table.row) != list(base.row) or list(table.prompt_id) != list(base.prompt_id):
            raise PreferenceError("behaviour was measured on other pairs than the base's; measure both on the same")
    per_seed = [_per_pair(table, base) for table in variants]
    names = [n for n in per_seed[0].columns if n != "prompt_id"]
    # Sums and counts per prompt: a bootstrap draw of prompts is then one matrix product.
    by_prompt = [by_group(t[names].to_numpy(float), t.prompt_id.to_numpy()) for t in per_seed]
    sums, counts = (np.stack(part) for part in zip(*by_prompt, strict=True))
    rng = np.random.default_rng(seed)
    weights, seeds = resample(sums.shape[1], bootstrap, rng), resample(len(per_seed), bootstrap, rng)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.einsum("bp,spm->bsm", weights, sums) / np.einsum("bp,spm->bsm", weights, counts)
        drawn = np.einsum("bs,bsm->bm", seeds / len(per_seed), means)
        value = (sums.sum(1) / counts.sum(1)).mean(0)
    drawn = np.where(np.isfinite(value), drawn, 0)  # a measure that no row has: NaN, without interval
    low, high = np.where(np.isfinite(value), interval(drawn), np.nan)
    table = pd.DataFrame({"measure": names, "value": value, "low": low, "high": high})
    return pd.concat([table, _diversity(variants)], ignore_index=True)


def _per_pair(table: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    chosen = table.chosen_logprob - base.chosen_logprob
    rejected = table.rejected_logprob - base.rejected_logprob
    out = pd.DataFrame(
        {
            "prompt_id": table.prompt_id,
            "accuracy": (np.sign(chosen - rejected) + 1) / 2,
            "margin": chosen - rejected,
            "chosen_shift": chosen,
            "rejected_shift": rejected,
            "kl": table.kl,
        }
    )
    if "score" in table:
        out["win_rate"] = ((np.sign(table.score - base.score) + 1) / 2).where(table.score.notna())
    if "reward" in table:
        out["reward_gain"] = table.reward - base.reward
    extras = [c for c in ("score", "tone", "fillers", "on_topic", "correct", "fluent", "ended", "length") if c in table]
    return out.join(table[extras].astype(float))


def _diversity(variants: list[pd.DataFrame]) -> pd.DataFrame:
    """Distinct-n over all samples of a seed (Li et al. 2016, arXiv 1510.03055), its spread over seeds as interval."""
    rows = []
    for n in (1, 2):
        shares = []
        for table in variants:
            grams = [g for text in table.response.dropna() for g in _ngrams(text.split(), n)]
            shares.append(len(set(grams)) / max(1, len(grams)))
        rows.append({"measure": f"distinct_{n}", "value": np.mean(shares), "low": min(shares), "high": max(shares)})
    return pd.DataFrame(rows)


def _ngrams(words, n):
    return zip(*(words[i:] for i in range(n)), strict=False)
