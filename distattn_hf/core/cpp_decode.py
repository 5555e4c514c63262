"""C++ of the CPU kernels, part 4: few queries against many keys."""

DECODE = r"""
// Few queries against many keys: keys and values are read once, where they lie, in the type they have.
struct Decode {
  const float *q, *coef, *bias;
  const void *k, *v;
  const uint8_t* keep;
  float *o, *partial;
  long B, H, G, N, M, d, dp, dv_, vp, causal, splits, threads;
  long k_stride[3], v_stride[3], keep_stride[4], bias_stride[4];
  float p;
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
struct Dot : L1 {
  INLINE vf finish(vf s, float) { return -s; }
};
template <class Metric>
constexpr bool is_dot = std::is_same<Metric, Dot>::value;
template <class Metric>
constexpr bool is_cosine = std::is_same<Metric, Cosine>::value;

// Sums of one query against COUNT keys at a time, so that their latencies overlap.
template <class Metric, class T, int COUNT>
INLINE void key_sums(const float* q, const typename T::type* k, long stride, long d, float* sums, float p) {
  vf acc[COUNT] = {}, norm[COUNT] = {};
  auto add = [&](int j, vf x, vf y) __attribute__((always_inline)) {
    if constexpr (is_dot<Metric> || is_cosine<Metric>)
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
    if constexpr (is_cosine<Metric>) s /= std::max(sqrtf(total(norm[j])), 1e-12f);
    sums[j] = s;
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
  mask.p = a.p;
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
      }
      long stop = std::min(a.M, (split + 1) * span);
      for (long j0 = split * span; j0 < stop; j0 += BK) {
        long n = std::min<long>(BK, stop - j0);
        const type* k = (const type*)a.k + b * a.k_stride[0] + kh * a.k_stride[1] + j0 * a.k_stride[2];
        const type* v = (const type*)a.v + b * a.v_stride[0] + kh * a.v_stride[1] + j0 * a.v_stride[2];
        for (long r = 0; r < rows; r++) {
          long h = kh * a.G + r / a.N, i = r % a.N, j = 0;
          const float* q = a.q + ((b * a.H + h) * a.N + i) * a.dp;
          for (; j + COUNT <= n; j += COUNT)
            key_sums<Metric, T, COUNT>(q, k + j * a.k_stride[2], a.k_stride[2], a.d, s + j, a.p);
          for (; j < n; j++) key_sums<Metric, T, 1>(q, k + j * a.k_stride[2], a.k_stride[2], a.d, s + j, a.p);
          for (; j < BK; j++) s[j] = 0;
          float *o = partial + r * record, *m = o + a.vp, *l = m + 1;
          float largest = std::max(*m, row_logits<Metric>(mask, s, nullptr, b, h, i, j0, n, a.coef[h]));
          float base = largest == -INF ? 0 : largest, shrink = *m == -INF ? 0 : expf(*m - base);
          vf sum = {};
          for (j = 0; j < BK; j += W) {
            vf w = expv(load(s + j) - base);
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
    default: return 1;
  }
  return 0;
}
"""
