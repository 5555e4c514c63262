"""C++ source of the CPU kernels: gradients, with every tile of weights recomputed from the log-sum-exp."""

BACKWARD = r"""
// Gradients of capped logits to those of logits, in place; returns Σ gradient·distance and adds Σ gradient to dshift.
static float through_cap(float* gradient, const float* slope, const float* dist, long n, float* dshift) {
  vf sum = {}, by_distance = {};
  for (long j = 0; j < n; j += W) {
    vf ds = load(gradient + j) * load(slope + j);
    store(gradient + j, ds);
    sum += ds;
    by_distance += where(ds != 0, ds * load(dist + j), vf{});
  }
  *dshift += total(sum);
  return total(by_distance);
}
// dq, and per split dk, dv, dcoef (the derivative by λ·scaling) and dbias. A unit of work owns the rows of bias it
// adds to: axes that bias is broadcast over are walked inside the unit.
template <class Metric>
INLINE void pull(const Problem& a, long h, const float* w, const float* dist, const float* f, long wr, long wk,
                 const float* x, const float* y, long n, float* out, long rows) {
  if constexpr (Metric::soft)
    soft_pull(w, dist, f, wr, wk, x, y, a.dp, n, out, rows, a.softness(h));
  else if constexpr (Metric::product)
    multiply_rows<true>(w, wr, wk, y, a.dp, n, out, a.dp, rows, a.dp);
  else
    pull_rows<Metric>(w, dist, wr, wk, x, y, a.dp, n, out, rows, a.parameter(h));
}
// Moves the weights of pairs that are far (see `square_sums`) from w to others, both (rows, BK), else 0.
static void take_far(float* w, float* others, const vi* far, long rows, long n) {
  for (long i = 0; i < rows * BK; i += BK)
    for (long j = i; j < i + n; j += W) {
      vf x = load(w + j);
      store(w + j, where(far[j / W], vf{}, x));
      store(others + j, where(far[j / W], x, vf{}));
    }
}
// Σ w·(q - k) without differences: dq -= Σ_j w·k_j, row_weights += Σ_j w, of which dq lacks the multiples of q; and
// dk_j += Σ_i w·k_j - Σ_i w·q_i. Changes the sign of w.
static void pull_by_products(float* w, const float* q, const float* k, long ld, long rows, long n, float* row_weights,
                             float* dq, float* dk) {
  vf columns[BK / W] = {};
  for (long i = 0; i < rows; i++) {
    vf sum = {};
    for (long j = 0; j < n; j += W) {
      vf x = load(w + i * BK + j);
      sum += x;
      columns[j / W] += x;
      store(w + i * BK + j, -x);
    }
    row_weights[i] += total(sum);
  }
  multiply_rows<true>(w, BK, 1, k, ld, n, dq, ld, rows, ld);
  multiply_rows<true>(w, 1, BK, q, ld, rows, dk, ld, n, ld);
  for (long j = 0; j < n; j++)
    for (long c = 0; c < ld; c += W)
      store(dk + j * ld + c, load(dk + j * ld + c) + columns[j / W][j % W] * load(k + j * ld + c));
}
template <class Metric>
static void backward(const Problem& a) {
  long tiles = (a.N + BQ - 1) / BQ, mpanels = (a.M + PANEL - 1) / PANEL, key_heads = a.H / a.G;
  long own_b = a.dbias && !a.bias_stride[0] ? 1 : a.B, own_h = a.dbias && !a.bias_stride[1] ? 1 : key_heads;
  long per_b = a.B / own_b, per_h = key_heads / own_h;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BQ * (2 * a.dp + 2 * a.vp + 6 * BK + 4));
    float *q = memory.get(), *dq = q + BQ * a.dp, *g = dq + BQ * a.dp, *w = g + BQ * a.vp + BQ * a.vp,
          *dist = w + BQ * BK;
    float *dp = dist + BQ * BK, *count = dp + BQ * BK, *slope = count + BQ * BK, *delta = slope + 2 * BQ * BK;
    float *norms = delta + BQ, *row_weights = norms + BQ;
    vi* far = (vi*)(slope + BQ * BK);
#pragma omp for schedule(dynamic)
    for (long unit = 0; unit < own_b * own_h * a.splits; unit++) {
      long split = unit % a.splits, ob = unit / a.splits / own_h, oh = unit / a.splits % own_h;
      for (long b = ob * per_b; b < (ob + 1) * per_b; b++)
        for (long kh = oh * per_h; kh < (oh + 1) * per_h; kh++)
          for (long h = kh * a.G; h < (kh + 1) * a.G; h++) {
            long bh = b * a.H + h, bk = b * key_heads + kh, sbk = (split * a.B * key_heads + bk) * a.M;
            double dcoef = 0;
            float p = a.parameter(h);
            for (long tile = split; tile < tiles; tile += a.splits) {
              long i0 = tile * BQ, rows = std::min<long>(BQ, a.N - i0), padded = (rows + RP - 1) / RP * RP;
              load_queries(a, bh, i0, rows, q, norms);
              memset(row_weights, 0, 4 * BQ);
              memcpy(g, a.dout + (bh * a.N + i0) * a.vp, 4 * rows * a.vp);
              memset(dq, 0, 4 * BQ * a.dp);
              for (long i = 0; i < rows; i++) {
                vf sum = {};
                for (long c = 0; c < a.vp; c += W)
                  sum += load(g + i * a.vp + c) * load(a.out + (bh * a.N + i0 + i) * a.vp + c);
                delta[i] = total(sum);
              }
              long last = a.causal ? std::min(a.M, i0 + rows) : a.M;
              for (long j0 = 0; j0 < last; j0 += BK) {
                long n = std::min<long>(BK, last - j0);
                const float* panels = a.kpanels + (bk * mpanels + j0 / PANEL) * a.d * PANEL;
                bool some_far = tile_sums<Metric>(a, q, norms, bk, j0, padded, n, w, far, h);
                if (Metric::ties)
                  for (long c = 0; c < n; c += PANEL)
                    for (long r = 0; r < padded; r += RG)
                      count_ties(q + r * a.dp, a.dp, panels + c * a.d, a.d, w + r * BK + c, count + r * BK + c, BK);
                for (long c = 0; c < n; c += PANEL)
                  multiply_rows<false>(g, a.vp, 1, a.vpanels + (bk * mpanels + (j0 + c) / PANEL) * a.dv_ * PANEL,
                                       PANEL, a.dv_, dp + c, BK, rows, PANEL);
                for (long i = 0; i < rows; i++) {
                  float *weight = w + i * BK, *distance = dist + i * BK, *gradient = dp + i * BK,
                        lse = a.lse[bh * a.N + i0 + i];
                  row_logits<Metric>(a, weight, distance, slope + i * BK, b, h, i0 + i, j0, n, a.coef[h]);
                  vf sum = {};
                  for (long j = 0; j < n; j += W) {
                    vf x = expn(load(weight + j) - lse);
                    vf ds = where(x != 0, x * (load(gradient + j) - delta[i]), vf{}), by = load(distance + j);
                    sum += where(x != 0, ds * by, vf{});
                    store(weight + j, x);
                    store(gradient + j, ds);
                  }
                  float of_coef = total(sum);
                  if (a.dbias) {
                    float* db = a.dbias + b * a.bias_stride[0] + h * a.bias_stride[1] + (i0 + i) * a.bias_stride[2] +
                                j0 * a.bias_stride[3];
                    for (long j = 0; j < n; j++) db[j * a.bias_stride[3]] += gradient[j];
                  }
                  if (a.cap)
                    of_coef = through_cap(gradient, slope + i * BK, distance, n, a.dshift + bh * a.N + i0 + i);
                  dcoef -= of_coef;
                  for (long j = 0; j < n; j += W) {
                    vf by_distance = -a.coef[h] * load(gradient + j);
                    if constexpr (Metric::soft)
                      store(gradient + j, soft_weight(by_distance, distance + j, count + i * BK + j, q + i * a.dp,
                                                      panels + j / PANEL * PANEL * a.d + j % PANEL, a.softness(h)));
                    else
                      store(gradient + j,
                            Metric::weight(by_distance, load((Metric::ties ? count + i * BK : distance) + j), p));
                  }
                }
                const float* k = a.k + (bk * a.M + j0) * a.dp;
                multiply_rows<true>(w, 1, BK, g, a.vp, rows, a.dv + (sbk + j0) * a.vp, a.vp, n, a.vp);
                float* dk = a.dk + (sbk + j0) * a.dp;
                if constexpr (Metric::squares) {
                  if (some_far) take_far(dp, count, far, rows, n);
                  pull_by_products(dp, q, k, a.dp, rows, n, row_weights, dq, dk);
                  if (!some_far) continue;
                  std::swap(dp, count);
                }
                pull<Metric>(a, h, dp, dist, count, BK, 1, q, k, n, dq, rows);
                pull<Metric>(a, h, dp, dist, count, 1, BK, k, q, rows, dk, n);
                if constexpr (Metric::squares) std::swap(dp, count);
              }
              if constexpr (Metric::squares)
                for (long i = 0; i < rows; i++)
                  for (long c = 0; c < a.dp; c += W)
                    store(dq + i * a.dp + c, load(dq + i * a.dp + c) + row_weights[i] * load(q + i * a.dp + c));
              memcpy(a.dq + (bh * a.N + i0) * a.dp, dq, 4 * rows * a.dp);
            }
            a.dcoef[split * a.B * a.H + bh] = dcoef;
          }
    }
  }
}
template <class Metric>
static void pairwise_backward(const Problem& a) {  // dout is the gradient of the distances, out the distances; G = 1
  long tiles = (a.N + BQ - 1) / BQ, mpanels = (a.M + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(a.threads)
  {
    auto memory = buffer(BQ * (a.dp + 3 * BK));
    float *q = memory.get(), *w = q + BQ * a.dp, *dist = w + BQ * BK, *count = dist + BQ * BK;
#pragma omp for schedule(dynamic)
    for (long bh = 0; bh < a.B * a.H; bh++)
      for (long tile = 0; tile < tiles; tile++) {
        long i0 = tile * BQ, rows = std::min<long>(BQ, a.N - i0), padded = (rows + RP - 1) / RP * RP;
        memcpy(q, a.q + (bh * a.N + i0) * a.dp, 4 * rows * a.dp);
        memset(q + rows * a.dp, 0, 4 * (padded - rows) * a.dp);
        memset(a.dq + (bh * a.N + i0) * a.dp, 0, 4 * rows * a.dp);
        for (long j0 = 0; j0 < a.M; j0 += BK) {
          long n = std::min<long>(BK, a.M - j0);
          memset(w, 0, 4 * 2 * BQ * BK);
          for (long i = 0; i < rows; i++) {
            memcpy(w + i * BK, a.dout + (bh * a.N + i0 + i) * a.M + j0, 4 * n);
            memcpy(dist + i * BK, a.out + (bh * a.N + i0 + i) * a.M + j0, 4 * n);
          }
          if (Metric::ties)
            for (long c = 0; c < n; c += PANEL)
              for (long r = 0; r < padded; r += RG)
                count_ties(q + r * a.dp, a.dp, a.kpanels + (bh * mpanels + (j0 + c) / PANEL) * a.d * PANEL, a.d,
                           dist + r * BK + c, count + r * BK + c, BK);
          if constexpr (Metric::soft) {
            const float* panels = a.kpanels + (bh * mpanels + j0 / PANEL) * a.d * PANEL;
            Softness soft = a.softness(bh);
            for (long i = 0; i < rows; i++)
              for (long j = 0; j < n; j += W)
                store(w + i * BK + j,
                      soft_weight(load(w + i * BK + j), dist + i * BK + j, count + i * BK + j, q + i * a.dp,
                                  panels + j / PANEL * PANEL * a.d + j % PANEL, soft));
          } else {
            for (long i = 0; i < rows; i++)
              for (long j = i * BK; j < i * BK + n; j += W)
                store(w + j, Metric::weight(load(w + j), load((Metric::ties ? count : dist) + j), a.p));
          }
          const float* k = a.k + (bh * a.M + j0) * a.dp;
          pull<Metric>(a, bh, w, dist, count, BK, 1, q, k, n, a.dq + (bh * a.N + i0) * a.dp, rows);
          pull<Metric>(a, bh, w, dist, count, 1, BK, k, q, rows, a.dk + (bh * a.M + j0) * a.dp, n);
        }
      }
  }
}
extern "C" int attention_backward(const Problem* a, int kind) {
  switch (kind) {
    case 0: backward<L1>(*a); break;
    case 1: backward<Sq>(*a); break;
    case 2: backward<L2>(*a); break;
    case 3: backward<L3>(*a); break;
    case 4: backward<Lp>(*a); break;
    case 5: backward<Linf>(*a); break;
    case 7: backward<Dot>(*a); break;
    case 8: backward<SoftL1>(*a); break;
    case 9: backward<SoftL2>(*a); break;
    case 10: backward<Soft>(*a); break;
    default: return 1;
  }
  return 0;
}
extern "C" int distance_backward(const Problem* a, int kind) {
  switch (kind) {
    case 0: pairwise_backward<L1>(*a); break;
    case 1: pairwise_backward<Sq>(*a); break;
    case 2: pairwise_backward<L2>(*a); break;
    case 3: pairwise_backward<L3>(*a); break;
    case 4: pairwise_backward<Lp>(*a); break;
    case 5: pairwise_backward<Linf>(*a); break;
    case 8: pairwise_backward<SoftL1>(*a); break;
    case 10: pairwise_backward<Soft>(*a); break;
    default: return 1;
  }
  return 0;
}
"""
