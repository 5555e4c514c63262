"""C++ source of logits of a few rows and panels of 16 keys, sums of values, and the ranking of blocks."""

PANELS = r"""
// A panel holds 16 keys or means as (d, 16), 0 past the last.
constexpr long P16 = 16;
constexpr int NV = P16 / W;
typedef uint16_t vh __attribute__((vector_size(2 * W)));
struct F32 {
  typedef float type;
  INLINE float one(type x) { return x; }
  INLINE vf read(const type* p) { return load(p); }
};
struct BF16 {
  typedef uint16_t type;
  INLINE float one(type x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  }
  INLINE vf read(const type* p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return (vf)(__builtin_convertvector(x, vi) << 16);
  }
};
// to[c, x] = numbers c0 + c of row x, of 16 rows.
template <class T>
INLINE void transpose16(const typename T::type* const* rows, long c0, float* to) {
#if defined(__AVX512F__)
  __m512 x[16], y[16];
  for (int i = 0; i < 16; i++) x[i] = (__m512)T::read(rows[i] + c0);
  for (int i = 0; i < 16; i += 2)
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
      x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; i++)  // of rows 4·i .. 4·i + 3 now number 4·lane + j in x[4·i + j]
    for (int k = 0; k < 2; k++) {
      y[i + 8 * k] = _mm512_shuffle_f32x4(x[i + 8 * k], x[i + 8 * k + 4], 0x88);
      y[i + 8 * k + 4] = _mm512_shuffle_f32x4(x[i + 8 * k], x[i + 8 * k + 4], 0xdd);
    }
  for (int j = 0; j < 4; j++)
    for (int k = 0; k < 2; k++) {
      _mm512_storeu_ps(to + (j + 4 * k) * P16, _mm512_shuffle_f32x4(y[j + 4 * k], y[j + 4 * k + 8], 0x88));
      _mm512_storeu_ps(to + (j + 4 * k + 8) * P16, _mm512_shuffle_f32x4(y[j + 4 * k], y[j + 4 * k + 8], 0xdd));
    }
#else
  for (long c = 0; c < P16; c++)
    for (long x = 0; x < P16; x++) to[c * P16 + x] = T::one(rows[x][c0 + c]);
#endif
}
template <class Metric>
constexpr bool is_dot = std::is_same<Metric, Dot>::value;

// out[r, 16·x ..] = logits of R rows and X panels, all sums in registers. coef: of the G heads, which rows go through.
template <class Metric, int R, int X>
INLINE void tile_logits(const float* q, long ldq, const float* const* panels, long d, float* out, long ldo,
                        const float* coef, const float* soft, long G, long row, float p) {
  vf acc[R][X][NV] = {};
  float order[R];
  for (int r = 0; r < R; r++) order[r] = soft ? soft[(row + r) % G] : p;
  for (long c = 0; c < d; c++)
    for (int x = 0; x < X; x++)
      for (int v = 0; v < NV; v++) {
        vf key = load(panels[x] + c * P16 + v * W);
        for (int r = 0; r < R; r++) {
          if constexpr (is_dot<Metric>)
            acc[r][x][v] += q[r * ldq + c] * key;
          else
            acc[r][x][v] = Metric::add(acc[r][x][v], splat(q[r * ldq + c]) - key, order[r]);
        }
      }
  for (int r = 0; r < R; r++)
    for (int x = 0; x < X; x++)
      for (int v = 0; v < NV; v++) {
        vf y = acc[r][x][v];
        if constexpr (!is_dot<Metric>) y = -coef[(row + r) % G] * Metric::finish(y, order[r]);
        store(out + r * ldo + x * P16 + v * W, y);
      }
}
template <class Metric, int R>
static void row_logits(const float* q, long ldq, const float* const* panels, long count, long d, float* out, long ldo,
                       const float* coef, const float* soft, long G, long row, float p) {
  constexpr int SUMS = R * NV, X = SUMS >= 8 ? (W == 16 ? 2 : 1) : SUMS >= 4 ? 2 : SUMS >= 2 ? 4 : 8;
  long x = 0;
  for (; x + X <= count; x += X)
    tile_logits<Metric, R, X>(q, ldq, panels + x, d, out + x * P16, ldo, coef, soft, G, row, p);
  for (; x < count; x++) tile_logits<Metric, R, 1>(q, ldq, panels + x, d, out + x * P16, ldo, coef, soft, G, row, p);
}
template <class Metric>
static void logits(const float* q, long ldq, long rows, const float* const* panels, long count, long d, float* out,
                   long ldo, const float* coef, const float* soft, long G, float p) {
  constexpr int MANY = NV == 1 ? 8 : 4;  // rows that share what is read of the panels, as many as registers hold
  long r = 0;
  for (; r + MANY <= rows; r += MANY)
    row_logits<Metric, MANY>(q + r * ldq, ldq, panels, count, d, out + r * ldo, ldo, coef, soft, G, r, p);
  for (; r + 4 <= rows; r += 4)
    row_logits<Metric, 4>(q + r * ldq, ldq, panels, count, d, out + r * ldo, ldo, coef, soft, G, r, p);
  const float* rest = q + r * ldq;
  float* to = out + r * ldo;
  if (rows - r == 3) row_logits<Metric, 3>(rest, ldq, panels, count, d, to, ldo, coef, soft, G, r, p);
  if (rows - r == 2) row_logits<Metric, 2>(rest, ldq, panels, count, d, to, ldo, coef, soft, G, r, p);
  if (rows - r == 1) row_logits<Metric, 1>(rest, ldq, panels, count, d, to, ldo, coef, soft, G, r, p);
}
// out[r, :] += Σ_j w[r, j]·value of the j-th of `count` keys, C vectors of it; rows that are null are not read.
template <class T, int R, int C>
INLINE void weighted(const float* w, long ldw, const typename T::type* const* rows, long count, long from, float* out,
                     long ldo) {
  vf acc[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) acc[r][c] = load(out + r * ldo + c * W);
  for (long j = 0; j < count; j++) {
    if (!rows[j]) continue;
    for (int c = 0; c < C; c++) {
      vf y = T::read(rows[j] + from + c * W);
      for (int r = 0; r < R; r++) acc[r][c] += w[r * ldw + j] * y;
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * ldo + c * W, acc[r][c]);
}
template <class T, int R>
static void weighted_rows(const float* w, long ldw, const typename T::type* const* rows, long count, long width,
                          float* out, long ldo) {
  constexpr int C = W == 16 ? 4 : R == 1 ? 8 : R == 2 ? 4 : 2;
  long c = 0;
  for (; c + C * W <= width; c += C * W) weighted<T, R, C>(w, ldw, rows, count, c, out + c, ldo);
  for (; c < width; c += W) weighted<T, R, 1>(w, ldw, rows, count, c, out + c, ldo);
}
// out[g, :] += Σ_j w[g, j]·value of the j-th of `count` keys, of G rows, `width` numbers; values as in `weighted`.
template <class T>
static void sums_of_rows(const float* w, long ldw, long G, const void* const* values, long count, long width,
                         float* out, long ldo) {
  auto rows = (const typename T::type* const*)values;
  long g = 0, whole = width / W * W;
  if (!count) return;
  for (; g + 4 <= G; g += 4) weighted_rows<T, 4>(w + g * ldw, ldw, rows, count, whole, out + g * ldo, ldo);
  if (G - g == 3) weighted_rows<T, 3>(w + g * ldw, ldw, rows, count, whole, out + g * ldo, ldo);
  if (G - g == 2) weighted_rows<T, 2>(w + g * ldw, ldw, rows, count, whole, out + g * ldo, ldo);
  if (G - g == 1) weighted_rows<T, 1>(w + g * ldw, ldw, rows, count, whole, out + g * ldo, ldo);
  for (long z = whole; z < width; z++)  // sizes that fill no vector
    for (g = 0; g < G; g++)
      for (long x = 0; x < count; x++)
        if (rows[x]) out[g * ldo + z] += w[g * ldw + x] * T::one(rows[x][z]);
}

// Which numbers of a vector x > y, as bits; a NaN is, so that it is chosen and seen.
INLINE uint32_t above(vf x, vf y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLE_UQ);
#else
  uint32_t bits = 0;
  vi not_above = x <= y;
  for (int l = 0; l < W; l++) bits |= (uint32_t)(~not_above[l] & 1) << l;
  return bits;
#endif
}
INLINE long count_above(const float* x, long n, float limit) {
  long count = 0;
  for (long j = 0; j < n; j += W) count += __builtin_popcount(above(load(x + j), splat(limit)));
  return count;
}
// Appends to `numbers` and `values` those of x[0 .. W - 1] that bits name, j being the number of the first; there must
// be room for W of each. Returns how many.
INLINE long append(uint32_t bits, const float* x, long j, int32_t* numbers, float* values) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(j));
  _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(bits, at));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(bits, _mm512_loadu_ps(x)));
  return __builtin_popcount(bits);
#else
  long count = 0;
  for (; bits; bits &= bits - 1) {
    long lane = __builtin_ctz(bits);
    numbers[count] = j + lane, values[count++] = x[lane];
  }
  return count;
#endif
}
// Numbers of the k largest of n > k entries above -INF, in order; of equal ones the first. x: filled with -INF to whole
// vectors; room, places: for n + W numbers. Returns how many.
static long largest_of_few(const float* x, long n, long k, long* numbers, float* room, int32_t* places) {
  vf least = splat(INF);
  for (long j = 0; j < n; j += W) {
    vf y = load(x + j);
    least = vmin(least, where(y == -INF, splat(INF), y));
  }
  float lo = INF, hi = largest_in(x, (n + W - 1) / W * W);
  for (int l = 0; l < W; l++) lo = std::min(lo, least[l]);
  // More than k entries are above lo (or all at least lo), at most k above hi.
  lo = lo - 1e-30f - 1e-6f * fabsf(lo);
  long more = -1;
  for (;;) {
    float middle = lo + 0.5f * (hi - lo);
    if (!(middle > lo && middle < hi)) break;
    long count = count_above(x, n, middle);
    if (count > k)
      lo = middle;
    else
      hi = middle, more = count;
    if (count == k) break;
  }
  if (more == k) {
    long count = 0;
    for (long j = 0; j < n; j += W)
      count += append(above(load(x + j), splat(hi)), x + j, j, places + count, room + count);
    for (long j = 0; j < k; j++) numbers[j] = places[j];
    return k;
  }
  long taken = 0;
  more = count_above(x, n, hi);
  for (long j = 0; j < n && taken < k; j++) {
    if (!(x[j] <= hi))
      numbers[taken++] = j;
    else if (x[j] > lo && more < k)
      numbers[taken++] = j, more++;
  }
  return taken;
}
// Numbers of the k largest of n entries, a multiple of 16, in order; of equal ones the first; -INF is none. room,
// places: for twice as many numbers and 16. Returns how many.
static long largest_k(const float* x, long n, long k, long* numbers, float* room, int32_t* places) {
  if (k == 0) return 0;
  // A limit that at least k entries are above: k of the largest of groups of entries, where there are more.
  float limit = -INF;
  long fold = n / (2 * k), width = fold > 1 ? (n / W + fold - 1) / fold * W : 0;
  if (width) {
    memcpy(room, x, 4 * width);
    for (long j = width; j < n; j += W) {
      float* to = room + j % width;
      store(to, vmax(load(to), load(x + j)));
    }
    vf least = splat(INF);
    for (long j = 0; j < width; j += W) {
      vf y = load(room + j);
      least = vmin(least, where(y == -INF, splat(INF), y));
    }
    float lo = INF, hi = largest_in(room, width);
    for (int l = 0; l < W; l++) lo = std::min(lo, least[l]);
    // A choice need not be a narrow one: what is above the limit is looked at once more.
    for (int i = 0; i < 10; i++) {
      float middle = lo + 0.5f * (hi - lo);
      if (count_above(room, width, middle) >= k)
        lo = limit = middle;
      else
        hi = middle;
    }
  }
  long count = 0;
  for (long j = 0; j < n; j += W)
    if (uint32_t bits = above(load(x + j), splat(limit))) count += append(bits, x + j, j, places + count, room + count);
  if (count > k) {
    for (long j = count; j % W; j++) room[j] = -INF;
    long past = (count + W - 1) / W * W;
    long taken = largest_of_few(room, count, k, numbers, room + past, places + past);
    for (long j = 0; j < taken; j++) numbers[j] = places[numbers[j]];
    return taken;
  }
  for (long j = 0; j < count; j++) numbers[j] = places[j];
  return count;
}
// The largest over G rows of exp(row - top) / sum, top the largest of the row; rows of n numbers, -INF for what does
// not count. Both are also over `beside` numbers of each row of `other`.
static void chances(const float* s, long ld, long G, long n, float* largest, const float* other, long ld2, long beside,
                    float* tops, float* sums, float* room) {
  memset(largest, 0, 4 * n);
  for (long g = 0; g < G; g++) {
    const float *row = s + g * ld, *more = other + g * ld2;
    float top = largest_in(row, n);
    if (beside) top = std::max(top, largest_in(more, beside));
    tops[g] = top = top == -INF ? 0 : top;
    vf sum = {};
    for (long j = 0; j < beside; j += W) sum += expv(load(more + j) - top);
    for (long j = 0; j < n; j += W) {
      vf w = expv(load(row + j) - top);
      store(room + j, w);
      sum += w;
    }
    sums[g] = ::total(sum);
    float by = sums[g] > 0 ? 1 / sums[g] : 0;
    for (long j = 0; j < n; j += W) store(largest + j, vmax(load(largest + j), by * load(room + j)));
  }
}
"""
