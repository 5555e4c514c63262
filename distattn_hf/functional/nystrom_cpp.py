"""Attention through landmarks alone by fused CPU kernels, where no gradient is asked for."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.kernel_cpp_library import ALIGNMENT, FLOATS, fields, run_kernel, strides
from ..core.kernel_cpp_tiles import TILES

SOURCE = (
    TILES
    + r"""
// Attention through landmarks alone. Rows are read where they lie; mp and vp are m and d_v rounded up to a multiple of
// 16, d is one. A column's logit of row x is x·map + height(x)·lift + offset (+ what its norm adds, for keys).
struct Far {
  const float *x, *v, *map, *lift, *offset, *radius, *weight;
  const uint8_t* keep;
  float *o, *total, *mass;
  long B, H, N, d, vp, mp, splits, threads;
  long x_stride[3], v_stride[3];
  float unused;
};
INLINE const float* row_of(const float* x, const long* stride, long b, long h, long i) {
  return x + b * stride[0] + h * stride[1] + i * stride[2];
}
// Sums over the keys: Σ_j κ(k_j, L) v_jᵀ and Σ_j κ(k_j, L), a partial one for each split.
extern "C" int far_sums(const Far* problem) {
  const Far& a = *problem;
  long span = ((a.N + a.splits - 1) / a.splits + BLOCK - 1) / BLOCK * BLOCK, heads = a.B * a.H;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BLOCK * a.mp);
    float* s = memory.get();
#pragma omp for schedule(dynamic) collapse(2)
    for (long split = 0; split < a.splits; split++)
      for (long bh = 0; bh < heads; bh++) {
        long b = bh / a.H, h = bh % a.H;
        const float *map = a.map + bh * a.d * a.mp, *lift = a.lift + bh * a.mp, *offset = a.offset + bh * a.mp;
        float *total_sum = a.total + (split * heads + bh) * a.mp * a.vp, *mass = a.mass + (split * heads + bh) * a.mp;
        float weight = a.weight[h], radius = a.radius ? a.radius[bh] : -1;
        memset(total_sum, 0, 4 * a.mp * a.vp);
        memset(mass, 0, 4 * a.mp);
        for (long i0 = split * span; i0 < std::min(a.N, (split + 1) * span); i0 += BLOCK) {
          long rows = std::min<long>(BLOCK, a.N - i0);
          const float* x = row_of(a.x, a.x_stride, b, h, i0);
          multiply_rows<false>(x, a.x_stride[2], 1, map, a.mp, a.d, s, a.mp, rows, a.mp);
          for (long i = 0; i < rows; i++) {
            float* row = s + i * a.mp;
            if (!a.keep[b * a.N + i0 + i]) {
              memset(row, 0, 4 * a.mp);
              continue;
            }
            const float* key = x + i * a.x_stride[2];
            float norm = dot_product(key, key, a.d), height = a.radius ? std::sqrt(std::max(radius - norm, 0.0f)) : 0;
            float own = -weight * (norm + height * height);
            for (long c = 0; c < a.mp; c += W) {
              vf z = load(row + c) + height * load(lift + c) + load(offset + c) + own;
              vf w = expv(z > 0 ? vf{} : z);
              store(row + c, w);
              store(mass + c, load(mass + c) + w);
            }
          }
          multiply_rows<true>(s, 1, a.mp, row_of(a.v, a.v_stride, b, h, i0), a.v_stride[2], rows, total_sum, a.vp,
                              a.mp, a.vp);
        }
      }
  }
  return 0;
}
// o_i = κ(q_i, L)·total / κ(q_i, L)·mass.
extern "C" int far_outputs(const Far* problem) {
  const Far& a = *problem;
  long blocks = (a.N + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BLOCK * (a.mp + a.vp));
    float *s = memory.get(), *o = s + BLOCK * a.mp;
#pragma omp for schedule(static) collapse(2)
    for (long bh = 0; bh < a.B * a.H; bh++)
      for (long block = 0; block < blocks; block++) {
        long i0 = block * BLOCK, rows = std::min<long>(BLOCK, a.N - i0);
        const float *map = a.map + bh * a.d * a.mp, *offset = a.offset + bh * a.mp, *mass = a.mass + bh * a.mp;
        const float* x = row_of(a.x, a.x_stride, bh / a.H, bh % a.H, i0);
        multiply_rows<false>(x, a.x_stride[2], 1, map, a.mp, a.d, s, a.mp, rows, a.mp);
        float by[BLOCK];
        for (long i = 0; i < rows; i++) {
          float* row = s + i * a.mp;
          for (long c = 0; c < a.mp; c += W) store(row + c, load(row + c) + load(offset + c));
          float shift = largest_in(row, a.mp);
          vf sum = {};
          for (long c = 0; c < a.mp; c += W) {
            vf w = expv(load(row + c) - shift);
            store(row + c, w);
            sum += w * load(mass + c);
          }
          float weight = total(sum);
          by[i] = weight == 0 ? 1 : weight;
        }
        multiply_rows<false>(s, a.mp, 1, a.total + bh * a.mp * a.vp, a.vp, a.mp, o, a.vp, rows, a.vp);
        for (long i = 0; i < rows; i++) {
          float* out = a.o + (bh * a.N + i0 + i) * a.vp;
          for (long c = 0; c < a.vp; c += W) store(out + c, load(o + i * a.vp + c) / by[i]);
        }
      }
  }
  return 0;
}
"""
)

# Fewest keys for which a separate task pays.
_LEAST_KEYS = 1024


class _Far(ctypes.Structure):
    _fields_ = fields(
        "x v map lift offset radius weight keep o total mass",
        "B H N d vp mp splits threads",
        {"x_stride": 3, "v_stride": 3},
        "unused",
    )


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged where each row is whole vectors of 16, else a copy filled with zeros."""
    tensor, fill = tensor.resolve_neg(), -tensor.shape[-1] % ALIGNMENT
    if fill:
        return F.pad(tensor, (0, fill))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _columns(tensor: Tensor, batch: int, fill: int, value: float = 0.0) -> Tensor:
    """Pad (B or 1, ...) to (B, ..., m rounded up), contiguous."""
    tensor = F.pad(tensor, (0, fill), value=value) if fill else tensor
    return tensor.expand(batch, *tensor.shape[1:]).contiguous()


def _problem(x: Tensor, tensors: dict[str, Tensor]) -> _Far:
    batch, heads, length, width = x.shape
    return _Far(
        B=batch, H=heads, N=length, d=width, mp=tensors["offset"].shape[-1], splits=1, x_stride=strides(x),
        threads=torch.get_num_threads() if length * batch * heads >= _LEAST_KEYS else 1,
    )  # fmt: skip


def far_sums(key, value, keep, landmarks, heights, offset, radius, weight) -> tuple[Tensor, Tensor]:
    """Return (Σ_j κ(k_j, L) v_jᵀ (B, H, m, d_v), Σ_j κ(k_j, L) (B, H, m)) of the keys that `keep` (B, M) keeps.

    κ(k, L_a) = exp(min(0, 2w·(k·L_a + height(k)·heights_a) + offset_a - w·(‖k‖² + height(k)²))), with
    height(k) = √max(0, radius - ‖k‖²), 0 where radius is None. landmarks (B or 1, H, m, d), heights and offset
    (B or 1, H, m), radius (B, H) or None, weight w (H,).
    """
    batch, rank, value_dim = len(key), landmarks.shape[-2], value.shape[-1]
    fill, double_weight = -rank % ALIGNMENT, 2 * weight[:, None, None]
    key, value = _rows(key), _rows(value)
    scaled_landmarks = F.pad((landmarks * double_weight).mT, (0, 0, 0, key.shape[-1] - landmarks.shape[-1]))
    tensors = {
        "map": _columns(scaled_landmarks, batch, fill), "lift": _columns(heights * double_weight[..., 0], batch, fill),
        "offset": _columns(offset, batch, fill, float("-inf")), "weight": weight.contiguous(),
        "keep": keep.contiguous(), "radius": None if radius is None else radius.contiguous(),
    }  # fmt: skip
    data = _problem(key, tensors)
    data.vp, data.v_stride = value.shape[-1], strides(value)
    data.splits = max(1, min(-(-2 * data.threads // (data.B * data.H)), data.N // _LEAST_KEYS))
    shape = data.splits, data.B, data.H, data.mp
    total, mass = torch.empty(*shape, data.vp, **FLOATS), torch.empty(shape, **FLOATS)
    run_kernel(SOURCE, "far_sums", data, x=key, v=value, total=total, mass=mass, **tensors)
    total, mass = (t[0] if data.splits == 1 else t.sum(0) for t in (total, mass))
    return total[:, :, :rank, :value_dim], mass[:, :, :rank]


def far_outputs(query, total, mass, landmarks, offset, weight) -> Tensor:
    """Return κ(q_i, L)·total / κ(q_i, L)·mass, (B, H, N, d_v), with κ(q, L_a) = exp(2w·q·L_a + offset_a) up to a factor
    of the row; 0 / 0 is 0. Shapes as in `far_sums`.
    """
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
    run_kernel(SOURCE, "far_outputs", data, x=query, o=output, **tensors)
    return output[..., :value_dim]
