"""What the ranks of a process group tell each other about one sequence, each holding a stretch of it, with gradients.

All ranks take part in every exchange, forward and, in the opposite order, backward: autograd runs what was made later
first, each rank makes the same exchanges, and `tied` sees to it that no rank's backward pass leaves one out. That is of
the rank's own loss; what flows back through an exchange makes gradients those of the sum of all ranks' losses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..core.nystrom_hybrid import NOWHERE

# By their numbers, which ranks agree in.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Traffic:
    """What this rank sent: bytes of each kind of exchange, and rounds, in each of which it waits for others once.

    A sum over all ranks is counted as 2·(P - 1)/P of its bytes in 2·⌈log₂ P⌉ rounds, what is gathered from all as its
    bytes times P - 1 in ⌈log₂ P⌉.
    """

    sent: dict[str, int]
    rounds: dict[str, int]

    def add(self, kind: str, sent: int, rounds: int = 1) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + sent
        self.rounds[kind] = self.rounds.get(kind, 0) + rounds


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this process sends within; backward passes count, too."""
    traffic = Traffic({}, {})
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(kind: str, sent: int, rounds: int = 1) -> None:
    for traffic in _counting:
        traffic.add(kind, sent, rounds)


def _doublings(size: int) -> int:
    return (size - 1).bit_length()


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Stretch:
    """A rank's stretch of a sequence: where those of all ranks stand, and the first keys that are not padding.

    starts: P + 1 numbers, rank r holds tokens starts[r] ... starts[r + 1] - 1. first_kept (B, n): positions in the
    whole sequence of each row's first n tokens that are not padding, in order; NOWHERE where there are fewer.
    """

    group: dist.ProcessGroup
    rank: int
    starts: tuple[int, ...]
    first_kept: Tensor

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.starts) - 1

    @property
    def start(self) -> int:
        """The position of the rank's own first token."""
        return self.starts[self.rank]

    @property
    def length(self) -> int:
        """How many tokens the rank holds."""
        return self.starts[self.rank + 1] - self.start

    def wanted(self, owner: int, wanter: int, reach: int) -> range:
        """Return which of the owner's tokens are among the `reach` before the wanter's first, by position."""
        least = max(self.starts[owner], self.starts[wanter] - reach)
        return range(least, max(least, min(self.starts[owner + 1], self.starts[wanter])))

    def global_rank(self, rank: int) -> int:
        """Return the rank in the default group of a rank of this one."""
        return dist.get_global_rank(self.group, rank)


def cut(keep: Tensor, count: int, group: dist.ProcessGroup | None, agreed: dict[str, int], error=None) -> Stretch:
    """Return this rank's `Stretch`, of whose tokens keep (B, N) are real, with `count` of the first kept ones.

    agreed: numbers that must be the same on all ranks. error: what this rank has to raise; then all ranks raise, and
    none waits for another. Raises `ValueError` where ranks differ, naming the number and what each has.
    """
    group = dist.group.WORLD if group is None else group
    if not dist.is_initialized() or (rank := dist.get_rank(group)) < 0:
        raise error or ValueError(
            "group must be a process group that this process is in: call torch.distributed.init_process_group first"
        )
    agreed = {"batch size": len(keep), "first tokens asked for": count, **agreed}
    numbers = torch.tensor([error is not None, keep.shape[1], *agreed.values()], device=keep.device)
    table = torch.stack(_gather(numbers, group)).tolist()
    if error is not None:
        raise error
    if refused := [number for number, row in enumerate(table) if row[0]]:
        raise ValueError(f"ranks {refused} refused their arguments: their own errors say why")
    for name, *values in zip(agreed, *(row[2:] for row in table)):
        if len(set(values)) > 1:
            raise ValueError(f"{name} must be the same on all ranks, got {values} on ranks 0 to {len(table) - 1}")
    lengths = [row[1] for row in table]
    if 0 in lengths:
        raise ValueError(f"each rank must hold at least one token, got lengths {lengths}")
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    position = torch.where(keep, torch.arange(starts[rank], starts[rank + 1], device=keep.device), NOWHERE)
    first = F.pad(position.sort(-1).values[:, :count], (0, max(0, count - lengths[rank])), value=NOWHERE)
    first = torch.cat(_gather(first, group), dim=1).sort(-1).values[:, :count] if count else first
    return Stretch(group, rank, tuple(starts), first)


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    results = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(results, tensor.contiguous(), group=group)
    _count("shapes", _nbytes(tensor) * (len(results) - 1), _doublings(len(results)))
    return results


def first_of_next(tensor: Tensor, stretch: Stretch, last: int) -> Tensor:
    """Return the first column (B, 1) of the next rank's tensor (B, N); on the last rank, `last`."""
    columns = [*_gather(tensor[:, :1], stretch.group), torch.full_like(tensor[:, :1], last)]
    return columns[stretch.rank + 1]


def tied(output: Tensor, *exchanged: Tensor) -> Tensor:
    """Return the output such that its backward pass visits what was exchanged, also where this rank has no use for it.

    The others wait for it there.
    """
    return _Tied.apply(output, *exchanged)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, *exchanged):
        ctx.likes = [(tensor.shape, tensor.dtype) for tensor in exchanged]
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, *(gradient.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.likes)


# ------------------------------------------------------------------------------------------ tokens before a stretch


def earlier_rows(tensor: Tensor, stretch: Stretch, reach: int, kind: str = "halo") -> Tensor:
    """Return the rows (B, H, n, x) of the n <= reach tokens before this stretch; tensor (B, H, N, x): its own rows."""
    return _Earlier.apply(tensor, stretch, reach, kind)


class _Earlier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, stretch, reach, kind):
        ctx.stretch, ctx.reach, ctx.kind = stretch, reach, kind
        number = max(0, min(reach, stretch.start))
        result = tensor.new_empty(*tensor.shape[:2], number, tensor.shape[3])
        sends = {other: tensor[:, :, part] for other, part in _own_parts(stretch, reach).items()}
        receives = {other: result[:, :, part] for other, part in _earlier_parts(stretch, reach).items()}
        _send(stretch, sends, receives, kind, _hops(stretch, reach))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        stretch, reach = ctx.stretch, ctx.reach
        result = gradient.new_zeros(*gradient.shape[:2], stretch.length, gradient.shape[3])
        sends = {other: gradient[:, :, part] for other, part in _earlier_parts(stretch, reach).items()}
        parts = _own_parts(stretch, reach)
        receives = {other: torch.empty_like(result[:, :, part]) for other, part in parts.items()}
        _send(stretch, sends, receives, ctx.kind, _hops(stretch, reach))
        for other, part in parts.items():
            result[:, :, part] += receives[other]
        return result, None, None, None


def _own_parts(stretch: Stretch, reach: int) -> dict[int, slice]:
    """Return which of its own rows this rank sends to which later ones."""
    parts = {other: stretch.wanted(stretch.rank, other, reach) for other in range(stretch.rank + 1, stretch.size)}
    return {o: slice(part.start - stretch.start, part.stop - stretch.start) for o, part in parts.items() if part}


def _earlier_parts(stretch: Stretch, reach: int) -> dict[int, slice]:
    """Return where among the rows before its stretch this rank puts those of which earlier ranks."""
    begin = max(0, stretch.start - reach)
    parts = {other: stretch.wanted(other, stretch.rank, reach) for other in range(stretch.rank)}
    return {other: slice(part.start - begin, part.stop - begin) for other, part in parts.items() if part}


def _hops(stretch: Stretch, reach: int) -> int:
    """Return 1 if any rank sends anything at all, else 0."""
    return int(reach > 0 and stretch.size > 1)


def _send(stretch: Stretch, sends: dict[int, Tensor], receives: dict[int, Tensor], kind: str, rounds: int) -> None:
    """Send tensors to other ranks and fill those of `receives` with what they send, all at once."""
    whole = {other: tensor.contiguous() for other, tensor in sends.items()}
    filled = {other: torch.empty_like(t, memory_format=torch.contiguous_format) for other, t in receives.items()}
    operations = [
        dist.P2POp(operation, tensor, stretch.global_rank(other), stretch.group)
        for operation, tensors in ((dist.isend, whole), (dist.irecv, filled))
        for other, tensor in tensors.items()
    ]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    for other, tensor in filled.items():
        receives[other].copy_(tensor)
    _count(kind, sum(map(_nbytes, whole.values())), rounds)


# ------------------------------------------------------------------------------------------ sums over earlier ranks


def sum_of_earlier(tensor: Tensor, stretch: Stretch) -> Tensor:
    """Return the sum of the tensors (same shape) of all ranks before this one; its gradient is that of all after it.

    By doubling, in 1 + ⌈log₂(P - 1)⌉ rounds of one tensor each. It never subtracts, so sums of what is not negative
    lose nothing.
    """
    return _SumOfEarlier.apply(tensor, stretch)


class _SumOfEarlier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, stretch):
        ctx.stretch = stretch
        return _scan(tensor, stretch, forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _scan(gradient, ctx.stretch, forward=False), None


def _scan(tensor: Tensor, stretch: Stretch, forward: bool) -> Tensor:
    size = stretch.size
    place = stretch.rank if forward else size - 1 - stretch.rank

    def other(place):
        return place if forward else size - 1 - place

    def shift(sent, distance, least):
        """Send to the place `distance` further on, and return what comes from as far back, or None."""
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        receives = {other(place - distance): received} if place - distance >= least else {}
        sends = {other(place + distance): sent} if place >= least and place + distance < size else {}
        _send(stretch, sends, receives, "state", 1)
        return received if receives else None

    total = shift(tensor, 1, 0) if size > 1 else None
    total = torch.zeros_like(tensor) if total is None else total
    distance = 1
    # Place 0 has nothing before it, so what it would pass on is zero.
    while distance < size - 1:
        received = shift(total, distance, 1)
        total = total if received is None else total + received
        distance *= 2
    return total


# ------------------------------------------------------------------------------------------ some rows, to all ranks


def rows_at(tensor: Tensor, positions: Tensor, stretch: Stretch, kind: str = "sinks") -> Tensor:
    """Return, on all ranks, the rows (B, H, n, x) at positions (B, n) of the whole sequence; 0 where there is none.

    tensor (B, H, N, x): this rank's own rows.
    """
    if not positions.shape[1]:
        return tensor[:, :, :0]
    index = positions - stretch.start
    is_own = ((index >= 0) & (index < stretch.length))[:, None, :, None]
    index = index.clamp(0, stretch.length - 1)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return _SumOfAll.apply(torch.where(is_own, tensor.gather(2, index), 0.0), stretch, kind)


class _SumOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, stretch, kind):
        ctx.stretch, ctx.kind = stretch, kind
        return _sum(tensor, stretch, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _sum(gradient, ctx.stretch, ctx.kind), None, None


def _sum(tensor: Tensor, stretch: Stretch, kind: str) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=stretch.group)
    _count(kind, 2 * (stretch.size - 1) * _nbytes(total) // stretch.size, 2 * _doublings(stretch.size))
    return total
