"""Retrieval attention: a query sees the first keys, the last ones, and the few blocks of other keys that match it best.

Keys stand in blocks of b = block_size, counted from the first that is not padding. A query sees exactly, and sees
nothing else:
    the blocks that hold the first num_sinks keys,
    its own block, as far as causality lets it, and as many beside that as hold window_size - 1 keys,
    the num_blocks best of the others, of which it knows only means: score(block) = log Σ exp(logit(q, mean)) over the
    means of each mean_size of its keys.
Query heads of one key head choose together, by the average of their softmaxed scores. Where there are many blocks the
scores are taken within the num_candidates best groups of 16 means (at least twice as many as hold num_blocks blocks),
which are ranked by their own mean in the same way.
The choice has no gradient.

Sources: Landmark attention (Mohtashami & Jaggi, 2023), Quest (Tang et al., 2024), hierarchical attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention_spec import check_search
from .inputs import AttentionInputs

# Means that share one of the next level, by which they are found.
GROUP = 16


@dataclass(frozen=True)
class Search:
    """How many keys a query sees and how it finds them (see the head of this file).

    window_size 0: no window and no sinks, as in cross-attention. num_blocks: of every key head, or one number for each.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    window_size: int = 64
    num_sinks: int = 4
    block_size: int = 16
    num_blocks: int | tuple[int, ...] = 16
    mean_size: int = 4
    num_candidates: int = 32

    def __post_init__(self):
        least = {"window_size": 0, "num_sinks": 0, "block_size": 1, "mean_size": 1, "num_candidates": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be an integer >= {lowest}, got {value!r}")
        budgets = self.num_blocks if isinstance(self.num_blocks, list | tuple) else [self.num_blocks]
        if not budgets or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in budgets):
            raise ValueError(f"num_blocks must be an integer >= 0, or one for each key head, got {self.num_blocks!r}")
        if isinstance(self.num_blocks, list):
            object.__setattr__(self, "num_blocks", tuple(self.num_blocks))
        check_search(max(1, self.window_size), self.block_size, self.mean_size)

    @property
    def sink_blocks(self) -> int:
        """How many blocks the sinks fill."""
        return -(-self.num_sinks // self.block_size) if self.window_size else 0

    @property
    def reach(self) -> int:
        """How many blocks beside a query's own the window reaches into."""
        return -(-(self.window_size - 1) // self.block_size) if self.window_size else 0

    @property
    def most_blocks(self) -> int:
        """The largest of the heads' budgets."""
        return self.num_blocks if isinstance(self.num_blocks, int) else max(self.num_blocks)

    @property
    def looked_into(self) -> int:
        """How many groups are looked into: num_candidates, and at least twice as many as hold the chosen blocks."""
        return max(self.num_candidates, 2 * -(-self.most_blocks * self.block_size // (GROUP * self.mean_size)))

    def budget(self, key_heads: int, device=None) -> Tensor:
        """Return the number of blocks that each key head chooses, (H_kv,); raises `ValueError` for other heads."""
        numbers = (self.num_blocks,) * key_heads if isinstance(self.num_blocks, int) else self.num_blocks
        if len(numbers) != key_heads:
            raise ValueError(f"num_blocks must be one number or one for each of {key_heads} key heads, got {numbers!r}")
        return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class Means:
    """Means of the keys, mean_size at a time, as a search reads them.

    mean (B, H_kv, g, d, 16): of g groups; weight (B, g, 16): the share of real keys in each, 0 to 1. coarse
    (B, H_kv, ⌈g / 16⌉, d, 16) and coarse_weight (B, ⌈g / 16⌉, 16): the same of whole groups.
    """

    mean: Tensor
    weight: Tensor
    coarse: Tensor
    coarse_weight: Tensor


@dataclass(frozen=True)
class Retrieval:
    """One problem: `inputs` with keep broadcastable to (B, 1, 1, M), and how to search.

    Causal: the last N of the M keys are the queries' own. first (B,): the key that blocks are counted from; None: 0.
    relative_bias (H, N + M - 1): what joins the logits by relative position, of key minus query, from -(M - 1) on.
    means: those of the keys, where they are known already.
    """

    inputs: AttentionInputs
    search: Search
    first: Tensor | None = None
    relative_bias: Tensor | None = None
    means: Means | None = None


def first_keys(keep: Tensor | None) -> Tensor | None:
    """Return the number of each row's first real key, (B,), of a keep (B, M); None where it is 0 for all."""
    if keep is None or bool(keep[:, 0].all()):
        return None
    return keep.int().argmax(-1)


def aligned(tensor: Tensor, first: Tensor | None, axis: int) -> Tensor:
    """Return a tensor (B, ...) whose entries along an axis are moved so that `first` comes first; 0 behind the last."""
    if first is None:
        return tensor
    length = tensor.shape[axis]
    index = first[:, None] + torch.arange(length, device=tensor.device)
    shape = [1] * tensor.dim()
    shape[0], shape[axis] = index.shape
    inside, index = (index < length).view(shape), index.clamp(max=length - 1).view(shape)
    return tensor.gather(axis, index.expand(tensor.shape)).masked_fill(~inside, 0)


def block_means(key: Tensor, keep: Tensor, search: Search) -> Means:
    """Return the means of keys (B, H_kv, M, d), M whole blocks, of which keep (B, M) are real and the others 0."""
    size = search.mean_size
    fill = -key.shape[2] % (GROUP * size)
    key, keep = F.pad(key, (0, 0, 0, fill)), F.pad(keep, (0, fill), value=False)
    number = keep.unflatten(1, (-1, size)).sum(-1).to(key.dtype)
    total = key.unflatten(2, (-1, size)).sum(3)
    return means_of(total, number, size)


def means_of(total: Tensor, number: Tensor, size: int) -> Means:
    """Return the means of sums (B, H_kv, 16·g, d) of `number` (B, 16·g) of at most `size` keys each."""

    def divided(total, number):
        return (total / number.clamp_min(1)[:, None, :, None]).unflatten(2, (-1, GROUP)).transpose(-1, -2).contiguous()

    coarse_total, coarse_number = total.unflatten(2, (-1, GROUP)).sum(3), number.unflatten(1, (-1, GROUP)).sum(-1)
    fill = -coarse_number.shape[1] % GROUP
    coarse_total = F.pad(coarse_total, (0, 0, 0, fill))
    coarse_number = F.pad(coarse_number, (0, fill))
    return Means(
        divided(total, number),
        (number / size).unflatten(1, (-1, GROUP)),
        divided(coarse_total, coarse_number),
        (coarse_number / (size * GROUP)).unflatten(1, (-1, GROUP)),
    )
