"""Attention specs from names, mappings and files."""

from collections.abc import Iterable
from pathlib import Path

from ..core.configuration_distattn import AttentionSpec
from ..data.config import read_yaml


def parse_specs(spec) -> list[AttentionSpec]:
    """The specs that `spec` says: an `AttentionSpec`, a metric's name, "nystrom", a dict of fields, or a list of these.

    Raises `ValueError` for anything else, and naming the field for one that `AttentionSpec` does not have.
    """
    entries = [spec] if isinstance(spec, AttentionSpec | str | dict) else spec
    specs = [_parsed(entry) for entry in entries] if isinstance(entries, Iterable) else []
    if not specs:
        raise ValueError(_expected(spec))
    return specs


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
