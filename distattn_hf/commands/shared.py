"""Shared by the verbs: common arguments, and the steps before and around their work.

No module of this folder may import torch at the top: help and refused arguments must not wait for it. Whatever needs
it is imported where it is used, after `start`.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..data.shipped import find_config

SOURCE = "A Hub name, a folder, or an embedded checkpoint: minilm, smollm2-135m, iglm, iglm-s."
DATA = "A .txt, .json, .jsonl, .csv, .tsv or .parquet file, 'news', or a data set's Hub name."

SourceArgument = Annotated[str, typer.Argument(help=SOURCE)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
Column = Annotated[str | None, typer.Option(help="The text column of the data set.")]


def start() -> None:
    """Import torch and transformers, which takes seconds, and register all classes, once the arguments are checked."""
    from transformers.utils import logging as transformers_logging

    from ..auto_classes import register_all

    register_all()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def begin(*sources: str | None) -> None:
    """Check that `sources` may be models, then `start`."""
    from ..storage.embedded import check_source

    for source in filter(None, sources):
        check_source(source)
    start()


def check_config(path: Path) -> None:
    """Raise `ValueError` for a missing file; say so where a path of configs/ is the package's own."""
    found = find_config(path)
    if not found.is_file():
        raise ValueError(f"config {str(path)!r} does not exist")
    if found != path:
        say(f"config: {found}, the package's own")


def begin_run(config: Path, overrides: list[str] | None) -> None:
    """Check a YAML file, and that the models and data it names are at hand, then `start`.

    A config that is wrong otherwise is left to its own reader, which knows what each field takes.
    """
    check_config(config)
    from ..data.at_hand import check_data_fields
    from ..data.config import read_mapping
    from ..storage.embedded import check_source

    # Of a field in a field only the reader of the config knows the file (model.mechanism=l1: that of `model`).
    values = read_mapping(config, "config", [text for text in overrides or () if "." not in text.partition("=")[0]])
    for name in ("teacher", "student"):
        if isinstance(source := values.get(name), str):
            check_source(source)
    check_data_fields(values)
    start()


def say(text: str) -> None:
    """Print progress to standard error, apart from results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def resumable(output_dir):
    """Handle Ctrl-C within the context: say how to resume, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nstopped. The same command again goes on from the last checkpoint in {output_dir}")
        raise typer.Exit(130) from None
