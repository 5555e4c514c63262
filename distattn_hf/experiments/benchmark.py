"""`distattn benchmark`: speed and memory of every metric beside PyTorch's attention, and never for a wrong result."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from .benchmark_check import (
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
from .benchmark_config import BenchmarkConfig, Case
from .benchmark_load import load_config
from .benchmark_measure import LEAST_MEGABYTES, MemoryProbe, measure_memory, one_line, time_pair
from .benchmark_native import NativeConfig, run_native_benchmark
from .benchmark_nystrom import run_nystrom_benchmark
from .benchmark_nystrom_config import NystromConfig
from .benchmark_plot import plot_results
from .benchmark_report import DEFINITIONS, machine, table_header, table_line
from .benchmark_run import run_and_write

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


_LIST = "Separated by commas."


def benchmark(
    config: Annotated[Path | None, typer.Option(help="A YAML file of options; those given here win.")] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="distance, nystrom (linear), or native (the native family). Default: distance.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help=f"distance: l2, l1, ...; lp with its order: lp3, lp1.5. {_LIST}")
    ] = None,
    backends: Annotated[str | None, typer.Option(help=f"distance: auto or names. {_LIST}")] = None,
    passes: Annotated[
        str | None, typer.Option(help=f"all: forward, forward_backward; distance also decode. {_LIST}")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help=f"all: N of forward and forward_backward. {_LIST}")] = None,
    decode_lengths: Annotated[
        str | None, typer.Option(help=f"distance: keys that the query of decode sees. {_LIST}")
    ] = None,
    head_sizes: Annotated[str | None, typer.Option(help=f"distance: d. {_LIST}")] = None,
    heads: Annotated[int | None, typer.Option(help="all: query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="distance: key heads. Default: as many as query heads.")] = None,
    batch: Annotated[int | None, typer.Option(help="all: sequences.")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"distance: float32, float16, bfloat16, float64. {_LIST}")] = None,
    causal: Annotated[str | None, typer.Option(help="all: false, true or both.")] = None,
    device: Annotated[str | None, typer.Option(help="all: auto, cpu or cuda.")] = None,
    repeats: Annotated[int | None, typer.Option(help="all: pairs that are timed at least.")] = None,
    warmup: Annotated[int | None, typer.Option(help="all: untimed calls before.")] = None,
    min_seconds: Annotated[float | None, typer.Option(help="all: add pairs until so many seconds are sampled.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="all: start no pair after so many seconds.")] = None,
    naive: Annotated[
        bool | None, typer.Option("--naive/--no-naive", help="distance: also time cdist + softmax.")
    ] = None,
    naive_max_length: Annotated[int | None, typer.Option(help="distance: the longest length naive runs at.")] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="all: also measure peak memory (nystrom: on CPU).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="all: CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int | None, typer.Option(help="all: of the inputs and the order in a pair.")] = None,
    out: Annotated[
        str | None, typer.Option(help="all: the folder to write. Default: out/benchmark, -nystrom, -native.")
    ] = None,
    plot: Annotated[
        bool | None, typer.Option("--plot/--no-plot", help="all: draw the figures (needs matplotlib).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
):
    """Check each metric against the reference, then measure its time and memory beside PyTorch's own attention.

    nystrom: linear attention beside PyTorch's and other packages', with the error of each. native: local, strided,
    landmark, linear, performer, ... of the native family.

    Each option says whether the distance mechanism has it or all. What the others alone have are
    keys of their YAML files: nystrom strategies, peers, num_landmarks, window_size, num_sinks, head_size,
    sdpa_max_length, error_max_length; native mechanisms, head_size, sdpa_max_length.

    Exit code 1: a result was wrong (its line says WRONG and no time) or a case failed.
    """
    options = {name: value for name, value in locals().items() if name not in ("config", "overwrite")}
    chosen = load_config(config, options)
    run = {NystromConfig: run_nystrom_benchmark, NativeConfig: run_native_benchmark}.get(type(chosen), run_benchmark)
    if code := exit_code(run(chosen, overwrite=overwrite)):
        raise typer.Exit(code)
