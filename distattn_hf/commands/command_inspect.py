"""`distattn inspect`: what is converted, and what the conversion lost."""

import json
from typing import Annotated

import typer

from .shared import begin

command = typer.Typer()


@command.command(epilog="Example:  distattn inspect out/minilm-l2 --per-head")
def inspect(
    path: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub name.")],
    per_head: Annotated[bool, typer.Option("--per-head", help="Print a line for every head.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Show what is converted, and what the conversion lost.

    With λ and α of every module, or of every head.
    """
    begin(path)
    from ..conversion.report_of_model import current_report
    from ..storage.models import load_checkpoint

    report = current_report(load_checkpoint(path)[0])
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.table(per_head))
