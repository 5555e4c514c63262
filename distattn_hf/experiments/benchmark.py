"""`distattn benchmark`: speed and memory of every metric beside PyTorch's attention, and never for a wrong result."""

import gc
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..conversion.saving import check_output
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
from .benchmark_config import BenchmarkConfig, Case, _choice, load_config, read_config
from .benchmark_measure import LEAST_MEGABYTES, MemoryProbe, one_line, time_pair
from .benchmark_nystrom import run_nystrom_benchmark
from .benchmark_nystrom_config import nystrom_config
from .benchmark_plot import plot_results, require_matplotlib
from .benchmark_report import DEFINITIONS, provenance, table_header, table_line, write_json

# A naive call takes many times ours: a few pairs give its ratio well enough.
_NAIVE_PAIRS = 5


def run_benchmark(config: BenchmarkConfig, *, overwrite: bool = False, echo=print) -> dict:
    """Measure every case, print a line for each and write benchmark.json after each; returns what was written.

    Raises `ValueError` before anything runs for an output folder that is not empty (unless `overwrite`) and for a plot
    without matplotlib. A run that is interrupted leaves the cases so far in benchmark.json, with "complete": false.
    """
    if config.plot:
        require_matplotlib()
    folder = check_output(config.out, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # Garbage is collected after every case: leave what the imports made out of it, 0.2 s a time.
    gc.freeze()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        report = {
            "schema": 1,
            "complete": False,
            "provenance": provenance(config.device),
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
            "definitions": DEFINITIONS,
            "results": [],
        }
        echo(_headline(config, report["provenance"]))
        echo(table_header())
        checker = Checker()
        with MemoryProbe(torch.get_num_threads()) if config.memory else nullcontext() as probe:
            for case in config.cases():
                result = run_case(case, config, checker, probe)
                report["results"].append(result)
                write_json(folder / "benchmark.json", report)
                echo(table_line(result))
        report["complete"] = True
        write_json(folder / "benchmark.json", report)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    written = [folder / "benchmark.json"]
    if config.plot and any(result["status"] == "ok" for result in report["results"]):
        written += plot_results(report, folder)
    echo("wrote " + ", ".join(map(str, written)))
    return report


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
    commit = source["commit"][:12] + (" with changes" if source["dirty"] else "") if source["commit"] else "no commit"
    lines = [
        f"distattn_hf {source['distattn_hf']} ({commit}), torch {source['torch']}, {source['device']}, "
        f"{source['cores']} cores, {source['threads']} threads",
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
    config: Annotated[Path | None, typer.Option(help="A YAML file with these options as keys; options win.")] = None,
    mechanism: Annotated[str | None, typer.Option(help="distance, or nystrom (linear). Default: distance.")] = None,
    metrics: Annotated[str | None, typer.Option(help=f"l2, l1, ...; lp with its order: lp3, lp1.5. {_LIST}")] = None,
    backends: Annotated[str | None, typer.Option(help=f"auto or names. {_LIST}")] = None,
    passes: Annotated[str | None, typer.Option(help=f"forward, forward_backward, decode. {_LIST}")] = None,
    lengths: Annotated[str | None, typer.Option(help=f"Of forward and forward_backward. {_LIST}")] = None,
    decode_lengths: Annotated[str | None, typer.Option(help=f"Keys that the query of decode sees. {_LIST}")] = None,
    head_sizes: Annotated[str | None, typer.Option(help=f"d. {_LIST}")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads. Default: as many as query heads.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences.")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"float32, float16, bfloat16, float64. {_LIST}")] = None,
    causal: Annotated[str | None, typer.Option(help="false, true or both.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Pairs that are timed at least.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Untimed calls before.")] = None,
    min_seconds: Annotated[float | None, typer.Option(help="Add pairs until so many seconds are sampled.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Start no pair of a case after so many seconds.")] = None,
    naive: Annotated[bool | None, typer.Option("--naive/--no-naive", help="Also time cdist + softmax.")] = None,
    naive_max_length: Annotated[int | None, typer.Option(help="The longest length naive runs at.")] = None,
    memory: Annotated[bool | None, typer.Option("--memory/--no-memory", help="Also measure peak memory.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the inputs and the order in a pair.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write. Default: out/benchmark.")] = None,
    plot: Annotated[bool | None, typer.Option("--plot/--no-plot", help="Draw the figures (needs matplotlib).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
):
    """Check each metric against the reference, then measure its time and memory beside PyTorch's own attention.

    nystrom: linear attention beside PyTorch's and other packages', with the error of each.

    Exit code 1: a result was wrong (its line says WRONG and no time) or a case failed.
    """
    options = {name: value for name, value in locals().items() if name not in ("config", "overwrite", "mechanism")}
    mechanism = read_config(config).get("mechanism", "distance") if mechanism is None else mechanism
    if _choice(mechanism, "mechanism", ("distance", "nystrom")) == "distance":
        report = run_benchmark(load_config(config, options), overwrite=overwrite)
    else:
        given = {name: value for name, value in options.items() if value is not None}
        chosen = nystrom_config({**read_config(config), **given, "mechanism": mechanism})
        report = run_nystrom_benchmark(chosen, overwrite=overwrite)
    if code := exit_code(report):
        raise typer.Exit(code)
