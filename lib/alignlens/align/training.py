"""Train a variant or a reward model, and save its adapter."""

import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from alignlens import models
from alignlens.align import resuming
from alignlens.align.monitor import DoseReached, Monitor
from alignlens.align.recipe import ONLINE, Recipe
from alignlens.align.trainers import TRAINERS, Run
from alignlens.core.errors import AlignError
from alignlens.core.store import write_table
from alignlens.preferences import Encoded, Formatter


class Limits(NamedTuple):
    """Tokens at most: of a pair (prompt and one answer), of a prompt that is answered, of a sampled answer."""

    pair: int
    prompt: int
    answer: int


def limits(config, max_length: int, response_tokens: int) -> Limits:
    """The lengths asked for, or what a model's context leaves of them: a sampled answer gets half of it at most."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    answer = min(response_tokens, context // 2)
    return Limits(min(max_length, context), min(max_length, context - answer), answer)


def answerable(encoded: Encoded, longest: int) -> Encoded:
    """The pairs whose prompts have at most so many tokens, so that there is room for a sampled answer."""
    fits = np.array([len(ids) <= longest for ids in encoded.prompt_ids])
    if fits.all():
        return encoded
    if not fits.any():
        raise AlignError(f"no prompt has at most {longest} tokens, and the model has no room to answer: shorten them")
    report = {"kept": int(fits.sum()), "no_room_to_answer": int((~fits).sum())}
    return replace(encoded.take(np.flatnonzero(fits)), report=encoded.report | report)


def train(
    folder: Path, base, pairs, heldout, recipe: Recipe, *, reward=None, device="cpu", trust_remote_code=False,
    resumable: Path | None = None,
) -> dict:  # fmt: skip
    """Train one variant of ``base`` and save its adapter (half precision) and its curves into ``folder``.

    base : hub id or local folder of the parent. pairs, heldout : DataFrames prompt, chosen, rejected; ``heldout``
    prompts are never trained on. reward : for ppo and grpo: a reward model (``models.load_reward``), or a function of
    (prompts, responses) -> values. resumable : folder of this run alone, see ``resuming``: a killed run goes on from
    it, to the same adapter. Returns dict: steps, dose (mean KL per response, nats) with standard error, stopped_by
    ("dose" or "last step"), pairs used and dropped.
    Raises AlignError for an unknown method, a missing reward, no usable pairs, or a run that diverges."""
    if recipe.method in ONLINE and reward is None:
        raise AlignError(f"{recipe.method} needs a reward: train a reward model on the reward split first")
    model, tokenizer = models.load(base, device=device, trust_remote_code=trust_remote_code)
    most = limits(model.config, recipe.max_length, recipe.response_tokens)
    recipe = replace(recipe, max_length=most.pair, response_tokens=most.answer)
    format = _formatter(tokenizer, most.pair)
    model.config.pad_token_id = model.generation_config.pad_token_id = format.pad_id
    encoded, heldout = (answerable(format.encode_pairs(rows), most.prompt) for rows in (pairs, heldout))
    monitor, kept = Monitor(recipe, format, heldout), resuming.read(resumable)
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed)  # noqa: NPY002 - TRL's PPO shuffles with NumPy's global state
    with tempfile.TemporaryDirectory() as workdir, models.quietly():
        monitor.trainer = trainer = TRAINERS[recipe.method](Run(recipe, model, format, encoded, workdir, reward))
        trainer.add_callback(monitor)
        try:
            resuming.Resumable(trainer, recipe, resumable, kept, monitor).train()
        except DoseReached:
            pass
        except (RuntimeError, ValueError) as error:
            # what sampling from a broken policy says, or measuring it
            if "probability tensor" in str(error) or "infs or NaNs" in str(error):
                if resumable:
                    shutil.rmtree(resumable)  # it would break again
                step, rate = trainer.state.global_step, f"lower the learning rate, now {recipe.learning_rate}"
                raise AlignError(f"{recipe.method}: training diverged by step {step}; {rate}") from error
            raise
        _save_adapter(monitor.policy, folder)
    write_table(folder / "curves.parquet", monitor.curves)
    last = monitor.rows[-1]
    return {
        "method": recipe.method, "steps": last["step"], "dose": float(last["kl"]), "dose_se": float(last["kl_se"]),
        "stopped_by": monitor.stopped_by, "pairs": len(encoded), "pairs_report": encoded.report,
    }  # fmt: skip


def train_reward(
    folder: Path, base, pairs, recipe: Recipe, *, device="cpu", trust_remote_code=False, resumable: Path | None = None
) -> dict:
    """Train a reward model (adapter and score head on ``base``) on pairs, and save it into ``folder``.

    ``pairs`` : DataFrame prompt, chosen, rejected, prompt_id; a fifth of the prompts is held out. ``resumable`` : as
    for ``train``. Returns accuracy on them and its standard error, and the number of pairs.
    Raises AlignError when there are too few prompts to hold any out."""
    ids = pairs.prompt_id.drop_duplicates().sort_values()
    held = ids.iloc[np.random.default_rng(recipe.seed).permutation(len(ids))[: int(0.2 * len(ids))]]
    test = pairs.prompt_id.isin(held)
    if not 0 < test.sum() < len(pairs):
        raise AlignError(f"reward model: {len(ids)} prompts are too few to train on and to test; give more pairs")
    tokenizer = models.load_tokenizer(base, trust_remote_code=trust_remote_code)
    torch.manual_seed(recipe.seed)
    model = models.score_model(base, trust_remote_code=trust_remote_code).to(device)
    format = _formatter(tokenizer, limits(model.config, recipe.max_length, recipe.response_tokens).pair)
    trained, tested = format.encode_pairs(pairs[~test]), format.encode_pairs(pairs[test])
    models.check(model, format.tokenizer, base)
    model.config.pad_token_id = format.pad_id
    torch.nn.init.zeros_(model.score.weight)
    with tempfile.TemporaryDirectory() as workdir, models.quietly():
        trainer = TRAINERS["reward"](Run(recipe, model, format, trained, workdir))
        resuming.Resumable(trainer, recipe, resumable, resuming.read(resumable)).train()
        policy = trainer.accelerator.unwrap_model(trainer.model).eval()
    answers, pad = (tested.chosen_ids, tested.rejected_ids), format.pad_id
    chosen, rejected = (models.rewards(policy, tested.prompt_ids, ids, pad_id=pad) for ids in answers)
    _save_adapter(policy, folder)
    accuracy = float((chosen > rejected).mean())
    error = float(np.sqrt(accuracy * (1 - accuracy) / len(tested)))
    return {"accuracy": accuracy, "accuracy_se": error, "pairs": len(trained), "heldout_pairs": len(tested)}


def _formatter(tokenizer, max_length: int) -> Formatter:
    """The formatter of a tokenizer, and the tokenizer set so that trainers pad and stop as the formatter does."""
    format = Formatter(tokenizer, max_length=max_length)
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([format.pad_id, format.end_id])
    tokenizer.padding_side = "left"
    return format


def _save_adapter(policy: PeftModel, folder: Path) -> None:
    """The adapter in half precision. Its base is named by the artifact's manifest: a path would hold on one machine."""
    weights = {n: w.half() for n, w in get_peft_model_state_dict(policy, save_embedding_layers=False).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = policy.peft_config["default"].to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    # PEFT keeps the targets in a set, whose order differs from one process to the next.
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (folder / "adapter_config.json").write_text(text + "\n")
