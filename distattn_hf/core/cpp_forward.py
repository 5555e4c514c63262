"""C++ of the CPU kernels, part 2: attention with an online softmax, and distances alone."""

FORWARD = r"""
// One attention problem, as ctypes hands it over. All tensors float32 and contiguous; dp and vp are d and d_v rounded
// up to a multiple of 16, filled with zeros; panels are keys (and values) as (M / PANEL, d, PANEL).
struct Problem {
  const float *q, *k, *kpanels, *v, *vpanels, *coef, *bias, *out, *lse, *dout;
  const uint8_t* keep;
  float *o, *l, *dq, *dk, *dv, *dcoef, *dbias, *sums;
  long B, H, G, N, M, d, dp, dv_, vp, causal, splits, threads;
  long keep_stride[4], bias_stride[4];
  float p;
};

// Logits of one row of a tile from its sums, in place; returns the largest. What is masked is -inf.
template <class Metric>
INLINE float row_logits(const Problem& a, float* s, float* dist, long b, long h, long i, long j0, long n,
                        float coef) {
  for (long j = 0; j < BK; j += W) {
    vf x = Metric::finish(load(s + j), a.p);
    if (dist) store(dist + j, x);
    store(s + j, -coef * x);
  }
  if (a.bias) {
    const float* bias =
        a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] + i * a.bias_stride[2] + j0 * a.bias_stride[3];
    if (a.bias_stride[3])
      for (long j = 0; j < n; j++) s[j] += bias[j];
    else
      for (long j = 0; j < n; j++) s[j] += bias[0];
  }
  if (a.keep) {
    const uint8_t* keep =
        a.keep + b * a.keep_stride[0] + h * a.keep_stride[1] + i * a.keep_stride[2] + j0 * a.keep_stride[3];
    if (a.keep_stride[3])
      for (long j = 0; j < n; j++) s[j] = keep[j] ? s[j] : -INF;
    else if (!keep[0])
      n = 0;
  }
  if (a.causal) n = std::min(n, i - j0 + 1);
  for (long j = std::max(n, 0L); j < BK; j++) s[j] = -INF;
  vf m = splat(-INF);
  for (long j = 0; j < BK; j += W) m = vmax(m, load(s + j));
  float largest = -INF;
  for (int l = 0; l < W; l++) largest = std::max(largest, m[l]);
  return largest;
}
INLINE float total(vf x) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 h[W / 8];
  memcpy(h, &x, sizeof x);
  if constexpr (W == 16) h[0] += h[W / 8 - 1];
  v4 f[2];
  memcpy(f, h, sizeof f);
  f[0] += f[1];
  return (f[0][0] + f[0][1]) + (f[0][2] + f[0][3]);
}
static std::unique_ptr<float, void (*)(void*)> buffer(size_t n) {
  return {(float*)aligned_alloc(64, (4 * n + 63) / 64 * 64), free};
}
template <class Metric>
INLINE void tile_sums(const Problem& a, const float* q, const float* panels, long rows, long n, float* sums) {
  for (long c = 0; c < n; c += PANEL)
    for (long r = 0; r < rows; r += RP)
      pair_sums<Metric>(q + r * a.dp, a.dp, panels + c * a.d, a.d, sums + r * BK + c, BK, a.p);
}
template <class Metric>
static void forward(const Problem& a) {
  long tiles = (a.N + BQ - 1) / BQ, mpanels = (a.M + PANEL - 1) / PANEL, key_heads = a.H / a.G;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BQ * (a.dp + BK + a.vp + 2));
    float *q = memory.get(), *s = q + BQ * a.dp, *o = s + BQ * BK, *m = o + BQ * a.vp, *l = m + BQ;
#pragma omp for schedule(dynamic) collapse(2)
    for (long tile = tiles - 1; tile >= 0; tile--)  // causal: the longest rows first
      for (long bh = 0; bh < a.B * a.H; bh++) {
        long b = bh / a.H, h = bh % a.H, bk = b * key_heads + h / a.G, i0 = tile * BQ,
             rows = std::min<long>(BQ, a.N - i0);
        long padded = (rows + RP - 1) / RP * RP;
        memcpy(q, a.q + (bh * a.N + i0) * a.dp, 4 * rows * a.dp);
        memset(q + rows * a.dp, 0, 4 * (padded - rows) * a.dp);
        memset(o, 0, 4 * BQ * a.vp);
        for (long i = 0; i < BQ; i++) m[i] = -INF, l[i] = 0;
        long last = a.causal ? std::min(a.M, i0 + rows) : a.M;
        for (long j0 = 0; j0 < last; j0 += BK) {
          long n = std::min<long>(BK, last - j0);
          tile_sums<Metric>(a, q, a.kpanels + (bk * mpanels + j0 / PANEL) * a.d * PANEL, padded, n, s);
          for (long i = 0; i < rows; i++) {
            float* row = s + i * BK;
            float largest = std::max(m[i], row_logits<Metric>(a, row, nullptr, b, h, i0 + i, j0, n, a.coef[h]));
            float base = largest == -INF ? 0 : largest;  // nothing kept so far: weights are exp(-inf) = 0
            vf sum = {};
            for (long j = 0; j < BK; j += W) {
              vf w = expv(load(row + j) - base);
              store(row + j, w);
              sum += w;
            }
            float shrink = m[i] == -INF ? 0 : expf(m[i] - base);
            l[i] = l[i] * shrink + total(sum);
            if (shrink != 1)
              for (long c = 0; c < a.vp; c += W) store(o + i * a.vp + c, shrink * load(o + i * a.vp + c));
            m[i] = largest;
          }
          multiply_rows<true>(s, BK, 1, a.v + (bk * a.M + j0) * a.vp, a.vp, n, o, a.vp, rows, a.vp);
        }
        for (long i = 0; i < rows; i++) {
          float* out = a.o + (bh * a.N + i0 + i) * a.vp;
          for (long c = 0; c < a.vp; c++) out[c] = l[i] == 0 ? 0 : o[i * a.vp + c] / l[i];
          a.l[bh * a.N + i0 + i] = l[i] == 0 ? INF : m[i] + logf(l[i]);  // exp(logit - inf) = 0: no gradient
        }
      }
  }
}
// Distances alone, (B, H, N, M), and what flows back through them.
template <class Metric>
static void pairwise_forward(const Problem& a) {
  long tiles = (a.N + BQ - 1) / BQ, mpanels = (a.M + PANEL - 1) / PANEL, key_heads = a.H / a.G;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BQ * (a.dp + BK));
    float *q = memory.get(), *s = q + BQ * a.dp;
#pragma omp for schedule(dynamic) collapse(2)
    for (long bh = 0; bh < a.B * a.H; bh++)
      for (long tile = 0; tile < tiles; tile++) {
        long bk = bh / a.H * key_heads + bh % a.H / a.G, i0 = tile * BQ, rows = std::min<long>(BQ, a.N - i0);
        long padded = (rows + RP - 1) / RP * RP;
        memcpy(q, a.q + (bh * a.N + i0) * a.dp, 4 * rows * a.dp);
        memset(q + rows * a.dp, 0, 4 * (padded - rows) * a.dp);
        for (long j0 = 0; j0 < a.M; j0 += BK) {
          long n = std::min<long>(BK, a.M - j0);
          tile_sums<Metric>(a, q, a.kpanels + (bk * mpanels + j0 / PANEL) * a.d * PANEL, padded, n, s);
          for (long i = 0; i < rows; i++) {
            for (long j = 0; j < n; j += W) store(s + i * BK + j, Metric::finish(load(s + i * BK + j), a.p));
            memcpy(a.sums + (bh * a.N + i0 + i) * a.M + j0, s + i * BK, 4 * n);
          }
        }
      }
  }
}
extern "C" int attention_forward(const Problem* a, int kind) {
  switch (kind) {
    case 0: forward<L1>(*a); break;
    case 1: forward<Sq>(*a); break;
    case 2: forward<L2>(*a); break;
    case 3: forward<L3>(*a); break;
    case 4: forward<Lp>(*a); break;
    case 5: forward<Linf>(*a); break;
    default: return 1;
  }
  return 0;
}
extern "C" int distance_forward(const Problem* a, int kind) {
  switch (kind) {
    case 0: pairwise_forward<L1>(*a); break;
    case 1: pairwise_forward<Sq>(*a); break;
    case 2: pairwise_forward<L2>(*a); break;
    case 3: pairwise_forward<L3>(*a); break;
    case 4: pairwise_forward<Lp>(*a); break;
    case 5: pairwise_forward<Linf>(*a); break;
    default: return 1;
  }
  return 0;
}
extern "C" int panel_width() { return PANEL; }
"""
