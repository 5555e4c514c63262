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
  vf m = mantissa(1.0f + t, e);
  return log1p_fraction(where(e == 0, t, m));
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
  return where(t != t, t, whole * exp2_excess(f) + (whole - 1.0f));
}
// sums[r, :] = ‖q[r]‖² + ‖k‖² - 2q[r]·k of `rows` queries and n keys with their squared norms; of pairs that lose more
// than two bits by it, whose squared distance is far below their norms, Σ_c (q[r, c] - k[c])². Which of the two a pair
// gets depends on that pair alone, not on what it is beside, some of which is masked. far (rows, BK): where it is the
// second. Returns whether it is anywhere.
static bool square_sums(const float* q, long ldq, const float* q_norms, long rows, const float* panels, long d,
                        const float* k_norms, long n, float* sums, vi* far) {
  bool some = false;
  for (long c = 0; c < n; c += PANEL) {
    const float* panel = panels + c * d;
    multiply_rows<false>(q, ldq, 1, panel, PANEL, d, sums + c, BK, rows, PANEL);
    for (long r0 = 0; r0 < rows; r0 += RP) {
      vi found = {};
      for (long r = r0; r < r0 + RP; r++)
        for (long v = 0; v < PANEL; v += W) {
          float* sum = sums + r * BK + c + v;
          vf norms = q_norms[r] + load(k_norms + c + v), s = norms - 2.0f * load(sum);
          vi lost = ~(4.0f * s >= norms);  // or NaN
          store(sum, s);
          far[(r * BK + c + v) / W] = lost;
          found |= lost;
        }
      if (!any(found)) continue;
      some = true;
      float differences[RP * PANEL];
      pair_sums<Sq>(q + r0 * ldq, ldq, panel, d, differences, PANEL, 0.0f);
      for (long r = r0; r < r0 + RP; r++)
        for (long v = 0; v < PANEL; v += W) {
          float* sum = sums + r * BK + c + v;
          store(sum, where(far[(r * BK + c + v) / W], load(differences + (r - r0) * PANEL + v), load(sum)));
        }
    }
  }
  return some;
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
    // A pair that is further away has weight 0 here: its slope must be finite.
    vf s = vmin(square(x, a), splat(4)), y = splat(3.009276654e-6f);
    y = y * s + 1.975468666e-4f;
    y = y * s + 8.334516312e-3f;
    y = y * s + 1.666661142e-1f;
    y = y * s + 1.000000040f;
    y = y * x;
    vf c = excess(s);
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
typedef Cosh<1> NearCosh;
typedef Cosh<4> WideCosh;
// Sums up to which these hold, cosh 4 - 1 and cosh 32 - 1 or less; and one that does not overflow.
constexpr float NEAR = 26, WIDE = 3e13, LARGEST = 1e37;

struct Soft : Plain {
  static constexpr bool soft = true;
  INLINE vf finish(vf f, float) { return f; }
};

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
INLINE vi above(vf x, float limit) { return ~(x <= limit); }  // or NaN
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
// f of `rows` queries and n keys into sums (rows, BK). How a pair is computed depends on that pair alone, not on the
// others of its tile, of which some are masked.
static void soft_sums(const float* q, long ldq, long rows, const float* panels, long n, float* sums, Softness a) {
  if (a.p == 3)
    sums_of<Cube>(q, ldq, rows, panels, n, sums, a);
  else if (a.p == 4)
    sums_of<Fourth>(q, ldq, rows, panels, n, sums, a);
  else if (a.p != INF)
    sums_of<Power>(q, ldq, rows, panels, n, sums, a);
  else
    sums_of<NearCosh>(q, ldq, rows, panels, n, sums, a);
  float wider[RP * PANEL];
  for (long c = 0; c < n; c += PANEL)
    for (long r0 = 0; r0 < rows; r0 += RP) {
      const float* panel = panels + c * a.d;
      if (a.p == INF) {
        vi wide = {};
        for (long r = r0; r < r0 + RP; r++)
          for (long v = 0; v < PANEL; v += W) wide |= above(load(sums + r * BK + c + v), NEAR);
        if (any(wide)) {
          pair_sums<WideCosh>(q + r0 * ldq, ldq, panel, a.d, wider, PANEL, a);
          for (long r = 0; r < RP; r++)
            for (long v = 0; v < PANEL; v += W) {
              float* sum = sums + (r0 + r) * BK + c + v;
              store(sum, where(above(load(sum), NEAR), load(wider + r * PANEL + v), load(sum)));
            }
        }
      }
      for (long r = r0; r < r0 + RP; r++)
        for (long v = 0; v < PANEL; v += W) {
          vf sum = load(sums + r * BK + c + v), f = near_distance(sum, a), largest, total;
          vi far = above(sum, a.p == INF ? WIDE : LARGEST);
          if (any(far)) f = where(far, far_pairs(q + r * ldq, panel + v, a, largest, total), f);
          store(sums + r * BK + c + v, f);
        }
    }
}
// The f up to which slopes of chebyshev are those of NearCosh and of WideCosh.
INLINE float near_limit(Softness a) { return log1pf(0.999f * NEAR / a.d); }
INLINE float wide_limit(Softness a) { return log1pf(0.999f * WIDE / a.d); }
// The weight that pairs are pulled by, from the gradient w of f; in `distance`, f becomes what their slopes need.
INLINE vf soft_weight(vf w, float* distance, float* kept, const float* q, const float* panel, Softness a) {
  vf f = load(distance), largest, sum;
  store(kept, f);
  if (a.p != INF) {
    store(distance, 1.0f / (1.0f + f));
    return w * (a.scale / a.d);
  }
  vf near = w * expv(-f) * (a.scale * a.scale / a.d);
  vi far = above(f, wide_limit(a));
  if (!any(far)) return near;
  // Slopes are a softmax; exp(|u| - f) would have the rounding of a large f.
  far_pairs(q, panel, a, largest, sum);
  vi infinite = largest == INF;
  store(distance, where(far, where(infinite, vf{}, largest), f));
  return where(far, where(infinite, vf{}, w * a.scale / sum), near);
}
static void soft_pull(const float* w, const float* dist, const float* f, long wr, long wk, const float* x,
                      const float* y, long ld, long n, float* out, long rows, Softness a) {
  if (a.p == 3) return pull_rows<Cube>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  if (a.p == 4) return pull_rows<Fourth>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  if (a.p != INF) return pull_rows<Power>(w, dist, wr, wk, x, y, ld, n, out, rows, a);
  // Each kind of pairs in turn, the others with weight 0: what is added does not depend on what is masked.
  float chosen[BQ * BK], near = near_limit(a), wide = wide_limit(a);
  long tile_rows = wk == 1 ? rows : n, columns = wk == 1 ? n : rows;  // strides are BK and 1
  for (int kind = 0; kind < 3; kind++) {
    float from = kind == 0 ? -INF : kind == 1 ? near : wide, to = kind == 0 ? near : kind == 1 ? wide : INF;
    int some = 0;
    for (long at = 0; at < tile_rows * BK; at += BK)
      for (long j = at; j < at + columns; j++) {
        chosen[j] = kind == 2 ? (f[j] <= from ? 0 : w[j]) : f[j] > from && f[j] <= to ? w[j] : 0;  // NaN is far
        some |= chosen[j] != 0;
      }
    if (!some) continue;
    if (kind == 0)
      pull_rows<NearCosh>(chosen, dist, wr, wk, x, y, ld, n, out, rows, a);
    else if (kind == 1)
      pull_rows<WideCosh>(chosen, dist, wr, wk, x, y, ld, n, out, rows, a);
    else
      pull_rows<FarCosh>(chosen, dist, wr, wk, x, y, ld, n, out, rows, a);
  }
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
  vf sums = {};
  if (a.p == 3)
    sums = key_totals<Cube, COUNT>(q, a.d, read, a);
  else if (a.p == 4)
    sums = key_totals<Fourth, COUNT>(q, a.d, read, a);
  else if (a.p != INF)
    sums = key_totals<Power, COUNT>(q, a.d, read, a);
  else {
    sums = key_totals<NearCosh, COUNT>(q, a.d, read, a);
    vi wide = above(sums, NEAR);
    if (any(wide)) sums = where(wide, key_totals<WideCosh, COUNT>(q, a.d, read, a), sums);
  }
  vf f = near_distance(sums, a);
  for (int j = 0; j < COUNT; j++) {
    if (!(sums[j] <= (a.p == INF ? WIDE : LARGEST))) {
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
