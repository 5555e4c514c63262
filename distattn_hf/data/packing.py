"""Pack texts end to end into rows of one length."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORED = -100


def start_tokens(tokenizer, texts: Iterable[str]) -> list[int]:
    """Return the special tokens that a causal model expects before a text ([BOS] of Llama and Gemma), often none.

    They are those that the tokenizer puts before the first of `texts` that has a token, without BERT's [CLS], which is
    for bidirectional models. Raises `ValueError` for a tokenizer that reads a text differently with special tokens.
    """
    for text in texts:
        # The beginning is enough, and a book would take long.
        text = text.strip()[:200]
        text_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not text_ids:
            continue
        full_ids = tokenizer(text, verbose=False)["input_ids"]
        for offset in range(len(full_ids) - len(text_ids) + 1):
            if full_ids[offset : offset + len(text_ids)] == text_ids:
                cls = None if tokenizer.cls_token_id == tokenizer.bos_token_id else tokenizer.cls_token_id
                return [token for token in full_ids[:offset] if token != cls]
        raise ValueError(
            f"{type(tokenizer).__name__} turns {text[:40]!r} into other tokens with special tokens than without, so "
            "its texts cannot be packed end to end; give tokenised batches"
        )
    return []


def token_stream(tokenizer, texts, count: int) -> list[int]:
    """Return at least `count` tokens of the texts end to end, an end token after each; fewer if there are no more."""
    stream: list[int] = []
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        if len(stream) >= count:
            break
    return stream


def pack(tokenizer, texts, max_length: int, max_tokens: int) -> tuple[Tensor, int]:
    """Return token ids (rows, max_length or fewer) of the texts end to end, and the number of `start_tokens` in a row.

    Raises `ValueError` for fewer than two tokens.
    """
    start, stream = start_tokens(tokenizer, texts), token_stream(tokenizer, texts, max_tokens)
    length = len(start) + min(max_length - len(start), len(stream))
    if length <= len(start) or length < 2:
        raise ValueError(
            f"the data holds {len(stream)} tokens, and max_length={max_length} with {len(start)} before each row; a "
            "row needs one, and two in all"
        )
    rows = islice(cut_rows([stream], length, start), max(1, max_tokens // length))
    return torch.tensor(list(rows)), len(start)


def cut_rows(documents: Iterable[list[int]], length: int, start: Sequence[int]) -> Iterator[list[int]]:
    """Yield rows of exactly `length` tokens: `start`, then the documents end to end; the rest at the end is dropped."""
    buffer: list[int] = []
    count, size = 0, length - len(start)
    for document in documents:
        buffer += document
        position = 0
        while len(buffer) - position >= size:
            yield [*start, *buffer[position : position + size]]
            position, count = position + size, count + 1
        del buffer[:position]
    logger.info(
        f"Packed {count} rows of {length} tokens; the last {len(buffer)} tokens do not fill one and are dropped."
    )


def end_token(tokenizer) -> list[int]:
    """Return the tokens that separate one text from the next: the end token, or none if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        logger.warning("The tokenizer has no end token, so nothing separates one text from the next.")
        return []
    return [tokenizer.eos_token_id]


def tokenise_documents(batch, *, tokenizer, column, start, end, max_length):
    """Tokenise to start tokens + text + end token; with a max_length, truncate to it and add labels."""
    ids = tokenizer(list(batch[column]), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [(start + row + end)[:max_length] for row in ids]
    if max_length is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "labels": [_labels_of(row, start) for row in ids]}


def _labels_of(row: list[int], start: Sequence[int]) -> list[int]:
    """Return the tokens as labels, with the first of a row and its start tokens ignored: neither is predicted."""
    first = max(1, len(start))
    return [IGNORED] * len(row[:first]) + row[first:]


def packed(kind: type, documents, max_length: int, argument: str, limit: int | None, start: list[int]):
    """Return a data set of class `kind` with the packed rows of `documents`."""
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    # `from_generator` would take a list for shards, so `start` is a tuple.
    options = {"documents": documents, "length": max_length, "limit": limit, "start": tuple(start)}
    if len(start) >= max_length or next(_packed_rows(**options), None) is None:
        raise ValueError(
            f"{argument} holds fewer than max_length={max_length} tokens, which fill no row; lower it, or set "
            "packing=False"
        )
    return kind.from_generator(_packed_rows, features=Features({"input_ids": ids, "labels": ids}), gen_kwargs=options)


def _packed_rows(documents, length: int, limit: int | None, start: tuple[int, ...]) -> Iterator[dict]:
    for row in islice(cut_rows((document["input_ids"] for document in documents), length, start), limit):
        yield {"input_ids": row, "labels": _labels_of(row, start)}
