"""The two models of an audit: loaded, checked, and brought to one vocabulary and one text format."""

import copy
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from alignlens import models, study
from alignlens.audit.requests import Request, public
from alignlens.core.errors import AuditError
from alignlens.preferences import Encoded, Formatter

GIVE = "give the base that the aligned model was trained from"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
CHECKED = 8  # answers on which two models with the same weights must agree to be called identical
# What a configuration says besides how the model computes: names, places, training, sampling, and what is seen anyway.
SILENT = re.compile(r"_.*|.*(dropout|token_id|dtype|version|initializer\w*)|architectures|use_cache|vocab_size|tie_\w+")


@dataclass
class Side:
    """One of the two models, as given and as loaded."""

    name: str
    model: object
    tokenizer: object

    @cached_property
    def weights_hash(self) -> str:
        """16 hex digits of names, shapes and bytes of all weights, an adapter merged."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
            digest.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def facts(self) -> dict:
        config = self.model.config.get_text_config()
        return {
            "name": self.name, "revision": getattr(self.model.config, "_commit_hash", None),
            "weights": self.weights_hash, "architecture": type(self.model).__name__,
            "layers": config.num_hidden_layers, "d_model": config.hidden_size,
            "parameters": sum(p.numel() for p in self.model.parameters()), "vocabulary": self.rows,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }  # fmt: skip

    @property
    def rows(self) -> int:
        """How many tokens the model has embeddings for."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048


def sources(request: Request, toys: study.Study | None) -> list[tuple[str, str, str | None]]:
    """(name, model, adapter) of base and aligned model. An adapter may stand in ``adapter`` or in ``aligned``.

    Raises AlignlensError for what is no model, before any weights are loaded."""
    aligned, adapter, folder = request.aligned, request.adapter, Path(request.aligned).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        if adapter:
            raise AuditError(f"aligned {public(aligned)!r} is an adapter and -p adapter is given too: give one")
        aligned, adapter = request.base, str(folder)
    found = []
    for source, own in ((request.base, None), (aligned, adapter)):
        name = public(source) + (f" + {public(own)}" if own else "")
        if source.startswith("tiny:"):
            toy = _toy(source, toys)
            if own and toy.adapter:
                raise AuditError(f"{source!r} is an adapter on its base already: give either it or -p adapter")
            source, own = toy.model, own or toy.adapter
        models.describe(source, trust_remote_code=request.trust_remote_code)
        found.append((name, source, own))
    return found


def _toy(source: str, toys: study.Study):
    """Where the weights of a shipped toy model such as tiny:llama:dpo:1 are."""
    parts = source.split(":")[1:]
    family, method, seed, *rest = [*parts, *["base", "0"][len(parts) - 1 :]]
    if rest or family not in toys.families or method not in ["base", *toys.methods] or not seed.isdigit():
        known = f"tiny:{'|'.join(toys.families)}, or that and :{'|'.join(toys.methods)}"
        raise AuditError(f"{source!r} is no shipped toy model: give {known}")
    return toys.source(study.Variant(family, method, int(seed)))


def load(found: list[tuple[str, str, str | None]], request: Request, device: str) -> tuple[Side, Side, list[str]]:
    """Base, aligned model, and notes. Their weights must have the same names and, but for tokens that were added, the
    same shapes: AuditError."""
    options = {"device": device, "trust_remote_code": request.trust_remote_code}
    base, aligned = (Side(name, *models.load(source, adapter, **options)) for name, source, adapter in found)
    base.facts, aligned.facts = base.facts, aligned.facts  # as given: the base may change below
    notes = [*models.notes(base.model), *models.notes(aligned.model)]
    if base.rows != aligned.rows and type(base.model) is type(aligned.model):
        notes.append(f"The base has embeddings for {base.rows} tokens, the aligned model for {aligned.rows}.")
        _resize(base.model, aligned.rows)
    if _tied(base.model) and not _tied(aligned.model):
        head = base.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.model.config.get_text_config().tie_word_embeddings = base.model.config.tie_word_embeddings = False
    one, other = (
        {"the model": type(side.model).__name__}
        | {f"weight {name}": tuple(weight.shape) for name, weight in side.model.state_dict().items()}
        for side in (base, aligned)
    )
    for name in (name for name in one | other if one.get(name) != other.get(name)):
        raise AuditError(f"{name} is {one.get(name)} in the base and {other.get(name)} in the aligned model: {GIVE}")
    return base, aligned, notes


def _tied(model) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def _resize(model, rows: int) -> None:
    """Cut off the last embeddings, or add some that are the mean of the others: what is known of an unseen token."""
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if values is not None and rows > before:
                values[before:] = values[:before].mean(0)


def differing(base: Side, aligned: Side) -> dict[str, tuple]:
    """Settings of the configurations that may change what a model computes and differ: name -> (base, aligned)."""
    one, other = (side.model.config.get_text_config().to_dict() for side in (base, aligned))
    names = [name for name in one | other if not SILENT.fullmatch(name) and one.get(name) != other.get(name)]
    return {name: (one.get(name), other.get(name)) for name in names}


def identical(base: Side, aligned: Side, encoded: Encoded, pad_id: int) -> bool:
    """Whether both have the same weights and give the same log-probabilities: a configuration may differ as well."""
    if base.facts["weights"] != aligned.facts["weights"]:
        return False
    few = (encoded.prompt_ids[:CHECKED], encoded.chosen_ids[:CHECKED])
    one, other = (models.response_logprobs(side.model, *few, pad_id=pad_id) for side in (base, aligned))
    return bool((one == other).all())


def one_format(base: Side, aligned: Side, pairs, request: Request) -> tuple[Formatter, Encoded, list[str]]:
    """One formatter for both models, the encoded pairs, and harmless differences of the tokenizers.

    The aligned model's tokenizer and, if it has one, its chat template are taken, since they are in use. Where both
    tokenizers know a token they must mean the same by it, and both must cut the real texts alike: AuditError."""
    context = min(base.context, aligned.context)
    limit = request.max_length or min(1024, context)
    if limit > context:
        raise AuditError(f"max_length is {limit}, the models take {context} tokens: lower it")
    tokenizer, notes = copy.deepcopy(aligned.tokenizer), []
    if base.context != aligned.context:
        notes.append(f"The base takes {base.context} tokens, the aligned model {aligned.context}: the smaller holds.")
    if base.tokenizer.chat_template != tokenizer.chat_template and request.template != "plain":
        read = f"both models were read in {'the aligned model' if tokenizer.chat_template else 'the base'}'s format."
        notes.append(f"The two tokenizers have different chat templates (or only one has any): {read}")
    tokenizer.chat_template = tokenizer.chat_template or base.tokenizer.chat_template
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
    """Notes on tokens that differ harmlessly. AuditError if one means something else: only added tokens may be renamed
    or moved, and the latter only if no pair uses them."""
    words, theirs = base.get_vocab(), aligned.get_vocab()
    names, added = {place: token for token, place in theirs.items()}, base.added_tokens_decoder
    moved = [token for token, place in words.items() if theirs.get(token, place) != place]
    other = [token for token, place in words.items() if token not in theirs]
    both = (
        added.keys() & aligned.added_tokens_decoder.keys() | added.keys() - names.keys()
    )  # or gone without a successor
    wrong = [token for token in moved + other if words[token] not in both or theirs.get(token) in used]
    if wrong:
        raise AuditError(f"the tokenizers differ in {len(wrong)} of {len(words)} tokens, {wrong[0]!r} first: {GIVE}")
    renamed = [f"{t} is {names[words[t]]}" for t in other if words[t] in names]
    more = len(theirs.keys() - words.keys()) - len(renamed)
    notes = [f"{more} tokens are only in the aligned model's tokenizer, which was used for both."] if more > 0 else []
    if renamed:
        notes.append(f"{len(renamed)} added tokens have other names in the aligned model's tokenizer: {renamed[0]}.")
    return notes


def _same_pieces(base, aligned, pairs) -> None:
    """AuditError if the tokenizers cut a text of the pairs differently, unless it holds a token that one has alone."""
    own = set(base.get_added_vocab()) ^ set(aligned.get_added_vocab())
    alone = re.compile("|".join(map(re.escape, own)) or r"(?!)")
    texts = [text for name in ("prompt", "chosen", "rejected") for text in pairs[name] if not alone.search(text)]
    for start in range(0, len(texts), 1024):
        part = texts[start : start + 1024]
        one, other = (t(part, add_special_tokens=False, verbose=False)["input_ids"] for t in (base, aligned))
        if wrong := next((text for text, a, b in zip(part, one, other, strict=True) if a != b), None):
            raise AuditError(f"the two tokenizers turn {wrong[:40]!r} into different ids: {GIVE}")
