"""What `exact_below` costs: prefill, a token after it and the cache, beside exact_below=0, paired in one run.

python -m distattn_hf.experiments.exact_below_speed {smollm2-135m|FOLDER|HUB NAME} [--exact-below 2048]
    [--lengths 256,512,1024,2048,4096] [--pairs 9] [--steps 8] [--threads N] [--out out/exact-below]

A causal model; one that is not converted is, by a fit of two steps: speed does not depend on how good a fit is.
"""

import argparse
import copy
import random
import time
from pathlib import Path

import torch

from ..benchmark.measure import only_errors, spread
from ..benchmark.results import provenance
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert, revert
from ..core.attention_spec import AttentionSpec
from ..core.compatibility import CACHE_NAME, cache_of
from ..data.tasks import text_task_of
from ..storage.folders import write_json
from ..storage.models import load_checkpoint
from .long_text import cache_bytes, seconds_per_token

# Largest difference of logits, relative to the largest logit, in float32.
TOLERANCE = 1e-4
RESULTS = "exact_below.json"


def random_ids(model, length: int, seed: int = 0) -> torch.Tensor:
    """Draw random token ids (1, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


def make_pair(model, exact_below: int) -> tuple[dict, torch.nn.Module]:
    """Return ({"exact_below": student, "zero": a copy with exact_below=0}, teacher) of a model, converted or not."""
    if text_task_of(model) != "causal-lm":
        raise ValueError(f"{type(model).__name__} is no causal language model, so it has no cache to measure")
    if hasattr(model, "attention_states"):
        student, teacher = model, revert(model)
    else:
        spec, options = AttentionSpec(mechanism="nystrom"), CalibrationOptions(steps=2, progress=False)
        calibration = [{"input_ids": random_ids(model, 256, seed)} for seed in range(2)]
        student, teacher = convert(model, spec, calibration=calibration, options=options), model
    zero_student = copy.deepcopy(student)
    student.set_attention_options(exact_below=exact_below)
    zero_student.set_attention_options(exact_below=0)
    return {"exact_below": student.eval(), "zero": zero_student.eval()}, teacher.eval()


@torch.no_grad()
def check(models: dict, teacher, length: int) -> dict:
    """Check that attention is exact up to `length` keys, in prefill and after it.

    Returns {"length", "error", "error_of_zero", "bound"}. Raises `ValueError` if it is not, and if exact_below changes
    nothing, so that the ratios would be meaningless.
    """
    ids = random_ids(teacher, length)

    def logits(model):
        prefill = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], use_cache=True, **{CACHE_NAME: cache_of(prefill)})
        return torch.cat([prefill.logits, step.logits], dim=1).double()

    expected = logits(teacher)
    errors = {n: float((logits(m) - expected).abs().max() / expected.abs().max()) for n, m in models.items()}
    result = {"length": length, "error": errors["exact_below"], "error_of_zero": errors["zero"], "bound": TOLERANCE}
    if not result["error"] <= TOLERANCE:
        raise ValueError(
            f"exact_below is not exact at {length} keys: logits are off by {result['error']:.2g} (relative)"
        )
    if not result["error_of_zero"] > TOLERANCE:
        raise ValueError(f"at {length} keys exact_below=0 is exact, too: check at more than window and sinks hold")
    return result


@torch.no_grad()
def measure(models: dict, length: int, pairs: int, steps: int) -> dict:
    """Measure seconds of a prefill and of a token after it, each with its ratio to exact_below=0, and cache bytes."""
    ids = random_ids(models["zero"], length)
    names, samples, sizes = list(models), [], {}
    for round_number in range(pairs + 1):
        random.Random(round_number).shuffle(names)
        timing = {}
        for name in names:
            start = time.perf_counter()
            output = models[name](ids, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
            sizes[name] = cache_bytes(cache_of(output))
            token = output.logits[:, -1:].argmax(-1)
            step = seconds_per_token(models[name], cache_of(output), token, steps)
            timing[name] = {"prefill": seconds, "decode": step}
        if round_number:  # The first pair warms up.
            samples.append(timing)
    result = {"length": length, "pairs": pairs, "cache_bytes": sizes}
    for job in ("prefill", "decode"):
        result[job] = {name: spread([timing[name][job] for timing in samples]) for name in models}
        result[job]["ratio"] = spread([timing["exact_below"][job] / timing["zero"][job] for timing in samples])
    return result


def line(entry: dict) -> str:
    """Format one length as a line of the table."""
    ratios = [entry[job]["ratio"] for job in ("prefill", "decode")]
    sizes = [entry["cache_bytes"][name] / 1e6 for name in ("exact_below", "zero")]
    return f"{entry['length']:>7}  " + "  ".join(
        [f"x {r['median']:.2f} ({r['p10']:.2f}-{r['p90']:.2f})" for r in ratios]
        + [f"{sizes[0]:.1f} MB in place of {sizes[1]:.1f} MB"]
    )


@only_errors("transformers")
def main(arguments: list[str] | None = None) -> None:
    """Check, measure each length, print the table and write exact_below.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--exact-below", type=int, default=2048)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="tokens of which a pair takes the median")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/exact-below"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    lengths = [int(length) for length in options.lengths.split(",")]
    models, teacher = make_pair(load_checkpoint(options.source)[0], options.exact_below)
    report = {
        "provenance": provenance("cpu"), "source": options.source, "exact_below": options.exact_below,
        "specs": models["exact_below"].config.distattn["specs"], "dtype": "float32", "steps": options.steps,
        "check": check(models, teacher, max(n for n in (*lengths, options.exact_below) if n <= options.exact_below)),
        "results": [],
    }  # fmt: skip
    del teacher
    machine = report["provenance"]
    print(
        f"exact_below={options.exact_below} beside 0, {machine['cpu']}, {machine['threads']} threads: median "
        f"(10th-90th percentile) of {options.pairs} pairs"
    )
    print(" length  prefill  a token after it  cache")
    options.out.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        report["results"].append(measure(models, length, options.pairs, options.steps))
        print(line(report["results"][-1]), flush=True)
        write_json(options.out / RESULTS, report)


if __name__ == "__main__":
    main()
