"""C++ source of the CPU kernels: softened lp and chebyshev (softening.py has the formulas), one kind for both.

With u = x·scale, scale = 1/δ, and f = distance/ε, so that ε multiplies λ and no ε reaches the kernels:

    lp         f = (mean_c (1 + u_c²)^(p/2))^(1/p) - 1     ∂f/∂u_c = v_c·(v_c² + 1/D²)^(p/2-1) / d,  D = f + 1, v = u/D
    chebyshev  f = log(mean_c cosh u_c), p = ∞             ∂f/∂u_c = sinh(u_c)·e^(-f) / d

Sums are of what is above 1, so that near vectors keep their digits; the few that overflow are computed anew, from their
largest coordinate.
"""

SOFTENED = r"""
struct Softness {
  float p, scale;
  long d;
};
// log2(1 + t) = e + l·log2(e); where e is 0, t itself is in l and keeps its digits.
INLINE vf log1p_parts(vf t, vf& e) {
  vf y = 1.0f + t;
  vi bits = (vi)y - 0x3f3504f3;
  e = __builtin_convertvector(bits >> 23, vf);
  vf m = (vf)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  m = where(e == 0, t, m);
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
INLINE vf log1pv(vf t) {
  vf e, l = log1p_parts(t, e);
  return where(t != t, t, e * 0.69314718f + l);
}
// (1 + t)^(p + rest) - 1 for t >= 0, as `powv`, with the digits of a small result.
INLINE vf power_excess(vf t, float p, float rest) {
  vf e, l = log1p_parts(t, e) * (1.44269504f * p), z = e * p + l;
  z = z > 127.0f ? splat(127.0f) : z;
  vf shifted = z + 12582912.0f, n = shifted - 12582912.0f, whole = power_of_two(shifted);
  vf f = (e * p - n) + (l + e * rest);
  vf y = splat(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  return where(t != t, t, whole * (y * f) + (whole - 1.0f));
}
INLINE vf reciprocal(vf x) {  // of 1 <= x < 1e37
#if defined(__AVX512F__)
  vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
#elif defined(__AVX__)
  vf y = (vf)_mm256_rcp_ps((__m256)x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// What the tiles of softened metrics add up and pull by; `a.p` and `a.scale` as above, d is 1/D of the pair.
struct Cube : Plain {  // p = 3: r³ - 1 = s·(r + 1/(1 + r)) with r = √(1 + s)
  static constexpr bool by_pair = true;
  INLINE vf add(vf sum, vf x, Softness a) {
    vf u = x * a.scale, s = u * u, r = sqrtv(1.0f + s);
    return sum + s * (r + reciprocal(1.0f + r));
  }
  INLINE vf pull(vf acc, vf w, vf x, vf d, Softness a) {
    vf v = x * (d * a.scale);
    return acc + (w * v) * sqrtv(v * v + d * d);
  }
};
struct Fourth : Plain {  // p = 4
  static constexpr bool by_pair = true;
  INLINE vf add(vf sum, vf x, Softness a) {
    vf u = x * a.scale, s = u * u;
    return sum + s * (s + 2.0f);
  }
  INLINE vf pull(vf acc, vf w, vf x, vf d, Softness a) {
    vf v = x * (d * a.scale);
    return acc + (w * v) * (v * v + d * d);
  }
};
struct Power : Plain {
  static constexpr bool by_pair = true;
  INLINE vf add(vf sum, vf x, Softness a) {
    vf u = x * a.scale;
    return sum + power_excess(u * u, 0.5f * a.p, 0);
  }
  INLINE vf pull(vf acc, vf w, vf x, vf d, Softness a) {
    vf v = x * (d * a.scale);
    return acc + (w * v) * powv(v * v + d * d, 0.5f * a.p - 1);
  }
};
// cosh u - 1 by a polynomial of y = u/2^HALVED, |y| <= 2, and then cosh 2y - 1 = c·(2c + 4) with c = cosh y - 1: no two
// terms cancel. Likewise sinh 2y = 2·sinh y·(c + 1).
template <int HALVED>
struct Cosh : Plain {
  INLINE vf excess(vf s) {
    vf c = splat(2.968770925e-7f);
    c = c * s + 2.472764934e-5f;
    c = c * s + 1.388992302e-3f;
    c = c * s + 4.166661671e-2f;
    c = c * s + 5.000000038e-1f;
    return c * s;
  }
  INLINE vf square(vf x, Softness a) {
    vf y = x * (a.scale / (1 << HALVED));
    return y * y;
  }
  INLINE vf add(vf sum, vf x, Softness a) {
    vf c = excess(square(x, a));
    for (int i = 0; i < HALVED; i++) c = c * (2.0f * c + 4.0f);
    return sum + c;
  }
  INLINE vf pull(vf acc, vf w, vf x, vf, Softness a) {
    vf s = square(x, a), y = splat(3.009276654e-6f);
    y = y * s + 1.975468666e-4f;
    y = y * s + 8.334516312e-3f;
    y = y * s + 1.666661142e-1f;
    y = y * s + 1.000000040f;
    y = y * x;
    vf c = HALVED ? excess(s) : s;
    for (int i = 0; i < HALVED; i++) {
      y = y + y * c;
      c = c * (2.0f * c + 4.0f);
    }
    return acc + w * y;
  }
};
struct FarCosh : Plain {  // for any x; d is the largest |x|
  static constexpr bool by_pair = true;
  INLINE vf pull(vf acc, vf w, vf x, vf d, Softness a) {
    vf size = vabs(x);
    return acc + signed_by(w * (expv((size - d) * a.scale) - expv((-size - d) * a.scale)), x);
  }
};
constexpr float FAR = 32;  // |u| up to which Cosh goes

struct Soft : Plain {
  static constexpr bool soft = true;
  INLINE vf finish(vf f, float) { return f; }
};

// The largest |u| of a tile, or more (0 of lp, which does not ask): from the smallest and largest of each coordinate.
static float soft_reach(const float* q, long ldq, long rows, const float* panels, long n, Softness a) {
  float reach = 0;
  if (a.p != INF) return reach;
  for (long c0 = 0; c0 < a.d; c0 += W) {
    vf low = splat(INF), high = splat(-INF);
    for (long r = 0; r < rows; r++) {
      vf x = load(q + r * ldq + c0);
      low = vmin(x, low), high = vmax(x, high);
    }
    for (long c = c0; c < std::min(c0 + W, a.d); c++) {
      vf least = splat(INF), most = splat(-INF);
      for (long j = 0; j < n; j += PANEL)
        for (long v = 0; v < PANEL; v += W) {
          vf x = load(panels + j * a.d + c * PANEL + v);
          least = vmin(x, least), most = vmax(x, most);
        }
      float below = INF, above = -INF;
      for (int l = 0; l < W; l++) below = std::min(below, least[l]), above = std::max(above, most[l]);
      reach = std::max(reach, std::max(high[c - c0] - below, above - low[c - c0]) * a.scale);
    }
  }
  return reach;
}
INLINE vf near_distance(vf sum, Softness a) {
  float inverse = 1 / a.p;
  sum = sum / (float)a.d;
  return a.p == INF ? log1pv(sum) : power_excess(sum, inverse, (float)(1.0 / a.p - inverse));
}
// Sums from the largest |x| on, which no exponent overflows: what one coordinate adds, and f.
INLINE vf far_add(vf size, vf largest, Softness a) {
  if (a.p == INF) return expv((size - largest) * a.scale) + expv((-size - largest) * a.scale);
  largest = vmax(largest, splat(1e-30f));
  vf u = size / largest, knee = 1.0f / (largest * a.scale);
  return powv(u * u + knee * knee, 0.5f * a.p);
}
INLINE vf far_distance(vf largest, vf sum, Softness a) {
  vf u = largest * a.scale, f = a.p == INF ? u + log1pv(sum / (2.0f * a.d) - 1.0f)
                                           : u * powf(a.d, -1 / a.p) * root(sum, a.p) - 1.0f;
  return where(u == INF, u, f);
}
INLINE vi overflown(vf sum) { return ~(sum < 1e37f); }
INLINE bool any(vi mask) {
  int32_t found = 0;
  for (int l = 0; l < W; l++) found |= mask[l];
  return found;
}
// f of one row and one vector of keys, whatever their size; also the largest |x| and the sum taken from it on.
static vf far_pairs(const float* q, const float* panel, Softness a, vf& largest, vf& sum) {
  largest = sum = vf{};
  for (long c = 0; c < a.d; c++) largest = largest_of(largest, vabs(q[c] - load(panel + c * PANEL)));
  for (long c = 0; c < a.d; c++) sum += far_add(vabs(q[c] - load(panel + c * PANEL)), largest, a);
  return far_distance(largest, sum, a);
}
template <class Metric>
static void sums_of(const float* q, long ldq, long rows, const float* panels, long n, float* sums, Softness a) {
  for (long c = 0; c < n; c += PANEL)
    for (long r = 0; r < rows; r += RP)
      pair_sums<Metric>(q + r * ldq, ldq, panels + c * a.d, a.d, sums + r * BK + c, BK, a);
}
// f of `rows` queries and n keys into sums (rows, BK); returns the tile's reach.
static float soft_sums(const float* q, long ldq, long rows, const float* panels, long n, float* sums, Softness a) {
  float reach = soft_reach(q, ldq, rows, panels, n, a);
  if (a.p == 3)
    sums_of<Cube>(q, ldq, rows, panels, n, sums, a);
  else if (a.p == 4)
    sums_of<Fourth>(q, ldq, rows, panels, n, sums, a);
  else if (a.p != INF)
    sums_of<Power>(q, ldq, rows, panels, n, sums, a);
  else if (reach <= 2)
    sums_of<Cosh<0>>(q, ldq, rows, panels, n, sums, a);
  else if (reach <= 8)
    sums_of<Cosh<2>>(q, ldq, rows, panels, n, sums, a);
  else if (reach <= FAR)
    sums_of<Cosh<4>>(q, ldq, rows, panels, n, sums, a);
  bool far = a.p == INF && !(reach <= FAR);
  for (long r = 0; r < rows; r++)
    for (long j = 0; j < n; j += W) {
      const float* panel = panels + j / PANEL * PANEL * a.d + j % PANEL;
      vf sum = load(sums + r * BK + j), f = near_distance(sum, a), largest, total;
      if (far || any(overflown(sum))) {
        vf anew = far_pairs(q + r * ldq, panel, a, largest, total);
        f = far ? anew : where(overflown(sum), anew, f);
      }
      store(sums + r * BK + j, f);
    }
  return reach;
}
// The weight that pairs are pulled by, from the gradient w of f; f becomes what the slopes need of the pair.
INLINE vf soft_weight(vf w, float* distance, const float* q, const float* panel, float reach, Softness a) {
  vf f = load(distance), largest, sum;
  if (a.p != INF) {
    store(distance, 1.0f / (1.0f + f));
    return w * (a.scale / a.d);
  }
  if (reach <= FAR) return w * expv(-f) * (a.scale * a.scale / a.d);
  // Slopes are a softmax; exp(|u| - f) would have the rounding of a large f.
  far_pairs(q, panel, a, largest, sum);
  store(distance, where(largest == INF, vf{}, largest));
  return where(largest == INF, vf{}, w * a.scale / sum);
}
static void soft_pull(const float* w, const float* dist, long wr, long wk, const float* x, const float* y, long ld,
                      long n, float* out, long rows, Softness a, float reach) {
  if (a.p == 3)
    pull_rows<Cube>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  else if (a.p == 4)
    pull_rows<Fourth>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  else if (a.p != INF)
    pull_rows<Power>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  else if (reach <= 2)
    pull_rows<Cosh<0>>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  else if (reach <= 8)
    pull_rows<Cosh<2>>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  else if (reach <= FAR)
    pull_rows<Cosh<4>>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  else
    pull_rows<FarCosh>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
}
// f of one query and COUNT <= W keys, rows of any memory: reads(j, c) is the vector of key j from coordinate c on.
template <class Metric, int COUNT, class Read>
INLINE vf key_totals(const float* q, long d, Read read, Softness a) {
  vf acc[COUNT] = {}, sums = {};
  for (long c = 0; c < d; c += W)
    for (int j = 0; j < COUNT; j++) acc[j] = Metric::add(acc[j], load(q + c) - read(j, c), a);
  for (int j = 0; j < COUNT; j++) sums[j] = total(acc[j]);
  return sums;
}
template <int COUNT, class Read>
static void soft_keys(const float* q, Read read, Softness a, float* distances) {
  vf f, sums = {};
  float reach = 0;
  if (a.p == INF) {
    vf largest = {};
    for (int j = 0; j < COUNT; j++)
      for (long c = 0; c < a.d; c += W) largest = largest_of(largest, vabs(load(q + c) - read(j, c)));
    reach = largest_bits(largest) * a.scale;
  }
  if (a.p == 3)
    sums = key_totals<Cube, COUNT>(q, a.d, read, a);
  else if (a.p == 4)
    sums = key_totals<Fourth, COUNT>(q, a.d, read, a);
  else if (a.p != INF)
    sums = key_totals<Power, COUNT>(q, a.d, read, a);
  else if (reach <= 2)
    sums = key_totals<Cosh<0>, COUNT>(q, a.d, read, a);
  else if (reach <= FAR)
    sums = key_totals<Cosh<4>, COUNT>(q, a.d, read, a);
  bool far = a.p == INF && !(reach <= FAR);
  f = near_distance(sums, a);
  for (int j = 0; j < COUNT; j++) {
    if (far || !(sums[j] < 1e37f)) {
      vf largest = {}, sum = {};
      for (long c = 0; c < a.d; c += W) largest = largest_of(largest, vabs(load(q + c) - read(j, c)));
      largest = splat(largest_bits(largest));
      for (long c = 0; c < a.d; c += W) {
        vf more = far_add(vabs(load(q + c) - read(j, c)), largest, a);
        for (long l = a.d - c; l < W; l++) more[l] = 0;  // the last vector is filled up
        sum += more;
      }
      f[j] = far_distance(largest, splat(total(sum)), a)[0];
    }
    distances[j] = f[j];
  }
}
"""
