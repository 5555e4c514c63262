"""Metrics that are a dot product plus a key bias, run by PyTorch's fused scaled_dot_product_attention."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from .absolute_logits import relative_sink, row_constant, unlifted
from .inputs import HALF, AttentionInputs, add_triangle
from .metrics import BUILT_IN

# Fused kernels fall to a slow path for head sizes that are not a multiple of this.
_HEAD_SIZE_MULTIPLE = 8
# The largest head size of the flash kernels on CUDA.
_LARGEST_FLASH_HEAD = 256
# Key norms are divided by this before they are split into half-precision parts, so that float16 does not overflow.
_NORM_UNIT = 64.0


def unsupported(inputs: AttentionInputs) -> str | None:
    """Return why this backend cannot run `inputs`, or None when it can."""
    if not inputs.metric.has_dot_form:
        return f"metric {inputs.metric.name!r} has no dot-product form"
    if inputs.softcap is not None:
        return "scaled_dot_product_attention has no cap on logits (softcap)"
    if inputs.sink_logit is not None and inputs.metric is not BUILT_IN.get(inputs.metric.name):
        return f"a sink needs what the dot-product form of metric {inputs.metric.name!r} leaves out, which is not known"
    return None


def sdpa_attention(inputs: AttentionInputs) -> Tensor:
    """Compute softmax(λ·scaling·(factor·q'·k' + key_bias))·v by one call of scaled_dot_product_attention.

    The key bias goes one of two ways. As a mask of shape (B, H, 1, M): on the CPU without gradients and without a mask
    per query, where it is free (with gradients it costs 1.8 x, and on CUDA a mask rules the flash kernel out). Else as
    more columns, q̃ = [factor·λ·q', λ], k̃ = [k', key_bias], filled with zeros up to a multiple of 8, which works
    with masks, causality and dropout and makes no (N, M) tensor. A sink (see absolute_logits.py) is one more key.
    """
    inputs = unlifted(inputs)
    dtype, value_size = inputs.value.dtype, inputs.value.shape[-1]
    is_plain = inputs.metric.name in ("lifted_sqeuclidean", "dot") and not isinstance(inputs.lam, Tensor)
    if not is_plain and not _on_cuda(inputs):
        # Half precision would round the norms, and is no faster on the CPU; the plain form is left as it is.
        inputs = inputs.in_full_precision()
    if isinstance(inputs.softening, Tensor) and inputs.groups > 1:
        inputs = inputs.written_out()  # a key is normalised by the ε of each query head
    work_dtype = inputs.value.dtype
    query, key = inputs.query, inputs.key
    mask, is_causal = _merge_mask(inputs, work_dtype)
    if inputs.metric is BUILT_IN["cosine"] and inputs.sink_logit is None and can_run_in_parts(inputs, mask, is_causal):
        return cosine_in_parts(inputs, mask, is_causal).to(dtype)
    if not is_plain:
        query, key = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key))
    sink = None
    if inputs.sink_logit is not None:
        sink = relative_sink(inputs, row_constant(inputs.metric, query, key, inputs.softening is not None))
    softened = () if inputs.softening is None else (inputs.softening_column(query.dtype),)
    query, key, key_bias, factor = inputs.metric.dot_form(query, key, *softened)
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
        mask = _add_to_mask(mask, key_bias.to(work_dtype))
    elif key_bias is not None:
        parts = 3 if work_dtype in HALF else 1
        if parts > 1:
            # What all keys share changes no weight. But rounded gradients of a row of logits do not sum to 0, and the
            # rest times the shared part would drown the gradient of λ: 3% of it in bfloat16 for a head size of 256.
            shared = key_bias.detach().mean(-1, keepdim=True)
            key_bias = key_bias - shared
            if sink is not None:
                shared = shared.repeat_interleave(inputs.groups, dim=1)[..., None]
                sink = sink - inputs.lambda_column() * inputs.scaling * shared
        query, key = _with_columns(query, key, key_bias, lam, work_dtype, parts)
    if sink is not None:
        parts = 3 if work_dtype in HALF else 1
        query, key, value, mask = _with_sink(query, key, value, mask, is_causal, sink / scale, work_dtype, parts)
    if query.shape[-1] > inputs.query.shape[-1]:
        value = F.pad(value, (0, max(0, query.shape[-1] - value.shape[-1])))
    output = F.scaled_dot_product_attention(
        query.to(work_dtype),
        key.to(work_dtype),
        value,
        attn_mask=mask,
        dropout_p=inputs.dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=bool(inputs.groups > 1),
    )
    if sink is not None and is_causal:
        output = output[..., 1:, :]
    return output[..., :value_size].to(dtype)


def _with_sink(query, key, value, mask, is_causal, sink, dtype, parts) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put a key first whose value is 0 and whose logit is `sink` (B, H, N, 1), by a column that other keys have 0 in.

    Under the causal flag a first query goes with it, so that query i + 1 still sees the keys up to i + 1.
    """
    # Finite, as it meets the zeros of all other keys.
    columns = _split((sink / _NORM_UNIT).clamp_min(torch.finfo(dtype).min / 8), dtype, parts)
    zeros = -(query.shape[-1] + parts) % _HEAD_SIZE_MULTIPLE
    rows = query.shape[:-1]
    query = torch.cat([query.to(dtype), *columns, query.new_zeros(*rows, zeros, dtype=dtype)], dim=-1)
    one = key.new_zeros(*key.shape[:2], 1, query.shape[-1], dtype=dtype)
    one[..., key.shape[-1] : key.shape[-1] + parts] = _NORM_UNIT
    key = torch.cat([one, F.pad(key.to(dtype), (0, parts + zeros))], dim=2)
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    if is_causal:
        query = F.pad(query, (0, 0, 1, 0))
    return query, key, F.pad(value, (0, 0, 1, 0)), mask


def _on_cuda(inputs: AttentionInputs) -> bool:
    return inputs.query.device.type == "cuda"


def _as_mask(inputs: AttentionInputs) -> bool:
    """Return whether the key bias is passed as a mask rather than as columns."""
    # PyTorch takes no mask beside the causal flag, and a mask per query would become an (N, M) one per head.
    if inputs.is_causal or any(t is not None and t.shape[2] > 1 for t in (inputs.keep, inputs.bias)):
        return False
    if _on_cuda(inputs):
        return inputs.query.shape[-1] + _HEAD_SIZE_MULTIPLE > _LARGEST_FLASH_HEAD
    return not inputs.needs_grad()


def _with_columns(query, key, key_bias, lam, dtype, parts) -> tuple[Tensor, Tensor]:
    """Append λ and key_bias: [query, λ...] and [key, key_bias...]; in half precision as parts that sum to each."""
    if parts == 1:
        query_columns, key_columns = [torch.ones_like(query[..., :1]) * lam], [key_bias[..., None]]
    else:
        column = torch.ones_like(query[..., :1]) * lam * _NORM_UNIT
        lam_parts, norm_parts = (_split(t, dtype, parts) for t in (column, key_bias[..., None] / _NORM_UNIT))
        pairs = [(i, j) for i in range(parts) for j in range(parts - i)]
        query_columns, key_columns = [lam_parts[i] for i, _ in pairs], [norm_parts[j] for _, j in pairs]
    zeros = -(query.shape[-1] + len(query_columns)) % _HEAD_SIZE_MULTIPLE
    return tuple(
        torch.cat([t.to(dtype), *columns, t.new_zeros(*t.shape[:-1], zeros, dtype=dtype)], dim=-1)
        for t, columns in ((query, query_columns), (key, key_columns))
    )


def _split(tensor: Tensor, dtype: torch.dtype, parts: int) -> list[Tensor]:
    """Split `tensor` into numbers of `dtype`, each what the earlier ones left; they sum to it up to rounding."""
    summands = []
    for _ in range(parts):
        summands.append(tensor.to(dtype))
        tensor = tensor - summands[-1].to(tensor.dtype)
    return summands


def _merge_mask(inputs: AttentionInputs, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
    """Return (attn_mask, is_causal) for PyTorch, which takes either a mask or the causal flag, not both."""
    keep, bias = inputs.keep, inputs.bias
    if keep is None and bias is None:
        return None, inputs.is_causal
    if inputs.is_causal:
        keep = add_triangle(keep, inputs.query.shape[-2], inputs.key.shape[-2], inputs.query.device)
    if bias is None:
        return keep, False
    bias = bias.to(dtype)
    return (bias if keep is None else torch.where(keep, bias, float("-inf"))), False


def _add_to_mask(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


# --------------------------------------------------------------------------------- cosine, a few heads at a time
# So that no whole normalised copies of query and key exist (on the CPU).

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# What `torch.nn.functional.normalize` divides by at least.
_LEAST_NORM = 1e-12
# Query rows of one part, for each thread: so many keep the threads busy. Where the keys are few, more rows make up for
# the cost of starting a part (logits are rows times keys).
_PART_ROWS, _PART_LOGITS = 1024, 2**19
# With fewer logits in all, the overhead of the parts would dominate.
_LEAST_LOGITS = 2**15


def can_run_in_parts(inputs: AttentionInputs, mask: Tensor | None, is_causal: bool) -> bool:
    """Return whether this is large enough and PyTorch, with this mask, would use the CPU flash kernel."""
    tensors = (inputs.query, inputs.key, inputs.value)
    if any(t.device.type != "cpu" or type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return False
    # A compiler's graph would hold every part; torch.func looks into operators, not into the function below.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    logits = math.prod(inputs.query.shape[:3]) * inputs.key.shape[2]
    if len({t.dtype for t in tensors}) > 1 or inputs.query.shape[3] == 0 or logits < max(1, _LEAST_LOGITS):
        return False
    choice = torch._fused_sdp_choice(*tensors, mask, inputs.dropout_p, is_causal, enable_gqa=inputs.groups > 1)
    return choice == SDPBackend.FLASH_ATTENTION.value


def cosine_in_parts(inputs: AttentionInputs, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Compute softmax(scaling·λ·cos(q, k) + mask)·v where `can_run_in_parts`; in a bool mask True means keep."""
    query, lam = inputs.query, inputs.lam
    lam = lam.to(query.dtype) if isinstance(lam, Tensor) else query.new_full(query.shape[1:2], lam)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    epsilon = 0.0 if inputs.softening is None else inputs.softening_column(query.dtype)
    arguments = (query, inputs.key, inputs.value, lam[:, None, None], mask, inputs.scaling, is_causal, epsilon)
    return _CosineAttention.apply(*arguments) if inputs.needs_grad() else _forward(*arguments)[0]


def _part_rows(key: Tensor) -> int:
    return torch.get_num_threads() * max(_PART_ROWS, _PART_LOGITS // key.shape[2])


def _parts(query: Tensor, key: Tensor, least_heads: int = 1) -> Iterator[tuple[tuple, tuple]]:
    """Yield ((items, query heads), (items, their key heads)) as slices, with `least_heads` query heads if there are."""
    groups = query.shape[1] // key.shape[1]
    query_heads = max(least_heads, math.ceil(_part_rows(key) / query.shape[2]))
    heads = min(key.shape[1], math.ceil(query_heads / groups))
    items = max(1, query_heads // (heads * groups))
    for item in range(0, query.shape[0], items):
        for head in range(0, key.shape[1], heads):
            batch = slice(item, item + items)
            yield (batch, slice(head * groups, (head + heads) * groups)), (batch, slice(head, head + heads))


def _mask_of(mask: Tensor | None, part: tuple) -> Tensor | None:
    if mask is None:
        return None
    return mask[tuple(p if size > 1 else slice(None) for p, size in zip(part, mask.shape))]


def _norm(vectors: Tensor, epsilon: float | Tensor, heads: slice) -> Tensor:
    """Return √(‖x‖² + ε²), (..., 1), of the vectors of `heads`."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if isinstance(epsilon, Tensor):
        norm = torch.hypot(norm, epsilon[heads])
    elif epsilon:
        norm = torch.hypot(norm, norm.new_tensor(epsilon))
    return norm.clamp_min_(_LEAST_NORM)


def _forward(query, key, value, lam, mask, scaling, is_causal, epsilon=0.0) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp, unit_key = query.new_empty(query.shape[:3]), None
    for query_part, key_part in _parts(query, key):
        q, k = query[query_part], key[key_part]
        if unit_key is None or unit_key.shape != k.shape:
            unit_key = torch.empty_like(k, memory_format=torch.contiguous_format)
        # The output's memory holds the normalised queries until the part's output is written.
        q = torch.mul(q, lam[query_part[1]] / _norm(q, epsilon, query_part[1]), out=output[query_part])
        k = torch.div(k, _norm(k, epsilon, key_part[1]), out=unit_key)
        options = {"attn_mask": _mask_of(mask, query_part), "scale": scaling}
        output[query_part], logsumexp[query_part] = _FLASH(q, k, value[key_part], 0.0, is_causal, **options)
    return output, logsumexp


class _CosineAttention(torch.autograd.Function):
    """Saves for the backward pass what plain attention saves; normalised vectors are computed again there, by parts."""

    @staticmethod
    def forward(ctx, query, key, value, lam, mask, scaling, is_causal, epsilon):
        output, logsumexp = _forward(query, key, value, lam, mask, scaling, is_causal, epsilon)
        ctx.save_for_backward(query, key, value, lam, mask, output, logsumexp)
        ctx.scaling, ctx.is_causal, ctx.epsilon = scaling, is_causal, epsilon
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, lam, mask, output, logsumexp = ctx.saved_tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
        lam_grad = torch.zeros_like(lam)
        # The backward kernel divides its work among threads by heads alone.
        for query_part, key_part in _parts(query, key, torch.get_num_threads()):
            q, k, weight = query[query_part], key[key_part], lam[query_part[1]]
            q_norm = _norm(q, ctx.epsilon, query_part[1])
            k_norm = _norm(k, ctx.epsilon, key_part[1])
            q_grad, k_grad, grads[2][key_part] = _FLASH_BACKWARD(
                gradient[query_part],
                q * (weight / q_norm),
                k / k_norm,
                value[key_part],
                output[query_part],
                logsumexp[query_part],
                0.0,
                ctx.is_causal,
                attn_mask=_mask_of(mask, query_part),
                scale=ctx.scaling,
            )
            projection = _through_norm(q_grad, q, q_norm, weight, grads[0][query_part])
            _through_norm(k_grad, k, k_norm, 1.0, grads[1][key_part])
            lam_grad[query_part[1]] += projection.sum((0, 2), keepdim=True)[0]
        return *grads, lam_grad, None, None, None, None


def _through_norm(gradient: Tensor, x: Tensor, norm: Tensor, weight: Tensor | float, out: Tensor) -> Tensor:
    """Write ∂/∂x = w/‖x‖·(g - x·(g·x)/‖x‖²) into `out`, from g = ∂/∂(w·x/‖x‖). Returns (g·x)/‖x‖, (..., 1)."""
    projection = torch.mul(gradient, x, out=out).sum(-1, keepdim=True) / norm
    # Where the norm is too small to divide by it is a constant, as in `normalize`.
    slope = torch.where(norm > _LEAST_NORM, projection / norm, 0.0)
    torch.mul(gradient.addcmul_(x, slope, value=-1), weight / norm, out=out)
    return projection
