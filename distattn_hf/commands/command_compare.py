"""`distattn compare`: train from scratch with several attentions and seeds."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import check_config, resumable, start

command = typer.Typer()


@command.command(
    epilog="Example:  distattn compare configs/experiments/native_comparison.yaml max_steps=100 output_dir=out/c"
)
def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file as configs/experiments/native_comparison.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for all runs.")] = None,
):
    """Train from scratch with several attentions and seeds.

    Gives a table and a figure; finished runs are not done again.
    """
    check_config(config)
    start()
    from ..experiments.native_comparison import compare as run
    from ..experiments.native_comparison import read_comparison, table

    comparison = read_comparison(config, overrides or ())
    with resumable(comparison.output_dir):
        results = run(comparison)
    print(table(results))
    print(f"saved to {comparison.output_dir}")
