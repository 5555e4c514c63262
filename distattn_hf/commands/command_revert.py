"""`distattn revert`: the original model again."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import Overwrite, begin

command = typer.Typer()


@command.command(epilog="Example:  distattn revert out/minilm-l2 out/minilm-again")
def revert(
    path: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub name.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overwrite: Overwrite = False,
):
    """Write the original model again, with dot-product attention.

    Its class and its weights, bit for bit unless they were trained since, and what lies beside them.
    """
    from ..storage.folders import check_output

    check_output(out, overwrite, source=path)
    begin(path)
    from ..conversion.convert import revert as revert_model
    from ..storage.companions import Source
    from ..storage.folders import save_checkpoint
    from ..storage.models import load_checkpoint

    model, tokenizer = load_checkpoint(path)
    original = revert_model(model)
    save_checkpoint(original, tokenizer, out, overwrite=overwrite, source=Source(path))
    print(f"{type(model).__name__} -> {type(original).__name__}, saved to {out}")
