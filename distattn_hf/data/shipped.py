"""The YAML files of configs/, which an installed package has inside it. Needs no torch."""

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def find_config(path: str | Path) -> Path:
    """Return the file that a path names: itself, or the package's own of that name where it begins with configs/ and
    the working directory has none; a file that is nowhere is returned as it was given.
    """
    path = Path(path)
    if not path.is_file() and path.parts[:1] == (CONFIGS.name,) and (own := CONFIGS.parent / path).is_file():
        return own
    return path
