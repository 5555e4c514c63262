"""`distattn benchmark`: time and memory of each metric."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import check_config, start

command = typer.Typer()
_LIST = "Separated by commas."


@command.command(
    epilog="Examples, of seconds and of minutes:  distattn benchmark --metrics l2,l1 --lengths 256 --passes forward "
    "--head-sizes 64 --no-memory --no-plot --repeats 3 --min-seconds 0 --out out/b   |   distattn benchmark --config "
    "configs/experiments/benchmark_quick.yaml --metrics l1,lp3 --out out/b2"
)
def benchmark(
    config: Annotated[Path | None, typer.Option(help="A YAML file of options; those given here win.")] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="distance, nystrom (linear), or native (the native family). Default: distance.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help=f"distance: l2, l1, ...; lp with its order: lp3, lp1.5. {_LIST}")
    ] = None,
    backends: Annotated[str | None, typer.Option(help=f"distance: auto or names. {_LIST}")] = None,
    passes: Annotated[
        str | None, typer.Option(help=f"all: forward, forward_backward; distance also decode. {_LIST}")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help=f"all: N of forward and forward_backward. {_LIST}")] = None,
    decode_lengths: Annotated[
        str | None, typer.Option(help=f"distance: keys that the query of decode sees. {_LIST}")
    ] = None,
    head_sizes: Annotated[str | None, typer.Option(help=f"distance: d. {_LIST}")] = None,
    heads: Annotated[int | None, typer.Option(help="all: query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="distance: key heads. Default: as many as query heads.")] = None,
    batch: Annotated[int | None, typer.Option(help="all: sequences.")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"distance: float32, float16, bfloat16, float64. {_LIST}")] = None,
    causal: Annotated[str | None, typer.Option(help="all: false, true or both.")] = None,
    softening: Annotated[float | None, typer.Option(help="distance: ε of every metric. Default: 0, plain.")] = None,
    softcap: Annotated[float | None, typer.Option(help="distance: a cap on logits. Default: 0, none.")] = None,
    device: Annotated[str | None, typer.Option(help="all: auto, cpu or cuda.")] = None,
    repeats: Annotated[int | None, typer.Option(help="all: pairs that are timed at least.")] = None,
    warmup: Annotated[int | None, typer.Option(help="all: untimed calls before.")] = None,
    min_seconds: Annotated[float | None, typer.Option(help="all: add pairs until so many seconds are sampled.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="all: start no pair after so many seconds.")] = None,
    naive: Annotated[
        bool | None, typer.Option("--naive/--no-naive", help="distance: also time cdist + softmax.")
    ] = None,
    naive_max_length: Annotated[int | None, typer.Option(help="distance: the longest length naive runs at.")] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="all: also measure peak memory (nystrom: on CPU).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="all: CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int | None, typer.Option(help="all: of the inputs and the order in a pair.")] = None,
    out: Annotated[
        str | None, typer.Option(help="all: the folder to write. Default: out/benchmark, -nystrom, -native.")
    ] = None,
    plot: Annotated[
        bool | None, typer.Option("--plot/--no-plot", help="all: draw the figures (needs matplotlib).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
):
    """Measure time and memory of each metric, once it is right.

    Each is checked against the reference, then measured beside PyTorch's own attention. nystrom: linear attention
    beside PyTorch's and other packages', with the error of each. native: local, strided, landmark, linear, performer,
    ... of the native family.

    Each option says whether the distance mechanism has it or all. What the others alone have are
    keys of their YAML files: nystrom strategies, peers, num_landmarks, window_size, num_sinks, head_size,
    sdpa_max_length, error_max_length; native mechanisms, head_size, sdpa_max_length.

    Exit code 1: a result was wrong (its line says WRONG and no time) or a case failed.
    """
    options = {name: value for name, value in locals().items() if name not in ("config", "overwrite")}
    if config is not None:
        check_config(config)
    start()
    from ..benchmark.command import benchmark as run

    if code := run(config, options, overwrite=overwrite):
        raise typer.Exit(code)
