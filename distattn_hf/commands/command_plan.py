"""`distattn plan`: which attention suits a model at a length, in so much memory."""

import json
import re
from typing import Annotated

import typer

from .shared import SourceArgument, begin, say

command = typer.Typer()

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@command.command(epilog="Example:  distattn plan smollm2-135m --length 8192 --memory 2GB")
def plan(
    path: SourceArgument,
    length: Annotated[int, typer.Option(help="Tokens of a text, those that are generated included.")],
    memory: Annotated[str, typer.Option(help="What there is for weights and cache: 16GB, 500MB, 8GiB.")],
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time reading of 2,048 tokens at most, in seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Say which attention a causal model should have at a length, and what it costs.

    The bytes of weights and cache, the time of reading beside the model's own attention, measured here, and what the
    attention was measured to lose.
    """
    for name, value in (("length", length), ("batch", batch)):
        if value < 1:
            raise ValueError(f"--{name} must be an integer >= 1, got {value}")
    size = read_bytes(memory)
    begin(path)
    from ..benchmark.plan import lines, make_plan
    from ..storage.models import load_checkpoint

    say(f"{path} is loaded" + (", and reading is timed; --no-measure leaves that out" if measure else ""))
    found = make_plan(load_checkpoint(path)[0], length, size, batch=batch, measure=measure, say=say)
    print(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(lines(found)))


def read_bytes(text: str) -> int:
    """Return the bytes of "16GB", "1.5 GiB" or a plain number; raises `ValueError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise ValueError(f"--memory must be a number and a unit such as 16GB, 500MB or 8GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])
