"""Linformer: keys and values projected along the length to a fixed number of rows.

Written here and not taken from a library, because a checkpoint must load with torch and transformers alone.
"""

import torch
from torch import Tensor, nn
from transformers import initialization

from .mechanism_base import Mechanism, Option, register_mechanism


@register_mechanism("linformer")
class LinformerAttention(Mechanism):
    """softmax(scaling·Q·(E·K)ᵀ)·(F·V), E and F (rank, max_length) learned and shared by all heads.

    Shorter sequences use the first columns of E and F; padding is zeroed before it is projected, and belongs on the
    right, where it moves nothing. There is no causal form, as a projected row mixes past and future, and no length
    beyond max_length. The true weights of the keys, softmax(...)·F, may be negative and their rows need not sum to 1.
    Entries of E and F start from N(0, 1/rank).

    Source: Wang et al., Linformer (2020), with projections shared by heads.
    """

    causal = False
    cross = True
    needs_max_length = True
    complexity = "O((N + M)·rank·d)"
    memory = "O(N·rank + M·d)"
    options = {"rank": Option(128)}

    def _build(self):
        for name in ("key_projection", "value_projection"):
            setattr(self, name, nn.Parameter(torch.empty(self.rank, self.max_length)))

    def reset_parameters(self):
        """Draw E and F from N(0, 1/rank)."""
        for projection in (self.key_projection, self.value_projection):
            initialization.normal_(projection, std=self.rank**-0.5)

    def _projections(self, call) -> tuple[Tensor, Tensor]:
        """Return (softmax over the projected keys (B, H, N, rank), F without padding (B or 1, 1, rank, M))."""
        length = call.key.shape[2]
        if length > self.max_length:
            raise ValueError(f"mechanism 'linformer' takes at most max_length={self.max_length} keys, got {length}")
        projections = (self.key_projection, self.value_projection)
        key_rows, value_rows = (p[None, None, :, :length].to(call.key.dtype) for p in projections)
        if call.keep is not None:
            keep = call.keep[:, None, None]
            # A query that sees nothing gets zeros because its values are zeros.
            key_rows, value_rows = key_rows * keep, value_rows * keep
        return (call.scaled_query @ (key_rows @ call.key).mT).softmax(-1), value_rows

    def _attend(self, call):
        weights, rows = self._projections(call)
        return call.drop(weights) @ (rows @ call.value)

    def _weights(self, call):
        weights, rows = self._projections(call)
        return weights @ rows
