"""The two models of an audit: loaded, checked, and brought to one vocabulary and one text format."""

import copy
import hashlib
import re
from pathlib import Path

import torch

from alignlens import models, study
from alignlens.audit.requests import IDS, Request, public, toys
from alignlens.core.errors import AuditError
from alignlens.preferences import Encoded, Formatter

GIVE = "give the base that the aligned model was trained from"
CHECKED = 8  # answers on which two models with the same weights must agree to be called identical
# What a configuration says besides how the model computes: names, places, training, sampling, and what is seen anyway.
SILENT = re.compile(r"_.*|.*(dropout|token_id|dtype|version|initializer\w*)|architectures|use_cache|vocab_size|tie_\w+")


class Side:
    """One of the two models, as loaded; facts and weights_hash, 16 hex digits of all weights, are of it as given."""

    def __init__(self, name: str, model, tokenizer):
        self.model, self.tokenizer, digest = model, tokenizer, hashlib.sha256()
        for key, weight in sorted(model.state_dict().items()):
            digest.update(f"{key} {tuple(weight.shape)} {weight.dtype} ".encode())
            digest.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        self.weights_hash, self.config = digest.hexdigest()[:16], model.config.get_text_config()
        self.context = getattr(self.config, "max_position_embeddings", None) or 2048  # most tokens of a sequence
        self.facts = {
            "name": name, "revision": getattr(model.config, "_commit_hash", None), "weights": self.weights_hash,
            "architecture": type(model).__name__, "layers": self.config.num_hidden_layers,
            "d_model": self.config.hidden_size, "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": self.rows, "dtype": str(model.dtype).removeprefix("torch."),
        }  # fmt: skip

    @property
    def rows(self) -> int:
        """How many tokens the model has embeddings for."""
        return self.model.get_input_embeddings().weight.shape[0]


def sources(request: Request) -> list[tuple[str, str, str | None]]:
    """(name, model, adapter) of base and aligned model, which may be an adapter. AlignlensError for what is no model,
    before any weights are loaded."""
    aligned, adapter, folder = request.aligned, request.adapter, Path(request.aligned).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        if adapter:
            raise AuditError(f"aligned {public(aligned)!r} is an adapter and -p adapter is given too: give one")
        aligned, adapter = request.base, str(folder)
    found = []
    for source, own in ((request.base, None), (aligned, adapter)):
        name = public(source) + (f" + {public(own)}" if own else "")
        if source.startswith("tiny:"):
            toy = _toy(source, toys())
            if own and toy.adapter:
                raise AuditError(f"{source!r} is an adapter on its base already: give either it or -p adapter")
            source, own = toy.model, own or toy.adapter
        models.describe(source, trust_remote_code=request.trust_remote_code)
        found.append((name, source, own))
    return found


def _toy(source: str, known: study.Study):
    """Where the weights of a shipped toy model such as tiny:llama:dpo:1 are."""
    parts = source.split(":")[1:]
    family, method, seed, *rest = [*parts, *["base", "0"][len(parts) - 1 :]]
    if rest or family not in known.families or method not in ["base", *known.methods] or not seed.isdigit():
        names = f"tiny:{'|'.join(known.families)}, or that and :{'|'.join(known.methods)}"
        raise AuditError(f"{source!r} is no shipped toy model: give {names}")
    return known.source(study.Variant(family, method, int(seed)))


def load(found: list[tuple[str, str, str | None]], request: Request, device: str) -> tuple[Side, Side, list[str]]:
    """Base, aligned model, and notes. AuditError unless names and, but for added tokens, shapes of weights agree."""
    options = {"device": device, "trust_remote_code": request.trust_remote_code}
    base, aligned = (Side(name, *models.load(source, adapter, **options)) for name, source, adapter in found)
    notes = [*models.notes(base.model), *models.notes(aligned.model)]
    if base.rows != aligned.rows and type(base.model) is type(aligned.model):
        notes.append(f"The base has embeddings for {base.rows} tokens, the aligned model for {aligned.rows}.")
        _resize(base.model, aligned.rows)
    if tied(base.model) and not tied(aligned.model):
        head = base.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = base.model.config.tie_word_embeddings = False
    weights = (side.model.state_dict().items() for side in (base, aligned))
    shapes = [{f"weight {name}": tuple(weight.shape) for name, weight in items} for items in weights]
    kinds = [{"the model": side.facts["architecture"]} for side in (base, aligned)]
    for name, (one, other) in (_unlike(*kinds) | _unlike(*shapes)).items():
        raise AuditError(f"{name} is {one} in the base and {other} in the aligned model: {GIVE}")
    return base, aligned, notes


def _unlike(one: dict, other: dict) -> dict[str, tuple]:
    """What differs, by key."""
    return {key: (one.get(key), other.get(key)) for key in one | other if one.get(key) != other.get(key)}


def tied(model) -> bool:
    """Whether embedding and head are one weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def _resize(model, rows: int) -> None:
    """Cut off the last embeddings, or add some that are the mean of the others: what is known of an unseen token."""
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in layer.parameters():
            values[before:] = values[:before].mean(0)


def differing(base: Side, aligned: Side) -> dict[str, tuple]:
    """Settings of the configurations that may change what a model computes and differ: name -> (base, aligned)."""
    unlike = _unlike(base.config.to_dict(), aligned.config.to_dict())
    return {name: values for name, values in unlike.items() if not SILENT.fullmatch(name)}


def identical(base: Side, aligned: Side, encoded: Encoded, pad_id: int) -> bool:
    """Whether both have the same weights and give the same log-probabilities: a configuration may differ as well."""
    if base.facts["weights"] != aligned.facts["weights"]:
        return False
    few = (encoded.prompt_ids[:CHECKED], encoded.chosen_ids[:CHECKED])
    one, other = (models.response_logprobs(side.model, *few, pad_id=pad_id) for side in (base, aligned))
    return bool((one == other).all())


def one_format(base: Side, aligned: Side, pairs, request: Request) -> tuple[Formatter, Encoded, list[str]]:
    """One formatter for both models, the encoded pairs, and harmless differences of the tokenizers.

    The aligned model's tokenizer and chat template are taken, since they are in use. Tokens that both know must mean
    the same, and the pairs' texts must become the same tokens: AuditError."""
    context, notes = min(base.context, aligned.context), []
    if (limit := request.max_length or min(1024, context)) > context:
        raise AuditError(f"max_length is {limit}, the models take {context} tokens: lower it")
    if base.context != aligned.context:
        notes.append(f"The base takes {base.context} tokens, the aligned model {aligned.context}: the smaller holds.")
    tokenizer, template = copy.deepcopy(aligned.tokenizer), base.tokenizer.chat_template
    if template != tokenizer.chat_template and request.template != "plain":
        read = f"both models were read in {'the aligned model' if tokenizer.chat_template else 'the base'}'s format."
        notes.append(f"The two tokenizers have different chat templates (or only one has any): {read}")
    tokenizer.chat_template = tokenizer.chat_template or template
    format = Formatter(tokenizer, max_length=limit, template=request.template)
    encoded = format.encode_pairs(pairs)
    used = {token for lists in IDS for ids in getattr(encoded, lists) for token in ids}
    notes += _vocabularies(base.tokenizer, tokenizer, used)
    _same_pieces(base.tokenizer, tokenizer, pairs[encoded.kept])
    if unseen := sorted(token for token in used if token >= base.facts["vocabulary"]):
        names = ", ".join(tokenizer.convert_ids_to_tokens(unseen[:5]))
        notes.append(f"The base never saw {len(unseen)} tokens of the format ({names}): it was given mean embeddings.")
    return format, encoded, notes


def _vocabularies(base, aligned, used: set[int]) -> list[str]:
    """Notes on added tokens with other names or, if no pair uses them, places. AuditError for any other difference."""
    words, theirs = base.get_vocab(), aligned.get_vocab()
    names, added = {place: token for token, place in theirs.items()}, base.added_tokens_decoder
    moved = [token for token, place in words.items() if theirs.get(token, place) != place]
    other = [token for token in words if token not in theirs]
    both = added.keys() & (aligned.added_tokens_decoder.keys() | added.keys() - names.keys())  # or gone: no successor
    wrong = [token for token in moved + other if words[token] not in both or theirs.get(token) in used]
    if wrong:
        raise AuditError(f"the tokenizers differ in {len(wrong)} of {len(words)} tokens, {wrong[0]!r} first: {GIVE}")
    renamed = [f"{t} is {names[words[t]]}" for t in other if words[t] in names]
    count, more = len(renamed), len(theirs.keys() - words.keys()) - len(renamed)
    notes = [f"{more} tokens are only in the aligned model's tokenizer, which was used for both."] * (more > 0)
    other = f"{count} added tokens have other names in the aligned model's tokenizer: {', '.join(renamed[:1])}."
    return notes + [other] * bool(renamed)


def _same_pieces(base, aligned, pairs) -> None:
    """AuditError if the tokenizers cut a text of the pairs differently, unless it holds a token that one has alone."""
    own = set(base.get_added_vocab()) ^ set(aligned.get_added_vocab())
    alone = re.compile("|".join(map(re.escape, own)) or r"(?!)")
    texts = [text for name in ("prompt", "chosen", "rejected") for text in pairs[name] if not alone.search(text)]
    for part in (texts[start : start + 1024] for start in range(0, len(texts), 1024)):
        one, other = (t(part, add_special_tokens=False, verbose=False)["input_ids"] for t in (base, aligned))
        for text in (text for text, a, b in zip(part, one, other, strict=True) if a != b):
            raise AuditError(f"the two tokenizers turn {text[:40]!r} into different ids: {GIVE}")
