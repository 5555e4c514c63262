"""Attention to the keys of a fixed pattern, and global tokens, which see and are seen wherever they stand.

Written here and not taken from a library, because a checkpoint must load with torch and transformers alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .mechanism_base import Call, Mechanism


@dataclass(frozen=True)
class Part:
    """Softmax attention to some of the keys, not yet normalised: weights are exp(logits - top).

    summed (B, H, N, d_v): Σ weight·value; total and top (B, H, N, 1): Σ weight and the largest logit.
    """

    summed: Tensor
    total: Tensor
    top: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Part":
        """Return the part with each tensor changed."""
        return Part(change(self.summed), change(self.total), change(self.top))

    def packed(self) -> Tensor:
        """Return (..., N, d_v + 2), all three side by side."""
        return torch.cat([self.summed, self.total, self.top], dim=-1)

    @classmethod
    def of(cls, packed: Tensor) -> "Part":
        """Return the part of a tensor as `packed` returns it."""
        return cls(*packed.split([packed.shape[-1] - 2, 1, 1], dim=-1))


def merge(parts: list[Part]) -> Tensor:
    """Return the attention output over the keys of all parts, which share none; queries that see nothing get zeros."""
    top = torch.stack([part.top for part in parts]).amax(0)
    factors = [(part.top - top).exp() for part in parts]
    total = sum(part.total * factor for part, factor in zip(parts, factors))
    return sum(part.summed * factor for part, factor in zip(parts, factors)) / torch.where(total != 0, total, 1.0)


def attend(logits: Tensor, seen: Tensor, value: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute softmax(logits (..., N, L) over `seen`)·value (..., L, d_v); queries that see nothing get zeros."""
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
    return (drop(weights) @ value).masked_fill(~seen.any(-1, keepdim=True), 0.0)


def weigh(logits: Tensor, seen: Tensor, value: Tensor, drop: Callable[[Tensor], Tensor]) -> Part:
    """Return the part of logits (..., N, L), `seen` (which of them count) and value (..., L, d_v); `drop`: dropout."""
    logits = logits.masked_fill(~seen, float("-inf"))
    top = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - top).exp()
    return Part(drop(weights) @ value, weights.sum(-1, keepdim=True), top)


class PatternAttention(Mechanism):
    """Softmax attention of each query to the keys of a pattern, and with the global tokens where a call names them.

    A global token sees every key that causality and padding leave, and every query that they leave sees it, under one
    normaliser with its pattern. G of them cost O((N + M)·G·d) besides. They have the projections of all others;
    Longformer gives their queries projections of their own.
    """

    takes_bias = True
    takes_global = True

    def _attend(self, call):
        if call.is_global is None:
            return self._by_pattern(call)
        return attend_with_global(call, self._parts(call))

    def _by_pattern(self, call: Call) -> Tensor:
        """Return the output (B, H, N, d_v) without global tokens."""
        raise NotImplementedError

    def _parts(self, call: Call) -> list[Part]:
        """Return the parts of the pattern's keys that are not global."""
        raise NotImplementedError


def attend_with_global(call: Call, parts: list[Part]) -> Tensor:
    """Return the output over the keys of all parts, none of which is global, and with the global tokens."""
    batch, heads, num_keys = call.key.shape[:3]
    # Of each row's global tokens; a row with fewer has others behind them.
    places = call.is_global.int().argsort(dim=-1, descending=True, stable=True)
    places = places[:, : max(1, int(call.is_global.sum(-1).max()))]
    exists = call.is_global.gather(1, places)
    place = torch.arange(num_keys, device=places.device)

    def rows(tensor):
        """Return (B, H, G, x) of (B or 1, H, M, x)."""
        index = places[:, None, :, None].expand(-1, heads, -1, tensor.shape[-1])
        return tensor.expand(batch, -1, -1, -1).gather(2, index)

    logits = call.scaled_query @ rows(call.key).mT
    if call.bias is not None:
        logits = logits + rows(call.bias.mT).mT
    seen = exists if call.keep is None else exists & call.keep.gather(1, places)
    seen = seen[:, None, None]
    if call.is_causal:
        seen = seen & (places[:, None, None] <= place[:, None])
    output = merge([*parts, weigh(logits, seen, rows(call.value), call.drop)])

    logits = rows(call.scaled_query) @ call.key.mT
    if call.bias is not None:
        logits = logits + rows(call.bias)
    seen = torch.ones_like(logits[:, :1], dtype=torch.bool) if call.keep is None else call.keep[:, None, None]
    if call.is_causal:
        seen = seen & (place <= places[:, None, :, None])
    own = torch.where(exists[:, None, :, None], attend(logits, seen, call.value, call.drop), rows(output))
    return output.scatter(2, places[:, None, :, None].expand_as(own), own)
