"""What the aligned model does differently, and how far its weights moved."""

from functools import partial

import numpy as np

from alignlens import behavior, models
from alignlens.audit.numbers import exact, mean, rounded
from alignlens.audit.requests import TOYS
from alignlens.preferences import tinyworld


def weights(audit) -> dict:
    """How far each block's weights moved, as a share of their norm."""
    depth, theirs = audit.base.facts["layers"], audit.aligned.model.state_dict()
    moved, size = np.zeros((2, depth + 1))  # squares; the last place is for what is in no block
    for name, weight in audit.base.model.state_dict().items():
        if weight.is_floating_point():
            block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
            moved[block] += float((theirs[name].float() - weight.float()).square().sum())
            size[block] += float(weight.float().square().sum())
    share = np.sqrt(moved / size.clip(1e-30))
    blocks = [{"layer": b, "share": exact(share[b], "share of the norm")} for b in range(depth)]
    return {"share": exact(np.sqrt(moved.sum() / size.sum()), "share of the norm"), "layers": blocks}


def behaviour(audit) -> dict:
    """Log-probabilities of the pairs and sampled answers, aligned against base."""
    judge = behavior.Judge("true utility", _utility) if audit.source == TOYS else None
    room, asked = audit.context - max(map(len, audit.encoded.prompt_ids)), audit.request
    options = {"sampled": asked.sampled, "seed": asked.seed, "batch_size": audit.batch_size}
    options["response_tokens"] = min(asked.response_tokens, room)
    base, aligned = (
        behavior.measure(side.model, audit.format, audit.encoded, judge, reference=reference, **options)
        for side, reference in ((audit.base, None), (audit.aligned, audit.base.model))
    )
    audit.base_logprobs = base[["chosen_logprob", "rejected_logprob"]].to_numpy()
    chosen = aligned.chosen_logprob - base.chosen_logprob
    rejected = aligned.rejected_logprob - base.rejected_logprob
    margin = chosen - rejected
    few = (audit.base.model, audit.encoded.prompt_ids[:8], audit.encoded.chosen_ids[:8])
    one, many = (models.response_logprobs(*few, pad_id=audit.format.pad_id, batch_size=n) for n in (1, 8))
    rounding = float(np.abs(one - many).max())  # of the base, by who shares its batch: the floor of exact numbers
    of = partial(mean, prompt_id=base.prompt_id, seed=asked.seed)
    numbers = {
        "kl": of(aligned.kl, unit="nats an answer", floor=rounding),
        "kl_token": of(aligned.kl / aligned.length, unit="nats a token", floor=rounding),
        "accuracy": of((np.sign(margin) + 1) / 2, unit="share of pairs", null=0.5),
        "margin": of(margin, unit="nats"), "chosen_shift": of(chosen, unit="nats"),
        "rejected_shift": of(rejected, unit="nats"),
        "length_shift": of(aligned.length - base.length, unit="tokens"),
        "base_length": of(base.length, unit="tokens", floor=0.0),
        "aligned_length": of(aligned.length, unit="tokens", floor=0.0),
    }  # fmt: skip
    if "score" in aligned:
        better = ((np.sign(aligned.score - base.score) + 1) / 2).where(aligned.score.notna())
        numbers["win_rate"] = of(better, unit="share of prompts", null=0.5)
    return {
        "numbers": numbers, "answers": int(aligned.kl.notna().sum()),
        "cut": {"base": rounded(1 - base.ended.mean()), "aligned": rounded(1 - aligned.ended.mean())},
        "shifts": {"chosen": _histogram(chosen), "rejected": _histogram(rejected)},
        "margin_quantiles": [rounded(q) for q in np.percentile(margin, (5, 25, 50, 75, 95))],
    }  # fmt: skip


def _utility(prompts, responses):
    return tinyworld.score(prompts, responses).rename(columns={"utility": "score"})


def _histogram(values) -> dict:
    """Counts over 40 equal bins between the 0.5 and 99.5 percentiles."""
    low, high = np.percentile(values, (0.5, 99.5))
    counts, edges = np.histogram(values.clip(low, high), 40, (low, high) if high > low else (low - 0.5, low + 0.5))
    return {"low": rounded(edges[0]), "high": rounded(edges[-1]), "counts": counts.tolist()}
