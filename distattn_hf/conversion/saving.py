"""Write a checkpoint folder so that under its final name it is either complete or not there."""

import os
import shutil
import tempfile
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


def save_checkpoint(model: PreTrainedModel, tokenizer, out: str | Path, *, overwrite: bool = False) -> Path:
    """Save model and tokenizer to `out` through a temporary folder beside it, which is renamed at the end.

    An error midway (a full disk) leaves what was under `out` as it was and nothing else; a process killed midway leaves
    the temporary folder, whose name starts with a dot. Raises `ValueError` for an output that exists and is not empty,
    unless `overwrite`; then the old folder is moved aside, replaced, and removed.
    """
    out = check_output(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    new, old = staging / "new", staging / "old"
    try:
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
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
    return out
