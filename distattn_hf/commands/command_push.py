"""`distattn push`: a converted checkpoint to the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .flags import as_flags, option_names
from .shared import SOURCE, start

command = typer.Typer()


@command.command(
    epilog="Examples:  distattn push out/minilm-l2 me/minilm-l2 --base-model minilm   |   "
    "distattn push out/minilm-l2 me/minilm-l2 --license apache-2.0 --dry-run   |   "
    "distattn push out/smol me/smol --results out/passkey/passkey.json --results out/kv/kv.json"
)
def push(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="The folder of a converted checkpoint; its code is run to check it.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    license: Annotated[str | None, typer.Option(help="The licence's identifier. Default: the base model's.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help=f"{SOURCE} Default: the scorecard's teacher, if it is known.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a README.md that somebody wrote or edited.")
    ] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of the card: a file of distattn evaluate --out or, marked as yours, a JSON list of "
            '{"dataset", "metric", "value"}, optionally "base" (the base model\'s value) and "note". Again for more.'
        ),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Upload what differs from the base model alone, some kilobytes."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print the card, upload nothing.")] = False,
):
    """Check a converted checkpoint, write its card, upload it.

    It must load both ways, with the package and without. The token is taken from HF_TOKEN or `hf auth login`.
    """
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a folder; give the folder of a converted checkpoint")
    for file in results or ():
        if not file.is_file():
            raise ValueError(f"--results {str(file)!r} does not exist")
    start()
    from ..hub import push as push_folder

    result = push_folder(
        path, repo, private=private, license=license, base_model=base_model, commit_message=message,
        overwrite_card=overwrite_card, results=results, dry_run=dry_run, adapter=adapter,
    )  # fmt: skip
    for note in result.notes:
        print(f"note: {as_flags(note, option_names(context.command))}", file=sys.stderr)
    print(result.card if dry_run else result.url, end="" if dry_run else "\n")
