"""Causal Nyström attention by one fused CPU kernel: an exact window, exact sinks and a low-rank far field."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel_cpp_library import ALIGNMENT, FLOATS, can_run, fields, padded_rows, readable, run_kernel
from .kernel_cpp_tiles import TILES

SOURCE = (
    TILES
    + r"""
// All tensors float32 and contiguous; dp, vp and mp are d, d_v and m rounded up to a multiple of 16, filled so that
// nothing is added. The last N of the M keys are the queries' own; key 0 stands at position `first`.
struct Hybrid {
  const float *q, *k, *v, *fq, *fk, *sk, *sv;
  const uint8_t* keep;
  const int64_t* position;
  float *o, *total, *mass;
  long B, H, N, M, d, dp, dv_, vp, m, mp, sinks, window, first, left, threads;
  float headroom;
};
// One head: its keys go by block by block, and those that no later query sees exactly enter `total` and `mass`.
struct HybridHead {
  const Hybrid& a;
  long reach, behind, ring, ld;  // behind: keys before a block that its queries may see exactly, in whole blocks
  float *keys, *far, *masked, *s, *f, *e, *o, *q, *sums, *mass, *weight;

  static size_t floats(const Hybrid& a) {
    long behind = rounded(a), ld = behind + BLOCK;
    return ld * (a.d + a.m + a.mp) + 2 * RP * ld + RP * (a.mp + a.vp + a.dp + a.sinks + 16) + a.mp * (a.vp + 1) + 256;
  }
  static long rounded(const Hybrid& a) { return (std::max(0L, a.window - 1) + BLOCK - 1) / BLOCK * BLOCK; }

  HybridHead(const Hybrid& a, float* memory) : a(a) {
    reach = std::max(0L, a.window - 1);
    behind = rounded(a);
    ring = behind / BLOCK + 1;
    ld = behind + BLOCK;
    auto take = [&](long n) {
      float* found = memory;
      memory += (n + 15) / 16 * 16;
      return found;
    };
    s = take(RP * ld), f = take(RP * ld), e = take(RP * a.mp), o = take(RP * a.vp), q = take(RP * a.dp);
    sums = take(a.mp * a.vp), mass = take(a.mp), weight = take(RP * a.sinks);
    keys = take(ld * a.d), far = take(ld * a.m), masked = take(ld * a.mp);
  }
  void absorb(long bh, long from, long to) {
    if (from >= to) return;
    const float* x = masked + from / BLOCK % ring * BLOCK * a.mp + from % BLOCK * a.mp;
    multiply_rows<true>(x, 1, a.mp, a.v + (bh * a.M + from) * a.vp, a.vp, to - from, sums, a.vp, a.mp, a.vp);
    for (long j = 0; j < to - from; j++)
      for (long c = 0; c < a.mp; c += W) store(mass + c, load(mass + c) + load(x + j * a.mp + c));
  }
  void enter(long bh, const uint8_t* keep, long key, long rows) {
    long slot = key / BLOCK % ring;
    float* x = masked + slot * BLOCK * a.mp;
    for (long j = 0; j < rows; j++)
      if (keep[key + j])
        memcpy(x + j * a.mp, a.fk + (bh * a.M + key + j) * a.mp, 4 * a.mp);
      else
        memset(x + j * a.mp, 0, 4 * a.mp);
    pack(a.k + (bh * a.M + key) * a.dp, a.dp, rows, a.d, keys + slot * BLOCK * a.d);
    pack(x, a.mp, rows, a.m, far + slot * BLOCK * a.m);
  }
  // out[RP, panels of columns from .. to) = x·panelsᵀ, columns counted from `behind` keys before the block.
  void products(const float* x, long ldx, const float* panels, long n, long block, long from, long to, float* out) {
    for (long p = from / PANEL; p * PANEL < to; p++) {
      long slot = (block - behind / BLOCK + p / PANELS) % ring;
      multiply<RP, 2, false>(x, ldx, 1, panels + (slot * PANELS + p % PANELS) * n * PANEL, PANEL, n, out + p * PANEL,
                             ld);
    }
  }
  // RP queries, the first of which stands beside key k0 + r; those before `least` or past the last key are none.
  void rows_from(long bh, const uint8_t* keep, const int64_t* position, long k0, long r, long least, long count) {
    long block = k0 / BLOCK, before = a.M - a.N, start = k0 - behind, l0 = std::max(0L, -start);
    long lo = std::max(l0, r + behind - reach), hi = std::min(r + RP, count) + behind, near_lo = lo / PANEL * PANEL;
    memset(q, 0, 4 * RP * a.dp);
    memset(e, 0, 4 * RP * a.mp);
    for (long i = 0; i < RP; i++) {
      if (r + i < least || r + i >= count) continue;
      long number = bh * a.N + k0 + r + i - before;
      memcpy(q + i * a.dp, a.q + number * a.dp, 4 * a.dp);
      memcpy(e + i * a.mp, a.fq + number * a.mp, 4 * a.mp);
    }
    if (a.window) products(q, a.dp, keys, a.d, block, lo, hi, s);
    float sum[RP] = {};
    for (long i = 0; i < RP; i++) {
      float *row = s + i * ld, shift = largest_in(e + i * a.mp, a.mp) - a.headroom;
      // Columns of this row: far before `first`, exact up to its own, none after it.
      long first = std::max(l0, r + i + behind - reach), last = std::min(r + i + behind + 1, hi);
      if (a.window) {
        long end = (hi + W - 1) / W * W;
        for (long l = near_lo; l < first; l++) row[l] = -INF;
        for (long l = first; l < last; l++) row[l] = keep[start + l] ? row[l] : -INF;
        for (long l = std::max(last, near_lo); l < end; l++) row[l] = -INF;
        shift = std::max(shift, largest_in(row + near_lo, end - near_lo));
      }
      for (long t = 0; t < a.sinks; t++) {
        bool seen = position[t] <= a.first + k0 + r + i;
        float x = seen ? dot_product(q + i * a.dp, a.sk + (bh * a.sinks + t) * a.dp, a.dp) : -INF;
        weight[i * a.sinks + t] = x;
        shift = std::max(shift, x);
      }
      if (shift == -INF) shift = 0;  // nothing to see: all weights are exp(-inf)
      vf mine = {};
      if (a.window)
        for (long l = near_lo; l < hi; l += W) {
          vf w = expv(load(row + l) - shift);
          store(row + l, w);
          mine += w;
        }
      for (long c = 0; c < a.mp; c += W) {
        vf w = expv(load(e + i * a.mp + c) - shift);
        store(e + i * a.mp + c, w);
        mine += w * load(mass + c);
      }
      for (long t = 0; t < a.sinks; t++) {
        float w = weight[i * a.sinks + t] == -INF ? 0 : expf(weight[i * a.sinks + t] - shift);
        weight[i * a.sinks + t] = w;
        sum[i] += w;
      }
      sum[i] += total(mine);
    }
    long far_hi = std::min(r + RP + behind - a.window, hi);
    if (far_hi > l0) products(e, a.mp, far, a.m, block, l0, far_hi, f);
    for (long i = 0; i < RP; i++) {
      float *row = s + i * ld, *other = f + i * ld;
      long end = std::max(l0, std::min(r + i + behind + 1 - a.window, hi));
      for (long l = l0; l < end; l++) row[l] = other[l], sum[i] += other[l];
      for (long l = end; l < (a.window ? std::min(near_lo, hi) : hi); l++) row[l] = 0;
    }
    multiply_rows<false>(s + l0, ld, 1, a.v + (bh * a.M + start + l0) * a.vp, a.vp, hi - l0, o, a.vp, RP, a.vp);
    multiply_rows<true>(e, a.mp, 1, sums, a.vp, a.m, o, a.vp, RP, a.vp);
    if (a.sinks)
      multiply_rows<true>(weight, a.sinks, 1, a.sv + bh * a.sinks * a.vp, a.vp, a.sinks, o, a.vp, RP, a.vp);
    for (long i = 0; i < RP; i++) {
      if (r + i < least || r + i >= count) continue;
      float *out = a.o + (bh * a.N + k0 + r + i - before) * a.vp, by = sum[i] == 0 ? INF : sum[i];
      // Divided, not multiplied by 1 / sum: of a sum this small the inverse may be infinite.
      for (long c = 0; c < a.vp; c += W) store(out + c, load(o + i * a.vp + c) / by);
    }
  }
  void run(long bh) {
    const uint8_t* keep = a.keep + bh / a.H * a.M;
    const int64_t* position = a.position + bh / a.H * a.sinks;
    long before = a.M - a.N, absorbed = 0, state = a.mp * a.vp;
    memcpy(sums, a.total + bh * state, 4 * state);
    memcpy(mass, a.mass + bh * a.mp, 4 * a.mp);
    for (long k0 = 0; k0 < a.M; k0 += BLOCK) {
      long rows = std::min<long>(BLOCK, a.M - k0), least = std::max(0L, before - k0);
      long far_from_all = std::max(0L, k0 - behind);
      absorb(bh, absorbed, far_from_all);
      absorbed = far_from_all;
      enter(bh, keep, k0, rows);
      for (long r = least / RP * RP; r < rows; r += RP) rows_from(bh, keep, position, k0, r, least, rows);
    }
    while (absorbed < a.left) {
      long to = std::min(a.left, absorbed / BLOCK * BLOCK + BLOCK);
      absorb(bh, absorbed, to);
      absorbed = to;
    }
    memcpy(a.total + bh * state, sums, 4 * state);
    memcpy(a.mass + bh * a.mp, mass, 4 * a.mp);
  }
};
extern "C" int hybrid_forward(const Hybrid* a) {
  int failed = 0;
#pragma omp parallel num_threads(a->threads)
  {
    auto memory = buffer(HybridHead::floats(*a));
    if (!memory) failed = 1;
#pragma omp barrier
    if (!failed) {
      HybridHead head(*a, memory.get());
#pragma omp for schedule(dynamic)
      for (long bh = 0; bh < a->B * a->H; bh++) head.run(bh);
    }
  }
  return failed;
}
"""
)

_NUMBERS = "B H N M d dp dv_ vp m mp sinks window first left threads"


class _Hybrid(ctypes.Structure):
    _fields_ = fields("q k v fq fk sk sv keep position o total mass", _NUMBERS, {}, "headroom")


def cpp_supports(x) -> bool:
    """Return whether the kernel takes these `HybridInputs`: causal, without bias and dropout."""
    if not x.is_causal or x.bias is not None or x.dropout_p > 0 or not readable(x.keep):
        return False
    tensors = [x.query, x.key, x.value, x.far_query, x.far_key]
    if x.state is not None:
        tensors += [x.state.total, x.state.weight]
        tensors += [x.state.sink_key, x.state.sink_value] if x.num_sinks else []
    return can_run(SOURCE, *tensors)


def cpp_hybrid_attention(x, state, near_keep: Tensor, left: int, headroom: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output (B, H, N, d_v), Σ far_key vᵀ, Σ far_key) of `HybridInputs`; sums hold the first `left` keys."""
    value_dim, rank = x.value.shape[-1], x.far_query.shape[-1]
    fill = -rank % ALIGNMENT
    far_query = F.pad(x.far_query, (0, fill), value=float("-inf")) if fill else x.far_query
    query, key, value = padded_rows(x.query), padded_rows(x.key), padded_rows(x.value)
    batch, heads, length, width = query.shape
    # What fills a row is zero, so counting it changes no sum.
    data = _Hybrid(
        B=batch, H=heads, N=length, M=key.shape[2], d=width, dp=width, dv_=value_dim, vp=value.shape[-1], m=rank,
        mp=rank + fill, sinks=x.num_sinks,
        # A wider window than there are keys sees no more, and would only take memory.
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
    run_kernel(SOURCE, "hybrid_forward", data, q=query, k=key, v=value, o=output, total=total, mass=mass, **tensors)
    return output[..., :value_dim], total[:, :, :rank, :value_dim], mass[:, :, :rank]
