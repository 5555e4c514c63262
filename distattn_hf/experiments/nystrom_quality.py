"""What linear time costs without training: Nyström conversions of real checkpoints beside their window-only control.

python -m distattn_hf.experiments.nystrom_quality {iglm|minilm|smollm2} [--landmarks 16 64 ...] [--max-error 0.4 ...]
"""

import argparse
import copy
import math
import time
from dataclasses import replace

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


@only_errors("transformers")
def main() -> None:
    """Print a line for the teacher, the control, and each number of landmarks and limit of the error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("iglm", "minilm", "smollm2"))
    parser.add_argument("--landmarks", type=int, nargs="+", default=[64])
    parser.add_argument("--max-error", type=float, nargs="*", default=[], help="beside no limit: heads left exact")
    parser.add_argument("--refit", action="store_true", help="fit anew for each limit, as `convert` does; else once")
    parser.add_argument("--steps", type=int, default=None)
    options = parser.parse_args()
    model, tokenizer, calibration, score, fields = globals()[options.task]()
    teacher = score(model)
    print("teacher", teacher, flush=True)
    control = None
    for count in options.landmarks:
        # The texts are short, and the far field is to be measured.
        spec = AttentionSpec(mechanism="nystrom", num_landmarks=count, exact_below=0, **fields)
        fitted = None
        for limit in (None, *options.max_error):
            start = time.perf_counter()
            if fitted is None or options.refit:
                fit = CalibrationOptions(steps=options.steps, max_error=limit, progress=False)
                own = spec if limit is None else replace(spec, beyond="exact")
                fitted = convert(model, own, calibration=calibration, tokenizer=tokenizer, options=fit)
                print(fitted.conversion_report.summary())
            student = fitted if limit is None or options.refit else limited(fitted, limit)
            seconds = time.perf_counter() - start
            if control is None:
                control = score(without_far_field(student))
                print("window only", control, flush=True)
            scores = score(student)
            ratios = {name: round(value / teacher[name], 4) for name, value in scores.items()}
            share_closed = gap_closed(scores, control, teacher)
            gap_note = "" if share_closed is None else f"gap closed {share_closed:.3f}, "
            print(
                f"m={count} max_error={limit} {scores} ratio {ratios} {gap_note}"
                f"{count_nystrom_heads(student)} Nyström heads, {seconds:.0f} s", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
