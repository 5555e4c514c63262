"""C++ source of what stands for blocks of keys in retrieval attention: their codes and their summaries."""

BLOCKS = r"""
// What stands for blocks of keys (see `Codes` and `Summaries`), 16 blocks a panel. keep: (B, M) or null.
// center: of each head one for each of `centers` blocks, or one for all. n: blocks; real keys are those below M.
struct Blocks {
  const float *k, *v, *center;
  const uint8_t* keep;
  float *mean, *scale, *key, *bias, *value;
  uint8_t* code;
  long B, H, G, M, n, d, dv_, block, groups, centers, threads;
  long k_stride[3], v_stride[3];
};
struct Rows {  // of one block, filled with zeros to whole vectors; which of them are real
  long d, ld;
  std::unique_ptr<float, void (*)(void*)> memory;
  Rows(long block, long d) : d(d), ld((d + W - 1) / W * W), memory(buffer(block * ld)) {
    if (memory) memset(memory.get(), 0, 4 * block * ld);
  }
  float* at(long t) const { return memory.get() + t * ld; }
  void read(const Blocks& a, const float* from, const long* stride, long b, long kh, long x, const bool* real) const {
    for (long t = 0; t < a.block; t++) {
      const float* row = from + b * stride[0] + kh * stride[1] + (x * a.block + t) * stride[2];
      if (real[t])
        memcpy(at(t), row, 4 * d);
      else
        memset(at(t), 0, 4 * d);
    }
  }
};
static long which(const Blocks& a, long b, long x, bool* real) {
  long count = 0;
  for (long t = 0, j = x * a.block; t < a.block; t++, j++)
    count += real[t] = x < a.n && j < a.M && (!a.keep || a.keep[b * a.M + j]);
  return count;
}
static void encode_block(const Blocks& a, long b, long kh, long x, const Rows& rows, bool* real, float* mean) {
  long bk = b * (a.H / a.G) + kh, at = bk * a.groups + x / P16, lane = x % P16, steps = (a.d + 7) / 8, half = 4 * steps;
  long count = which(a, b, x, real), other = 0;
  rows.read(a, a.k, a.k_stride, b, kh, x, real);
  memset(mean, 0, 4 * rows.ld);
  for (long t = 0; t < a.block; t++)
    for (long c = 0; c < a.d; c++) mean[c] += rows.at(t)[c];
  for (long c = 0; c < a.d; c++) a.mean[(at * a.d + c) * P16 + lane] = mean[c] /= std::max(1L, count);
  while (count && !real[other]) other++;
  for (long t = 0; t < a.block; t++) {  // padding looks like the first real key
    float *row = rows.at(count && !real[t] ? other : t), largest = 0;
    vf most = {};
    for (long c = 0; c < rows.ld; c += W) most = largest_of(most, vabs(load(row + c) - load(mean + c)));
    largest = largest_bits(most) / 7;
    a.scale[(at * a.block + t) * P16 + lane] = largest;
    float by = largest > 0 ? largest : 1;
    uint8_t* to = a.code + (at * a.block + t) * steps * 64 + lane * 4;
    for (long c = 0; c < half; c++) {
      auto code = [&](long c) {
        return c < a.d ? (int)nearbyintf((row[c] - mean[c]) / by) + 8 & 15 : 8;
      };
      to[c / 4 * 64 + c % 4] = code(c) | code(half + c) << 4;
    }
  }
}
static void summarise_block(const Blocks& a, long b, long kh, long x, const Rows& rows, const Rows& values, bool* real,
                            float* work) {
  bool any = which(a, b, x, real) > 0;
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
extern "C" int encode_keys(const Blocks* a) { return blocks_of(a, true); }
extern "C" int summarise_keys(const Blocks* a) { return blocks_of(a, false); }
"""
