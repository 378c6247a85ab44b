"""Models: load a base, an aligned checkpoint or an adapter; train a tiny base; score and sample responses.

Everything that runs a language model outside its internals lives here: log-probabilities, samples and KL per
response. Prompts and responses arrive as token ids, made by one ``preferences.Formatter``.
"""

from __future__ import annotations

import math
import shutil
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.utils import logging as transformers_logging

from alignlens.core.errors import ModelError
from alignlens.preferences import Formatter, collate

ARCHITECTURES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "smollm3": SmolLM3Config}

TINY_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@contextmanager
def quietly():
    """Keep notes, progress bars and load reports of Transformers out of notebooks; errors are raised as ever.

    What a load report would say of missing weights is checked by ``load`` and ``load_reward`` instead.
    """
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --- making a tiny base ---------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], *, vocab_size: int, bos: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, lossless on any text, with a two-role chat template.

    ``bos`` puts a begin-of-text token before every conversation, as the Llama family does and the others do not.
    """
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|begin|>"]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        bos_token="<|begin|>" if bos else None,
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = ("<|begin|>" if bos else "") + TINY_TEMPLATE
    return wrapped


def tiny_config(architecture: str, tokenizer: PreTrainedTokenizerBase, *, layers: int, d_model: int, context: int):
    """The architecture's own config class at toy size: grouped-query attention, tied embeddings."""
    if architecture not in ARCHITECTURES:
        raise ModelError(f"architecture {architecture!r} has no tiny base; choose one of {sorted(ARCHITECTURES)}")
    heads = 4
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": d_model,
        "intermediate_size": 8 * d_model // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": d_model // heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "smollm3":
        sizes["layer_types"] = None  # every fourth layer without rotary positions, as its default is
    return ARCHITECTURES[architecture](**sizes)


def pretrain(
    folder: Path,
    architecture: str,
    texts: list[tuple[str, str]],
    *,
    layers: int,
    d_model: int,
    vocab_size: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    context: int = 128,
    progress=None,
) -> dict:
    """Train a tiny base from scratch on (prompt, response) texts and save it, weights in half precision.

    Next-token loss on prompts and responses alike; AdamW, 5 % warm-up, cosine decay to a tenth. ``texts`` are read in
    order, each at most once an epoch.

    Returns
    -------
    dict: parameters, steps, tokens, loss (mean of the last 5 %), curve (list of [step, loss]).
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(
        [f"{p}\n{r}" for p, r in texts[:20_000]], vocab_size=vocab_size, bos=architecture == "llama"
    )
    format = Formatter(tokenizer, max_length=context)
    config = tiny_config(architecture, tokenizer, layers=layers, d_model=d_model, context=context)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    sequences = [format.prompt_ids(p) + format.response_ids(p, r) for p, r in texts]

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)

    def rate(step: int) -> float:
        warm = max(1, steps // 20)
        if step < warm:
            return step / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = np.random.default_rng(seed).permutation(len(sequences))
    curve, recent, tokens = [], [], 0
    for step in range(steps):
        rows = order.take(range(step * batch_size, (step + 1) * batch_size), mode="wrap")
        ids, mask = collate([sequences[i] for i in rows], format.pad_id)
        tokens += int(mask.sum())
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % max(1, steps // 50) == 0:
            curve.append([step + 1, float(np.mean(recent[-max(1, steps // 50) :]))])
            if progress:
                progress(step + 1, steps)
    with quietly():
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": tokens,
        "loss": float(np.mean(recent[-max(1, steps // 20) :])),
        "curve": curve,
    }


# --- loading --------------------------------------------------------------------------------------------------------


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def one_thread() -> None:
    """Keep this process to one CPU thread. Small matrices gain nothing from more, and on shared cores lose many times.

    PyTorch's threads wait for each other by spinning: on a busy machine two ran about ten times slower than one.
    """
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


def load(
    source: str | Path,
    adapter: str | Path | None = None,
    *,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    merge: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, and check them.

    Parameters
    ----------
    source : hub id or local folder of a base or a merged checkpoint.
    adapter : hub id or local folder of a PEFT adapter on ``source``; merged into the weights unless ``merge`` is off.
    device : float32 on the CPU, bfloat16 elsewhere.

    Raises
    ------
    ModelError
        when the source is missing or out of reach, holds only pickled weights, has non-finite weights, or when its
        tokenizer has more tokens than the model has embeddings or does not give a text back.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with quietly():
        tokenizer = _try(AutoTokenizer, source, **options)
        model, found = _try(
            AutoModelForCausalLM, source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ModelError(
            f"model {str(source)!r}: its files lack {len(names)} weights, {names[0]} first; they would be random. "
            "Fetch or save the model again, with all of its files"
        )
    # Samples come from the unmodified distribution: drop the checkpoint's own temperature, top-k and penalties.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    if adapter is not None:
        model = _with_adapter(model, adapter, merge)
    check(model, tokenizer, source)
    return model.to(device).eval(), tokenizer


def load_reward(folder: str | Path, adapter: str | Path, *, device: str = "cpu"):
    """Load a reward model: a base with a trained score head, stored as an adapter that holds the head.

    Raises ModelError when the adapter holds no score head (a fresh one would reward noise) or does not fit the base.
    """
    if not any("score" in name for name in _adapter_names(adapter)):
        raise ModelError(
            f"reward model {str(adapter)!r} holds no trained score head; a new one is random and rewards noise. "
            "Train one on the reward split (align.train_reward) or choose another"
        )
    model = score_model(folder)
    return _with_adapter(model, adapter, merge=True).to(device).eval()


def score_model(source: str | Path) -> PreTrainedModel:
    """A model in float32 with a new score head of one value, to be trained."""
    with quietly():
        return _try(AutoModelForSequenceClassification, source, num_labels=1, dtype=torch.float32, use_safetensors=True)


def _try(kind, source, **options):
    try:
        return kind.from_pretrained(str(source), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {str(source)!r} cannot be loaded: {_first_line(error)}. {_advice(source)}") from error


def _adapter_names(adapter) -> list[str]:
    """Names of the weights in a local adapter; hub ids give none."""
    folder = Path(str(adapter))
    if not folder.is_dir():
        return []
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"adapter {str(adapter)!r} cannot be read: {_first_line(error)}. The folder needs adapter_config.json and "
            "adapter_model.safetensors; convert pickled weights first"
        ) from error


def _with_adapter(model, adapter, merge):
    from peft import PeftModel, get_peft_model_state_dict

    names = {name for name in _adapter_names(adapter) if "lora_" in name or "score" in name}
    try:
        with quietly():
            model = PeftModel.from_pretrained(model, str(adapter))
            fits = not names or names == {
                name for name in get_peft_model_state_dict(model) if "lora_" in name or "score" in name
            }
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(_misfit(adapter, _first_line(error))) from error
    if not fits:
        raise ModelError(_misfit(adapter, "it has other weights than the model has places for"))
    return model.merge_and_unload() if merge else model


def _misfit(adapter, why) -> str:
    return (
        f"adapter {str(adapter)!r} does not fit the model: {why}. "
        "Give the base that it was trained on (its adapter_config.json or manifest names it)"
    )


def _first_line(error) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _advice(source) -> str:
    folder = Path(str(source))
    if folder.is_dir():
        names = {p.name for p in folder.iterdir()}
        if any(n.endswith((".bin", ".pt", ".pth")) for n in names) and not any(
            n.endswith(".safetensors") for n in names
        ):
            return "It holds only pickled weights; convert them to safetensors first"
        if "adapter_config.json" in names and "config.json" not in names:
            return "It is an adapter: give its base as the model and this folder as the adapter"
        return "The folder needs config.json, safetensors weights and the tokenizer's files"
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        return "There is no such folder; check the path"
    return "Give a local folder, or a hub id that is public or that you are logged in for, with the hub in reach"


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source="model") -> None:
    """Refuse a model with non-finite weights, or a tokenizer that does not belong to it."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(f"model {str(source)!r}: weight {name} holds NaN or infinite values; it is damaged")
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"model {str(source)!r}: its tokenizer knows token {highest}, the model has embeddings for {rows} only; "
            "use the tokenizer that it was trained with"
        )
    text = "A short line, 1 of 2."
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    if text not in back:
        raise ModelError(f"model {str(source)!r}: its tokenizer turns {text!r} into {back!r}; responses would change")


def describe(source: str | Path, *, trust_remote_code: bool = False) -> dict:
    """Architecture, depth and width of a model without loading its weights."""
    config = _try(AutoConfig, source, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    return {"model_type": text.model_type, "layers": text.num_hidden_layers, "d_model": text.hidden_size}


# --- scoring and sampling -------------------------------------------------------------------------------------------


def _batches(lengths, size):
    """Index batches of similar length, longest first, so that a batch that does not fit in memory fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def _response_logits(model, prompts, responses, rows, pad_id):
    """Logits that predict each response token, targets and mask, of one batch: [rows, longest response(, vocab)]."""
    ids, mask = collate([prompts[i] + responses[i] for i in rows], pad_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    width = max(len(responses[i]) for i in rows)
    starts = torch.tensor([len(prompts[i]) for i in rows], device=ids.device)
    offsets = torch.arange(width, device=ids.device)
    lengths = torch.tensor([len(responses[i]) for i in rows], device=ids.device)
    valid = offsets < lengths[:, None]
    where = (starts[:, None] + offsets).clamp(max=ids.shape[1] - 1)
    targets = ids.gather(1, where)
    picked = logits.gather(1, (where - 1)[..., None].expand(-1, -1, logits.shape[-1]))
    return picked.float(), targets, valid


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target token, nats: logits [..., vocabulary], targets [...] -> float32 [...]."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return -torch.nn.functional.cross_entropy(flat, targets.reshape(-1), reduction="none").view(targets.shape)


def token_kl(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(logits || other) of each next-token distribution, nats: two [..., vocabulary] -> float32 [...]."""
    logp, logq = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


@torch.inference_mode()
def response_logprobs(model, prompts, responses, *, pad_id: int, batch_size: int = 64) -> np.ndarray:
    """Summed log-probability of each response given its prompt (token id lists): float64 [responses], in nats."""
    out = np.zeros(len(responses))
    for rows in _batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], batch_size):
        logits, targets, valid = _response_logits(model, prompts, responses, rows, pad_id)
        out[rows] = (token_logprobs(logits, targets) * valid).sum(1).double().cpu().numpy()
    return out


@torch.inference_mode()
def response_kl(model, prompts, responses, *, pad_id: int, reference=None, batch_size: int = 64) -> np.ndarray:
    """KL(model || reference) of each response, summed over its tokens: float64 [responses], in nats.

    Exact at each token (over the whole vocabulary), so on responses sampled from ``model`` the mean is an unbiased,
    low-variance estimate of the KL between the two response distributions. Without ``reference`` the model must carry
    an adapter: the adapter switched off is the reference.
    """
    if reference is None and not hasattr(model, "disable_adapter"):
        raise ModelError("response_kl: give a reference, or a model with an adapter that can be switched off")
    out = np.zeros(len(responses))
    for rows in _batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], batch_size):
        logits, _, valid = _response_logits(model, prompts, responses, rows, pad_id)
        with model.disable_adapter() if reference is None else nullcontext():
            other = _response_logits(model if reference is None else reference, prompts, responses, rows, pad_id)[0]
        out[rows] = (token_kl(logits, other) * valid).sum(1).double().cpu().numpy()
    return out


@torch.inference_mode()
def sample(
    model,
    prompts,
    *,
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    batch_size=128,
) -> list[list[int]]:
    """Sample one response a prompt (token id lists), from the unmodified distribution at ``temperature``.

    Responses end with ``end_id`` unless they ran into ``max_new_tokens``. The random state of the caller is kept.
    """
    settings = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=end_id, pad_token_id=pad_id,
    )  # fmt: skip
    out: list[list[int]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for rows in _batches([len(p) for p in prompts], batch_size):
            ids, mask = collate([prompts[i] for i in rows], pad_id, side="left")
            made = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
            for i, response in zip(rows, made[:, ids.shape[1] :].tolist(), strict=True):
                out[i] = response[: response.index(end_id) + 1] if end_id in response else response
    return out


@torch.inference_mode()
def rewards(reward_model, prompts, responses, *, pad_id: int, batch_size: int = 64) -> np.ndarray:
    """Scalar reward of each response (token id lists), read at its last token: float64 [responses]."""
    reward_model.config.get_text_config().pad_token_id = pad_id
    out = np.zeros(len(responses))
    for rows in _batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], batch_size):
        ids, mask = collate([prompts[i] + responses[i] for i in rows], pad_id)
        device = reward_model.device
        logits = reward_model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        out[rows] = logits[:, 0].double().cpu().numpy()
    return out


@torch.inference_mode()
def interpolate(base, aligned, share: float) -> None:
    """Move a model back towards its base, in place: every weight becomes base + ``share`` × (aligned - base).

    Raises ModelError when their weights differ in name or shape.
    """
    start = dict(base.named_parameters())
    if {n: w.shape for n, w in start.items()} != {n: w.shape for n, w in aligned.named_parameters()}:
        raise ModelError("base and aligned have weights of other names or shapes: they are not of one architecture")
    for name, weight in aligned.named_parameters():
        weight.copy_(torch.lerp(start[name], weight, share))


def random_adapter(adapter: str | Path, folder: str | Path, *, seed: int = 0) -> None:
    """A LoRA adapter of random direction and the same size: every module's update keeps its Frobenius norm.

    What an instrument finds between a base and this is what any change of that size looks like. Raises ModelError if
    the folder holds no LoRA adapter.
    """
    adapter, folder = Path(adapter), Path(folder)
    try:
        weights = load_file(adapter / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{adapter} holds no adapter_model.safetensors to randomise: {error}") from error
    draw = torch.Generator().manual_seed(seed)
    for name in [n for n in sorted(weights) if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        a, b = (torch.randn(weights[n].shape, generator=draw) for n in (name, other))
        size = (weights[other].float() @ weights[name].float()).norm() / (b @ a).norm().clamp(min=1e-12)
        weights[name] = (a * size.sqrt()).to(weights[name].dtype).contiguous()
        weights[other] = (b * size.sqrt()).to(weights[other].dtype).contiguous()
    save_file(weights, folder / "adapter_model.safetensors")
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
