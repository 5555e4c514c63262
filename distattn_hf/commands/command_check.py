"""`distattn check`: does everything work on this machine."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .shared import say, start

command = typer.Typer()


@command.command(epilog="Example:  distattn check --out check.json")
def check(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all results there, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Check on this machine that everything works, in about a minute.

    Formulas against loops, kernels and gradients against float64, huge and zero inputs, masks, every mechanism,
    converted models, saving and loading; which backend runs what and why, and its speed beside PyTorch's attention.
    Exit code 1 if anything failed. `python -m distattn_hf.benchmark.gpu_check` checks a GPU's kernels at length.
    """
    from ..storage.folders import check_writable, json_values, write_json

    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out must be a file, got the folder {str(out)!r}")
        check_writable(out)
    start()
    from ..benchmark.self_check import DistanceAttentionTester, TestConfig
    from ..benchmark.self_check_results import lines

    tester = DistanceAttentionTester(TestConfig(device=device))
    seen: list[str] = []

    def progress(found):
        if found.group not in seen:
            seen.append(found.group)
            say(f"{found.group} ...")

    report = tester.run_all_tests(echo=progress if sys.stderr.isatty() else None)
    print(json.dumps(json_values(report), indent=1) if as_json else "\n".join(lines(report)))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, json_values(report))
    raise typer.Exit(int(report["summary"]["failed"] > 0))
