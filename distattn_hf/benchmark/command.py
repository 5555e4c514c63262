"""The options of a run of `distattn benchmark`, from a YAML file and the command line, for the mechanism they name."""

from dataclasses import fields
from pathlib import Path

from ..data.config import read_yaml
from .exact_options import BenchmarkConfig
from .fields import choice
from .nystrom_options import NystromConfig
from .run_native import NativeConfig

CONFIGS = {"distance": BenchmarkConfig, "nystrom": NystromConfig, "native": NativeConfig}


def option_names(mechanism: str) -> list[str]:
    """The options of a mechanism, without "mechanism" itself."""
    return [field.name for field in fields(CONFIGS[mechanism]) if field.name != "mechanism"]


def read_config(path: str | Path | None) -> dict:
    """The options in a YAML file, none without a file; raises `ValueError` for one that is absent or no mapping."""
    if path is None:
        return {}
    values = read_yaml(path, "config")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"config {str(Path(path))!r} must hold a mapping of options, got {type(values).__name__}")
    return values


def load_config(path: str | Path | None, overrides: dict | None = None):
    """The options of a YAML file (None: the defaults), with those of `overrides` that are not None in their place.

    Raises `ValueError` for a file that is absent or no mapping, for an unknown key or one of another mechanism, and for
    a value out of range.
    """
    values = {**read_config(path), **{name: value for name, value in (overrides or {}).items() if value is not None}}
    mechanism = choice(values.pop("mechanism", "distance"), "mechanism", tuple(CONFIGS))
    allowed = option_names(mechanism)
    unknown = [name for name in values if name not in allowed]
    for other in CONFIGS:
        if theirs := [name for name in unknown if name in option_names(other)]:
            raise ValueError(
                f"the benchmark of mechanism {mechanism} has no option {', '.join(theirs)}, which only mechanism "
                f"{other} has; its own are {', '.join(allowed)}"
            )
    if unknown:
        raise ValueError(
            f"unknown benchmark option {', '.join(map(str, unknown))}; expected one of {', '.join(allowed)}"
        )
    return CONFIGS[mechanism](**values)
