"""Fused attention kernels in Triton for the distances that have no dot-product form, with memory linear in N and M.

Nothing here imports Triton before the first call, so that the file loads where Triton is not installed.
"""

import math
import os
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .absolute_logits import relative_sink, row_shift
from .inputs import AttentionInputs
from .metrics import Chebyshev, Euclidean, Manhattan, Minkowski

# By exact class: a user's subclass of a built-in metric, or what they registered under its name, is another metric.
_KERNEL_METRICS = {Manhattan: "l1", Minkowski: "lp", Chebyshev: "chebyshev", Euclidean: "l2"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTALLED = find_spec("triton") is not None
# Rows of values lie in registers as a whole.
_LARGEST_DIM = 256


def _interpreting() -> bool:
    """Return whether Triton runs kernels in Python; the variable counts if set before Triton's first import."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unsupported(inputs: AttentionInputs) -> str | None:
    """Return why this backend cannot run `inputs`, or None when it can."""
    if type(inputs.metric) not in _KERNEL_METRICS:
        return f"metric {inputs.metric.name!r} has no Triton kernel (built-in {', '.join(_KERNEL_METRICS.values())} do)"
    if inputs.dropout_p > 0:
        return "its kernels have no dropout"
    for name in ("query", "key", "value"):
        tensor = getattr(inputs, name)
        if tensor.dtype not in _DTYPES:
            return f"its kernels take float32, bfloat16 and float16, got {name} in {tensor.dtype}"
        if tensor.shape[-1] > _LARGEST_DIM:
            return f"its kernels take head sizes up to {_LARGEST_DIM}, got {tensor.shape[-1]} of {name}"
    if not _INSTALLED:
        return "the package triton is not installed"
    device = inputs.query.device.type
    if device == "cpu" and not _interpreting():
        return "Triton needs a GPU (TRITON_INTERPRET=1 runs its kernels in Python, to test them)"
    if device not in ("cpu", "cuda"):
        return f"Triton needs a GPU, got tensors on {device!r}"
    return None


def declined(inputs: AttentionInputs) -> str | None:
    """Return why "auto" takes another backend although this one can run, or None."""
    return "interpreted kernels are slow" if inputs.query.device.type == "cpu" else None


def triton_attention(inputs: AttentionInputs) -> Tensor:
    """Compute softmax(-λ·scaling·distance(q, k) + bias)·v in fused kernels: (B, H, N, d_v) in value's dtype.

    Distances, logits and sums are in float32. Kept for the backward pass: the inputs, the output in float32, and one
    log-sum-exp per row; no (N, M) tensor, except that a bias which needs a gradient costs a float32 (B, H, N, M) one.
    """
    metric, p = _kernel_metric(inputs)
    if inputs.softening is not None:
        inputs = inputs.in_units(_order(inputs))
    query, key, bias, lam, heads = inputs.query, inputs.key, inputs.bias, inputs.lam, inputs.query.shape[1]
    if not isinstance(lam, Tensor):
        lam = torch.full((heads,), lam, dtype=torch.float32, device=query.device)
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    shift = None if inputs.softcap is None else row_shift(inputs).float()
    return _Attention.apply(
        query, key, inputs.value, lam.float() * inputs.scaling, bias, inputs.keep, relative_sink(inputs), shift,
        inputs.softcap, metric, p, inputs.is_causal,
    )  # fmt: skip


def _kernel_metric(inputs: AttentionInputs) -> tuple[str, float | None]:
    """Return (name, p) as the kernels know them: "l1", "lp", "chebyshev" by coordinates, "l2" by matmul; "soft_l1",
    "soft_lp" (l2, too) and "soft_chebyshev" by coordinates.

    Tensor cores multiply half precision exactly. Float32 has no such product, and without it q·k is hardly faster than
    the coordinates, which lose no digits where q ≈ k and need no shared memory.
    """
    name, p = _KERNEL_METRICS[type(inputs.metric)], inputs.p
    if inputs.softening is not None:
        order = _order(inputs)
        name = {1.0: "soft_l1", math.inf: "soft_chebyshev"}.get(order, "soft_lp")
        return name, order if name == "soft_lp" else None
    if name == "l2" and torch.float32 in (inputs.query.dtype, inputs.key.dtype):
        return "lp", 2.0
    return ("l1", None) if name == "lp" and p == 1 else (name, p)


def _order(inputs: AttentionInputs) -> float:
    """Return p of a metric as one of the lp distances."""
    return {"l1": 1.0, "l2": 2.0, "chebyshev": math.inf}.get(_KERNEL_METRICS[type(inputs.metric)], inputs.p)


def _tile(metric: str, head_dim: int, value_dim: int, owner: str = "queries") -> dict[str, int]:
    """Return a tile's sizes (BLOCK_N queries, BLOCK_M keys) and warps; `owner` says which of the two a program keeps.

    Chosen by the compiler's count of registers and shared memory for sm_80. The loops over coordinates want many
    entries per thread, the sums of values (d_v wide) and the matmul (d wide) leave fewer.
    """
    if metric == "l2":
        largest_dim = max(head_dim, value_dim)
        owned = stream = 32 if largest_dim <= 128 else 16
        warps = 4 if largest_dim <= 64 else 8
    elif value_dim <= 64:
        owned, stream, warps = 64, 32, 4
    else:
        owned = stream = 32 if value_dim <= 128 else 16
        warps = 4
    if owner == "keys":
        owned, stream = stream, owned
    return {"BLOCK_N": owned, "BLOCK_M": stream, "num_warps": warps}


def _power_of_two(size: int) -> int:
    """Return the next power of two, at least 16, the minimum of tl.dot."""
    return max(16, 1 << (size - 1).bit_length())


def _by_coordinates(tensor: Tensor) -> Tensor:
    """Lay (B, H, N, d) out as (B, H, d, N), so that a coordinate of neighbouring rows is one contiguous read."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _readable(tensor: Tensor) -> Tensor:
    """Convert bfloat16 to float32 for Triton 3.7's interpreter, which multiplies its bits as if they were integers."""
    return tensor.float() if tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 else tensor


def _strides(tensor: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return strides of a tensor broadcastable to (B, H, N, M), 0 along its axes of size 1 and where it is None."""
    if tensor is None:
        return (0, 0, 0, 0)
    return tensor.expand(shape).stride()


class _Attention(torch.autograd.Function):
    """Calls the kernels; arguments as of `triton_attention`, λ·scaling as `slope` (H,), `sink` (B, H, N, 1) or None.

    With a softcap `shift` (B, H, N, 1) is what makes the logits inside it absolute; both are None without.

    A sink scales a row by exp(lse) / (exp(lse) + exp(sink)). With output and log-sum-exp those of the row with its
    sink, the backward kernels need not know of it.
    """

    @staticmethod
    def forward(ctx, query, key, value, slope, bias, keep, sink, shift, softcap, metric, p, is_causal):
        from .kernel_triton_forward import forward_kernel

        out = query.new_empty(*query.shape[:-1], value.shape[-1], dtype=torch.float32)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.metric, ctx.p, ctx.is_causal, ctx.softcap = metric, p, is_causal, softcap
        tile = _tile(metric, query.shape[-1], value.shape[-1])
        tensors, strides, options = _arguments(ctx, query, key, value, slope, bias, keep, shift)
        with _on(query.device):
            programs = -(-query.shape[2] // tile["BLOCK_N"]) * query.shape[0] * query.shape[1]
            if programs:
                forward_kernel[(programs,)](*tensors, out, lse, *strides, **options, **tile)
        if sink is not None:
            # In powers of 2, as the kernels' own. The log-sum-exp of a row that sees nothing is +inf: it stays 0.
            sink = sink.float()[..., 0] / math.log(2)
            share = torch.sigmoid((lse - sink) * math.log(2))[..., None]
            out, lse = out * share, torch.logaddexp2(lse, sink)
        ctx.save_for_backward(query, key, value, slope, bias, keep, sink, shift, out, lse)
        return out.to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        from .kernel_triton_backward import key_kernel, query_kernel

        query, key, value, slope, bias, keep, sink, shift, out, lse = ctx.saved_tensors
        (batch, heads, num_queries, head_dim), (_, key_heads, num_keys, value_dim) = query.shape, value.shape
        needs_query, needs_key, needs_value, needs_slope, needs_bias, _, needs_sink, needs_shift, *_ = (
            ctx.needs_input_grad
        )
        delta = (grad_out.float() * out).sum(-1)
        tensors, strides, options = _arguments(ctx, query, key, value, slope, bias, keep, shift)
        saved = (_readable(grad_out).contiguous(), lse, delta)
        grad_query = grad_key = grad_value = grad_slope = grad_bias = grad_sink = grad_shift = None
        if needs_sink:
            grad_sink = (-(sink - lse).exp2() * delta)[..., None]
        with _on(query.device):
            if needs_query or needs_slope or needs_bias or needs_shift:
                # The kernels add gradients of queries and keys coordinate by coordinate, so these are stored that way.
                grad_query = out.new_zeros(batch, heads, head_dim, num_queries)
                grad_slope = out.new_zeros(batch, heads, num_queries)
                if needs_bias:
                    grad_bias = out.new_zeros(batch, heads, num_queries, num_keys)
                if ctx.softcap is not None:
                    grad_shift = torch.zeros_like(grad_slope)
                # Unused pointers must still be valid tensors.
                gradients = (
                    grad_query,
                    grad_slope,
                    grad_bias if needs_bias else grad_slope,
                    grad_slope if grad_shift is None else grad_shift,
                )
                tile = _tile(ctx.metric, head_dim, value_dim)
                programs = -(-num_queries // tile["BLOCK_N"]) * batch * heads
                if programs:
                    query_kernel[(programs,)](
                        *tensors, *saved, *gradients, *strides, NEEDS_BIAS=needs_bias, **options, **tile
                    )
                grad_query = grad_query.transpose(-1, -2).to(query.dtype)
                grad_slope = grad_slope.sum((0, 2))
                grad_shift = None if grad_shift is None else grad_shift[..., None]
                if needs_bias:
                    grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
            if needs_key or needs_value:
                grad_key = out.new_zeros(batch, key_heads, head_dim, num_keys)
                grad_value = out.new_zeros(value.shape)
                tile = _tile(ctx.metric, head_dim, value_dim, owner="keys")
                programs = -(-num_keys // tile["BLOCK_M"]) * batch * key_heads
                if programs:
                    key_kernel[(programs,)](*tensors, *saved, grad_key, grad_value, *strides, **options, **tile)
                grad_key = grad_key.transpose(-1, -2).to(key.dtype)
                grad_value = grad_value.to(value.dtype)
        absolute = grad_sink, grad_shift, None
        return grad_query, grad_key, grad_value, grad_slope, grad_bias, None, *absolute, None, None, None


def _on(device: torch.device):
    """Make `device` the current GPU: Triton launches on that one, which need not hold the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _arguments(ctx, query, key, value, slope, bias, keep, shift) -> tuple[tuple, tuple, dict]:
    """Return what all kernels take: (the tensors they read, strides and sizes, compile-time options)."""
    (batch, heads, num_queries, head_dim), (_, key_heads, num_keys, value_dim) = query.shape, value.shape
    query, key, value = _readable(query), _readable(key), _readable(value)
    if ctx.metric != "l2":
        query, key = _by_coordinates(query), _by_coordinates(key)
    shape = (batch, heads, num_queries, num_keys)
    # Unused pointer arguments must still be valid tensors.
    tensors = (
        query,
        key,
        value,
        slope.contiguous(),
        query if keep is None else keep.view(torch.uint8),
        query if bias is None else bias,
        query if shift is None else shift.contiguous(),
    )
    strides = (*query.stride(), *key.stride(), *value.stride(), *_strides(keep, shape), *_strides(bias, shape))
    sizes = (heads, heads // key_heads, num_queries, num_keys, float(ctx.softcap or 0.0))
    options = {
        "METRIC": ctx.metric,
        "SOFT": ctx.metric.startswith("soft"),
        "P": ctx.p,
        "IS_CAUSAL": ctx.is_causal,
        "HAS_KEEP": keep is not None,
        "HAS_BIAS": bias is not None,
        "HAS_CAP": shift is not None,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": _power_of_two(head_dim),
        "BLOCK_V": _power_of_two(value_dim),
        # Products of float32 as three of tensor cores' own (22 bits of 24), which spill far fewer registers than
        # ordinary cores' ("ieee"). Only NVIDIA's compiler has them.
        "PRECISION": "tf32x3" if torch.version.hip is None else "ieee",
    }
    return tensors, (*strides, *sizes), options
