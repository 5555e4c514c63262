"""Attention through landmarks alone by fused CPU kernels, where no gradient is asked for."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpp_library import ALIGNMENT, FLOATS, fields, run_kernel, strides

# Keys that are worth a task of their own.
_LEAST_KEYS = 1024


class _Far(ctypes.Structure):
    _fields_ = fields(
        "x v map lift offset radius weight keep o total mass",
        "B H N d vp mp splits threads",
        {"x_stride": 3, "v_stride": 3},
        "unused",
    )


def _rows(tensor: Tensor) -> Tensor:
    """As it lies where each row is whole vectors of 16, else a copy filled with zeros."""
    tensor, fill = tensor.resolve_neg(), -tensor.shape[-1] % ALIGNMENT
    if fill:
        return F.pad(tensor, (0, fill))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _columns(tensor: Tensor, batch: int, fill: int, value: float = 0.0) -> Tensor:
    """(B or 1, ...) -> (B, ..., m rounded up), contiguous."""
    tensor = F.pad(tensor, (0, fill), value=value) if fill else tensor
    return tensor.expand(batch, *tensor.shape[1:]).contiguous()


def _problem(x: Tensor, tensors: dict[str, Tensor]) -> _Far:
    batch, heads, length, width = x.shape
    return _Far(
        B=batch, H=heads, N=length, d=width, mp=tensors["offset"].shape[-1], splits=1, x_stride=strides(x),
        threads=torch.get_num_threads() if length * batch * heads >= _LEAST_KEYS else 1,
    )  # fmt: skip


def far_sums(key, value, keep, landmarks, heights, offset, radius, weight) -> tuple[Tensor, Tensor]:
    """(Σ_j κ(k_j, L) v_jᵀ (B, H, m, d_v), Σ_j κ(k_j, L) (B, H, m)) of the keys that `keep` (B, M) keeps.

    κ(k, L_a) = exp(min(0, 2w·(k·L_a + height(k)·heights_a) + offset_a - w·(‖k‖² + height(k)²))), with
    height(k) = √max(0, radius - ‖k‖²), 0 where radius is None. landmarks (B or 1, H, m, d), heights and offset
    (B or 1, H, m), radius (B, H) or None, weight w (H,).
    """
    batch, rank, value_dim = len(key), landmarks.shape[-2], value.shape[-1]
    fill, twice = -rank % ALIGNMENT, 2 * weight[:, None, None]
    key, value = _rows(key), _rows(value)
    map = F.pad((landmarks * twice).mT, (0, 0, 0, key.shape[-1] - landmarks.shape[-1]))
    tensors = {
        "map": _columns(map, batch, fill), "lift": _columns(heights * twice[..., 0], batch, fill),
        "offset": _columns(offset, batch, fill, float("-inf")), "weight": weight.contiguous(),
        "keep": keep.contiguous(), "radius": None if radius is None else radius.contiguous(),
    }  # fmt: skip
    data = _problem(key, tensors)
    data.vp, data.v_stride = value.shape[-1], strides(value)
    data.splits = max(1, min(-(-2 * data.threads // (data.B * data.H)), data.N // _LEAST_KEYS))
    shape = data.splits, data.B, data.H, data.mp
    total, mass = torch.empty(*shape, data.vp, **FLOATS), torch.empty(shape, **FLOATS)
    run_kernel("far_sums", data, x=key, v=value, total=total, mass=mass, **tensors)
    total, mass = (t[0] if data.splits == 1 else t.sum(0) for t in (total, mass))
    return total[:, :, :rank, :value_dim], mass[:, :, :rank]


def far_outputs(query, total, mass, landmarks, offset, weight) -> Tensor:
    """κ(q_i, L)·total / κ(q_i, L)·mass, (B, H, N, d_v), with κ(q, L_a) = exp(2w·q·L_a + offset_a) up to a factor of
    the row; 0 / 0 is 0. Shapes as in `far_sums`."""
    batch, rank, value_dim = len(query), landmarks.shape[-2], total.shape[-1]
    fill = -rank % ALIGNMENT
    query = _rows(query)
    map = F.pad((2 * weight[:, None, None] * landmarks).mT, (0, 0, 0, query.shape[-1] - landmarks.shape[-1]))
    total = F.pad(total, (0, -value_dim % ALIGNMENT, 0, fill)).contiguous()
    tensors = {
        "map": _columns(map, batch, fill), "offset": _columns(offset, batch, fill, float("-inf")),
        "total": total, "mass": F.pad(mass, (0, fill)).contiguous(),
    }  # fmt: skip
    data = _problem(query, tensors)
    data.vp = total.shape[-1]
    output = torch.empty(*query.shape[:3], data.vp, **FLOATS)
    run_kernel("far_outputs", data, x=query, o=output, **tensors)
    return output[..., :value_dim]
