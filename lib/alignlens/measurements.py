"""What a study measures of one model, or of a model against its base: behaviour, streams, probes, geometry, causes.

``Measurements`` is the part of ``study.Study`` that holds these stages; each gets its models from the rest of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from . import store, tinyworld
from .stages import VERSIONS, Variant
from .store import Artifact, content_hash


class Measurements:
    """Measurements on a family's measured pairs: stages of a ``study.Study``, to be asked for there."""

    def activations(self, variant: Variant):
        """Residual streams of the family's measured pairs: ``activations.Activations``."""
        return self.read(variant, self.measured(variant.family), "measured")

    def read(self, variant: Variant, pairs: pd.DataFrame, what: str):
        """Residual streams of any pairs; ``what`` names them in the store."""
        from . import activations

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
        from . import behavior

        reward = self._reward_function(family) if self.needs_reward_model else None
        if not self.tiny_world:
            return behavior.Judge("reward model", lambda p, r: pd.DataFrame({"score": reward(p, r)}))

        def score(prompts, responses):
            table = tinyworld.score(prompts, responses).rename(columns={"utility": "score"})
            return table.assign(reward=reward(prompts, responses)) if reward else table

        return behavior.Judge("true utility", score)

    def _reward_function(self, family: str):
        from . import models

        base = self.source(Variant(family, "base")).model
        reward = models.load_reward(base, self.reward_model(family).path, device=self.device)
        format = self.format(family)

        def rewards(prompts, responses):
            ids = [format.encode(p, r or " ") for p, r in zip(prompts, responses, strict=True)]
            return models.rewards(reward, [p for p, _ in ids], [r for _, r in ids], pad_id=format.pad_id)

        return rewards

    def behavior(self, variant: Variant) -> pd.DataFrame:
        """Log-probabilities and samples of one model on the measured pairs, one row a pair."""
        from . import behavior

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
        from . import probes

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
