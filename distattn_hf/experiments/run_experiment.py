"""`distattn experiment`: read an experiment's options, run it, and draw its figures."""

from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc
from pathlib import Path
from types import ModuleType
from typing import get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator

from ..data.config import override, parse_yaml, read_mapping, refuse_unknown
from .record import Record


def load_experiment(name: str) -> ModuleType:
    """Import an experiment's module.

    It holds `Options`, a frozen dataclass of the fields int, float, bool, str, tuple[T, ...] or T | None, each with a
    default; `QUICK`, the options of a run that takes seconds; `run(options, results)` with a `Record`; and, if it
    likes, `AXES` as in `Record` and `figures(results, folder)`.
    """
    return import_module(f".{name}", __package__)


def read_options(experiment: ModuleType, config: str | Path | None, overrides: Iterable[str], quick: bool = False):
    """Return the `Options` of an experiment: its defaults, then the YAML file's, then `QUICK`, then key=value.

    A tuple may be written a,b,c. Raises `ValueError` for an unknown name, with the nearest, and for a value of another
    type; and whatever the options' own checks raise.
    """
    kind, name = experiment.Options, experiment.__name__.rpartition(".")[2]
    hints = get_type_hints(kind)
    values = {} if config is None else read_mapping(config, "config")
    values |= experiment.QUICK if quick else {}
    for text in overrides:
        override(values, text)
    refuse_unknown(values, [field.name for field in fields(kind)], f"experiment {name}")
    return kind(**{field: _as_type(field, value, hints[field]) for field, value in values.items()})


def _as_type(name: str, value, hint):
    """Return a value of the type that a field has; raises `ValueError` where it is of another."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    kind = next(k for k in kinds if k is not type(None))
    if value is not None and get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, str):
            value = [part if item is str else parse_yaml(part, name) for part in value.split(",") if part.strip()]
        value = value if isinstance(value, list | tuple) else [value]
        takes_float = float in (item, *get_args(item))
        value = tuple(float(v) if takes_float and type(v) is int else v for v in value)
    elif kind is float and type(value) is int:
        value = float(value)
    try:
        type_validator(name, value, hint)
    except TypeError:
        text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
        raise ValueError(f"{name} must be {text}, got {value!r}") from None
    return value


def describe(experiment: ModuleType) -> str:
    """Describe an experiment: what its module says, what its options mean, and their defaults."""
    kind = experiment.Options
    defaults = "\n".join(f"{field.name}={_written(field.default)}" for field in fields(kind))
    return f"{getdoc(experiment)}\n\n{getdoc(kind)}\n\n{defaults}"


def _written(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else "null" if value is None else str(value)


def run_experiment(
    name: str,
    out: str | Path,
    overrides: Iterable[str] = (),
    *,
    config: str | Path | None = None,
    quick: bool = False,
    echo=print,
) -> Record:
    """Run an experiment, or go on with it, and draw its figures; returns its record, the file NAME.json in `out`.

    What the file holds is not measured again. Without matplotlib a line says so in place of the figures. Raises as
    `read_options` and `Record` before anything is measured.
    """
    experiment, folder = load_experiment(name), Path(out)
    options = read_options(experiment, config, overrides, quick)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(folder)!r}")
    results = Record(folder / f"{name}.json", name, options, axes=getattr(experiment, "AXES", ()), echo=echo)
    experiment.run(options, results)
    if hasattr(experiment, "figures"):
        if find_spec("matplotlib") is None:
            echo("no figures: they need matplotlib (pip install 'distattn_hf[viz]'); the same command then draws them")
        else:
            experiment.figures(results, folder)
    return results
