"""The YAML files of configs/, which an installed package has inside it. Needs no torch."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parents[1] / "configs"


def find_config(path: str | Path) -> Path:
    """Return the file that a path names: itself, or the package's own of that name where it begins with configs/ and
    the working directory has none; a file that is nowhere is returned as it was given.
    """
    path = Path(path)
    if not path.is_file() and path.parts[:1] == (CONFIGS.name,) and (own := CONFIGS.parent / path).is_file():
        return own
    return path


def say_own(path: str | Path, name: str) -> None:
    """Say, as a warning, where a path is read from the package's own configs; `name`: what kind of file it is."""
    if (found := find_config(path)) != Path(path):
        logger.warning(f"{name}: {found}, the package's own")
