"""Sparse attention with landmarks: a query attends to the few blocks of keys whose landmarks match it best.

Written here and not taken from a library, because a checkpoint must load with torch and transformers alone.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .mechanism_base import Call, Mechanism, Option, register_mechanism
from .mechanism_windows import attend

# Gathered key entries (float32: 16 MB) that exist at a time.
_ENTRIES = 2**22


@dataclass(frozen=True)
class _Chosen:
    """The blocks each query attends to: blocks and exists (B, H, N, k + 1), keep (B, H, blocks, b), and the rest."""

    blocks: Tensor
    exists: Tensor
    keep: Tensor
    before: int
    is_causal: bool
    dropout_p: float
    seed: int

    def parts(self, size: int) -> list[slice]:
        """Split the queries into slices to work on at a time, for keys and values of `size` entries each."""
        batch, heads, length, chosen = self.blocks.shape
        rows = max(1, _ENTRIES // (batch * heads * chosen * self.keep.shape[-1] * size))
        return [slice(start, start + rows) for start in range(0, length, rows)]

    def index(self, part: slice) -> Tensor:
        """Return row numbers of a table (B·H·blocks, ...), flat, for the queries of a part and their k + 1 blocks."""
        batch, heads, count, _ = self.keep.shape
        head = torch.arange(batch * heads, device=self.keep.device).view(batch, heads, 1, 1)
        return (head * count + self.blocks[:, :, part]).flatten()

    def gather(self, tensor: Tensor, part: slice) -> Tensor:
        """Return (B, H, n, (k + 1)·b, x) from (B, H, blocks, b, x)."""
        rows = tensor.flatten(0, 2).flatten(1).index_select(0, self.index(part))
        return rows.view(*self.blocks[:, :, part].shape[:3], -1, *tensor.shape[4:])

    def attend(self, part: slice, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return (B, H, n, d_v) of the queries of a part; key and value gathered; bias (B or 1, H, n, M)."""
        size, device = self.keep.shape[-1], self.keep.device
        key_at = (self.blocks[:, :, part, :, None] * size + torch.arange(size, device=device)).flatten(3)
        seen = self.gather(self.keep, part) & self.exists[:, :, part].repeat_interleave(size, dim=-1)
        if self.is_causal:
            query_positions = torch.arange(self.blocks.shape[2], device=device)[part] + self.before
            seen = seen & (key_at <= query_positions[:, None])
        logits = (query[..., None, :] @ key.mT).squeeze(-2)
        if bias is not None:
            logits = logits + bias.expand(len(query), -1, -1, -1).gather(-1, key_at.clamp(max=bias.shape[-1] - 1))
        drop = partial(self._drop, part)
        return attend(logits[..., None, :], seen[..., None, :], value, drop).squeeze(-2)

    def _drop(self, part: slice, weights: Tensor) -> Tensor:
        if not self.dropout_p:
            return weights
        generator = torch.Generator(weights.device).manual_seed(self.seed + part.start)
        kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= self.dropout_p
        return weights * kept / (1 - self.dropout_p)


class _GatheredAttention(torch.autograd.Function):
    """Attention to chosen blocks, gathered for a part of the queries at a time, and again for the backward pass.

    Checkpointing each part would add up as many gradients of all keys as there are parts: quadratic.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, chosen):
        ctx.save_for_backward(query, key, value, bias)
        ctx.chosen = chosen
        parts = chosen.parts(max(key.shape[-1], value.shape[-1]))
        return torch.cat([chosen.attend(part, *_of_part(query, key, value, bias, chosen, part)) for part in parts], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        tensors, chosen = ctx.saved_tensors, ctx.chosen
        # Contiguous, whatever the layout of what came in: rows are written through views.
        query, key, value, bias = (
            None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors
        )
        tables = [t.view(-1, t.shape[-2] * t.shape[-1]) for t in (key, value)]
        for part in chosen.parts(max(key.shape[-1], value.shape[-1])):
            leaves = [None if t is None else t.detach().requires_grad_() for t in _of_part(*tensors, chosen, part)]
            with torch.enable_grad():
                output = chosen.attend(part, *leaves)
            part_gradients = torch.autograd.grad(output, [t for t in leaves if t is not None], gradient[:, :, part])
            query[:, :, part] = part_gradients[0]
            for table, rows in zip(tables, part_gradients[1:3]):
                table.index_add_(0, chosen.index(part), rows.reshape(-1, table.shape[-1]))
            if bias is not None:
                bias[:, :, part] = part_gradients[3]
        return query, key, value, bias, None


def _of_part(query, key, value, bias, chosen: _Chosen, part: slice) -> tuple:
    """Return query, key, value and bias of the queries of a part."""
    of_bias = None if bias is None else bias[:, :, part]
    return query[:, :, part], chosen.gather(key, part), chosen.gather(value, part), of_bias


@register_mechanism("landmark")
class LandmarkAttention(Mechanism):
    """Softmax attention of each query to its own block of b = block_size keys, and to the num_blocks best of others.

    Blocks start at the first key, so pad on the right: padding on the left moves them.
    A block's landmark is the mean of its real keys, and the best blocks are those of the
    largest q·landmark, each query choosing for itself among the num_candidates nearest blocks: causal, those before its
    own, which are whole; bidirectional, num_candidates // 2 on either side. So one layer sees num_candidates·b keys
    back, and time and memory are linear. The choice has no gradient.

    Mohtashami & Jaggi train a landmark token a block, with a softmax in two levels, and search all blocks; here
    landmarks are means, the softmax is the plain one over the chosen keys, and the search is bounded.
    Chosen keys are gathered for some queries at a time, and again for the backward pass. A position bias acts on
    the weights, not on the choice.

    Source: Mohtashami & Jaggi, Landmark Attention (2023).
    """

    takes_bias = True
    complexity = "O(N·(k·b + C)·d), k = num_blocks, C = num_candidates"
    memory = "O((N + M)·(d + k))"
    options = {"block_size": Option(16), "num_blocks": Option(4), "num_candidates": Option(256, minimum=2)}

    def _blocks(self, tensor: Tensor) -> Tensor:
        """Reshape (B, H, M, x) to (B, H, blocks, b, x), filled with zeros."""
        fill = -tensor.shape[2] % self.block_size
        return F.pad(tensor, (0, 0, 0, fill)).unflatten(2, (-1, self.block_size))

    def _own(self, call: Call) -> Tensor:
        """Return the block of each query, (N,)."""
        return (torch.arange(call.query.shape[2], device=call.query.device) + call.before) // self.block_size

    @torch.no_grad()
    def _choose(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return (block numbers (B, H, N, k + 1), own last; which of them exist)."""
        key = self._blocks(call.key)
        keep = call.keep if call.keep is not None else torch.ones_like(call.key[:, 0, :, 0], dtype=torch.bool)
        keep = self._blocks(keep[:, None, :, None].to(key.dtype))
        landmarks = (key * keep).sum(3) / keep.sum(3).clamp(min=1)
        real = keep.sum((3, 4)) > 0
        own, count = self._own(call), landmarks.shape[2]
        behind, ahead = self.num_candidates, 0
        if not call.is_causal:
            behind = ahead = self.num_candidates // 2
        chosen, exists = [], []
        # Together, so many queries meet at most twice as many candidates as one of them does.
        reach = behind + ahead
        rows = max(1, min(reach * self.block_size, _ENTRIES // (2 * call.query.shape[0] * self.num_heads * reach)))
        for first, query, own_part in zip(range(0, len(own), rows), call.query.split(rows, dim=2), own.split(rows)):
            part_ends = (call.before + first, call.before + first + len(own_part) - 1)
            start = max(0, part_ends[0] // self.block_size - behind)
            stop = min(count, part_ends[1] // self.block_size + ahead + 1)
            offset = torch.arange(start, stop, device=own.device) - own_part[:, None]
            candidate = (offset >= -behind) & (offset <= ahead) & (offset != 0)
            scores = query @ landmarks[:, :, start:stop].mT
            scores = scores.masked_fill(~(candidate & real[:, :, None, start:stop]), float("-inf"))
            best = scores.topk(min(self.num_blocks, stop - start), dim=-1)
            fill = (0, self.num_blocks - best.indices.shape[-1])
            is_candidate = F.pad(best.values > float("-inf"), fill, value=False)
            blocks = torch.where(is_candidate, F.pad(best.indices, fill) + start, 0)
            own_part = own_part[:, None].expand(*blocks.shape[:3], 1)
            chosen.append(torch.cat([blocks, own_part], dim=-1))
            exists.append(torch.cat([is_candidate, torch.ones_like(own_part, dtype=torch.bool)], dim=-1))
        return torch.cat(chosen, dim=2), torch.cat(exists, dim=2)

    def _attend(self, call):
        batch, heads = call.query.shape[:2]
        keep = call.keep if call.keep is not None else torch.ones_like(call.key[:, 0, :, 0], dtype=torch.bool)
        keep = self._blocks(keep[:, None, :, None])[..., 0].expand(batch, heads, -1, -1)
        # Drawn here, so that the backward pass can make the same dropout again.
        seed = int(torch.randint(2**31, ())) if call.dropout_p > 0 else 0
        chosen = _Chosen(*self._choose(call), keep, call.before, call.is_causal, call.dropout_p, seed)
        return _GatheredAttention.apply(
            call.scaled_query, self._blocks(call.key), self._blocks(call.value), call.bias, chosen
        )

    def _visible(self, call):
        blocks, exists = self._choose(call)
        count = -(-call.key.shape[2] // self.block_size)
        pairs = torch.zeros(*blocks.shape[:3], count, device=blocks.device)
        pairs = pairs.scatter_add(-1, blocks, exists.to(pairs.dtype)) > 0
        return pairs.repeat_interleave(self.block_size, dim=-1)[..., : call.key.shape[2]]
