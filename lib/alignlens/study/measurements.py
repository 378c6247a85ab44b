"""What a study measures of one model, or of a model against its base: behaviour, streams, probes, geometry, causes.

``Measurements`` is the part of ``study.Study`` that holds these stages; each gets its models from the rest of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from alignlens.core import store
from alignlens.core.store import Artifact, content_hash
from alignlens.preferences import tinyworld
from alignlens.study.stages import VERSIONS, Variant


class Measurements:
    """Measurements on a family's measured pairs: stages of a ``study.Study``, to be asked for there."""

    def activations(self, variant: Variant):
        """Residual streams of the family's measured pairs: ``activations.Activations``."""
        return self.read(variant, self.measured(variant.family), "measured")

    def read(self, variant: Variant, pairs: pd.DataFrame, what: str):
        """Residual streams of any pairs; ``what`` names them in the store."""
        from alignlens import activations

        p = self.preset
        layers = p.layers_measured if p.layers_measured == "all" else list(p.layers_measured)

        def make(folder: Path) -> dict:
            model, tokenizer = self.load(variant)
            found = activations.read(
                model, tokenizer, pairs, layers=layers, position=p.position, batch_size=p.read_batch,
                formatter=self.format(variant.family), own=True,
            )  # fmt: skip
            found.save(folder)
            return {"pairs": len(found.prompt_id), "what": what}

        made = self.store.get(
            "activations",
            f"{variant.label}-{what}",
            make,
            inputs={"model": self.source(variant).key, "pairs": content_hash(pairs[["prompt", "chosen", "rejected"]])},
            parameters={"position": p.position, "layers": layers, "max_length": p.max_length},
            version=VERSIONS["activations"],
        )
        return activations.Activations.load(made.path)

    def judge(self, family: str):
        """Who scores samples: the tiny world's true utility, else the family's reward model (seed 0).

        Where variants are trained against reward models, tiny-world samples also get that model's ``reward``.
        """
        from alignlens import behavior

        reward = self._reward_function(family) if self.needs_reward_model else None
        if not self.tiny_world:
            return behavior.Judge("reward model", lambda p, r: pd.DataFrame({"score": reward(p, r)}))

        def score(prompts, responses):
            table = tinyworld.score(prompts, responses).rename(columns={"utility": "score"})
            return table.assign(reward=reward(prompts, responses)) if reward else table

        return behavior.Judge("true utility", score)

    def _reward_function(self, family: str):
        from alignlens import models

        base = self.source(Variant(family, "base")).model
        reward = models.load_reward(base, self.reward_model(family).path, device=self.device)
        format = self.format(family)

        def rewards(prompts, responses):
            ids = [format.encode(p, r or " ") for p, r in zip(prompts, responses, strict=True)]
            return models.rewards(reward, [p for p, _ in ids], [r for _, r in ids], pad_id=format.pad_id)

        return rewards

    def behavior(self, variant: Variant) -> pd.DataFrame:
        """Log-probabilities and samples of one model on the measured pairs, one row a pair."""
        from alignlens import behavior

        p = self.preset
        pairs = self.measured(variant.family)
        judged = self.tiny_world or self.needs_reward_model

        def make(folder: Path) -> dict:
            model, _ = self.load(variant)
            # A merged model samples about twice as fast as one with its adapter beside it, so the base is loaded too.
            reference = self.load(Variant(variant.family, "base"))[0] if variant.method != "base" else None
            table = behavior.measure(
                model, self.format(variant.family), pairs, self.judge(variant.family) if judged else None,
                reference=reference, sampled=p.sampled, response_tokens=p.response_tokens,
                seed=variant.seed, batch_size=p.read_batch,
            )  # fmt: skip
            store.write_table(folder / "behavior.parquet", table)
            return {}

        inputs = {"model": self.source(variant).key, "pairs": self._measured_key(variant.family)}
        if self.needs_reward_model:
            inputs["judge"] = self._reward_key(variant.family, 0)
        parameters = {"sampled": p.sampled, "tokens": p.response_tokens, "seed": variant.seed, "max": p.max_length}
        made = self.store.get(
            "behavior", variant.label, make, inputs=inputs, parameters=parameters, version=VERSIONS["behavior"]
        )
        return made.table("behavior.parquet")

    def probes(self, variant: Variant) -> Artifact:
        """All probe tables of one model.

        Tables: ``grouped``, ``published`` (``probes.fit_layers`` under each protocol); for a base ``null_grouped`` and
        ``null_published`` (permuted signs), for a variant ``transfer`` against its base. ``scores.safetensors`` holds
        out-of-fold scores, labels, folds and pairs of both protocols.
        """
        from alignlens import probes

        p = self.preset
        base = Variant(variant.family, "base") if variant.method != "base" else None

        def make(folder: Path) -> dict:
            own = self.activations(variant)
            sides = (own.chosen, own.rejected, own.prompt_id)
            draws = {"folds": p.folds, "bootstrap": p.bootstrap}
            tables = {
                "grouped": probes.fit_layers(*sides, protocol="grouped", **draws),
                "published": probes.fit_layers(*sides, protocol="published", **draws),
            }
            if base is None:
                for protocol in ("grouped", "published"):
                    null = probes.permuted_sign_null(
                        *sides, protocol=protocol, folds=p.folds, permutations=p.permutations
                    )
                    tables[f"null_{protocol}"] = null.assign(layer=own.layers)
            else:
                tables["transfer"] = probes.transfer(self.activations(base), own, own.prompt_id, **draws)
            for name, table in tables.items():
                store.write_table(folder / f"{name}.parquet", table.assign(layer=own.layers))
            arrays = {}
            for protocol in ("grouped", "published"):
                out = probes.out_of_fold(*sides, protocol=protocol, folds=p.folds)
                for name in ("scores", "labels", "fold_ids", "pair_ids"):
                    arrays[f"{protocol}.{name}"] = np.ascontiguousarray(getattr(out, name))
            store.write_arrays(folder / "scores.safetensors", arrays)
            return {}

        inputs = {"activations": self._activations_key(variant)}
        if base is not None:
            inputs["base"] = self._activations_key(base)
        parameters = {"folds": p.folds, "bootstrap": p.bootstrap}
        if base is None:
            parameters["permutations"] = p.permutations
        return self.store.get(
            "probes", variant.label, make, inputs=inputs, parameters=parameters, version=VERSIONS["probes"]
        )

    def _activations_key(self, variant: Variant) -> str:
        p = self.preset
        pairs = self._measured_key(variant.family)
        return content_hash([self.source(variant).key, pairs, p.position, list(p.layers_measured)])

    # --- geometry and dose ------------------------------------------------------------------------------------------

    def geometry_comparisons(self, family: str) -> list[tuple[str, Variant, Variant]]:
        """What geometry compares: (name, first, second) of all variants and of the nulls "seeds" and "random"."""
        base = Variant(family, "base")
        out = [(v.method, base, v) for v in self.variants(family, base=False)]
        for name, first, second in self.comparisons(family):
            if name == "seeds":
                out.append((name, first, second))
            elif name == "random":
                out += [(name, base, Variant(family, "random", draw)) for draw in range(self.preset.null_draws)]
        return out

    def geometry(self, first: Variant, second: Variant) -> Artifact:
        """Two models of a family on the measured pairs, one row a layer.

        Tables: ``geometry`` (``geometry.compare_layers``) and ``decomposition`` (``geometry.decompose``).
        """
        p = self.preset

        def make(folder: Path) -> dict:
            tables = self._geometry_tables(self.activations(first), self.activations(second))
            for name, table in tables.items():
                store.write_table(folder / f"{name}.parquet", table)
            return {}

        return self.store.get(
            "geometry", f"{first.label}-vs-{second.label}", make,
            inputs={"first": self._activations_key(first), "second": self._activations_key(second)},
            parameters={"folds": p.folds, "bootstrap": p.bootstrap}, version=VERSIONS["geometry"],
        )  # fmt: skip

    def _geometry_tables(self, first, second) -> dict[str, pd.DataFrame]:
        from alignlens import geometry

        groups, draws = first.prompt_id, {"folds": self.preset.folds, "bootstrap": self.preset.bootstrap}
        tables = {
            "geometry": geometry.compare_layers(first, second, groups),
            "decomposition": geometry.decompose(first, second, groups, **draws),
        }
        return {name: table.assign(layer=first.layers) for name, table in tables.items()}

    def dose(self, variant: Variant) -> Artifact:
        """A variant part of the way from its base: weights base + share × (variant - base), for each ``dose_shares``.

        Tables, all with a column share: ``behavior`` (``behavior.compare``), ``geometry``, ``decomposition``.
        """
        from alignlens import activations, behavior, models

        p, base = self.preset, Variant(variant.family, "base")
        pairs, format = self.measured(variant.family), self.format(variant.family)
        judge = self.judge(variant.family) if self.tiny_world or self.needs_reward_model else None

        def at(share: float) -> dict[str, pd.DataFrame]:
            reference, model = self.load(base)[0], self.load(variant)[0]
            models.interpolate(reference, model, share)
            table = behavior.measure(
                model, format, pairs, judge, reference=reference, sampled=p.sampled,
                response_tokens=p.response_tokens, seed=variant.seed, batch_size=p.read_batch,
            )  # fmt: skip
            before = self.activations(base)
            after = activations.read(
                model, None, pairs, layers=before.layers, position=p.position, batch_size=p.read_batch,
                formatter=format, own=True,
            )  # fmt: skip
            tables = {"behavior": behavior.compare([table], self.behavior(base), bootstrap=p.bootstrap)}
            tables |= self._geometry_tables(before, after)
            return {name: table.assign(share=share) for name, table in tables.items()}

        def make(folder: Path) -> dict:
            parts = [at(share) for share in p.dose_shares]
            for name in parts[0]:
                store.write_table(folder / f"{name}.parquet", pd.concat([part[name] for part in parts]))
            return {}

        inputs = {"model": self.source(variant).key, "base": self._activations_key(base)}
        if self.needs_reward_model:
            inputs["judge"] = self._reward_key(variant.family, 0)
        parameters = {"shares": list(p.dose_shares), "folds": p.folds, "bootstrap": p.bootstrap, "seed": variant.seed}
        parameters |= {"sampled": p.sampled, "tokens": p.response_tokens, "max_length": p.max_length}
        return self.store.get(
            "dose", variant.label, make, inputs=inputs, parameters=parameters, version=VERSIONS["dose"]
        )

    # --- causes -----------------------------------------------------------------------------------------------------

    def causal(self, variant: Variant) -> Artifact:
        """Interventions on one model at the middle dictionary layer, and activation patching against its base.

        Directions and latents are found on one half of the measured prompts (latents: by the change tables, which read
        all), effects are measured on ``causal_pairs`` pairs of the other half. Tables: ``interventions``
        (``causal.steer``, ``ablate``, ``ablate_latents``) and, of a variant, ``patching`` (``causal.patch`` both ways,
        column into: the model that gets the other's stream).
        """
        from alignlens import activations, causal

        p, base = self.preset, Variant(variant.family, "base")
        layer, format = self.crosscoder_layer(variant.family), self.format(variant.family)
        sae = self.sae(variant.family, layer)

        def make(folder: Path) -> dict:
            pairs, fitted = self._causal_halves(variant.family)
            said = self.behavior(base).set_index("row").loc[pairs.index]
            bridged = activations.bridge(self.load(variant)[0], own=True)
            options = {
                "layer": layer, "random": p.random_directions, "batch_size": p.read_batch, "bootstrap": p.bootstrap,
                "reference": (said.chosen_logprob - said.rejected_logprob).to_numpy(),
            }  # fmt: skip
            directions = self._directions(variant, layer, fitted)
            found = self.read_dictionary(sae, [layer])
            told = self._told_latents(variant, layer)
            written = {f"latent {i}": found.decoder[i] for i in told}
            inputs = (bridged, format, pairs)
            tables = [
                causal.steer(*inputs, directions | written, strength=p.steer_strengths, **options),
                causal.ablate(*inputs, directions, **options),
            ]
            if told:
                removed = causal.ablate_latents(*inputs, found, told, **options)
                tables.append(removed.assign(name="latent " + removed["name"]))
            if self.tiny_world or self.needs_reward_model:
                tables.append(self._sampled_steering(variant.family, inputs, directions, options))
            store.write_table(folder / "interventions.parquet", pd.concat(tables, ignore_index=True))
            if variant != base:
                other = activations.bridge(self.load(base)[0], own=True)
                ways = {"variant": (other, bridged), "base": (bridged, other)}
                options = {"batch_size": p.read_batch, "bootstrap": p.bootstrap}
                parts = [causal.patch(*models, format, pairs, **options).assign(into=i) for i, models in ways.items()]
                store.write_table(folder / "patching.parquet", pd.concat(parts, ignore_index=True))
            return {}

        inputs = {"activations": self._activations_key(variant), "base": self._activations_key(base), "sae": sae.key}
        names = ("causal_pairs", "random_directions", "steer_strengths", "bootstrap", "sampled", "response_tokens")
        return self.store.get(
            "causal", variant.label, make, inputs=inputs, parameters={n: _listed(getattr(p, n)) for n in names},
            version=VERSIONS["causal"],
        )  # fmt: skip

    def _causal_halves(self, family: str) -> tuple[pd.DataFrame, np.ndarray]:
        """The pairs that effects are measured on, index their row in ``measured``; which rows directions may see."""
        pairs = self.measured(family)
        half = pd.factorize(pairs.prompt_id)[0] % 2 == 0
        return pairs[~half].head(self.preset.causal_pairs), half

    def _directions(self, variant: Variant, layer: int, fitted: np.ndarray) -> dict[str, np.ndarray]:
        """The preference direction, twice, and a variant's mean shift from its base."""
        from alignlens import probes

        own = self.activations(variant)
        chosen, rejected = (x[fitted] for x in own.at(layer))
        fit = probes.out_of_fold(
            chosen[:, None], rejected[:, None], own.prompt_id[fitted], folds=self.preset.folds
        )  # fmt: skip
        directions = {"preference (mean)": (chosen - rejected).mean(0), "preference (probe)": fit.directions[0].mean(0)}
        if variant.method != "base":
            before, after = (self.tokens(v) for v in (Variant(variant.family, "base"), variant))
            rows = fitted[before.row]  # measured pairs all fit, so a kept pair's number is its row
            shift = after.at(layer)[rows].astype(np.float32) - before.at(layer)[rows].astype(np.float32)
            directions["shift from base"] = shift.mean(0)
        return directions

    def _told_latents(self, variant: Variant, layer: int, count: int = 2) -> list[int]:
        """Latents to test: of a base the clearest preference effects, of a variant the clearest changes of it."""
        name, column = ("usage", "effect") if variant.method == "base" else ("change", "effect_change")
        table = self.latents(variant).table(f"{name}.parquet").query("layer == @layer")
        error = ((table[f"{column}_high"] - table[f"{column}_low"]) / 3.92).clip(lower=1e-9)
        used = self.latents(Variant(variant.family, "base")).table("usage.parquet").query("layer == @layer")
        often = table.latent.map(used.set_index("latent").density) > 1e-3
        return table.assign(strength=table[column].abs() / error)[often].nlargest(count, "strength").latent.tolist()

    def _sampled_steering(self, family, inputs, directions, options) -> pd.DataFrame:
        """What the strongest steering does to samples: KL, length and the judge's score."""
        from alignlens import causal

        p, score = self.preset, self.judge(family).score
        table = causal.steer(
            *inputs, directions, strength=max(p.steer_strengths), sampled=min(p.sampled, len(inputs[2])),
            judge=lambda prompts, responses: score(prompts, responses).score.to_numpy(),
            response_tokens=p.response_tokens, **options,
        )  # fmt: skip
        return table[table.measure.isin(["kl", "length", "reward"])].assign(intervention="steer samples")


def _listed(value):
    return list(value) if isinstance(value, tuple) else value
