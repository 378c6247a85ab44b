"""Stages that measure a model, or a model against its base: streams, behaviour, probes, geometry, dose, causes."""

import numpy as np
import pandas as pd

from alignlens import activations, behavior, causal, dictionaries, geometry, models, probes
from alignlens.core.statistics import alternating_halves, standard_error
from alignlens.core.store import content_hash, write_arrays, write_table
from alignlens.study.stages import TEXTS, Stage
from alignlens.study.training import judge

PROTOCOLS = ("grouped", "published")
DRAWS = ("folds", "bootstrap")
CAUSAL = ("causal_pairs", "random_directions", "steer_strengths", "bootstrap", "folds", "sampled", "response_tokens")


class Activations(Stage):
    """Residual streams of the family's measured pairs, or of other pairs, which ``what`` names."""

    name, fields = "activations", ("position", "max_length")

    def label(self, s, variant, what="measured", pairs=None):
        return f"{variant.label}-{what}"

    def made_from(self, s, variant, what="measured", pairs=None):
        key = s.measured_key(variant.family) if pairs is None else content_hash(pairs[TEXTS])
        return {"model": s.weights(variant), "pairs": key}, {"layers": s.preset.layers_measured}

    def make(self, s, folder, variant, what="measured", pairs=None):
        pairs = s.encoded(variant.family) if pairs is None else pairs
        found = _read(s, s.load(variant)[0], variant.family, pairs, s.preset.layers_measured)
        found.save(folder)
        return {"pairs": len(found.prompt_id), "what": what}

    def read(self, artifact):
        return activations.Activations.load(artifact.path)


def _read(s, model, family: str, pairs, layers) -> activations.Activations:
    options = s.reading(family) | {"position": s.preset.position}
    return activations.read(model, None, pairs, layers=layers, **options)


class Tokens(Stage):
    """Residual streams at every response token, ``activations.Tokens``, memory-mapped from the store.

    split : "measure" (the family's measured pairs) or "train" (all other pairs: what dictionaries are trained on)."""

    name, each, fields = "tokens", "first_seeds", ("max_length",)

    def label(self, s, variant, split="measure", *_):
        return f"{variant.label}-{split}"

    def made_from(self, s, variant, split="measure", layers=None, limit=None):
        pairs = s.measured_key(variant.family) if split == "measure" else s.split_key("train", "reward")
        parameters = {"layers": layers or s.dictionary_layers(variant.family), "limit": limit}
        return {"model": s.weights(variant), "pairs": pairs}, parameters

    def make(self, s, folder, *args):
        return {"tokens": len(read_tokens(s, folder, *args).row)}

    def read(self, artifact):
        return activations.Tokens.load(artifact.path)


def read_tokens(s, folder, variant, split="measure", layers=None, limit=None) -> activations.Tokens:
    """What ``Tokens`` stores; with folder None it is kept in memory."""
    pairs = s.encoded(variant.family) if split == "measure" else s.split("train", "reward")
    options = {"layers": list(layers or s.dictionary_layers(variant.family)), "limit": limit, "folder": folder}
    return activations.read_tokens(s.load(variant)[0], None, pairs, **options, **s.reading(variant.family))


class Behavior(Stage):
    """Log-probabilities and samples of one model on the measured pairs: a table, one row a pair."""

    name, fields = "behavior", ("sampled",)

    def made_from(self, s, variant):
        keys = {"model": s.weights(variant), "base": s.weights(variant.base), "pairs": s.measured_key(variant.family)}
        if s.needs_reward_model or not s.judged:
            keys["judge"] = s.key("reward_model", variant.family, 0) if s.judged else "nobody"
        return keys, {"tokens": s.preset.response_tokens, "seed": variant.seed, "max": s.preset.max_length}

    def make(self, s, folder, variant):
        # A merged model samples about twice as fast as one with its adapter beside it, so the base is loaded too.
        reference = s.load(variant.base)[0] if variant.method != "base" else None
        write_table(folder / "behavior.parquet", behave(s, variant, s.load(variant)[0], reference))

    def read(self, artifact):
        return artifact.table("behavior.parquet")


def behave(s, variant, model, reference) -> pd.DataFrame:
    """``behavior.measure`` of a loaded model on a variant's measured pairs."""
    p = s.preset
    return behavior.measure(
        model, s.format(variant.family), s.encoded(variant.family), judge(s, variant.family), reference=reference,
        sampled=p.sampled, response_tokens=s.limits(variant.family).answer, seed=variant.seed, batch_size=p.read_batch,
    )  # fmt: skip


class Probes(Stage):
    """All probe tables of one model.

    Tables: ``grouped``, ``published`` (``probes.fit_layers`` under each protocol); for a base ``null_grouped`` and
    ``null_published`` (permuted signs), for a variant ``transfer`` against its base. ``scores.safetensors`` holds
    out-of-fold scores, labels, folds and pairs of both protocols."""

    name, title, fields = "probes", "activations and probes", (*DRAWS, "permutations")

    def made_from(self, s, variant):
        return {"activations": s.key("activations", variant), "base": s.key("activations", variant.base)}, {}

    def make(self, s, folder, variant):
        p, own = s.preset, s.activations(variant)
        sides = (own.chosen, own.rejected, own.prompt_id)
        tables, arrays = {}, {}
        for protocol in PROTOCOLS:
            options = {"protocol": protocol, "folds": p.folds}
            tables[protocol] = probes.fit_layers(*sides, **options, bootstrap=p.bootstrap)
            out = probes.out_of_fold(*sides, **options)
            arrays |= {f"{protocol}.{n}": getattr(out, n) for n in ("scores", "labels", "fold_ids", "pair_ids")}
            if variant.method == "base":
                null = probes.permuted_sign_null(*sides, **options, permutations=p.permutations)
                tables[f"null_{protocol}"] = null
        if variant.method != "base":
            tables["transfer"] = probes.transfer(s.activations(variant.base), own, own.prompt_id, **s.draws)
        for name, table in tables.items():
            write_table(folder / f"{name}.parquet", table.assign(layer=own.layers))
        write_arrays(folder / "scores.safetensors", arrays)


class Geometry(Stage):
    """Two models of a family on the measured pairs, one row a layer.

    Tables: ``geometry`` (``geometry.compare_layers``) and ``decomposition`` (``geometry.decompose``)."""

    name, fields = "geometry", DRAWS

    def wanted(self, s):
        return [(first, second) for _, first, second in s.comparisons(every=True)]

    def made_from(self, s, first, second):
        return {"first": s.key("activations", first), "second": s.key("activations", second)}, {}

    def make(self, s, folder, first, second):
        for name, table in _compared(s, s.activations(first), s.activations(second)).items():
            write_table(folder / f"{name}.parquet", table)


def _compared(s, first, second) -> dict[str, pd.DataFrame]:
    tables = {
        "geometry": geometry.compare_layers(first, second, first.prompt_id),
        "decomposition": geometry.decompose(first, second, first.prompt_id, **s.draws),
    }
    return {name: table.assign(layer=first.layers) for name, table in tables.items()}


class Dose(Stage):
    """A variant part of the way from its base: weights base + share × (variant - base), for each ``dose_shares``.

    Tables, all with a column share: ``behavior`` (``behavior.compare``), ``geometry``, ``decomposition``."""

    name, version, title, ships, fields = "dose", 2, "part of the way", True, DRAWS

    def wanted(self, s):
        return [(v,) for v in s.first_seeds(base=False)]

    def made_from(self, s, variant):
        whole = {"behavior": s.key("behavior", variant), "geometry": s.key("geometry", variant.base, variant)}
        return whole | {"reference": s.key("behavior", variant.base)}, {"shares": s.preset.dose_shares}

    def make(self, s, folder, variant):
        parts = [self._at(s, variant, share) for share in s.preset.dose_shares]
        for name in parts[0]:
            write_table(folder / f"{name}.parquet", pd.concat([part[name] for part in parts]))

    def _at(self, s, variant, share) -> dict[str, pd.DataFrame]:
        reference, model = s.load(variant.base)[0], s.load(variant)[0]
        models.interpolate(reference, model, share)
        table, before = behave(s, variant, model, reference), s.activations(variant.base)
        after = _read(s, model, variant.family, s.encoded(variant.family), before.layers)
        table = behavior.compare([table], s.behavior(variant.base), bootstrap=s.preset.bootstrap)
        tables = {"behavior": table} | _compared(s, before, after)
        return {name: table.assign(share=share) for name, table in tables.items()}


class Causal(Stage):
    """Interventions on one model at the middle dictionary layer, and activation patching against its base.

    Directions and latents are found on one half of the measured prompts (latents: by the change tables, which read
    all), effects are measured on ``causal_pairs`` pairs of the other half. Tables: ``interventions``
    (``causal.steer``, ``ablate``, ``ablate_latents``) and, of a variant, ``patching`` (``causal.patch`` both ways,
    column into: the model that gets the other's stream)."""

    name, title, ships, each, fields = "causal", "interventions", True, "first_seeds", CAUSAL

    def made_from(self, s, variant):
        keys = {f"{stage} of {v.method}": s.key(stage, v) for v in (variant, variant.base)
                for stage in ("activations", "latents")}  # fmt: skip
        keys |= {"reference": s.key("behavior", variant.base)}
        # Samples are drawn batch by batch: if there are several, their size is a parameter.
        several = s.judged and s.preset.read_batch < min(s.preset.sampled, s.preset.causal_pairs)
        return keys, {"read_batch": s.preset.read_batch} if several else {}

    def make(self, s, folder, variant):
        p, layer, format = s.preset, s.crosscoder_layer(variant.family), s.format(variant.family)
        pairs, fitted = causal_halves(s, variant.family)
        said = s.behavior(variant.base).set_index("row").loc[pairs.index]
        margin = (said.chosen_logprob - said.rejected_logprob).to_numpy()
        bridged = activations.bridge(s.load(variant)[0], own=True)
        inputs, common = (bridged, format, pairs), {"batch_size": p.read_batch, "bootstrap": p.bootstrap}
        options = common | {"layer": layer, "random": p.random_directions, "reference": margin}
        directions, told = _directions(s, variant, layer, fitted), _told_latents(s, variant, layer)
        found = read_dictionary(s.sae(variant.family, layer, 0), [layer])
        written = directions | {f"latent {i}": found.decoder[i] for i in told}
        tables = [causal.steer(*inputs, written, strength=p.steer_strengths, **options)]
        tables.append(causal.ablate(*inputs, directions, **options))
        if told:
            removed = causal.ablate_latents(*inputs, found, told, **options)
            tables.append(removed.assign(name="latent " + removed["name"]))
        if s.judged:
            tables.append(_sampled_steering(s, variant.family, inputs, directions, options))
        write_table(folder / "interventions.parquet", pd.concat(tables, ignore_index=True))
        if variant.method != "base":
            other = activations.bridge(s.load(variant.base)[0], own=True)
            ways = {"variant": (other, bridged), "base": (bridged, other)}
            parts = [causal.patch(*both, format, pairs, **common).assign(into=into) for into, both in ways.items()]
            write_table(folder / "patching.parquet", pd.concat(parts, ignore_index=True))


def read_dictionary(artifact, layers: list[int]) -> dictionaries.Dictionary:
    """The dictionary of an artifact; DictionaryError if it was trained at other layers."""
    expect = {"hooks": [activations.hook_name(layer) for layer in layers]}
    return dictionaries.Dictionary.load(artifact.path, expect=expect)


def causal_halves(s, family: str) -> tuple[pd.DataFrame, np.ndarray]:
    """The pairs that effects are measured on, index their row in ``measured``; which rows directions may see."""
    pairs = s.measured(family)
    fitted = alternating_halves(pairs.prompt_id) == 0
    return pairs[~fitted].head(s.preset.causal_pairs), fitted


def _directions(s, variant, layer: int, fitted: np.ndarray) -> dict[str, np.ndarray]:
    """The preference direction, twice, and a variant's mean shift from its base."""
    own = s.activations(variant)
    chosen, rejected = (x[fitted] for x in own.at(layer))
    fit = probes.out_of_fold(chosen[:, None], rejected[:, None], own.prompt_id[fitted], folds=s.preset.folds)
    directions = {"preference (mean)": (chosen - rejected).mean(0), "preference (probe)": fit.directions[0].mean(0)}
    if variant.method != "base":
        before, after = s.tokens(variant.base), s.tokens(variant)
        rows = fitted[before.row]  # measured pairs all fit, so a kept pair's number is its row
        shift = after.at(layer)[rows].astype(np.float32) - before.at(layer)[rows].astype(np.float32)
        directions["shift from base"] = shift.mean(0)
    return directions


def _told_latents(s, variant, layer: int) -> list[int]:
    """Latents to test: of a base the clearest preference effects, of a variant the clearest changes of it."""
    name, column = ("usage", "effect") if variant.method == "base" else ("change", "effect_change")
    table = s.latents(variant).table(f"{name}.parquet").query("layer == @layer")
    used = s.latents(variant.base).table("usage.parquet").query("layer == @layer")
    often = table.latent.map(used.set_index("latent").density) > 1e-3
    error = standard_error(table[f"{column}_low"], table[f"{column}_high"], least=1e-9)
    return table.assign(strength=table[column].abs() / error)[often].nlargest(2, "strength").latent.tolist()


def _sampled_steering(s, family, inputs, directions, options) -> pd.DataFrame:
    """What the strongest steering does to samples: KL, length and the judge's score."""
    p, score = s.preset, judge(s, family).score
    table = causal.steer(
        *inputs, directions, strength=max(p.steer_strengths), sampled=min(p.sampled, len(inputs[2])),
        judge=lambda prompts, responses: score(prompts, responses).score.to_numpy(),
        response_tokens=s.limits(family).answer, **options,
    )  # fmt: skip
    return table[table.measure.isin(["kl", "length", "reward"])].assign(intervention="steer samples")
