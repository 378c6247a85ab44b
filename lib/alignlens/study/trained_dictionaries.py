"""Everything of a study that needs a trained dictionary: which are trained, on which layers and pairs, and what for.

``TrainedDictionaries`` is the part of ``study.Study`` that holds these stages.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from alignlens.core import store
from alignlens.core.errors import AlignError
from alignlens.core.store import Artifact, Store, content_hash
from alignlens.preferences import tinyworld
from alignlens.study.stages import VERSIONS, Variant

POOLED = 4  # a pooled dictionary sees this many times the tokens of one model, in equal parts from all its models
SPLICED_PAIRS = 100


class TrainedDictionaries:
    """Dictionaries and what they read: stages of a ``study.Study``, to be asked for there."""

    def random_direction(self, variant: Variant) -> Artifact:
        """The null of a comparison: an adapter of random direction, each module's update as large as a variant's.

        The pattern is the first seed of dpo, else of the first method that has an adapter.
        """
        from alignlens import models

        patterns = [Variant(variant.family, m, self.seeds_of(variant.family, m)[0]) for m in self.methods]
        patterns.sort(key=lambda v: v.method != "dpo")
        found = next((s for s in map(self.source, patterns) if s.adapter), None)
        if found is None:
            raise AlignError(
                f"a random direction for {variant.family} needs a variant with a LoRA adapter as its pattern: "
                "merged checkpoints have none"
            )
        return self.store.get(
            "random",
            variant.label,
            lambda folder: models.random_adapter(found.adapter, folder, seed=variant.seed),
            inputs={"pattern": found.key},
            parameters={"seed": variant.seed},
            version=VERSIONS["random"],
        )

    def dictionary_layers(self, family: str) -> list[int]:
        """The layers at which dictionaries of a family are trained and read, the same for all its models."""
        from alignlens import models

        if self.preset.dictionary_layers != "spread":
            return sorted(self.preset.dictionary_layers)
        depth = models.describe(self.source(Variant(family, "base")).model)["layers"]
        return sorted({int(depth * share) for share in (0.25, 0.5, 0.75)})

    def crosscoder_layer(self, family: str) -> int:
        """The middle one of the dictionary layers."""
        layers = self.dictionary_layers(family)
        return layers[len(layers) // 2]

    def tokens(self, variant: Variant, split: str = "measure", *, layers=None, limit: int | None = None, keep=True):
        """Residual streams at every response token, ``activations.Tokens``, memory-mapped from the store.

        split : "measure" (the family's measured pairs) or "train" (all other pairs: what dictionaries are trained on).
        keep : False reads them into memory and stores nothing, for what is looked at once.
        """
        from alignlens import activations

        p = self.preset
        layers = layers or self.dictionary_layers(variant.family)
        pairs = self.measured(variant.family) if split == "measure" else self._dictionary_pairs

        def read(folder: Path | None):
            model, tokenizer = self.load(variant)
            return activations.read_tokens(
                model, tokenizer, pairs, layers=layers, limit=limit, folder=folder, batch_size=p.read_batch,
                formatter=self.format(variant.family), own=True,
            )  # fmt: skip

        def make(folder: Path) -> dict:
            return {"tokens": len(read(folder).row), "split": split}

        if not keep:
            return read(None)

        made = self.store.get(
            "tokens",
            f"{variant.label}-{split}",
            make,
            inputs={"model": self.source(variant).key, "pairs": content_hash(pairs[["prompt", "chosen", "rejected"]])},
            parameters={"layers": layers, "limit": limit, "max_length": p.max_length},
            version=VERSIONS["tokens"],
        )
        return activations.Tokens.load(made.path)

    @cached_property
    def _dictionary_pairs(self) -> pd.DataFrame:
        return self.pairs[self.pairs.split != "measure"].reset_index(drop=True)

    @cached_property
    def _dictionary_pairs_key(self) -> str:
        return content_hash(self._dictionary_pairs[["prompt", "chosen", "rejected"]])

    def sae(self, family: str, layer: int, seed: int = 0) -> Artifact:
        """One sparse autoencoder for the base and all variants of a family, pooled: latent i is the same in all."""
        models = self.variants(family)
        limit = POOLED * self.preset.dictionary_tokens // len(models)
        layers = self.dictionary_layers(family)

        def streams() -> dict[str, np.ndarray]:
            parts = [self._kept(self.tokens(m, "train", layers=layers, limit=limit), layer) for m in models]
            return {"pooled": np.concatenate([x[keep] for x, keep in parts])}, _masked([keep for _, keep in parts])

        return self._dictionary(f"{family}-pooled-layer{layer}", models, [layer], streams, limit, seed)

    def crosscoder(self, first: Variant, second: Variant, *, window: bool = False, seed: int = 0) -> Artifact:
        """A crosscoder of two models of a family, streams base and aligned, at the middle layer or over all layers."""
        layers = self.dictionary_layers(first.family)
        layers = layers if window else [self.crosscoder_layer(first.family)]

        def streams() -> dict[str, np.ndarray]:
            limit = self.preset.dictionary_tokens
            read = [self.tokens(m, "train", layers=layers, limit=limit) for m in (first, second)]
            parts = [self._kept(t, None if window else layers[0]) for t in read]
            keep = parts[0][1] & parts[1][1]
            return {"base": parts[0][0][keep], "aligned": parts[1][0][keep]}, _masked([keep])

        label = f"{first.label}-vs-{second.label}{'-window' if window else ''}"
        return self._dictionary(label, [first, second], layers, streams, self.preset.dictionary_tokens, seed)

    def _kept(self, tokens, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(streams at a layer, or at all for None; which tokens no high norm spoils). Special tokens are no
        responses.
        """
        from alignlens import activations

        x = tokens.streams if layer is None else tokens.at(layer)
        return x, ~activations.high_norm(x)

    def _dictionary(self, label: str, models: list[Variant], layers, streams, limit: int, seed: int) -> Artifact:
        from alignlens import activations, dictionaries

        p = self.preset
        config = dictionaries.Config(width=p.dictionary_width, k=p.dictionary_k, epochs=p.dictionary_epochs, seed=seed)
        hooks = [activations.hook_name(layer) for layer in layers]
        facts = {"hooks": hooks, "models": [self.source(m).key for m in models]}
        identity = {
            "inputs": {"pairs": self._dictionary_pairs_key, "models": content_hash(facts["models"])},
            "parameters": {"config": dataclasses.asdict(config), "layers": layers, "limit": limit, "seed": seed},
            "version": VERSIONS["dictionary"],
        }

        def make(folder: Path) -> dict:
            rows, masked = streams()
            checkpoint = self.store.root / ".locks" / f"{Store.key('dictionary', **identity)}.training"
            found = dictionaries.train(rows, config, facts=facts, device=self.device, checkpoint=checkpoint)
            found.save(folder, half=True)
            return {"tokens": len(next(iter(rows.values()))), "masked": masked, **found.history.iloc[-1].to_dict()}

        return self.store.get("dictionary", label if seed == 0 else f"{label}-seed{seed}", make, **identity)

    def read_dictionary(self, artifact: Artifact, layers: list[int]):
        """The dictionary of an artifact; DictionaryError if it was trained at other layers."""
        from alignlens import activations, dictionaries

        expect = {"hooks": [activations.hook_name(layer) for layer in layers]}
        return dictionaries.Dictionary.load(artifact.path, expect=expect)

    def latents(self, variant: Variant) -> Artifact:
        """What the family's pooled dictionaries read in one model on the measured pairs.

        Tables, all with a column layer: ``usage``, ``quality``; of a variant also ``change`` and ``anchors`` against
        its base, of a base ``factors`` and ``factor_null`` (tiny world). See the module ``latents``.
        """
        layers, base = self.dictionary_layers(variant.family), Variant(variant.family, "base")
        saes = {layer: self.sae(variant.family, layer) for layer in layers}

        def make(folder: Path) -> dict:
            shown = variant.seed == self.seeds_of(variant.family, variant.method)[0]  # others are read once only
            own, reference = self.tokens(variant, keep=shown), self.tokens(base)
            parts = [
                self._latent_tables(variant, layer, saes[layer], own, reference, spliced=shown) for layer in layers
            ]
            for name in parts[0]:
                table = pd.concat([part[name].assign(layer=layer) for part, layer in zip(parts, layers, strict=True)])
                store.write_table(folder / f"{name}.parquet", table)
            return {}

        return self.store.get(
            "latents",
            variant.label,
            make,
            inputs={"model": self.source(variant).key, "pairs": self._measured_key(variant.family)}
            | {f"sae {layer}": artifact.key for layer, artifact in saes.items()},
            parameters={"max_length": self.preset.max_length},
            version=VERSIONS["latents"],
        )

    def _latent_tables(self, variant, layer, sae, own, reference, *, spliced: bool) -> dict[str, pd.DataFrame]:
        from alignlens import dictionaries
        from alignlens.dictionaries import latents

        found = self.read_dictionary(sae, [layer])
        streams = {"pooled": own.at(layer)}
        codes = found.codes(streams)
        quality = dictionaries.evaluate(found, streams)
        if spliced:
            quality |= self._spliced(variant, layer, found, own)
        tables = {"usage": latents.usage(codes, own), "quality": pd.DataFrame([quality])}
        if variant.method != "base":
            before = found.codes({"pooled": reference.at(layer)})
            tables |= {"change": latents.change(before, codes, own), "anchors": latents.anchors(before, codes, own)}
        elif self.tiny_world:
            factors = tinyworld.factor_columns(self.measured(variant.family))[own.kept].reset_index(drop=True)
            tables["factors"], tables["factor_null"] = latents.factor_auroc(codes, own, factors)
        return tables

    def _spliced(self, variant: Variant, layer: int, dictionary, tokens) -> dict[str, float]:
        """Cross-entropy of the first measured pairs with the stream replaced: clean, by the dictionary, by its mean."""
        import torch

        from alignlens import activations

        model, _ = self.load(variant)
        mean = torch.from_numpy(np.asarray(tokens.at(layer), np.float32).mean(0))

        def rebuilt(streams):
            x = streams["model"]
            return {
                "model": torch.from_numpy(dictionary.reconstruct({"pooled": x.cpu().numpy()})["pooled"]).to(x.device)
            }

        table = activations.spliced_loss(
            {"model": activations.bridge(model, own=True)},
            self.format(variant.family),
            self.measured(variant.family).head(SPLICED_PAIRS),
            layer,
            {
                "clean": None,
                "dictionary": rebuilt,
                "mean": lambda s: {"model": mean.to(s["model"]).expand_as(s["model"])},
            },
            batch_size=self.preset.read_batch,
        )
        loss = table.assign(total=table.loss * table.tokens).groupby("replacement")[["total", "tokens"]].sum()
        loss = loss.total / loss.tokens
        recovered = (loss["mean"] - loss["dictionary"]) / max(loss["mean"] - loss["clean"], 1e-9)
        return {
            "loss_clean": loss["clean"],
            "loss_increase": loss["dictionary"] - loss["clean"],
            "recovered": recovered,
        }

    def comparisons(self, family: str) -> list[tuple[str, Variant, Variant]]:
        """What crosscoders compare: (name, first, second) of every method's first seed and of the nulls.

        Nulls: "self" (the base with itself), "seeds" (two seeds of one method), "random" (a random direction).
        """
        base = Variant(family, "base")
        out = [(m, base, Variant(family, m, self.seeds_of(family, m)[0])) for m in self.methods]
        out.append(("self", base, base))
        several = [m for m in self.methods if len(self.seeds_of(family, m)) > 1]
        if several:
            method = "dpo" if "dpo" in several else several[0]
            out.append(("seeds", *[Variant(family, method, s) for s in self.seeds_of(family, method)[:2]]))
        if any(self.source(second).adapter for _, _, second in out):
            out.append(("random", base, Variant(family, "random")))
        return out

    def published_crosscoder(self, first: Variant, second: Variant) -> Artifact:
        """The published study's crosscoder of two models, at the middle layer: its tables only.

        Trained, as published, on one vector a prompt (its last token). Tables: ``classes`` (``sparc.classify``),
        history, ``lasso_*`` and ``geometry_*``, each published and corrected; ``facts.json``: quality, sharing ratio,
        thresholds.
        """
        from alignlens import activations
        from alignlens.published import sparc

        layer, p = self.crosscoder_layer(first.family), self.preset
        pairs = self._dictionary_pairs.drop_duplicates("prompt_id").head(p.published_pairs).reset_index(drop=True)
        config = sparc.Config(topk=min(sparc.Config().topk, 4 * self.width(first.family)))

        def make(folder: Path) -> dict:
            streams = {}
            for name, variant in zip(sparc.STREAMS, (first, second), strict=True):
                model, tokenizer = self.load(variant)
                streams[name] = activations.read(
                    model, tokenizer, pairs, layers=[layer], position="prompt", batch_size=p.read_batch,
                    formatter=self.format(variant.family), own=True,
                ).chosen[:, 0]  # fmt: skip
            found = sparc.train(streams, config, device=self.device)
            table = sparc.classify(found, streams)
            tables = {"classes": table, "history": found.history}
            for name, corrected in (("published", False), ("corrected", True)):
                tables[f"lasso_{name}"] = sparc.superposition(
                    found, table, corrected=corrected, max_latents=16, draws=20
                )
                tables[f"geometry_{name}"] = sparc.shared_geometry(found, table, corrected=corrected, permutations=10)
            for name, part in tables.items():
                store.write_table(folder / f"{name}.parquet", part)
            facts = {"quality": sparc.quality(found, streams), "sharing": sparc.feature_sharing_ratio(table)}
            store.write_json(folder / "facts.json", facts | {"thresholds": table.attrs["thresholds"]})
            return {}

        return self.store.get(
            "published_crosscoder",
            f"{first.label}-vs-{second.label}",
            make,
            inputs={
                "first": self.source(first).key,
                "second": self.source(second).key,
                "pairs": content_hash(pairs[["prompt", "chosen", "rejected"]]),
            },
            parameters={"config": dataclasses.asdict(config), "layer": layer, "max_length": p.max_length},
            version=VERSIONS["published_crosscoder"],
        )

    def published_sae(self, variant: Variant) -> Artifact:
        """The published study's autoencoder of one model at that model's own best layer: quality and usage only.

        Width 8 x d, k and steps in the published proportions to d and to the width.
        """
        from alignlens import dictionaries
        from alignlens.dictionaries import latents

        p, d = self.preset, self.width(variant.family)
        probes = self.probes(variant).table("published.parquet")
        layer = int(probes.layer[probes.auroc.idxmax()])
        config = dictionaries.published(d, width=8 * d, k=max(2, round(64 * d / 2048)), batch_size=64, epochs=2)

        def make(folder: Path) -> dict:
            train = self.tokens(variant, "train", layers=[layer], limit=p.dictionary_tokens)
            held_out = self.tokens(variant, layers=[layer])
            found = dictionaries.train({"pooled": train.at(layer)}, config, device=self.device)
            streams = {"pooled": held_out.at(layer)}
            store.write_table(folder / "usage.parquet", latents.usage(found.codes(streams), held_out))
            store.write_table(folder / "history.parquet", found.history)
            quality = dictionaries.evaluate(found, streams)
            store.write_json(folder / "quality.json", quality | {"layer": layer})
            return {}

        pairs = [self._dictionary_pairs, self.measured(variant.family)]
        return self.store.get(
            "published_sae",
            variant.label,
            make,
            inputs={
                "model": self.source(variant).key,
                "pairs": content_hash([content_hash(t[["prompt", "chosen", "rejected"]]) for t in pairs]),
            },
            parameters={"config": dataclasses.asdict(config), "layer": layer, "limit": p.dictionary_tokens},
            version=VERSIONS["published_sae"],
        )

    def calibrations(self) -> list[tuple[str, str, int, int]]:
        """What ``calibration`` is asked for: (regime, instrument, seed, samples) of the comparison and of the curve."""
        p = self.preset
        out = [
            (regime, instrument, seed, p.calibration_samples)
            for regime in p.calibration_regimes
            for instrument in ("alignlens", "l1", "published")
            for seed in range(p.calibration_seeds)
        ]
        fewer = [p.calibration_samples // share for share in (8, 4, 2)]
        return out + [(r, "alignlens", s, n) for r in p.calibration_regimes for n in fewer for s in (0, 1)]

    def calibration(self, regime: str, instrument: str, seed: int, samples: int) -> Artifact:
        """Labels against planted truth, ``score.parquet`` of ``calibration.run``; independent of the study's models."""
        # One pass of 200,000 rows in batches of 32 is about as many steps as the published crosscoder was trained for.
        epochs = {"alignlens": 8, "l1": 4, "published": 1}[instrument]
        from alignlens import calibration

        parameters = {"regime": regime, "instrument": instrument, "seed": seed, "samples": samples, "epochs": epochs}

        def make(folder: Path) -> dict:
            table = calibration.run(regime, seed, instrument, samples=samples, epochs=epochs)
            store.write_table(folder / "score.parquet", table)
            return {}

        return self.store.get(
            "calibration", f"{regime}-{instrument}-{samples}-seed{seed}", make,
            inputs={}, parameters=parameters, version=VERSIONS["calibration"],
        )  # fmt: skip

    def _dictionary_plan(self) -> list[list[tuple[str, str, tuple]]]:
        """Everything that dictionaries need trained: random directions first, then all that is independent."""
        plan = [[], []]
        for family in self.families:
            found = self.comparisons(family)
            plan[0] += [("random direction", "random_direction", (v,)) for _, _, v in found if v.method == "random"]
            plan[1] += [("autoencoder", "sae", (family, layer)) for layer in self.dictionary_layers(family)]
            plan[1].append(("autoencoder", "sae", (family, self.crosscoder_layer(family), 1)))
            plan[1] += [("crosscoder", "crosscoder", pair) for _, *pair in found]
            plan[1].append(("window", "window", (family,)))
            plan[1] += [("published crosscoder", "published_crosscoder", pair) for _, *pair in found]
            own = [Variant(family, m, self.seeds_of(family, m)[0]) for m in ["base", *self.methods]]
            plan[1] += [("published autoencoder", "published_sae", (v,)) for v in own]
        return plan

    def window(self, family: str) -> Artifact:
        """The multi-layer crosscoder of a family: its base and the first seed of its first method (dpo, if there)."""
        _, first, second = min(self.comparisons(family), key=lambda c: c[0] != "dpo")
        return self.crosscoder(first, second, window=True)


def _masked(kept: list[np.ndarray]) -> float:
    """Share of tokens left out."""
    return float(1 - np.concatenate(kept).mean())
