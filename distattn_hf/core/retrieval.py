"""Retrieval attention: a query sees the first keys, the last ones, and the few other blocks of its largest logits.

Keys stand in blocks of b = block_size, counted from the first that is not padding. A query reads exactly:
    the blocks that hold the first num_sinks keys,
    its own block, as far as causality lets it, and as many beside that as hold window_size - 1 keys,
    of the others the best num_blocks, as far as one of their keys has a share min_weight of the query's weight.
Of the rest each block counts as one key that stands for it, the far field (retrieval_far.py), or as nothing.
A block's score is the largest logit of its keys, as far as a copy of them in four bits says (`Codes`), for logits that
are a dot product; other metrics look at the keys themselves. Query heads of one key head choose together: each by its
softmax over the scores, beside the logits of what it reads anyway where min_weight asks for shares, and a block counts
as it does for the head that wants it most. The choice has no gradient.

In causal attention blocks are of alike keys, which their means tell from others (retrieval_order.py): the copies of the
CANDIDATES blocks alone are looked at whose means, and how far their keys lie about them, promise most. In blocks of
neighbours (cluster_keys=False, and wherever a whole block's worth is not known, see `is_of_metric_alone`) means do not
do in place of the copies: they average out the one key that a query looks for; nor does a choice of coarser blocks
before the look, for the same reason.

min_weight lets every head and query read what it needs: in a language model most heads look at the sinks and the
window, and blocks are spent on those few that look things up. Across sequences, beside a position bias and under a cap
the scores do not tell shares: num_blocks are read there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention_spec import OF_BLOCKS
from .inputs import AttentionInputs
from .metrics import BUILT_IN

# Blocks of a panel, whose means and stand-ins lie side by side for the CPU kernel's vectors.
PANEL = 16
# Blocks of alike keys whose codes a query looks at, at least: those of the largest q·mean + SPREADS·√Σ q²·variance.
# With the mean alone, or 64, the one block is missed at times in which a key stands that is like no other.
CANDIDATES, SPREADS = 128, 2.5
# Codes are 1 to 15 about 8; queries whole numbers up to 63, so that 64 products of both fit into 16 bits.
_MIDDLE, _LARGEST_CODE, _LARGEST_QUERY, _LARGEST_BYTE = 8, 7, 63, 127


@dataclass(frozen=True)
class Search:
    """How many keys a query sees (see the head of this file).

    window_size 0: no window and no sinks, as in cross-attention. num_blocks: of every key head, or one number for each.
    far_field: whether a block that is not read counts as one key (see `retrieval_far.has_far_field` for where).

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    window_size: int = 64
    num_sinks: int = 4
    block_size: int = 16
    num_blocks: int | tuple[int, ...] = OF_BLOCKS["num_blocks"]
    min_weight: float = OF_BLOCKS["min_weight"]
    far_field: bool = True
    cluster_keys: bool = OF_BLOCKS["cluster_keys"]

    def __post_init__(self):
        for name, least in (("window_size", 0), ("num_sinks", 0), ("block_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        for name in ("far_field", "cluster_keys"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.min_weight, bool) or not isinstance(self.min_weight, int | float):
            raise ValueError(f"min_weight must be a number, got {self.min_weight!r}")
        if not 0 <= self.min_weight < 1:
            raise ValueError(f"min_weight must be from 0 to below 1, got {self.min_weight!r}")
        budgets = self.num_blocks if isinstance(self.num_blocks, list | tuple) else [self.num_blocks]
        if not budgets or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in budgets):
            raise ValueError(f"num_blocks must be an integer >= 0, or one for each key head, got {self.num_blocks!r}")
        if isinstance(self.num_blocks, list):
            object.__setattr__(self, "num_blocks", tuple(self.num_blocks))

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

    def budget(self, key_heads: int, device=None) -> Tensor:
        """Return how many blocks each key head chooses at most, (H_kv,); raises `ValueError` for other heads."""
        numbers = (self.num_blocks,) * key_heads if isinstance(self.num_blocks, int) else self.num_blocks
        if len(numbers) != key_heads:
            raise ValueError(f"num_blocks must be one number or one for each of {key_heads} key heads, got {numbers!r}")
        return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class Codes:
    """Copies of whole blocks of keys, key = mean + scale·(code - 8) with codes of four bits, PANEL blocks together.

    mean (B, H_kv, g, d, 16); scale (B, H_kv, g, 16, b);
    the variance of each coordinate is spread (B, H_kv, g, 16) · variance (B, H_kv, g, ⌈d/8⌉·2, 16, 4) uint8, four
    coordinates side by side;
    code (B, H_kv, g, 16, ⌈d/8⌉, b, 4) uint8: of each key four coordinates, and in the high bits the
    four that stand half the head size (rounded up to 8) further on;
    real (B, g, 16) bool: blocks with keys that are not padding. Padding has the code of another key of its block.
    """

    mean: Tensor
    variance: Tensor
    spread: Tensor
    scale: Tensor
    code: Tensor
    real: Tensor

    def lines(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean (B, H_kv, n, d), code - 8 (B, H_kv, n, b, d), scale (B, H_kv, n, b), real (B, n); d = `size`."""
        code = self.code.transpose(-3, -2).flatten(2, 3).flatten(-2)
        code = torch.cat([code & 15, code >> 4], dim=-1)[..., :size].to(self.mean.dtype) - _MIDDLE
        return self.mean.mT.flatten(2, 3), code, self.scale.flatten(2, 3), self.real.flatten(1)


@dataclass(frozen=True)
class Retrieval:
    """One problem: `inputs` with keep broadcastable to (B, 1, 1, M), and how to search.

    Causal: the last N of the M keys are the queries' own. first (B,): the key that blocks are counted from; None: 0.
    relative_bias (H, N + M - 1): what joins the logits by relative position, of key minus query, from -(M - 1) on.
    codes: those of the keys in the metric's dot form, where they are known already. beginning (B, H, n, d): the first
    queries of each row, counted from `first`, where the problem's own are later ones. summaries: of whole blocks, where
    they are known already, a `retrieval_far.Summaries`.
    order: where the keys before the window stand in an order of likeness, if it is known already (retrieval_order.py),
    int64 (B, H_kv, levels, n whole units); codes and summaries are those of its places then.
    """

    inputs: AttentionInputs
    search: Search
    first: Tensor | None = None
    relative_bias: Tensor | None = None
    codes: Codes | None = None
    beginning: Tensor | None = None
    summaries: Any = None
    order: Tensor | None = None

    @property
    def is_of_metric_alone(self) -> bool:
        """Whether logits are the metric's, of the queries' own sequence: what a block is worth as a whole is known.

        Not across sequences, not beside a position bias, whose value for a whole block is none of its keys', and not
        under a cap, which bends the logits.
        """
        return bool(
            self.search.window_size
            and self.inputs.softcap is None
            and self.inputs.bias is None
            and self.relative_bias is None
        )

    @property
    def is_clustered(self) -> bool:
        """Whether keys before the window stand in blocks by their likeness."""
        return self.search.cluster_keys and self.inputs.is_causal and self.is_of_metric_alone

    @property
    def min_weight(self) -> float:
        """The share that a block is read for; 0 where scores do not tell what a block's share is."""
        return self.search.min_weight if self.is_of_metric_alone else 0.0


def has_codes(inputs: AttentionInputs) -> bool:
    """Return whether logits are a dot product with the keys, or with what a built-in metric makes of them."""
    metric = inputs.metric
    known = metric.name in ("dot", "lifted_sqeuclidean", "cosine") and metric is BUILT_IN[metric.name]
    # With an ε of each head, cosine has other keys in each of a group of query heads.
    return known and not (isinstance(inputs.softening, Tensor) and inputs.groups > 1)


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


def encode(key: Tensor, keep: Tensor, block_size: int) -> Codes:
    """Return the codes of keys (B, H_kv, M, d), of which keep (B, M) are real; whole panels, filled with nothing."""
    size = key.shape[-1]
    fill = -key.shape[2] % (PANEL * block_size)
    key = F.pad(key, (0, 0, 0, fill)).unflatten(2, (-1, block_size))
    keep = F.pad(keep, (0, fill), value=False).unflatten(1, (-1, block_size))
    own = keep[:, None, :, :, None]
    mean = torch.where(own, key, 0.0).sum(3) / own.sum(3).clamp_min(1)
    rest = torch.where(own, key - mean[:, :, :, None], 0.0)
    squares, count = rest.square().sum(3), own[..., 0].sum(-1).clamp_min(1)
    most = squares.amax(-1) / _LARGEST_BYTE
    variance = (squares / torch.where(most > 0, most, 1.0)[..., None]).round().to(torch.uint8)
    variance = F.pad(variance, (0, -size % 8)).unflatten(-1, (-1, 4)).unflatten(2, (-1, PANEL)).transpose(3, 4)
    spread = (most / count).unflatten(2, (-1, PANEL))
    # Padding takes part in no maximum: it looks like the first real key of its block.
    other = keep.int().argmax(-1)[:, None, :, None, None].expand(-1, key.shape[1], -1, 1, size)
    rest = torch.where(own, rest, rest.gather(3, other))
    scale = rest.abs().amax(-1) / _LARGEST_CODE
    code = (rest / torch.where(scale > 0, scale, 1.0)[..., None]).round().to(torch.int8) + _MIDDLE
    code = F.pad(code.to(torch.uint8), (0, -size % 8), value=_MIDDLE)
    low, high = code.unflatten(-1, (2, -1, 4)).unbind(-3)
    code = (low | (high << 4)).unflatten(2, (-1, PANEL)).transpose(-3, -2).contiguous()
    mean = mean.unflatten(2, (-1, PANEL)).mT.contiguous()
    scale = scale.unflatten(2, (-1, PANEL)).contiguous()
    return Codes(mean, variance.contiguous(), spread, scale, code, keep.any(-1).unflatten(1, (-1, PANEL)))


def whole_numbers(query: Tensor) -> tuple[Tensor, Tensor]:
    """Return (whole numbers (..., d) of at most 63, as floats; what one of them is worth (..., 1)) of queries."""
    step = query.abs().amax(-1, keepdim=True) / _LARGEST_QUERY
    return (query / torch.where(step > 0, step, 1.0)).round(), step


def spreads_by_codes(query: Tensor, codes: Codes) -> Tensor:
    """Return √Σ q²·variance of each block, as its codes say: query (B, H, n, d), scaled -> (B, H, n, blocks)."""
    number, step = whole_numbers(query)
    squares = (number.square() * (_LARGEST_BYTE / _LARGEST_QUERY**2)).round()
    variance = codes.variance.transpose(3, 4).flatten(2, 3).flatten(-2)[..., : query.shape[-1]].to(query.dtype)
    groups = query.shape[1] // variance.shape[1]
    variance, spread = (t.repeat_interleave(groups, dim=1) for t in (variance, codes.spread.flatten(2)))
    largest = _LARGEST_QUERY / _LARGEST_BYTE**0.5
    return largest * step * ((squares @ variance.mT) * spread[:, :, None]).sqrt()


def scores_by_codes(query: Tensor, codes: Codes) -> Tensor:
    """Return the largest logit of each block, as its codes say: query (B, H, n, d), scaled -> (B, H, n, blocks)."""
    mean, code, scale, _ = codes.lines(query.shape[-1])
    groups = query.shape[1] // mean.shape[1]
    mean, code, scale = (t.repeat_interleave(groups, dim=1) for t in (mean, code, scale))
    number, step = whole_numbers(query)
    products = number @ code.flatten(2, 3).mT
    largest = (products.unflatten(-1, scale.shape[2:]) * scale[:, :, None]).amax(-1)
    return query @ mean.mT + step * largest
