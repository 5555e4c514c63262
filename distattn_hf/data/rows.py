"""Turn texts, pairs and labels of a data set into rows of token ids, and choose the collators that batch them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import (
    ClassLabel,
    Dataset,
    IterableDataset,
)
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    default_data_collator,
)
from transformers.utils import logging

from .packing import IGNORED, end_token, packed, start_tokens, tokenise_documents

logger = logging.get_logger(__name__)


# Default column names, by what the column holds.
SOURCE_COLUMNS = ("source", "input", "document", "article", "text")
TARGET_COLUMNS = ("target", "output", "summary", "title")
LABEL_COLUMNS = ("label", "labels")
WORD_COLUMNS = ("tokens", "words")
WORD_LABEL_COLUMNS = ("labels", "ner_tags", "pos_tags", "tags")


@dataclass
class Job:
    """Arguments that all steps of one build_data call share; label_names is set from the training data."""

    # DataArguments
    arguments: Any
    task: str
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    max_length: int
    label_names: list[str] | None = None


# Columns


def first_row(dataset, argument: str, arguments, why: str = "") -> dict:
    """Return the first row of a data set; raises `ValueError`, which calls it `argument`, if it holds none."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{argument} {str(getattr(arguments, argument) or arguments.train_data)!r} holds no rows{why}")
    return row


def column_of(first: dict, argument: str, given: str | None, names: tuple[str, ...]) -> str:
    """Return the column `given`, or the first of `names` that the data has; raises `ValueError` if absent."""
    for name in (given,) if given is not None else names:
        if name in first:
            return name
    expected = repr(given) if given is not None else f"one of {', '.join(names)}"
    raise ValueError(f"{argument} must name a column of the data, {list(first)}; looked for {expected}")


def _text_column(dataset, first: dict, given: str | None) -> str:
    if given is None and "text" not in first:
        types = dataset.features or {}
        strings = [n for n in first if getattr(types.get(n), "dtype", None) in ("string", "large_string")]
        strings = strings or [name for name, value in first.items() if isinstance(value, str)]
        given = strings[0] if len(strings) == 1 else None
    return column_of(first, "text_column", given, ("text",))


def _without_empty(job: Job, dataset, columns: list[str], argument: str):
    """Return the rows whose columns all hold text (or a list of words)."""
    filtered = dataset.filter(
        _holds_text, fn_kwargs={"columns": columns}, batched=True, input_columns=columns, **workers_of(job, dataset)
    )
    first_row(filtered, argument, job.arguments, f" with anything in {', '.join(columns)}")
    if isinstance(filtered, Dataset) and len(filtered) < len(dataset):
        logger.warning(f"{argument}: {len(dataset) - len(filtered)} rows without anything in {columns} are left out.")
    return filtered


def _holds_text(*values: list, columns: list[str]) -> list[bool]:
    for name, column in zip(columns, values, strict=True):
        invalid = next((v for v in column if v is not None and not isinstance(v, str | list)), None)
        if invalid is not None:
            raise ValueError(f"column {name!r} must hold text, got {invalid!r} of type {type(invalid).__name__}")
    return [all(v.strip() if isinstance(v, str) else v for v in row) for row in zip(*values, strict=True)]


def workers_of(job: Job, dataset) -> dict[str, Any]:
    """Return the options of `map` and `filter` that say how many processes work, which streams do not take."""
    return {"num_proc": job.arguments.num_proc} if isinstance(dataset, Dataset) else {}


def first_rows(dataset, count: int):
    """Return the first `count` rows of a data set, streamed or not, or all where it holds fewer."""
    streamed = isinstance(dataset, IterableDataset)
    return dataset.take(count) if streamed else dataset.select(range(min(count, len(dataset))))


# Rows


def rows_for(job: Job, dataset, argument: str):
    """Return the data set of token ids for one split."""
    arguments = job.arguments
    limit = arguments.limit_of(argument)
    first = first_row(dataset, argument, arguments)
    training = argument == "train_data"
    function, columns, options = _READERS[job.task](job, dataset, first, training)
    options |= {"tokenizer": job.tokenizer, "max_length": job.max_length}
    dataset = _without_empty(job, dataset, columns, argument)
    packing = job.task == "causal-lm" and arguments.packing
    start: list[int] = []
    if job.task == "causal-lm":
        start = start_tokens(job.tokenizer, (row[columns[0]] for row in dataset))
        options["end"] = end_token(job.tokenizer)
        # With packing, each row begins with the start tokens; otherwise each text does.
        options |= {"start": [], "max_length": None} if packing else {"start": start}
    if limit is not None and not packing:
        dataset = first_rows(dataset, limit)
    # A stream without features only shows its columns in its first row.
    names = list(dataset.features or first)
    kind = type(dataset)
    if packing and limit is not None and arguments.num_proc is None and kind is Dataset:
        # Lazily, so that no more is tokenised than the rows need.
        dataset = dataset.to_iterable_dataset()
    workers = workers_of(job, dataset)
    rows = dataset.map(function, batched=True, batch_size=100, remove_columns=names, fn_kwargs=options, **workers)
    if packing:
        return packed(kind, rows, job.max_length, argument, limit, start)
    if job.task == "masked-lm" and not training:
        collator = _MaskingCollator(job.tokenizer, mlm_probability=arguments.mlm_probability)
        # By row number, so that neither batches nor processes change a mask.
        return rows.map(
            _mask_row,
            with_indices=True,
            fn_kwargs={"collator": collator, "seed": arguments.seed},
            **workers_of(job, rows),
        )
    return rows


# For each task: the function that tokenises a batch, the columns that must not be empty, and its options.


def _read_texts(job: Job, dataset, first: dict, training: bool):
    column = _text_column(dataset, first, job.arguments.text_column)
    return _tokenise_texts, [column], {"column": column}


def _read_documents(job: Job, dataset, first: dict, training: bool):
    _, columns, options = _read_texts(job, dataset, first, training)
    return tokenise_documents, columns, options


def _read_labelled(job: Job, dataset, first: dict, training: bool):
    _, columns, options = _read_texts(job, dataset, first, training)
    label_column = column_of(first, "label_column", job.arguments.label_column, LABEL_COLUMNS)
    return _tokenise_labelled, columns, {**options, **label_options(job, dataset, label_column, training)}


def _read_words(job: Job, dataset, first: dict, training: bool):
    column = column_of(first, "text_column", job.arguments.text_column, WORD_COLUMNS)
    label_column = column_of(first, "label_column", job.arguments.label_column, WORD_LABEL_COLUMNS)
    if not getattr(job.tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer must be a fast one for task {job.task!r} (it aligns words), got {type(job.tokenizer).__name__}"
        )
    return _tokenise_words, [column], {"column": column, **label_options(job, dataset, label_column, training)}


def _read_pairs(job: Job, dataset, first: dict, training: bool):
    columns = pair_columns(first, job.arguments)
    if columns[0] == columns[1]:
        raise ValueError(f"target_column must differ from source_column, got {columns[1]!r} for both")
    return _tokenise_pairs, columns, {"columns": columns}


_READERS = {
    "causal-lm": _read_documents,
    "seq2seq": _read_pairs,
    "masked-lm": _read_texts,
    "sequence-classification": _read_labelled,
    "token-classification": _read_words,
    "embedding": _read_texts,
}


def pair_columns(first: dict, arguments) -> list[str]:
    """Return the source and target columns of sequence-to-sequence data."""
    return [
        column_of(first, "source_column", arguments.source_column, SOURCE_COLUMNS),
        column_of(first, "target_column", arguments.target_column, TARGET_COLUMNS),
    ]


def _tokenise_texts(batch, *, tokenizer, column, max_length):
    return dict(tokenizer(list(batch[column]), truncation=True, max_length=max_length))


def _tokenise_pairs(batch, *, tokenizer, columns, max_length):
    sources, targets = (list(batch[name]) for name in columns)
    return dict(tokenizer(sources, text_target=targets, truncation=True, max_length=max_length))


def _tokenise_labelled(batch, *, tokenizer, column, max_length, label_column, ids, num_labels):
    rows = _tokenise_texts(batch, tokenizer=tokenizer, column=column, max_length=max_length)
    rows["labels"] = [label_of(value, label_column, ids, num_labels) for value in batch[label_column]]
    return rows


def _tokenise_words(batch, *, tokenizer, column, max_length, label_column, ids, num_labels):
    rows = tokenizer(list(batch[column]), is_split_into_words=True, truncation=True, max_length=max_length)
    labels = []
    for index, (words, values) in enumerate(zip(batch[column], batch[label_column], strict=True)):
        if not isinstance(values, list):
            raise ValueError(f"label_column {label_column!r} must hold a list of labels, got {values!r}")
        if len(words) != len(values):
            raise ValueError(
                f"{label_column!r} must have one label for each word of {column!r}, got {len(values)} for {len(words)} "
                f"words: {list(words)[:8]}"
            )
        word_labels = [
            value if value == IGNORED else label_of(value, label_column, ids, num_labels) for value in values
        ]
        word_ids = rows.word_ids(index)
        starts = (word is not None and word != previous for previous, word in zip([None, *word_ids], word_ids))
        labels.append([word_labels[word] if start else IGNORED for start, word in zip(starts, word_ids, strict=True)])
    return {**rows, "labels": labels}


def _mask_row(row: dict, index: int, *, collator: "_MaskingCollator", seed: int) -> dict:
    collator.generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    inputs, labels = collator.torch_mask_tokens(torch.tensor([row["input_ids"]]))
    collator.generator = None
    return {"input_ids": inputs[0].tolist(), "labels": labels[0].tolist()}


# Labels


def label_options(job: Job, dataset, column: str, training: bool) -> dict[str, Any]:
    """Return {"label_column", "ids", "num_labels"}; "ids" maps this data set's values to ids, None if they are ids."""
    num_labels = job.model_config.num_labels
    feature = (dataset.features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    own_names = list(feature.names) if isinstance(feature, ClassLabel) else None
    of_model = _model_labels(job.model_config)
    if training:
        # A model that knows these classes, in any order, keeps its ids.
        job.label_names = of_model if own_names is None or set(own_names) <= set(of_model or ()) else own_names
        if own_names is None and of_model is None and getattr(feature, "dtype", None) in ("string", "large_string"):
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"label_column {column!r} holds names, and streaming=True cannot collect them first; give the "
                    "model's config label2id and id2label, or set streaming=False"
                )
            job.label_names = _names_in(dataset, column)
    names = job.label_names
    options = {"label_column": column, "ids": None, "num_labels": num_labels}
    if names is not None and len(names) > num_labels:
        raise ValueError(
            f"label_column {column!r} has {len(names)} classes ({', '.join(names[:8])}), but the model's num_labels is "
            f"{num_labels}; load the model with num_labels={len(names)}"
        )
    if own_names is not None and names is not None:
        id_of_name = {name: index for index, name in enumerate(names)}
        if unknown := [name for name in own_names if name not in id_of_name]:
            raise ValueError(f"label_column {column!r} has classes that the training data lacks: {unknown}")
        options["ids"] = {index: id_of_name[name] for index, name in enumerate(own_names)}
    elif getattr(feature, "dtype", None) in ("string", "large_string"):
        options["ids"] = {name: index for index, name in enumerate(names or [])}
    return options


def _model_labels(config) -> list[str] | None:
    """Return the class names in the model's config, None if they are the LABEL_0, LABEL_1, ... of a fresh head."""
    names = [config.id2label[i] for i in sorted(config.id2label)] if getattr(config, "id2label", None) else []
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else [str(name) for name in names]


def _names_in(dataset: Dataset, column: str) -> list[str]:
    label_names = set()
    for value in dataset.unique(column) if not isinstance(dataset[0][column], list) else dataset[column]:
        label_names.update(value if isinstance(value, list) else [value])
    return sorted(name for name in label_names if name is not None)


def label_of(value, column: str, ids: dict | None, num_labels: int):
    """Return the id of a label (a float for num_labels=1); raises `ValueError` for one that is no class."""
    if ids is not None:
        if value not in ids:
            raise ValueError(f"label_column {column!r} must hold one of {', '.join(map(str, ids))}, got {value!r}")
        return ids[value]
    if num_labels == 1 and isinstance(value, int | float):
        return float(value)
    if not isinstance(value, int) or not 0 <= value < num_labels:
        raise ValueError(
            f"label_column {column!r} must hold integers from 0 to {num_labels - 1} (the model's num_labels is "
            f"{num_labels}), got {value!r}"
        )
    return int(value)


# Collators


class _MaskingCollator(DataCollatorForLanguageModeling):
    """transformers' masking collator, which only pads rows that already have labels."""

    def torch_call(self, examples):
        if "labels" in examples[0]:
            pad = DataCollatorForTokenClassification(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
            return dict(pad(examples))
        return super().torch_call(examples)


def collator_for(job: Job):
    tokenizer, multiple = job.tokenizer, job.arguments.pad_to_multiple_of
    if job.task == "causal-lm" and job.arguments.packing:
        return default_data_collator
    if job.task == "masked-lm":
        return _MaskingCollator(tokenizer, mlm_probability=job.arguments.mlm_probability, pad_to_multiple_of=multiple)
    if job.task in ("causal-lm", "seq2seq"):
        # It pads given labels with -100 and does not change them otherwise, so the end token is learned;
        # DataCollatorForLanguageModeling would ignore it where it is also the padding token.
        return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
    if job.task == "token-classification":
        return DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=multiple)
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)


def training_texts(dataset, arguments, task: str) -> Iterator[str]:
    """Yield the training texts, for a tokenizer to learn from: both columns of sequence-to-sequence data."""
    first = first_row(dataset, "train_data", arguments)
    pairs = task == "seq2seq"
    columns = pair_columns(first, arguments) if pairs else [_text_column(dataset, first, arguments.text_column)]
    return (row[name] for row in dataset for name in columns if isinstance(row[name], str) and row[name].strip())
