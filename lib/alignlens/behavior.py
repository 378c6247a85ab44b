"""Behaviour: what alignment did outside the model, on prompts that no variant was trained on.

``measure`` makes one row a pair for one model; ``compare`` turns the rows of a variant's seeds and of its base into
numbers with 95 % intervals."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from alignlens import models
from alignlens.core.errors import PreferenceError
from alignlens.core.statistics import by_group, interval, resample

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
    model, format, pairs, judge, *, sampled: int, response_tokens: int, seed: int, reference=None, batch_size: int = 64
) -> pd.DataFrame:
    """Score the pairs and sample answers to the first ``sampled`` prompts.

    format : ``preferences.Formatter``. judge : ``Judge``, or None. pairs : DataFrame prompt, chosen, rejected,
    prompt_id, or ``Encoded`` pairs. reference : the base; not needed for a model with an adapter that can be switched
    off. Without either the model is the base itself, and its KL is 0. Returns one row a pair that fits
    ``format.max_length``: row (in ``pairs``), prompt_id, chosen_logprob and rejected_logprob (nats), chosen_length and
    rejected_length (tokens); and for rows with a sample: response, length, ended (0 when cut at ``response_tokens``),
    kl (nats) and the judge's columns."""
    encoded = format.encode_pairs(pairs)
    options = {"pad_id": format.pad_id, "batch_size": batch_size}
    answers = {"chosen": encoded.chosen_ids, "rejected": encoded.rejected_ids}
    table = pd.DataFrame({"row": encoded.rows, "prompt_id": encoded.prompt_id})
    for side, ids in answers.items():
        table[f"{side}_logprob"] = models.response_logprobs(model, encoded.prompt_ids, ids, **options)
    for side, ids in answers.items():
        table[f"{side}_length"] = [len(answer) for answer in ids]
    asked = table.drop_duplicates("prompt_id").index[:sampled]
    prompts, end, pad = [encoded.prompt_ids[i] for i in asked], format.end_id, format.pad_id
    made = models.sample(model, prompts, end_id=end, pad_id=pad, max_new_tokens=response_tokens, seed=seed)
    samples = pd.DataFrame({"response": [format.decode(ids) for ids in made]}, index=asked)
    samples["length"], samples["ended"] = [len(ids) for ids in made], [int(ids[-1] == end) for ids in made]
    moved = reference is not None or hasattr(model, "disable_adapter")
    samples["kl"] = models.response_kl(model, prompts, made, reference=reference, **options) if moved else 0.0
    if judge is not None:
        judged = judge.score([encoded.prompts[i] for i in asked], samples.response.tolist())
        samples = samples.join(judged.set_index(asked))
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
    sums, counts = by_group(np.stack([t[names].to_numpy(float) for t in per_seed], 1), per_seed[0].prompt_id)
    rng = np.random.default_rng(seed)
    weights, seeds = (resample(count, bootstrap, rng) for count in sums.shape[:2])
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.einsum("bp,psm->bsm", weights, sums) / np.einsum("bp,psm->bsm", weights, counts)
        drawn = np.einsum("bs,bsm->bm", seeds / len(per_seed), means)
        value = (sums.sum(0) / counts.sum(0)).mean(0)
    drawn = np.where(np.isfinite(value), drawn, 0)  # a measure that no row has: NaN, without interval
    low, high = np.where(np.isfinite(value), interval(drawn), np.nan)
    table = pd.DataFrame({"measure": names, "value": value, "low": low, "high": high})
    return pd.concat([table, _diversity(variants)], ignore_index=True)


def _per_pair(table: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    chosen = table.chosen_logprob - base.chosen_logprob
    rejected = table.rejected_logprob - base.rejected_logprob
    out = table[["prompt_id"]].assign(
        accuracy=(np.sign(chosen - rejected) + 1) / 2, margin=chosen - rejected, chosen_shift=chosen,
        rejected_shift=rejected, kl=table.kl,
    )  # fmt: skip
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
            words = (text.split() for text in table.response.dropna())
            grams = [gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)]
            shares.append(len(set(grams)) / max(1, len(grams)))
        rows.append({"measure": f"distinct_{n}", "value": np.mean(shares), "low": min(shares), "high": max(shares)})
    return pd.DataFrame(rows)
