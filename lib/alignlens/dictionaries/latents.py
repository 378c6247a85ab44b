"""What latents do: how often they fire, for which answers and factors, and what changed against the base.

Codes are sparse [tokens, latents] as ``Dictionary.codes`` gives them; tokens are ``activations.Tokens`` of chosen (side
0) and rejected (side 1) answers of pairs (rows). Latent i is the same in all models that one dictionary reads."""

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.stats import rankdata

from alignlens.core.errors import DictionaryError
from alignlens.core.statistics import Z95, alternating_halves, by_group, corrected, p_value

ANCHOR_LATENTS, ANCHOR_POSITIONS = 100, 64


def responses(codes: csr_array, tokens, *, fires: bool = False) -> np.ndarray:
    """Mean code (or share of tokens on which it fires) of each latent in each response: [chosen or rejected, pairs,
    latents]. Responses that were read under an earlier row (the same text again) hold NaN."""
    if codes.shape[0] != len(tokens.row):
        raise DictionaryError(f"{codes.shape[0]} rows of codes for {len(tokens.row)} tokens: read the same tokens")
    pairs = len(tokens.prompt_id)
    place = tokens.side.astype(np.int64) * pairs + tokens.row
    counts = np.bincount(place, minlength=2 * pairs).astype(float)
    sums = csr_array((np.ones(len(place)), (place, np.arange(len(place)))), shape=(2 * pairs, len(place)))
    values = (sums @ ((codes > 0).astype(float) if fires else codes)).toarray()
    return (values / np.where(counts, counts, np.nan)[:, None]).reshape(2, pairs, -1)


def usage(codes: csr_array, tokens) -> pd.DataFrame:
    """One row a latent: density (share of tokens on which it fires), mean and maximum code, mean where it fires, and
    its preference effect: mean over pairs of (mean code in chosen - in rejected), with a 95 % interval over prompts."""
    count, total = np.diff(codes.tocsc().indptr), np.asarray(codes.sum(0)).ravel()
    effect = _over_prompts(np.subtract(*responses(codes, tokens)), tokens.prompt_id)
    columns = {
        "latent": np.arange(codes.shape[1]), "density": count / codes.shape[0], "mean": total / codes.shape[0],
        "max": codes.max(axis=0).toarray().ravel(), "mean_active": total / np.maximum(count, 1),
    }  # fmt: skip
    return pd.DataFrame(columns | {f"effect{suffix}": value for suffix, value in effect.items()})


def change(base: csr_array, variant: csr_array, tokens) -> pd.DataFrame:
    """Change of a variant against its base, token for token, one row a latent: density_change, mean_change (per token),
    effect_change (of the preference effect), each with _low and _high (95 %, over prompts), and density_p, mean_p,
    effect_p after Benjamini and Hochberg over the latents that fire in either."""
    out = {"latent": np.arange(base.shape[1])}
    firing, levels = ([responses(codes, tokens, fires=f) for codes in (base, variant)] for f in (True, False))
    measures = {
        "density": np.nanmean(firing[1] - firing[0], axis=0),
        "mean": np.nanmean(levels[1] - levels[0], axis=0),
        "effect": (levels[1][0] - levels[1][1]) - (levels[0][0] - levels[0][1]),
    }
    alive = (np.asarray((base > 0).sum(0)) + np.asarray((variant > 0).sum(0))).ravel() > 0
    for name, values in measures.items():
        found = _over_prompts(values, tokens.prompt_id)
        out |= {f"{name}_change{suffix}": value for suffix, value in found.items()}
        out[f"{name}_p"] = np.where(alive, corrected(np.where(alive, p_value(*found.values()), np.nan)), 1.0)
    return pd.DataFrame(out)


def _over_prompts(values: np.ndarray, prompt_id: np.ndarray) -> dict[str, np.ndarray]:
    """Mean over prompts of values [pairs, latents] and its 95 % interval; pairs of a prompt count as one."""
    sums, counts = by_group(values, pd.factorize(prompt_id)[0])
    each = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    n = np.maximum(np.isfinite(each).sum(0), 1)
    mean = np.nansum(each, axis=0) / n
    half = Z95 * np.sqrt(np.nansum((each - mean) ** 2, axis=0) / np.maximum(n - 1, 1) / n)
    return {"": mean, "_low": mean - half, "_high": mean + half}


def factor_auroc(codes: csr_array, tokens, factors: pd.DataFrame, *, permutations: int = 20, seed: int = 0):
    """How well each latent's mean code in a response tells each binary factor: (latent, factor, auroc), null.

    factors : one row a pair, bool columns ``chosen_NAME`` and ``rejected_NAME``. AUROC below 0.5 marks a latent of the
    opposite. null : factor, ceiling: 0.5 plus the 95th percentile, over permutations of prompts, of the largest |AUROC
    - 0.5| of all latents; only a latent outside 1 - ceiling to ceiling is named after the factor."""
    values = responses(codes, tokens)
    names = [c.removeprefix("chosen_") for c in factors if c.startswith("chosen_")]
    truth = np.stack([factors[[f"{side}_{n}" for n in names]].to_numpy(bool) for side in ("chosen", "rejected")])
    known = np.isfinite(values[..., 0])
    ranks = rankdata(values[known], axis=0)
    rng, rows, null = np.random.default_rng(seed), [], []
    for i, name in enumerate(names):
        found = _auroc(ranks, truth[known, i])
        rows.append(pd.DataFrame({"latent": np.arange(codes.shape[1]), "factor": name, "auroc": found}))
        shuffled = (truth[:, rng.permutation(truth.shape[1]), i] for _ in range(permutations))
        largest = [np.nanmax(np.abs(_auroc(ranks, labels[known]) - 0.5)) for labels in shuffled]
        null.append({"factor": name, "ceiling": 0.5 + float(np.quantile(largest, 0.95))})
    return pd.concat(rows, ignore_index=True), pd.DataFrame(null)


def _auroc(ranks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC of each column from its ranks [rows, latents] (ties at their mean rank)."""
    positive, n = int(labels.sum()), len(labels)
    if positive in (0, n):
        return np.full(ranks.shape[1], np.nan)
    return (ranks[labels].sum(0) - positive * (positive + 1) / 2) / (positive * (n - positive))


def anchors(base: csr_array, variant: csr_array, tokens, *, seed: int = 0) -> pd.DataFrame:
    """What becomes of strongly firing latents at the tokens where they fire most: one row a latent.

    Latents are drawn on one half of the prompts, positions on the other. forward : variant / base at the base's
    strongest tokens, which can only look like a fall where readings scatter; backward : at the variant's, which can
    only look like a rise; ratio : their geometric mean, 1 if the two only scatter. published : True for the latent of
    the largest mean on the base, the only one that the published study read."""
    first = alternating_halves(tokens.prompt_id)[tokens.row] == 0
    rate, mean = (np.asarray(x.mean(0)).ravel() for x in (base[first] > 0, base[first]))
    eligible = np.flatnonzero(rate * first.sum() >= 2 * ANCHOR_POSITIONS)
    if not len(eligible):
        eligible = np.argsort(-rate)[: max(1, len(rate) // 10)]
    drawn, top = np.random.default_rng(seed).permutation(eligible)[:ANCHOR_LATENTS], int(mean.argmax())
    latents = np.unique(np.append(drawn, top))
    a, b = (codes[~first][:, latents].toarray() for codes in (base, variant))
    forward, backward = _ratio_at_top(a, a, b), _ratio_at_top(b, a, b)
    columns = {"latent": latents, "forward": forward, "backward": backward, "ratio": np.sqrt(forward * backward)}
    return pd.DataFrame(columns | {"published": latents == top})


def _ratio_at_top(by: np.ndarray, base: np.ndarray, variant: np.ndarray) -> np.ndarray:
    places = np.argsort(-by, axis=0, kind="stable")[:ANCHOR_POSITIONS]
    above, below = (np.take_along_axis(x, places, axis=0).mean(0) for x in (variant, base))
    return above / np.maximum(below, 1e-9)


def examples(codes: csr_array, tokens, latent: int, *, bands=4, per_band=3, seed=0) -> pd.DataFrame:
    """Tokens at which a latent fires, drawn from each quantile band of its codes, at most one a prompt: index (into the
    tokens), band (0 strongest), code. Only the strongest would show it at its most flattering."""
    column = codes[:, [latent]].tocoo()
    found = pd.DataFrame({"index": column.row.astype(int), "code": column.data.astype(float)})
    found["prompt"] = tokens.prompt_id[tokens.row[found["index"]]]
    rng, taken = np.random.default_rng([seed, latent]), []
    for band, part in enumerate(np.array_split(np.argsort(-column.data, kind="stable"), bands)):
        part = found.iloc[part if band == 0 else rng.permutation(part)].assign(band=band)
        fresh = ~part.prompt.isin([prompt for rows in taken for prompt in rows.prompt])
        taken.append(part[fresh].drop_duplicates("prompt").head(per_band))
    return pd.concat(taken, ignore_index=True)[["index", "band", "code"]]
