"""The dial from a plain distance to the teacher: what a conversion without training costs, against ε / median.

python -m distattn_hf.experiments.softening_quality {iglm|minilm|smollm2|FOLDER} OUT.json [METRIC[=BUDGET,...] ...]

Each metric is fitted plain, then softened under budgets of KL (nats per query): the larger the budget, the nearer to
the plain distance the fit stays; l1=plain,0.004 fits these two alone. All with transform "scalar", so without maps. The
file is written after every fit, and a run that was cut off goes on from it. FOLDER: see `seq2seq`.
"""

import json
import sys
import time
from pathlib import Path
from statistics import fmean, median

from ..benchmark.measure import only_errors
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..evaluation.score import EvaluationOptions, evaluate_model
from ..storage.folders import write_json
from ..storage.models import load_checkpoint
from . import conversion_quality

METRICS = ("l2", "cosine", "l1")
BUDGETS = (0.004, 0.03, 0.1)
# Checkpoints of `conversion_quality`.
EMBEDDED = ("iglm", "minilm", "smollm2")


def seq2seq(folder: str):
    """Score the perplexity of the targets in FOLDER/heldout.tsv, a pair of texts a line below a header, beside an
    encoder-decoder's checkpoint: of every second pair, calibrated on the others.
    """
    model, tokenizer = load_checkpoint(folder)
    lines = (Path(folder) / "heldout.tsv").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(line.split("\t")) for line in lines]
    sources, targets = (tokenizer(side, padding=True, return_tensors="pt") for side in map(list, zip(*pairs[::2])))
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    options = EvaluationOptions(progress=False, batch_size=50)
    return (
        model,
        tokenizer,
        [{**sources, "labels": labels}],
        lambda candidate: evaluate_model(candidate, tokenizer, [], pairs=pairs[1::2], options=options),
    )


def fit(model, tokenizer, calibration, score, metric: str, budget: float | None) -> dict:
    """Convert, score and describe one student; budget None: the plain distance."""
    spec = AttentionSpec(
        metric, p=3.0 if metric == "lp" else None, transform="scalar", softening=0 if budget is None else "fit"
    )
    options = CalibrationOptions(steps=40, progress=False, **({} if budget is None else {"divergence_budget": budget}))
    start = time.perf_counter()
    student = convert(model, spec, calibration=calibration, tokenizer=tokenizer, options=options)
    seconds = time.perf_counter() - start
    report = student.conversion_report
    shares = [value for group in report.groups for value in group.softening_ratio or ()]
    return {
        "metric": metric,
        "budget": budget,
        "scores": score(student),
        "softening_ratio": {"mean": fmean(shares), "median": median(shares), "max": max(shares)} if shares else None,
        "divergence": report.mean_divergence_after,
        "alpha": report.mean_alpha,
        "seconds": round(seconds, 1),
    }


def row(result: dict, teacher: dict) -> str:
    """Return a line for a terminal: ratios of the scores to the teacher's, and ε in medians."""
    ratios = {name: round(value / teacher[name], 4) for name, value in result["scores"].items()}
    share = result["softening_ratio"]
    dial = "plain" if share is None else f"budget {result['budget']:g}, ε/median {share['median']:.2f}"
    return f"{result['metric']:<10} {dial:<32} ratio {ratios}  KL {result['divergence']:.4f}  {result['seconds']} s"


def wanted(arguments: list[str]) -> list[tuple[str, float | None]]:
    """Return the (metric, budget) to fit; budget None is the plain distance."""
    found = []
    for argument in arguments or METRICS:
        metric, _, budgets = argument.partition("=")
        chosen = [None if text == "plain" else float(text) for text in budgets.split(",")] if budgets else None
        found += [(metric, budget) for budget in chosen or (None, *BUDGETS)]
    return found


@only_errors("transformers")
def main(name: str, out: Path, arguments: list[str]) -> None:
    """Fit what the file does not hold yet, print a line for each fit and write the file."""
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"checkpoint": name, "fits": []}
    if results["checkpoint"] != name:
        raise SystemExit(f"{out} holds results of {results['checkpoint']}, not of {name}")
    known = name in EMBEDDED
    model, tokenizer, calibration, score = getattr(conversion_quality, name)() if known else seq2seq(name)
    results["teacher"] = score(model)
    done = {(fitted["metric"], fitted["budget"]) for fitted in results["fits"]}
    for metric, budget in wanted(arguments):
        if (metric, budget) not in done:
            results["fits"].append(fit(model, tokenizer, calibration, score, metric, budget))
            write_json(out, results)
            print(row(results["fits"][-1], results["teacher"]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in EMBEDDED and not Path(sys.argv[1]).is_dir():
        raise SystemExit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
