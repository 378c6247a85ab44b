"""Which features changed: latents of a crosscoder of base and aligned, beside those of the base with itself."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd

from alignlens import activations, calibration, dictionaries
from alignlens.audit.causes import halves
from alignlens.audit.numbers import changed, mean, number, rounded, wilson
from alignlens.core.errors import NotMeasured
from alignlens.dictionaries import STREAMS, latents, unit

LEAST_TOKENS = 4000  # response tokens of the training half, below which no crosscoder is trained
READABLE = 0.5  # held-out R2 below which a crosscoder's labels are not shown
TOP_LATENTS = 8
PLANTED = 0.125  # of the live latents, as many rotated features are planted (8 at least)


def features(audit) -> dict:
    """Labels of the latents, beside two nulls, and the latents that changed most."""
    tokens, seed = audit.tokens["base"], audit.request.seed
    base, aligned = (np.asarray(found.at(audit.middle), np.float32) for found in audit.tokens.values())
    keep = ~(activations.high_norm(base) | activations.high_norm(aligned))
    half = halves(tokens.prompt_id, seed)[tokens.row]
    train, test = keep & (half == 0), keep & (half == 1)
    if (size := int(train.sum())) < LEAST_TOKENS:
        raise NotMeasured(f"The training half has {size:,} response tokens; a crosscoder needs {LEAST_TOKENS:,}.")
    # About 60 training tokens a latent, and about 300 steps.
    width = min(int(2 ** np.clip(round(math.log2(size / 60)), 6, 11)), 8 * base.shape[1])
    options = {"batch_size": min(512, size // 8), "epochs": float(np.clip(300 * min(512, size // 8) / size, 3, 30))}
    config = dictionaries.Config(width=width, k=min(12, width // 8), seed=seed, **options)
    crosscoder = partial(_crosscoder, train=train, test=test, config=config, device=audit.device)
    found, null = crosscoder(base, aligned), crosscoder(base, base)
    r2 = {name: rounded(found.quality[f"r2_{name}"]) for name in STREAMS}
    if (worst := min(r2.values())) < READABLE:
        seen = f"The crosscoder explains {worst:.2f} of the variance of held-out tokens, under {READABLE}"
        raise NotMeasured(f"{seen}: with {size:,} training tokens its latents are not read.")
    shuffled = None if audit.identical else crosscoder(base, audit.shuffled)
    # A latent counts as changed if none changed as much where nothing or nothing meant happened.
    floor = max(float(part.change.max()) for part in (null, shuffled) if part is not None)
    return {
        "layer": audit.middle, "width": config.width, "k": config.k, "tokens": size,
        "held_out": int(test.sum()), "masked": int((~keep).sum()), "r2": r2,
        "live": int((found.table.label != "dead").sum()), "labels": _shares(found.table, _shares(null.table)),
        "shuffled": {} if shuffled is None else _shares(shuffled.table),
        "planted": _planted(base, null, crosscoder, seed),
        "change_floor": rounded(floor), "top": _top(audit, found, np.flatnonzero(test), floor),
    }  # fmt: skip


def _crosscoder(base, aligned, *, train, test, config, device: str) -> SimpleNamespace:
    """A crosscoder on held-out tokens: table, codes, quality, and of each latent: change, how much its writing differs
    on an average token, as a share of the stream's spread; strength, the norm of what it writes where it fires."""
    learned, held_out = (dict(zip(STREAMS, (base[part], aligned[part]), strict=True)) for part in (train, test))
    fitted = dictionaries.train(learned, config, device=device)
    table, codes, rows = dictionaries.classify(fitted, held_out), fitted.codes(held_out).tocsc(), fitted.rows()
    energy = np.sqrt(np.asarray(codes.multiply(codes).mean(0)).ravel()) / np.linalg.norm(held_out["base"].std(0))
    change = energy * np.linalg.norm(rows["aligned"] - rows["base"], axis=1) * (table.label != "dead").to_numpy()
    level = np.asarray(codes.sum(0)).ravel() / np.maximum(np.diff(codes.indptr), 1)
    strength, quality = level * np.linalg.norm(rows["base"], axis=1), dictionaries.evaluate(fitted, held_out)
    return SimpleNamespace(table=table, codes=codes, rows=rows, change=change, strength=strength, quality=quality)


def _planted(base: np.ndarray, null, crosscoder, seed: int) -> dict:
    """Recall and false discovery of "rotated" for a crosscoder like the audit's own, by features planted into copies of
    the base: each fires as often and as strongly as a latent of the base with itself (null), and writes along
    directions 30 to 60 degrees apart. Whatever else is called rotated is not."""
    rng, live = np.random.default_rng([seed, 11]), np.flatnonzero(null.table.label != "dead")
    like = rng.permutation(live)[: max(8, round(PLANTED * len(live)))]
    fires = rng.random((len(base), len(like)), np.float32) < null.table.density.to_numpy()[like]
    codes = fires * (0.5 + rng.random(fires.shape, np.float32)) * null.strength[like].astype(np.float32)
    own, across = unit(rng.standard_normal((2, len(like), base.shape[1])))
    across = unit(across - (across * own).sum(1, keepdims=True) * own)
    degrees = rng.uniform(30, 60, len(like))  # as in `calibration`
    turn = np.radians(degrees)[:, None]
    rows = dict(zip(STREAMS, (own, np.cos(turn) * own + np.sin(turn) * across), strict=True))
    found = crosscoder(*(base + codes @ row.astype(np.float32) for row in rows.values()))
    planted = SimpleNamespace(rows=rows, kind=np.full(len(like), "shared_rotated"), degrees=degrees)
    with np.errstate(invalid="ignore", divide="ignore"):  # of the other kinds nothing is planted
        row = calibration.score(planted, found.rows, found.table).set_index("kind").loc["shared_rotated"]
    right, labelled = round(row.recall * row.planted), int(row.labelled)
    return {
        "planted": len(like), "recall": wilson(right, len(like), unit="share of planted features"),
        "labelled": labelled,
        "false_discovery": wilson(labelled - right, labelled, unit="share of latents called rotated"),
    }  # fmt: skip


def _shares(table: pd.DataFrame, null: dict | None = None) -> dict[str, dict]:
    """Shares of live latents by label with Wilson's interval; the floor is the upper end of the null's interval."""
    live, shares = table.label[table.label != "dead"], {}
    for name in dictionaries.LABELS[1:]:
        words = {"floor": null[name]["high"] if null else 0.0, "unit": "share of live latents"}
        shares[name] = wilson(int((live == name).sum()), max(len(live), 1), **words)
    return shares


def _top(audit, found, index: np.ndarray, floor: float) -> list[dict]:
    """The latents that changed most, each with texts where it fires. index : the held-out tokens."""
    tokens, codes, seed = audit.tokens["base"], found.codes.tocsr(), audit.request.seed
    part = SimpleNamespace(row=tokens.row[index], side=tokens.side[index], prompt_id=tokens.prompt_id)
    use, out = latents.usage(codes, part), []
    for i in np.argsort(-found.change, kind="stable")[: min(TOP_LATENTS, int((found.change > floor).sum()))]:
        # Its interval is that of the root of the mean square of its code, with which a latent's change grows.
        row, squares = found.table.loc[i], found.codes[:, [i]].toarray().ravel() ** 2
        square = mean(squares, part.prompt_id[part.row], floor=0.0, seed=seed)
        scale = found.change[i] / max(math.sqrt(square["value"]), 1e-30)
        ends = (scale * math.sqrt(max(square[end], 0.0)) for end in ("low", "high"))
        shown = latents.examples(codes, part, i, bands=1, per_band=3, seed=seed)["index"]
        out.append({
            "latent": int(i), "label": row.label,
            "change": number(found.change[i], *ends, floor=floor, unit="share of the stream's spread"),
            **{name: rounded(row[name]) for name in ("degrees", "ratio", "density")},
            "effect": changed(use.iloc[i], "effect", unit="mean code, chosen - rejected"),
            "examples": [_context(audit, tokens, int(index[k])) for k in shown],
        })  # fmt: skip
    return out


def _context(audit, tokens, at: int, around: int = 10) -> list[str]:
    """Text before a token, the token, and text after it, within its answer."""
    inside = np.flatnonzero((tokens.row == tokens.row[at]) & (tokens.side == tokens.side[at]))
    parts = inside[(inside < at) & (inside >= at - around)], [at], inside[(inside > at) & (inside <= at + around)]
    before, token, after = (audit.format.tokenizer.decode(tokens.token_id[part].tolist()) for part in parts)
    bare = token.lstrip()  # a mark looks ragged with the space of its word
    return [before + token[: len(token) - len(bare)], bare, after]
