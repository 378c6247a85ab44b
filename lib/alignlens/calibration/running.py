"""Instruments on planted worlds."""

import numpy as np
import pandas as pd

from alignlens import dictionaries
from alignlens.calibration.planted import Planted, score
from alignlens.core.errors import DictionaryError
from alignlens.published import sparc

INSTRUMENTS = ("alignlens", "l1", "published")
L1 = 0.05  # of 0.05 and 0.1 the one that found more exclusive features on seed 0 of the easy regime
HELD_OUT = 50_000  # rows on which latents are read


def run(regime: str, seed: int, instrument: str, *, samples: int, epochs: float) -> pd.DataFrame:
    """Train one instrument on one planted world and score it: ``score`` with regime, seed, instrument, samples, r2.

    instrument : "alignlens" (ours), "l1" (the same with an L1 penalty), "published" (SPARC, its adaptive labels read as
    ours: shared_aligned -> same, shared_redirected -> rotated)."""
    if instrument not in INSTRUMENTS:
        raise DictionaryError(f"instrument {instrument!r} is unknown; choose from {', '.join(INSTRUMENTS)}")
    planted = Planted(regime, seed)
    streams, test = planted.sample(samples, seed=1), planted.sample(HELD_OUT, seed=2)
    if instrument == "published":
        table, rows, r2 = _published(planted, streams, test, epochs)
    else:
        found = dictionaries.train(streams, config_for(planted, instrument, epochs=epochs, seed=seed))
        table, rows, r2 = dictionaries.classify(found, test), found.rows(), dictionaries.evaluate(found, test)["r2"]
    facts = {"regime": regime, "seed": seed, "instrument": instrument, "samples": samples, "r2": r2}
    return score(planted, rows, table).assign(**facts, live=int((table.label != "dead").sum()))


def config_for(planted: Planted, instrument: str, *, epochs: float, seed: int) -> dictionaries.Config:
    """Settings that a user could choose without the truth, but for k, which follows the world's own sparsity."""
    width = round(1.25 * planted.regime.features)
    own = {"k": planted.l0}
    if instrument == "l1":
        own = {"activation": "l1", "l1": L1, "k": width, "aux_weight": 0.0, "reseed": 0, "refit": 0}
    return dictionaries.Config(width=width, epochs=epochs, seed=seed, learning_rate=5e-3, batch_size=512, **own)


def _published(planted: Planted, streams: dict, test: dict, epochs: float) -> tuple:
    """(labels as ours, decoder rows, r2) of the published crosscoder."""
    width = round(1.25 * planted.regime.features)
    config = sparc.Config(width=width, topk=2 * round(planted.l0), epochs=max(1, round(epochs)))
    found = sparc.train(streams, config)
    table = sparc.classify(found, test)
    names = {"shared_aligned": "shared_same", "shared_redirected": "shared_rotated"}
    silent = np.maximum(table.density_base, table.density_aligned) < dictionaries.CUTS.dead
    table["label"] = np.where(silent, "dead", table.label.replace(names))
    return table, dict(zip(dictionaries.STREAMS, found.decoders[:, 0], strict=True)), sparc.quality(found, test)["r2"]
