"""What verbs share: arguments that several have, and what goes before and around their work.

No module of this folder may import torch at its top: help and refused arguments must not wait for it. What needs it is
imported where it is used, after `start`.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

SOURCE = "A Hub name, a folder, or an embedded checkpoint: minilm, smollm2-135m, iglm, iglm-s."
DATA = "A .txt, .json, .jsonl, .csv, .tsv or .parquet file, 'news', or a data set's Hub name."

SourceArgument = Annotated[str, typer.Argument(help=SOURCE)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
Column = Annotated[str | None, typer.Option(help="The text column of the data set.")]


def start() -> None:
    """Make ready for work, once the arguments are in order: torch and transformers take seconds to import."""
    from transformers.utils import logging as transformers_logging

    from ..auto_classes import register_all

    register_all()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def begin(*sources: str | None) -> None:
    """`start`, after a check that these sources of models can be some."""
    from ..storage.embedded import check_source

    for source in filter(None, sources):
        check_source(source)
    start()


def check_config(path: Path) -> None:
    """Raise `ValueError` for a file that is not there."""
    if not path.is_file():
        raise ValueError(f"config {str(path)!r} does not exist")


def say(text: str) -> None:
    """Print progress, apart from results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def resumable(output_dir):
    """While it is open, Ctrl-C says how to go on, and ends with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nstopped. The same command again goes on from the last checkpoint in {output_dir}")
        raise typer.Exit(130) from None
