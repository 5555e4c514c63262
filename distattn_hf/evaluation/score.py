"""How good a model is on text, by whatever its head allows, and how close it stays to its teacher."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..conversion.calibrate_nystrom import exact_span
from ..core.configuration_distattn import CLASS_PREFIX
from ..data.batches import length_for, longest_row, pack
from ..storage.pooling import POOLINGS

logger = logging.get_logger(__name__)

_KINDS = {
    "causal-lm": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
    "seq2seq": (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    ),
    "masked-lm": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING),
    "embedding": (modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_MAPPING),
}


@dataclass
class EvaluationOptions:
    """max_length in tokens a row, max_tokens in all, rows per batch, the seed of masked positions, and how embeddings
    are pooled: "mean", "cls", "max" or "lasttoken" (see `read_pooling`)."""

    max_length: int = 512
    max_tokens: int = 8192
    batch_size: int = 4
    seed: int = 0
    progress: bool = True
    pooling: str = "mean"

    def __post_init__(self):
        check_pooling(self.pooling)
        for name in ("max_length", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_pooling(pooling: str) -> None:
    """Raise `ValueError` for no pooling of `POOLINGS`."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def model_kind(model: PreTrainedModel) -> str:
    """One of "causal-lm", "seq2seq", "masked-lm" or "embedding", from the model's class: transformers' own, a converted
    one, or one registered with the Auto classes.

    Raises `ValueError` naming the class for any other head.
    """
    name = type(model).__name__.removeprefix(CLASS_PREFIX)
    for kind, (names, mapping) in _KINDS.items():
        listed = {n for value in names.values() for n in ((value,) if isinstance(value, str) else value)}
        if name in listed or mapping._extra_content.get(type(model.config)) is type(model):
            return kind
    raise ValueError(
        f"{type(model).__name__} has a head that cannot be evaluated on plain text; expected a causal, masked or "
        "sequence-to-sequence language model, or an encoder"
    )


@torch.no_grad()
def evaluate_model(
    model, tokenizer, texts, *, pairs=None, options: EvaluationOptions | None = None
) -> dict[str, float]:
    """Scores of `model` on `texts`, a dict of numbers, with how many "texts" and "tokens" they are of.

    causal-lm: "perplexity" and "loss" (nats per token) over rows of max_length tokens, text packed end to end, each
    row beginning as the tokenizer begins a text ([BOS], where it adds one; it is not counted).
    masked-lm: "loss" on 15% masked tokens, the same ones for every model under one seed.
    seq2seq: "loss" of each target given its source (`pairs`; each text as its own target without them).
    embedding: "retrieval_at_1" and "mrr": each query's own passage among all (`pairs`; without them the first sentence
    of each text is the query and the rest the passage), by cosine of embeddings pooled as the options say.
    """
    options = options or EvaluationOptions()
    options = replace(options, max_length=length_for(model, options.max_length))
    kind = model_kind(model)
    model.eval()
    with warn_without_far_keys(model):
        if kind == "embedding":
            pairs = pairs or first_sentence_pairs(texts)
            if len(pairs) < 2:
                raise ValueError(f"retrieval needs at least 2 texts of two or more sentences, got {len(pairs)}")
            queries, passages = (embed(model, tokenizer, [p[i] for p in pairs], options) for i in (0, 1))
            return {**retrieval_scores(queries, passages), "texts": len(pairs)}
        if kind == "seq2seq":
            loss, used = _sequence_loss(model, tokenizer, pairs or [(t, t) for t in texts], options)
        else:
            loss, used = (_causal_loss if kind == "causal-lm" else _masked_loss)(model, tokenizer, texts, options)
    return {"loss": loss, "perplexity": math.exp(min(loss, 80)), **used}


def describe_scores(kind: str, scores: dict[str, float], pooling: str = "mean") -> str:
    """What scores of `evaluate_model` are of, in a sentence: how many texts and tokens, and what is done with them."""
    texts, tokens = scores["texts"], scores.get("tokens", 0)
    return {
        "causal-lm": f"perplexity of {tokens:,} tokens, each given those before it in its row, from {texts:,} texts",
        "masked-lm": f"loss of {tokens:,} masked tokens, 15% of those in {texts:,} texts",
        "seq2seq": f"loss of {tokens:,} target tokens in {texts:,} texts, each its own target",
        "embedding": f"retrieval: the first sentence of each of {texts:,} texts finds the rest of that text among the "
        f"rests of all {texts:,}, by cosine of {pooling}-pooled embeddings",
    }[kind]


@contextmanager
def warn_without_far_keys(model):
    """Warn at the end where no batch that a Nyström model has read was longer than what it sees exactly."""
    span = exact_span(model) if hasattr(model, "attention_modules") else None
    longest = 0

    def note(module, arguments, inputs):
        nonlocal longest
        longest = max(longest, longest_row(inputs))

    handle = None if span is None else model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
    if span is not None and 0 < longest <= span:
        logger.warning(
            f"{type(model).__name__}: no text is longer than {longest} tokens, and up to {span} the model sees "
            "every key exactly (window and sinks, or exact_below): this is no test of its Nyström attention; take "
            "longer texts"
        )


@torch.no_grad()
def embedding_agreement(model, teacher, tokenizer, texts, options: EvaluationOptions | None = None) -> float:
    """Mean cosine between the two models' embeddings of the same texts, pooled as the options say."""
    options = options or EvaluationOptions()
    mine, theirs = (embed(m, tokenizer, texts, options) for m in (model, teacher))
    return float((mine * theirs).sum(-1).mean())


@torch.no_grad()
def compare_models(
    models: dict[str, tuple],
    texts,
    options: EvaluationOptions | None = None,
    poolings: dict[str, str] | None = None,
) -> dict[str, dict]:
    """Scores of several models on the same texts; `models` is {name: (model, tokenizer)}, the teacher last.

    Each is read with its own tokenizer and, where `poolings` names one, pooled in its own way; two models also get
    "ratio" (perplexity over the teacher's) or, for encoders, "embedding_cosine" with the teacher. Raises `ValueError`
    when they have different kinds of heads.
    """
    kinds = {name: model_kind(model) for name, (model, _) in models.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the models have different heads: {kinds}")
    for name, (_, tokenizer) in models.items():
        if tokenizer is None:
            raise ValueError(f"{name!r} has no tokenizer files, so it cannot read text")
    options, poolings = options or EvaluationOptions(), poolings or {}
    own = {name: replace(options, pooling=poolings.get(name, options.pooling)) for name in models}
    if len({chosen.pooling for chosen in own.values()}) > 1:
        said = ", ".join(f"{name} by {chosen.pooling}" for name, chosen in own.items())
        logger.warning(f"the models pool their embeddings in different ways: {said}")
    result = {name: evaluate_model(model, tok, texts, options=own[name]) for name, (model, tok) in models.items()}
    if len(models) == 2:
        (name, (model, tokenizer)), (teacher_name, (teacher, _)) = models.items()
        if kinds[name] == "embedding":
            mine = embed(model, tokenizer, texts, own[name])
            theirs = embed(teacher, tokenizer, texts, own[teacher_name])
            result[name]["embedding_cosine"] = float((mine * theirs).sum(-1).mean())
            result[teacher_name]["embedding_cosine"] = 1.0
        else:
            result[name]["ratio"] = result[name]["perplexity"] / result[teacher_name]["perplexity"]
            result[teacher_name]["ratio"] = 1.0
    return result


def retrieval_scores(queries: Tensor, passages: Tensor) -> dict[str, float]:
    """`retrieval_ranks` in two numbers: the share ranked first, and the mean reciprocal rank."""
    ranks = retrieval_ranks(queries, passages)
    return {"retrieval_at_1": float((ranks == 1).float().mean()), "mrr": float((1 / ranks).mean())}


def retrieval_ranks(queries: Tensor, passages: Tensor, first: int = 0) -> Tensor:
    """Rank of passage first + i for query i among all passages, by dot product: (len(queries),).

    Whatever is not clearly worse ranks ahead, so that embeddings that are all equal, or NaN, come last and not first.
    """
    scores = queries @ passages.T
    own = scores.gather(1, torch.arange(first, first + len(queries), device=scores.device)[:, None])
    return (~(scores < own)).sum(-1)


def first_sentence_pairs(texts) -> list[tuple[str, str]]:
    """(first sentence, the rest) of each text that has both."""
    pairs = [text.split(". ", 1) for text in texts]
    return [(p[0], p[1]) for p in pairs if len(p) == 2 and p[0].strip() and p[1].strip()]


def embed(model, tokenizer, texts, options: EvaluationOptions) -> Tensor:
    """Unit embeddings (len(texts), hidden size), pooled as the options say."""
    found = []
    for start in _steps(range(0, len(texts), 8 * options.batch_size), "embed", options):
        batch = tokenizer(
            texts[start : start + 8 * options.batch_size],
            padding=True,
            truncation=True,
            max_length=min(options.max_length, 256),
            return_tensors="pt",
        ).to(model.device)
        hidden = model(**batch).last_hidden_state
        found.append(F.normalize(_pool(hidden, batch["attention_mask"].bool(), options.pooling), dim=-1))
    return torch.cat(found).float()


def _pool(hidden: Tensor, keep: Tensor, pooling: str) -> Tensor:
    """(B, width) of the states (B, N, width) that are no padding, wherever the padding is."""
    if pooling == "mean":
        mask = keep[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)
    if pooling == "max":
        return hidden.masked_fill(~keep[..., None], -torch.inf).amax(1)
    count = keep.int().cumsum(-1)
    place = (count == 1 if pooling == "cls" else count == count[:, -1:]).int().argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def _causal_loss(model, tokenizer, texts, options) -> tuple[float, dict]:
    rows, start = pack(tokenizer, texts, options.max_length, options.max_tokens)
    # The first token has nothing before it, and how a text starts is no part of the text.
    first = max(start, 1)
    total = 0.0
    for batch in _steps(rows.split(options.batch_size), "perplexity", options):
        batch = batch.to(model.device)
        logits = model(input_ids=batch).logits[:, first - 1 : -1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, first:].flatten(), reduction="sum"))
    count = rows[:, first:].numel()
    return total / count, {"texts": _texts_within(tokenizer, texts, rows[:, start:].numel()), "tokens": count}


def _texts_within(tokenizer, texts, tokens: int) -> int:
    """How many of the texts, packed end to end, so many tokens begin."""
    end = int(tokenizer.eos_token_id is not None)
    for number, text in enumerate(texts, 1):
        tokens -= len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + end
        if tokens <= 0:
            return number
    return len(texts)


def _masked_loss(model, tokenizer, texts, options) -> tuple[float, dict]:
    generator = torch.Generator().manual_seed(options.seed)
    total, count = 0.0, 0
    for start in _steps(range(0, len(texts), options.batch_size), "masked tokens", options):
        chunk = texts[start : start + options.batch_size]
        batch = tokenizer(
            chunk, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt",
            return_special_tokens_mask=True,
        )  # fmt: skip
        special = batch.pop("special_tokens_mask").bool()
        masked = (torch.rand(special.shape, generator=generator) < 0.15) & ~special
        labels = batch["input_ids"][masked].to(model.device)
        batch["input_ids"] = batch["input_ids"].masked_fill(masked, tokenizer.mask_token_id)
        logits = model(**batch.to(model.device)).logits[masked.to(model.device)].float()
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
        if start * options.max_length > options.max_tokens:
            break
    if count == 0:
        raise ValueError("the data holds no token that could be masked")
    return total / count, {"texts": min(len(texts), start + options.batch_size), "tokens": count}


def _sequence_loss(model, tokenizer, pairs, options) -> tuple[float, dict]:
    total, count = 0.0, 0
    for start in _steps(range(0, len(pairs), options.batch_size), "targets", options):
        chunk = pairs[start : start + options.batch_size]
        source, target = (
            tokenizer(
                [p[i] for p in chunk], padding=True, truncation=True, max_length=options.max_length, return_tensors="pt"
            )
            for i in (0, 1)
        )
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100).to(model.device)
        logits = model(**source.to(model.device), labels=labels).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
        if count > options.max_tokens:
            break
    if count == 0:
        raise ValueError("the data holds no target tokens")
    return total / count, {"texts": min(len(pairs), start + options.batch_size), "tokens": count}


def _steps(iterable, description: str, options: EvaluationOptions):
    return tqdm(iterable, desc=description, disable=not options.progress, leave=False)
