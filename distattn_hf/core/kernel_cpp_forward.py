"""C++ source of the CPU kernels: attention with an online softmax, distances alone, few queries against many keys."""

FORWARD = r"""
// One attention problem, as ctypes hands it over. All tensors float32 and contiguous; dp and vp are d and d_v rounded
// up to a multiple of 16, filled with zeros; panels are keys (and values) as (M / PANEL, d, PANEL).
struct Problem {
  const float *q, *k, *q_norms, *k_norms, *kpanels, *v, *vpanels, *coef, *soft, *bias, *sink, *shift, *out, *lse, *dout;
  const uint8_t* keep;
  float *o, *l, *dq, *dk, *dv, *dcoef, *dbias, *dshift, *sums;
  long B, H, G, N, M, d, dp, dv_, vp, causal, splits, threads;
  long keep_stride[4], bias_stride[4];
  float p, cap;  // cap: 0 for none
  float parameter(long h) const { return soft ? soft[h] : p; }  // of the metric: ε or δ of a head, or the order
  Softness softness(long h) const { return {p, soft ? soft[h] : 1, d}; }
};

// x = cap·tanh((x + shift) / cap) of a row, in place, and the derivatives, where they are wanted.
static void cap_row(float* s, float* slope, float cap, float shift) {
  float inverse = 1 / cap;
  for (long j = 0; j < BK; j += W) {
    vf t = tanhv((load(s + j) + shift) * inverse);
    store(s + j, cap * t);
    if (slope) store(slope + j, 1.0f - t * t);
  }
}
// Logits of one row of a tile from its sums, in place; returns the largest. What is masked is -inf.
template <class Metric>
INLINE float row_logits(const Problem& a, float* s, float* dist, float* slope, long b, long h, long i, long j0,
                        long n, float coef) {
  float p = a.parameter(h);
  vf m = splat(-INF);
  for (long j = 0; j < BK; j += W) {
    vf x = Metric::finish(load(s + j), p), logit = -coef * x;
    if (dist) store(dist + j, x);
    store(s + j, logit);
    m = vmax(m, logit);
  }
  if (a.causal) n = std::min(n, i - j0 + 1);
  if (n == BK && !a.cap && !a.bias && !a.keep) return most(m);
  if (a.cap) cap_row(s, slope, a.cap, a.shift[(b * a.H + h) * a.N + i]);
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
  for (long j = std::max(n, 0L); j < BK; j++) s[j] = -INF;
  return largest_in(s, BK);
}
// Sums of a tile; far: see `square_sums`, whose result this returns.
template <class Metric>
INLINE bool tile_sums(const Problem& a, const float* q, const float* q_norms, long bk, long j0, long rows, long n,
                      float* sums, vi* far, long h) {
  long mpanels = (a.M + PANEL - 1) / PANEL;
  const float* panels = a.kpanels + (bk * mpanels + j0 / PANEL) * a.d * PANEL;
  if constexpr (Metric::soft)
    soft_sums(q, a.dp, rows, panels, n, sums, a.softness(h));
  else if constexpr (Metric::squares)
    return square_sums(q, a.dp, q_norms, rows, panels, a.d, a.k_norms + bk * mpanels * PANEL + j0, n, sums, far);
  else if constexpr (Metric::product)
    for (long c = 0; c < n; c += PANEL)
      multiply_rows<false>(q, a.dp, 1, panels + c * a.d, PANEL, a.d, sums + c, BK, rows, PANEL);
  else
    for (long c = 0; c < n; c += PANEL)
      for (long r = 0; r < rows; r += RP)
        pair_sums<Metric>(q + r * a.dp, a.dp, panels + c * a.d, a.d, sums + r * BK + c, BK, a.parameter(h));
  return false;
}
// Queries of a tile and their norms, filled up with zeros.
INLINE void load_queries(const Problem& a, long bh, long i0, long rows, float* q, float* norms) {
  memset(q, 0, 4 * BQ * a.dp);
  memcpy(q, a.q + (bh * a.N + i0) * a.dp, 4 * rows * a.dp);
  memset(norms, 0, 4 * BQ);
  if (a.q_norms) memcpy(norms, a.q_norms + bh * a.N + i0, 4 * rows);
}
template <class Metric>
static void forward(const Problem& a) {
  long tiles = (a.N + BQ - 1) / BQ, key_heads = a.H / a.G;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BQ * (a.dp + 2 * BK + a.vp + 3));
    float *q = memory.get(), *s = q + BQ * a.dp, *o = s + 2 * BQ * BK, *m = o + BQ * a.vp, *l = m + BQ, *norms = l + BQ;
    vi* far = (vi*)(s + BQ * BK);
#pragma omp for schedule(dynamic) collapse(2)
    for (long tile = tiles - 1; tile >= 0; tile--)  // causal: the longest rows first
      for (long bh = 0; bh < a.B * a.H; bh++) {
        long b = bh / a.H, h = bh % a.H, bk = b * key_heads + h / a.G, i0 = tile * BQ,
             rows = std::min<long>(BQ, a.N - i0);
        long padded = (rows + RP - 1) / RP * RP;
        load_queries(a, bh, i0, rows, q, norms);
        memset(o, 0, 4 * BQ * a.vp);
        for (long i = 0; i < BQ; i++) m[i] = -INF, l[i] = 0;
        if (a.sink)  // a key without a value: it is in the sum from the start
          for (long i = 0; i < rows; i++) m[i] = a.sink[bh * a.N + i0 + i], l[i] = m[i] == -INF ? 0 : 1;
        long last = a.causal ? std::min(a.M, i0 + rows) : a.M;
        for (long j0 = 0; j0 < last; j0 += BK) {
          long n = std::min<long>(BK, last - j0);
          tile_sums<Metric>(a, q, norms, bk, j0, padded, n, s, far, h);
          for (long i = 0; i < rows; i++) {
            float* row = s + i * BK;
            float most = row_logits<Metric>(a, row, nullptr, nullptr, b, h, i0 + i, j0, n, a.coef[h]);
            float largest = std::max(m[i], most);
            float base = largest == -INF ? 0 : largest;  // nothing kept so far: weights are exp(-inf) = 0
            vf sum = {};
            for (long j = 0; j < BK; j += W) {
              vf w = expn(load(row + j) - base);
              store(row + j, w);
              sum += w;
            }
            float shrink = m[i] == base ? 1 : m[i] == -INF ? 0 : expf(m[i] - base);
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
  long tiles = (a.N + BQ - 1) / BQ, key_heads = a.H / a.G;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BQ * (a.dp + BK + 1));
    float *q = memory.get(), *s = q + BQ * a.dp, *norms = s + BQ * BK;
#pragma omp for schedule(dynamic) collapse(2)
    for (long bh = 0; bh < a.B * a.H; bh++)
      for (long tile = 0; tile < tiles; tile++) {
        long bk = bh / a.H * key_heads + bh % a.H / a.G, i0 = tile * BQ, rows = std::min<long>(BQ, a.N - i0);
        long padded = (rows + RP - 1) / RP * RP;
        load_queries(a, bh, i0, rows, q, norms);
        for (long j0 = 0; j0 < a.M; j0 += BK) {
          long n = std::min<long>(BK, a.M - j0);
          tile_sums<Metric>(a, q, norms, bk, j0, padded, n, s, nullptr, bh % a.H);
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
    case 7: forward<Dot>(*a); break;
    case 8: forward<SoftL1>(*a); break;
    case 9: forward<SoftL2>(*a); break;
    case 10: forward<Soft>(*a); break;
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
    case 8: pairwise_forward<SoftL1>(*a); break;
    case 10: pairwise_forward<Soft>(*a); break;
    default: return 1;
  }
  return 0;
}
extern "C" int panel_width() { return PANEL; }
"""

DECODE = r"""
// Few queries against many keys: keys and values are read once, where they lie, in the type they have.
struct Decode {
  const float *q, *coef, *soft, *bias, *sink, *shift;
  const void *k, *v;
  const uint8_t* keep;
  float *o, *partial;
  long B, H, G, N, M, d, dp, dv_, vp, causal, splits, threads, value_groups;
  long k_stride[3], v_stride[3], keep_stride[4], bias_stride[4];
  float p, cap;
};
typedef uint16_t vh __attribute__((vector_size(2 * W)));
struct F32 {
  typedef float type;
  INLINE vf read(const type* p) { return load(p); }
};
struct BF16 {
  typedef uint16_t type;
  INLINE vf read(const type* p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return (vf)(__builtin_convertvector(x, vi) << 16);
  }
};
template <class T>
INLINE vf read_upto(const typename T::type* p, long n) {
  if (n >= W) return T::read(p);
  typename T::type padded[W] = {};
  memcpy(padded, p, n * sizeof *p);
  return T::read(padded);
}
struct Cosine : L1 {
  INLINE vf finish(vf s, float) { return 1.0f - s; }
};
template <class Metric>
constexpr bool is_cosine = std::is_same<Metric, Cosine>::value;

// Sums of one query against COUNT keys at a time, so that their latencies overlap.
template <class Metric, class T, int COUNT>
INLINE void key_sums(const float* q, const typename T::type* k, long stride, long d, float* sums, float p,
                     Softness soft) {
  if constexpr (Metric::soft) {
    auto read = [=](long j, long c) __attribute__((always_inline)) { return read_upto<T>(k + j * stride + c, d - c); };
    soft_keys<COUNT>(q, read, soft, sums);
  } else {
    vf acc[COUNT] = {}, norm[COUNT] = {};
    auto add = [&](int j, vf x, vf y) __attribute__((always_inline)) {
      if constexpr (Metric::product || is_cosine<Metric>)
        acc[j] += x * y;
      else
        acc[j] = Metric::add(acc[j], x - y, p);
      if constexpr (is_cosine<Metric>) norm[j] += y * y;
    };
    long c = 0;
    for (; c + W <= d; c += W)
      for (int j = 0; j < COUNT; j++) add(j, load(q + c), T::read(k + j * stride + c));
    if (c < d)
      for (int j = 0; j < COUNT; j++) add(j, load(q + c), read_upto<T>(k + j * stride + c, d - c));
    for (int j = 0; j < COUNT; j++) {
      float s = 0;
      if constexpr (Metric::ties)
        s = largest_bits(acc[j]);
      else
        s = total(acc[j]);
      if constexpr (is_cosine<Metric>) s /= std::max(sqrtf(total(norm[j]) + p * p), 1e-12f);
      sums[j] = s;
    }
  }
}
template <class Metric, class T>
static void decode_as(const Decode& a) {
  typedef typename T::type type;
  constexpr int COUNT = 8;
  long key_heads = a.H / a.G, rows = a.G * a.N, record = a.vp + 2, span = (a.M + a.splits - 1) / a.splits;
  span = (span + BK - 1) / BK * BK;
  Problem mask = {};
  mask.bias = a.bias;
  mask.keep = a.keep;
  mask.causal = a.causal;
  mask.shift = a.shift;
  mask.cap = a.cap;
  mask.p = a.p;
  mask.H = a.H;
  mask.N = a.N;
  mask.d = a.d;
  mask.soft = a.soft;
  memcpy(mask.keep_stride, a.keep_stride, sizeof a.keep_stride);
  memcpy(mask.bias_stride, a.bias_stride, sizeof a.bias_stride);
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BK + W);
    float* s = memory.get();
#pragma omp for schedule(dynamic)
    for (long unit = 0; unit < a.B * key_heads * a.splits; unit++) {
      long split = unit % a.splits, bk = unit / a.splits, b = bk / key_heads, kh = bk % key_heads;
      float* partial = a.partial + unit * rows * record;
      for (long r = 0; r < rows; r++) {
        memset(partial + r * record, 0, 4 * record);
        partial[r * record + a.vp] = -INF;
        if (a.sink && split == 0) {
          float m = a.sink[(b * a.H + kh * a.G) * a.N + r];
          partial[r * record + a.vp] = m;
          partial[r * record + a.vp + 1] = m == -INF ? 0 : 1;
        }
      }
      long stop = std::min(a.M, (split + 1) * span);
      for (long j0 = split * span; j0 < stop; j0 += BK) {
        long n = std::min<long>(BK, stop - j0);
        const type* k = (const type*)a.k + b * a.k_stride[0] + kh * a.k_stride[1] + j0 * a.k_stride[2];
        long vh = kh / a.value_groups;
        const type* v = (const type*)a.v + b * a.v_stride[0] + vh * a.v_stride[1] + j0 * a.v_stride[2];
        for (long r = 0; r < rows; r++) {
          long h = kh * a.G + r / a.N, i = r % a.N, j = 0;
          const float* q = a.q + ((b * a.H + h) * a.N + i) * a.dp;
          float p = mask.parameter(h);
          Softness soft = mask.softness(h);
          for (; j + COUNT <= n; j += COUNT)
            key_sums<Metric, T, COUNT>(q, k + j * a.k_stride[2], a.k_stride[2], a.d, s + j, p, soft);
          for (; j < n; j++) key_sums<Metric, T, 1>(q, k + j * a.k_stride[2], a.k_stride[2], a.d, s + j, p, soft);
          for (; j < BK; j++) s[j] = 0;
          float *o = partial + r * record, *m = o + a.vp, *l = m + 1;
          float largest = std::max(*m, row_logits<Metric>(mask, s, nullptr, nullptr, b, h, i, j0, n, a.coef[h]));
          float base = largest == -INF ? 0 : largest, shrink = *m == -INF ? 0 : expf(*m - base);
          vf sum = {};
          for (j = 0; j < BK; j += W) {
            vf w = expn(load(s + j) - base);
            store(s + j, w);
            sum += w;
          }
          *l = *l * shrink + total(sum);
          *m = *l == *l ? largest : base;  // a NaN counts as something seen
          long c = 0;
          for (; c + 4 * W <= a.dv_; c += 4 * W) {
            vf acc[4];
            for (int x = 0; x < 4; x++) acc[x] = shrink * load(o + c + x * W);
            for (j = 0; j < n; j++)
              for (int x = 0; x < 4; x++) acc[x] += s[j] * T::read(v + j * a.v_stride[2] + c + x * W);
            for (int x = 0; x < 4; x++) store(o + c + x * W, acc[x]);
          }
          for (; c < a.dv_; c += W) {
            vf acc = shrink * load(o + c);
            for (j = 0; j < n; j++) acc += s[j] * read_upto<T>(v + j * a.v_stride[2] + c, a.dv_ - c);
            store(o + c, acc);
          }
        }
      }
    }
#pragma omp for
    for (long row = 0; row < a.B * key_heads * rows; row++) {
      long bk = row / rows, r = row % rows;
      const float* first = a.partial + (bk * a.splits * rows + r) * record;
      float m = -INF, l = 0, *out = a.o + row * a.vp;  // (b, key head, group, query) is (b, head, query)
      for (long x = 0; x < a.splits; x++) m = std::max(m, first[x * rows * record + a.vp]);
      memset(out, 0, 4 * a.vp);
      if (m == -INF) continue;
      for (long x = 0; x < a.splits; x++) {
        const float* part = first + x * rows * record;
        float share = part[a.vp] == -INF ? 0 : expf(part[a.vp] - m);
        l += share * part[a.vp + 1];
        for (long c = 0; c < a.vp; c++) out[c] += share * part[c];
      }
      for (long c = 0; c < a.vp; c++) out[c] /= l;
    }
  }
}
template <class Metric>
static void decode(const Decode& a, int type) {
  if (type)
    decode_as<Metric, BF16>(a);
  else
    decode_as<Metric, F32>(a);
}
extern "C" int attention_decode(const Decode* a, int kind, int type) {
  switch (kind) {
    case 0: decode<L1>(*a, type); break;
    case 1: decode<Sq>(*a, type); break;
    case 2: decode<L2>(*a, type); break;
    case 3: decode<L3>(*a, type); break;
    case 4: decode<Lp>(*a, type); break;
    case 5: decode<Linf>(*a, type); break;
    case 6: decode<Cosine>(*a, type); break;
    case 7: decode<Dot>(*a, type); break;
    case 8: decode<SoftL1>(*a, type); break;
    case 9: decode<SoftL2>(*a, type); break;
    case 10: decode<Soft>(*a, type); break;
    default: return 1;
  }
  return 0;
}
"""
