"""Older keys in an order of likeness: blocks of retrieval attention that hold keys which queries want together.

A key that a query looks for is one of 16 in a block of neighbours, and the other 15 are read for nothing; a block of
keys that lie near each other is wanted, or not, as a whole, and its mean says so. So the keys of whole segments are put
in order: halved along the direction in which they differ most, and again, down to blocks.

A unit is PANEL blocks. Segments of level l are 4^l units that start at a multiple of their size. A query whose window
begins in unit u sees the keys from the start of unit u on where they stand; those of the u units before it stand in the
fewest whole segments, so that their number grows with the logarithm of the length, and a new unit moves few of them.
Keys that are always read where they stand (the sinks' blocks) stay first in theirs, padding stays last.
"""

import torch
from torch import Tensor

from .retrieval import PANEL, Retrieval

# Keys at least by which the direction is told in which those of a part differ.
SAMPLE = 256


def units_before(problem: Retrieval, number: int) -> list[int]:
    """Return how many whole units of keys there are before the window of key `number`'s query, of each row (or of all).

    None before a row's first key.
    """
    search, firsts = problem.search, [0] if problem.first is None else problem.first.tolist()
    return [max(0, max(0, number - first) // search.block_size - search.reach) // PANEL for first in firsts]


def units_of(problem: Retrieval) -> int:
    """Return how many whole units of keys there are before the window of a problem's last query, at most in any row."""
    return max(units_before(problem, problem.inputs.key.shape[2] - 1))


def of_one_unit(problem: Retrieval) -> list[slice]:
    """Split the queries of a causal problem into slices whose windows begin in the same unit, in each row."""
    (count, num_keys), search = (t.shape[2] for t in (problem.inputs.query, problem.inputs.key)), problem.search
    size, before = search.block_size, num_keys - count
    firsts = [0] if problem.first is None else problem.first.tolist()
    # A window begins `reach` blocks before its query's own.
    starts = {
        first + (unit * PANEL + search.reach) * size - before
        for first in firsts
        for unit in range(1, (num_keys - first) // (PANEL * size) + 1)
    }
    cuts = [0, *sorted(start for start in starts if 0 < start < count), count]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:])]


def levels_of(units: int) -> int:
    """Return how many levels of segments there are among so many units."""
    return max(1, (units.bit_length() + 1) // 2)


def level_of(unit: Tensor, units: Tensor, levels: int) -> Tensor:
    """Return the level of the segment in which `unit` stands for a query behind `units` units (they broadcast)."""
    level = torch.zeros_like(unit + units)
    for higher in range(1, levels):
        size = 4**higher
        level = torch.where((unit // size + 1) * size <= units, higher, level)
    return level


def segments_before(units: int) -> list[tuple[int, int]]:
    """Return (first unit, units) of the segments of a query behind so many units."""
    found, start = [], 0
    size = 4 ** (levels_of(units) - 1)
    while start < units:
        while size > units - start:
            size //= 4
        found.append((start, size))
        start += size
    return found


def order_by_likeness(key: Tensor, keep: Tensor, block_size: int, unit: int, pinned: int, levels: int) -> Tensor:
    """Return which key stands at each place, int64 (B, H, levels, n·unit), of keys (B, H, M, d), M ≥ n whole units.

    Segments of level l are unit·4^l keys. keep (B, M): real keys; the others stay last in their segments. pinned: first
    keys that stay where they are. The order has no gradient.
    """
    units = key.shape[2] // unit
    key, batch, heads = key.detach(), *key.shape[:2]
    orders = []
    for level in range(levels):
        size = unit * 4**level
        whole = units * unit // size
        place = torch.arange(units * unit, device=key.device).expand(batch, heads, -1).clone()
        if whole:
            rows = key[:, :, : whole * size].unflatten(2, (whole, size))
            stays = torch.zeros(batch, 1, whole, size, dtype=torch.int8, device=key.device)
            stays = torch.where(keep[:, None, : whole * size].unflatten(2, (whole, size)), stays, 1)
            stays.flatten(2)[..., :pinned] = -1
            own = _halved(rows.flatten(0, 2), stays.expand(-1, heads, -1, -1).flatten(0, 2), block_size)
            start = torch.arange(whole, device=key.device)[:, None] * size
            place[..., : whole * size] = (own.view(batch, heads, whole, size) + start).flatten(2)
        orders.append(place)
    return torch.stack(orders, dim=2)


def _halved(key: Tensor, stays: Tensor, block_size: int) -> Tensor:
    """Return the order (R, n) of R segments of n keys (R, n, d); stays (R, n): -1 first, 1 last, 0: of its likeness."""
    count, length, size = key.shape
    number = torch.arange(length, device=key.device).expand(count, -1)
    number = number.gather(1, stays.argsort(dim=1, stable=True))
    while number.shape[1] > block_size:
        parts = count * length // number.shape[1]
        of_part = number.view(count, -1)
        x = key.gather(1, of_part[..., None].expand(-1, -1, size)).view(parts, -1, size)
        fixed = stays.gather(1, of_part).view(parts, -1)
        free = (fixed == 0)[..., None]
        # By their numbers, but for what stays: that is in its order already.
        by_number = (number + fixed.long() * length).argsort(dim=1)
        rank = by_number.argsort(dim=1) - (fixed < 0).sum(1, keepdim=True)
        step = (free.sum(1) // SAMPLE).clamp_min(1)
        sampled = free & (rank % step == 0)[..., None]
        mean = torch.where(sampled, x, 0.0).sum(1, keepdim=True) / sampled.sum(1, keepdim=True).clamp_min(1)
        rest = torch.where(sampled, x - mean, 0.0)
        farthest = rest.square().sum(-1).argmax(1)
        axis = rest.gather(1, farthest[:, None, None].expand(-1, 1, size)).mT
        for _ in range(2):
            axis = rest.mT @ (rest @ axis)
            largest = axis.abs().amax(1, keepdim=True)
            axis = axis / torch.where(largest > 0, largest, 1.0)
        along = (x @ axis)[..., 0]
        along = torch.where(along.isnan(), float("inf"), along)
        along = along.masked_fill(fixed < 0, -float("inf")).masked_fill(fixed > 0, float("inf"))
        # By their numbers where they are alike.
        order = by_number.gather(1, along.gather(1, by_number).argsort(dim=1, stable=True))
        number = number.gather(1, order).view(2 * parts, -1)
    fixed = stays.gather(1, number.view(count, -1)).view_as(number)
    return number.gather(1, (number + fixed.long() * length).argsort(dim=1)).view(count, length)


def in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """Return (B, H, levels·n·unit, x): the rows of (B, H, M, x) at each place of an order."""
    index = order.flatten(2)[..., None].expand(-1, -1, -1, tensor.shape[-1])
    return tensor.gather(2, index.expand(len(tensor), -1, -1, -1))
