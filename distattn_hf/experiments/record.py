"""The rows of an experiment in one JSON file, each kept as soon as it is measured."""

import json
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from ..benchmark.results import provenance
from ..storage.folders import json_values, write_json


class Record:
    """What an experiment has measured: rows by key, in a JSON file that a run that was cut off goes on from.

    The file holds "experiment", "options", "runs" (versions, machine, threads, commit, date and options of every run
    that measured something) and "rows", each {"key": {...}, "values": {...}, "seconds": of measuring and of
    what had to be made for it, "run": index}.
    A number that is not finite is null there and None in a row, as JSON has no other word for it.

    Args:
        path: the file; its folder is made with it.
        experiment: the name.
        options: the experiment's frozen dataclass.
        axes: names of options that only say which rows there are, each of which is part of a key: a file is gone on
            with where they differ.
        echo: takes the line of each row.

    Raises `ValueError`, naming the option, where the file holds rows of other options or of another experiment.
    """

    def __init__(self, path: str | Path, experiment: str, options, *, axes: tuple[str, ...] = (), echo=print):
        self.path, self.echo = Path(path), echo
        values = json_values(asdict(options))
        self.content = {"experiment": experiment, "options": values, "runs": [], "rows": []}
        self._run: int | None = None
        if self.path.is_file():
            before = _read(self.path, experiment)
            # An option that a file is older than had its default.
            known = [field for field in fields(options) if field.default is not MISSING]
            defaults = json_values({field.name: field.default for field in known})
            for name in {**before["options"], **values}:
                old, new = ({**defaults, **given}.get(name) for given in (before["options"], values))
                if name not in axes and old != new:
                    raise ValueError(
                        f"{name} is {new!r}, and {str(self.path)!r} holds rows of {name}={old!r}; give the same, or "
                        "another folder (--out)"
                    )
            self.content |= {"runs": before["runs"], "rows": before["rows"]}

    @property
    def rows(self) -> list[dict]:
        """All rows, each key and values in one dict."""
        return [{**row["key"], **row["values"]} for row in self.content["rows"]]

    def row(self, key: dict, measure: Callable[[], dict]) -> dict:
        """Return the row with this key, {**key, **values}; one that the file lacks is measured, kept and printed.

        measure: returns the values, {name: number, text or list}. Raises `ValueError` for a value with a key's name.
        """
        key = json_values(key)
        stored = next((row for row in self.content["rows"] if row["key"] == key), None)
        if stored is None:
            started = time.perf_counter()
            values = json_values(measure())
            if clash := key.keys() & values.keys():
                raise ValueError(f"a row's values must have other names than its key, got {sorted(clash)} in both")
            stored = {"key": key, "values": values, "seconds": round(time.perf_counter() - started, 2)}
            self._keep(stored)
            self.echo(_line(stored))
        return {**stored["key"], **stored["values"]}

    def _keep(self, row: dict) -> None:
        if self._run is None:
            import torch

            self._run = len(self.content["runs"])
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.content["runs"].append({**provenance(device), "options": self.content["options"]})
        self.content["rows"].append({**row, "run": self._run})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def _read(path: Path, experiment: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON, so no record of an experiment: {error}") from None
    if not isinstance(content, dict) or content.get("experiment") != experiment:
        of = content.get("experiment") if isinstance(content, dict) else None
        raise ValueError(f"{str(path)!r} must be a record of experiment {experiment!r}, got one of {of!r}")
    if missing := {"options", "runs", "rows"} - content.keys():
        raise ValueError(f"{str(path)!r} is no whole record of an experiment: it lacks {', '.join(sorted(missing))}")
    return content


def _line(row: dict) -> str:
    """Format a row in one line; lists and dicts of its values are left to the file."""

    def words(entries):
        shown = {n: v for n, v in entries.items() if not isinstance(v, list | dict)}
        return "  ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items())

    return f"{words(row['key'])}:  {words(row['values'])}  ({row['seconds']:.1f} s)"
