"""Read YAML, in one way for every file and override, and the specs of attention that it says."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import yaml

from ..core.attention_spec import AttentionSpec

_SHOWN_KEYS = 30


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the numbers of YAML 1.2: in 1.1, which it reads, 1e-3 and 1.5e3 are strings."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path, name: str):
    """What a YAML or JSON file holds (None for an empty one); errors call it `name`.

    Raises `ValueError` for a file that is absent or not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name} {str(path)!r} does not exist")
    return parse_yaml(path.read_text(encoding="utf-8"), f"{name} {str(path)!r}")


def parse_yaml(text: str, where: str):
    """What YAML or JSON text says; raises `ValueError`, beginning with `where`, for anything else."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML or JSON: {str(error).splitlines()[0]}") from None


def refuse_unknown(given, known, where: str = "") -> None:
    """Raise `ValueError` for the first key of `given` that is not in `known`, with the closest names."""
    known = list(known)
    for name in given:
        if name not in known:
            close = get_close_matches(str(name), known, n=3)
            shown = sorted(known)[:_SHOWN_KEYS] + ["..."] * (len(known) > _SHOWN_KEYS)
            hint = f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(shown)}"
            raise ValueError(f"unknown key {name!r}{f' in {where}' if where else ''}; {hint}")


def read_mapping(path: str | Path, name: str) -> dict:
    """The mapping in a YAML file, which errors call `name`; raises `ValueError` where there is none."""
    values = _as_meant(read_yaml(path, name))
    if not isinstance(values, dict):
        raise ValueError(f"{name} {str(Path(path))!r} must hold a mapping of arguments, got {type(values).__name__}")
    return values


def override(values: dict, assignment: str) -> None:
    """Set what `assignment` ("spec.metric=l1", dots for nested keys) says; raises `ValueError` where there is no such
    place."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ValueError(f"override must be key=value, got {assignment!r}")
    *parents, last = key.split(".")
    place = values
    for number, name in enumerate(parents):
        place = place.setdefault(name, {}) if isinstance(place, dict) else place[int(name)]
        if not isinstance(place, dict | list):
            where = ".".join(parents[: number + 1])
            raise ValueError(f"override {assignment!r}: {where!r} is {place!r}, which has no fields")
    value = _as_meant(parse_yaml(text, f"override {assignment!r}"), last)
    if isinstance(place, list):
        if not last.isdigit() or int(last) >= len(place):
            raise ValueError(f"override {assignment!r}: {'.'.join(parents)!r} is a list of {len(place)}, give an index")
        place[int(last)] = value
    else:
        place[last] = value


def parse_specs(spec) -> list[AttentionSpec]:
    """The specs that `spec` says: an `AttentionSpec`, a metric's name, "nystrom", a dict of fields, or a list of these.

    Raises `ValueError` for anything else, and naming the field for one that `AttentionSpec` does not have.
    """
    entries = [spec] if isinstance(spec, AttentionSpec | str | dict) else spec
    specs = [_parsed(entry) for entry in entries] if isinstance(entries, Iterable) else []
    if not specs:
        raise ValueError(_expected(spec))
    return specs


def read_specs(path: str | Path) -> list[AttentionSpec]:
    """The specs in a YAML or JSON file: one mapping of `AttentionSpec` fields, or a list of them for a mixed plan.

    Raises `ValueError` naming the file for a file that is absent, not YAML, or holds something else, and naming the
    field for one that `AttentionSpec` does not have.
    """
    data = read_yaml(path, "spec file")
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
    return AttentionSpec(mechanism="nystrom") if entry == "nystrom" else AttentionSpec(entry)


def _expected(given) -> str:
    return f"spec must be an AttentionSpec, a metric's name, a dict of fields or a list of these, got {given!r}"


def _as_meant(value, key: str = ""):
    """`save_strategy: no` means "no", where YAML 1.1 reads False."""
    if isinstance(value, dict):
        return {name: _as_meant(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_meant(entry) for entry in value]
    return "no" if value is False and key.endswith("_strategy") else value
