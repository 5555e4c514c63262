"""BigBird: a window, a few random blocks and a few global tokens; block-sparse and bidirectional.

Written here and not taken from transformers, whose BigBird attention belongs to one model and has no weights of its own
for other lengths than multiples of the block.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .mechanism_base import Call, Mechanism, Option, register_mechanism
from .mechanism_windows import attend


@register_mechanism("bigbird", aliases=("big_bird",))
class BigBirdAttention(Mechanism):
    """Softmax attention between blocks of b = block_size tokens, and of all tokens with the global ones.

    A query in block B sees the blocks B - window_blocks ... B + window_blocks, num_random_blocks others, and the first
    num_global_blocks blocks. Queries in those first blocks see every key. Random blocks are drawn for each head and
    block by a hash of (seed, head, block), from as many blocks as the item has up to its last real key: they depend
    neither on the length of the batch nor on the device. Draws that meet a block already seen add nothing.

    Pad on the right: padding on the left would make the first blocks, the global ones, padding.
    Source: Zaheer et al., Big Bird (2020), the form with internal global tokens.
    """

    causal = False
    takes_bias = True
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

        def numbers(size, factor):
            return torch.arange(size, device=num_blocks.device) * factor

        mask = 0xFFFFFFFF
        mixed = numbers(self.num_heads, 0x85EBCA77)[:, None, None] + numbers(count, 0x9E3779B1)[:, None]
        mixed = (mixed + numbers(self.num_random_blocks, 0xC2B2AE3D) + self.seed * 0x27D4EB2F) & mask
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
        mixed = mixed ^ (mixed >> 16)
        return (mixed * num_blocks[:, None, None, None]) >> 32

    def _plan(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return (block numbers (B or 1, H, blocks, A), which of them exist and are no repeats)."""
        size, length, device = self.block_size, call.query.shape[2], call.query.device
        count = -(-length // size)
        ends = torch.tensor([length], device=device)
        if call.keep is not None:
            places = torch.arange(1, length + 1, device=device)
            ends = (places * call.keep).amax(-1).clamp(min=1)
        random_blocks = self.random_blocks((ends + size - 1) // size, count)
        own_blocks = torch.arange(count, device=device)[:, None]
        window_blocks = own_blocks + torch.arange(-self.window_blocks, self.window_blocks + 1, device=device)
        global_blocks = torch.arange(self.num_global_blocks, device=device).expand(count, -1)
        fixed = torch.cat([global_blocks, window_blocks], dim=-1).expand(*random_blocks.shape[:2], -1, -1)
        blocks = torch.cat([fixed, random_blocks], dim=-1)
        exists = (blocks >= 0) & (blocks < count)
        repeated = (blocks[..., :, None] == blocks[..., None, :]).tril(-1).any(-1)
        return blocks.clamp(0, count - 1), exists & ~repeated

    def _attend(self, call):
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

        keep = call.keep if call.keep is not None else torch.ones(1, length, dtype=torch.bool, device=device)
        seen = chosen(keep[:, None, :, None].expand(batch, heads, -1, -1))[..., 0]
        seen = seen & valid.repeat_interleave(size, dim=-1)
        logits = cut(call.scaled_query) @ chosen(call.key).mT
        if call.bias is not None:
            inside = torch.arange(size, device=device)
            query_at = (torch.arange(count, device=device)[:, None] * size + inside).clamp(max=length - 1)
            key_at = (blocks[..., None] * size + inside).flatten(3).clamp(max=length - 1)
            index = torch.zeros_like(item) if len(call.bias) == 1 else item
            logits = logits + call.bias[index[..., None], head[..., None], query_at[..., None], key_at[..., None, :]]
        output = attend(logits, seen[..., None, :], chosen(call.value), call.drop).flatten(2, 3)[:, :, :length]

        first = min(length, self.num_global_blocks * size)
        if not first:
            return output
        logits = call.scaled_query[:, :, :first] @ call.key.mT
        if call.bias is not None:
            logits = logits + call.bias[:, :, :first]
        rows = attend(logits, keep[:, None, None], call.value, call.drop)
        return torch.cat([rows, output[:, :, first:]], dim=2)

    def _visible(self, call):
        blocks, valid = self._plan(call)
        length, count = call.query.shape[2], blocks.shape[2]
        pairs = torch.zeros(*blocks.shape[:3], count, device=blocks.device)
        pairs = pairs.scatter_add(-1, blocks, valid.to(pairs.dtype)) > 0
        pairs[:, :, : self.num_global_blocks] = True
        pairs = pairs.repeat_interleave(self.block_size, dim=2).repeat_interleave(self.block_size, dim=3)
        return pairs[:, :, :length, :length]
