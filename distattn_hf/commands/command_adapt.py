"""`distattn adapt`: convert a checkpoint and train it back to its teacher."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import begin_run, resumable, say

command = typer.Typer()


@command.command(
    epilog="Examples:  distattn adapt configs/training/minilm_l1.yaml   |   "
    "distattn adapt configs/training/minilm_l1.yaml spec.metric=l2 max_steps=50 output_dir=out/minilm-l2   |   "
    "torchrun --nproc-per-node 2 -m distattn_hf.cli adapt configs/training/minilm_l1.yaml use_cpu=true"
)
def adapt(
    config: Annotated[Path, typer.Argument(help="A YAML file as those in configs/training.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, with dots for nested keys: spec.metric=l2")
    ] = None,
):
    """Convert a checkpoint and train it back to its teacher.

    In stages; run it again to go on where it stopped.
    """
    begin_run(config, overrides)
    from ..training.adapt import adapt as run
    from ..training.arguments import read_config

    arguments = read_config(config, overrides or ())
    with resumable(arguments.training.output_dir):
        card = run(arguments, say=say)
    if arguments.training.process_index == 0:
        print(card.table())
        print(f"saved to {Path(arguments.training.output_dir) / 'student'}")
