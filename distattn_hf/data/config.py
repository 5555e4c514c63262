"""Read YAML, in one way for every file and override."""

import re
from pathlib import Path

import yaml


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
