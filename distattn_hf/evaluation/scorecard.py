"""The scorecard of an adaptation: teacher, student at each stage and controls, on the same held-out data."""

import copy
import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..conversion.observe import observed
from ..core.parameters import NystromParameters
from ..data.datasets import TaskData
from ..data.sources import find_data
from ..data.tasks import TASKS
from ..storage.folders import write_json
from .long_text_scores import LongTextOptions, check_model, score_questions
from .retrieval_tasks import Haystack, Question
from .score import first_sentence_pairs, score_model

logger = logging.getLogger(__name__)

SCORECARD = "distattn_scorecard.json"
ROWS = (
    "teacher", "teacher_finetuned", "plain", "calibrated", "transfer", "distillation", "task", "window_only",
    "no_attention",
)  # fmt: skip


@dataclass
class ScorecardRow:
    """One model's score. ratio: score divided by that of the row `Scorecard.ratio_to`; trained_parameters, tokens and
    seconds: of the training that led to this model, all stages together; None without training."""

    name: str
    score: float
    ratio: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trained_parameters: int | None = None
    tokens: int | None = None
    seconds: float | None = None


@dataclass
class Scorecard:
    """Scores of one adaptation, one row per model; saved as `distattn_scorecard.json` in the student's folder.

    ratio_to: "teacher_finetuned" if that row exists, else "teacher". checkpoint: the row of the student in the folder.
    """

    task: str
    metric: str
    greater_is_better: bool
    data: dict
    teacher: str
    rows: list[ScorecardRow] = field(default_factory=list)
    ratio_to: str = "teacher"
    checkpoint: str | None = None
    version: int = 1

    @classmethod
    def for_task(cls, task: str, data: dict, teacher: str) -> "Scorecard":
        """Return an empty scorecard for `task`."""
        return cls(task, TASKS[task].metric, TASKS[task].higher_is_better, data, teacher)

    def row(self, name: str) -> ScorecardRow | None:
        """Return the row called `name`, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def put(self, name: str, metrics: dict[str, float], **spent) -> ScorecardRow:
        """Add or replace a row, and recompute all ratios. Raises `ValueError` for a name that is not in `ROWS`."""
        if name not in ROWS:
            raise ValueError(f"a scorecard row must be one of {', '.join(ROWS)}, got {name!r}")
        row = ScorecardRow(name, metrics[self.metric], metrics=metrics, **spent)
        self.rows = sorted([r for r in self.rows if r.name != name] + [row], key=lambda r: ROWS.index(r.name))
        self.ratio_to = "teacher_finetuned" if self.row("teacher_finetuned") else "teacher"
        base = self.row(self.ratio_to)
        for scored_row in self.rows:
            scored_row.ratio = None if base is None or not base.score else scored_row.score / base.score
        return row

    def to_dict(self) -> dict:
        """Return a JSON-serialisable dict; `from_dict` is the inverse."""
        return {"version": self.version, **{k: v for k, v in asdict(self).items() if k != "version"}}

    @classmethod
    def from_dict(cls, data: dict) -> "Scorecard":
        """Restore the scorecard from `to_dict`; raises `ValueError` for another version."""
        if data.get("version") != 1:
            raise ValueError(f"scorecard version must be 1, got {data.get('version')!r}")
        return cls(**{**data, "rows": [ScorecardRow(**row) for row in data["rows"]]})

    def save(self, folder: str | Path) -> Path:
        """Write the file into `folder` atomically."""
        path = Path(folder) / SCORECARD
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Scorecard | None":
        """Return the scorecard in `folder`, or None."""
        path = Path(folder) / SCORECARD
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def table(self) -> str:
        """Format the scorecard as a text table for a terminal."""
        arrow = "higher is better" if self.greater_is_better else "lower is better"
        lines = [f"{self.teacher}, {self.task}: {self.metric} on {self.data.get('eval')} ({arrow})"]
        asked = f"passkey, {self.data['passkey_length']}" if "passkey_length" in self.data else None
        header = ("", self.metric, f"to {self.ratio_to}", *((asked,) if asked else ()), "trained", "tokens", "seconds")
        cells = [header]
        for row in self.rows:
            cost = (row.trained_parameters, row.tokens, row.seconds)
            cells.append(
                (row.name, f"{row.score:.4f}", "-" if row.ratio is None else f"{row.ratio:.4f}")
                + ((f"{row.metrics['passkey']:.1f}",) if asked else ())
                + tuple("-" if value is None else f"{value:,.0f}" for value in cost)
            )
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        for row in cells:
            lines.append(
                row[0].ljust(widths[0]) + "".join(f"  {c.rjust(w)}" for c, w in zip(row[1:], widths[1:], strict=True))
            )
        return "\n".join(lines)


class Examiner:
    """Scores models of one task on the same data and saves the scorecard after each.

    Args:
        card, folder: the scorecard and where it is saved.
        data, tokenizer, pairs, pooling: as in `score_model`.
        training: `TrainingArguments`: device, batch size, whether progress is shown.
        state: accelerate's; the main process scores, the others wait.
        asked: texts with a hidden number (see `passkey_questions`), if the rows shall say how many are found.
    """

    def __init__(
        self, card: Scorecard, folder: Path, data: TaskData, tokenizer, pairs, pooling: str, training, state, asked=()
    ):
        self.card, self.folder, self.state, self.training, self.asked = card, folder, state, training, asked
        self.data, self.tokenizer, self.pairs, self.pooling = data, tokenizer, pairs, pooling

    def missing(self, names) -> list[str]:
        """Return those of `names` that have no row yet."""
        return [name for name in names if self.card.row(name) is None]

    def record(self, name: str, model, **spent) -> None:
        """Score a model and write its row."""
        if self.state.is_main_process:
            size, progress = self.training.per_device_eval_batch_size, not self.training.disable_tqdm
            model.to(self.training.device)
            metrics = score_model(
                model, self.card.task, self.data, self.tokenizer, pairs=self.pairs, pooling=self.pooling,
                batch_size=size, progress=progress,
            )  # fmt: skip
            if self.asked:
                found = score_questions(model, self.asked, "passkey")
                metrics |= {"passkey": found["exact"], "passkey_loss": found["log_loss"]}
            row = self.card.put(name, metrics, **spent)
            self.card.save(self.folder)
            logger.info("%s: %s %.4f", name, self.card.metric, row.score)
        self.state.wait_for_everyone()

    def record_controls(self, names, student, plain: Callable) -> None:
        """Score each control; `plain` returns the student that was swapped without a fit."""
        for name in names:
            if name == "plain":
                self.record(name, plain() if self.state.is_main_process else None)
            elif name == "window_only":
                self.record(name, without_far_field(student))
            else:
                with no_attention(student):
                    self.record(name, student)


def evaluation_pairs(arguments, columns: list[str] | None, count: int) -> list[tuple[str, str]]:
    """Return the last `count` (query, passage) pairs of the evaluation data: two of its columns, or, without `columns`,
    the first sentence of each text and the rest of it.

    Raises `ValueError` for a missing column, or fewer than two pairs.
    """
    rows = find_data(arguments)[1]
    if rows is None:
        raise ValueError("eval_data must be given: the data has no split to evaluate on")
    rows = list(rows)
    for column in columns or [arguments.text_column or "text"]:
        if rows and column not in rows[0]:
            raise ValueError(
                f"pair_columns must name columns of the evaluation data, got {column!r}; it has {[*rows[0]]}"
            )
    if columns:
        pairs = [tuple(row[column] for column in columns) for row in rows]
        pairs = [pair for pair in pairs if all(pair)]
    else:
        pairs = first_sentence_pairs([row[arguments.text_column or "text"] for row in rows])
    if len(pairs) < 2:
        raise ValueError(f"retrieval needs at least 2 pairs, got {len(pairs)}")
    return pairs[-count:]


def passkey_questions(model, tokenizer, data: TaskData, length: int) -> list[Question]:
    """Return ten texts of `length` tokens made of the evaluation data, a number hidden at five depths of them.

    Raises `ValueError` where model, tokenizer or data do not allow them.
    """
    options = LongTextOptions("passkey", (length,), samples=2)
    try:
        check_model("teacher", model, options)
        rows = [row["input_ids"] for row in data.evaluation]
        text = Haystack(tokenizer, tokenizer.batch_decode(rows, skip_special_tokens=True))
        return [question for cell in options.cells() for question in options.questions(text, **cell)]
    except ValueError as error:
        raise ValueError(f"passkey_length={length}: {error}") from None


def without_far_field(student):
    """Return a copy of a student of which Nyström and retrieval heads see sinks and window alone.

    Raises `ValueError` for one that has no such heads: nothing of its attention can be taken away.
    """
    student = copy.deepcopy(student)
    states = getattr(student, "attention_states", {})
    groups = [g for state in states.values() for g in state.groups if g.spec.mechanism in ("nystrom", "retrieval")]
    if not groups:
        raise ValueError(
            "the control of sinks and window alone ('window_only') needs a model with mechanism='nystrom' or "
            f"'retrieval', whose far keys can be taken away, got {type(student).__name__} without"
        )
    for group in groups:
        if isinstance(group, NystromParameters):
            group.far_field, group.spec = False, replace(group.spec, exact_below=0)
        else:
            group.spec = replace(group.spec, num_blocks=0, far_field=False, cluster_keys=False)
    return student


@contextmanager
def no_attention(student):
    """Replace the attention output of every converted module by zeros within the context, as a control."""

    def zeros(state, query, key, value, call):
        return value.new_zeros(*query.shape[:3], value.shape[-1])

    with observed(student, zeros):
        yield student
