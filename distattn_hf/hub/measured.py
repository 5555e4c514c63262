"""What `distattn evaluate --out` wrote of a checkpoint, as tables of its card and entries of the model index."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from huggingface_hub import EvalResult

from ..data.config import is_integer, is_number
from ..storage.files import checkpoint_digest

# Task -> (the number of its rows that is shown, its name in the model index, in words, whether it is a share).
_OF_LENGTHS = {
    "passkey": ("exact", "exact_match", "hidden numbers found", True),
    "needle": ("exact", "exact_match", "hidden sentences found", True),
    "kv": ("exact", "exact_match", "values found by their keys", True),
    "perplexity": ("perplexity", "perplexity", "perplexity of the last tokens of a text", False),
    "generation": ("agreement", "token_agreement", "tokens that go on as the teacher's, greedily", True),
    "ruler": ("score", "exact_match", "RULER by lm-eval, answers that hold what is asked for", True),
}
# Tasks whose rows are of a whole data set -> the metrics that are shown, and which of them are shares.
_OF_DATA = {
    "classification": (("accuracy", "f1", "loss"), ("accuracy", "f1")),
    "text": (("perplexity", "loss", "retrieval_at_1", "mrr"), ("retrieval_at_1", "mrr")),
}
THIS, TEACHER, CONTROL = "**this checkpoint**", "teacher", "sinks and window alone (control)"


@dataclass(frozen=True)
class Measured:
    """One file of `distattn evaluate --out`: caption and table of the card, and this checkpoint's own numbers.

    head: the table's columns; rows: their cells. results: [(configuration, metric, value)] for the model index.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]
    data: str
    results: list[tuple[str, str, float]]

    def index(self, task_type: str, public_name: str) -> list[EvalResult]:
        """Return the entries of the model index: this checkpoint's own finite numbers."""
        return [
            EvalResult(
                # A configuration each: the Hub takes entries of one type and configuration for one data set.
                task_type=task_type, dataset_type="custom", dataset_name=public_name, dataset_config=configuration,
                metric_type=metric, metric_name=metric.replace("_", " "), metric_value=value,
            )
            for configuration, metric, value in self.results
            if math.isfinite(value)
        ]  # fmt: skip


def is_measured(content) -> bool:
    """Return whether a JSON file's content is what `distattn evaluate --out` wrote, and not an owner's list."""
    return isinstance(content, dict) and "task" in content


def read_measured(content: dict, label: str, folder: Path) -> Measured:
    """Read the content of a file that `distattn evaluate FOLDER --out` wrote; label: how messages call the file.

    Raises `ValueError` where it is not whole, and where it was measured of other weights than those in `folder`.
    """
    task = content["task"]
    if task not in (*_OF_LENGTHS, *_OF_DATA):
        raise ValueError(f"{label}: task must be one of {', '.join((*_OF_LENGTHS, *_OF_DATA))}, got {task!r}")
    for name, kind in (("model", str), ("data", str), ("rows", list)):
        if not isinstance(content.get(name), kind) or not content[name]:
            raise ValueError(f"{label}: {name} must be {'text' if kind is str else 'rows'}, got {content.get(name)!r}")
    for name, kind in (("against", str), ("depths", list)):
        if content.get(name) is not None and not isinstance(content[name], kind):
            raise ValueError(f"{label}: {name} must be {'text' if kind is str else 'a list'}, got {content[name]!r}")
    if content.get("digest") != checkpoint_digest(folder):
        raise ValueError(
            f"{label} was measured of {content['model']!r}, whose weights, config, tokenizer or pooling are not those "
            f"of folder {str(folder)!r}; run distattn evaluate {folder} again, with --out"
        )
    for number, row in enumerate(content["rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"{label}: rows[{number}] must be an object, got {row!r}")
        if row.get("samples") is not None and not is_integer(row["samples"], 1):
            raise ValueError(f"{label}: rows[{number}].samples must be an integer >= 1, got {row['samples']!r}")
    if task in _OF_DATA:
        return _of_data(content, label)
    return _of_lengths(content, label)


def _of_lengths(content: dict, label: str) -> Measured:
    """Return a column for each length; cells are means over what else tells the rows apart but the RULER task."""
    name, metric, words, is_share = _OF_LENGTHS[content["task"]]
    cells: dict[tuple[str, str], dict[int, list[float]]] = {}
    counts = set()
    for number, row in enumerate(content["rows"]):
        if not is_integer(row.get("length"), 1):
            raise ValueError(f"{label}: rows[{number}].length must be an integer >= 1, got {row.get('length')!r}")
        value = _number(row, name, f"{label}: rows[{number}]", is_share)
        of = (_who(content, row, f"{label}: rows[{number}]"), str(row.get("task", "")))
        cells.setdefault(of, {}).setdefault(row["length"], []).append(value)
        counts.add(row.get("samples"))
    lengths = sorted({length for by_length in cells.values() for length in by_length})
    means = {of: {length: fmean(values) for length, values in found.items()} for of, found in cells.items()}
    tasks = any(part for _, part in means)
    rows = [
        [who, *([f"`{part}`"] if tasks else []), *(_shown(found.get(length), is_share) for length in lengths)]
        for (who, part), found in means.items()
    ]
    if not (own := {part: found for (who, part), found in means.items() if who == THIS}):
        raise ValueError(f"{label} has no row of {content['model']!r} itself")
    depths = f" at each of {len(depths)} depths" if (depths := content.get("depths")) and _hides(content) else ""
    several = f", {counts.pop()} texts a length{depths}" if len(counts) == 1 and None not in counts else ""
    return Measured(
        f"{words[0].upper()}{words[1:]}, by tokens of the text{several}",
        ["", *(["task"] if tasks else []), *(f"{length:,}" for length in lengths)],
        rows,
        content["data"],
        [
            (f"{part or content['task']}, {length} tokens", metric, value)
            for part, found in own.items()
            for length, value in sorted(found.items())
        ],
    )


def _hides(content: dict) -> bool:
    return content["task"] in ("passkey", "needle", "kv")


def _of_data(content: dict, label: str) -> Measured:
    """Return a column for each metric."""
    rows, own = [], []
    metrics, shares = _OF_DATA[content["task"]]
    shown = [name for name in metrics if any(name in row for row in content["rows"])]
    if not shown:
        raise ValueError(f"{label}: rows must have one of {', '.join(metrics)}, got {content['rows'][0]!r}")
    for number, row in enumerate(content["rows"]):
        who = _who(content, row, f"{label}: rows[{number}]")
        values = [_number(row, name, f"{label}: rows[{number}]", name in shares) for name in shown]
        rows.append([who, *(_shown(value, False) for value in values)])
        own += [(content["task"], name, value) for name, value in zip(shown, values)] if who == THIS else []
    if not own:
        raise ValueError(f"{label} has no row of {content['model']!r} itself")
    texts = content["rows"][0].get("texts")
    of = f", {texts:,} texts" if is_integer(texts, 1) else ""
    return Measured(f"Scores{of}", ["", *(name.replace("_", " ") for name in shown)], rows, content["data"], own)


def _who(content: dict, row: dict, label: str) -> str:
    """Return what a row's model is called in the card: nobody else has the folders of this machine."""
    name = row.get("model")
    known = {content["model"]: THIS, f"{content['model']}, sinks and window": CONTROL, content.get("against"): TEACHER}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{label}.model must be one of {', '.join(map(repr, filter(None, known)))}, got {name!r}")
    return known[name]


def is_finite(value) -> bool:
    """Return whether a value is a number, no bool, that a float can hold and that is not infinite or NaN."""
    # By bounds: `math.isfinite` raises for the integers of JSON that no float can hold.
    return is_number(value) and abs(value) <= sys.float_info.max


def _number(row: dict, name: str, label: str, is_share: bool) -> float:
    """Return a number of a row; null, which JSON has for one that is not finite, is NaN."""
    value = row.get(name, "")
    if value is None:
        return math.nan
    if not is_finite(value) or not 0 <= value <= (1 if is_share else math.inf):
        wanted = "a number from 0 to 1" if is_share else "a finite number >= 0"
        raise ValueError(f"{label}.{name} must be {wanted}, got {row.get(name)!r}")
    return float(value)


def _shown(value: float | None, is_share: bool) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0%}" if is_share else f"{value:.4g}"
