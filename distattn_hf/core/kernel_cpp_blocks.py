"""C++ source of which keys stand in a block of retrieval attention, where they are, its codes and its summary."""

BLOCKS = r"""
// What stands for blocks of keys (see `Codes` and `Summaries`), 16 blocks a panel. keep: (B, M) or null.
// center: of each head one for each of `centers` blocks, or one for all. n: blocks; real keys are those below M.
// order: which key stands at each place of the blocks, (B, H_kv, n·block), or null.
struct Blocks {
  const float *k, *v, *center;
  const int64_t* order;
  const uint8_t* keep;
  float *mean, *spread, *scale, *key, *bias, *value;
  uint8_t *variance, *code;
  long B, H, G, M, n, d, dv_, block, groups, centers, threads;
  long k_stride[3], v_stride[3];
};
static long number_of(const Blocks& a, long b, long kh, long x, long t) {
  long place = x * a.block + t;
  return a.order ? a.order[(b * (a.H / a.G) + kh) * a.n * a.block + place] : place;
}
struct Rows {  // of one block, filled with zeros to whole vectors; which of them are real
  long d, ld;
  std::unique_ptr<float, void (*)(void*)> memory;
  Rows(long block, long d) : d(d), ld((d + W - 1) / W * W), memory(buffer(block * ld)) {
    if (memory) memset(memory.get(), 0, 4 * block * ld);
  }
  float* at(long t) const { return memory.get() + t * ld; }
  void read(const Blocks& a, const float* from, const long* stride, long b, long kh, long x, const bool* real) const {
    for (long t = 0; t < a.block; t++) {
      const float* row = from + b * stride[0] + kh * stride[1] + (real[t] ? number_of(a, b, kh, x, t) : 0) * stride[2];
      if (real[t])
        memcpy(at(t), row, 4 * d);
      else
        memset(at(t), 0, 4 * d);
    }
  }
};
static long which(const Blocks& a, long b, long kh, long x, bool* real) {
  long count = 0;
  for (long t = 0; t < a.block; t++) {
    long j = x < a.n ? number_of(a, b, kh, x, t) : a.M;
    count += real[t] = j < a.M && (!a.keep || a.keep[b * a.M + j]);
  }
  return count;
}
static void encode_block(const Blocks& a, long b, long kh, long x, const Rows& rows, bool* real, float* mean) {
  float* spread = mean + rows.ld;
  long bk = b * (a.H / a.G) + kh, at = bk * a.groups + x / P16, lane = x % P16, steps = (a.d + 7) / 8, half = 4 * steps;
  long count = which(a, b, kh, x, real), other = 0;
  rows.read(a, a.k, a.k_stride, b, kh, x, real);
  memset(mean, 0, 4 * rows.ld);
  for (long t = 0; t < a.block; t++)
    for (long c = 0; c < a.d; c++) mean[c] += rows.at(t)[c];
  for (long c = 0; c < a.d; c++) a.mean[(at * a.d + c) * P16 + lane] = mean[c] /= std::max(1L, count);
  memset(spread, 0, 4 * rows.ld);
  for (long t = 0; t < a.block; t++)
    for (long c = 0; real[t] && c < a.d; c++) spread[c] += (rows.at(t)[c] - mean[c]) * (rows.at(t)[c] - mean[c]);
  float most = largest_in(spread, rows.ld) / LARGEST_BYTE, unit = most > 0 ? most : 1;
  a.spread[at * P16 + lane] = most / std::max(1L, count);
  for (long c = 0; c < 2 * half; c++)
    a.variance[((at * 2 * steps + c / 4) * P16 + lane) * 4 + c % 4] = c < a.d ? (int)nearbyintf(spread[c] / unit) : 0;
  while (count && !real[other]) other++;
  for (long t = 0; t < a.block; t++) {  // padding looks like the first real key
    float *row = rows.at(count && !real[t] ? other : t), largest = 0;
    vf most = {};
    for (long c = 0; c < rows.ld; c += W) most = largest_of(most, vabs(load(row + c) - load(mean + c)));
    largest = largest_bits(most) / 7;
    a.scale[(at * P16 + lane) * a.block + t] = largest;
    float by = largest > 0 ? largest : 1;
    uint8_t* to = a.code + ((at * P16 + lane) * steps * a.block + t) * 4;
    for (long c = 0; c < half; c++) {
      auto code = [&](long c) {
        return c < a.d ? (int)nearbyintf((row[c] - mean[c]) / by) + 8 & 15 : 8;
      };
      to[c / 4 * a.block * 4 + c % 4] = code(c) | code(half + c) << 4;
    }
  }
}
static void summarise_block(const Blocks& a, long b, long kh, long x, const Rows& rows, const Rows& values, bool* real,
                            float* work) {
  bool any = which(a, b, kh, x, real) > 0;
  rows.read(a, a.k, a.k_stride, b, kh, x, real);
  values.read(a, a.v, a.v_stride, b, kh, x, real);
  float *center = work, *mean = work + rows.ld, *logit = mean + rows.ld, *middle = logit + (a.block + W - 1) / W * W;
  for (long g = 0; g < a.G; g++) {
    long head = b * a.H + kh * a.G + g, at = head * a.groups + x / P16, lane = x % P16;
    memset(work, 0, 4 * (middle + values.ld - work));
    memcpy(center, a.center + (head * a.centers + (a.centers > 1 ? std::min(x, a.n - 1) : 0)) * a.d, 4 * a.d);
    for (long t = a.block; t % W; t++) logit[t] = -INF;
    for (long t = 0; t < a.block; t++) logit[t] = real[t] ? dot_product(center, rows.at(t), rows.ld) : -INF;
    float top = largest_in(logit, a.block), sum = 0;
    for (long t = 0; any && t < a.block; t++) sum += logit[t] = real[t] ? expf(logit[t] - top) : 0;
    for (long t = 0; any && t < a.block; t++) {
      float share = logit[t] / sum;
      for (long c = 0; c < rows.ld; c += W) store(mean + c, load(mean + c) + share * load(rows.at(t) + c));
      for (long c = 0; c < values.ld; c += W) store(middle + c, load(middle + c) + share * load(values.at(t) + c));
    }
    a.bias[at * P16 + lane] = any ? top + logf(sum) - dot_product(center, mean, rows.ld) : -INF;
    for (long c = 0; c < a.d; c++) a.key[(at * a.d + c) * P16 + lane] = mean[c];
    memcpy(a.value + (at * P16 + lane) * a.dv_, middle, 4 * a.dv_);
  }
}
static int blocks_of(const Blocks* a, bool codes) {
  long key_heads = a->H / a->G, all = a->groups * P16;
  int failed = 0;
#pragma omp parallel num_threads(a->threads)
  {
    Rows rows(a->block, a->d), values(a->block, codes ? 0 : a->dv_);
    std::unique_ptr<bool[]> real(new bool[a->block]);
    auto work = buffer(2 * rows.ld + a->block + W + values.ld);
    if (!rows.memory || !values.memory || !work) failed = 1;
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
    for (long bk = 0; bk < a->B * key_heads; bk++)
      for (long x = 0; x < all; x++) {
        long b = bk / key_heads, kh = bk % key_heads;
        if (failed) continue;
        if (codes)
          encode_block(*a, b, kh, x, rows, real.get(), work.get());
        else
          summarise_block(*a, b, kh, x, rows, values, real.get(), work.get());
      }
  }
  return failed;
}

// Which key stands at which place, (B, H, levels, n·unit): see `order_by_likeness`. keep: (B, M).
struct Order {
  const float* k;
  const uint8_t* keep;
  int64_t* place;
  long B, H, M, d, n, unit, block, pinned, levels, threads, sample, k_stride[3];
};
struct Segment {  // the order of the keys of one segment
  const Order& a;
  long ld, ready;
  std::unique_ptr<float, void (*)(void*)> memory;
  float *rows, *mean, *axis, *next, *along;
  std::unique_ptr<int32_t[]> number, spare;
  Segment(const Order& a, long most) : a(a), ld((a.d + W - 1) / W * W), memory(buffer((most + 3) * ld + most)) {
    number.reset(new int32_t[most]);
    spare.reset(new int32_t[most]);
    rows = memory.get(), mean = rows + most * ld, axis = mean + ld, next = axis + ld, along = next + ld;
    if (memory) memset(rows, 0, 4 * (most + 3) * ld);
  }
  // Halves places lo .. hi - 1, of which the first `low` and the last `high` stay where they are, down to blocks; what
  // does not stay is in order of its number.
  void halve(long lo, long hi, long low, long high) {
    long from = lo + low, to = hi - high, middle = lo + (hi - lo) / 2;
    if (hi - lo <= a.block) return;
    if (from < middle && middle < to) {
      bool finite = find_axis(from, to);
      for (long x = from; x < to; x++) {
        float part = dot_product(row(x), axis, ld);
        along[number[x]] = finite && part == part ? part : INF;
      }
      auto before = [&](int32_t x, int32_t y) { return along[x] < along[y] || (along[x] == along[y] && x < y); };
      std::copy(number.get() + from, number.get() + to, spare.get() + from);
      std::nth_element(spare.get() + from, spare.get() + middle, spare.get() + to, before);
      int32_t first = spare[middle];  // of the second half
      long kept = from, moved = 0;
      for (long x = from; x < to; x++)
        if (before(number[x], first))
          number[kept++] = number[x];
        else
          spare[moved++] = number[x];
      std::copy(spare.get(), spare.get() + moved, number.get() + middle);
    }
    halve(lo, middle, std::min(low, middle - lo), std::max(0L, middle - to));
    halve(middle, hi, std::max(0L, from - middle), std::min(high, hi - middle));
  }
  // The direction in which keys differ most, of a sample of those at places from .. to - 1; whether it is finite.
  bool find_axis(long from, long to) {
    long step = std::max(1L, (to - from) / a.sample);
    bool finite = true;
    memset(mean, 0, 4 * ld);
    for (long x = from; x < to; x += step)
      for (long c = 0; c < ld; c += W) store(mean + c, load(mean + c) + load(row(x) + c));
    for (long c = 0; c < ld; c += W) store(mean + c, load(mean + c) / splat((to - from + step - 1) / step));
    float most = -1;
    for (long x = from; x < to; x += step) {
      vf sum = {};
      for (long c = 0; c < ld; c += W) {
        vf rest = load(row(x) + c) - load(mean + c);
        sum += rest * rest;
      }
      if (float far = ::total(sum); far > most) {
        most = far;
        for (long c = 0; c < ld; c += W) store(axis + c, load(row(x) + c) - load(mean + c));
      }
    }
    for (int i = 0; i < 2; i++) {
      float all = 0, base = dot_product(mean, axis, ld), size = 0;
      memset(next, 0, 4 * ld);
      for (long x = from; x < to; x += step) {
        float part = dot_product(row(x), axis, ld) - base;
        all += part;
        for (long c = 0; c < ld; c += W) store(next + c, load(next + c) + part * load(row(x) + c));
      }
      for (long c = 0; c < ld; c++) {
        next[c] -= all * mean[c], size = std::max(size, fabsf(next[c]));
        finite &= fabsf(next[c]) < INF;
      }
      for (long c = 0; c < ld; c++) axis[c] = size > 0 ? next[c] / size : 0;
    }
    return finite;
  }
  const float* row(long x) const { return rows + number[x] * ld; }
  void run(long b, long h, long level, long start, long count) {
    int64_t* out = a.place + ((b * a.H + h) * a.levels + level) * a.n * a.unit + start;
    long pinned = std::min(std::max(0L, a.pinned - start), count), real = 0;
    auto is_real = [&](long x) { return a.keep[b * a.M + start + x]; };
    for (long x = 0; x < count; x++) {
      if (x >= pinned && !is_real(x)) continue;
      number[real++] = x;
      memcpy(rows + x * ld, a.k + b * a.k_stride[0] + h * a.k_stride[1] + (start + x) * a.k_stride[2], 4 * a.d);
    }
    for (long x = pinned, at = real; x < count; x++)
      if (!is_real(x)) number[at++] = x;
    halve(0, count, pinned, count - real);
    for (long x = 0; x < count; x++) out[x] = start + number[x];
  }
};
extern "C" int order_keys(const Order* a) {
  long most = a->unit << 2 * (a->levels - 1);
  int failed = 0;
#pragma omp parallel num_threads(a->threads)
  {
    Segment segment(*a, std::min(most, a->n * a->unit));
    if (!segment.memory) failed = 1;
#pragma omp barrier
    for (long level = a->levels - 1; level >= 0; level--) {
      long size = a->unit << 2 * level, whole = a->n * a->unit / size;
#pragma omp for schedule(dynamic) collapse(2) nowait
      for (long bh = 0; bh < a->B * a->H; bh++)
        for (long x = 0; x <= whole; x++) {
          if (failed) continue;
          if (x < whole) segment.run(bh / a->H, bh % a->H, level, x * size, size);
          int64_t* out = a->place + (bh * a->levels + level) * a->n * a->unit;
          for (long j = whole * size; x == whole && j < a->n * a->unit; j++) out[j] = j;  // of no whole segment
        }
    }
  }
  return failed;
}
extern "C" int encode_keys(const Blocks* a) { return blocks_of(a, true); }
extern "C" int summarise_keys(const Blocks* a) { return blocks_of(a, false); }

// Keys stand in blocks of `block` from key first[b] on. mean, scale, code, real: see `Codes`, of `groups` panels.
// far_key, far_bias, far_value: see `Summaries`, of far_heads heads and far_groups panels, values of vp numbers; or
// null. No far_key: the means are the keys.
// whole, off, step: queries as whole numbers (B, H, N, dq), 8 times their sum, and what one of them is worth.
// order: where keys are in an order of likeness, which key stands at each place, (B, H_kv, levels, units·16·block);
// else null and levels 0. candidates: blocks at least whose codes are looked at then, by their means.
struct Retrieve {
  const float *q, *coef, *soft, *mean, *spread, *scale, *off, *step, *far_key, *far_bias, *far_value;
  const void *k, *v;
  const uint8_t *variance, *code, *real, *keep;
  const int8_t* whole;
  const int64_t *order, *first, *budget;
  float *o, *panels;
  int64_t *read;  // of every query how many keys it reads, or null
  long B, H, G, N, M, d, dp, dq, dv_, vp, causal, window, sinks, block, groups, far_groups, most, half, kind, threads;
  long units, levels, candidates, far_heads;
  long k_stride[3], v_stride[3];
  float p, least, spreads;  // spreads: how many of a block's beside its mean rank it
};
template <class T>
struct Keys {  // where the keys and values of blocks are
  typedef typename T::type type;
  const Retrieve& a;
  long blocks, parts;
  Keys(const Retrieve& a) : a(a), blocks((a.M + a.block - 1) / a.block), parts(a.block / P16) {}
  const type* key(long b, long kh, long j) const {
    return (const type*)a.k + b * a.k_stride[0] + kh * a.k_stride[1] + (a.first[b] + j) * a.k_stride[2];
  }
  const type* value(long b, long kh, long j) const {
    return (const type*)a.v + b * a.v_stride[0] + kh * a.v_stride[1] + (a.first[b] + j) * a.v_stride[2];
  }
  long length(long b) const { return a.M - a.first[b]; }  // keys from `first` on
  // The key at a place of the blocks that are searched.
  long at_place(long b, long kh, long place) const {
    return a.levels ? a.order[(b * (a.H / a.G) + kh) * a.levels * a.units * P16 * a.block + place] : place;
  }
  bool is_real(long b, long j) const { return j < length(b) && (!a.keep || a.keep[b * a.M + a.first[b] + j]); }
  template <class Number>
  void pack16(long b, long kh, Number number, float* to) const {
    const type* from[P16];
    bool real[P16], all = true;
    for (long x = 0; x < P16; x++) {
      long j = number(x);
      from[x] = key(b, kh, j), real[x] = j < length(b), all &= real[x];
    }
    long c = 0;
    if (all)
      for (; c + P16 <= a.d; c += P16) transpose16<T>(from, c, to + c * P16);
    for (; c < a.d; c++)
      for (long x = 0; x < P16; x++) to[c * P16 + x] = real[x] ? T::one(from[x][c]) : 0;
  }
  void pack_place(long b, long kh, long place, float* to) const {
    pack16(b, kh, [&](long x) { return at_place(b, kh, place + x); }, to);
  }
  // The number-th 16 keys of the blocks that are searched.
  const float* panel_of(long b, long kh, long number, float* room) const {
    if (a.panels) return a.panels + number * a.d * P16;
    pack_place(b, kh, number * P16, room);
    return room;
  }
  // Whether every key of the blocks that are searched is one.
  bool all_real() const { return a.levels && !a.keep; }
  // Where the values of 16 places from `place` on are, null for what is no key; with panels they lie behind them.
  void find_values(long b, long kh, long place, const void** rows) const {
    const float* copies = a.panels ? a.panels + all_places() * a.d : nullptr;
    for (long z = 0; z < P16; z++) {
      if (a.panels && all_real()) {
        rows[z] = copies + (place + z) * a.vp;
        continue;
      }
      long j = at_place(b, kh, place + z);
      rows[z] = !is_real(b, j) ? nullptr : a.panels ? (const void*)(copies + (place + z) * a.vp) : value(b, kh, j);
      __builtin_prefetch(rows[z]);
    }
  }
  long all_places() const { return (a.levels ? a.levels * a.units * P16 : blocks) * a.block; }
  template <class Number>
  void pack_values(long b, long kh, Number number, float* to) const {
    for (long x = 0; x < P16; x++) {
      long j = number(x);
      for (long c = 0; c < a.dv_; c++) to[x * a.vp + c] = is_real(b, j) ? T::one(value(b, kh, j)[c]) : 0;
    }
  }
  // Panels and values of the keys where they stand: behind those of the order, if there is one.
  float* near_panels() const { return a.panels + (a.levels ? all_places() * (a.d + a.vp) : 0); }
  float* near_values() const { return near_panels() + blocks * a.block * a.d; }
  const float* near_panel(long b, long kh, long number, float* room) const {
    if (a.panels) return near_panels() + number * a.d * P16;
    pack16(b, kh, [&](long x) { return number * P16 + x; }, room);
    return room;
  }
  // Copies the number-th 16 keys of a head, in order or where they stand, with their values.
  void copy(long b, long kh, long number, bool in_order) const {
    auto which = [&](long x) { return in_order ? at_place(b, kh, number * P16 + x) : number * P16 + x; };
    pack16(b, kh, which, (in_order ? a.panels : near_panels()) + number * a.d * P16);
    pack_values(b, kh, which, (in_order ? a.panels + all_places() * a.d : near_values()) + number * a.vp * P16);
  }
};
"""
