"""C++ source of the CPU kernels: vectors, metrics, and the register tiles that all kernels use.

The source is kept in Python strings because transformers copies only .py files beside a checkpoint.
"""

TILES = r"""
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// One vector of the widest registers; a panel is two of them: the columns of one register tile.
#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int PANEL = 2 * W;
constexpr int BQ = 64;     // queries in a tile
constexpr int BK = 8 * W;  // keys in a tile
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
constexpr float INF = __builtin_inff();

#define INLINE static inline __attribute__((always_inline))
INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vf where(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }  // as vmax, of (NaN, b): b; of (a, NaN): NaN
// Of numbers >= 0, whose bits are ordered as they are: unlike a float comparison this keeps a NaN.
INLINE vf largest_of(vf a, vf b) { return (vf)((vi)a > (vi)b ? (vi)a : (vi)b); }
INLINE float largest_bits(vf x) {
  int32_t most = 0;
  for (int l = 0; l < W; l++) most = std::max(most, ((vi)x)[l]);
  float y;
  memcpy(&y, &most, sizeof y);
  return y;
}
INLINE bool any(vi mask) {
#if defined(__AVX__) && !defined(__AVX512F__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int l = 0; l < W; l++) found |= mask[l];
  return found;
#endif
}
INLINE float most(vf x) {  // of its numbers, by halves: what is compared one by one waits for the one before
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 h[W / 8];
  v4 f[2];
  memcpy(h, &x, sizeof x);
  if constexpr (W == 16) h[0] = h[0] > h[W / 8 - 1] ? h[0] : h[W / 8 - 1];
  memcpy(f, h, sizeof f);
  f[0] = f[0] > f[1] ? f[0] : f[1];
  return std::max(std::max(f[0][0], f[0][1]), std::max(f[0][2], f[0][3]));
}
// w with the sign of x flipped into it, 0 where x is 0.
INLINE vf signed_by(vf w, vf x) { return x != 0 ? (vf)(((vi)x & (vi)splat(-0.0f)) ^ (vi)w) : vf{}; }

// 2^n, n being what was rounded into the low bits of 1.5·2^23 + n. A product with it keeps a NaN.
INLINE vf power_of_two(vf shifted) { return (vf)(((vi)shifted << 23) + 0x3f800000); }
INLINE vf exp2_excess(vf f) {  // 2^f - 1, |f| <= ½
  vf y = splat(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  return y * f;
}
INLINE vf exp_above(vf x) {  // e^x for -87.33 <= x <= 88.3
  // exp(x) = 2^n·e^r with r = x - n·ln 2 in two parts, so that large |x| keeps its digits.
  vf shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf y = splat(1.9875691e-4f);
  y = y * r + 1.3981999e-3f;
  y = y * r + 8.3334519e-3f;
  y = y * r + 4.1665796e-2f;
  y = y * r + 1.6666665e-1f;
  y = y * r + 5.0000001e-1f;
  y = y * r * r + r + 1.0f;
  return y * power_of_two(shifted);
}
INLINE vf expn(vf x) {  // e^x for x <= 0, but for rounding: a weight
  vi low = x < -87.33f;
  return (vf)(~low & (vi)exp_above(vmax(splat(-87.33f), x)));
}
INLINE vf expv(vf x) {
  vi low = x < -87.33f;
  return (vf)(~low & (vi)exp_above(vmin(splat(88.3f), vmax(splat(-87.33f), x))));
}
// tanh(x): by a polynomial of x near 0, so that a small result keeps its digits, and by e^(2|x|) beyond.
INLINE vf tanhv(vf x) {
  vf size = vabs(x), s = x * x, y = splat(-5.70498872745e-3f);
  y = y * s + 2.06390887954e-2f;
  y = y * s - 5.37397155531e-2f;
  y = y * s + 1.33314422036e-1f;
  y = y * s - 3.33332819422e-1f;
  vf near = y * s * x + x;
  vi large = ~(size < 0.625f);
  if (!any(large)) return near;
  vf far = 1.0f - 2.0f / (expv(2.0f * size) + 1.0f);
  return where(large, (vf)((vi)far | ((vi)x & (vi)splat(-0.0f))), near);
}
// x = 2^e·(1 + m) for a normal x > 0, with 1 + m in [√½, √2).
INLINE vf mantissa(vf x, vf& e) {
  vi bits = (vi)x - 0x3f3504f3;
  e = __builtin_convertvector(bits >> 23, vf);
  return (vf)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
}
INLINE vf log1p_fraction(vf m) {  // log(1 + m) of such an m
  vf l = splat(7.0376836292e-2f);
  l = l * m - 1.1514610310e-1f;
  l = l * m + 1.1676998740e-1f;
  l = l * m - 1.2420140846e-1f;
  l = l * m + 1.4249322787e-1f;
  l = l * m - 1.6668057665e-1f;
  l = l * m + 2.0000714765e-1f;
  l = l * m - 2.4999993993e-1f;
  l = l * m + 3.3333331174e-1f;
  vf square = m * m;
  return (l * m * square - 0.5f * square) + m;
}
// x^(p + rest) for x >= 0; 0 below the normal numbers. With x = 2^e·m the exponent is e·p + log2(m)·p; its whole part
// n is taken off before anything is rounded, or a large |e·p| would cost digits.
INLINE vf powv(vf x, float p, float rest = 0) {
  vi tiny = x < 1.1754944e-38f;
  vf e, m = mantissa(tiny ? splat(1.0f) : x, e), l = log1p_fraction(m) * (1.44269504f * p), z = e * p + l;
  vi low = z < -126.0f;
  z = z < -126.0f ? splat(-126.0f) : z;
  z = z > 127.0f ? splat(127.0f) : z;
  vf shifted = z + 12582912.0f, n = shifted - 12582912.0f;
  vf power = (exp2_excess((e * p - n) + (l + e * rest)) + 1.0f) * power_of_two(shifted);
  return where(tiny | low, vf{}, where(x != x, x, power));
}

INLINE vf root(vf x, float p) {
  float inverse = 1 / p;
  return powv(x, inverse, (float)(1.0 / p - inverse));
}

// A metric: what one coordinate's difference x adds to the sum, the distance from the sum, and the derivative:
// d distance / d x = weight(distance)·slope(x), with the count of maxima for chebyshev.
struct Plain {
  // by_pair: slope(x) depends on the distance, too. soft: the tiles are those of kernel_cpp_softened.py. product: the
  // sums are of products, and tiles are matmuls. squares: as `square_sums` has them.
  static constexpr bool ties = false, by_pair = false, soft = false, product = false, squares = false;
};
struct L1 : Plain {
  INLINE vf add(vf s, vf x, float) { return s + vabs(x); }
  INLINE vf finish(vf s, float) { return s; }
  INLINE vf weight(vf w, vf, float) { return w; }
  INLINE vf pull(vf acc, vf w, vf x, vf, float) { return acc + signed_by(w, x); }
};
struct Sq : Plain {
  INLINE vf add(vf s, vf x, float) { return s + x * x; }
  INLINE vf finish(vf s, float) { return s; }
  INLINE vf weight(vf w, vf, float) { return 2.0f * w; }
  INLINE vf pull(vf acc, vf w, vf x, vf, float) { return acc + w * x; }
};
INLINE vf sqrtv(vf x) {
  for (int i = 0; i < W; i++) x[i] = sqrtf(x[i]);
  return x;
}
// The reciprocal of 1e-37 < x < 1e37 and its root, to the last two bits: a division takes three times as long.
#if defined(__AVX512F__)
INLINE vf near_reciprocal(vf x) { return (vf)_mm512_rcp14_ps((__m512)x); }
INLINE vf near_reciprocal_root(vf x) { return (vf)_mm512_rsqrt14_ps((__m512)x); }
#elif defined(__AVX__)
INLINE vf near_reciprocal(vf x) { return (vf)_mm256_rcp_ps((__m256)x); }
INLINE vf near_reciprocal_root(vf x) { return (vf)_mm256_rsqrt_ps((__m256)x); }
#else
INLINE vf near_reciprocal(vf x) { return 1.0f / x; }
INLINE vf near_reciprocal_root(vf x) { return 1.0f / sqrtv(x); }
#endif
INLINE vf reciprocal(vf x) {
  vf y = near_reciprocal(x);
  return y + y * (1.0f - x * y);
}
INLINE vf reciprocal_root(vf x) {
  vf y = near_reciprocal_root(x);
  return y + 0.5f * y * (1.0f - x * y * y);
}
INLINE vf divide(vf w, vf d) { return where(d == 0, vf{}, w / where(d == 0, splat(1.0f), d)); }
struct L2 : Sq {
  INLINE vf finish(vf s, float) { return sqrtv(s); }
  INLINE vf weight(vf w, vf d, float) { return divide(w, d); }
};
// Softened (see softening.py): p is the knee δ of a coordinate, and ε.
struct SoftL1 : Plain {
  INLINE vf add(vf s, vf x, float p) {
    vf a = vabs(x), m = vmin(a, splat(p));
    return s + m * (a - 0.5f * m);
  }
  INLINE vf finish(vf s, float p) { return s / p; }
  INLINE vf weight(vf w, vf, float p) { return w / p; }
  INLINE vf pull(vf acc, vf w, vf x, vf, float p) { return acc + w * vmax(vmin(x, splat(p)), splat(-p)); }
};
struct SoftL2 : Sq {
  static constexpr bool squares = true;
  INLINE vf finish(vf s, float p) {
    vf x = vmax(splat(1e-36f), s + p * p);
    return s * reciprocal(x * reciprocal_root(x) + p);
  }
  INLINE vf weight(vf w, vf d, float p) { return w * reciprocal(d + p); }  // d + ε is the root
};
struct L3 : Plain {
  INLINE vf add(vf s, vf x, float) {
    vf a = vabs(x);
    return s + a * (x * x);
  }
  INLINE vf finish(vf s, float) { return root(s, 3); }
  INLINE vf weight(vf w, vf d, float) { return divide(w, d * d); }
  INLINE vf pull(vf acc, vf w, vf x, vf, float) { return acc + w * (x * vabs(x)); }
};
struct Lp : Plain {
  INLINE vf add(vf s, vf x, float p) { return s + powv(vabs(x), p); }
  INLINE vf finish(vf s, float p) { return root(s, p); }
  INLINE vf weight(vf w, vf d, float p) { return divide(w, powv(d, p - 1)); }
  INLINE vf pull(vf acc, vf w, vf x, vf, float p) { return acc + signed_by(w * powv(vabs(x), p - 1), x); }
};
struct Linf : Plain {
  static constexpr bool ties = true, by_pair = true;
  INLINE vf add(vf s, vf x, float) { return largest_of(s, vabs(x)); }
  INLINE vf finish(vf s, float) { return s; }
  INLINE vf weight(vf w, vf count, float) { return divide(w, count); }
  INLINE vf pull(vf acc, vf w, vf x, vf d, float) { return acc + where(vabs(x) == d, signed_by(w, x), vf{}); }
};
struct Dot : Plain {
  static constexpr bool product = true;
  INLINE vf finish(vf s, float) { return -s; }
  INLINE vf weight(vf w, vf, float) { return -w; }
};

// out[r, :] (= or +=) Σ_k a[r, k]·b[k, :] for R rows and NV vectors of columns, all sums in registers.
template <int R, int NV, bool ADD>
INLINE void multiply(const float* a, long ar, long ak, const float* b, long ldb, long n, float* out, long ldo) {
  vf acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = ADD ? load(out + r * ldo + v * W) : vf{};
  for (long k = 0; k < n; k++) {
    vf x[NV];
    for (int v = 0; v < NV; v++) x[v] = load(b + k * ldb + v * W);
    for (int r = 0; r < R; r++) {
      vf y = splat(a[r * ar + k * ak]);
      for (int v = 0; v < NV; v++) acc[r][v] += y * x[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) store(out + r * ldo + v * W, acc[r][v]);
}
template <bool ADD>
static void multiply_rows(const float* a, long ar, long ak, const float* b, long ldb, long n, float* out, long ldo,
                          long rows, long columns) {
  constexpr int R = W == 16 ? 8 : 4;
  for (long c = 0; c < columns; c += PANEL) {
    bool wide = columns - c >= PANEL;
    long r = 0;
    if (W == 8 && wide)
      for (; r + 6 <= rows; r += 6)
        multiply<6, 2, ADD>(a + r * ar, ar, ak, b + c, ldb, n, out + r * ldo + c, ldo);
    for (; r + R <= rows; r += R)
      if (wide)
        multiply<R, 2, ADD>(a + r * ar, ar, ak, b + c, ldb, n, out + r * ldo + c, ldo);
      else
        multiply<R, 1, ADD>(a + r * ar, ar, ak, b + c, ldb, n, out + r * ldo + c, ldo);
    for (; r < rows; r++)
      if (wide)
        multiply<1, 2, ADD>(a + r * ar, ar, ak, b + c, ldb, n, out + r * ldo + c, ldo);
      else
        multiply<1, 1, ADD>(a + r * ar, ar, ak, b + c, ldb, n, out + r * ldo + c, ldo);
  }
}
constexpr int RP = W == 16 ? 8 : 4, RG = W == 16 ? 4 : 2;  // rows of a register tile: pairs, gradients
// sums[r, :] = Σ_c |q[r, c] - panel[c, :]|^p (or max) for RP rows and one panel of keys.
template <class Metric, class P>
INLINE void pair_sums(const float* q, long ldq, const float* panel, long d, float* sums, long lds, P p) {
  vf acc[RP][2] = {};
  for (long c = 0; c < d; c++) {
    vf k0 = load(panel + c * PANEL), k1 = load(panel + c * PANEL + W);
    for (int r = 0; r < RP; r++) {
      vf x = splat(q[r * ldq + c]);
      acc[r][0] = Metric::add(acc[r][0], x - k0, p);
      acc[r][1] = Metric::add(acc[r][1], x - k1, p);
    }
  }
  for (int r = 0; r < RP; r++) {
    store(sums + r * lds, acc[r][0]);
    store(sums + r * lds + W, acc[r][1]);
  }
}
// count[r, :] = how many coordinates reach the largest difference.
static void count_ties(const float* q, long ldq, const float* panel, long d, const float* largest, float* count,
                       long ld) {
  for (int r = 0; r < RG; r++) {
    vf n0 = {}, n1 = {}, m0 = load(largest + r * ld), m1 = load(largest + r * ld + W), one = splat(1.0f);
    for (long c = 0; c < d; c++) {
      vf x = splat(q[r * ldq + c]);
      n0 += where(vabs(x - load(panel + c * PANEL)) == m0, one, vf{});
      n1 += where(vabs(x - load(panel + c * PANEL + W)) == m1, one, vf{});
    }
    store(count + r * ld, n0);
    store(count + r * ld + W, n1);
  }
}
// out[r, :] += Σ_k w[r, k]·slope(x[r, :] - y[k, :]); w and distance share their strides.
template <class Metric, int R, int NV, class P>
INLINE void pull_tile(const float* w, const float* dist, long wr, long wk, const float* x, const float* y, long ld,
                      long n, float* out, P p) {
  vf acc[R][NV], mine[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) {
      acc[r][v] = load(out + r * ld + v * W);
      mine[r][v] = load(x + r * ld + v * W);
    }
  for (long k = 0; k < n; k++) {
    vf other[NV];
    for (int v = 0; v < NV; v++) other[v] = load(y + k * ld + v * W);
    for (int r = 0; r < R; r++) {
      vf weight = splat(w[r * wr + k * wk]), d = Metric::by_pair ? splat(dist[r * wr + k * wk]) : vf{};
      for (int v = 0; v < NV; v++) acc[r][v] = Metric::pull(acc[r][v], weight, mine[r][v] - other[v], d, p);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) store(out + r * ld + v * W, acc[r][v]);
}
template <class Metric, class P>
static void pull_rows(const float* w, const float* dist, long wr, long wk, const float* x, const float* y, long ld,
                      long n, float* out, long rows, P p) {
  for (long c = 0; c < ld; c += PANEL) {
    bool wide = ld - c >= PANEL;
    long r = 0;
    for (; r + RG <= rows; r += RG)
      if (wide)
        pull_tile<Metric, RG, 2>(w + r * wr, dist + r * wr, wr, wk, x + r * ld + c, y + c, ld, n, out + r * ld + c,
                                 p);
      else
        pull_tile<Metric, RG, 1>(w + r * wr, dist + r * wr, wr, wk, x + r * ld + c, y + c, ld, n, out + r * ld + c,
                                 p);
    for (; r < rows; r++)
      if (wide)
        pull_tile<Metric, 1, 2>(w + r * wr, dist + r * wr, wr, wk, x + r * ld + c, y + c, ld, n, out + r * ld + c, p);
      else
        pull_tile<Metric, 1, 1>(w + r * wr, dist + r * wr, wr, wk, x + r * ld + c, y + c, ld, n, out + r * ld + c, p);
  }
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
constexpr int BLOCK = 64;  // keys that enter the running sums together
constexpr int PANELS = BLOCK / PANEL;

// panels[p, c, j] = x[p·PANEL + j, c] of one block of rows; 0 past the last.
static void pack(const float* x, long ldx, long rows, long d, float* panels) {
  if (rows < BLOCK) memset(panels, 0, 4 * BLOCK * d);
  for (long j = 0; j < rows; j++) {
    float* to = panels + j / PANEL * d * PANEL + j % PANEL;
    for (long c = 0; c < d; c++) to[c * PANEL] = x[j * ldx + c];
  }
}
INLINE float largest_in(const float* x, long n) {
  vf m = splat(-INF);
  for (long j = 0; j < n; j += W) m = vmax(m, load(x + j));
  return most(m);
}
INLINE float dot_product(const float* x, const float* y, long n) {
  vf sum = {};
  for (long c = 0; c < n; c += W) sum += load(x + c) * load(y + c);
  return total(sum);
}
"""
