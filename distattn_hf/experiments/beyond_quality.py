"""What Nyström attention keeps of SmolLM2 when a few key heads retrieve: a hidden number and perplexity, by share.

python -m distattn_hf.experiments.beyond_quality OUT.json [--shares 0.02,0.05,0.1,0.2] [--lengths 1024,2048]

Texts and figures are those of `retrieval_quality`. One fit serves all rows: with all heads Nyström's, on news that is
not measured; key heads then leave it in the order of their errors, or of a probe. (A conversion probes first, so that
upper layers are fitted on what the chosen heads give.) Beside them the teacher, all heads Nyström's (share 0), and the
same without its far field: sinks and window alone. The file is written after every row, and a run that was cut off
goes on from it, with a new fit.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
from transformers.utils import logging

from ..conversion.beyond import SELECTIONS, largest_errors, take_share
from ..conversion.cache_bytes import cache_bytes
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..conversion.probe import probe
from ..core.attention_spec import AttentionSpec
from ..data.batches import calibration_batch
from ..data.packing import token_stream
from ..data.sources import read_texts
from ..evaluation.scorecard import without_far_field
from ..storage.folders import write_json
from ..storage.models import load_checkpoint
from .retrieval_quality import measure


def fitted(model, tokenizer, options: CalibrationOptions):
    """Return (the model with all heads Nyström's, {selection: score of each key head}, heads of a key head)."""
    texts = read_texts("news", split="train")
    spec = AttentionSpec(mechanism="nystrom", exact_below=0, beyond="retrieval")
    student = convert(model, spec, calibration=texts, tokenizer=tokenizer, options=options)
    results: dict[str, list[dict]] = {}
    for group in student.conversion_report.groups:
        results.setdefault(group.module, []).append({"output_error": torch.tensor(group.output_error)})
    batch = calibration_batch(student, texts, tokenizer, max_length=1024, max_tokens=16384, seed=options.seed)
    rises, groups = probe(student, batch, options)
    return student, {"error": largest_errors(student, results, groups), "probe": rises}, groups


def with_share(student, scores: dict, groups: dict[str, int], share: float):
    """Return a copy of the model in which this share of the key heads retrieves."""
    student = copy.deepcopy(student)
    names = {name: [{} for _ in state.groups] for name, state in student.attention_states.items()}
    take_share(student, names, scores, groups, CalibrationOptions(beyond_share=share))
    return student


def main(given) -> None:
    """Measure what the file does not hold yet, print a line for each row and write the file."""
    logging.set_verbosity_error()
    model, tokenizer = load_checkpoint("smollm2-135m")
    model.eval()
    options = CalibrationOptions(
        steps=given.steps, max_length=given.fit_length, max_tokens=given.fit_tokens, max_error=math.inf,
        probe_lengths=tuple(given.probe_lengths),
    )  # fmt: skip
    about = {
        "checkpoint": "smollm2-135m", "steps": given.steps, "fit_length": given.fit_length,
        "fit_tokens": given.fit_tokens, "probe_lengths": given.probe_lengths,
    }  # fmt: skip
    results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {**about, "rows": []}
    if (before := {name: results.get(name) for name in about}) != about:
        raise ValueError(f"out: {given.out} was made with {before}, got {about}; name another file")
    student, scores, groups = fitted(model, tokenizer, options)
    results["scores"] = {
        kind: {f"{name} {head}": round(score, 5) for (name, head), score in found.items()}
        for kind, found in scores.items()
    }
    ids = token_stream(tokenizer, read_texts("news", split="test"), max(60_000, max(given.lengths) * given.rows))
    done = {(row["length"], row["select"], row["share"]) for row in results["rows"]}
    settings = [("teacher", None), ("window only", 0.0), ("none", 0.0)]
    settings += [(select, share) for share in given.shares for select in SELECTIONS]
    for length in given.lengths:
        for select, share in settings:
            if (length, select, share) in done:
                continue
            if select in SELECTIONS:
                measured = with_share(student, scores[select], groups, share)
            else:
                measured = {"teacher": model, "none": student}.get(select) or without_far_field(student)
            row = {"length": length, "select": select, "share": share, "cache_bytes": cache_bytes(measured)}
            results["rows"].append(row | measure(measured, tokenizer, ids, length, given.samples, given.rows))
            write_json(given.out, results)
            print(results["rows"][-1], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shares", default="0.02,0.05,0.1,0.2", type=lambda t: [float(part) for part in t.split(",")])
    for option, default in (("--lengths", "1024,2048"), ("--probe-lengths", "1024")):
        parser.add_argument(option, default=default, type=lambda text: [int(part) for part in text.split(",")])
    for option, default in (("steps", 200), ("fit-length", 1024), ("fit-tokens", 16384), ("samples", 10), ("rows", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    main(parser.parse_args())
