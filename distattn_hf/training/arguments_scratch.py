"""The YAML config for training a model of the native family from scratch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..core.configuration_native import DistAttnConfig, DistAttnSeq2SeqConfig
from ..data.config import is_integer, override, parse_kinds, read_mapping, refuse_unknown
from ..data.datasets import DataArguments
from ..data.shipped import say_own
from ..data.tasks import LANGUAGE_MODELS, TASKS
from ..data.tokenizer import LEAST_VOCABULARY

# Fields that follow from the tokenizer and the task.
_DECIDED = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "is_decoder")


@dataclass
class ScratchArguments:
    """The model, task and tokenizer to train.

    Args:
        model: fields of a `DistAttnConfig`, or a YAML file with them. The vocabulary comes from the tokenizer.
        task: "causal-lm", "masked-lm" or "seq2seq".
        tokenizer: a folder or Hub name, or {"vocab_size": n}: byte-level BPE learned from the training text.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    model: Any = None
    task: str = "causal-lm"
    tokenizer: Any = None

    def __post_init__(self):
        if self.task not in LANGUAGE_MODELS:
            raise ValueError(f"task must be one of {', '.join(LANGUAGE_MODELS)}, got {self.task!r}")
        if not isinstance(self.model, dict):
            raise ValueError(f"model must be fields of a DistAttnConfig or a YAML file with them, got {self.model!r}")
        for name in _DECIDED:
            if name in self.model:
                source = "task" if name == "is_decoder" else "tokenizer"
                raise ValueError(f"model.{name} comes from the {source}; leave it out")
        self.model_config()
        if isinstance(self.tokenizer, dict):
            refuse_unknown(self.tokenizer, ["vocab_size"], "tokenizer")
            size = self.tokenizer.get("vocab_size")
            if not is_integer(size, LEAST_VOCABULARY):
                raise ValueError(f"tokenizer.vocab_size must be an integer >= {LEAST_VOCABULARY}, got {size!r}")
        elif not self.tokenizer or not isinstance(self.tokenizer, str):
            raise ValueError(f"tokenizer must be a folder, a Hub name or {{vocab_size: n}}, got {self.tokenizer!r}")

    def model_config(self, **decided) -> DistAttnConfig:
        """Return the model's config; raises `ValueError` for fields it refuses."""
        config_class = DistAttnSeq2SeqConfig if self.task == "seq2seq" else DistAttnConfig
        if config_class is DistAttnConfig:
            decided["is_decoder"] = TASKS[self.task].shifted
        try:
            return config_class(**{**self.model, **decided})
        except ValueError as error:
            raise ValueError(f"model: {error}") from error


@dataclass
class ScratchConfig:
    """All arguments of a training from scratch; `values` holds them as the file and the command line gave them."""

    scratch: ScratchArguments
    data: DataArguments
    training: TrainingArguments
    values: dict


def read_scratch_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ScratchConfig:
    """Read the arguments from a YAML file, with `key=value` overrides (model.mechanism=l1).

    Raises `ValueError` for a file that is absent or no YAML mapping, an unknown key (with the closest names), or a
    value that a field does not accept.
    """
    values = read_mapping(path, "config")
    for text in (None, *overrides):
        if text is not None:
            override(values, text)
        # Read the model's file as soon as it is named, so that the next override can change one of its fields.
        if isinstance(values.get("model"), str):
            say_own(values["model"], "model")
            values["model"] = read_mapping(values["model"], "model")
    return parse_scratch_config(values)


def parse_scratch_config(values: dict) -> ScratchConfig:
    """Read the arguments from a mapping; raises as `read_scratch_config`."""
    if "teacher" in values and "model" not in values:
        raise ValueError("the config has a teacher and no model: it is for `distattn adapt`, not `distattn train`")
    kinds = (ScratchArguments, DataArguments, TrainingArguments)
    config = ScratchConfig(*parse_kinds(values, kinds, ("model", "tokenizer", "train_data", "output_dir")), values)
    if config.training.max_steps <= 0 and (config.training.num_train_epochs <= 0 or config.data.streaming):
        raise ValueError(
            "max_steps must be > 0 with streaming=True, whose data has no known length, and without num_train_epochs; "
            f"got {config.training.max_steps}"
        )
    return config
