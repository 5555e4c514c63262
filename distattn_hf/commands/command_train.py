"""`distattn train`: train a native model from scratch."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import begin_run, resumable

command = typer.Typer()


@command.command(
    epilog="Examples:  distattn train configs/training/native_causal_lm.yaml   |   "
    "distattn train configs/training/native_causal_lm.yaml model.mechanism=l1 output_dir=out/native-l1"
)
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file as configs/training/native_*.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, with dots for nested keys: model.mechanism=l2")
    ] = None,
):
    """Train a model of the native family from scratch.

    Run it again to go on where it stopped.
    """
    begin_run(config, overrides)
    from ..training.arguments_scratch import read_scratch_config
    from ..training.from_scratch import summary, train_from_scratch

    arguments = read_scratch_config(config, overrides or ())
    with resumable(arguments.training.output_dir):
        result = train_from_scratch(arguments)
    if arguments.training.process_index == 0:
        print(summary(result))
        print(f"saved to {Path(arguments.training.output_dir) / 'final'}")
