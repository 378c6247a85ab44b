"""What the aligned model does differently, and how far its weights moved."""

import re
from functools import partial

import numpy as np
import torch

from alignlens import behavior, models
from alignlens.audit import sides
from alignlens.audit.numbers import exact, mean, rounded
from alignlens.audit.requests import IDS, TOYS
from alignlens.preferences import tinyworld

SHOWN_PAIRS, SHOWN_TOKENS = 3, 120  # pairs whose preference flipped, of each way; tokens of an answer
SHOWN_LETTERS = 400  # of a prompt, its last
UNIT = "share of the norm"


def weights(audit) -> dict:
    """How far the weights of each block, and of the parts in no block, moved, as a share of their norm."""
    model, theirs, sums = audit.base.model, audit.aligned.model.state_dict(), {}
    tied = all(sides.tied(side.model) for side in (audit.base, audit.aligned))
    named = {id(model.get_output_embeddings()): "head"}
    named[id(model.get_input_embeddings())] = "embedding and head (tied)" if tied else "embedding"
    for name, weight in model.state_dict().items():
        rest = "final norm" if re.search(r"(norm|ln\w*)\.\w+$", name) else "other"
        block = next((int(word) for word in name.split(".") if word.isdigit()), rest)
        part = named.get(id(model.get_submodule(name.rpartition(".")[0])), block)
        if weight.is_floating_point() and not (tied and part == "head"):
            moved = (theirs[name].float() - weight.float()).square().sum(), weight.float().square().sum()
            sums[part] = sums.get(part, 0) + np.array([float(square) for square in moved])
    share = {part: exact(np.sqrt(moved / max(size, 1e-30)), UNIT) for part, (moved, size) in sums.items()}
    blocks = [{"layer": part, "share": share.pop(part)} for part in sorted(p for p in sums if isinstance(p, int))]
    parts = [{"part": part, "share": found} for part, found in share.items()]
    return {"share": exact(np.sqrt(np.divide(*sum(sums.values()))), UNIT), "layers": blocks, "parts": parts}


def behaviour(audit) -> dict:
    """Log-probabilities of the pairs and sampled answers, aligned against base."""
    utility = lambda *texts: tinyworld.score(*texts).rename(columns={"utility": "score"})  # noqa: E731
    judge = behavior.Judge("true utility", utility) if audit.source == TOYS else None
    room, asked = audit.context - max(map(len, audit.encoded.prompt_ids)), audit.request
    options = {"sampled": asked.sampled, "seed": asked.seed, "batch_size": audit.batch_size}
    options |= {"judge": judge, "response_tokens": min(asked.response_tokens, room)}
    measure = partial(behavior.measure, format=audit.format, pairs=audit.encoded, **options)
    base, aligned = measure(audit.base.model), measure(audit.aligned.model, reference=audit.base.model)
    audit.base_logprobs = base[["chosen_logprob", "rejected_logprob"]].to_numpy()
    chosen, rejected = (aligned[f"{side}_logprob"] - base[f"{side}_logprob"] for side in ("chosen", "rejected"))
    margin = chosen - rejected
    few = (audit.base.model, audit.encoded.prompt_ids[:8], audit.encoded.chosen_ids[:8])
    one, many = (models.response_logprobs(*few, pad_id=audit.format.pad_id, batch_size=n) for n in (1, 8))
    rounding = float(np.abs(one - many).max())  # of the base, by who shares its batch: the floor of exact numbers
    of = partial(mean, prompt_id=base.prompt_id, seed=asked.seed)
    numbers = {
        "kl": of(aligned.kl, unit="nats an answer", floor=rounding),
        "kl_token": of(aligned.kl / aligned.length, unit="nats a token", floor=rounding),
        "accuracy": of((np.sign(margin) + 1) / 2, unit="share of pairs", null=0.5), "margin": of(margin, unit="nats"),
        "chosen_shift": of(chosen, unit="nats"), "rejected_shift": of(rejected, unit="nats"),
        "length_shift": of(aligned.length - base.length, unit="tokens"),
        "base_length": of(base.length, unit="tokens", floor=0.0),
        "aligned_length": of(aligned.length, unit="tokens", floor=0.0),
    }  # fmt: skip
    if judge:
        better = (np.sign(aligned.score - base.score) + 1) / 2
        numbers["win_rate"] = of(better, unit="share of prompts", null=0.5)
    return {
        "numbers": numbers, "answers": int(aligned.kl.notna().sum()),
        "cut": {"base": rounded(1 - base.ended.mean()), "aligned": rounded(1 - aligned.ended.mean())},
        "shifts": {"chosen": _histogram(chosen), "rejected": _histogram(rejected)},
        "margin_quantiles": [rounded(q) for q in np.percentile(margin, (5, 25, 50, 75, 95))],
        "flipped": _flipped(audit, base, aligned, rounding),
    }  # fmt: skip


def _histogram(values) -> dict:
    """Counts over 40 equal bins between the 0.5 and 99.5 percentiles."""
    low, high = np.percentile(values, (0.5, 99.5))
    counts, edges = np.histogram(values.clip(low, high), 40, (low, high) if high > low else (low - 0.5, low + 0.5))
    return {"low": rounded(edges[0]), "high": rounded(edges[-1]), "counts": counts.tolist()}


def _flipped(audit, base, aligned, rounding: float) -> dict[str, dict]:
    """Pairs of which the base prefers the chosen answer and the aligned model the rejected one ("lost"), or the reverse
    ("won"): how many, of how many, and those whose margin changed most, by more than rounding."""
    before, after = (table.chosen_logprob - table.rejected_logprob for table in (base, aligned))
    change, out = abs(after - before), {}
    for way, sign in (("lost", 1), ("won", -1)):
        flipped = change[(sign * before > 0) & (sign * after < 0) & (change > rounding)]
        most = flipped.sort_values(ascending=False, kind="stable").index[:SHOWN_PAIRS]
        shown = [_pair(audit, i) | {"base": rounded(before[i]), "aligned": rounded(after[i])} for i in most]
        out[way] = {"pairs": len(flipped), "of": int((sign * before > 0).sum()), "shown": shown}
    return out


def _pair(audit, i: int) -> dict:
    """A prompt and its two answers."""
    prompt, ids = audit.encoded.prompts[i].strip(), [getattr(audit.encoded, name)[i] for name in IDS]
    shown = prompt if len(prompt) <= SHOWN_LETTERS else f"… {prompt[-SHOWN_LETTERS:]}"
    return {"prompt": shown, "chosen": _answer(audit, ids[0], ids[1]), "rejected": _answer(audit, ids[0], ids[2])}


@torch.inference_mode()
def _answer(audit, prompt: list[int], answer: list[int]) -> dict:
    """An answer's shown tokens as [text, change of log-probability]; change of the whole; how many tokens are left."""
    ids, found = torch.tensor([prompt + answer], device=audit.base.model.device), []
    for side in (audit.aligned, audit.base):
        logits = side.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found.append(models.token_logprobs(logits, ids[0, len(prompt) :]).double().cpu().numpy())
    change, tokens, text, carried = found[0] - found[1], [], "", 0.0
    for end in range(1, min(len(answer), SHOWN_TOKENS) + 1):
        whole = audit.format.tokenizer.decode(answer[:end], clean_up_tokenization_spaces=False)
        carried += change[end - 1]
        if not whole.endswith("\ufffd"):  # else a letter is cut: its bytes go together
            tokens.append([whole[len(text) :], round(carried, 3)])
            text, carried = whole, 0.0
    return {"tokens": tokens, "change": rounded(change.sum()), "left_out": max(0, len(answer) - SHOWN_TOKENS)}
