"""One TRL trainer a method, built over rows of token ids.

Every trainer gets ids that ``preferences.Formatter`` made: TRL's own formatting differs between trainers (BOS, EOS,
templates), and a difference in format would look like a difference between methods. All get the same adapter shape,
and the reference model is always the parent with the adapter switched off."""

import copy
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PrinterCallback

from alignlens import models
from alignlens.align.recipe import Recipe
from alignlens.core.errors import AlignError
from alignlens.preferences import Encoded, Formatter

# The attention projections that carry the adapter: the first set that a model has.
TARGETS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Qwen, SmolLM, Mistral, Gemma
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, GPT-Neo
    ("qkv_proj", "o_proj"),  # Phi-3
    ("query_key_value", "dense"),  # GPT-NeoX, Falcon, Bloom
    ("c_attn",),  # GPT-2, whose output projection shares its name with one of the feed-forward block
)
UNCUT = {"max_length": None}  # the formatter left out what is too long; nothing is cut


@dataclass(frozen=True)
class Run:
    """What a trainer is built from. ``reward`` : for ppo and grpo, a reward model or a function of texts."""

    recipe: Recipe
    model: PreTrainedModel
    format: Formatter
    encoded: Encoded
    workdir: str
    reward: object = None

    @cached_property
    def prompts(self) -> dict[str, list[int]]:
        """Each prompt and its token ids."""
        return dict(zip(self.encoded.prompts, self.encoded.prompt_ids, strict=True))

    @property
    def pairs(self) -> list[tuple[list[int], list[int], list[int]]]:
        """Token ids of (prompt, chosen, rejected)."""
        return list(zip(self.encoded.prompt_ids, self.encoded.chosen_ids, self.encoded.rejected_ids, strict=True))

    def trainer(self, module: str, name: str, rows: list[dict], settings=UNCUT, *, replaced=None, **others):
        """TRL's trainer of that name, some of its methods replaced, with settings of its own beside the shared ones."""
        recipe, cpu = self.recipe, self.model.device.type == "cpu"
        shared = {
            "output_dir": self.workdir, "seed": recipe.seed, "per_device_train_batch_size": recipe.micro,
            "gradient_accumulation_steps": recipe.batch_size // recipe.micro, "max_steps": recipe.steps,
            "learning_rate": recipe.learning_rate, "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": max(1, recipe.steps // 20), "use_cpu": cpu, "bf16": not cpu, "dataloader_pin_memory": False,
            "gradient_checkpointing": not cpu,  # the same gradients in less memory, at the cost of time
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": recipe.check_every,
        }  # fmt: skip
        # Imported when it is used: TRL's trainers take a second, and most that import this package train nothing.
        trl = import_module(module)
        trainer = type(name, (getattr(trl, f"{name}Trainer"),), replaced or {})(
            model=self.model, processing_class=self.format.tokenizer, train_dataset=Dataset.from_list(rows),
            args=getattr(trl, f"{name}Config")(**shared | recipe.all_options | settings),
            peft_config=lora(recipe, self.model), **others,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.accelerator.print = lambda *words: None  # PPO says what it does
        return trainer


def lora(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """The adapter on a model's attention projections, and on its score head if it has one."""
    names, kind = {name.rpartition(".")[2] for name, _ in model.named_modules()}, model.config.model_type
    targets = next((t for t in TARGETS if names.issuperset(t)), None)
    if targets is None:
        raise AlignError(f"{kind} has none of the attention projections in TARGETS of align/trainers.py; add its own")
    return LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
        target_modules=list(targets), task_type="SEQ_CLS" if "score" in names else "CAUSAL_LM",
    )  # fmt: skip


# DPO and KTO tokenise whatever they get, CPO and ORPO row by row; SFT, reward and PPO leave token ids alone.
AS_IT_IS = {"_prepare_dataset": lambda trainer, rows, *_: rows}
ROW_BY_ROW = {"tokenize_row": lambda trainer, row, *_: row}


def _sft(run: Run):
    return run.trainer("trl", "SFT", [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c, _ in run.pairs])


def _reward(run: Run):
    return run.trainer("trl", "Reward", [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in run.pairs])


def _dpo(run: Run, swapped: float = 0.0):
    """``swapped``: share of the pairs whose labels are swapped, at random."""
    swap = np.random.default_rng(run.recipe.seed).random(len(run.encoded)) < swapped
    pairs = [(p, r, c) if s else (p, c, r) for s, (p, c, r) in zip(swap, run.pairs, strict=True)]
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    return run.trainer("trl", "DPO", rows, replaced=AS_IT_IS)


def _kto(run: Run):
    """Every answer as a row of its own, shuffled; each row also carries the answer of another prompt of its batch.

    KTO's KL term needs that mismatched answer. The trainer reads rows in order, so the batches are known here."""
    answers = [(p, c, True) for p, c, _ in run.pairs] + [(p, r, False) for p, _, r in run.pairs]
    rows = [dict(zip(("prompt_ids", "completion_ids", "label"), answer, strict=True)) for answer in answers]
    rows = [rows[i] for i in np.random.default_rng(run.recipe.seed).permutation(len(rows))]
    for start in range(0, len(rows), run.recipe.micro):
        batch = rows[start : start + run.recipe.micro]
        for row, other in zip(batch, (batch[-1], *batch), strict=False):
            row["KL_completion_ids"] = other["completion_ids"]
    return run.trainer("trl", "KTO", rows, replaced=AS_IT_IS)


def _orpo(run: Run, module: str = "orpo", name: str = "ORPO", **settings):
    """ORPO and CPO, whose settings may be those of SimPO."""
    rows = [_side("chosen", p, c) | _side("rejected", p, r) for p, c, r in run.pairs]
    return run.trainer(f"trl.experimental.{module}", name, rows, UNCUT | settings, replaced=ROW_BY_ROW)


def _side(name: str, prompt: list[int], answer: list[int]) -> dict:
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}


def _grpo(run: Run):
    """GRPO hands text to its reward, so its rows are text, tokenised when it samples."""
    settings = {"max_completion_length": run.recipe.response_tokens, "disable_dropout": True}
    replaced = {"_tokenize_prompts": lambda trainer, texts: ([run.prompts[text] for text in texts], None, {})}
    rows = [{"prompt": prompt} for prompt in run.prompts]
    return run.trainer("trl", "GRPO", rows, settings, replaced=replaced, reward_funcs=_grpo_reward(run))


def _grpo_reward(run: Run):
    def score(prompts, completions, completion_ids, **_):
        if not isinstance(run.reward, torch.nn.Module):
            return list(map(float, run.reward(prompts, [run.format.decode(answer) for answer in completion_ids])))
        return models.rewards(run.reward, [run.prompts[p] for p in prompts], completion_ids, pad_id=run.format.pad_id)

    return score


def _ppo(run: Run):
    recipe, model, format = run.recipe, run.model, run.format
    if len(run.prompts) < recipe.batch_size:
        raise AlignError(f"ppo: {len(run.prompts)} prompts do not fill one batch of {recipe.batch_size}; give more")
    if format.pad_id == format.end_id:
        raise AlignError("ppo: the tokenizer pads with its end token, and PPO masks padding by its id; add a pad token")
    if model.dtype != torch.float32:  # PPO compares log-probabilities of two passes, so round them less
        model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits.float())
    settings = {
        "max_steps": -1, "total_episodes": recipe.steps * recipe.batch_size, "response_length": recipe.response_tokens,
        "stop_token": "eos", "temperature": 1.0, "num_mini_batches": 1, "num_sample_generations": 0,
        "local_rollout_forward_batch_size": recipe.micro,
    }  # fmt: skip
    rows = [{"input_ids": ids} for ids in run.prompts.values()]
    return run.trainer("trl.experimental.ppo", "PPO", rows, settings, ref_model=None, **_ppo_models(run))


def _ppo_models(run: Run) -> dict:
    """Reward and value model for PPO.

    The value model is the reward model where there is one, else the base with an empty head, and learns through an
    adapter of the policy's shape and through its head."""
    model, judge = run.model, run.reward
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        if isinstance(judge, torch.nn.Module):
            value = copy.deepcopy(judge)
        else:
            judge = _TextReward(judge, run.format, run.prompts)
            config = model.config.from_dict(model.config.to_dict() | {"num_labels": 1})
            value = AutoModelForSequenceClassification.from_config(config).float().to(model.device)
            value.base_model.load_state_dict(model.base_model.state_dict())
            torch.nn.init.zeros_(value.score.weight)
        inject_adapter_in_model(lora(run.recipe, value), value)
    value.score.requires_grad_(True)  # a loaded reward model is frozen
    return {"reward_model": judge, "value_model": value}


class _TextReward(torch.nn.Module):
    """A reward function on text in the shape that PPO expects of a reward model: a backbone and a score head."""

    base_model_prefix = "forward"  # what stands for the backbone

    def __init__(self, function, format: Formatter, prompts: dict[str, list[int]]):
        super().__init__()
        self.function, self.format, self.score = function, format, torch.nn.Identity()
        self.prompts = {tuple(ids): prompt for prompt, ids in prompts.items()}
        self.lengths = sorted({*map(len, self.prompts)}, reverse=True)

    def forward(self, input_ids, attention_mask, **_):
        texts = [self._split(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        values = torch.tensor(np.array(self.function(*zip(*texts, strict=True))), dtype=torch.float32)
        states = values.to(input_ids.device)[:, None, None].expand(-1, input_ids.shape[1], 1)
        return SimpleNamespace(hidden_states=(states,))

    def _split(self, ids):
        for n in self.lengths:
            if tuple(ids[:n]) in self.prompts:
                return self.prompts[tuple(ids[:n])], self.format.decode(ids[n:])
        raise AlignError("ppo: a sampled row does not start with a known prompt; its token ids were changed on the way")


TRAINERS = {
    "ppo": _ppo, "dpo": _dpo, "simpo": partial(_orpo, module="cpo", name="CPO", loss_type="simpo", cpo_alpha=0.0),
    "orpo": _orpo, "grpo": _grpo, "kto": _kto, "sft": _sft, "shuffled": partial(_dpo, swapped=0.5), "reward": _reward,
}  # fmt: skip
