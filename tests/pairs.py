"""Fewer cases of a table with three choices that still hold every pair of them."""


def pairwise(firsts, seconds, thirds) -> list[tuple]:
    """Return (first, second, third) for every first and second, the thirds in turn, as in a Latin square.

    Each first and each second meets every third where there are as many of the others as of the thirds.
    """
    return [
        (first, second, thirds[(row + column) % len(thirds)])
        for row, first in enumerate(firsts)
        for column, second in enumerate(seconds)
    ]
