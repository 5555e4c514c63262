"""C++ of the CPU kernels, part 6: attention through landmarks alone, every query to every key."""

FAR = r"""
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
