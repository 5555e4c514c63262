"""What linear time costs without training: Nyström conversions of real checkpoints beside their window-only control."""

import copy
import math
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..benchmark.measure import only_errors
from ..conversion.beyond import beyond_heads, take_beyond
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..core.parameters import NystromParameters
from ..data.sources import news_articles
from ..evaluation.score import EvaluationOptions, embedding_agreement, evaluate_model
from ..evaluation.scorecard import without_far_field
from ..storage.models import load_checkpoint
from .conversion_quality import iglm as iglm_task


def iglm():
    """Return the setup of `conversion_quality`: antibody sequences of up to 150 tokens."""
    return *iglm_task(), {"window_size": 16}


def minilm():
    """Score articles of 256 to 512 tokens: cosine with the teacher's embeddings, mean reciprocal rank by title."""
    model, tokenizer = load_checkpoint("minilm")
    articles = news_articles()
    long_articles = [a for a in articles[3000:] if len(tokenizer(a["text"])["input_ids"]) >= 256][:300]
    options = EvaluationOptions(max_length=512, progress=False)

    def score(candidate):
        pairs = [(a["title"], a["text"]) for a in long_articles]
        scores = evaluate_model(candidate, tokenizer, [], pairs=pairs, options=options)
        cosine = embedding_agreement(candidate, model, tokenizer, [text for _, text in pairs[:64]], options)
        return {"mrr": scores["mrr"], "cosine": cosine}

    return model, tokenizer, [a["text"] for a in articles[:64]], score, {}


def smollm2():
    """Score perplexity at 1,024 tokens on 8,192 tokens of articles from the 3,001st on; calibrated on the first 200."""
    model, tokenizer = load_checkpoint("smollm2-135m")
    texts = [article["text"] for article in news_articles()]
    options = EvaluationOptions(max_length=1024, max_tokens=8192, progress=False)
    return (model, tokenizer, texts[:200], lambda m: evaluate_model(m, tokenizer, texts[3000:], options=options), {})


@torch.no_grad()
def limited(student, max_error: float):
    """Return a copy of a Nyström model in which heads with an error above `max_error` keep dot-product attention."""
    student = copy.deepcopy(student)
    figures: dict[str, list[dict]] = {}
    for group in student.conversion_report.groups:
        figures.setdefault(group.module, []).append({"output_error": torch.tensor(group.output_error)})
    for name, state in student.attention_states.items():
        take_beyond(student, name, state, figures[name], beyond_heads(state, figures[name], max_error, groups=1))
    return student


def count_nystrom_heads(student) -> int:
    """Return the number of Nyström heads."""
    groups = (group for state in student.attention_states.values() for group in state.groups)
    return sum(group.num_heads for group in groups if isinstance(group, NystromParameters))


def gap_closed(found: dict, control: dict, teacher: dict) -> float | None:
    """Return the share of the gap in log-perplexity between control and teacher that is closed."""
    if "perplexity" not in found:
        return None
    student_loss, control_loss, teacher_loss = (math.log(scores["perplexity"]) for scores in (found, control, teacher))
    return (control_loss - student_loss) / (control_loss - teacher_loss)


CHECKPOINTS = {"iglm": iglm, "minilm": minilm, "smollm2": smollm2}
AXES = ("landmarks", "max_errors")


@dataclass(frozen=True)
class Options:
    """checkpoint: iglm, minilm or smollm2. landmarks: of every head, each number once. max_errors: heads further off
    stay exact; beside no limit. refit: fit anew for each limit, as `convert` does; else once. steps: of the fit; null:
    as in `convert`.
    """

    checkpoint: str = "smollm2"
    landmarks: tuple[int, ...] = (64,)
    max_errors: tuple[float, ...] = ()
    refit: bool = False
    steps: int | None = None

    def __post_init__(self):
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}, got {self.checkpoint!r}")
        for count in self.landmarks:
            AttentionSpec(mechanism="nystrom", num_landmarks=count)
        for limit in (None, *self.max_errors):
            self.fit(limit)

    def fit(self, limit: float | None) -> CalibrationOptions:
        """Return the options of a fit whose heads further off than `limit` stay exact."""
        return CalibrationOptions(steps=self.steps, max_error=limit, progress=False)


QUICK = {"landmarks": (8,), "steps": 2}


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Measure a row for the teacher, the control, and each number of landmarks and limit of the error."""

    @cache
    def task():
        return CHECKPOINTS[options.checkpoint]()

    @cache
    def fitted(count: int, limit: float | None):
        model, tokenizer, calibration, _, fields = task()
        # The texts are short, and the far field is to be measured.
        spec = AttentionSpec(mechanism="nystrom", num_landmarks=count, exact_below=0, **fields)
        own = spec if limit is None else replace(spec, beyond="exact")
        return convert(model, own, calibration=calibration, tokenizer=tokenizer, options=options.fit(limit))

    def student(count: int, limit: float | None):
        if limit is None or options.refit:
            return fitted(count, limit)
        return limited(fitted(count, None), limit)

    def score(model) -> dict:
        return task()[3](model)

    teacher = results.row({"attention": "teacher"}, lambda: score(task()[0]))
    control = results.row(
        {"attention": "window only"}, lambda: score(without_far_field(student(options.landmarks[0], None)))
    )
    for count in options.landmarks:
        for limit in (None, *options.max_errors):

            def measure(count=count, limit=limit):
                made = student(count, limit)
                scores = score(made)
                ratios = {f"{name}_ratio": value / teacher[name] for name, value in scores.items()}
                closed = gap_closed(scores, control, teacher)
                return {**scores, **ratios, "gap_closed": closed, "nystrom_heads": count_nystrom_heads(made)}

            results.row({"attention": "nystrom", "landmarks": count, "max_error": limit}, measure)
        fitted.cache_clear()
