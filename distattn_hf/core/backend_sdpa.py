"""Metrics that are a dot product plus a key bias, run by PyTorch's fused scaled_dot_product_attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import HALF, AttentionInputs
from .masks import causal_keep
from .metrics import BUILT_IN
from .sdpa_cosine import can_run_in_parts, cosine_in_parts

# Fused kernels fall to a slow path for head sizes that are not a multiple of this.
_HEAD_SIZE_MULTIPLE = 8
# The largest head size of the flash kernels on CUDA.
_LARGEST_FLASH_HEAD = 256
# Key norms are divided by this before they are split into half-precision parts, so that float16 does not overflow.
_NORM_UNIT = 64.0


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why this backend cannot run `inputs`, or None when it can."""
    if not inputs.metric.has_dot_form:
        return f"metric {inputs.metric.name!r} has no dot-product form"
    return None


def sdpa_attention(inputs: AttentionInputs) -> Tensor:
    """softmax(λ·scaling·(factor·q'·k' + key_bias))·v by one call of scaled_dot_product_attention.

    The key bias goes one of two ways. As a mask of shape (B, H, 1, M): on the CPU without gradients and without a mask
    per query, where it is free (with gradients it costs 1.8 x, and on CUDA a mask rules the flash kernel out). Else as
    more columns, q̃ = [factor·λ·q', λ], k̃ = [k', key_bias], filled with zeros up to a multiple of 8, which goes with
    masks, causality and dropout without an (N, M) tensor of its own.
    """
    dtype, value_size = inputs.value.dtype, inputs.value.shape[-1]
    bare = inputs.metric.name in ("lifted_sqeuclidean", "dot") and not isinstance(inputs.lam, Tensor)
    if not bare and not _on_cuda(inputs):
        # Half precision would round the norms, and is no faster on the CPU; the bare form stays as it is.
        inputs = inputs.in_full_precision()
    work = inputs.value.dtype
    query, key = inputs.query, inputs.key
    mask, is_causal = _merge_mask(inputs, work)
    if inputs.metric is BUILT_IN["cosine"] and can_run_in_parts(inputs, mask, is_causal):
        return cosine_in_parts(inputs, mask, is_causal).to(dtype)
    if not bare:
        query, key = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key))
    query, key, key_bias, factor = inputs.metric.dot_form(query, key)
    scale, lam = inputs.scaling, inputs.lam
    if isinstance(lam, Tensor):
        lam = lam.to(query.dtype)[:, None, None]
        query = query * (factor * lam)
    else:
        scale = scale * factor * lam
        lam = 1.0 / factor
    value = inputs.value
    if key_bias is not None and _as_mask(inputs):
        weight = inputs.lambda_column() * inputs.scaling
        key_bias = key_bias.repeat_interleave(inputs.groups, dim=1)[:, :, None, :] * weight
        mask = _add_to_mask(mask, key_bias.to(work))
    elif key_bias is not None:
        parts = 3 if work in HALF else 1
        query, key = _with_columns(query, key, key_bias, lam, work, parts)
        value = F.pad(value, (0, max(0, query.shape[-1] - value.shape[-1])))
    output = F.scaled_dot_product_attention(
        query.to(work),
        key.to(work),
        value,
        attn_mask=mask,
        dropout_p=inputs.dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=bool(inputs.groups > 1),
    )
    return output[..., :value_size].to(dtype)


def _on_cuda(inputs: AttentionInputs) -> bool:
    return inputs.query.device.type == "cuda"


def _as_mask(inputs: AttentionInputs) -> bool:
    """Whether the key bias travels as a mask rather than as columns."""
    # PyTorch takes no mask beside the causal flag, and a mask per query would become an (N, M) one per head.
    if inputs.is_causal or any(t is not None and t.shape[2] > 1 for t in (inputs.keep, inputs.bias)):
        return False
    if _on_cuda(inputs):
        return inputs.query.shape[-1] + _HEAD_SIZE_MULTIPLE > _LARGEST_FLASH_HEAD
    return not inputs.needs_grad()


def _with_columns(query, key, key_bias, lam, dtype, parts) -> tuple[Tensor, Tensor]:
    """[query, λ...] and [key, key_bias...]: in half precision λ and key_bias are sums of parts of falling size."""
    if parts == 1:
        left, right = [torch.ones_like(query[..., :1]) * lam], [key_bias[..., None]]
    else:
        # What all keys share changes no weight. But rounded gradients of a row of logits do not sum to 0, and the rest
        # times the shared part would drown the gradient of λ: 3% of it in bfloat16 for a head size of 256.
        key_bias = key_bias - key_bias.detach().mean(-1, keepdim=True)
        column = torch.ones_like(query[..., :1]) * lam * _NORM_UNIT
        lam_parts, norm_parts = (_split(t, dtype, parts) for t in (column, key_bias[..., None] / _NORM_UNIT))
        pairs = [(i, j) for i in range(parts) for j in range(parts - i)]
        left, right = [lam_parts[i] for i, _ in pairs], [norm_parts[j] for _, j in pairs]
    zeros = -(query.shape[-1] + len(left)) % _HEAD_SIZE_MULTIPLE
    return tuple(
        torch.cat([t.to(dtype), *columns, t.new_zeros(*t.shape[:-1], zeros, dtype=dtype)], dim=-1)
        for t, columns in ((query, left), (key, right))
    )


def _split(tensor: Tensor, dtype: torch.dtype, parts: int) -> list[Tensor]:
    """Numbers of `dtype` whose sum is `tensor` up to the rounding of the last; each is what the earlier ones left."""
    found = []
    for _ in range(parts):
        found.append(tensor.to(dtype))
        tensor = tensor - found[-1].to(tensor.dtype)
    return found


def _merge_mask(inputs: AttentionInputs, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) for PyTorch, which takes either a mask or the causal flag, not both."""
    keep, bias = inputs.keep, inputs.bias
    if keep is None and bias is None:
        return None, inputs.is_causal
    if inputs.is_causal:
        triangle = causal_keep(inputs.query.shape[-2], inputs.key.shape[-2], inputs.query.device)
        keep = triangle if keep is None else keep & triangle
    if bias is None:
        return keep, False
    bias = bias.to(dtype)
    return (bias if keep is None else torch.where(keep, bias, float("-inf"))), False


def _add_to_mask(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias
