"""Which checkpoint of a run is complete, and whether there is space for the next."""

import errno
import json
import re
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

TRAINER_STATE = "trainer_state.json"
# Head room beside the weights and the optimizer's state: configs, tokenizer, random states.
_MARGIN = 32 * 2**20


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint-N in `folder`; None where there is none.

    `Trainer` writes a checkpoint's state file last, so one that was cut off has none, or one that is no JSON.
    """
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if number and _is_complete(path):
            found.append((int(number[1]), path))
    return max(found)[1] if found else None


def remove_checkpoints(folder: str | Path) -> None:
    """Remove every checkpoint-N of a finished training: only going on needs them, most of each is optimizer state."""
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)


def _is_complete(path: Path) -> bool:
    try:
        TrainerState.load_from_json(str(path / TRAINER_STATE))
    except (OSError, json.JSONDecodeError, TypeError):
        return False
    return True


def space_needed(model, with_optimizer: bool = True) -> int:
    """Bytes of a checkpoint of `model`: its weights, and Adam's two moments of what trains."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(2 * p.numel() * max(p.element_size(), 4) for p in model.parameters() if p.requires_grad)
    return weights + (moments if with_optimizer else 0) + _MARGIN


def check_space(folder: Path, model, with_optimizer: bool = True) -> None:
    """Raise `OSError` (ENOSPC) where the file system of `folder` has no room for a checkpoint of `model`."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    needed, free = space_needed(model, with_optimizer), shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"no space for checkpoint {str(folder)!r}: it needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} are free",
        )
