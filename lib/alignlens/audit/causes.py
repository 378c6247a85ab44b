"""Does the preference direction drive preferences, and after which block does the change of margin come about?"""

import hashlib

import numpy as np
import pandas as pd

from alignlens import causal
from alignlens.audit.numbers import number, rounded
from alignlens.audit.requests import subset

STRENGTH = 0.5  # of a steering vector, in units of the stream's spread
UNITS = {"margin": "nats", "accuracy": "share of pairs"}


def causes(audit) -> dict:
    """Steering and ablation at the middle layer along a direction from half of the prompts, tested on the other half;
    patching at every layer."""
    seed, bridges, tests = audit.request.seed, audit.bridges, {}
    directions = {name: _direction(read, seed) for name, read in audit.tokens.items()}
    held = np.flatnonzero(halves(audit.encoded.prompt_id, seed) == 1)[: audit.causal_pairs]
    held = subset(audit.encoded, held)
    options = {"batch_size": audit.batch_size, "bootstrap": audit.request.bootstrap}
    words = options | {"layer": audit.middle, "seed": seed}
    for model, bridged in bridges.items():
        own = {"own": directions[model]}
        both = own | ({"base's": directions["base"]} if model == "aligned" else {})
        steered = causal.steer(bridged, audit.format, held, both, strength=STRENGTH, **words)
        table = pd.concat([steered, causal.ablate(bridged, audit.format, held, own, **words)])
        tests[model] = [_test(row) for row in table[table.kind == "named"].itertuples() if row.measure in UNITS]
    patched = causal.patch(bridges["aligned"], bridges["base"], audit.format, held, layers=audit.layers, **options)
    reason, words = patched.reason.iloc[0], {"floor": 0.0, "unit": "share of the change"}
    shares = [{"layer": r.layer, "share": number(r.share, r.low, r.high, **words)} for r in patched.itertuples()]
    return {
        "layer": audit.middle, "strength": STRENGTH, "pairs": len(held), "random": causal.LEAST_RANDOM,
        "tests": tests, "patching": {"layers": [] if reason else shares, "reason": reason},
    }  # fmt: skip


def _test(row) -> dict:
    """One test as JSON. The floor of its effect: how far random directions of the same size reach by chance."""
    reach = max(abs(row.random_low - row.random_mean), abs(row.random_high - row.random_mean))
    effect = number(row.value, row.low, row.high, null=row.random_mean, floor=reach, unit=UNITS[row.measure])
    names = {"intervention": row.intervention, "direction": row.name, "measure": row.measure}
    return names | {"effect": effect, "p": rounded(row.p), "beats": bool(row.beats)}


def halves(prompt_id: np.ndarray, seed: int) -> np.ndarray:
    """0 or 1 for each pair by the hash of its prompt, so that any part of the pairs is cut alike."""
    return np.array([hashlib.blake2b(f"{seed}:{one}".encode(), digest_size=1).digest()[0] % 2 for one in prompt_id])


def _direction(tokens, seed: int) -> np.ndarray:
    """Mean over the first half's pairs of mean chosen stream - mean rejected stream: float [d_model]."""
    streams = pd.DataFrame(np.asarray(tokens.streams[:, 0], np.float64))
    means = streams.groupby([tokens.side, tokens.row]).mean()
    difference = (means.loc[0] - means.loc[1]).dropna()  # a response that an earlier pair shares is missing
    return difference[halves(tokens.prompt_id[difference.index], seed) == 0].mean().to_numpy()
