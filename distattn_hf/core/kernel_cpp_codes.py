"""C++ source of products of queries in whole numbers with keys in codes of a few bits, and lines of bytes."""

CODES = r"""
constexpr float LARGEST_BYTE = 127;                       // of lines of bytes, and of squares of whole numbers
const float SQUARE_STEP = sqrtf(63 * 63 / LARGEST_BYTE);  // in steps of the numbers
// out[r, 0 .. 15] = Σ q·line of R rows and 16 lines of bytes up to 127, (dq/4, 16, 4).
template <int R>
INLINE void byte_rows(const int8_t* q, long dq, const uint8_t* lines, float* out, long ldo) {
#if defined(__AVX512VNNI__)
  __m512i sums[R];
  for (int r = 0; r < R; r++) sums[r] = _mm512_setzero_si512();
  for (long u = 0; u < dq / 4; u++) {
    __m512i line = _mm512_loadu_si512(lines + u * 64);
    for (int r = 0; r < R; r++) {
      int32_t x;
      memcpy(&x, q + r * dq + 4 * u, 4);
      sums[r] = _mm512_dpbusd_epi32(sums[r], line, _mm512_set1_epi32(x));
    }
  }
  for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * ldo, _mm512_cvtepi32_ps(sums[r]));
#elif defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; half++) {
    __m256i sums[R];
    for (int r = 0; r < R; r++) sums[r] = _mm256_setzero_si256();
    for (long u = 0; u < dq / 4; u++) {
      __m256i line = _mm256_loadu_si256((const __m256i*)(lines + u * 64 + half * 32));
      for (int r = 0; r < R; r++) {
        int32_t x;
        memcpy(&x, q + r * dq + 4 * u, 4);
        __m256i pairs = _mm256_maddubs_epi16(line, _mm256_set1_epi32(x));
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
      }
    }
    for (int r = 0; r < R; r++) _mm256_storeu_ps(out + r * ldo + half * 8, _mm256_cvtepi32_ps(sums[r]));
  }
#else
  for (int r = 0; r < R; r++)
    for (long x = 0; x < P16; x++) {
      int32_t sum = 0;
      for (long c = 0; c < dq; c++) sum += q[r * dq + c] * lines[(c / 4 * P16 + x) * 4 + c % 4];
      out[r * ldo + x] = sum;
    }
#endif
}
static void byte_logits(const int8_t* q, long dq, long rows, const uint8_t* lines, float* out, long ldo) {
  long r = 0;
  for (; r + 8 <= rows; r += 8) byte_rows<8>(q + r * dq, dq, lines, out + r * ldo, ldo);
  for (; r + 3 <= rows; r += 3) byte_rows<3>(q + r * dq, dq, lines, out + r * ldo, ldo);
  for (; r < rows; r++) byte_rows<1>(q + r * dq, dq, lines, out + r * ldo, ldo);
}

#if defined(__AVX512VNNI__)
constexpr int CODE_ROWS = 8;  // rows that share what is read of the codes
#else
constexpr int CODE_ROWS = 4;
#endif
// out[r] += step[r]·max over the keys of a block of scale·(Σ q·code - 8·Σ q); codes as in `Codes`, off = 8·Σ q.
template <int R>
INLINE void code_rows(const int8_t* q, long dq, const float* off, const float* step, const uint8_t* code,
                      const float* scale, long block, float* out, long ldo) {
  long steps = dq / 8;
#if defined(__AVX512VNNI__)
  const __m512i low = _mm512_set1_epi8(15);
  vf best[R];
  for (int r = 0; r < R; r++) best[r] = splat(-INF);
  for (long t = 0; t < block; t += P16) {
    __m512i sums[R], more[R];  // of a few rows, what would wait for the sum before
    for (int r = 0; r < R; r++) sums[r] = more[r] = _mm512_setzero_si512();
    for (long u = 0; u < steps; u++) {
      __m512i both = _mm512_loadu_si512(code + (u * block + t) * 4), a = _mm512_and_si512(both, low);
      __m512i b = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      for (int r = 0; r < R; r++) {
        int32_t x, y;
        memcpy(&x, q + r * dq + 4 * u, 4);
        memcpy(&y, q + r * dq + dq / 2 + 4 * u, 4);
        sums[r] = _mm512_dpbusd_epi32(sums[r], a, _mm512_set1_epi32(x));
        __m512i& other = R < 4 ? more[r] : sums[r];
        other = _mm512_dpbusd_epi32(other, b, _mm512_set1_epi32(y));
      }
    }
    for (int r = 0; R < 4 && r < R; r++) sums[r] = _mm512_add_epi32(sums[r], more[r]);
    vf by = load(scale + t);
    for (int r = 0; r < R; r++) best[r] = vmax(best[r], ((vf)_mm512_cvtepi32_ps(sums[r]) - off[r]) * by);
  }
  for (int r = 0; r < R; r++) out[r * ldo] += step[r] * most(best[r]);
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  vf best[R];
  for (int r = 0; r < R; r++) best[r] = splat(-INF);
  for (long t = 0; t < block; t += 8) {
    __m256i wide[R];
    for (int r = 0; r < R; r++) wide[r] = _mm256_setzero_si256();
    for (long u0 = 0; u0 < steps; u0 += 8) {  // at most 16 products of pairs fit into 16 bits
      __m256i acc[R];
      for (int r = 0; r < R; r++) acc[r] = _mm256_setzero_si256();
      for (long u = u0; u < std::min(u0 + 8, steps); u++) {
        __m256i both = _mm256_loadu_si256((const __m256i*)(code + (u * block + t) * 4));
        __m256i a = _mm256_and_si256(both, low), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (int r = 0; r < R; r++) {
          int32_t x, y;
          memcpy(&x, q + r * dq + 4 * u, 4);
          memcpy(&y, q + r * dq + dq / 2 + 4 * u, 4);
          acc[r] = _mm256_add_epi16(acc[r], _mm256_maddubs_epi16(a, _mm256_set1_epi32(x)));
          acc[r] = _mm256_add_epi16(acc[r], _mm256_maddubs_epi16(b, _mm256_set1_epi32(y)));
        }
      }
      for (int r = 0; r < R; r++) wide[r] = _mm256_add_epi32(wide[r], _mm256_madd_epi16(acc[r], ones));
    }
    float sums[8], of_eight[W];
    for (int r = 0; r < R; r++) {
      _mm256_storeu_ps(sums, _mm256_cvtepi32_ps(wide[r]));
      for (int l = 0; l < W; l++) of_eight[l] = (sums[l % 8] - off[r]) * scale[t + l % 8];
      best[r] = vmax(best[r], load(of_eight));
    }
  }
  for (int r = 0; r < R; r++) out[r * ldo] += step[r] * most(best[r]);
#else
  for (int r = 0; r < R; r++) {
    float best = -INF;
    for (long t = 0; t < block; t++) {
      int32_t sum = 0;
      for (long u = 0; u < steps; u++)
        for (long z = 0; z < 4; z++) {
          int both = code[(u * block + t) * 4 + z];
          sum += (both & 15) * q[r * dq + 4 * u + z] + (both >> 4) * q[r * dq + dq / 2 + 4 * u + z];
        }
      best = std::max(best, ((float)sum - off[r]) * scale[t]);
    }
    out[r * ldo] += step[r] * best;
  }
#endif
}

#if defined(__AVX512VNNI__)
// The largest number of each of 16 vectors.
INLINE __m512 largest_of_each(const __m512* v) {
  __m512 four[4], two[2];
  for (int i = 0; i < 4; i++) {
    const __m512* w = v + 4 * i;
    __m512 x = _mm512_max_ps(_mm512_unpacklo_ps(w[0], w[1]), _mm512_unpackhi_ps(w[0], w[1]));
    __m512 y = _mm512_max_ps(_mm512_unpacklo_ps(w[2], w[3]), _mm512_unpackhi_ps(w[2], w[3]));
    __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y));
    __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y));
    four[i] = _mm512_max_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  }
  for (int i = 0; i < 2; i++)
    two[i] = _mm512_max_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44),
                           _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xee));
  return _mm512_max_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}
// The same of R rows and 16 blocks of these numbers, X at a time so that their sums need not wait for each other.
template <int R, int X>
INLINE void code_lists(const int8_t* q, long dq, const float* off, const float* step, const uint8_t* code,
                       const float* scale, long block, const long* numbers, float* out, long ldo) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 best[R][P16];
  for (int from = 0; from < P16; from += X)
    for (long t = 0; t < block; t += P16) {
      __m512i sums[R][X];
      for (int r = 0; r < R; r++)
        for (int x = 0; x < X; x++) sums[r][x] = _mm512_setzero_si512();
      for (long u = 0; u < dq / 8; u++) {
        __m512i a[X], b[X];
        for (int x = 0; x < X; x++) {
          __m512i both = _mm512_loadu_si512(code + ((numbers[from + x] * (dq / 8) + u) * block + t) * 4);
          a[x] = _mm512_and_si512(both, low), b[x] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
        for (int r = 0; r < R; r++) {
          int32_t y, z;
          memcpy(&y, q + r * dq + 4 * u, 4);
          memcpy(&z, q + r * dq + dq / 2 + 4 * u, 4);
          __m512i first = _mm512_set1_epi32(y), second = _mm512_set1_epi32(z);
          for (int x = 0; x < X; x++) sums[r][x] = _mm512_dpbusd_epi32(sums[r][x], a[x], first);
          for (int x = 0; x < X; x++) sums[r][x] = _mm512_dpbusd_epi32(sums[r][x], b[x], second);
        }
      }
      for (int x = 0; x < X; x++) {
        __m512 by = _mm512_loadu_ps(scale + numbers[from + x] * block + t);
        for (int r = 0; r < R; r++) {
          __m512 y = (_mm512_cvtepi32_ps(sums[r][x]) - _mm512_set1_ps(off[r])) * by;
          best[r][from + x] = t ? _mm512_max_ps(best[r][from + x], y) : y;
        }
      }
    }
  for (int r = 0; r < R; r++)
    _mm512_storeu_ps(out + r * ldo, _mm512_loadu_ps(out + r * ldo) + step[r] * largest_of_each(best[r]));
}
#else
template <int R, int>
INLINE void code_lists(const int8_t* q, long dq, const float* off, const float* step, const uint8_t* code,
                       const float* scale, long block, const long* numbers, float* out, long ldo) {
  for (int x = 0; x < P16; x++)
    code_rows<R>(q, dq, off, step, code + numbers[x] * block * (dq / 2), scale + numbers[x] * block, block, out + x,
                 ldo);
}
#endif
// The same of `rows` rows and 16 blocks of these numbers, whose codes and scales lie one after another.
static void look_at_codes(const int8_t* q, long dq, long rows, const float* off, const float* step, const uint8_t* code,
                          const float* scale, long block, const long* numbers, float* out, long ldo) {
  long r = 0;
  for (; r + 3 <= rows; r += 3)
    code_lists<3, 4>(q + r * dq, dq, off + r, step + r, code, scale, block, numbers, out + r * ldo, ldo);
  for (; r < rows; r++)
    code_lists<1, 8>(q + r * dq, dq, off + r, step + r, code, scale, block, numbers, out + r * ldo, ldo);
}
"""
