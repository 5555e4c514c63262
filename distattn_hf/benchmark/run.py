"""A run of `distattn benchmark`, whatever the mechanism: the output folder, threads, results as they come, the plot."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from ..storage.folders import check_output, write_json
from .measure import MemoryProbe
from .plot import require_matplotlib
from .results import provenance


def run_and_write(
    config, results: Callable[..., Iterator[dict]], *, measured_by: Callable, definitions: dict,
    headline: Callable[..., str], header: str, line: Callable[[dict], str],
    plot: Callable[[dict, Path], list[Path]], about: dict | None = None,
    footnotes: Callable[[list[dict]], list[str]] = lambda results: [], overwrite: bool = False, echo=print,
) -> dict:  # fmt: skip
    """Print a line for each result and write benchmark.json after each; returns what was written.

    Raises `ValueError` before anything runs for an output folder that is not empty (unless `overwrite`) and for a plot
    without matplotlib. A run that is interrupted leaves the results so far in benchmark.json, with "complete": false.

    Args:
        config: the options of the run.
        results: a generator function of (config, memory probe or None without `config.memory`).
        measured_by: the function that the probe measures memory with, see `MemoryProbe`.
        definitions: what the numbers mean.
        headline: a function of (config, provenance): what stands above the table.
        header: the titles of the table.
        line: a result as a line of the table.
        plot: a function of (report, folder) that draws the figures and returns their files.
        about: further entries of benchmark.json.
        footnotes: a function of all results: lines below the table.
    """
    if config.plot:
        require_matplotlib()
    folder = check_output(config.out, overwrite, marker=None)
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # Garbage is collected after every result: leave what the imports made out of it, 0.2 s a time.
    gc.freeze()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        report = {
            "schema": 1,
            **(about or {}),
            "complete": False,
            "provenance": provenance(config.device),
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
            "definitions": definitions,
            "results": [],
        }
        echo(headline(config, report["provenance"]))
        echo(header)
        with MemoryProbe(torch.get_num_threads(), measured_by) if config.memory else nullcontext() as probe:
            for result in results(config, probe):
                report["results"].append(result)
                write_json(folder / "benchmark.json", report)
                echo(line(result))
        report["complete"] = True
        write_json(folder / "benchmark.json", report)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    for note in footnotes(report["results"]):
        echo(note)
    written = [folder / "benchmark.json"]
    if config.plot and any(result["status"] == "ok" for result in report["results"]):
        written += plot(report, folder)
    echo("wrote " + ", ".join(map(str, written)))
    return report
