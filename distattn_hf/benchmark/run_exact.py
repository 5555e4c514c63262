"""`distattn benchmark`: speed and memory of every metric beside PyTorch's attention, and never for a wrong result."""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from .command import load_config
from .exact_check import (
    Checker,
    backend_of,
    check_rows,
    make_tensors,
    naive_attention,
    one_call,
    our_attention,
    pytorch_attention,
    summary,
)
from .exact_options import BenchmarkConfig, Case
from .measure import LEAST_MEGABYTES, MemoryProbe, measure_memory, one_line, time_pair
from .nystrom_options import NystromConfig
from .plot import plot_results
from .results import DEFINITIONS, machine, table_header, table_line
from .run import run_and_write
from .run_native import NativeConfig, run_native_benchmark
from .run_nystrom import run_nystrom_benchmark

# A naive call takes many times ours: a few pairs give its ratio well enough.
_NAIVE_PAIRS = 5


def run_benchmark(config: BenchmarkConfig, *, overwrite: bool = False, echo=print) -> dict:
    """Measure every case, print a line for each and write benchmark.json after each; returns what was written.

    Raises `ValueError` before anything runs for an output folder that is not empty (unless `overwrite`) and for a plot
    without matplotlib. A run that is interrupted leaves the cases so far in benchmark.json, with "complete": false.
    """
    return run_and_write(
        config, _results, measured_by=measure_memory, definitions=DEFINITIONS, headline=_headline,
        header=table_header(), line=table_line, plot=plot_results, overwrite=overwrite, echo=echo,
    )  # fmt: skip


def _results(config: BenchmarkConfig, probe: MemoryProbe | None) -> Iterator[dict]:
    checker = Checker()
    for case in config.cases():
        yield run_case(case, config, checker, probe)


def run_case(case: Case, config: BenchmarkConfig, checker: Checker, probe: MemoryProbe | None) -> dict:
    """Check one case, then time it and measure its memory; "status" is ok, wrong, skipped or failed."""
    result = {
        "label": case.label, "metric": case.metric, "p": case.p, "pass": case.pass_name, "length": case.length,
        "head_size": case.head_size, "dtype": case.dtype, "causal": case.causal, "batch": case.batch,
        "heads": case.heads, "kv_heads": case.kv_heads, "backend": case.backend, "ran": None,
    }  # fmt: skip
    try:
        tensors = make_tensors(case)
        try:
            result["ran"] = backend_of(case, tensors)
        except ValueError as error:
            return {**result, "status": "skipped", "reason": str(error)}
        result["gate"] = checker.check(case, result["ran"], tensors)
        if not result["gate"]["passed"]:
            return {**result, "status": "wrong"}
        times = _measure_time(case, config, tensors)
        memory = _measure_memory(case, config, probe, result["ran"])
    except Exception as error:  # One case out of memory must not end a run of hours; the exit code tells.
        return {**result, "status": "failed", "reason": one_line(error)}
    finally:
        tensors = None
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return {**result, **times, "memory": memory, "status": "ok"}


def _measure_time(case: Case, config: BenchmarkConfig, tensors) -> dict:
    ours = one_call(case, our_attention(case), tensors)
    limits = {"warmup": config.warmup, "max_seconds": config.max_seconds, "seed": config.seed}
    peer = one_call(case, pytorch_attention(case), tensors)
    pair = time_pair(peer, ours, case.device, repeats=config.repeats, min_seconds=config.min_seconds, **limits)
    times = {"ours": pair["second"], "sdpa": pair["first"], "ratio": pair["ratio"], "pairs": pair["pairs"]}
    if (reason := _no_naive(case, config)) is not None:
        return {**times, "naive": {"absent": reason}}
    attention = naive_attention(case)
    gate = summary(check_rows(case, attention, tensors, gradients=False))
    if not gate["passed"]:
        return {**times, "naive": {"absent": "WRONG", "gate": gate}}
    naive = one_call(case, attention, tensors)
    repeats = min(config.repeats, _NAIVE_PAIRS)
    pair = time_pair(ours, naive, case.device, repeats=repeats, min_seconds=0.0, **limits)
    return {**times, "naive": {"seconds": pair["second"], "ratio": pair["ratio"], "pairs": pair["pairs"], "gate": gate}}


def _no_naive(case: Case, config: BenchmarkConfig) -> str | None:
    """Why there is no naive time, in the few letters of a table cell; None: there is one."""
    if not config.naive:
        return "off"
    if case.pass_name != "decode" and case.length > config.naive_max_length:
        return f">{config.naive_max_length}"
    return "none" if naive_attention(case) is None else None


def _measure_memory(case: Case, config: BenchmarkConfig, probe: MemoryProbe | None, ran: str) -> dict:
    """{"ours", "sdpa", "naive": megabytes, a reason (text) or None, "ratio": ours / sdpa or None}."""
    if probe is None:
        return {"ours": None, "sdpa": None, "naive": None, "ratio": None}
    ours, sdpa = probe.measure(case, "ours", ran), probe.measure(case, "sdpa")
    naive = probe.measure(case, "naive") if _no_naive(case, config) is None else None
    known = isinstance(ours, float) and isinstance(sdpa, float) and sdpa >= LEAST_MEGABYTES
    return {"ours": ours, "sdpa": sdpa, "naive": naive, "ratio": ours / sdpa if known else None}


def _headline(config: BenchmarkConfig, source: dict) -> str:
    lines = [
        machine(source),
        f"batch {config.batch}, heads {config.heads}, key heads {config.key_heads}; ratio is ours / "
        "scaled_dot_product_attention, medians of pairs; MB at the peak, beyond the inputs; N of decode: its keys",
    ]
    if config.naive and any(length > config.naive_max_length for length in config.lengths):
        lines.append(f"naive (cdist + softmax + matmul) is not run above length {config.naive_max_length}")
    return "\n".join(lines)


def exit_code(report: dict) -> int:
    """0: every case that could run was right and measured; 1: one was wrong or failed, or none could run."""
    states = {result["status"] for result in report["results"]}
    return 0 if "ok" in states and not states & {"wrong", "failed"} else 1


def benchmark(config: Path | None, options: dict, *, overwrite: bool = False) -> int:
    """Run what a YAML file and `options` (those that are not None) say; returns the exit code."""
    chosen = load_config(config, options)
    run = {NystromConfig: run_nystrom_benchmark, NativeConfig: run_native_benchmark}.get(type(chosen), run_benchmark)
    return exit_code(run(chosen, overwrite=overwrite))
