"""Causal hybrid attention by one fused CPU kernel, where no gradient is asked for."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpp_library import ALIGNMENT, FLOATS, fields, padded_rows, readable, run_kernel, unavailable

_NUMBERS = "B H N M d dp dv_ vp m mp sinks window first left threads"


class _Hybrid(ctypes.Structure):
    _fields_ = fields("q k v fq fk sk sv keep position o total mass", _NUMBERS, {}, "headroom")


def for_cpu_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels of linear attention can read these tensors: float32 on the CPU, no gradient asked for."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 or 0 in t.shape for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return readable(*tensors) and unavailable() is None


def runs(x) -> bool:
    """Whether the kernel takes this problem (`HybridInputs`): causal, without bias and dropout."""
    if not x.is_causal or x.bias is not None or x.dropout_p > 0 or not readable(x.keep):
        return False
    tensors = [x.query, x.key, x.value, x.far_query, x.far_key]
    if x.state is not None:
        tensors += [x.state.total, x.state.weight]
        tensors += [x.state.sink_key, x.state.sink_value] if x.num_sinks else []
    return for_cpu_kernels(*tensors)


def fused(x, state, near_keep: Tensor, left: int, headroom: float) -> tuple[Tensor, Tensor, Tensor]:
    """(output (B, H, N, d_v), Σ far_key vᵀ, Σ far_key) of `HybridInputs`; the first `left` keys end up in the sums."""
    value_dim, rank = x.value.shape[-1], x.far_query.shape[-1]
    fill = -rank % ALIGNMENT
    far_query = F.pad(x.far_query, (0, fill), value=float("-inf")) if fill else x.far_query
    query, key, value = padded_rows(x.query), padded_rows(x.key), padded_rows(x.value)
    batch, heads, length, width = query.shape
    # What fills a row is zero, so counting it changes no sum.
    data = _Hybrid(
        B=batch, H=heads, N=length, M=key.shape[2], d=width, dp=width, dv_=value_dim, vp=value.shape[-1], m=rank,
        mp=rank + fill, sinks=x.num_sinks,
        # A wider window than there are keys sees no more, and would only take room.
        window=min(x.window_size, key.shape[2]), first=state.length, left=left,
        threads=min(torch.get_num_threads(), batch * heads), headroom=headroom,
    )  # fmt: skip
    total = F.pad(padded_rows(state.total), (0, 0, 0, fill)).clone(memory_format=torch.contiguous_format)
    mass = F.pad(state.weight, (0, fill)).clone(memory_format=torch.contiguous_format)
    output = torch.empty(batch, heads, length, value.shape[-1], **FLOATS)
    tensors = {
        "fq": far_query.contiguous(), "fk": padded_rows(x.far_key), "sk": padded_rows(state.sink_key),
        "sv": padded_rows(state.sink_value), "keep": near_keep.contiguous(),
        "position": state.sink_position.contiguous(),
    }  # fmt: skip
    run_kernel("hybrid_forward", data, q=query, k=key, v=value, o=output, total=total, mass=mass, **tensors)
    return output[..., :value_dim], total[:, :, :rank, :value_dim], mass[:, :, :rank]
