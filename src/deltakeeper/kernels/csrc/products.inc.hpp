// Products of one instruction set. Every sum over columns runs in one order whatever the number of rows beside it, so that
// what a row gets does not depend on its neighbours.

constexpr int64_t BLOCK = 64;  // rows of x whose sums are kept at a time: at most 64 × 256 floats, in the second cache

static inline float dot_wide(const float* a, const float* b, int64_t n) {  // n is a multiple of 32
  V sum = v_zero();
  for (int64_t i = 0; i < n; i += W) sum = v_fma(v_load(a + i), v_load(b + i), sum);
  return v_sum(sum);
}

constexpr int64_t AHEAD = 4096;

// to[0] … to[N - 1] get the sums of N vectors, or have them added.
template <int N>
static inline void put_sums(const V* sum, bool add, float* to) {
  float found[N < 4 ? 4 : N];
  for (int n = 0; n < N; n += 4)
    v_sum4(sum[n], N > n + 1 ? sum[n + 1] : v_zero(), N > n + 2 ? sum[n + 2] : v_zero(), N > n + 3 ? sum[n + 3] : v_zero(), found + n);
  for (int n = 0; n < N; n++) to[n] = add ? to[n] + found[n] : found[n];
}

constexpr int64_t READ_AHEAD = 2048;  // bytes
constexpr int64_t DEEP = 2048;  // columns whose products are summed before they are added up: 64 rows of x stay in the second cache

// acc[m * TILE + n] += w[n] · x[m] over columns `from` to `to` of bfloat16 (set, at column 0); x is zero from `in` to its stride.
template <int N, int M>
static inline void dot_block(const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t ldx, int64_t from, int64_t to, float* acc) {
  V sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sum[m][n] = v_zero();
#if defined(ISA_BF16)
  int64_t i = from;
  for (; i + 32 <= to; i += 32) {
    __m512bh a[N];
    for (int n = 0; n < N; n++) a[n] = (__m512bh)_mm512_loadu_si512(w + n * ldw + i);
    for (int m = 0; m < M; m++) {
      const __m512bh b = (__m512bh)_mm512_loadu_si512(x + m * ldx + i);
      for (int n = 0; n < N; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], a[n], b);
    }
  }
  if (i < to) {
    const __mmask32 tail = (__mmask32)((1u << (to - i)) - 1);
    for (int m = 0; m < M; m++) {
      const __m512bh b = (__m512bh)_mm512_loadu_si512(x + m * ldx + i);
      for (int n = 0; n < N; n++)
        sum[m][n] = _mm512_dpbf16_ps(sum[m][n], (__m512bh)_mm512_maskz_loadu_epi16(tail, w + n * ldw + i), b);
    }
  }
  for (int m = 0; m < M; m++) put_sums<N>(sum[m], from > 0, acc + m * TILE);
#else
  int64_t i = from;
  for (; i + W <= to; i += W) {
    V a[N];
    for (int n = 0; n < N; n++) a[n] = v_bf16(w + n * ldw + i);
    for (int m = 0; m < M; m++) {
      const V b = v_bf16(x + m * ldx + i);
      for (int n = 0; n < N; n++) sum[m][n] = v_fma(a[n], b, sum[m][n]);
    }
  }
  for (int m = 0; m < M; m++) {
    put_sums<N>(sum[m], from > 0, acc + m * TILE);
    for (int n = 0; n < N; n++)
      for (int64_t j = i; j < to; j++) acc[m * TILE + n] += one_bf16(w[n * ldw + j]) * one_bf16(x[m * ldx + j]);
  }
#endif
}

#if defined(ISA_BF16)
// One row of x with four rows of the weight, one after another: what it waits for is memory, which is fastest in order. The
// sums are those of `dot_block`, each stretch of columns apart.
constexpr int64_t STRETCHES = 16;

static inline void dot_one(const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t begin, int64_t in, float* acc) {
  V sum[STRETCHES][4];
  for (int n = 0; n < 4; n++) {
    const uint16_t* row = w + n * ldw;
    for (int64_t from = begin, stretch = 0; from < in; from += DEEP, stretch++) {
      const int64_t to = from + DEEP < in ? from + DEEP : in;
      V own = v_zero();
      int64_t i = from;
      for (; i + 32 <= to; i += 32) {
        _mm_prefetch((const char*)(row + i) + READ_AHEAD, _MM_HINT_T0);
        own = _mm512_dpbf16_ps(own, (__m512bh)_mm512_loadu_si512(row + i), (__m512bh)_mm512_loadu_si512(x + i));
      }
      if (i < to) {
        const __mmask32 tail = (__mmask32)((1u << (to - i)) - 1);
        own = _mm512_dpbf16_ps(own, (__m512bh)_mm512_maskz_loadu_epi16(tail, row + i), (__m512bh)_mm512_loadu_si512(x + i));
      }
      sum[stretch][n] = own;
    }
  }
  for (int64_t from = begin, stretch = 0; from < in; from += DEEP, stretch++) put_sums<4>(sum[stretch], from > 0, acc);
}
#else
constexpr int64_t STRETCHES = 1;

static inline void dot_one(const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t begin, int64_t in, float* acc) {
  dot_block<4, 1>(w, ldw, x, 0, begin, in, acc);
}
#endif

#if defined(ISA_BF16)
constexpr int MANY = 6;
#else
constexpr int MANY = 2;
#endif

// acc[m * TILE + n] += w[n] · x[m] in float32; both have rows of `stride` entries, a multiple of 32.
template <int N, int M>
static inline void wide_block(const float* w, const float* x, int64_t stride, float* acc) {
  V sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sum[m][n] = v_zero();
  for (int64_t i = 0; i < stride; i += W) {
    V a[N];
    for (int n = 0; n < N; n++) a[n] = v_load(w + n * stride + i);
    for (int m = 0; m < M; m++) {
      const V b = v_load(x + m * stride + i);
      for (int n = 0; n < N; n++) sum[m][n] = v_fma(a[n], b, sum[m][n]);
    }
  }
  for (int m = 0; m < M; m++) put_sums<N>(sum[m], true, acc + m * TILE);
}

constexpr int ABREAST = 4;  // unpacked rows that are multiplied side by side

template <int N>
static void wide_rows(const float* w, const float* x, int64_t stride, int64_t rows, float* acc) {
  int64_t m = 0;
  for (; m + MANY <= rows; m += MANY) wide_block<N, MANY>(w, x + m * stride, stride, acc + m * TILE);
  for (; m + 2 <= rows; m += 2) wide_block<N, 2>(w, x + m * stride, stride, acc + m * TILE);
  for (; m < rows; m++) wide_block<N, 1>(w, x + m * stride, stride, acc + m * TILE);
}

template <int N>
static void dot_rows(const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t ldx, int64_t rows, int64_t from, int64_t to,
                     float* acc) {
  int64_t m = 0;
  for (; m + MANY <= rows; m += MANY) dot_block<N, MANY>(w, ldw, x + m * ldx, ldx, from, to, acc + m * TILE);
  for (; m + 2 <= rows; m += 2) dot_block<N, 2>(w, ldw, x + m * ldx, ldx, from, to, acc + m * TILE);
  for (; m < rows; m++) dot_block<N, 1>(w, ldw, x + m * ldx, ldx, from, to, acc + m * TILE);
}

static void dot_tile(const uint16_t* w, int64_t ldw, int64_t height, const uint16_t* x, int64_t ldx, int64_t rows,
                     int64_t in, float* acc) {
  int64_t first = 0;
  if (rows == 1)
    for (; first + 4 <= height; first += 4)
      for (int64_t from = 0; from < in; from += STRETCHES * DEEP)
        dot_one(w + first * ldw, ldw, x, from, from + STRETCHES * DEEP < in ? from + STRETCHES * DEEP : in, acc + first);
  for (int64_t from = 0; from < in; from += DEEP) {
    const int64_t to = from + DEEP < in ? from + DEEP : in;
    int64_t n = first;
    for (; n + 4 <= height; n += 4) dot_rows<4>(w + n * ldw, ldw, x, ldx, rows, from, to, acc + n);
    for (; n < height; n++) dot_rows<1>(w + n * ldw, ldw, x, ldx, rows, from, to, acc + n);
  }
}

#if defined(ISA_BF16)

// Woven planes, 16 rows at a time: a word of each lies in one vector of 64 bytes.

// acc[n] += scale[n] * Σ ±x, by the tables of x. B blocks of 16 rows share the loads of the tables.
template <int B>
static inline void look_up(const uint32_t* words, int64_t count, const Tables& x, const float* scale, int by_row, float* acc) {
  const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
  const __m512i which = _mm512_set1_epi32(0x30201000);  // byte g of a word belongs to the g-th table of 16 entries
  __m512i low[B], high[B];
  for (int b = 0; b < B; b++) low[b] = high[b] = _mm512_setzero_si512();
  const uint8_t* t = x.sums;
  for (int64_t i = 0; i < count; i++, t += 256) {
    const __m512i low0 = _mm512_loadu_si512(t), high0 = _mm512_loadu_si512(t + 64);
    const __m512i low1 = _mm512_loadu_si512(t + 128), high1 = _mm512_loadu_si512(t + 192);
    for (int b = 0; b < B; b++) {
      const uint32_t* from = words + (b * count + i) * WEAVE;
      _mm_prefetch((const char*)from + AHEAD, _MM_HINT_T0);
      const __m512i w = _mm512_loadu_si512(from);
      const __m512i first = _mm512_ternarylogic_epi32(w, nibble, which, 0xEA);  // (w & nibble) | which
      const __m512i second = _mm512_ternarylogic_epi32(_mm512_srli_epi16(w, 4), nibble, which, 0xEA);
      low[b] = _mm512_dpbusd_epi32(low[b], _mm512_permutexvar_epi8(first, low0), ones);
      high[b] = _mm512_dpbusd_epi32(high[b], ones, _mm512_permutexvar_epi8(first, high0));
      low[b] = _mm512_dpbusd_epi32(low[b], _mm512_permutexvar_epi8(second, low1), ones);
      high[b] = _mm512_dpbusd_epi32(high[b], ones, _mm512_permutexvar_epi8(second, high1));
    }
  }
  for (int b = 0; b < B; b++) {
    const V sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[b], 8), low[b]));
    const V by = v_mul(v_set(x.step), by_row ? v_load(scale + b * WEAVE) : v_set(*scale));
    v_store(acc + b * WEAVE, v_fma(by, sum, v_load(acc + b * WEAVE)));
  }
}

// The same without rounding x: signs as bfloat16 times x in woven order, 8 rows.
static inline void multiply_signs(const uint32_t* words, int64_t count, const uint16_t* x, const float* scale, int by_row, float* acc) {
  const __m512i plus = _mm512_set1_epi16(0x3F80), minus = _mm512_set1_epi16((short)0xBF80);
  V sum[8];
  for (int n = 0; n < 8; n++) sum[n] = v_zero();
  for (int64_t i = 0; i < count; i++) {
    _mm_prefetch((const char*)(words + i * WEAVE) + AHEAD, _MM_HINT_T0);
    const __m512bh b = (__m512bh)_mm512_loadu_si512(x + i * 32);
    for (int n = 0; n < 8; n++)
      sum[n] = _mm512_dpbf16_ps(sum[n], (__m512bh)_mm512_mask_blend_epi16((__mmask32)words[i * WEAVE + n], minus, plus), b);
  }
  float found[8];
  put_sums<8>(sum, false, found);
  for (int n = 0; n < 8; n++) acc[n] += (by_row ? scale[n] : *scale) * found[n];
}

// Rows past the last are words of zeros, whose sums fall into the part of `acc` that is not read; their scales are there.
static void add_woven(const Term& t, const Product& p, int64_t row, int64_t rows, int64_t n0, int64_t height, float* acc) {
  const int by_row = t.axis == ROW;
  for (int plane = 0; plane < t.planes; plane++) {
    for (int64_t m = 0; m < rows; m++) {
      const Tables& x = p.tables[row + m];
      float* to = acc + m * TILE;
      for (int64_t n = 0; n < height;) {
        const uint32_t* words = t.packed[plane] + (n0 + n) * t.words;
        const float* scale = t.scales[plane] + by_row * (n0 + n);
        if (!x.sums) {
          for (int half = 0; half < WEAVE; half += 8)
            multiply_signs(words + half, t.words, p.woven + (row + m) * p.stride, scale + by_row * half, by_row, to + n + half);
          n += WEAVE;
        } else if (n + 4 * WEAVE <= height) {
          look_up<4>(words, t.words, x, scale, by_row, to + n);
          n += 4 * WEAVE;
        } else if (n + WEAVE < height) {
          look_up<2>(words, t.words, x, scale, by_row, to + n);
          n += 2 * WEAVE;
        } else {
          look_up<1>(words, t.words, x, scale, by_row, to + n);
          n += WEAVE;
        }
      }
    }
  }
}

// Whole numbers of at most 14 bits, so that a sum of four fits two bytes. What is lost is at most half a step of 1/8191 of the
// largest entry; where that is more than 64 times the typical one (an outlier), the row is multiplied exactly instead.
static void tabulate(const uint16_t* x, int64_t in, int64_t stride, uint16_t* woven, uint8_t* sums, Tables* tables) {
  alignas(64) uint16_t order[32];
  for (int p = 0; p < 32; p++) order[p] = (uint16_t)woven_column(p);
  const __m512i shuffle = _mm512_load_si512(order);
  V most = v_zero(), square = v_zero();
  for (int64_t i = 0; i < stride; i += 32) {
    _mm512_storeu_si512(woven + i, _mm512_permutexvar_epi16(shuffle, _mm512_loadu_si512(x + i)));
    for (int half = 0; half < 32; half += 16) {
      const V v = v_bf16(x + i + half);
      most = _mm512_max_ps(most, _mm512_abs_ps(v));
      square = v_fma(v, v, square);
    }
  }
  const float largest = _mm512_reduce_max_ps(most);
  const float typical2 = v_sum(square) / (float)in;  // not the stride, which depends on how many rows there are
  if (!sums || !(largest * largest <= 4096.f * typical2) || !(largest <= 1e37f)) {  // also where an entry is NaN
    *tables = Tables{};
    return;
  }
  const float step = largest > 0 ? largest / 8191.f : 1.f;
  const V by = v_set(1.f / step);
  alignas(64) int16_t sign[4][32];  // of column j in pattern p, for two tables side by side
  for (int j = 0; j < 4; j++)
    for (int p = 0; p < 32; p++) sign[j][p] = (int16_t)(p >> j & 1 ? 1 : -1);
  __m512i pattern[4];
  for (int j = 0; j < 4; j++) pattern[j] = _mm512_load_si512(sign[j]);
  for (int64_t i = 0; i < stride; i += 16) {
    alignas(64) int16_t q[32] = {};
    _mm256_store_si256((__m256i*)q, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v_mul(v_bf16(x + i), by))));
    uint8_t* low = sums + i * SUMS;
    for (int two = 0; two < 2; two++) {  // tables 2·two and 2·two + 1 of the four
      __m512i sum = _mm512_setzero_si512();
      for (int j = 0; j < 4; j++) {
        const __m512i pair = _mm512_inserti64x4(_mm512_set1_epi16(q[8 * two + j]), _mm256_set1_epi16(q[8 * two + 4 + j]), 1);
        sum = _mm512_add_epi16(sum, _mm512_mullo_epi16(pair, pattern[j]));
      }
      _mm256_storeu_si256((__m256i*)(low + 32 * two), _mm512_cvtepi16_epi8(sum));
      _mm256_storeu_si256((__m256i*)(low + 64 + 32 * two), _mm512_cvtepi16_epi8(_mm512_srai_epi16(sum, 8)));
    }
  }
  *tables = Tables{sums, step};
}

#else

static void tabulate(const uint16_t*, int64_t, int64_t, uint16_t*, uint8_t*, Tables*) {}

#endif

// acc[m * TILE + n] += scale[n] * Σ ±x[m] of a plane, in float32.
template <int N>
static inline void sign_rows(const Term& t, int plane, const Product& p, int64_t row, int64_t rows, int64_t n0, float* acc) {
  const int by_row = t.axis == ROW;
  const float* scale = t.scales[plane] + by_row * n0;
  for (int64_t m = 0; m < rows; m++) {
    const float* x = p.wide + (row + m) * p.stride;
    V sum[N];
    for (int n = 0; n < N; n++) sum[n] = v_zero();
    for (int64_t i = 0; i < t.words; i++) {
      uint32_t bits[N], kept[N];
      for (int n = 0; n < N; n++) bits[n] = plane_word(t, plane, n0 + n, i);
      if (t.mask)
        for (int n = 0; n < N; n++) kept[n] = t.mask[(n0 + n) * t.words + i];
      for (int lane = 0; lane < 32; lane += W) {
        const V b = v_load(x + i * 32 + lane);
        for (int n = 0; n < N; n++) {
          const V sign = v_signs(bits[n] >> lane);
          sum[n] = v_fma(t.mask ? v_keep(kept[n] >> lane, sign) : sign, b, sum[n]);
        }
      }
    }
    for (int n = 0; n < N; n++) acc[m * TILE + n] += scale[by_row * n] * v_sum(sum[n]);
  }
}

static void add_signs(const Term& t, const Product& p, int64_t row, int64_t rows, int64_t n0, int64_t height, float* acc) {
#if defined(ISA_BF16)
  if (t.woven && p.tables) return add_woven(t, p, row, rows, n0, height, acc);
#endif
  for (int plane = 0; plane < t.planes; plane++) {
    int64_t n = 0;
    for (; n + 4 <= height; n += 4) sign_rows<4>(t, plane, p, row, rows, n0 + n, acc + n);
    for (; n < height; n++) sign_rows<1>(t, plane, p, row, rows, n0 + n, acc + n);
  }
}

static void add_lowrank(const Term& t, const float* shrunk, int64_t rows, int64_t n0, int64_t height, float* room, float* acc) {
  if (t.left_term) {  // stored (rank, out): a row of it belongs to one number of each token
    for (int64_t r = 0; r < t.rank; r++) {
      decode(*t.left_term, r, n0, n0 + height, room);
      for (int64_t m = 0; m < rows; m++) {
        const float by = shrunk[m * t.rank + r];
        for (int64_t n = 0; n < height; n++) acc[m * TILE + n] += by * room[n];
      }
    }
    return;
  }
  const int size = t.dtype == F32 ? 4 : 2;
  const int64_t whole = t.rank / W * W;
  for (int64_t n = 0; n < height; n++) {
    widen((const char*)t.left + (n0 + n) * t.rank * size, t.dtype, t.rank, room);
    for (int64_t m = 0; m < rows; m++) {
      const float* own = shrunk + m * t.rank;
      V sum = v_zero();
      for (int64_t i = 0; i < whole; i += W) sum = v_fma(v_load(room + i), v_load(own + i), sum);
      float total = v_sum(sum);
      for (int64_t i = whole; i < t.rank; i++) total += room[i] * own[i];
      acc[m * TILE + n] += total;
    }
  }
}

// Ask for the beginning of a term's tile while another tenant's is worked on.
static inline void fetch(const Term& t, int64_t n0, int64_t height) {
  if (t.kind != SIGNS || !t.woven) return;
  const char* from = (const char*)(t.packed[0] + n0 * t.words);
  const int64_t bytes = height * t.words * 4;
  for (int64_t at = 0; at < bytes && at < AHEAD; at += 64) __builtin_prefetch(from + at);
}

// to[m * TILE] += gain * Σ entry[e] * x[m][column[e]], for the rows from `first` to `last` of P panels of x. Four sums hide how long an
// addition takes; entry e always goes into sum e % 4, so that a row gets the same whatever stands beside it.
template <int P>
static inline void gather(const float* entry, const uint32_t* column, int64_t count, const float* panel, int64_t in,
                          int64_t first, int64_t last, float gain, float* to) {
  constexpr int S = (int)(PANEL / W);
  for (int part = 0; part < S; part++) {
    V sum[4][P];
    for (int k = 0; k < 4; k++)
      for (int i = 0; i < P; i++) sum[k][i] = v_zero();
    int64_t e = 0;
    for (; e + 4 <= count; e += 4)
      for (int k = 0; k < 4; k++) {
        const V by = v_set(entry[e + k]);
        const int64_t at = column[e + k] * PANEL + part * W;
        for (int i = 0; i < P; i++) sum[k][i] = v_fma(by, v_load(panel + i * in * PANEL + at), sum[k][i]);
      }
    for (int k = 0; e < count; e++, k++) {
      const V by = v_set(entry[e]);
      const int64_t at = column[e] * PANEL + part * W;
      for (int i = 0; i < P; i++) sum[k][i] = v_fma(by, v_load(panel + i * in * PANEL + at), sum[k][i]);
    }
    for (int i = 0; i < P; i++) {
      float found[W];
      v_store(found, v_mul(v_set(gain), v_add(v_add(sum[0][i], sum[1][i]), v_add(sum[2][i], sum[3][i]))));
      for (int lane = 0; lane < W; lane++) {
        const int64_t m = i * PANEL + part * W + lane;
        if (m >= first && m < last) to[(m - first) * TILE] += found[lane];
      }
    }
  }
}

// acc[m * TILE + n] += the kept entries of a sparse row times x[m].
static void add_kept(const Term& t, const Product& p, int64_t row, int64_t rows, int64_t n0, int64_t height, float* room, float* acc) {
  const int size = t.dtype == F32 ? 4 : t.dtype == CODES ? 1 : 2;
  uint32_t* column = (uint32_t*)(room + ABREAST * p.stride);
  for (int64_t n = 0; n < height; n++) {
    const int64_t from = t.first[n0 + n], count = t.first[n0 + n + 1] - from;
    widen((const char*)t.values + from * size, t.dtype, count, room);
    for (int64_t e = 0; e < count; e++) room[e] = room[e] * t.factor - t.zero;
    const uint32_t* words = t.mask + (n0 + n) * t.words;
    uint32_t* next = column;
    for (int64_t i = 0; i < t.words; i++)
      for (uint32_t rest = words[i]; rest; rest &= rest - 1) *next++ = (uint32_t)(i * 32 + __builtin_ctz(rest));
    const float gain = t.gain[t.gain_by_row ? n0 + n : 0];
    const int64_t end = row + rows;
    for (int64_t m = row; m < end;) {
      const int64_t base = m / PANEL * PANEL, all = (end - base + PANEL - 1) / PANEL, panels = all < 4 ? all : 4;
      const int64_t stop = base + panels * PANEL < end ? base + panels * PANEL : end;
      const float* panel = p.panels + base * p.in;
      float* to = acc + (m - row) * TILE + n;
      switch (panels) {
        case 1: gather<1>(room, column, count, panel, p.in, m - base, stop - base, gain, to); break;
        case 2: gather<2>(room, column, count, panel, p.in, m - base, stop - base, gain, to); break;
        case 3: gather<3>(room, column, count, panel, p.in, m - base, stop - base, gain, to); break;
        default: gather<4>(room, column, count, panel, p.in, m - base, stop - base, gain, to);
      }
      m = stop;
    }
  }
}

static void add_terms(const Group& g, const Product& p, int64_t begin, int64_t end, int64_t n0, int64_t height, float* room,
                      float* acc) {
  for (int i = 0; i < g.count; i++) {
    const Term& t = *g.terms[i];
    if (t.kind == LOWRANK) {
      add_lowrank(t, g.shrunk[i] + (begin - g.start) * t.rank, end - begin, n0, height, room, acc);
    } else if (t.kind == SIGNS && t.axis != COLUMN) {
      add_signs(t, p, begin, end - begin, n0, height, acc);
    } else if (t.kind == SPARSE) {
      add_kept(t, p, begin, end - begin, n0, height, room, acc);
    } else {
      const float* x = p.wide + begin * p.stride;
      int64_t n = 0;
      for (; n + ABREAST <= height; n += ABREAST) {
        for (int k = 0; k < ABREAST; k++) decode(t, n0 + n + k, 0, p.in, room + k * p.stride);
        wide_rows<ABREAST>(room, x, p.stride, end - begin, acc + n);
      }
      for (; n < height; n++) {
        decode(t, n0 + n, 0, p.in, room);
        wide_rows<1>(room, x, p.stride, end - begin, acc + n);
      }
    }
  }
}

// The rows W + Σ terms of a tile, rounded to bfloat16; no term is low-rank (two thin products are less work).
static void merge_tile(const Group& g, const Product& p, int64_t n0, int64_t height, float* room, uint16_t* tile) {
  float* sum = room + p.stride;
  for (int64_t n = 0; n < height; n++) {
    for (int64_t j = p.in; j < p.stride; j++) sum[j] = 0.f;
    widen(p.weight + (n0 + n) * p.in, BF16, p.in, sum);
    for (int i = 0; i < g.count; i++) {
      const Term& t = *g.terms[i];
      if (t.kind == SIGNS && t.axis != COLUMN && !t.mask) {
        for (int plane = 0; plane < t.planes; plane++) {
          const V scale = v_set(t.scales[plane][t.axis == ROW ? n0 + n : 0]);
          for (int64_t word = 0; word < t.words; word++) {
            const uint32_t bits = plane_word(t, plane, n0 + n, word);
            for (float* at = sum + word * 32; at < sum + (word + 1) * 32; at += W)
              v_store(at, v_fma(v_signs(bits >> (at - sum - word * 32)), scale, v_load(at)));
          }
        }
        continue;
      }
      decode(t, n0 + n, 0, p.in, room);
      for (int64_t j = 0; j < p.stride; j += W) v_store(sum + j, v_add(v_load(sum + j), v_load(room + j)));
    }
    for (int64_t j = p.in; j < p.stride; j++) sum[j] = 0.f;
    narrow(sum, p.stride, BF16, tile + n * p.stride);
  }
}

static void finish(const Product& p, int64_t row, int64_t n0, int64_t height, float* acc) {
  float line[TILE];
  const int size = p.y_dtype == F32 ? 4 : 2;
  char* to = (char*)p.y + (row * p.out + n0) * size;
  if (!p.weight) {
    widen(to, p.y_dtype, height, line);
    for (int64_t n = 0; n < height; n++) acc[n] += line[n];
  } else if (p.bias) {
    widen((const uint16_t*)p.bias + n0, BF16, height, line);
    for (int64_t n = 0; n < height; n++) acc[n] += line[n];
  }
  narrow(acc, height, p.y_dtype, to);
}

static void run(const Product& p, int64_t begin_row, int64_t end_row) {
  alignas(64) float acc[BLOCK * TILE];
  int64_t widest = p.stride;
  for (int64_t g = 0; g < p.n_groups; g++)
    for (int i = 0; i < p.groups[g].count; i++)
      if (p.groups[g].terms[i]->rank > widest) widest = p.groups[g].terms[i]->rank;
  // zeros, since rows of x may have a wider stride than an unpacked row fills: what is there is multiplied by zero
  float* room = (float*)__builtin_calloc((size_t)((ABREAST + 1) * widest + TILE + 64), 4);
  uint16_t* merged = nullptr;
  for (int64_t n0 = begin_row; n0 < end_row; n0 += p.tile) {
    const int64_t height = end_row - n0 < p.tile ? end_row - n0 : p.tile;
    for (int64_t g = 0; g < p.n_groups;) {
      const Group& own = p.groups[g];
      const bool merging = own.merged && p.weight;
      int64_t last = g + 1;  // groups that share the base's product
      if (!merging)
        while (last < p.n_groups && !(p.groups[last].merged && p.weight)) last++;
      const uint16_t* w = p.weight ? p.weight + n0 * p.in : nullptr;
      int64_t ldw = p.in;
      if (merging) {
        if (!merged) merged = (uint16_t*)__builtin_malloc((size_t)(p.tile * p.stride) * 2);
        merge_tile(own, p, n0, height, room, merged);
        w = merged;
        ldw = p.stride;
      }
      const int64_t stop = p.groups[last - 1].stop;
      int64_t at = g;  // the group of the block's first row
      for (int64_t begin = own.start; begin < stop; begin += BLOCK) {
        const int64_t end = begin + BLOCK < stop ? begin + BLOCK : stop;
        if (w)
          dot_tile(w, ldw, height, p.x + begin * p.stride, p.stride, end - begin, p.in, acc);
        else
          for (int64_t i = 0; i < (end - begin) * TILE; i++) acc[i] = 0.f;
        if (!merging) {
          while (at < last && p.groups[at].stop <= begin) at++;
          for (int64_t h = at; h < last && p.groups[h].start < end; h++) {
            const int64_t from = p.groups[h].start > begin ? p.groups[h].start : begin;
            const int64_t to = p.groups[h].stop < end ? p.groups[h].stop : end;
            if (from >= to) continue;
            if (h + 1 < last && p.groups[h + 1].count) fetch(*p.groups[h + 1].terms[0], n0, height);
            add_terms(p.groups[h], p, from, to, n0, height, room, acc + (from - begin) * TILE);
          }
        }
        for (int64_t m = begin; m < end; m++) finish(p, m, n0, height, acc + (m - begin) * TILE);
      }
      g = last;
    }
  }
  __builtin_free(room);
  __builtin_free(merged);
}

static void shrink(const Term& t, const float* x, int64_t stride, int64_t rows, float* into, int64_t first, int64_t last) {
  float* room = (float*)__builtin_malloc((size_t)stride * 4);
  const int size = t.dtype == F32 ? 4 : 2;
  for (int64_t i = 0; i < stride; i++) room[i] = 0.f;
  for (int64_t r = first; r < last; r++) {
    if (t.right_term)
      decode(*t.right_term, r, 0, t.in, room);
    else
      widen((const char*)t.right + r * t.in * size, t.dtype, t.in, room);
    for (int64_t m = 0; m < rows; m++) into[m * t.rank + r] = *t.gain * dot_wide(room, x + m * stride, stride);
  }
  __builtin_free(room);
}
