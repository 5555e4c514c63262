"""Write a folder so that under its final name it is either complete or not there."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel


def check_output(out: str | Path, overwrite: bool) -> Path:
    """The output folder as a path; raises `ValueError` when it is a file, or not empty without `overwrite`."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {str(out)!r} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"output folder {str(out)!r} exists and is not empty; pass --overwrite to replace it")
    return out


@contextmanager
def staging_folder(out: str | Path, overwrite: bool = False):
    """A folder beside `out` that takes its name once all is written; an error leaves what was there before.

    A process killed midway leaves the temporary folder, whose name starts with a dot. Raises `ValueError`, before
    anything is done, for an output that is a file, is not empty (unless `overwrite`; then the old folder is moved
    aside, replaced, and removed), or cannot be written.
    """
    out = check_output(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ValueError(f"output folder {str(out)!r} cannot be written: {error}") from error
    new, old = staging / "new", staging / "old"
    try:
        new.mkdir()
        yield new
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_checkpoint(model: PreTrainedModel, tokenizer, out: str | Path, *, overwrite: bool = False) -> Path:
    """Save model and tokenizer to `out` by a `staging_folder`, and raise as it does."""
    with staging_folder(out, overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(out)
