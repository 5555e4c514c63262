"""Read attention specs from a file."""

from pathlib import Path

import yaml

from ..core.configuration_distattn import AttentionSpec


def read_specs(path: str | Path) -> list[AttentionSpec]:
    """The specs in a YAML or JSON file: one mapping of `AttentionSpec` fields, or a list of them for a mixed plan.

    Raises `ValueError` naming the file for a file that is absent, not YAML, or holds something else, and naming the
    field for one that `AttentionSpec` does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"spec file {str(path)!r} does not exist")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"spec file {str(path)!r} is not YAML or JSON: {str(error).splitlines()[0]}") from None
    entries = data if isinstance(data, list) else [data]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"spec file {str(path)!r} must hold a mapping of AttentionSpec fields or a list of them")
    return [AttentionSpec.from_dict(entry) for entry in entries]
