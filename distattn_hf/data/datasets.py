"""Turn text, pictures and sound into data sets and a collator for `Trainer` or a plain training loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import (
    Dataset,
    IterableDataset,
)
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .batches import length_for
from .config import is_integer
from .features import collate_features, feature_rows
from .rows import (
    LABEL_COLUMNS,
    SOURCE_COLUMNS,
    TARGET_COLUMNS,
    WORD_COLUMNS,
    WORD_LABEL_COLUMNS,
    Job,
    collator_for,
    rows_for,
)
from .sources import ALLOWED, find_data
from .tasks import TASKS

logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes rows; for `transformers.HfArgumentParser`.

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
            if not (value is None and optional) and not is_integer(value, least):
                raise ValueError(f"{name} must be an integer >= {least}{' or None' if optional else ''}, got {value!r}")
        if not isinstance(self.mlm_probability, int | float) or not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be in (0, 1], got {self.mlm_probability!r}")
        for name in ("train_data", "eval_data"):
            value = getattr(self, name)
            if value == "" or not isinstance(value, str | Path | None):
                raise ValueError(f"{name} must be {ALLOWED}, got {value!r}")
        if self.streaming and self.num_proc is not None:
            raise ValueError(f"num_proc must be None with streaming=True (it reads as it goes), got {self.num_proc}")

    def limit_of(self, argument: str) -> int | None:
        """Return how many rows of "train_data" or "eval_data" are used at most, None for all."""
        return self.max_train_samples if argument == "train_data" else self.max_eval_samples


@dataclass
class TaskData:
    """Rows of token ids (or of pictures, or sound) and the collator that batches them.

    train, evaluation: `Dataset`, or `IterableDataset` when streaming; evaluation is None if there is no such data.
    collator: list of rows -> dict of tensors (B, N); rows of the evaluation set go through the same one.
    label_names: names of the classes in the order of their ids, None where the labels have no names.
    """

    train: Dataset | IterableDataset
    evaluation: Dataset | IterableDataset | None
    collator: Callable[[list[dict]], dict[str, torch.Tensor]]
    label_names: list[str] | None = None


def build_data(
    arguments: DataArguments, task: str, tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig
) -> TaskData:
    """Build training and evaluation rows of `task` for a model of `model_config`, and their collator.

    causal-lm: packed rows of exactly max_length tokens, text + end token end to end; only the last, incomplete row of
    each split is lost. Without packing (text + end token)[:max_length], padded by the collator, labels -100 there. A
    row begins as the tokenizer begins a text: with [BOS], where it adds one. The labels are the tokens, which the model
    shifts; the first of a row, which nothing predicts, is -100: transformers' Trainer divides the loss of some models
    (GPT-2) by the number of all labels, and would report it too low.
    masked-lm: one text per row; the collator masks training rows anew each time (torch's global generator), evaluation
    rows are masked once, by seed and row number, whatever the batch size.
    seq2seq: source -> "input_ids", target -> "labels", -100 at padding.
    sequence-classification: "labels" (B,) from integers or names; floats for a model with num_labels=1.
    token-classification: "labels" (B, N): a word's label at its first piece, -100 elsewhere.
    embedding: one text per row, no labels.
    image-classification, audio-classification, speech-recognition: see `features.feature_rows`; `tokenizer` is a
    processor of transformers there, None where the rows hold the model's own inputs.

    Empty texts are left out. Rows keep the order of the data, also when streaming. A missing padding token
    becomes the end token for causal-lm (the tokenizer is changed, with a warning).

    Raises:
        ValueError: an unknown task, no tokenizer, data that is not found, is empty, or lacks the column or the split,
            labels that do not fit num_labels, a tokenizer without padding token or with ids beyond the vocabulary.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    reads_text, max_length = TASKS[task].inputs == "text", arguments.max_length
    if reads_text:
        if tokenizer is None:
            raise ValueError("tokenizer must be given: the data is text, got None")
        _check_model(task, model_config)
        _check_vocabulary(tokenizer, model_config)
        _check_padding(tokenizer, task, arguments)
        max_length = _clamped_length(arguments, tokenizer, model_config)
        _check_packing(max_length, task, arguments)
    job = Job(arguments, task, tokenizer, model_config, max_length)
    splits = zip(("train_data", "eval_data"), find_data(arguments))
    read, collator = (rows_for, collator_for(job)) if reads_text else (feature_rows, collate_features)
    rows = [None if data is None else read(job, data, name) for name, data in splits]
    return TaskData(*rows, collator, job.label_names)


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


def _check_packing(max_length: int, task: str, arguments) -> None:
    if arguments.packing and task == "causal-lm" and max_length % (arguments.pad_to_multiple_of or 1):
        raise ValueError(
            f"pad_to_multiple_of must divide max_length={max_length} with packing=True, whose rows are not padded; "
            f"got {arguments.pad_to_multiple_of}"
        )


def row_length(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> int:
    """Return the largest number of tokens in a row: max_length, or the limit of model or tokenizer if smaller."""
    allowed = length_for(SimpleNamespace(config=_text_config(model_config)), arguments.max_length)
    return int(min(allowed, tokenizer.model_max_length))


def _clamped_length(arguments, tokenizer, config) -> int:
    requested, allowed = arguments.max_length, row_length(arguments, tokenizer, config)
    if allowed < requested:
        logger.warning(f"max_length={requested} is more than model and tokenizer have room for; {allowed} is used.")
    return allowed


def _text_config(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_tokenizers(model, tokenizer, other=None) -> None:
    """Raise `ValueError` for a tokenizer with more tokens than `model`, or with another vocabulary than `other`."""
    rows = model.get_input_embeddings().weight.shape[0]
    if (count := len(tokenizer)) > rows:
        raise ValueError(f"tokenizer has {count} tokens but {type(model).__name__} embeds {rows}: not its tokenizer")
    if other is None:
        return
    vocabulary, reference = tokenizer.get_vocab(), other.get_vocab()
    if vocabulary != reference:
        different = next(
            token for token in sorted({*vocabulary, *reference}) if vocabulary.get(token) != reference.get(token)
        )
        raise ValueError(
            "teacher and student have tokenizers with different vocabularies "
            f"({len(vocabulary)} and {len(reference)} tokens): {different!r} is "
            f"{vocabulary.get(different)} and {reference.get(different)}"
        )


def check_data(name: str, dataset) -> None:
    """Raise `ValueError` for a data set without examples, streamed or not."""
    if dataset is None:
        raise ValueError(f"{name} must be a data set, got None")
    empty = len(dataset) == 0 if hasattr(dataset, "__len__") else next(iter(dataset), None) is None
    if empty:
        raise ValueError(f"{name} is empty: it holds no example (is every text shorter than what is asked for?)")
