"""What is still found in a long text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """lengths: in tokens."""

    lengths: tuple[int, ...] = (1024, 2048)


QUICK = {"lengths": (64,)}
AXES = ("lengths",)


def run(options: Options, results) -> None:
    """Measure."""
