"""Causal hybrid attention by one fused CPU kernel, where no gradient is asked for."""


import torch
from torch import Tensor
from torch.nn import functional as F

from .cpp_library import ALIGNMENT, hybrid_forward, padded_rows, readable, unavailable


def runs(x) -> bool:
    """Whether the kernel takes this problem (`HybridInputs`): causal, float32 on the CPU, forward only."""
    if not x.is_causal or x.bias is not None or x.dropout_p > 0 or not x.far_query.shape[-1]:
        return False
    tensors = [x.query, x.key, x.value, x.far_query, x.far_key]
    if x.state is not None:
        tensors += [x.state.total, x.state.weight, x.state.sink_key, x.state.sink_value]
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors) or 0 in x.query.shape:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return readable(*tensors, x.keep) and unavailable() is None


def fused(x, state, near_keep: Tensor, left: int, headroom: float) -> tuple[Tensor, Tensor, Tensor]:
    """(output (B, H, N, d_v), Σ far_key vᵀ, Σ far_key) of `HybridInputs`; the first `left` keys end up in the sums."""
    rank = x.far_query.shape[-1]
    fill = -rank % ALIGNMENT
    far_query = F.pad(x.far_query, (0, fill), value=float("-inf")) if fill else x.far_query
    total, mass = (F.pad(padded_rows(state.total), (0, 0, 0, fill)), F.pad(state.weight, (0, fill)))
    tensors = {
        "q": padded_rows(x.query), "k": padded_rows(x.key), "v": padded_rows(x.value), "fq": far_query.contiguous(),
        "fk": padded_rows(x.far_key), "sk": padded_rows(state.sink_key), "sv": padded_rows(state.sink_value),
        "keep": near_keep.contiguous(), "position": state.sink_position.contiguous(),
        "total": total.clone(memory_format=torch.contiguous_format),
        "mass": mass.clone(memory_format=torch.contiguous_format),
    }  # fmt: skip
    numbers = {"window": x.window_size, "first": state.length, "left": left, "m": rank, "mp": rank + fill}
    output = hybrid_forward(tensors, numbers, x.value.shape[-1], headroom)
    return output, tensors["total"][:, :, :rank, : x.value.shape[-1]], tensors["mass"][:, :, :rank]
