"""Score a model on text, by the metric of its head, and measure how close it stays to its teacher."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..conversion.calibrate_nystrom import exact_span
from ..data.batches import forward_inputs, label_loss, length_for, longest_row
from ..data.config import is_integer
from ..data.packing import pack
from ..data.tasks import TASKS, text_task_of
from ..storage.pooling import POOLINGS

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EvaluationOptions:
    """max_length in tokens per row, max_tokens in total, rows per batch, the seed of masked positions, and the pooling
    of embeddings: "mean", "cls", "max" or "lasttoken" (see `read_pooling`)."""

    max_length: int = 512
    max_tokens: int = 8192
    batch_size: int = 4
    seed: int = 0
    progress: bool = True
    pooling: str = "mean"

    def __post_init__(self):
        check_pooling(self.pooling)
        for name in ("max_length", "max_tokens", "batch_size"):
            if not is_integer(value := getattr(self, name), 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_pooling(pooling: str) -> None:
    """Raise `ValueError` unless `pooling` is one of `POOLINGS`."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


@torch.no_grad()
def evaluate_model(
    model, tokenizer, texts, *, pairs=None, options: EvaluationOptions | None = None
) -> dict[str, float]:
    """Return the scores of `model` on `texts` as a dict of numbers, with the number of "texts" and "tokens" scored.

    causal-lm: "perplexity" and "loss" (nats per token) over rows of max_length tokens, text packed end to end, each
    row beginning as the tokenizer begins a text ([BOS], where it adds one; it is not counted).
    masked-lm: "loss" on 15% masked tokens, the same ones for every model under one seed.
    seq2seq: "loss" of each target given its source (`pairs`; each text as its own target without them).
    embedding: "retrieval_at_1" and "mrr": each query's own passage among all (`pairs`; without them the first sentence
    of each text is the query and the rest the passage), by cosine of embeddings pooled as set in the options.
    """
    options = options or EvaluationOptions()
    options = replace(options, max_length=length_for(model, options.max_length))
    task = text_task_of(model)
    model.eval()
    with warn_without_far_keys(model):
        if task == "embedding":
            pairs = pairs or first_sentence_pairs(texts)
            if len(pairs) < 2:
                raise ValueError(f"retrieval needs at least 2 texts of two or more sentences, got {len(pairs)}")
            queries, passages = (embed(model, tokenizer, [pair[side] for pair in pairs], options) for side in (0, 1))
            return {**retrieval_scores(queries, passages), "texts": len(pairs)}
        if task == "seq2seq":
            sums, num_texts = _read_pairs(model, tokenizer, pairs or [(text, text) for text in texts], options)
        else:
            sums, num_texts = (_read_packed if task == "causal-lm" else _read_masked)(model, tokenizer, texts, options)
    scores = sums.scores()
    return {"loss": scores["loss"], "perplexity": scores["perplexity"], "texts": num_texts, "tokens": sums.count}


def describe_scores(kind: str, scores: dict[str, float], pooling: str = "mean") -> str:
    """Describe scores of `evaluate_model` in a sentence: how many texts and tokens, and how they are scored."""
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
    """Warn on exit where a Nyström model has read no batch longer than the span that it attends to exactly."""
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
    """Return the mean cosine between the two models' embeddings of the same texts, pooled as set in the options."""
    options = options or EvaluationOptions()
    embeddings, teacher_embeddings = (embed(encoder, tokenizer, texts, options) for encoder in (model, teacher))
    return float((embeddings * teacher_embeddings).sum(-1).mean())


@torch.no_grad()
def score_model(
    model, task: str, data, tokenizer, *, pairs=None, pooling: str = "mean", batch_size: int = 8, progress: bool = True
) -> dict[str, float]:
    """Return the scores of `model` on the held-out rows of `data`, a `TaskData`, as means over labels.

    Loss and perplexity (language models), accuracy and F1 (classification), or retrieval of each pair's passage by its
    query (encoders, `pooling` as in `EvaluationOptions`). Raises `ValueError` where there is no evaluation data, or
    none with labels.
    """
    model.eval()
    if task == "embedding":
        options = EvaluationOptions(progress=progress, pooling=pooling)
        scores = evaluate_model(model, tokenizer, [], pairs=pairs, options=options)
        return {name: value for name, value in scores.items() if name != "texts"}
    if data.evaluation is None:
        raise ValueError("a scorecard needs evaluation data: set eval_data, or a split that data has")
    loader = DataLoader(data.evaluation, batch_size=batch_size, collate_fn=data.collator)
    sums = TokenScores(task)
    with warn_without_far_keys(model):
        for batch in tqdm(loader, desc="score", leave=False, disable=not progress):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits = model(**forward_inputs(model, batch)).logits
            if logits.shape[-1] == 1:
                raise ValueError("regression heads have no accuracy; a scorecard needs a classifier")
            sums.add(logits, batch["labels"])
    return sums.scores()


class TokenScores:
    """Sums over the labels of a task other than -100: cross-entropy in nats, and how many were the likeliest class.

    Of classifiers also how often each class was taken for each: `confusion` (C, C), a row a label.
    """

    def __init__(self, task: str):
        self.task, self.total, self.correct, self.count = TASKS[task], 0.0, 0, 0
        self.confusion: Tensor | int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add the logits (..., classes) and labels (...) of one batch, aligned as the task needs."""
        if self.task.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        keep = labels != -100
        logits, labels = logits[keep], labels[keep].to(logits.device)
        self.total += float(label_loss(logits, labels, 1))
        taken = logits.argmax(-1)
        self.correct += int((taken == labels).sum())
        self.count += len(labels)
        if self.task.metric == "accuracy":
            classes = logits.shape[-1]
            pairs = torch.bincount(labels * classes + taken, minlength=classes**2)
            self.confusion = self.confusion + pairs.view(classes, classes).cpu()

    def scores(self) -> dict[str, float]:
        """Return "loss", "accuracy" and, for language models, "perplexity", for classifiers "f1".

        f1: mean of 2·TP / (2·TP + FP + FN) over the classes that occur among labels or answers (macro).

        Raises `ValueError` without labels.
        """
        if not self.count:
            raise ValueError(f"the data holds no label that counts for task {self.task.name!r}")
        values = {"loss": self.total / self.count, "accuracy": self.correct / self.count}
        if self.task.metric == "perplexity":
            values["perplexity"] = math.exp(min(values["loss"], 80.0))
        if self.task.metric == "accuracy":
            # Of a class TP + FP is its column, TP + FN its row.
            size = self.confusion.sum(0) + self.confusion.sum(1)
            values["f1"] = float((2 * self.confusion.diagonal() / size)[size > 0].double().mean())
        return values


def compare_models(
    models: dict[str, tuple],
    texts,
    options: EvaluationOptions | None = None,
    poolings: dict[str, str] | None = None,
) -> dict[str, dict]:
    """Score several models on the same texts; `models` is {name: (model, tokenizer)}, the teacher last.

    Each uses its own tokenizer and, if `poolings` names one, its own pooling; two models also get
    "ratio" (perplexity over the teacher's) or, for encoders, "embedding_cosine" with the teacher. Raises `ValueError`
    when they have different kinds of heads.
    """
    kinds = {name: text_task_of(model) for name, (model, _) in models.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the models have different heads: {kinds}")
    for name, (_, tokenizer) in models.items():
        if tokenizer is None:
            raise ValueError(f"{name!r} has no tokenizer files, so it cannot read text")
    options, poolings = options or EvaluationOptions(), poolings or {}
    by_name = {name: replace(options, pooling=poolings.get(name, options.pooling)) for name in models}
    if len({entry.pooling for entry in by_name.values()}) > 1:
        used_poolings = ", ".join(f"{name} by {entry.pooling}" for name, entry in by_name.items())
        logger.warning(f"the models pool their embeddings in different ways: {used_poolings}")
    result = {name: evaluate_model(model, tok, texts, options=by_name[name]) for name, (model, tok) in models.items()}
    if len(models) == 2:
        (name, (model, tokenizer)), (teacher_name, (teacher, _)) = models.items()
        if kinds[name] == "embedding":
            with torch.no_grad():
                embeddings = embed(model, tokenizer, texts, by_name[name])
                teacher_embeddings = embed(teacher, tokenizer, texts, by_name[teacher_name])
            result[name]["embedding_cosine"] = float((embeddings * teacher_embeddings).sum(-1).mean())
            result[teacher_name]["embedding_cosine"] = 1.0
        else:
            result[name]["ratio"] = result[name]["perplexity"] / result[teacher_name]["perplexity"]
            result[teacher_name]["ratio"] = 1.0
    return result


def retrieval_scores(queries: Tensor, passages: Tensor) -> dict[str, float]:
    """Summarise `retrieval_ranks` by the share ranked first and the mean reciprocal rank."""
    ranks = retrieval_ranks(queries, passages)
    return {"retrieval_at_1": float((ranks == 1).float().mean()), "mrr": float((1 / ranks).mean())}


def retrieval_ranks(queries: Tensor, passages: Tensor, first: int = 0) -> Tensor:
    """Return the rank of passage first + i for query i among all passages, by dot product: (len(queries),).

    Passages that are not clearly worse rank ahead, so that embeddings that are all equal, or NaN, rank last, not first.
    """
    scores = queries @ passages.T
    own_scores = scores.gather(1, torch.arange(first, first + len(queries), device=scores.device)[:, None])
    return (~(scores < own_scores)).sum(-1)


def first_sentence_pairs(texts) -> list[tuple[str, str]]:
    """Return (first sentence, the rest) of each text that has both."""
    pairs = [text.split(". ", 1) for text in texts]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and pair[0].strip() and pair[1].strip()]


def embed(model, tokenizer, texts, options: EvaluationOptions) -> Tensor:
    """Return unit embeddings (len(texts), hidden size), pooled as set in the options, with gradients where wanted."""
    embeddings = []
    for start in _steps(range(0, len(texts), 8 * options.batch_size), "embed", options):
        batch = tokenizer(
            texts[start : start + 8 * options.batch_size],
            padding=True,
            truncation=True,
            max_length=min(options.max_length, 256),
            return_tensors="pt",
        ).to(model.device)
        hidden = model(**batch).last_hidden_state
        embeddings.append(F.normalize(_pool(hidden, batch["attention_mask"].bool(), options.pooling), dim=-1))
    return torch.cat(embeddings).float()


def _pool(hidden: Tensor, keep: Tensor, pooling: str) -> Tensor:
    """Pool the states (B, N, width) that are not padding to (B, width), for padding on either side."""
    if pooling == "mean":
        mask = keep[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)
    if pooling == "max":
        return hidden.masked_fill(~keep[..., None], -torch.inf).amax(1)
    token_number = keep.int().cumsum(-1)
    position = (token_number == 1 if pooling == "cls" else token_number == token_number[:, -1:]).int().argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


def _read_packed(model, tokenizer, texts, options) -> tuple[TokenScores, int]:
    rows, start = pack(tokenizer, texts, options.max_length, options.max_tokens)
    sums = TokenScores("causal-lm")
    for batch in _steps(rows.split(options.batch_size), "perplexity", options):
        batch = batch.to(model.device)
        # The start tokens are not part of the text.
        labels = batch.masked_fill(torch.arange(batch.shape[1], device=batch.device) < start, -100)
        sums.add(model(input_ids=batch).logits, labels)
    return sums, _texts_within(tokenizer, texts, rows[:, start:].numel())


def _texts_within(tokenizer, texts, tokens: int) -> int:
    """Return how many of the texts, packed end to end, the first `tokens` tokens reach into."""
    end_length = int(tokenizer.eos_token_id is not None)
    for count, text in enumerate(texts, 1):
        tokens -= len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + end_length
        if tokens <= 0:
            return count
    return len(texts)


def _read_masked(model, tokenizer, texts, options) -> tuple[TokenScores, int]:
    generator = torch.Generator().manual_seed(options.seed)
    sums = TokenScores("masked-lm")
    for start in _steps(range(0, len(texts), options.batch_size), "masked tokens", options):
        chunk = texts[start : start + options.batch_size]
        batch = tokenizer(
            chunk, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt",
            return_special_tokens_mask=True,
        )  # fmt: skip
        special = batch.pop("special_tokens_mask").bool()
        masked = (torch.rand(special.shape, generator=generator) < 0.15) & ~special
        labels = batch["input_ids"].masked_fill(~masked, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(masked, tokenizer.mask_token_id)
        sums.add(model(**batch.to(model.device)).logits, labels.to(model.device))
        if start * options.max_length > options.max_tokens:
            break
    if not sums.count:
        raise ValueError("the data holds no token that could be masked")
    return sums, min(len(texts), start + options.batch_size)


def _read_pairs(model, tokenizer, pairs, options) -> tuple[TokenScores, int]:
    sums = TokenScores("seq2seq")
    for start in _steps(range(0, len(pairs), options.batch_size), "targets", options):
        chunk = pairs[start : start + options.batch_size]
        source, target = (
            tokenizer(
                [p[i] for p in chunk], padding=True, truncation=True, max_length=options.max_length, return_tensors="pt"
            )
            for i in (0, 1)
        )
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100).to(model.device)
        sums.add(model(**source.to(model.device), labels=labels).logits, labels)
        if sums.count > options.max_tokens:
            break
    if not sums.count:
        raise ValueError("the data holds no target tokens")
    return sums, min(len(pairs), start + options.batch_size)


def _steps(iterable, description: str, options: EvaluationOptions):
    return tqdm(iterable, desc=description, disable=not options.progress, leave=False)
