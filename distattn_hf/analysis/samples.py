"""Turn text into model inputs, find padding and separators, and compute a loss to judge changes by."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.discovery import argument_names
from ..data.batches import label_loss, length_for, pad_rows, query_mask, shift_right
from ..data.tasks import TASKS, text_task_of
from ..evaluation.score import EvaluationOptions, embed, first_sentence_pairs
from .watch import forward

# Inverse temperature of the loss of embeddings, as in sentence-transformers.
_SCALE = 20.0


@dataclass(frozen=True)
class AnalysisOptions(EvaluationOptions):
    """`EvaluationOptions`, silent: max_length in tokens per text, max_tokens in total, texts per batch, the seed of
    masked positions, and pooling of an encoder's embeddings."""

    progress: bool = False


def check_texts(texts) -> list[str]:
    """Return the texts that are not blank; raises `ValueError` if there is none, or for anything but strings."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if invalid := [t for t in texts if not isinstance(t, str)]:
        raise ValueError(f"texts must be strings, got {type(invalid[0]).__name__}")
    nonblank = [text for text in texts if text.strip()]
    if not nonblank:
        raise ValueError(f"text is empty: give at least one text with a word in it, got {texts[:3]!r}")
    return nonblank


def make_batches(model, tokenizer, texts, options: AnalysisOptions | None = None) -> list[dict[str, Tensor]]:
    """Make padded batches of one text per row, in the order of the texts, until max_tokens are used up.

    Encoder-decoders get each text as source and as target. Raises `ValueError` for no text, no tokenizer, or text
    without tokens.
    """
    options = options or AnalysisOptions()
    texts = check_texts(texts)
    if tokenizer is None:
        raise ValueError(f"{type(model).__name__} has no tokenizer files, so it cannot read text")
    length = length_for(model, options.max_length)
    rows, num_tokens = [], 0
    for text in texts:
        if num_tokens >= options.max_tokens:
            break
        ids = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
        if ids:
            rows.append(ids)
            num_tokens += len(ids)
    if not rows:
        raise ValueError(f"text is empty: the tokenizer makes no token of {texts[0][:40]!r}")
    pad = tokenizer.pad_token_id
    return [_padded(model, rows[i : i + options.batch_size], pad) for i in range(0, len(rows), options.batch_size)]


def _padded(model, rows: list[list[int]], pad: int | None) -> dict[str, Tensor]:
    batch = pad_rows(rows, pad)
    if model.config.is_encoder_decoder:
        mask = batch["attention_mask"]
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        batch |= {"decoder_input_ids": shift_right(model, labels), "decoder_attention_mask": mask}
    if "attention_mask" not in argument_names(type(model)):
        del batch["attention_mask"]
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def padding_of(model, call, batch: dict) -> tuple[Tensor, Tensor]:
    """Return masks of the queries (B, N) and keys (B, M) of a call that are not padding; all True if unknown."""
    size, _, num_queries, num_keys = call.shape
    is_cross, encoder_decoder = call.kind == "cross", model.config.is_encoder_decoder
    queries = query_mask(call.name, is_cross, batch, encoder_decoder)
    keys = batch.get("attention_mask") if is_cross else queries

    def checked(mask, length):
        if mask is None or mask.dim() != 2 or mask.shape[-1] != length:
            return torch.ones(size, length, dtype=torch.bool, device=call.query.device)
        return mask.bool().expand(size, length)

    return checked(queries, num_queries), checked(keys, num_keys)


def key_ids(model, call, batch: dict) -> Tensor | None:
    """Return the token ids (B, M) of a call's keys; None where they are not tokens of the batch."""
    decoder = model.config.is_encoder_decoder and call.kind == "self" and "decoder" in call.name
    ids = batch.get("decoder_input_ids" if decoder else "input_ids")
    return ids if ids is not None and ids.shape[-1] == call.shape[3] else None


class SeparatorFinder:
    """Finds separators: special tokens, and those without a letter or digit (punctuation, line ends)."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, dict.fromkeys(tokenizer.all_special_ids, True)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return which of the ids (B, M) are separators, bool (B, M)."""
        for token in set(ids.unique().tolist()) - set(self.known):
            text = self.tokenizer.decode([token])
            self.known[token] = bool(text.strip()) and not any(character.isalnum() for character in text)
        flags = [[self.known[token] for token in row] for row in ids.tolist()]
        return torch.tensor(flags, dtype=torch.bool, device=ids.device).view(ids.shape)


def token_texts(tokenizer, ids) -> list[str]:
    """Return the readable text of each token."""
    return [tokenizer.decode([int(i)]).strip() or repr(tokenizer.decode([int(i)]))[1:-1] or "·" for i in ids]


class TextLoss:
    """The loss of a model on texts, by its head: next token, masked tokens, target given source, or, for an encoder
    without a head, finding each text's second part among all by its first (in-batch contrast, scale 20).

    Called with a model it yields the mean loss in nats, one tensor with a gradient per batch:
    `for loss, weight in TextLoss(...)(model)`, weights summing to 1.

    Raises `ValueError` where the texts do not allow one: masked tokens without a mask token, fewer than two pairs.
    """

    def __init__(self, model, tokenizer, texts, options: AnalysisOptions | None = None):
        self.options = options = options or AnalysisOptions()
        self.task, self.tokenizer = text_task_of(model), tokenizer
        texts = check_texts(texts)
        self.pairs, self.batches = [], []
        if self.task == "embedding":
            self.pairs = first_sentence_pairs(texts)[: max(2, options.max_tokens // 256)]
            if len(self.pairs) < 2:
                raise ValueError(
                    "an encoder without a head has no loss on fewer than two texts of two or more sentences, got "
                    f"{len(self.pairs)}"
                )
            return
        generator = torch.Generator().manual_seed(options.seed)
        for batch in make_batches(model, tokenizer, texts, options):
            labels = self._labels(batch, generator)
            if bool((labels != -100).any()):
                self.batches.append((batch, labels))
        if not self.batches:
            raise ValueError("the text holds no token that a loss could be taken of")

    def _labels(self, batch: dict, generator) -> Tensor:
        """Return labels (B, N) aligned with the logits; -100 is ignored. Masks tokens of masked models in `batch`."""
        ids = batch["input_ids"]
        padding = batch["attention_mask"] == 0 if "attention_mask" in batch else torch.zeros_like(ids).bool()
        labels = ids.masked_fill(padding, -100)
        if TASKS[self.task].shifted:
            return F.pad(labels[:, 1:], (0, 1), value=-100)
        if self.task == "seq2seq":
            return labels
        if self.tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token, which a masked language model's loss needs")
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids, device=ids.device))
        masked = (torch.rand(ids.shape, generator=generator).to(ids.device) < 0.15) & ~special & ~padding
        if not bool(masked.any()):
            # A short text may have no masked token.
            masked = (~special & ~padding) & ((~special & ~padding).cumsum(-1) == 1)
        batch["input_ids"] = ids.masked_fill(masked, self.tokenizer.mask_token_id)
        return labels.masked_fill(~masked, -100)

    def __call__(self, model):
        if self.task == "embedding":
            yield self._contrast(model), 1.0
            return
        total = sum(int((labels != -100).sum()) for _, labels in self.batches)
        for batch, labels in self.batches:
            count = int((labels != -100).sum())
            logits = forward(model, batch).logits
            yield label_loss(logits.flatten(0, 1), labels, count), count / total

    def _contrast(self, model) -> Tensor:
        options = EvaluationOptions(self.options.max_length, progress=False, pooling=self.options.pooling)
        queries, passages = (embed(model, self.tokenizer, [pair[i] for pair in self.pairs], options) for i in (0, 1))
        target = torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(_SCALE * queries @ passages.T, target)

    @torch.no_grad()
    def value(self, model) -> float:
        """Return the mean loss over all texts."""
        return sum(float(loss) * weight for loss, weight in self(model))


class LabelLoss:
    """The loss of a model on batches with labels, whatever its head and inputs (pixels, sound): the model's own.

    Called as `TextLoss` is. batches: arguments of the model, `labels` among them (-100 is ignored); raises `ValueError`
    where one has none.
    """

    def __init__(self, batches: Iterable[dict]):
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches is empty: give at least one batch with labels")
        for batch in self.batches:
            if batch.get("labels") is None or not bool((batch["labels"] != -100).any()):
                raise ValueError(f"every batch must have labels, got one with {', '.join(batch)}")

    def __call__(self, model):
        counts = [int((batch["labels"] != -100).sum()) for batch in self.batches]
        for batch, count in zip(self.batches, counts, strict=True):
            yield forward(model, batch).loss, count / sum(counts)

    @torch.no_grad()
    def value(self, model) -> float:
        """Return the mean loss over all labels."""
        return sum(float(loss) * weight for loss, weight in self(model))
