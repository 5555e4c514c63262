"""Read YAML files and overrides, and the attention specs in them."""

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path

import yaml

from ..core.attention_spec import AttentionSpec
from ..core.registry import MECHANISMS, mechanism_hint
from .shipped import find_config, say_own

_SHOWN_KEYS = 30
# Mechanisms that a spec may be named by; "distance" is named by its metric.
_NAMED = MECHANISMS[1:]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2: in its YAML 1.1, 1e-3 and 1.5e3 are strings."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def is_number(value) -> bool:
    """Return whether a value is an int or float; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value, least: int | None = None) -> bool:
    """Return whether a value is an int, and not below `least`; False for a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def read_yaml(path: str | Path, name: str):
    """Return the contents of a YAML or JSON file (None for an empty one), by `find_config`; errors call it `name`.

    Raises `ValueError` for a file that is absent or not YAML.
    """
    path = find_config(path)
    if not path.is_file():
        raise ValueError(f"{name} {str(path)!r} does not exist")
    return parse_yaml(path.read_text(encoding="utf-8"), f"{name} {str(path)!r}")


def parse_yaml(text: str, where: str):
    """Parse YAML or JSON text; raises `ValueError`, beginning with `where`, for anything else."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML or JSON: {str(error).splitlines()[0]}") from None


def refuse_unknown(given, known, where: str = "") -> None:
    """Raise `ValueError` for the first key of `given` that is not in `known`, with the closest names."""
    known = list(known)
    for name in given:
        if name not in known:
            matches = get_close_matches(str(name), known, n=3)
            expected = sorted(known)[:_SHOWN_KEYS] + ["..."] * (len(known) > _SHOWN_KEYS)
            hint = f"did you mean {', '.join(matches)}?" if matches else f"expected one of {', '.join(expected)}"
            raise ValueError(f"unknown key {name!r}{f' in {where}' if where else ''}; {hint}")


def read_mapping(path: str | Path, name: str, overrides: Iterable[str] = ()) -> dict:
    """Return the mapping in a YAML file, with overrides; raises `ValueError`, which calls it `name`, if it has none."""
    values = _as_meant(read_yaml(path, name))
    if not isinstance(values, dict):
        raise ValueError(f"{name} {str(Path(path))!r} must hold a mapping of arguments, got {type(values).__name__}")
    for text in overrides:
        override(values, text)
    return values


def parse_kinds(values: dict, kinds: tuple[type, ...], required: tuple[str, ...]) -> tuple:
    """Make one object of each dataclass from a mapping; raises `ValueError` for unknown, missing or mistyped values."""
    from transformers import HfArgumentParser

    refuse_unknown(values, set().union(*map(field_names, kinds)))
    for name in required:
        if not values.get(name):
            raise ValueError(f"{name} must be given, got {values.get(name)!r}")
    check_numbers(values)
    try:
        # Two of the dataclasses have a `seed`: one value sets both.
        return HfArgumentParser(kinds, conflict_handler="resolve").parse_dict(values)
    except TypeError as error:
        raise ValueError(f"a value has the wrong type: {error}") from error


def field_names(kind) -> set[str]:
    """Return the names of the fields that a dataclass's constructor takes."""
    return {f.name for f in fields(kind) if f.init}


def check_numbers(values: dict, where: str = "") -> None:
    """Raise `ValueError` for 2.5 steps or a rate of "abc": transformers accepts them, and fails later."""
    from transformers import TrainingArguments

    for entry in (entry for entry in fields(TrainingArguments) if entry.name in values):
        value = values[entry.name]
        if entry.type is int and not is_integer(value):
            raise ValueError(f"{where}{entry.name} must be an integer, got {value!r}")
        if entry.type is float and not is_number(value):
            raise ValueError(f"{where}{entry.name} must be a number, got {value!r}")


def override(values: dict, assignment: str) -> None:
    """Apply `assignment` ("spec.metric=l1", dots for nested keys) to `values`; raises `ValueError` where it does not
    fit."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ValueError(f"override must be key=value, got {assignment!r}")
    *parents, final_key = key.split(".")
    node = values
    for depth, name in enumerate(parents):
        node = node.setdefault(name, {}) if isinstance(node, dict) else node[int(name)]
        if not isinstance(node, dict | list):
            parent_path = ".".join(parents[: depth + 1])
            raise ValueError(f"override {assignment!r}: {parent_path!r} is {node!r}, which has no fields")
    value = _as_meant(parse_yaml(text, f"override {assignment!r}"), final_key)
    if isinstance(node, list):
        if not final_key.isdigit() or int(final_key) >= len(node):
            raise ValueError(f"override {assignment!r}: {'.'.join(parents)!r} is a list of {len(node)}, give an index")
        node[int(final_key)] = value
    else:
        node[final_key] = value


def parse_specs(spec) -> list[AttentionSpec]:
    """Return the specs of an `AttentionSpec`, a name of a metric or mechanism, a dict of fields, or a list of these.

    Raises `ValueError` for anything else, and for a field that `AttentionSpec` does not have, naming the field.
    """
    entries = [spec] if isinstance(spec, AttentionSpec | str | dict) else spec
    specs = [_parsed(entry) for entry in entries] if isinstance(entries, Iterable) else []
    if not specs:
        raise ValueError(_expected(spec))
    return specs


def with_fields(spec, given: dict, function: str, arguments: Iterable[str]):
    """Return a spec that is a name with further fields of `AttentionSpec`, which `function` was given beside it.

    Raises `ValueError` for what is neither a field nor one of the function's arguments, and for fields beside a spec
    that is no name.
    """
    known = [field.name for field in fields(AttentionSpec) if field.name not in ("metric", "mechanism")]
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, [*arguments, *known])
            hint = f"did you mean {', '.join(nearest)}?" if nearest else "nor has AttentionSpec a field of that name"
            raise ValueError(f"{function} has no argument {name!r}; {hint}")
    if given and not isinstance(spec, str):
        name, value = next(iter(given.items()))
        raise ValueError(
            f"{name}={value!r} beside a spec that is no name: set it there, AttentionSpec(..., {name}={value!r})"
        )
    return replace(_parsed(spec), **given) if given else spec


def read_specs(path: str | Path) -> list[AttentionSpec]:
    """Return the specs in a YAML or JSON file: a mapping of `AttentionSpec` fields, or a list of them for a mixed plan.

    Where a path of configs/ is the package's own file (see `find_config`), a warning says so.

    Raises `ValueError` naming the file where it is absent, not YAML, or holds something else, and naming the field
    where `AttentionSpec` does not have it.
    """
    data = read_yaml(path, "spec file")
    say_own(path, "spec file")
    entries = data if isinstance(data, list) else [data]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"spec file {str(Path(path))!r} must hold a mapping of AttentionSpec fields or a list of them")
    return parse_specs(entries)


def _parsed(entry) -> AttentionSpec:
    if isinstance(entry, AttentionSpec):
        return entry
    if isinstance(entry, dict):
        return AttentionSpec.from_dict(entry)
    if not isinstance(entry, str):
        raise ValueError(_expected(entry))
    if entry.lower() in _NAMED:
        return AttentionSpec(mechanism=entry.lower())
    from ..core.metrics import get_metric  # it needs torch, and reading YAML does not

    try:
        get_metric(entry)
    except ValueError as error:
        also = "" if mechanism_hint(entry) else f". Or name a mechanism: {', '.join(_NAMED)}"
        raise ValueError(f"{error}{also}") from None
    return AttentionSpec(entry)


def _expected(given) -> str:
    return (
        f"spec must be an AttentionSpec, the name of a metric or mechanism ({', '.join(_NAMED)}), a dict of fields or "
        f"a list of these, got {given!r}"
    )


def _as_meant(value, key: str = ""):
    """Replace False by "no" in `..._strategy: no`, which YAML 1.1 reads as False."""
    if isinstance(value, dict):
        return {name: _as_meant(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_meant(entry) for entry in value]
    return "no" if value is False and key.endswith("_strategy") else value
