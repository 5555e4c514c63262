"""BigBird: a window, a few random blocks and a few global tokens; block-sparse, bidirectional or causal.

Written here and not taken from transformers, whose BigBird attention belongs to one model and has no weights of its own
for other lengths than multiples of the block.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import surely
from .mechanism_base import Call, Option, register_mechanism
from .mechanism_windows import Part, PatternAttention, attend, weigh


def first_keys(call: Call) -> Tensor:
    """Return the place of each row's first real key, (B,); 0 where there is none."""
    if call.keep is None:
        return torch.zeros(len(call.query), dtype=torch.long, device=call.query.device)
    return call.keep.int().argmax(-1)


def turned(tensor: Tensor, places: Tensor, axis: int) -> Tensor:
    """Return (B, ...) with the entries of an axis taken from places (B, n)."""
    index = places.view(len(places), *(places.shape[1] if a == axis else 1 for a in range(1, tensor.dim())))
    return tensor.gather(axis, index.expand(tensor.shape))


@register_mechanism("bigbird", aliases=("big_bird",))
class BigBirdAttention(PatternAttention):
    """Softmax attention between blocks of b = block_size tokens, and of all tokens with the global ones.

    A query in block B sees the blocks B - window_blocks ... B + window_blocks, num_random_blocks others, and the first
    num_global_blocks blocks. Queries in those first blocks see every key. Random blocks are drawn for each head and
    block by a hash of (seed, head, block), from as many blocks as the item has up to its last real key: they depend
    neither on the length of the batch nor on the device. Draws that meet a block already seen add nothing.

    Pad on the right: padding on the left would make the first blocks, the global ones, padding.

    Causal: a query sees the keys up to its own, of its own block and the window_blocks behind it; the random blocks are
    drawn from those before its own, and the first blocks are global as keys. Blocks are counted from the first real
    key, so that padding on the left changes nothing. Random blocks reach any distance, so a cache keeps all keys; a
    token reads A·b of them.
    Source: Zaheer et al., Big Bird (2020), the form with internal global tokens; the causal form is ours.
    """

    complexity = "O(N·A·b·d), A = global + random + 2·window_blocks + 1 blocks"
    memory = "O(N·A·(b + d))"
    options = {
        "block_size": Option(64),
        "window_blocks": Option(1, minimum=0),
        "num_random_blocks": Option(3, minimum=0),
        "num_global_blocks": Option(1, minimum=0),
        "seed": Option(0, minimum=0),
    }

    def random_blocks(self, num_blocks: Tensor, count: int) -> Tensor:
        """Draw numbers below num_blocks (B,): (B, H, count, num_random_blocks), fixed by arguments and seed."""
        own = torch.arange(count, device=num_blocks.device)[None]
        return self._drawn(own, num_blocks[:, None])

    def _drawn(self, own: Tensor, limits: Tensor) -> Tensor:
        """Draw for blocks `own` (B or 1, n) numbers below limits (B, 1 or n): (B, H, n, num_random_blocks)."""

        def numbers(size, factor):
            return torch.arange(size, device=own.device) * factor

        mask = 0xFFFFFFFF
        mixed = numbers(self.num_heads, 0x85EBCA77)[:, None, None] + (own * 0x9E3779B1)[:, None, :, None]
        mixed = (mixed + numbers(self.num_random_blocks, 0xC2B2AE3D) + self.seed * 0x27D4EB2F) & mask
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
        mixed = mixed ^ (mixed >> 16)
        return (mixed * limits[:, None, :, None]) >> 32

    def _plan(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return (block numbers (B or 1, H, blocks, A), which of them exist and are no repeats)."""
        size, length, device = self.block_size, call.key.shape[2], call.query.device
        own = torch.arange(-(-length // size), device=device)[None]
        if call.is_causal:
            return self._chosen(own, own, own.shape[1], 0)
        ends = torch.tensor([length], device=device)
        if call.keep is not None:
            places = torch.arange(1, length + 1, device=device)
            ends = (places * call.keep).amax(-1).clamp(min=1)
        return self._chosen(own, ((ends + size - 1) // size)[:, None], own.shape[1], self.window_blocks)

    def _chosen(self, own: Tensor, limits: Tensor, count: int, ahead: int) -> tuple[Tensor, Tensor]:
        """Return as `_plan` for blocks own (B or 1, n) of `count`, with so many of the window ahead of them."""
        device = own.device
        window_blocks = own[..., None] + torch.arange(-self.window_blocks, ahead + 1, device=device)
        global_blocks = torch.arange(self.num_global_blocks, device=device).expand(*own.shape, -1)
        random_blocks = self._drawn(own, limits)
        fixed = torch.cat([global_blocks, window_blocks], dim=-1)[:, None]
        blocks = torch.cat([fixed.expand(len(random_blocks), self.num_heads, -1, -1), random_blocks], dim=-1)
        exists = (blocks >= 0) & (blocks < count)
        repeated = (blocks[..., :, None] == blocks[..., None, :]).tril(-1).any(-1)
        return blocks.clamp(0, count - 1), exists & ~repeated

    def _attend(self, call):
        if call.is_global is not None and not call.is_causal:
            place = torch.arange(call.key.shape[2], device=call.query.device)
            call = replace(call, is_global=call.is_global | (place < self.num_global_blocks * self.block_size))
        return super()._attend(call)

    def _by_pattern(self, call):
        return self._causal(call) if call.is_causal else self._by_blocks(call)

    def _parts(self, call):
        def finish(*problem):
            return weigh(*problem).packed()

        return [Part.of(self._causal(call, finish) if call.is_causal else self._by_blocks(call, finish))]

    def _causal(self, call: Call, finish: Callable = attend) -> Tensor:
        """Return the causal output: of few queries by looking their keys up, of many by blocks."""
        count, num_keys = call.query.shape[2], call.key.shape[2]
        first = first_keys(call)
        if count * self.block_size * self._reads <= num_keys:
            return self._looked_up(call, first, finish)
        query = F.pad(call.query, (0, 0, call.before, 0))
        bias = None if call.bias is None else F.pad(call.bias, (0, 0, call.before, 0))
        whole = replace(call, query=query, bias=bias)
        if call.keep is None or surely(~first.any()):
            return self._by_blocks(whole, finish)[:, :, call.before :]
        place = torch.arange(num_keys, device=first.device)
        # Each row's first real key at its start, and what stood before it at its end.
        ahead = (place + first[:, None]) % num_keys
        query, key, value = (turned(tensor, ahead, 2) for tensor in (query, call.key, call.value))
        if bias is not None:
            bias = turned(turned(bias.expand(len(first), -1, -1, -1), ahead, 2), ahead, 3)
        keep, is_global = (t if t is None else turned(t, ahead, 1) for t in (call.keep, call.is_global))
        whole = replace(call, query=query, key=key, value=value, keep=keep, bias=bias, is_global=is_global)
        output = self._by_blocks(whole, finish)
        output = turned(output, (place - first[:, None]) % num_keys, 2)
        return output.masked_fill((place < first[:, None])[:, None, :, None], 0.0)[:, :, call.before :]

    @property
    def _reads(self) -> int:
        """How many blocks a causal query reads, A."""
        return self.num_global_blocks + self.window_blocks + 1 + self.num_random_blocks

    def _looked_up(self, call: Call, first: Tensor, finish: Callable) -> Tensor:
        """Return the causal output of few queries, each by the keys of its own blocks; first (B,): see `first_keys`."""
        size, (batch, heads, count, _), num_keys = self.block_size, call.query.shape, call.key.shape[2]
        device = first.device
        query_at = torch.arange(count, device=device) + call.before
        own = ((query_at - first[:, None]) // size).clamp(min=0)
        blocks, valid = self._chosen(own, own, -(-num_keys // size), 0)
        place = (blocks[..., None] * size + torch.arange(size, device=device)).flatten(3) + first[:, None, None, None]
        seen = valid.repeat_interleave(size, dim=-1) & (place <= query_at[:, None])
        place = place.clamp(max=num_keys - 1)
        item, head = torch.arange(batch, device=device)[:, None, None, None], torch.arange(heads, device=device)
        head = head[:, None, None]
        if call.pattern_keep is not None:
            seen = seen & call.pattern_keep[item, place]
        logits = (call.scaled_query[..., None, :] @ call.key[item, head, place].mT).squeeze(-2)
        if call.bias is not None:
            logits = logits + call.bias.expand(batch, -1, -1, -1).gather(-1, place)
        return finish(logits[..., None, :], seen[..., None, :], call.value[item, head, place], call.drop).squeeze(-2)

    def _by_blocks(self, call: Call, finish: Callable = attend) -> Tensor:
        """Return the output by blocks; `finish`: `attend`, or what makes something else of the same."""
        size, (batch, heads, length, _), device = self.block_size, call.query.shape, call.query.device
        blocks, valid = self._plan(call)
        count, fill = blocks.shape[2], blocks.shape[2] * size - length
        item = torch.arange(batch, device=device)[:, None, None, None]
        head = torch.arange(heads, device=device)[:, None, None]

        def cut(tensor):
            return F.pad(tensor, (0, 0, 0, fill)).unflatten(2, (count, size))

        def chosen(tensor):
            """Return (B, H, blocks, A·b, x) from (B, H, N, x)."""
            return cut(tensor)[item, head, blocks].flatten(3, 4)

        keep = call.pattern_keep
        keep = keep if keep is not None else torch.ones(1, length, dtype=torch.bool, device=device)
        seen = chosen(keep[:, None, :, None].expand(batch, heads, -1, -1))[..., 0]
        seen = seen & valid.repeat_interleave(size, dim=-1)
        logits = cut(call.scaled_query) @ chosen(call.key).mT
        if call.bias is not None:
            inside = torch.arange(size, device=device)
            query_at = (torch.arange(count, device=device)[:, None] * size + inside).clamp(max=length - 1)
            key_at = (blocks[..., None] * size + inside).flatten(3).clamp(max=length - 1)
            index = torch.zeros_like(item) if len(call.bias) == 1 else item
            logits = logits + call.bias[index[..., None], head[..., None], query_at[..., None], key_at[..., None, :]]
        seen = seen[..., None, :]
        if call.is_causal:
            inside = torch.arange(size, device=device)
            key_at = (blocks[..., None] * size + inside).flatten(3)
            query_at = torch.arange(count, device=device)[:, None] * size + inside
            seen = seen & (key_at[..., None, :] <= query_at[..., None])
        output = finish(logits, seen, chosen(call.value), call.drop).flatten(2, 3)[:, :, :length]
        if call.is_causal or call.is_global is not None:
            # Causal queries of the first blocks see no others; where a call names global tokens, theirs are among them.
            return output

        first = min(length, self.num_global_blocks * size)
        if not first:
            return output
        logits = call.scaled_query[:, :, :first] @ call.key.mT
        if call.bias is not None:
            logits = logits + call.bias[:, :, :first]
        rows = attend(logits, keep[:, None, None], call.value, call.drop)
        return torch.cat([rows, output[:, :, first:]], dim=2)

    def _visible(self, call):
        size, num_keys = self.block_size, call.key.shape[2]
        blocks, valid = self._plan(call)
        pairs = torch.zeros(*blocks.shape[:3], blocks.shape[2], device=blocks.device)
        pairs = pairs.scatter_add(-1, blocks, valid.to(pairs.dtype)) > 0
        if not call.is_causal:
            pairs[:, :, : self.num_global_blocks] = True
            pairs = pairs.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
            return pairs[:, :, :num_keys, :num_keys]
        # By the blocks of each row's own places; before its first key it sees nothing in any case.
        block = ((torch.arange(num_keys, device=pairs.device) - first_keys(call)[:, None]) // size).clamp(min=0)
        rows = pairs.expand(len(block), -1, -1, -1)
        rows = rows.gather(2, block[:, None, call.before :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
        return rows.gather(3, block[:, None, None].expand(-1, *rows.shape[1:3], -1))
