"""Planted features: paired activations with a known answer, and how well instruments find it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from alignlens import dictionaries
from alignlens.core.errors import DictionaryError
from alignlens.dictionaries import STREAMS, unit
from alignlens.published import sparc

KINDS = ("shared_same", "shared_rotated", "shared_attenuated", "base_only", "aligned_only")
SHARES = (0.5, 0.125, 0.125, 0.125, 0.125)
MEASURED = {"shared_rotated": "degrees", "shared_attenuated": "ratio"}  # what is measured of a kind besides its label
INSTRUMENTS = ("alignlens", "l1", "published")
L1 = 0.05  # of 0.05 and 0.1 the one that found more exclusive features on seed 0 of the easy regime
HELD_OUT, ALIKE = 50_000, 0.9  # rows on which latents are read; cosine from which one counts as a planted feature


@dataclass(frozen=True)
class Regime:
    """How hard the planted world is."""

    features: int = 256  # planted directions
    d: int = 64  # dimensions of each stream
    rarest: float = 0.005  # share of rows on which a feature fires, log-uniform from here to `commonest`
    commonest: float = 0.05
    noise: float = 0.02  # norm of each stream's independent noise, as a share of the signal's
    groups: int = 0  # features fire in groups, each on in a tenth of the rows, its members five times as often there
    nested: bool = False  # exclusive features fire half of the time together with a shared partner, else alone


REGIMES = {"easy": Regime(), "hard": Regime(features=1024, d=128, rarest=0.001, noise=0.1, groups=64, nested=True)}


class Planted:
    """A drawn world: ``rows`` (stream -> [features, d]), ``kind`` [features], ``degrees``, ``ratio``, ``frequency``."""

    def __init__(self, regime: Regime | str, seed: int = 0):
        self.regime = r = REGIMES[regime] if isinstance(regime, str) else regime
        rng = np.random.default_rng([seed, 7])
        counts = np.floor(np.array(SHARES) * r.features).astype(int)
        counts[0] += r.features - counts.sum()
        self.kind = rng.permutation(np.repeat(KINDS, counts))
        base = unit(rng.standard_normal((r.features, r.d)))
        across = rng.standard_normal((r.features, r.d))
        across = unit(across - (across * base).sum(1, keepdims=True) * base)
        self.degrees = np.where(self.kind == "shared_rotated", rng.uniform(30, 60, r.features), 0.0)
        self.ratio = np.where(self.kind == "shared_attenuated", rng.uniform(0.3, 0.7, r.features), 1.0)
        turn = np.radians(self.degrees)[:, None]
        aligned = (np.cos(turn) * base + np.sin(turn) * across) * self.ratio[:, None]
        self.rows = {
            name: (own * (self.kind != f"{other}_only")[:, None]).astype(np.float32)
            for name, own, other in (("base", base, "aligned"), ("aligned", aligned, "base"))
        }
        self.frequency = r.rarest * (r.commonest / r.rarest) ** rng.uniform(size=r.features)
        self._group = rng.integers(max(r.groups, 1), size=r.features)
        self._exclusive = np.flatnonzero(np.isin(self.kind, ("base_only", "aligned_only")))
        same = np.flatnonzero(self.kind == "shared_same")
        same = same[np.argsort(self.frequency[same])]
        # A partner fires at least as often (else it is the commonest): a rarer one could not be there half of the time.
        first = np.searchsorted(self.frequency[same], self.frequency[self._exclusive]).clip(max=len(same) - 1)
        self._partner = same[rng.integers(first, len(same))]
        codes = self.codes(20_000, seed=-1)
        self.l0 = float((codes > 0).sum(1).mean())
        self._signal = float(np.sqrt(np.mean([np.square(codes @ rows).sum(1).mean() for rows in self.rows.values()])))

    def codes(self, rows: int, seed: int) -> np.ndarray:
        """True codes, float32 [rows, features]: 0, or uniform in 0.5 to 1.5 where a feature fires."""
        r, rng = self.regime, np.random.default_rng([abs(seed), int(seed < 0), 1])
        chance = self.frequency.astype(np.float32)
        if r.groups:  # half of a member's firings fall into the tenth of rows in which its group is on
            on = rng.random((rows, r.groups), dtype=np.float32)[:, self._group] < 0.1
            chance = np.where(on, 5 * chance, chance * (0.5 / 0.9))
        fires = rng.random((rows, r.features), dtype=np.float32) < chance
        if r.nested:
            own, other = self._exclusive, self._partner
            together = np.minimum(0.5 * self.frequency[own] / self.frequency[other], 0.9)
            with_partner = fires[:, other] & (rng.random((rows, len(own))) < together)
            fires[:, own] = with_partner | (rng.random((rows, len(own))) < 0.5 * self.frequency[own])
        return fires * rng.uniform(0.5, 1.5, (rows, r.features)).astype(np.float32)

    def sample(self, rows: int, seed: int) -> dict[str, np.ndarray]:
        """Streams base and aligned, float32 [rows, d]."""
        codes, rng = self.codes(rows, seed), np.random.default_rng([abs(seed), 2])
        level = np.float32(self.regime.noise * self._signal / np.sqrt(self.regime.d))
        noise = {name: rng.standard_normal((rows, self.regime.d), dtype=np.float32) for name in self.rows}
        return {name: codes @ self.rows[name] + level * noise[name] for name in self.rows}


def score(planted: Planted, rows: dict[str, np.ndarray], table: pd.DataFrame) -> pd.DataFrame:
    """How the labels of live latents compare with what was planted.

    rows : decoder rows, stream -> [latents, d]. table : label (and, where known, degrees and ratio) of each latent. A
    planted feature is found if its one-to-one partner among the live latents (both streams joined, Hungarian) has a
    cosine of at least 0.9 with it. Returns one row a kind: planted, found (share, whatever the label), recall (share
    found under its own label), labelled (latents), false_discovery (share of these that are no planted feature of that
    kind), degrees_error, ratio_error (median and 95th percentile of the absolute error where the label is right)."""
    live = np.flatnonzero(table.label != "dead")
    table = table.iloc[live].reset_index(drop=True)
    truth = unit(np.concatenate([planted.rows[name] for name in STREAMS], axis=1))
    found = unit(np.concatenate([rows[name][live] for name in STREAMS], axis=1))
    feature, latent = linear_sum_assignment(-(truth @ found.T))
    alike = np.einsum("nd,nd->n", truth[feature], found[latent]) >= ALIKE
    feature, latent = feature[alike], latent[alike]
    read, out = table.iloc[latent], []
    for kind in KINDS:
        is_kind, n = planted.kind[feature] == kind, int((planted.kind == kind).sum())
        right, labelled = is_kind & (read.label == kind).to_numpy(), int((table.label == kind).sum())
        row = {
            "kind": kind, "planted": n, "found": is_kind.sum() / n, "recall": right.sum() / n,
            "labelled": labelled, "false_discovery": 1 - right.sum() / labelled if labelled else 0.0,
        }  # fmt: skip
        if (what := MEASURED.get(kind)) in table and right.any():
            told, true = read[what].to_numpy()[right], getattr(planted, what)[feature[right]]
            error = np.abs(told - true if what == "degrees" else told / true - 1)
            row |= {f"{what}_error": np.median(error), f"{what}_error_95": np.quantile(error, 0.95)}
        out.append(row)
    return pd.DataFrame(out)


def run(regime: str, seed: int, instrument: str, *, samples: int, epochs: float) -> pd.DataFrame:
    """Train one instrument on one planted world and score it: ``score`` with regime, seed, instrument, samples, r2.
    instrument : "alignlens" (ours), "l1" (the same with an L1 penalty), "published" (SPARC, its labels read as
    ours)."""
    if instrument not in INSTRUMENTS:
        raise DictionaryError(f"instrument {instrument!r} is unknown; choose from {', '.join(INSTRUMENTS)}")
    planted = Planted(regime, seed)
    streams, test = planted.sample(samples, seed=1), planted.sample(HELD_OUT, seed=2)
    if instrument == "published":
        width = round(1.25 * planted.regime.features)
        config = sparc.Config(width=width, topk=2 * round(planted.l0), epochs=max(1, round(epochs)))
        found = sparc.train(streams, config)
        table, rows = sparc.classify(found, test), dict(zip(STREAMS, found.decoders[:, 0], strict=True))
        silent = np.maximum(table.density_base, table.density_aligned) < dictionaries.CUTS.dead
        names = {"shared_aligned": "shared_same", "shared_redirected": "shared_rotated"}
        table["label"] = np.where(silent, "dead", table.label.replace(names))
        r2 = sparc.quality(found, test)["r2"]
    else:
        found = dictionaries.train(streams, config_for(planted, instrument, epochs=epochs, seed=seed))
        table, rows, r2 = dictionaries.classify(found, test), found.rows(), dictionaries.evaluate(found, test)["r2"]
    facts = {"regime": regime, "seed": seed, "instrument": instrument, "samples": samples, "r2": r2}
    return score(planted, rows, table).assign(**facts, live=int((table.label != "dead").sum()))


def config_for(planted: Planted, instrument: str, *, epochs: float, seed: int) -> dictionaries.Config:
    """Settings that a user could choose without the truth, but for k, which follows the world's own sparsity."""
    width, own = round(1.25 * planted.regime.features), {"k": planted.l0}
    if instrument == "l1":
        own = {"activation": "l1", "l1": L1, "k": width, "aux_weight": 0.0, "reseed": 0, "refit": 0}
    return dictionaries.Config(width=width, epochs=epochs, seed=seed, learning_rate=5e-3, batch_size=512, **own)
