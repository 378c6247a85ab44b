"""Train a tiny base from scratch: its tokenizer, its configuration, its weights."""

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from alignlens.core.errors import ModelError
from alignlens.models.session import quietly
from alignlens.preferences import Formatter, collate

ARCHITECTURES = ("llama", "qwen3", "smollm3")
CONTEXT = 128  # tokens at most

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts, *, vocab_size: int, bos: bool) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts, lossless on any text, with a two-role chat template.

    ``bos`` puts a begin-of-text token before every conversation, as the Llama family does and the others do not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    begin = "<|begin|>" if bos else ""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", bos_token=begin or None,
        extra_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
        chat_template=begin + TEMPLATE,
    )  # fmt: skip


def pretrain(
    folder: Path, architecture: str, texts: list[tuple[str, str]], *, layers: int, d_model: int, vocab_size: int,
    steps: int, batch_size: int, learning_rate: float, seed: int,
) -> dict:  # fmt: skip
    """Train a tiny base from scratch on (prompt, response) texts and save it, weights in half precision.

    Next-token loss on prompts and responses alike; AdamW, 5 % warm-up, cosine decay to a tenth. ``texts`` are read in
    random order, each at most once an epoch.
    Returns dict: parameters, steps, tokens, loss (mean of the last 5 %), curve (list of [step, loss])."""
    if architecture not in ARCHITECTURES:
        raise ModelError(f"architecture {architecture!r} has no tiny base; choose one of {', '.join(ARCHITECTURES)}")
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(map("\n".join, texts[:20_000]), vocab_size=vocab_size, bos=architecture == "llama")
    format = Formatter(tokenizer, max_length=CONTEXT)
    config = transformers.AutoConfig.for_model(  # grouped-query attention, tied embeddings
        architecture, vocab_size=len(tokenizer), hidden_size=d_model, intermediate_size=8 * d_model // 3,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=d_model // 4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    twentieth = max(1, steps // 20)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, twentieth, steps, min_lr_rate=0.1)
    sequences = [format.prompt_ids(p) + format.response_ids(p, r) for p, r in texts]
    order = np.random.default_rng(seed).permutation(len(sequences))
    losses, tokens = [], 0
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
        losses.append(loss.item())
    with quietly():
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    every = max(1, steps // 50)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "tokens": tokens,
        "loss": float(np.mean(losses[-twentieth:])),
        "curve": [[end, float(np.mean(losses[end - every : end]))] for end in range(every, steps + 1, every)],
    }  # fmt: skip
