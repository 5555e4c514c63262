"""Speed of converted models beside the untouched one: prefill and generation, interleaved in one run.

python -m distattn_hf.experiments.model_speed {smollm2-135m|iglm|FOLDER|HUB NAME} [METRIC ...]
"""

import random
import statistics
import sys
import time

import torch

from ..benchmark.measure import only_errors
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..storage.models import load_checkpoint

METRICS = ("sqeuclidean", "l2", "cosine", "l1")
PREFILL_TOKENS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 1024, 512, 32, 9


def _seconds(run, model) -> float:
    start = time.perf_counter()
    run(model)
    return time.perf_counter() - start


def model_speed(models: dict, vocabulary: int, rounds: int = ROUNDS) -> dict[str, dict[str, list[float]]]:
    """Return {"prefill" or "generate": {model's name: seconds of each round}}; the order within a round is random."""
    ids = torch.randint(100, vocabulary, (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(0))
    prompt = ids[:, :PROMPT_TOKENS]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    jobs = {
        "prefill": lambda model: model(ids, use_cache=True, logits_to_keep=1),
        "generate": lambda model: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options),
    }
    order, seconds_by_job = list(models), {job: {name: [] for name in models} for job in jobs}
    with torch.no_grad():
        for round_number in range(rounds + 1):
            random.Random(round_number).shuffle(order)
            for job, run in jobs.items():
                for name in order:
                    seconds = _seconds(run, models[name])
                    if round_number:  # The first round warms up.
                        seconds_by_job[job][name].append(seconds)
    return seconds_by_job


@only_errors("transformers")
def main(names: list[str]) -> None:
    """Print the median seconds of each model and its ratio to the unconverted one, paired by round."""
    if not names:
        raise SystemExit(__doc__)
    teacher, tokenizer = load_checkpoint(names[0])
    models = {"untouched": teacher.eval()}
    # Speed does not depend on the quality of the fit: two steps give all parameters of a calibrated model.
    options = CalibrationOptions(steps=2, sequences=2)
    text = ["The quick brown fox jumps over the lazy dog. " * 20] * 4
    for metric in names[1:] or METRICS:
        spec = AttentionSpec(metric, p=3.0 if metric == "lp" else None)
        models[metric] = convert(teacher, spec, calibration=text, tokenizer=tokenizer, options=options).eval()
    for job, times in model_speed(models, teacher.config.vocab_size).items():
        for name, seconds in times.items():
            ratios = sorted(own / reference for own, reference in zip(seconds, times["untouched"], strict=True))
            spread = f"{ratios[len(ratios) // 10]:.3f} to {ratios[-1 - len(ratios) // 10]:.3f}"
            medians = f"{statistics.median(seconds):7.3f} s  x {statistics.median(ratios):.3f}"
            print(f"{job:<9} {name:<12} {medians}  ({spread})")


if __name__ == "__main__":
    main(sys.argv[1:])
