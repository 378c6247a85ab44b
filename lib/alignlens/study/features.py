"""Stages of trained dictionaries: ours, what their latents do, the published ones, and labels on planted truth."""

import dataclasses
from itertools import product

import numpy as np
import pandas as pd
import torch

from alignlens import activations, calibration, dictionaries
from alignlens.core.store import content_hash, write_json, write_table
from alignlens.dictionaries import latents
from alignlens.preferences import tinyworld
from alignlens.published import sparc
from alignlens.study.measuring import read_dictionary, read_tokens
from alignlens.study.stages import STAGES, TEXTS, Stage

POOLED = 4  # a pooled dictionary sees this many times the tokens of one model, in equal parts from all its models
SPLICED_PAIRS = 100
# One pass of 200,000 rows in batches of 32 is about as many steps as the published crosscoder was trained for.
CALIBRATION_EPOCHS = {"alignlens": 8, "l1": 4, "published": 1}


class _Dictionary(Stage):
    """What autoencoders and crosscoders have in common.

    Subclasses say which models and layers they read, and how streams (an array and a mask of tokens a model) become the
    rows to train on, by stream, and the mask of all tokens that were kept."""

    kind, group, ships, after = "dictionary", "dictionaries", True, ("variant", "random")

    def seed(self, *args) -> int:
        return 0

    def made_from(self, s, *args):
        read = [s.key("tokens", *self._tokens(s, model, *args)) for model in self.models(s, *args)]
        config = dataclasses.asdict(self._config(s, *args))
        parameters = {"config": config, "layers": self.layers(s, *args), "seed": self.seed(*args)}
        return {"tokens": content_hash(read)}, parameters

    def _config(self, s, *args):
        p, seed = s.preset, self.seed(*args)
        return dictionaries.Config(width=p.dictionary_width, k=p.dictionary_k, epochs=p.dictionary_epochs, seed=seed)

    def _streams(self, s, *args) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Streams of each model, and which of their tokens no high norm spoils. Special tokens are no responses."""
        layers = self.layers(s, *args)
        tokens = [s.tokens(*self._tokens(s, model, *args)) for model in self.models(s, *args)]
        parts = [t.at(layers[0]) if len(layers) == 1 else t.streams for t in tokens]
        return parts, [~activations.high_norm(part) for part in parts]

    def make(self, s, folder, *args):
        rows, kept = self.rows(*self._streams(s, *args))
        hooks = [activations.hook_name(layer) for layer in self.layers(s, *args)]
        facts = {"hooks": hooks, "models": [s.weights(model) for model in self.models(s, *args)]}
        found = dictionaries.train(rows, self._config(s, *args), facts=facts, device=s.device)
        found.save(folder, half=True)
        return {"tokens": int(kept.sum()), "masked": float(1 - kept.mean()), **found.history.iloc[-1].to_dict()}


class Sae(_Dictionary):
    """One sparse autoencoder for the base and all variants of a family, pooled: latent i is the same in all."""

    name, title = "sae", "autoencoder"

    def wanted(self, s):
        layers = [(family, layer, 0) for family in s.families for layer in s.dictionary_layers(family)]
        return layers + [(family, s.crosscoder_layer(family), 1) for family in s.families]

    def label(self, s, family, layer, seed=0):
        return f"{family}-pooled-layer{layer}" + (f"-seed{seed}" if seed else "")

    def models(self, s, family, *_):
        return s.variants(family)

    def layers(self, s, family, layer, *_):
        return [layer]

    def _tokens(self, s, model, *_):
        limit = POOLED * s.preset.dictionary_tokens // len(s.variants(model.family))
        return model, "train", s.dictionary_layers(model.family), limit

    def seed(self, family, layer, seed=0):
        return seed

    def rows(self, parts, kept):
        joined = np.concatenate([x[keep] for x, keep in zip(parts, kept, strict=True)])
        return {"pooled": joined}, np.concatenate(kept)


class Crosscoder(_Dictionary):
    """A crosscoder of two models of a family, streams base and aligned, at the middle layer or over all (window)."""

    name = "crosscoder"

    def wanted(self, s):
        pairs = [(first, second) for _, first, second in s.comparisons()]
        return pairs + [windowed(s, family) for family in s.families]

    def label(self, s, first, second, window=False):
        return super().label(s, first, second) + ("-window" if window else "")

    def models(self, s, first, second, window=False):
        return [first, second]

    def layers(self, s, first, second, window=False):
        return list(s.dictionary_layers(first.family)) if window else [s.crosscoder_layer(first.family)]

    def _tokens(self, s, model, *args):
        return model, "train", tuple(self.layers(s, *args)), s.preset.dictionary_tokens

    def rows(self, parts, kept):
        keep = kept[0] & kept[1]
        return {"base": parts[0][keep], "aligned": parts[1][keep]}, keep


def windowed(s, family: str) -> tuple:
    """What the multi-layer crosscoder of a family compares: its base and the first seed of dpo, else of a method."""
    _, first, second = min(s.comparisons(family), key=lambda c: c[0] != "dpo")
    return first, second, True


class Latents(Stage):
    """What the family's pooled dictionaries read in one model on the measured pairs.

    Tables, all with a column layer: ``usage``, ``quality``; of a variant also ``change`` and ``anchors`` against
    its base, of a base ``factors`` and ``factor_null`` (tiny world). See ``dictionaries.latents``."""

    name, after = "latents", ("variant", "random", "sae")

    def wanted(self, s):
        return super().wanted(s) + STAGES["random"].wanted(s)

    def made_from(self, s, variant):
        saes = {f"sae {layer}": s.key("sae", variant.family, layer, 0) for layer in s.dictionary_layers(variant.family)}
        keys = saes | {"tokens": s.key("tokens", variant), "base": s.key("tokens", variant.base)}
        return keys, {"spliced": self._spliced(s, variant)} | ({} if s.tiny_world else {"factors": False})

    def _spliced(self, s, variant) -> bool:
        """One seed of a method stands for all where that is slow: cross-entropy with the stream replaced."""
        return variant.seed == s.seeds_of(variant.family, variant.method)[0]

    def make(self, s, folder, variant):
        first, reference = self._spliced(s, variant), s.tokens(variant.base)
        own = s.tokens(variant) if first else read_tokens(s, None, variant)  # others are read once only
        layers = s.dictionary_layers(variant.family)
        parts = [_latent_tables(s, variant, layer, own, reference, first) for layer in layers]
        for name in parts[0]:
            write_table(folder / f"{name}.parquet", pd.concat([part[name] for part in parts]))


def _latent_tables(s, variant, layer, own, reference, spliced: bool) -> dict[str, pd.DataFrame]:
    found = read_dictionary(s.sae(variant.family, layer, 0), [layer])
    streams = {"pooled": own.at(layer)}
    codes, quality = found.codes(streams), dictionaries.evaluate(found, streams)
    if spliced:
        quality |= _spliced_loss(s, variant, layer, found, own)
    tables = {"usage": latents.usage(codes, own), "quality": pd.DataFrame([quality])}
    if variant.method != "base":
        before = found.codes({"pooled": reference.at(layer)})
        tables |= {"change": latents.change(before, codes, own), "anchors": latents.anchors(before, codes, own)}
    elif s.tiny_world:
        factors = tinyworld.factor_columns(s.measured(variant.family))[own.kept].reset_index(drop=True)
        tables["factors"], tables["factor_null"] = latents.factor_auroc(codes, own, factors)
    return {name: table.assign(layer=layer) for name, table in tables.items()}


def _spliced_loss(s, variant, layer, dictionary, tokens) -> dict[str, float]:
    """Cross-entropy of the first measured pairs with the stream replaced: clean, by the dictionary, by its mean."""
    centre = torch.from_numpy(np.asarray(tokens.at(layer), np.float32).mean(0))

    def rebuild(x):
        return torch.from_numpy(dictionary.reconstruct({"pooled": x.cpu().numpy()})["pooled"])

    bridged, pairs = activations.bridge(s.load(variant)[0], own=True), s.measured(variant.family).head(SPLICED_PAIRS)
    instead = {"clean": None, "dictionary": rebuild, "mean": lambda x: centre.expand_as(x)}
    format, batch_size = s.format(variant.family), s.preset.read_batch
    table = activations.spliced_loss(bridged, format, pairs, layer, instead, batch_size=batch_size)
    sums = table.assign(total=table.loss * table.tokens).groupby("replacement")[["total", "tokens"]].sum()
    clean, rebuilt, mean = (sums.total / sums.tokens)[["clean", "dictionary", "mean"]]
    recovered = (mean - rebuilt) / max(mean - clean, 1e-9)
    return {"loss_clean": clean, "loss_increase": rebuilt - clean, "recovered": recovered}


class PublishedCrosscoder(Stage):
    """The published study's crosscoder of two models, at the middle layer: its tables only.

    Trained, as published, on one vector a prompt (its last token). Tables: ``classes`` (``sparc.classify``),
    history, ``lasso_*`` and ``geometry_*``, each published and corrected; ``facts.json``: quality, sharing ratio,
    thresholds."""

    name, group, title, ships = "published_crosscoder", "dictionaries", "published crosscoder", True
    after, fields = ("variant", "random"), ("max_length",)

    def wanted(self, s):
        return [(first, second) for _, first, second in s.comparisons()]

    def made_from(self, s, first, second):
        keys = {"first": s.weights(first), "second": s.weights(second), "pairs": content_hash(self._pairs(s)[TEXTS])}
        config = dataclasses.asdict(self._config(s, first.family))
        return keys, {"config": config, "layer": s.crosscoder_layer(first.family)}

    def _config(self, s, family):
        return sparc.Config(topk=min(sparc.Config().topk, 4 * s.width(family)))

    def _pairs(self, s) -> pd.DataFrame:
        pairs = s.split("train", "reward").drop_duplicates("prompt_id")
        return pairs.head(s.preset.published_pairs).reset_index(drop=True)

    def make(self, s, folder, first, second):
        options = s.reading(first.family) | {"layers": [s.crosscoder_layer(first.family)], "position": "prompt"}
        models = (s.load(variant)[0] for variant in (first, second))
        read = [activations.read(model, None, self._pairs(s), **options).chosen[:, 0] for model in models]
        streams = dict(zip(sparc.STREAMS, read, strict=True))
        found = sparc.train(streams, self._config(s, first.family), device=s.device)
        table = sparc.classify(found, streams)
        tables = {"classes": table, "history": found.history}
        for name, corrected in (("published", False), ("corrected", True)):
            tables[f"lasso_{name}"] = sparc.superposition(found, table, corrected=corrected, max_latents=16, draws=20)
            tables[f"geometry_{name}"] = sparc.shared_geometry(found, table, corrected=corrected, permutations=10)
        for name, part in tables.items():
            write_table(folder / f"{name}.parquet", part)
        facts = {"quality": sparc.quality(found, streams), "sharing": sparc.feature_sharing_ratio(table)}
        write_json(folder / "facts.json", facts | {"thresholds": table.attrs["thresholds"]})


class PublishedSae(Stage):
    """The published study's autoencoder of one model at that model's own best layer: quality and usage only.

    Width 8 x d, k and steps in the published proportions to d and to the width."""

    name, group, title, ships = "published_sae", "dictionaries", "published autoencoder", True
    each = "first_seeds"

    def made_from(self, s, variant):
        keys = {name: s.key("tokens", *args) for name, args in self._tokens(s, variant).items()}
        return keys, {"config": dataclasses.asdict(self._config(s, variant)), "layer": self._layer(s, variant)}

    def _layer(self, s, variant) -> int:
        table = s.probes(variant).table("published.parquet")
        return int(table.layer[table.auroc.idxmax()])

    def _tokens(self, s, variant) -> dict[str, tuple]:
        layers = (self._layer(s, variant),)
        train = variant, "train", layers, s.preset.dictionary_tokens
        return {"train": train, "held out": (variant, "measure", layers)}

    def _config(self, s, variant):
        d = s.width(variant.family)
        return dictionaries.published(d, width=8 * d, k=max(2, round(64 * d / 2048)), batch_size=64, epochs=2)

    def make(self, s, folder, variant):
        layer = self._layer(s, variant)
        train, held_out = (s.tokens(*args) for args in self._tokens(s, variant).values())
        found = dictionaries.train({"pooled": train.at(layer)}, self._config(s, variant), device=s.device)
        streams = {"pooled": held_out.at(layer)}
        write_table(folder / "usage.parquet", latents.usage(found.codes(streams), held_out))
        write_table(folder / "history.parquet", found.history)
        write_json(folder / "quality.json", dictionaries.evaluate(found, streams) | {"layer": layer})


class Calibration(Stage):
    """Labels against planted truth, ``score.parquet`` of ``calibration.run``; independent of the study's models."""

    name, title, ships, after = "calibration", "planted truth", True, ()

    def wanted(self, s):
        """(regime, instrument, seed, samples) of the comparison of instruments, and of the curve over samples."""
        p, n = s.preset, s.preset.calibration_samples
        all_seeds, fewer = range(p.calibration_seeds), [n // share for share in (8, 4, 2)]
        out = product(p.calibration_regimes, CALIBRATION_EPOCHS, all_seeds, [n])
        return [*out, *((r, "alignlens", seed, n) for r, n, seed in product(p.calibration_regimes, fewer, (0, 1)))]

    def label(self, s, regime, instrument, seed, samples):
        return f"{regime}-{instrument}-{samples}-seed{seed}"

    def made_from(self, s, regime, instrument, seed, samples):
        world, epochs = {"regime": regime, "instrument": instrument, "seed": seed}, CALIBRATION_EPOCHS[instrument]
        return {}, world | {"samples": samples, "epochs": epochs}

    def make(self, s, folder, *args):
        write_table(folder / "score.parquet", calibration.run(**self.made_from(s, *args)[1]))
