"""Write a folder so that under its final name it is either complete or not there."""

import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from .companions import Source, copy_companions
from .embedded import EMBEDDED

# transformers.utils.CONFIG_NAME; not imported, so that `check_output` needs no torch.
CONFIG_NAME = "config.json"


def check_output(
    out: str | Path, overwrite: bool, marker: str | None = CONFIG_NAME, source: str | Path | None = None
) -> Path:
    """Return the output folder as a path; marker: a file that a replaced folder must hold, None if none is removed;
    source: what is read, which it must not replace.

    Raises `ValueError` when it is a file, not empty without `overwrite`, or, with it, the source or a folder of
    something else.
    """
    out = Path(out)
    if overwrite and source is not None and str(source) not in EMBEDDED and Path(source).exists():
        read = Path(source).resolve()
        if out.resolve() in (read, *read.parents):
            raise ValueError(
                f"output folder {str(out)!r} is or holds the model that is read, which it would replace; give another"
            )
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {str(out)!r} is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return out
    if not overwrite:
        raise ValueError(f"output folder {str(out)!r} exists and is not empty; pass --overwrite to replace it")
    if marker is not None and not (out / marker).is_file():
        raise ValueError(
            f"output folder {str(out)!r} is not replaced: it has no {marker}, so what is in it was not made by this "
            "command; give another folder"
        )
    return out


@contextmanager
def staging_folder(out: str | Path, overwrite: bool = False, marker: str = CONFIG_NAME):
    """Yield a folder beside `out` that takes its name once all is written; an error leaves the old one.

    A process killed midway leaves the temporary folder, whose name starts with a dot. Raises `ValueError`, before
    anything is done, as `check_output`, and for an output that cannot be written. With `overwrite` the old folder is
    moved aside, replaced, and removed.
    """
    out = check_output(out, overwrite, marker)
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


def change_options(folder: str | Path, **options) -> list:
    """Set options that need no fit in the config of a converted checkpoint's folder; returns its specs as they are now.

    Raises `ValueError`, before anything is written, for a folder of something else and as `with_options`.
    """
    from ..core.attention_spec import OPTIONS, AttentionSpec
    from ..core.parameters import with_options

    path = Path(folder) / CONFIG_NAME
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (block := data.get("distattn")) is None:
        raise ValueError(
            f"{str(folder)!r} is not the folder of a converted checkpoint: no {CONFIG_NAME} with 'distattn'"
        )
    if not options:
        raise ValueError(f"nothing to set; give one of {', '.join(OPTIONS)}")
    specs = with_options([AttentionSpec.from_dict(spec) for spec in block["specs"]], options)
    for saved, spec in zip(block["specs"], specs, strict=True):
        # Nothing else: the code in the folder may be older than this and know other words.
        saved.update({name: getattr(spec, name) for name in options if spec.has_option(name)})
    write_atomically(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())
    return specs


def save_checkpoint(
    model,
    tokenizer,
    out: str | Path,
    *,
    overwrite: bool = False,
    source: Source | str | None = None,
    notes: dict[str, dict] | None = None,
    adapter_of=None,
) -> list[str]:
    """Save model and tokenizer to `out` by a `staging_folder`, and raise as it does.

    source: where the model was loaded from: what else is there goes along (see `copy_companions`). notes: JSON files to
    write beside, {name: content}. adapter_of: the base model, where only what differs from it is to be saved. Returns
    the names of what was left behind.
    """
    with staging_folder(out, overwrite) as folder:
        if adapter_of is None:
            model.save_pretrained(folder)
        else:
            # An embedded checkpoint is the base by that name: on the Hub its model may have other weights.
            name = source.name if isinstance(source, Source) else source
            model.save_adapter(folder, base=adapter_of, base_name=name if name in EMBEDDED else None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, note in (notes or {}).items():
            write_json(folder / name, note)
        if source is None:
            return []
        return copy_companions(source if isinstance(source, Source) else Source(source), folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it, so that it is complete or what it was before."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> None:
    """Raise `ValueError` where no file or folder of this name can be made: to be found out before hours of work."""
    there = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{str(path)!r} cannot be written: {str(there)!r} is no folder that can be written to")


def json_values(value):
    """Return what JSON keeps of a value: lists for tuples, None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(name): json_values(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, report: dict, allow_nan: bool = False) -> None:
    """Write the report; NaN and infinity, which JSON does not have, raise `ValueError` unless they may be there."""
    write_atomically(path, (json.dumps(report, indent=1, allow_nan=allow_nan, ensure_ascii=False) + "\n").encode())
