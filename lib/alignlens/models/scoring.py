"""Score and sample responses: log-probabilities, KL, rewards. Prompts and responses are lists of token ids."""

from contextlib import nullcontext

import numpy as np
import torch
from transformers import GenerationConfig

from alignlens.core.errors import ModelError
from alignlens.preferences import collate


def batches(lengths, size: int) -> list[np.ndarray]:
    """Index batches of similar length, longest first, so that a batch that does not fit in memory fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[first : first + size] for first in range(0, len(order), size)]


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
    """Summed log-probability of each response given its prompt: float64 [responses], in nats."""

    def score(prompts, responses):
        logits, targets, valid = _response_logits(model, prompts, responses, pad_id)
        return (token_logprobs(logits, targets) * valid).sum(1)

    return _by_batch(score, prompts, responses, batch_size)


@torch.inference_mode()
def response_kl(model, prompts, responses, *, pad_id: int, reference=None, batch_size: int = 64) -> np.ndarray:
    """KL(model || reference) of each response, summed over its tokens: float64 [responses], in nats.

    Exact at each token (over the whole vocabulary), so on responses sampled from ``model`` the mean is an unbiased,
    low-variance estimate of the KL between the two response distributions. Without ``reference`` the model must carry
    an adapter: the adapter switched off is the reference. Raises ModelError if there is neither."""
    if reference is None and not hasattr(model, "disable_adapter"):
        raise ModelError("response_kl: give a reference, or a model with an adapter that can be switched off")

    def score(prompts, responses):
        logits, _, valid = _response_logits(model, prompts, responses, pad_id)
        with model.disable_adapter() if reference is None else nullcontext():
            other = _response_logits(model if reference is None else reference, prompts, responses, pad_id)[0]
        return (token_kl(logits, other) * valid).sum(1)

    return _by_batch(score, prompts, responses, batch_size)


@torch.inference_mode()
def rewards(reward_model, prompts, responses, *, pad_id: int, batch_size: int = 64) -> np.ndarray:
    """Scalar reward of each response, read at its last token: float64 [responses]."""
    reward_model.config.get_text_config().pad_token_id = pad_id

    return _by_batch(lambda p, r: _forward(reward_model, p, r, pad_id)[0][:, 0], prompts, responses, batch_size)


@torch.inference_mode()
def sample(
    model, prompts, *, end_id: int, pad_id: int, max_new_tokens: int, seed: int, batch_size: int = 128
) -> list[list[int]]:
    """Sample one response a prompt, from the model's unmodified distribution.

    Responses end with ``end_id`` unless they ran into ``max_new_tokens``. The random state of the caller is kept."""
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, eos_token_id=end_id,
        pad_token_id=pad_id,
    )  # fmt: skip
    out: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for rows in batches([len(p) for p in prompts], batch_size):
            ids, mask = (t.to(model.device) for t in collate([prompts[i] for i in rows], pad_id, side="left"))
            made = model.generate(ids, attention_mask=mask, generation_config=settings)
            for i, response in zip(rows, made[:, ids.shape[1] :].tolist(), strict=True):
                out[i] = response[: response.index(end_id) + 1] if end_id in response else response
    return out


def _by_batch(score, prompts, responses, size) -> np.ndarray:
    """``score(prompts, responses)`` of each batch, in the order of the responses: float64 [responses]."""
    out = np.zeros(len(responses))
    for rows in batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], size):
        out[rows] = score([prompts[i] for i in rows], [responses[i] for i in rows]).double().cpu().numpy()
    return out


def _forward(model, prompts, responses, pad_id):
    """Logits and token ids of one batch."""
    ids, mask = collate([p + r for p, r in zip(prompts, responses, strict=True)], pad_id)
    ids = ids.to(model.device)
    return model(input_ids=ids, attention_mask=mask.to(model.device)).logits, ids


def _response_logits(model, prompts, responses, pad_id):
    """Logits that predict each response token, targets and mask, of one batch: [rows, longest response(, vocab)]."""
    logits, ids = _forward(model, prompts, responses, pad_id)
    starts, lengths = (torch.tensor([len(x) for x in xs], device=ids.device)[:, None] for xs in (prompts, responses))
    offsets = torch.arange(max(map(len, responses)), device=ids.device)
    where = (starts + offsets).clamp(max=ids.shape[1] - 1)
    picked = logits.gather(1, (where - 1)[..., None].expand(-1, -1, logits.shape[-1]))
    return picked.float(), ids.gather(1, where), offsets < lengths
