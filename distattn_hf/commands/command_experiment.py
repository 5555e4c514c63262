"""`distattn experiment`: run an experiment of the package."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from ..experiments import EXPERIMENTS
from .shared import check_config, resumable, start

command = typer.Typer()


@command.command(
    epilog="Example:  distattn experiment long_context lengths=1024,2048 samples=20   |   distattn experiment "
    "long_context --config configs/experiments/long_context.yaml --out out/long"
)
def experiment(
    name: Annotated[str, typer.Argument(help=f"{', '.join(EXPERIMENTS)}.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value: its options; lists as a,b,c.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of its options; key=value wins.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of results and figures. Default: out/experiments/NAME.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Options that take seconds, to see it run.")] = False,
    options: Annotated[bool, typer.Option("--options", help="Say what its options are, and stop.")] = False,
):
    """Run an experiment: rows into a JSON file, then figures.

    Run it again to go on where it stopped: what the file holds is not measured again.
    """
    if name not in EXPERIMENTS:
        near = get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(EXPERIMENTS)}"
        raise ValueError(f"unknown experiment {name!r}; {hint}")
    if config is not None:
        check_config(config)
    start()
    from ..experiments.run_experiment import describe, load_experiment, run_experiment

    if options:
        print(describe(load_experiment(name)))
        return
    folder = out or Path("out", "experiments", f"{name}-quick" if quick else name)
    with resumable(folder):
        results = run_experiment(name, folder, overrides or (), config=config, quick=quick)
    print(f"saved to {results.path}")
