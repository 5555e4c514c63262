"""C++ source of retrieval attention on the CPU: search, then exact attention to the blocks found and the far field."""

from .kernel_cpp_blocks import BLOCKS
from .kernel_cpp_panels import PANELS
from .kernel_cpp_tiles import TILES

SOURCE = (
    TILES
    + PANELS
    + BLOCKS
    + r"""
// Keys stand in blocks of `block` from key first[b] on. mean, scale, code, real: see `Codes`, of `groups` panels.
// far_key, far_bias, far_value: see `Summaries`, of `far_groups` panels, values of vp numbers; or null.
// whole, off, step: queries as whole numbers (B, H, N, dq), 8 times their sum, and what one of them is worth.
struct Retrieve {
  const float *q, *coef, *soft, *mean, *scale, *off, *step, *far_key, *far_bias, *far_value;
  const void *k, *v;
  const uint8_t *code, *real, *keep;
  const int8_t* whole;
  const int64_t *first, *budget;
  float *o, *panels;
  int64_t *read;  // of every query how many keys it reads, or null
  long B, H, G, N, M, d, dp, dq, dv_, vp, causal, window, sinks, block, groups, far_groups, most, half, kind, threads;
  long k_stride[3], v_stride[3];
  float p, least;
};
template <class Metric, class T>
struct Unit {
  typedef typename T::type type;
  const Retrieve& a;
  long blocks, around, parts, tops, beyond, ld;  // a row of s: `beyond` summaries, then keys
  std::unique_ptr<float, void (*)(void*)> memory;
  float *q, *s, *o, *work, *most, *room, *rank, *near_keys, *far_keys, *values, *sums, *off, *step;
  std::unique_ptr<const float*[]> panel;
  std::unique_ptr<const type*[]> runs;
  std::unique_ptr<const uint8_t*[]> keeps;
  std::unique_ptr<int8_t[]> whole;
  std::unique_ptr<long[]> lengths, chosen;
  std::unique_ptr<int32_t[]> places;

  Unit(const Retrieve& a) : a(a), memory(nullptr, free) {
    blocks = (a.M + a.block - 1) / a.block, parts = a.block / P16;
    around = a.window ? (a.window - 1 + a.block - 1) / a.block : 0;
    tops = (blocks + P16 - 1) / P16 * P16;
    long near = ((a.window ? 2 * around + 1 : 0) + a.sinks) * parts, far = a.most * parts;
    long rows = std::min(a.block, a.N) * a.G;
    beyond = a.far_key ? tops : 0;
    ld = beyond + (near + far) * P16;
    long kept = a.panels ? 0 : a.d * P16, looks = is_dot<Metric> ? 0 : rows * a.block * P16;
    long sizes[] = {rows * a.dp,  rows * ld,  rows * a.vp,       std::max(a.G * tops, looks), tops, tops, rows * tops,
                    near * kept, std::max(far, P16 * parts) * kept, near * P16 * a.vp, rows, rows, rows};
    float** starts[] = {&q, &s, &o, &work, &most, &room, &rank, &near_keys, &far_keys, &values, &sums, &off, &step};
    size_t all = 0;
    for (long size : sizes) all += (size + 31) / 16 * 16;
    memory = buffer(all);
    float* at = memory.get();
    for (int i = 0; i < 13; i++) *starts[i] = at, at += (sizes[i] + 31) / 16 * 16;
    long list = std::max(std::max(std::max(near, far), P16 * parts), tops / P16) + 1;
    panel.reset(new const float*[list]);
    runs.reset(new const type*[list]);
    keeps.reset(new const uint8_t*[list]);
    lengths.reset(new long[list]);
    chosen.reset(new long[std::max(near, far) + a.sinks + 1]);
    places.reset(new int32_t[tops + 1]);
    whole.reset(new int8_t[rows * a.dq + 1]);
  }
  const float* soft(long h0) const { return a.soft ? a.soft + h0 : nullptr; }
  const type* key(long b, long kh, long j) const {
    return (const type*)a.k + b * a.k_stride[0] + kh * a.k_stride[1] + (a.first[b] + j) * a.k_stride[2];
  }
  const type* value(long b, long kh, long j) const {
    return (const type*)a.v + b * a.v_stride[0] + kh * a.v_stride[1] + (a.first[b] + j) * a.v_stride[2];
  }
  long length(long b) const { return a.M - a.first[b]; }  // keys from `first` on
  void pack16(long b, long kh, long j, float* to) const {
    long n = std::max(0L, std::min(P16, length(b) - j));
    if (n < P16) memset(to, 0, 4 * P16 * a.d);
    for (long x = 0; x < n; x++) {
      const type* from = key(b, kh, j + x);
      for (long c = 0; c < a.d; c++) to[c * P16 + x] = T::one(from[c]);
    }
  }
  const float* panel_of(long b, long kh, long number, float* room) const {
    if (a.panels) return a.panels + ((b * (a.H / a.G) + kh) * blocks * parts + number) * a.d * P16;
    pack16(b, kh, number * P16, room);
    return room;
  }
  // rank[rows, blocks] of blocks below `end`: their largest logits, by the codes or by the keys themselves.
  void look(long b, long kh, long rows, long end) {
    long bk = b * (a.H / a.G) + kh, h0 = kh * a.G;
    for (long x = 0; x * P16 < end; x++) {
      float* out = rank + x * P16;
      if constexpr (is_dot<Metric>) {
        panel[0] = a.mean + (bk * a.groups + x) * a.d * P16;
        logits<Metric>(q, a.dp, rows, panel.get(), 1, a.d, out, tops, a.coef + h0, soft(h0), a.G, a.p);
        const uint8_t* code = a.code + (bk * a.groups + x) * a.block * (a.dq / 8) * 64;
        const float* scale = a.scale + (bk * a.groups + x) * a.block * P16;
        long r = 0;
        for (; r + CODE_ROWS <= rows; r += CODE_ROWS) codes<CODE_ROWS>(r, code, scale, out);
        for (; r < rows; r++) codes<1>(r, code, scale, out);
      } else {
        long count = std::min(P16, end - x * P16) * parts, width = count * P16;
        for (long y = 0; y < count; y++) panel[y] = panel_of(b, kh, x * P16 * parts + y, far_keys + y * a.d * P16);
        logits<Metric>(q, a.dp, rows, panel.get(), count, a.d, work, width, a.coef + h0, soft(h0), a.G, a.p);
        for (long r = 0; r < rows; r++)
          for (long y = 0; y < width; y++) {
            long j = x * P16 * a.block + y, block = y / a.block;
            bool real = j < length(b) && (!a.keep || a.keep[b * a.M + a.first[b] + j]);
            float value = real ? work[r * width + y] : -INF, *to = out + r * tops + block;
            *to = y % a.block == 0 ? value : std::max(*to, value);
          }
      }
    }
  }
  template <int R>
  void codes(long r, const uint8_t* code, const float* scale, float* out) {
    code_rows<R>(whole.get() + r * a.dq, a.dq, off + r, step + r, code, scale, a.block, out + r * tops, tops);
  }
  // Logits of the summaries of blocks below `end`, for `positions` queries, to the end of each row's place for them;
  // -INF for what the window of blocks lo .. hi - 1 and the sinks show already. Returns how many there are.
  long look_beyond(long b, long kh, long positions, long end, long lo, long hi) {
    long n = (end + P16 - 1) / P16 * P16, G = a.G;
    for (long g = 0; g < G; g++) {
      long head = b * a.H + kh * G + g;
      float* out = s + g * ld + beyond - n;
      for (long x = 0; x * P16 < n; x++) panel[x] = a.far_key + (head * a.far_groups + x) * a.d * P16;
      logits<Metric>(q + g * a.dp, G * a.dp, positions, panel.get(), n / P16, a.d, out, G * ld, a.coef + kh * G + g,
                     soft(kh * G + g), 1, a.p);
      const float* bias = a.far_bias + head * a.far_groups * P16;
      for (long i = 0; i < positions; i++) {
        float* row = out + i * G * ld;
        for (long x = 0; x < n; x += W) store(row + x, load(row + x) + load(bias + x));
        for (long x = 0; x < std::min(a.sinks, n); x++) row[x] = -INF;
        for (long x = lo; x < std::min(hi, n); x++) row[x] = -INF;
        for (long x = end; x < n; x++) row[x] = -INF;
      }
    }
    return n;
  }
  // Chooses the blocks of one position, whose near window is blocks lo .. hi - 1, by its G rows; near: the logits of
  // the `seen` keys of sinks and window. Returns how many.
  long choose(long b, long kh, const float* rows, const float* near, long seen, long lo, long hi) {
    long end = a.causal ? lo : blocks, n = (end + P16 - 1) / P16 * P16;
    auto hide = [&](float* row) {
      for (long x = 0; x < std::min(a.sinks, n); x++) row[x] = -INF;
      for (long x = end; x < n; x++) row[x] = -INF;
      for (long x = lo; !a.causal && x < hi; x++) row[x] = -INF;
      for (long x = 0; a.keep && x < end; x++)
        if (is_dot<Metric> ? !a.real[b * a.groups * P16 + x] : rows[x] == -INF) row[x] = -INF;
    };
    for (long g = 0; g < a.G; g++) {
      memcpy(work + g * tops, rows + g * tops, 4 * n);
      hide(work + g * tops);
    }
    bool shares = a.G > 1 || a.least > 0;
    if (shares) {
      chances(work, tops, a.G, n, most, near, ld, a.least > 0 ? seen : 0);
      hide(most);  // what underflowed may still be chosen
      for (long x = 0; a.least > 0 && x < n; x += W) {
        vf share = load(most + x);
        store(most + x, where(share < a.least, splat(-INF), share));
      }
    }
    return largest_k(shares ? most : work, n, a.budget[kh], chosen.get(), room, places.get());
  }
  // Copies the blocks that all queries of block c see: panels of keys in `panel`, values in `values`. Returns how many.
  long take_near(long b, long kh, const long* near, long count) {
    long fixed = 0;
    for (long x = 0; x < count; x++)
      for (long y = 0; y < parts; y++, fixed++) {
        long number = near[x] * parts + y, n = std::max(0L, std::min(P16, length(b) - number * P16));
        panel[fixed] = panel_of(b, kh, number, near_keys + fixed * a.d * P16);
        memset(values + fixed * P16 * a.vp, 0, 4 * P16 * a.vp);
        for (long j = 0; j < n; j++) {
          if (a.keep && !a.keep[b * a.M + a.first[b] + number * P16 + j]) continue;
          const type* from = value(b, kh, number * P16 + j);
          for (long z = 0; z < a.dv_; z++) values[(fixed * P16 + j) * a.vp + z] = T::one(from[z]);
        }
      }
    return fixed;
  }
  // -INF for keys past the last, for padding, and for what comes after a query; rows of positions from r0 on.
  void mask(long b, long number, float* at, long rows, long r0) {
    long j = number * P16, n = std::max(0L, std::min(P16, length(b) - j));
    const uint8_t* keep = a.keep ? a.keep + b * a.M + a.first[b] + j : nullptr;
    for (long r = 0; r < rows; r++) {
      long last = a.causal ? std::min(n, r0 + r / a.G - j + 1) : n;
      for (long x = 0; x < P16; x++)
        if (x >= last || (keep && !keep[x])) at[r * ld + x] = -INF;
    }
  }
  void weigh(float* row, long n, float* sum) {
    float top = largest_in(row, n);
    if (top == -INF) top = 0;  // nothing to see: all weights are exp(-inf)
    vf all = {};
    for (long j = 0; j < n; j += W) {
      vf w = expv(load(row + j) - top);
      store(row + j, w);
      all += w;
    }
    *sum = ::total(all);
  }
  // The queries of block c of one key head.
  void run(long b, long kh, long c) {
    long first = a.window ? a.first[b] : 0, before = a.causal ? a.M - a.N : 0, G = a.G, h0 = kh * G;
    long key_heads = a.H / G;
    long from = std::max(c * a.block, before - first), to = std::min((c + 1) * a.block, before + a.N - first);
    long positions = to - from, rows = positions * G, lo = 0, hi = 0, seen = 0, far = 0;
    if (positions <= 0) return;
    for (long r = 0; r < rows; r++)
      memcpy(q + r * a.dp, a.q + ((b * a.H + h0 + r % G) * a.N + from + r / G + first - before) * a.dp, 4 * a.dp);
    if (a.window) {
      lo = std::max(0L, c - around), hi = a.causal ? c + 1 : std::min(blocks, c + around + 1);
      long count = 0;
      for (long x = 0; x < a.sinks && x < blocks; x++)
        if (x < lo || x >= hi) chosen[count++] = x;
      if (a.causal) count = std::min(count, lo);
      for (long x = lo; x < hi; x++) chosen[count++] = x;
      long fixed = take_near(b, kh, chosen.get(), count);
      seen = fixed * P16;
      float* to = s + beyond;
      logits<Metric>(q, a.dp, rows, panel.get(), fixed, a.d, to, ld, a.coef + h0, soft(h0), G, a.p);
      for (long x = 0; x < fixed; x++) mask(b, chosen[x / parts] * parts + x % parts, to + x * P16, rows, from);
    }
    if (beyond && (!a.causal || lo > a.sinks)) far = look_beyond(b, kh, positions, a.causal ? lo : blocks, lo, hi);
    bool searches = a.most > 0 && (!a.causal || lo > a.sinks);
    if (searches) {
      for (long r = 0; is_dot<Metric> && r < rows; r++) {
        long number = (b * a.H + h0 + r % G) * a.N + from + r / G + first - before;
        memcpy(whole.get() + r * a.dq, a.whole + number * a.dq, a.dq);
        off[r] = a.off[number], step[r] = a.step[number];
      }
      look(b, kh, rows, a.causal ? lo : blocks);
    }
    memset(o, 0, 4 * rows * a.vp);
    for (long i = 0; i < positions; i++) {
      float *mine = s + i * G * ld + beyond, *own = q + i * G * a.dp;
      long count = searches ? choose(b, kh, rank + i * G * tops, mine, seen, lo, hi) : 0, n = count * parts;
      if (a.read) a.read[(b * key_heads + kh) * a.N + from + i + first - before] = seen + n * P16;
      for (long x = 0; far && x < count; x++)
        for (long g = 0; g < G; g++) mine[g * ld - far + chosen[x]] = -INF;
      for (long x = 0; x < n; x++) {
        long number = chosen[x / parts] * parts + x % parts;
        panel[x] = panel_of(b, kh, number, far_keys + x * a.d * P16);
        runs[x] = value(b, kh, number * P16);
        keeps[x] = a.keep ? a.keep + b * a.M + a.first[b] + number * P16 : nullptr;
        lengths[x] = std::max(0L, std::min(P16, length(b) - number * P16));
      }
      for (long x = 0; x < n; x++)  // the beginning: the rest follows by itself
        for (long z = 0; z < 16; z++) {
          __builtin_prefetch(panel[x] + z * 16);
          __builtin_prefetch(runs[x] + z * a.v_stride[2]);
        }
      logits<Metric>(own, a.dp, G, panel.get(), n, a.d, mine + seen, ld, a.coef + h0, soft(h0), G, a.p);
      for (long x = 0; x < n; x++)
        for (long z = 0; (keeps[x] || lengths[x] < P16) && z < P16; z++)
          for (long g = 0; g < G; g++)
            if (z >= lengths[x] || (keeps[x] && !keeps[x][z])) mine[g * ld + seen + x * P16 + z] = -INF;
      for (long g = 0; g < G; g++) weigh(mine + g * ld - far, far + seen + n * P16, sums + i * G + g);
      far_values(mine + seen, n, o + i * G * a.vp);
    }
    if (seen) multiply_rows<true>(s + beyond, ld, 1, values, a.vp, seen, o, a.vp, rows, a.vp);
    for (long g = 0; far && g < G; g++) {
      const float* middle = a.far_value + (b * a.H + h0 + g) * a.far_groups * P16 * a.vp;
      multiply_rows<true>(s + g * ld + beyond - far, G * ld, 1, middle, a.vp, far, o + g * a.vp, G * a.vp, positions,
                          a.vp);
    }
    for (long r = 0; r < rows; r++) {
      float* out = a.o + ((b * a.H + h0 + r % G) * a.N + from + r / G + first - before) * a.vp;
      float by = sums[r] == 0 ? INF : sums[r];
      for (long z = 0; z < a.vp; z += W) store(out + z, load(o + r * a.vp + z) / by);
    }
  }
  void far_values(const float* w, long n, float* out) {
    if (!n) return;
    long g = 0, width = a.dv_ / W * W, stride = a.v_stride[2];
    for (; g + 4 <= a.G; g += 4) rows_of<4>(w, g, n, width, stride, out);
    if (a.G - g == 3) rows_of<3>(w, g, n, width, stride, out);
    if (a.G - g == 2) rows_of<2>(w, g, n, width, stride, out);
    if (a.G - g == 1) rows_of<1>(w, g, n, width, stride, out);
    for (long z = width; z < a.dv_; z++)  // sizes that fill no vector
      for (g = 0; g < a.G; g++)
        for (long x = 0; x < n; x++)
          for (long j = 0; j < lengths[x]; j++)
            if (!keeps[x] || keeps[x][j])
              out[g * a.vp + z] += w[g * ld + x * P16 + j] * T::one(runs[x][j * stride + z]);
  }
  template <int R>
  void rows_of(const float* w, long g, long n, long width, long stride, float* out) {
    weighted_rows<T, R>(w + g * ld, ld, runs.get(), keeps.get(), lengths.get(), n, stride, width, out + g * a.vp, a.vp);
  }
};
template <class Metric, class T>
static int retrieve(const Retrieve& a) {
  long key_heads = a.H / a.G, blocks = (a.M + a.block - 1) / a.block, parts = a.block / P16;
  long units = a.window ? blocks : (a.N + a.block - 1) / a.block, lowest = 0;
  if (a.window && a.causal)  // of a step the last block alone has a query
    lowest = std::max(0L, a.M - a.N - *std::max_element(a.first, a.first + a.B)) / a.block;
  int failed = 0;
#pragma omp parallel num_threads(a.threads)
  {
    Unit<Metric, T> unit(a);
    if (!unit.memory) failed = 1;
#pragma omp barrier
    if (!failed) {
      if (a.panels) {
#pragma omp for schedule(dynamic, 8) collapse(2)
        for (long bk = 0; bk < a.B * key_heads; bk++)
          for (long x = 0; x < blocks * parts; x++)
            unit.pack16(bk / key_heads, bk % key_heads, x * P16, a.panels + (bk * blocks * parts + x) * a.d * P16);
      }
#pragma omp for schedule(dynamic) collapse(2)
      for (long bk = 0; bk < a.B * key_heads; bk++)  // one after the other: what a head reads stays in the cache
        for (long x = 0; x < units - lowest; x++)    // causal: those with the most to search first
          unit.run(bk / key_heads, bk % key_heads, units - 1 - x);
    }
  }
  return failed;
}
template <class Metric>
static int retrieve_as(const Retrieve& a) {
  return a.half ? retrieve<Metric, BF16>(a) : retrieve<Metric, F32>(a);
}
extern "C" int retrieval_forward(const Retrieve* a) {
  switch ((int)a->kind) {
    case 0: return retrieve_as<L1>(*a);
    case 1: return retrieve_as<Sq>(*a);
    case 2: return retrieve_as<L2>(*a);
    case 3: return retrieve_as<L3>(*a);
    case 5: return retrieve_as<Linf>(*a);
    case 8: return retrieve_as<SoftL1>(*a);
    case 9: return retrieve_as<SoftL2>(*a);
    default: return retrieve_as<Dot>(*a);
  }
}
"""
)
