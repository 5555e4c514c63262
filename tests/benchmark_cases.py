"""What the tests of `distattn benchmark` share, whatever the mechanism."""

from pathlib import Path

import torch
from typer.testing import CliRunner

from distattn_hf.commands.command_benchmark import command as benchmark

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "experiments").glob("benchmark*.yaml"))


def recorded(run, config) -> tuple[dict, str]:
    """(the report, what was printed) of one run."""
    lines = []
    report = run(config, echo=lines.append)
    return report, "\n".join(lines)


def command_line(*arguments):
    return CliRunner().invoke(benchmark, [str(a) for a in arguments])


class WrongSlope(torch.autograd.Function):
    """The identity, whose gradient is 1% too large."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient
