"""Backend for any metric, with memory linear in N: blocks of queries, whose weights the backward pass recomputes."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .absolute_logits import finish_logits, unlifted
from .inputs import AttentionInputs, add_triangle, masked_softmax, rows_of

# Entries of one block of weights, over batch and heads: 8 MiB in float32, which fits the caches of two cores.
_BLOCK_ENTRIES = 2**21


def unsupported(inputs: AttentionInputs) -> str | None:
    """Return None: this backend runs all inputs."""
    return None


def chunked_attention(inputs: AttentionInputs) -> Tensor:
    """Compute softmax(-λ·scaling·distance(q, k) + bias)·v block by block of queries. Returns (B, H, N, d_v)."""
    dtype = inputs.value.dtype
    needs_grad = inputs.needs_grad()
    inputs = unlifted(inputs).written_out()
    batch, heads, num_queries, _ = inputs.query.shape
    num_keys = inputs.key.shape[-2]
    block = max(16, _BLOCK_ENTRIES // max(1, batch * heads * num_keys))
    lam = inputs.lambda_column()

    def attend(query, key, value, keep, bias, sink_logit, shift, lam, start):
        logits = finish_logits(inputs, -lam * inputs.scaling * inputs.distances(query, key), shift, bias)
        if inputs.is_causal:
            keep = add_triangle(keep, query.shape[-2], key.shape[-2], query.device, offset=start)
        weights = masked_softmax(logits, None if keep is None else keep.expand_as(logits), sink_logit)
        if inputs.dropout_p > 0:
            weights = F.dropout(weights, inputs.dropout_p)
        return torch.matmul(weights, value)

    outputs = []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        # Keys after the block's last query are masked for all of it: leave them out.
        seen, part = min(stop, num_keys) if inputs.is_causal else num_keys, slice(start, stop)
        arguments = (
            inputs.query[..., part, :],
            inputs.key[..., :seen, :],
            inputs.value[..., :seen, :],
            _columns(rows_of(inputs.keep, part), seen),
            _columns(rows_of(inputs.bias, part), seen),
            rows_of(inputs.sink_logit, part),
            rows_of(inputs.shift, part),
            lam,
            start,
        )
        if needs_grad and num_queries > block:
            outputs.append(checkpoint(attend, *arguments, use_reentrant=False))
        else:
            outputs.append(attend(*arguments))
    output = torch.cat(outputs, dim=-2) if outputs else inputs.query.new_zeros(batch, heads, 0, inputs.value.shape[-1])
    return output.to(dtype)


def _columns(tensor: Tensor | None, seen: int) -> Tensor | None:
    """Return the first `seen` columns of a tensor broadcastable to (B, H, N, M), or None."""
    if tensor is None or tensor.shape[-1] == 1:
        return tensor
    return tensor[..., :seen]
