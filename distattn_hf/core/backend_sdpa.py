"""Metrics that are a dot product plus a key bias, run by PyTorch's fused scaled_dot_product_attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import AttentionInputs
from .masks import causal_keep

# Fused kernels fall to a slow path for head sizes that are not a multiple of this.
_HEAD_SIZE_MULTIPLE = 8


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why this backend cannot run `inputs`, or None when it can."""
    if inputs.metric.dot_form(inputs.query[:, :, :1], inputs.key[:, :, :1]) is None:
        return f"metric {inputs.metric.name!r} has no dot-product form"
    return None


def sdpa_attention(inputs: AttentionInputs) -> Tensor:
    """softmax(λ·scaling·(factor·q'·k' + key_bias))·v by one call of scaled_dot_product_attention.

    The key bias travels as one more column: q̃ = [factor·λ·q', λ], k̃ = [k', key_bias], padded with zeros to a multiple
    of 8, so that it goes with masks, causality, per-head λ and dropout without an (N, M) tensor of its own.
    """
    value_size, dtype = inputs.value.shape[-1], inputs.value.dtype
    bare = inputs.groups == 1 and inputs.alpha is None and not isinstance(inputs.lam, Tensor) and inputs.metric.name in ("lifted_sqeuclidean", "dot")
    if not bare:
        # Half precision would round the key norms; the bare form has none and stays as it is.
        inputs = inputs.written_out()
    query, key, key_bias, factor = inputs.metric.dot_form(inputs.query, inputs.key)
    value, scale = inputs.value, inputs.scaling
    lam = inputs.lambda_column()
    if isinstance(lam, Tensor):
        query = query * (factor * lam)
    else:
        scale = scale * factor * lam
    if key_bias is not None:
        column = lam if isinstance(lam, Tensor) else 1.0 / factor
        extra = -(query.shape[-1] + 1) % _HEAD_SIZE_MULTIPLE
        query_column = torch.ones_like(query[..., :1]) * column
        query = F.pad(torch.cat([query, query_column], dim=-1), (0, extra))
        key = F.pad(torch.cat([key, key_bias[..., None]], dim=-1), (0, extra))
        if value.shape[-1] < query.shape[-1]:
            value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    mask, is_causal = _merge_mask(inputs, query)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=inputs.dropout_p, is_causal=is_causal, scale=scale
    )
    return output[..., :value_size].to(dtype)


def _merge_mask(inputs: AttentionInputs, query: Tensor) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) for PyTorch, which takes either a mask or the causal flag, not both."""
    keep, bias = inputs.keep, inputs.bias
    if keep is None and bias is None:
        return None, inputs.is_causal
    if inputs.is_causal:
        triangle = causal_keep(inputs.query.shape[-2], inputs.key.shape[-2], query.device)
        keep = triangle if keep is None else keep & triangle
    if bias is None:
        return keep, False
    bias = bias.to(query.dtype)
    return (bias if keep is None else torch.where(keep, bias, float("-inf"))), False
