"""The folder of a run: its arguments, its finished parts, the checkpoints it resumes from, and disk space for it."""

import errno
import json
import re
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .folders import CONFIG_NAME, save_checkpoint, staging_folder, write_json

ARGUMENTS = "arguments.json"
# What the training that led to a checkpoint took.
SPENT = "distattn_training.json"
TRAINER_STATE = "trainer_state.json"
LOOP_STATE = "loop_state.json"
# The file that each driver writes last into a checkpoint-N.
_SAVED_BY = {TRAINER_STATE: "transformers' Trainer (`distattn adapt`)", LOOP_STATE: "scripts/adapt_accelerate.py"}
# Arguments that no result depends on, so that they may differ from those of the run that is resumed.
_MAY_CHANGE = {
    "output_dir", "disable_tqdm", "report_to", "logging_steps", "save_steps", "save_strategy", "save_total_limit",
    "use_cpu", "per_device_eval_batch_size", "num_proc", "dataloader_num_workers",
}  # fmt: skip
# What a run that produced nothing leaves: a folder with no other files may be used with other arguments.
_NOTHING = (ARGUMENTS, "tokenizer")
# Head room beside the weights and the optimizer's state: configs, tokenizer, random states.
_MARGIN = 32 * 2**20


def _in_todays_words(values: dict) -> dict:
    """Return the arguments with transform "maps" where a spec says "linear", as it was called before."""
    specs = values.get("spec")
    renamed = [
        {**spec, "transform": "maps"} if isinstance(spec, dict) and spec.get("transform") == "linear" else spec
        for spec in (specs if isinstance(specs, list) else [specs])
    ]
    return values if specs is None else {**values, "spec": renamed if isinstance(specs, list) else renamed[0]}


class RunFolder:
    """The folder of one run, shared by all its processes; only the main one writes.

    arguments.json is what it was started with. A finished part is a checkpoint that is complete or not there; while a
    part trains, checkpoint-N beside it are what it resumes from.

    Args:
        path: output_dir.
        values: the arguments, as file and command line said them.
        state: accelerate's `PartialState` or `Accelerator`.
        source: the checkpoint whose companions (see `copy_companions`) go along with every part.
    """

    def __init__(self, path: str | Path, values: dict, state, source: str | None = None):
        self.path, self.state, self.source = Path(path), state, source
        self.values = json.loads(json.dumps(values, default=str))

    def check(self, *, may_change=(), until_begun=(), stages: tuple[str, ...] = (), driver: str = TRAINER_STATE):
        """Raise `ValueError` where the folder holds a run of other arguments, or an unfinished one of another driver.

        may_change: names of more arguments that may differ; until_begun: of those that may until one of `stages` has
        begun. From then on the run's own list of stages may only grow at its end: each starts from the one before it.
        driver: as in `last_checkpoint`.
        """
        for stage in stages:
            if not finished(self.part(stage)):
                last_checkpoint(self.path / stage, driver)
        file = self.path / ARGUMENTS
        if not file.is_file() or all(path.name in _NOTHING for path in self.path.iterdir()):
            return
        before, prefix = (
            _in_todays_words(json.loads(file.read_text(encoding="utf-8"))),
            f"output_dir {str(self.path)!r} holds a run with",
        )
        has_begun = any((self.path / stage).exists() for stage in stages)
        may_differ = {*_MAY_CHANGE, *may_change, *(() if has_begun else until_begun), *(("stages",) if stages else ())}
        now = _in_todays_words(self.values)
        changed = {k for k in {*before, *now} - may_differ if before.get(k) != now.get(k)}
        if changed:
            key = min(changed)
            raise ValueError(
                f"{prefix} {key}={before.get(key)!r}, now {self.values.get(key)!r} ({len(changed)} arguments differ); "
                "give another output_dir or remove that one"
            )
        earlier = before.get("stages", ["transfer"])
        if has_begun and self.values["stages"][: len(earlier)] != earlier:
            raise ValueError(
                f"{prefix} stages={earlier!r}, to which stages may be added at the end, now "
                f"{self.values['stages']!r}; give another output_dir or remove that one"
            )

    def note(self) -> None:
        """Write the arguments to arguments.json."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / ARGUMENTS, self.values, allow_nan=True)

    def part(self, name: str) -> Path:
        """Return the path of a stage's result, or of the student before all stages, once it is finished."""
        return self.path / name if name == "calibrated" else self.path / name / "final"

    def save(self, model, tokenizer, path: Path, *, spent: dict | None = None, before: Path | None = None) -> None:
        """Write a finished part, with what its training and that of the part before took; remove what it resumed from.

        For the main process.
        """
        notes = {}
        if spent is not None:
            earlier = spent_on(before)
            notes[SPENT] = {name: round(value + earlier.get(name, 0), 1) for name, value in spent.items()}
            most = max(spent["trained_parameters"], earlier.get("trained_parameters", 0))
            notes[SPENT]["trained_parameters"] = most
        check_space(path, model, with_optimizer=False)
        save_checkpoint(model.to("cpu"), tokenizer, path, overwrite=True, source=self.source, notes=notes)
        if spent is not None:
            # No training resumes from them; optimizer states are most of their size.
            remove_checkpoints(path.parent)

    def publish(self, part: Path, name: str, add) -> None:
        """Copy a finished part to folder `name`, with what `add(folder)` writes into it."""
        if self.state.is_main_process:
            with staging_folder(self.path / name, overwrite=True) as folder:
                shutil.copytree(part, folder, dirs_exist_ok=True)
                add(folder)
        self.state.wait_for_everyone()


def finished(path: Path) -> bool:
    """Return whether a part exists; it is complete then."""
    return (path / CONFIG_NAME).is_file()


def spent_on(path: Path) -> dict:
    """Return what the training that led to a part took; nothing for one that needed none."""
    file = path / SPENT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def last_checkpoint(folder: str | Path, driver: str = TRAINER_STATE) -> Path | None:
    """Return the newest complete checkpoint-N in `folder`; None where there is none.

    driver: the file written last, so that a checkpoint that was cut off has none, or one that is no JSON. Raises
    `ValueError` where another driver than that file's left the training unfinished, which only it can resume.
    """
    if old := next(Path(folder).glob("state-*"), None):
        raise ValueError(f"{str(old)!r} is of an unfinished run of an older version; remove {str(folder)!r}")
    checkpoints = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        for other in _SAVED_BY.keys() - {driver}:
            if number and (path / other).is_file() and not (path / driver).is_file():
                raise ValueError(f"{str(path)!r} was saved by {_SAVED_BY[other]}: go on with that, or remove it")
        if number and _is_complete(path / driver):
            checkpoints.append((int(number[1]), path))
    return max(checkpoints)[1] if checkpoints else None


def remove_checkpoints(folder: str | Path, keep: Path | None = None) -> None:
    """Remove every checkpoint-N of a training but `keep`: only resuming needs them, most of each is optimizer state."""
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path != keep:
            shutil.rmtree(path)


def _is_complete(file: Path) -> bool:
    try:
        TrainerState.load_from_json(str(file))
    except (OSError, json.JSONDecodeError, TypeError):
        return False
    return True


def space_needed(model, with_optimizer: bool = True) -> int:
    """Return the bytes of a checkpoint of `model`: its weights, and Adam's two moments of what trains."""
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
