"""`distattn set`: options that need no fit, on a converted checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from .choices import check_min_weight
from .flags import flag
from .shared import say

command = typer.Typer()


@command.command("set", epilog="Example:  distattn set out/smollm2-nystrom --exact-below 2048")
def set_options(
    path: Annotated[Path, typer.Argument(help="The folder of a converted checkpoint; its config.json is changed.")],
    exact_below: Annotated[
        int | None, typer.Option(help="nystrom: queries that see at most so many keys attend exactly. 0: none.")
    ] = None,
    window_size: Annotated[
        int | None,
        typer.Option(help="nystrom, retrieval: keys seen exactly; of nystrom no fewer than it was fitted with."),
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="retrieval: blocks that a query reads at most.")] = None,
    min_weight: Annotated[
        float | None, typer.Option(help="retrieval: share of the weight that makes a block be read. 0: num_blocks are.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="retrieval: keys found and read together.")] = None,
    far_field: Annotated[
        bool | None,
        typer.Option(help="retrieval: each block that is not read counts as one key that stands for it."),
    ] = None,
    cluster_keys: Annotated[
        bool | None, typer.Option(help="retrieval: older keys stand in blocks by their likeness, or as in the text.")
    ] = None,
    num_sinks: Annotated[int | None, typer.Option(help="retrieval: first tokens seen exactly.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="distance: auto, cpp, sdpa, triton, chunked or reference.")
    ] = None,
):
    """Set what needs no fit on a converted checkpoint."""
    from ..storage.folders import change_options

    options = {
        "exact_below": exact_below, "window_size": window_size, "num_blocks": num_blocks, "min_weight": min_weight,
        "block_size": block_size,
        "num_sinks": num_sinks, "far_field": far_field, "cluster_keys": cluster_keys, "backend": backend,
    }  # fmt: skip
    check_min_weight(min_weight)
    changes = {name: value for name, value in options.items() if value is not None}
    if not changes:
        raise ValueError(f"nothing to set; give one of {', '.join(map(flag, options))}")
    specs = change_options(path, **changes)
    print(f"changed {path / 'config.json'}")
    if backend is not None:
        _say_where_it_cannot_run(specs)


def _say_where_it_cannot_run(specs) -> None:
    """Note which backends this machine lacks: the folder may be for another one, which has a GPU or a compiler."""
    import torch

    from ..core.backends import explain_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for spec in specs:
        if not spec.has_option("backend"):
            continue
        try:
            explain_backend(metric=spec.metric, p=spec.p, num_queries=2, device=device, backend=spec.backend)
        except ValueError as error:
            say(f"note: on this machine it would be refused: {error}")
