"""C++ source of retrieval attention on the CPU: search, then exact attention to the blocks found and the far field."""

from .kernel_cpp_blocks import BLOCKS
from .kernel_cpp_codes import CODES
from .kernel_cpp_panels import PANELS
from .kernel_cpp_tiles import TILES

SOURCE = (
    TILES
    + PANELS
    + CODES
    + BLOCKS
    + r"""
template <class Metric, class T>
struct Unit : Keys<T> {
  typedef typename T::type type;
  using Keys<T>::a, Keys<T>::blocks, Keys<T>::parts, Keys<T>::key, Keys<T>::value, Keys<T>::length, Keys<T>::at_place;
  using Keys<T>::is_real, Keys<T>::all_real, Keys<T>::panel_of, Keys<T>::near_panel, Keys<T>::near_values;
  using Keys<T>::find_values, Keys<T>::copy;
  long around, tops, beyond, ld;  // a row of s: `beyond` summaries, then keys
  std::unique_ptr<float, void (*)(void*)> memory;
  float *q, *s, *o, *work, *most, *room, *rank, *hope, *near_keys, *far_keys, *values, *sums, *off, *step;
  float *top, *sum, *closer;
  std::unique_ptr<const float*[]> panel;
  std::unique_ptr<const void*[]> value_rows;
  std::unique_ptr<int8_t[]> whole, squares;
  // near: the blocks that all queries at hand see; stored: which panel of blocks is the x-th for them.
  std::unique_ptr<long[]> chosen, best, near, stored;
  std::unique_ptr<int32_t[]> places;

  Unit(const Retrieve& a) : Keys<T>(a), memory(nullptr, free) {
    around = a.window ? (a.window - 1 + a.block - 1) / a.block : 0;
    tops = (blocks + P16 - 1) / P16 * P16;
    // In an order of likeness the window goes on to the start of its unit.
    long near_blocks = (a.window ? 2 * around + 1 + (a.levels ? P16 : 0) : 0) + a.sinks;
    long few_near = near_blocks * parts, far = a.most * parts;
    long rows = std::min(a.block, a.N) * a.G;
    beyond = a.far_bias ? tops : 0;
    ld = beyond + (few_near + far) * P16;
    long kept = a.panels ? 0 : a.d * P16;
    long looks = is_dot<Metric> ? 0 : rows * a.block * P16;
    long few = (std::max(a.candidates, a.most) + P16) / P16 * P16;
    long sizes[] = {rows * a.dp, rows * ld, rows * a.vp, std::max(a.G * tops, looks), tops, 2 * tops + P16,
                    rows * tops, a.levels ? rows * tops : 0, few_near * kept,
                    std::max(far, P16 * parts) * kept, few_near * (a.panels ? 0 : P16 * a.vp), rows, rows, rows,
                    a.G, a.G, (a.G + 1) * few};
    float** starts[] = {&q, &s, &o, &work, &most, &room, &rank, &hope, &near_keys, &far_keys, &values,
                        &sums, &off, &step, &top, &sum, &closer};
    size_t all = 0;
    for (long size : sizes) all += (size + 31) / 16 * 16;
    memory = buffer(all);
    float* at = memory.get();
    for (int i = 0; i < 17; i++) *starts[i] = at, at += (sizes[i] + 31) / 16 * 16;
    long list = std::max(std::max(std::max(few_near, far), P16 * parts), tops / P16) + 1;
    panel.reset(new const float*[list]);
    value_rows.reset(new const void*[list * P16]);
    chosen.reset(new long[std::max(far, a.candidates) + 1]);
    near.reset(new long[near_blocks + 1]);
    best.reset(new long[a.most + 1]);
    stored.reset(new long[tops / P16 + 1]);
    for (long x = 0; x <= tops / P16; x++) stored[x] = x;
    places.reset(new int32_t[2 * tops + P16]);
    whole.reset(new int8_t[rows * a.dq + 1]);
    squares.reset(new int8_t[rows * a.dq + 1]);
  }
  const float* soft(long h0) const { return a.soft ? a.soft + h0 : nullptr; }
  // Where block x of those that the queries at hand may choose from is stored.
  long block_of(long x) const { return stored[x / P16] * P16 + x % P16; }
  // rank[rows, blocks] of blocks below `end`: their largest logits by their codes or, in an order of likeness, the
  // logits of their means; or those by the keys themselves.
  void look(long b, long kh, long rows, long end) {
    long bk = b * (a.H / a.G) + kh, h0 = kh * a.G;
    for (long x = 0; x * P16 < end; x++) {
      float* out = rank + x * P16;
      if constexpr (is_dot<Metric>) {
        panel[0] = a.mean + (bk * a.groups + stored[x]) * a.d * P16;
        logits<Metric>(q, a.dp, rows, panel.get(), 1, a.d, out, tops, a.coef + h0, soft(h0), a.G, a.p);
        for (long z = 0; !a.levels && z < P16; z++) look_closer(bk, x * P16 + z, 0, rows, out + z, tops);
        if (!a.levels) continue;
        float* above = hope + x * P16;
        long at = bk * a.groups + stored[x];
        byte_logits(squares.get(), a.dq, rows, a.variance + at * a.dq * P16, above, tops);
        for (long r = 0; r < rows; r++)
          for (long z = 0; z < P16; z += W) {
            float* to = above + r * tops + z;
            vf spread = sqrtv(load(to) * load(a.spread + at * P16 + z));
            store(to, load(out + r * tops + z) + a.spreads * SQUARE_STEP * step[r] * spread);
          }
      } else {
        long count = std::min(P16, end - x * P16) * parts, width = count * P16, from = stored[x] * P16 * parts;
        for (long y = 0; y < count; y++) panel[y] = panel_of(b, kh, from + y, far_keys + y * a.d * P16);
        logits<Metric>(q, a.dp, rows, panel.get(), count, a.d, work, width, a.coef + h0, soft(h0), a.G, a.p);
        for (long y = 0; y < width; y++) {
          bool real = is_real(b, at_place(b, kh, from * P16 + y));
          for (long r = 0; r < rows; r++) {
            float value = real ? work[r * width + y] : -INF, *to = out + r * tops + y / a.block;
            *to = y % a.block == 0 ? value : std::max(*to, value);
          }
        }
      }
    }
  }
  // Adds to the logit of a block's mean what its codes say of its best key, for `rows` rows from r on.
  void look_closer(long bk, long block, long r, long rows, float* out, long ldo) {
    const uint8_t* code = a.code + (bk * a.groups * P16 + block) * a.block * (a.dq / 2);
    const float* scale = a.scale + (bk * a.groups * P16 + block) * a.block;
    long x = 0;
    for (; x + CODE_ROWS <= rows; x += CODE_ROWS) codes<CODE_ROWS>(r + x, code, scale, out + x * ldo, ldo);
    for (; x + 4 <= rows; x += 4) codes<4>(r + x, code, scale, out + x * ldo, ldo);
    if (rows - x == 3) codes<3>(r + x, code, scale, out + x * ldo, ldo);
    if (rows - x == 2) codes<2>(r + x, code, scale, out + x * ldo, ldo);
    if (rows - x == 1) codes<1>(r + x, code, scale, out + x * ldo, ldo);
  }
  template <int R>
  void codes(long r, const uint8_t* code, const float* scale, float* out, long ldo) {
    code_rows<R>(whole.get() + r * a.dq, a.dq, off + r, step + r, code, scale, a.block, out, ldo);
  }
  long far_head(long b, long kh, long g) const { return (b * a.H + kh * a.G + g) / (a.H / a.far_heads); }
  // Logits of the summaries of blocks below `end`, for `positions` queries, to the end of each row's place for them;
  // -INF for what the window of blocks lo .. hi - 1 and the sinks show already. Returns how many there are.
  long look_beyond(long b, long kh, long positions, long end, long lo, long hi) {
    long n = (end + P16 - 1) / P16 * P16, G = a.G;
    for (long g = 0; g < G; g++) {
      long head = far_head(b, kh, g);
      float* out = s + g * ld + beyond - n;
      for (long x = 0; a.far_key && x * P16 < n; x++)
        panel[x] = a.far_key + (head * a.far_groups + stored[x]) * a.d * P16;
      if (a.far_key)
        logits<Metric>(q + g * a.dp, G * a.dp, positions, panel.get(), n / P16, a.d, out, G * ld, a.coef + kh * G + g,
                       soft(kh * G + g), 1, a.p);
      const float* bias = a.far_bias + head * a.far_groups * P16;
      for (long i = 0; i < positions; i++) {
        float* row = out + i * G * ld;
        const float* from = a.far_key ? row : rank + (i * G + g) * tops;
        for (long x = 0; x < n; x += W) store(row + x, load(from + x) + load(bias + block_of(x)));
        for (long x = 0; x < std::min(a.sinks, n); x++) row[x] = -INF;
        for (long x = lo; x < std::min(hi, n); x++) row[x] = -INF;
        for (long x = end; x < n; x++) row[x] = -INF;
      }
    }
    return n;
  }
  // Chooses the blocks of position i, whose near window is blocks lo .. hi - 1, by its G rows; near: the logits of the
  // `seen` keys of sinks and window. Returns how many.
  long choose(long b, long kh, long i, const float* near, long seen, long lo, long hi) {
    const float* rows = rank + i * a.G * tops;
    long end = a.causal ? lo : blocks, n = (end + P16 - 1) / P16 * P16;
    auto hide = [&](float* row) {
      for (long x = 0; x < std::min(a.sinks, n); x++) row[x] = -INF;
      for (long x = end; x < n; x++) row[x] = -INF;
      for (long x = lo; !a.causal && x < hi; x++) row[x] = -INF;
      for (long x = 0; a.keep && x < end; x++)
        if (is_dot<Metric> ? !a.real[b * a.groups * P16 + block_of(x)] : rows[x] == -INF) row[x] = -INF;
    };
    for (long g = 0; g < a.G; g++) {
      memcpy(work + g * tops, rows + g * tops, 4 * n);
      hide(work + g * tops);
    }
    // By logits, or by the largest share of a block in any row where there are several or shares matter.
    bool shares = a.G > 1 || a.least > 0;
    long beside = a.least > 0 ? seen : 0, looked = 0;
    if (shares) {
      chances(work, tops, a.G, n, most, near, ld, beside, top, sum, room);
      hide(most);  // what underflowed may still be chosen
    }
    float* by = shares ? most : work;
    bool by_means = a.levels && is_dot<Metric>;
    if (by_means) {
      std::fill(most, most + n, -INF);
      for (long g = 0; g < a.G; g++) {  // the logarithm of the share that its best key may have
        const float* above = hope + (i * a.G + g) * tops;
        float whole = !shares ? 0 : sum[g] > 0 ? top[g] + logf(sum[g]) : -INF;
        for (long x = 0; x < n; x += W) store(most + x, vmax(load(most + x), load(above + x) - whole));
      }
      hide(most);
      by = most;
      looked = largest_k(by, n, std::max(a.candidates, a.budget[kh]), chosen.get(), room, places.get());
      by = look_at(b * (a.H / a.G) + kh, i, looked, shares);
      n = (looked + P16 - 1) / P16 * P16;
    }
    for (long x = 0; a.least > 0 && x < n; x += W) {
      vf share = load(by + x);
      store(by + x, where(share < a.least, splat(-INF), share));
    }
    if (!by_means) return largest_k(by, n, a.budget[kh], chosen.get(), room, places.get());
    long count = largest_k(by, n, a.budget[kh], best.get(), room, places.get());
    for (long x = 0; x < count; x++) chosen[x] = chosen[best[x]];
    return count;
  }
  // What the codes of the `looked` blocks in `chosen` say of position i: their logits, or their largest shares, beside
  // blocks that were not looked at. Filled with -INF to whole vectors.
  float* look_at(long bk, long i, long looked, bool shares) {
    long n = (looked + P16 - 1) / P16 * P16;
    float *result = closer + a.G * n, *row = closer;
    std::fill(result, result + n, shares ? 0 : -INF);
    for (long g = 0; g < a.G; g++, row += n) {
      for (long x = 0; x < looked; x++) row[x] = work[g * tops + chosen[x]];
      for (long x = looked; x < n; x++) row[x] = -INF;
      vf gone = {};
      for (long x = 0; shares && x < n; x += W) gone += expv(load(row + x) - top[g]);
      sum[g] = std::max(0.0f, sum[g] - ::total(gone));
    }
    for (long x = 0; x < n; x += P16) {
      long numbers[P16];
      for (long z = 0; z < P16; z++) numbers[z] = bk * a.groups * P16 + block_of(chosen[std::min(x + z, looked - 1)]);
      look_at_codes(whole.get() + i * a.G * a.dq, a.dq, a.G, off + i * a.G, step + i * a.G, a.code, a.scale, a.block,
                    numbers, closer + x, n);
    }
    row = closer;
    for (long g = 0; g < a.G; g++, row += n) {
      if (!shares) return row;
      float before = top[g], now = std::max(before, largest_in(row, n));
      vf all = {};
      for (long x = 0; x < n; x += W) {
        vf w = expv(load(row + x) - now);
        store(row + x, w);
        all += w;
      }
      float whole = sum[g] * expf(before - now) + ::total(all), part = whole > 0 ? 1 / whole : 0;
      for (long x = 0; x < n; x += W) store(result + x, vmax(load(result + x), part * load(row + x)));
    }
    for (long x = looked; x < n; x++) result[x] = -INF;
    return result;
  }
  // Copies the blocks that all queries of block c see: panels of keys in `panel`, values in `values`. Returns how many.
  long take_near(long b, long kh, const long* near, long count) {
    long fixed = 0;
    for (long x = 0; x < count; x++)
      for (long y = 0; y < parts; y++, fixed++) {
        long number = near[x] * parts + y, n = std::max(0L, std::min(P16, length(b) - number * P16));
        panel[fixed] = near_panel(b, kh, number, near_keys + fixed * a.d * P16);
        if (a.panels) continue;
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
    long positions = to - from, rows = positions * G, lo = 0, hi = 0, seen = 0, far = 0, near_count = 0;
    if (positions <= 0) return;
    for (long r = 0; r < rows; r++)
      memcpy(q + r * a.dp, a.q + ((b * a.H + h0 + r % G) * a.N + from + r / G + first - before) * a.dp, 4 * a.dp);
    if (a.window) {
      lo = std::max(0L, c - around);
      if (a.levels) lo = lo / P16 * P16;
      for (long x = 0; a.levels && x < lo / P16; x++) {  // in the largest whole segment before the window
        long level = a.levels - 1;
        while (((x >> 2 * level) + 1) << 2 * level > lo / P16) level--;
        stored[x] = level * a.units + x;
      }
      hi = a.causal ? c + 1 : std::min(blocks, c + around + 1);
      for (long x = 0; x < a.sinks && x < blocks; x++)
        if (x < lo || x >= hi) near[near_count++] = x;
      if (a.causal) near_count = std::min(near_count, lo);
      for (long x = lo; x < hi; x++) near[near_count++] = x;
      long fixed = take_near(b, kh, near.get(), near_count);
      seen = fixed * P16;
      float* to = s + beyond;
      logits<Metric>(q, a.dp, rows, panel.get(), fixed, a.d, to, ld, a.coef + h0, soft(h0), G, a.p);
      for (long x = 0; x < fixed; x++) mask(b, near[x / parts] * parts + x % parts, to + x * P16, rows, from);
    }
    bool searches = a.most > 0 && (!a.causal || lo > a.sinks);
    if (searches) {
      for (long r = 0; is_dot<Metric> && r < rows; r++) {
        long number = (b * a.H + h0 + r % G) * a.N + from + r / G + first - before;
        memcpy(whole.get() + r * a.dq, a.whole + number * a.dq, a.dq);
        off[r] = a.off[number], step[r] = a.step[number];
      }
      for (long x = 0; a.levels && is_dot<Metric> && x < rows * a.dq; x++)
        squares[x] = (int8_t)nearbyintf((float)(whole[x] * whole[x]) * (LARGEST_BYTE / (63.0f * 63)));
      look(b, kh, rows, a.causal ? lo : blocks);
    }
    if (beyond && (!a.causal || lo > a.sinks)) far = look_beyond(b, kh, positions, a.causal ? lo : blocks, lo, hi);
    memset(o, 0, 4 * rows * a.vp);
    for (long i = 0; i < positions; i++) {
      float *mine = s + i * G * ld + beyond, *own = q + i * G * a.dp;
      long count = searches ? choose(b, kh, i, mine, seen, lo, hi) : 0, n = count * parts;
      if (a.read) a.read[(b * key_heads + kh) * a.N + from + i + first - before] = seen + n * P16;
      for (long x = 0; far && x < count; x++)
        for (long g = 0; g < G; g++) mine[g * ld - far + chosen[x]] = -INF;
      for (long x = 0; x < n; x++) {
        long number = block_of(chosen[x / parts]) * parts + x % parts;
        panel[x] = panel_of(b, kh, number, far_keys + x * a.d * P16);
        find_values(b, kh, number * P16, value_rows.get() + x * P16);
        for (long z = 0; z < 4; z++) {  // the beginning: the rest follows by itself
          __builtin_prefetch(panel[x] + z * 16);
          if (a.panels) __builtin_prefetch((const float*)value_rows[x * P16] + z * 16);
        }
      }
      logits<Metric>(own, a.dp, G, panel.get(), n, a.d, mine + seen, ld, a.coef + h0, soft(h0), G, a.p);
      for (long x = 0; !all_real() && x < n * P16; x++)
        for (long g = 0; !value_rows[x] && g < G; g++) mine[g * ld + seen + x] = -INF;
      for (long g = 0; g < G; g++) weigh(mine + g * ld - far, far + seen + n * P16, sums + i * G + g);
      far_values(mine + seen, n, o + i * G * a.vp);
    }
    if (!a.panels && seen) multiply_rows<true>(s + beyond, ld, 1, values, a.vp, seen, o, a.vp, rows, a.vp);
    for (long x = 0, y = 1; a.panels && x < near_count; x = y++) {  // as many blocks as stand one after another
      while (y < near_count && near[y] == near[y - 1] + 1) y++;
      multiply_rows<true>(s + beyond + x * a.block, ld, 1, near_values() + near[x] * a.block * a.vp, a.vp,
                          (y - x) * a.block, o, a.vp, rows, a.vp);
    }
    for (long g = 0; far && g < G; g++) {
      const float* middle = a.far_value + far_head(b, kh, g) * a.far_groups * P16 * a.vp;
      for (long x = 0, y = 1; x * P16 < far; x = y++) {  // as many as stand one after another
        while (y * P16 < far && stored[y] == stored[y - 1] + 1) y++;
        multiply_rows<true>(s + g * ld + beyond - far + x * P16, G * ld, 1, middle + stored[x] * P16 * a.vp, a.vp,
                            (y - x) * P16, o + g * a.vp, G * a.vp, positions, a.vp);
      }
    }
    for (long r = 0; r < rows; r++) {
      float* out = a.o + ((b * a.H + h0 + r % G) * a.N + from + r / G + first - before) * a.vp;
      float by = sums[r] == 0 ? INF : sums[r];
      for (long z = 0; z < a.vp; z += W) store(out + z, load(o + r * a.vp + z) / by);
    }
  }
  void far_values(const float* w, long n, float* out) {
    if (a.panels)
      sums_of_rows<F32>(w, ld, a.G, value_rows.get(), n * P16, a.dv_, out, a.vp);
    else
      sums_of_rows<T>(w, ld, a.G, value_rows.get(), n * P16, a.dv_, out, a.vp);
  }
};
template <class Metric, class T>
static int retrieve(const Retrieve& a) {
  long key_heads = a.H / a.G, blocks = (a.M + a.block - 1) / a.block, parts = a.block / P16;
  long units = a.window ? blocks : (a.N + a.block - 1) / a.block, lowest = 0;
  long copied = a.levels ? a.levels * a.units * P16 * parts : 0, all = copied + blocks * parts;
  if (a.window && a.causal)  // of a step the last block alone has a query
    lowest = std::max(0L, a.M - a.N - *std::max_element(a.first, a.first + a.B)) / a.block;
  int failed = 0;
#pragma omp parallel num_threads(a.threads)
  {
    Unit<Metric, T> unit(a);
    if (!unit.memory) failed = 1;
#pragma omp barrier
    if (!failed) {
      // One head after the other: what a head reads stays in the cache.
      for (long bk = 0; a.panels && bk < a.B * key_heads; bk++) {
#pragma omp for schedule(static)
        for (long x = 0; x < all; x++)
          unit.copy(bk / key_heads, bk % key_heads, x < copied ? x : x - copied, x < copied);
#pragma omp for schedule(dynamic)
        for (long x = 0; x < units - lowest; x++)  // causal: those with the most to search first
          unit.run(bk / key_heads, bk % key_heads, units - 1 - x);
      }
#pragma omp for schedule(dynamic) collapse(2)
      for (long bk = 0; bk < (a.panels ? 0 : a.B * key_heads); bk++)
        for (long x = 0; x < units - lowest; x++) unit.run(bk / key_heads, bk % key_heads, units - 1 - x);
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
