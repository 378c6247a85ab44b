"""Alignment: six methods and two controls from one parent, one data set, one format and one LoRA shape, on TRL.

Every trainer gets token ids that ``preferences.Formatter`` made: TRL's own formatting differs between trainers (BOS,
EOS, templates), and a difference in format would look like a difference between methods. The reference model is always
the parent with the adapter switched off.

A run ends at its last step, or once its *dose* (mean KL per response to the base, on held-out prompts) reaches the
target, whichever the recipe says. Checked every few steps: dose, response length, and held-out log-probabilities of
chosen and rejected answers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from alignlens import models
from alignlens.core.errors import AlignError
from alignlens.preferences import Formatter

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

METHODS = ("ppo", "dpo", "simpo", "orpo", "grpo", "kto")
CONTROLS = ("sft", "shuffled")
ONLINE = ("ppo", "grpo")  # those that sample and need a reward

# The attention projections that carry the adapter: the first set that a model has.
TARGETS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Qwen, SmolLM, Mistral, Gemma
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, GPT-Neo
    ("qkv_proj", "o_proj"),  # Phi-3
    ("query_key_value", "dense"),  # GPT-NeoX, Falcon, Bloom
    ("c_attn",),  # GPT-2, whose output projection shares its name with one of the feed-forward block
)

# What arXiv 2606.09850 trained with. It has no ORPO recipe in any file, so there is none here either.
PUBLISHED = {
    "dpo": {"learning_rate": 5e-7, "batch_size": 32, "max_length": 512, "options": {"beta": 0.1}},
    "kto": {"learning_rate": 5e-7, "batch_size": 32, "max_length": 512, "options": {"beta": 0.1}},
    "simpo": {
        "learning_rate": 5e-7,
        "batch_size": 32,
        "max_length": 1024,
        "options": {"beta": 2.0, "simpo_gamma": 1.0, "warmup_steps": 0.03, "max_grad_norm": 1.0},
    },
    "grpo": {
        "learning_rate": 1e-6,
        "batch_size": 32,
        "response_tokens": 256,
        "options": {
            "beta": 0.0, "num_generations": 4, "temperature": 0.8, "top_p": 0.9, "loss_type": "dr_grpo",
            "scale_rewards": "none",
        },
    },
    "ppo": {
        "learning_rate": 3e-6,
        "batch_size": 8,
        "response_tokens": 53,
        "options": {"kl_coef": 0.05, "num_ppo_epochs": 1, "missing_eos_penalty": 1.0},
    },
}  # fmt: skip

DEFAULTS = {
    "ppo": {"kl_coef": 0.02, "num_ppo_epochs": 2, "missing_eos_penalty": 1.0},
    "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0},
    "orpo": {"beta": 1.0},
    "grpo": {"beta": 0.0, "num_generations": 8},
    "kto": {"beta": 0.1},
    "sft": {},
    "shuffled": {"beta": 0.1},
}


@dataclass(frozen=True)
class Recipe:
    """All that a training run depends on besides its base, its pairs and its reward.

    learning_rate : of the adapter, constant after the warm-up.
    steps : optimiser steps at most. batch_size : pairs a step; for ppo and grpo, sampled responses a step.
    micro_batch_size : rows in memory at once (None: the whole batch).
    max_length : tokens of prompt and response; longer pairs are left out and counted, never cut.
    response_tokens : longest sampled response.
    stop : "dose" ends at ``dose`` nats of mean KL per response (between two checks, weights are interpolated to land
        on it), "last" at the last step.
    check_every, check_prompts : how often, and on how many held-out prompts, dose and curves are measured.
    options : arguments of the method's TRL config (``DEFAULTS`` lists ours).
    """

    method: str
    learning_rate: float
    steps: int
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_length: int = 512
    response_tokens: int = 64
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    stop: str = "dose"
    dose: float = 2.0
    check_every: int = 5
    check_prompts: int = 64
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in (*METHODS, *CONTROLS, "reward"):
            raise AlignError(f"method {self.method!r} is unknown; choose from {', '.join((*METHODS, *CONTROLS))}")
        if self.stop not in ("dose", "last"):
            raise AlignError(f"{self.method}: stop is {self.stop!r}; choose 'dose' or 'last'")
        if self.steps < 1 or self.learning_rate <= 0:
            raise AlignError(
                f"{self.method}: steps {self.steps} and learning_rate {self.learning_rate} must be positive"
            )
        least = 2 if self.method == "kto" else 1
        micro = self.batch_size if self.micro_batch_size is None else self.micro_batch_size
        if micro < least or self.batch_size % micro:
            raise AlignError(
                f"{self.method}: batch_size {self.batch_size} must be a multiple of micro_batch_size {micro}, "
                f"and that at least {least}"
            )
        if self.dose <= 0 or min(self.check_every, self.check_prompts, self.response_tokens, self.lora_rank) < 1:
            raise AlignError(
                f"{self.method}: dose {self.dose}, check_every {self.check_every}, check_prompts {self.check_prompts}, "
                f"response_tokens {self.response_tokens} and lora_rank {self.lora_rank} must be positive"
            )
        if self.method == "grpo" and self.batch_size % self.all_options["num_generations"]:
            raise AlignError(
                f"grpo: batch_size {self.batch_size} must be a multiple of num_generations "
                f"{self.all_options['num_generations']}"
            )

    @property
    def all_options(self) -> dict:
        return DEFAULTS.get(self.method, {}) | self.options


def published(recipe: Recipe, n_pairs: int) -> Recipe:
    """The same run with the published settings: r 16, alpha 32, dropout 0.05, one epoch, no stop at a dose."""
    if recipe.method not in PUBLISHED:
        raise AlignError(
            f"the published study holds no recipe for {recipe.method}; load its checkpoint (variants: load) "
            "or use recipe: study"
        )
    settings = PUBLISHED[recipe.method]
    return replace(
        recipe,
        steps=math.ceil(n_pairs / settings["batch_size"]),
        lora_rank=16,
        lora_alpha=32,
        lora_dropout=0.05,
        stop="last",
        **settings,
    )


# --- trainers that take our token ids -------------------------------------------------------------------------------


class _TokenIds:
    """Mixed into a TRL trainer: the data set holds the formatter's token ids already; leave them alone."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class _TokenRows:
    """The same for CPO and ORPO, whose rows are made one at a time."""

    def tokenize_row(self, row, model=None):
        out = {"prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            out[f"{side}_input_ids"] = ids
            out[f"{side}_attention_mask"] = [1] * len(ids)
            out[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
        return out


def _rows(encoded) -> Dataset:
    return Dataset.from_dict(
        {"prompt_ids": encoded.prompt_ids, "chosen_ids": encoded.chosen_ids, "rejected_ids": encoded.rejected_ids}
    )


def _kto_rows(encoded, batch_size: int, rng) -> Dataset:
    """Every answer as a row of its own, shuffled; each row also carries the answer of another prompt of its batch.

    KTO's KL term needs that mismatched answer. The trainer reads rows in order, so the batches are known here.
    """
    rows = [(p, a, True) for p, a in zip(encoded.prompt_ids, encoded.chosen_ids, strict=True)]
    rows += [(p, a, False) for p, a in zip(encoded.prompt_ids, encoded.rejected_ids, strict=True)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    other = []
    for start in range(0, len(rows), batch_size):
        batch = [answer for _, answer, _ in rows[start : start + batch_size]]
        other += [batch[-1], *batch[:-1]]
    prompts, answers, labels = zip(*rows, strict=True)
    return Dataset.from_dict(
        {"prompt_ids": prompts, "completion_ids": answers, "KL_completion_ids": other, "label": labels}
    )


class _TextReward(torch.nn.Module):
    """A reward function on text in the shape that PPO expects of a reward model: a backbone and a score head."""

    base_model_prefix = "backbone"

    def __init__(self, function, format: Formatter, prompts: list[str]):
        super().__init__()
        self.backbone, self.score = _TextBackbone(function, format, prompts), torch.nn.Identity()


class _TextBackbone(torch.nn.Module):
    def __init__(self, function, format, prompts):
        super().__init__()
        self.function, self.format = function, format
        self.prompts = {tuple(format.prompt_ids(p)): p for p in prompts}
        self.lengths = sorted({len(ids) for ids in self.prompts}, reverse=True)

    def forward(self, input_ids, attention_mask, **_):
        texts = [self._split(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        values = torch.tensor(np.array(self.function(*zip(*texts, strict=True))), dtype=torch.float32)
        states = values.to(input_ids.device)[:, None, None].expand(-1, input_ids.shape[1], 1)
        return type("Output", (), {"hidden_states": (states,)})()

    def _split(self, ids):
        for n in self.lengths:
            if tuple(ids[:n]) in self.prompts:
                return self.prompts[tuple(ids[:n])], self.format.decode(ids[n:])
        raise AlignError("ppo: a sampled row does not start with a known prompt; its token ids were changed on the way")


# --- watching a run -------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Leaves the training loop. Not every TRL loop looks at ``should_training_stop``, so an exception does it."""


class Monitor(TrainerCallback):
    """Measures a run on held-out pairs every few steps, and ends it at its dose or when its time has come.

    ``curves``: one row a check: step, what the trainer logged (loss, reward, margin), and held-out dose (kl, with its
    standard error), length, chosen and rejected log-probability, margin (change of chosen minus change of rejected,
    relative to the base, in nats).
    """

    def __init__(self, recipe: Recipe, format: Formatter, heldout, progress=None):
        self.recipe, self.format, self.progress = recipe, format, progress
        n = min(recipe.check_prompts, len(heldout))
        self.prompts, self.chosen, self.rejected = (
            [ids[i] for i in range(n)] for ids in (heldout.prompt_ids, heldout.chosen_ids, heldout.rejected_ids)
        )
        self.rows, self.logged, self.trainer, self.stopped_by = [], {}, None, "last step"

    @property
    def policy(self) -> PeftModel:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return getattr(model, "policy", model)

    def on_log(self, args, state, control, logs=None, **_):
        names = {
            "loss": ("loss", "loss/policy_avg"),
            "reward": ("reward", "objective/scores"),
            "margin": ("rewards/margins", "margin"),
        }
        for name, keys in names.items():
            for key in keys:
                if logs and key in logs:
                    self.logged[name] = float(logs[key])
        # Most trainers log a step after it was checked, PPO before: either way the values go to the step's own row.
        if self.rows and self.rows[-1]["step"] == state.global_step:
            self.rows[-1].update(self.logged)
            self.logged = {}

    def on_step_end(self, args, state, control, **_):
        # PPO counts the step before this call, the other trainers as well.
        if state.global_step % self.recipe.check_every == 0 or state.global_step >= self.recipe.steps:
            self.check(state.global_step)

    def check(self, step: int) -> None:
        """Measure the policy after ``step`` steps; past the target dose, land on it and stop."""
        policy = self.policy
        training = policy.training
        policy.eval()
        row = self._measure(step)
        over = self.recipe.stop == "dose" and step and row["kl"] >= self.recipe.dose
        if over:
            row = self._land(step)
            self.stopped_by = "dose"
        elif self.recipe.stop == "dose":
            self.before = {name: weight.detach().clone() for name, weight in self._weights()}
        policy.train(training)
        self.rows.append(row)
        self.logged = {}
        if self.progress:
            self.progress(step, self.recipe.steps, row["kl"])
        if over:
            raise _Stop

    def _weights(self):
        return [(name, weight) for name, weight in self.policy.named_parameters() if weight.requires_grad]

    @torch.no_grad()
    def _land(self, step: int) -> dict:
        """Go back to the target dose on the line between the last two checks' weights; the measured row.

        The dose can double between two checks. Without this, methods would be compared at doses that differ by as
        much as chance has them overshoot.
        """
        after = {name: weight.detach().clone() for name, weight in self._weights()}

        def move(share):
            for name, weight in self._weights():
                weight.copy_(torch.lerp(self.before[name], after[name], share))

        low, high, off = 0.0, 1.0, {}
        for _ in range(5):
            middle = (low + high) / 2
            move(middle)
            dose = self._sample(step)[1].mean()
            off[middle] = abs(dose - self.recipe.dose)
            low, high = (low, middle) if dose >= self.recipe.dose else (middle, high)
        move(min(off, key=off.get))
        return self._measure(step)

    def _sample(self, step: int) -> tuple[list[list[int]], np.ndarray]:
        sampled = models.sample(
            self.policy, self.prompts, end_id=self.format.end_id, pad_id=self.format.pad_id,
            max_new_tokens=self.recipe.response_tokens, seed=step,
        )  # fmt: skip
        return sampled, models.response_kl(self.policy, self.prompts, sampled, pad_id=self.format.pad_id)

    def _measure(self, step: int) -> dict:
        policy, pad = self.policy, self.format.pad_id
        chosen = models.response_logprobs(policy, self.prompts, self.chosen, pad_id=pad)
        rejected = models.response_logprobs(policy, self.prompts, self.rejected, pad_id=pad)
        if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
            raise self.diverged(step)
        sampled, kl = self._sample(step)
        if not np.isfinite(kl).all():
            raise self.diverged(step)
        if not self.rows:
            self.start = chosen - rejected
        return {
            "step": step,
            **dict.fromkeys(("loss", "reward", "margin"), np.nan),
            **self.logged,
            "kl": kl.mean(),
            "kl_se": kl.std() / math.sqrt(len(kl)),
            "length": np.mean([len(r) for r in sampled]),
            "chosen_logprob": chosen.mean(),
            "rejected_logprob": rejected.mean(),
            "heldout_margin": (chosen - rejected - self.start).mean(),
            "heldout_accuracy": (chosen - rejected > self.start).mean() if self.rows else 0.5,
        }

    def diverged(self, step: int) -> AlignError:
        return AlignError(
            f"{self.recipe.method}: training diverged by step {step} (log-probabilities are not finite); "
            f"lower the learning rate, now {self.recipe.learning_rate}"
        )


# --- training -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quietly():
    """Keep trainers' notes out of notebooks: they repeat for each of a hundred runs."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("trl", "accelerate", "datasets")}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    bars = datasets_logging.is_progress_bar_enabled()
    datasets_logging.disable_progress_bar()
    try:
        with models.quietly():
            yield
    finally:
        if bars:
            datasets_logging.enable_progress_bar()
        for logger, level in levels.items():
            logger.setLevel(level)


def _arguments(recipe: Recipe, workdir: str, device: str) -> dict:
    micro = recipe.micro_batch_size or recipe.batch_size
    options = dict(recipe.all_options)
    return {
        "output_dir": workdir,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, recipe.batch_size // micro),
        "learning_rate": recipe.learning_rate,
        "max_steps": recipe.steps,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": options.pop("warmup_steps", max(1, recipe.steps // 20)),
        "seed": recipe.seed,
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
        "gradient_checkpointing": device != "cpu",  # the same gradients in less memory, at the cost of time
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": recipe.check_every,
        "dataloader_pin_memory": False,
        **options,
    }


def _lora(recipe: Recipe, task: str, model) -> LoraConfig:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = next((t for t in TARGETS if names.issuperset(t)), None)
    if targets is None:
        raise AlignError(
            f"{recipe.method}: {model.config.model_type} has none of the attention projections that adapters go to; "
            "add its own to align.TARGETS"
        )
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(targets),
        task_type=task,
    )


def _trainer(recipe, model, tokenizer, format, encoded, prompts, reward, arguments):
    """The TRL trainer of one method over formatted rows; each takes the same adapter shape."""
    rng = np.random.default_rng(recipe.seed)
    common = {"model": model, "processing_class": tokenizer, "peft_config": _lora(recipe, "CAUSAL_LM", model)}
    if recipe.method in ("dpo", "shuffled"):
        from trl import DPOConfig, DPOTrainer

        rows = _rows(encoded)
        if recipe.method == "shuffled":
            swap = rng.random(len(rows)) < 0.5
            chosen, rejected = rows["chosen_ids"][:], rows["rejected_ids"][:]
            pairs = [(b, a) if s else (a, b) for s, a, b in zip(swap, chosen, rejected, strict=True)]
            rows = Dataset.from_dict(
                {
                    "prompt_ids": rows["prompt_ids"][:],
                    "chosen_ids": [a for a, _ in pairs],
                    "rejected_ids": [b for _, b in pairs],
                }
            )
        config = DPOConfig(**arguments, loss_type=["sigmoid"], max_length=recipe.max_length)
        return type("DPO", (_TokenIds, DPOTrainer), {})(args=config, train_dataset=rows, **common)
    if recipe.method == "kto":
        from trl import KTOConfig, KTOTrainer

        micro = arguments["per_device_train_batch_size"]
        config = KTOConfig(**arguments, max_length=None)  # a mismatched answer may be longer, and is not cut either
        rows = _kto_rows(encoded, micro, rng)
        return type("KTO", (_TokenIds, KTOTrainer), {})(args=config, train_dataset=rows, **common)
    if recipe.method == "sft":
        from trl import SFTConfig, SFTTrainer

        both = list(zip(encoded.prompt_ids, encoded.chosen_ids, strict=True))
        rows = Dataset.from_dict(
            {"input_ids": [p + c for p, c in both], "labels": [[-100] * len(p) + c for p, c in both]}
        )
        config = SFTConfig(**arguments, max_length=recipe.max_length)
        return type("SFT", (_TokenIds, SFTTrainer), {})(args=config, train_dataset=rows, **common)
    if recipe.method == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        config = CPOConfig(
            **arguments, loss_type="simpo", cpo_alpha=0.0, max_length=recipe.max_length, remove_unused_columns=False
        )
        return type("SimPO", (_TokenRows, CPOTrainer), {})(args=config, train_dataset=_rows(encoded), **common)
    if recipe.method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        config = ORPOConfig(**arguments, max_length=recipe.max_length, remove_unused_columns=False)
        return type("ORPO", (_TokenRows, ORPOTrainer), {})(args=config, train_dataset=_rows(encoded), **common)
    if recipe.method == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        def tokenize(self, texts):
            return [format.prompt_ids(text) for text in texts], None, {}

        config = GRPOConfig(**arguments, max_completion_length=recipe.response_tokens, disable_dropout=True)
        trainer = type("GRPO", (GRPOTrainer,), {"_tokenize_prompts": tokenize})
        rows = Dataset.from_dict({"prompt": list(dict.fromkeys(prompts))})
        return trainer(args=config, train_dataset=rows, reward_funcs=_grpo_reward(reward, format), **common)
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    prompts = list(dict.fromkeys(prompts))
    if len(prompts) < recipe.batch_size:
        raise AlignError(f"ppo: {len(prompts)} prompts do not fill one batch of {recipe.batch_size}; give more")
    if format.pad_id == format.end_id:
        raise AlignError("ppo: the tokenizer pads with its end token, and PPO masks padding by its id; add a pad token")
    if model.dtype != torch.float32:  # PPO compares log-probabilities of two passes, so round them less
        model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits.float())
    steps = arguments.pop("max_steps")
    config = PPOConfig(
        **arguments,
        total_episodes=steps * recipe.batch_size,
        response_length=recipe.response_tokens,
        stop_token="eos",
        temperature=1.0,
        num_mini_batches=1,
        num_sample_generations=0,
        local_rollout_forward_batch_size=arguments["per_device_train_batch_size"],
    )
    rows = Dataset.from_dict({"input_ids": [format.prompt_ids(p) for p in prompts]})
    judge, value = _ppo_models(recipe, reward, model, format, prompts)
    trainer = PPOTrainer(
        args=config, ref_model=None, reward_model=judge, value_model=value, train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer), **common,
    )  # fmt: skip
    trainer.accelerator.print = lambda *words: None
    return trainer


def _grpo_reward(reward, format):
    def score(prompts, completions, completion_ids, **_):
        if callable(reward) and not isinstance(reward, torch.nn.Module):
            return [float(v) for v in reward(prompts, [format.decode(ids) for ids in completion_ids])]
        ids = [format.prompt_ids(p) for p in prompts]
        return models.rewards(reward, ids, [list(c) for c in completion_ids], pad_id=format.pad_id).tolist()

    return score


def _ppo_models(recipe, reward, model, format, prompts):
    """Reward and value model for PPO.

    The value model is the reward model where there is one, else the base with an empty head, and learns through an
    adapter of the policy's shape and through its head.
    """
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        if isinstance(reward, torch.nn.Module):
            judge, value = reward, copy.deepcopy(reward)
        else:
            judge, config = _TextReward(reward, format, prompts), copy.deepcopy(model.config)
            config.num_labels = 1
            value = AutoModelForSequenceClassification.from_config(config).float().to(model.device)
            backbone, weights = getattr(value, value.base_model_prefix), getattr(model, model.base_model_prefix)
            backbone.load_state_dict(weights.state_dict())
            torch.nn.init.zeros_(value.score.weight)
        inject_adapter_in_model(_lora(recipe, "SEQ_CLS", value), value)
    value.score.requires_grad_(True)  # a loaded reward model is frozen
    return judge, value


def train(
    folder: Path,
    base: str | Path,
    pairs: pd.DataFrame,
    heldout: pd.DataFrame,
    recipe: Recipe,
    *,
    reward=None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress=None,
) -> dict:
    """Train one variant of ``base`` and save its adapter (half precision) and its curves into ``folder``.

    Parameters
    ----------
    base : hub id or local folder of the parent.
    pairs, heldout : tables prompt, chosen, rejected; ``heldout`` prompts are never trained on.
    reward : for ppo and grpo: a reward model (``models.load_reward``), or a function of (prompts, responses) -> values.

    Returns
    -------
    dict: steps, dose (mean KL per response, nats) with standard error, stopped_by ("dose" or "last step"), pairs used
    and dropped.

    Raises
    ------
    AlignError
        for an unknown method, a missing reward, no usable pairs, or a run that diverges.
    """
    if recipe.method in ONLINE and reward is None:
        raise AlignError(f"{recipe.method} needs a reward: train a reward model on the reward split first")
    model, tokenizer = models.load(base, device=device, trust_remote_code=trust_remote_code)
    format = prepare_tokenizer(tokenizer, recipe.max_length)
    model.config.pad_token_id = model.generation_config.pad_token_id = format.pad_id
    encoded, watched = format.encode_pairs(pairs), format.encode_pairs(heldout)
    prompts = pairs.prompt[encoded.kept].tolist()
    monitor = Monitor(recipe, format, watched, progress)
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed)  # noqa: NPY002 - TRL's PPO shuffles with NumPy's global state
    with tempfile.TemporaryDirectory() as workdir, _quietly():
        arguments = _arguments(recipe, workdir, device)
        trainer = _trainer(recipe, model, tokenizer, format, encoded, prompts, reward, arguments)
        trainer.add_callback(monitor)
        monitor.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        monitor.check(0)
        try:
            trainer.train()
        except _Stop:
            pass
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # what sampling from a broken policy says
                raise
            raise monitor.diverged(trainer.state.global_step) from error
        _save_adapter(monitor.policy, folder)
    curves = pd.DataFrame(monitor.rows)
    curves.to_parquet(Path(folder) / "curves.parquet")
    last = monitor.rows[-1]
    return {
        "method": recipe.method,
        "steps": int(last["step"]),
        "dose": float(last["kl"]),
        "dose_se": float(last["kl_se"]),
        "stopped_by": monitor.stopped_by,
        "pairs": len(encoded),
        "pairs_report": encoded.report,
    }


def train_reward(
    folder: Path, base: str | Path, pairs: pd.DataFrame, recipe: Recipe, *, device: str = "cpu", heldout_share=0.2
) -> dict:
    """Train a reward model (adapter and score head on ``base``) on pairs, and save it into ``folder``.

    A fifth of the prompts is held out. Returns accuracy on them and its standard error, and the number of pairs.

    Raises
    ------
    AlignError
        when there are too few prompts to hold any out.
    """
    from trl import RewardConfig, RewardTrainer

    ids = pairs.prompt_id.drop_duplicates().sort_values()
    rng = np.random.default_rng(recipe.seed)
    held = set(ids.iloc[rng.permutation(len(ids))[: int(len(ids) * heldout_share)]])
    test = pairs.prompt_id.isin(held)
    if not 0 < test.sum() < len(pairs):
        raise AlignError(f"reward model: {len(ids)} prompts are too few to train on and to test; give more pairs")
    _, tokenizer = models.load(base, device="cpu")
    format = prepare_tokenizer(tokenizer, recipe.max_length)
    train_rows, test_rows = format.encode_pairs(pairs[~test]), format.encode_pairs(pairs[test])
    torch.manual_seed(recipe.seed)
    with tempfile.TemporaryDirectory() as workdir, _quietly():
        model = models.score_model(base)
        model.config.pad_token_id = format.pad_id
        torch.nn.init.zeros_(model.score.weight)
        rows = Dataset.from_dict(
            {
                f"{side}_ids": [
                    p + r for p, r in zip(train_rows.prompt_ids, getattr(train_rows, f"{side}_ids"), strict=True)
                ]
                for side in ("chosen", "rejected")
            }
        )
        trainer = type("Reward", (_TokenIds, RewardTrainer), {})(
            model=model,
            args=RewardConfig(**_arguments(recipe, workdir, device), max_length=recipe.max_length),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=_lora(recipe, "SEQ_CLS", model),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        policy = trainer.accelerator.unwrap_model(trainer.model).eval()
        margin = models.rewards(policy, test_rows.prompt_ids, test_rows.chosen_ids, pad_id=format.pad_id)
        margin -= models.rewards(policy, test_rows.prompt_ids, test_rows.rejected_ids, pad_id=format.pad_id)
        _save_adapter(policy, folder)
    accuracy = float((margin > 0).mean())
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(margin)),
        "pairs": len(train_rows),
        "heldout_pairs": len(test_rows),
    }


def prepare_tokenizer(tokenizer, max_length: int | None) -> Formatter:
    """The formatter of a tokenizer, and the tokenizer set so that trainers pad and stop as the formatter does."""
    format = Formatter(tokenizer, max_length=max_length)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(format.pad_id)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(format.end_id)
    tokenizer.padding_side = "left"
    return format


def _save_adapter(policy: PeftModel, folder: Path) -> None:
    for name, weight in policy.named_parameters():
        if weight.requires_grad or "lora_" in name or "modules_to_save" in name:
            weight.data = weight.data.half()
    policy.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    # The base is named by the artifact's manifest: a path would only hold on the machine that trained it.
    # PEFT keeps the targets in a set, whose order differs from one process to the next.
    config = Path(folder) / "adapter_config.json"
    saved = json.loads(config.read_text())
    saved |= {"base_model_name_or_path": None, "target_modules": sorted(saved["target_modules"])}
    config.write_text(json.dumps(saved, indent=2) + "\n")
    for card in Path(folder).glob("README.md"):
        card.unlink()
