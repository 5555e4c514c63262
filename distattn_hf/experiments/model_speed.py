"""Speed of converted models beside the untouched one: prefill and generation, interleaved in one run.

`python -m distattn_hf.experiments.model_speed {smollm2-135m|iglm|FOLDER|HUB NAME} [METRIC ...]` is the same with other
words.
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..benchmark.measure import only_errors, spread
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..storage.models import load_checkpoint
from .run_experiment import run_experiment

METRICS = ("sqeuclidean", "l2", "cosine", "l1")


def _seconds(run, model) -> float:
    start = time.perf_counter()
    run(model)
    return time.perf_counter() - start


def model_speed(models: dict, vocabulary: int, options: "Options") -> dict[str, dict[str, list[float]]]:
    """Return {"prefill" or "generate": {model's name: seconds of each round}}; the order within a round is random."""
    ids = torch.randint(100, vocabulary, (1, options.prefill_tokens), generator=torch.Generator().manual_seed(0))
    prompt, new = ids[:, : options.prompt_tokens], options.new_tokens
    asked = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    jobs = {
        "prefill": lambda model: model(ids, use_cache=True, logits_to_keep=1),
        "generate": lambda model: model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked),
    }
    order, seconds_by_job = list(models), {job: {name: [] for name in models} for job in jobs}
    with torch.no_grad():
        for round_number in range(options.rounds + 1):
            random.Random(round_number).shuffle(order)
            for job, run in jobs.items():
                for name in order:
                    seconds = _seconds(run, models[name])
                    if round_number:  # The first round warms up.
                        seconds_by_job[job][name].append(seconds)
    return seconds_by_job


@dataclass(frozen=True)
class Options:
    """checkpoint: a causal model, "untouched". metrics: of its conversions, lp with p = 3; two steps fit them, as speed
    does not depend on how good a fit is. prefill_tokens: of a text that is read. prompt_tokens, new_tokens: of one
    that is gone on with. rounds: in which each model runs once, in random order.
    """

    checkpoint: str = "smollm2-135m"
    metrics: tuple[str, ...] = METRICS
    prefill_tokens: int = 1024
    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 9

    def __post_init__(self):
        for name in ("prefill_tokens", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        if self.prompt_tokens > self.prefill_tokens:
            raise ValueError(f"prompt_tokens must be at most prefill_tokens, got {self.prompt_tokens}")
        for metric in self.metrics:
            _spec(metric)


QUICK = {"metrics": ("l2",), "prefill_tokens": 64, "prompt_tokens": 32, "new_tokens": 2, "rounds": 1}


def _spec(metric: str) -> AttentionSpec:
    return AttentionSpec(metric, p=3.0 if metric == "lp" else None)


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Measure a row for each job and model: median seconds, and the ratio to the untouched model's within a round."""

    @cache
    def times():
        teacher, tokenizer = load_checkpoint(options.checkpoint)
        models = {"untouched": teacher.eval()}
        fit = CalibrationOptions(steps=2, sequences=2, progress=False)
        text = ["The quick brown fox jumps over the lazy dog. " * 20] * 4
        for metric in options.metrics:
            models[metric] = convert(teacher, _spec(metric), calibration=text, tokenizer=tokenizer, options=fit).eval()
        return model_speed(models, teacher.config.vocab_size, options)

    for job in ("prefill", "generate"):
        for name in ("untouched", *options.metrics):
            results.row({"job": job, "attention": name}, lambda j=job, n=name: _compared(times()[j], n))


def _compared(times: dict[str, list[float]], name: str) -> dict:
    ratios = spread([own / reference for own, reference in zip(times[name], times["untouched"], strict=True)])
    return {"seconds": statistics.median(times[name]), "ratio": ratios["median"], "p10": ratios["p10"],
            "p90": ratios["p90"]}  # fmt: skip


def main(names: list[str]) -> None:
    """Run the experiment on a checkpoint, by metrics as they are named."""
    if not names:
        raise SystemExit(__doc__)
    given = [f"checkpoint={names[0]}", *([f"metrics={','.join(names[1:])}"] if names[1:] else [])]
    run_experiment("model_speed", Path("out", "experiments", f"model_speed-{Path(names[0]).name}"), given)


if __name__ == "__main__":
    main(sys.argv[1:])
