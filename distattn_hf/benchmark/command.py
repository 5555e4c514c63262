"""`distattn benchmark`: the options, from a YAML file and the command line, and the benchmark they name."""

from dataclasses import fields
from pathlib import Path

from ..data.config import read_yaml
from .fields import choice
from .run import Benchmark, exit_code
from .run_exact import ExactBenchmark
from .run_native import NativeBenchmark
from .run_nystrom import NystromBenchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "distance": ExactBenchmark,
    "nystrom": NystromBenchmark,
    "native": NativeBenchmark,
}


def option_names(mechanism: str) -> list[str]:
    """Return the options of a mechanism, without "mechanism" itself."""
    return [field.name for field in fields(BENCHMARKS[mechanism].Config) if field.name != "mechanism"]


def read_config(path: str | Path | None) -> dict:
    """Read the options in a YAML file, none without one; raises `ValueError` if it is absent or not a mapping."""
    if path is None:
        return {}
    values = read_yaml(path, "config")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"config {str(Path(path))!r} must hold a mapping of options, got {type(values).__name__}")
    return values


def load_config(path: str | Path | None, overrides: dict | None = None):
    """Load the options of a YAML file (None: the defaults), overridden by those of `overrides` that are not None.

    Raises `ValueError` for a file that is absent or not a mapping, for an unknown key or one of another mechanism, and
    for a value out of range.
    """
    values = {**read_config(path), **{name: value for name, value in (overrides or {}).items() if value is not None}}
    mechanism = choice(values.pop("mechanism", "distance"), "mechanism", tuple(BENCHMARKS))
    allowed = option_names(mechanism)
    unknown = [name for name in values if name not in allowed]
    for other_mechanism in BENCHMARKS:
        if foreign := [name for name in unknown if name in option_names(other_mechanism)]:
            raise ValueError(
                f"the benchmark of mechanism {mechanism} has no option {', '.join(foreign)}, which only mechanism "
                f"{other_mechanism} has; its own are {', '.join(allowed)}"
            )
    if unknown:
        raise ValueError(
            f"unknown benchmark option {', '.join(map(str, unknown))}; expected one of {', '.join(allowed)}"
        )
    return BENCHMARKS[mechanism].Config(**values)


def run_benchmark(config, *, overwrite: bool = False, echo=print) -> dict:
    """Run the benchmark of these options; returns the report that was written: see `Benchmark.run`."""
    kind = next(kind for kind in BENCHMARKS.values() if isinstance(config, kind.Config))
    return kind(config).run(overwrite=overwrite, echo=echo)


def benchmark(path: Path | None, options: dict, *, overwrite: bool = False) -> int:
    """Run the benchmark of a YAML file and `options` (those that are not None); returns the exit code."""
    return exit_code(run_benchmark(load_config(path, options), overwrite=overwrite))
