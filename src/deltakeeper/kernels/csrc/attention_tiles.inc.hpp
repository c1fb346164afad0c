// Parts of attention: chunks of keys and values of any dtype brought into shape, and sums over them for many rows.

constexpr int64_t CHUNK = 64;

#if defined(ISA_AVX512)
constexpr int MOST_ROWS = 4, MOST_VECTORS = 4;
#elif defined(ISA_AVX2)
constexpr int MOST_ROWS = 4, MOST_VECTORS = 2;
#else
constexpr int MOST_ROWS = 2, MOST_VECTORS = 4;
#endif

// Memory of one thread, for the rows (query, head) of a span.
struct Room {
  float* keys;     // (units, CHUNK): floats, or pairs of bfloat16
  float* values;   // (CHUNK, wide): floats, or (CHUNK / 2, wide) of pairs
  float* q;        // (rows, step)
  float* scores;   // (rows, CHUNK)
  float* weights;  // (rows, CHUNK) floats, which are the scores, or (rows, CHUNK / 2) of pairs
  float* sums;     // (rows, wide)
  float* total;    // (rows, W) lanes of the sum of the weights
  float* top;      // (rows)
  float* fade;     // (rows) factor of what was summed before this chunk
  float* line;     // (2, KEYS, wide) keys copied or widened
  int64_t units, step, wide;  // of a key, of a row of q, of a row of values
};

struct Chunk {
  int64_t head;         // of keys
  int64_t start;        // position of the first key
  int64_t first, last;  // keys that some row sees, relative to `start`
  int64_t block[CHUNK / KEYS];
};

static inline int64_t past(int64_t position, int64_t window) {  // the first key that a query sees
  return window && position >= window ? position - window + 1 : 0;
}

// The chunk that begins at `start`, for queries at positions from `position` to before `end`; nothing where that is past them.
static inline Chunk chunk_at(const Attention& a, const Span& span, int64_t start, int64_t position, int64_t end) {
  Chunk c;
  const int64_t begin = past(position, a.window);
  const int32_t* table = a.tables + span.request * a.table + start / KEYS;
  c.head = span.kv_head;
  c.start = start;
  c.first = begin > start ? begin - start : 0;
  c.last = end - start < CHUNK ? end - start : CHUNK;
  for (int64_t i = c.first / KEYS; i * KEYS < c.last; i++) c.block[i] = table[i];
  return c;
}

static inline uint32_t span_bits(int64_t from, int64_t to) {  // bits from ≤ i < to of the first 16
  const int64_t a = from < 0 ? 0 : from > 16 ? 16 : from, b = to < 0 ? 0 : to > 16 ? 16 : to;
  return ((1u << b) - 1) & ~((1u << a) - 1);
}

#if defined(ISA_AVX512) || defined(ISA_AVX2)
static inline V quads(const char* p, int64_t stride) {  // four entries of each of W / 4 rows
#if defined(ISA_AVX512)
  V a = _mm512_castps128_ps512(_mm_loadu_ps((const float*)p));
  a = _mm512_insertf32x4(a, _mm_loadu_ps((const float*)(p + stride)), 1);
  a = _mm512_insertf32x4(a, _mm_loadu_ps((const float*)(p + 2 * stride)), 2);
  return _mm512_insertf32x4(a, _mm_loadu_ps((const float*)(p + 3 * stride)), 3);
#else
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float*)p)), _mm_loadu_ps((const float*)(p + stride)), 1);
#endif
}
#if defined(ISA_AVX512)
#define V_LOW _mm512_unpacklo_ps
#define V_HIGH _mm512_unpackhi_ps
#define V_LOW2(a, b) _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
#define V_HIGH2(a, b) _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
#else
#define V_LOW _mm256_unpacklo_ps
#define V_HIGH _mm256_unpackhi_ps
#define V_LOW2(a, b) _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)))
#define V_HIGH2(a, b) _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)))
#endif
#endif

#if defined(ISA_AVX512) || defined(ISA_AVX2)
// Four 32-bit entries of each of W rows to four vectors, a lane for each row.
__attribute__((always_inline)) static inline void turn_four(const char* p, int64_t stride, V* to) {
  const V a = quads(p, 4 * stride), b = quads(p + stride, 4 * stride);
  const V c = quads(p + 2 * stride, 4 * stride), d = quads(p + 3 * stride, 4 * stride);
  const V ab = V_LOW(a, b), cd = V_LOW(c, d), xy = V_HIGH(a, b), zw = V_HIGH(c, d);
  to[0] = V_LOW2(ab, cd), to[1] = V_HIGH2(ab, cd), to[2] = V_LOW2(xy, zw), to[3] = V_HIGH2(xy, zw);
}
#endif

// W rows of `units` 32-bit entries to columns: to[u * CHUNK + row]. `units` is a multiple of 4.
static inline void turn(const char* rows, [[maybe_unused]] int64_t stride, int64_t units, float* to) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  for (int64_t u = 0; u < units; u += 4) {
    V column[4];
    turn_four(rows + u * 4, stride, column);
    for (int i = 0; i < 4; i++) v_store(to + (u + i) * CHUNK, column[i]);
  }
#else
  for (int64_t u = 0; u < units; u++) to[u * CHUNK] = ((const float*)rows)[u];
#endif
}

// A block of keys to where reading past the end of a row does no harm.
static inline const char* copy_keys(const char* rows, int64_t row, Room& room, int64_t which) {
  float* line = room.line + which * KEYS * room.wide;
  for (int64_t i = 0; i < KEYS; i++) __builtin_memcpy(line + i * room.wide, rows + i * row, (size_t)row);
  return (const char*)line;
}

template <int D, bool PAIRS>
static void pack_keys(const Attention& a, const Chunk& c, Room& room) {
  const int size = D == F32 ? 4 : 2;
  const int64_t row = a.dim * size;
  const bool direct = (D == F32 || PAIRS) && row % 16 == 0;
  for (int64_t at = c.first / KEYS * KEYS; at < c.last; at += KEYS) {
    const char* rows = (const char*)a.k + (c.block[at / KEYS] * a.kv_heads + c.head) * KEYS * row;
    int64_t stride = row;
    if (!direct) {
      stride = room.wide * 4;
      if (PAIRS) {
        rows = copy_keys(rows, row, room, 0);
      } else {
        for (int64_t i = 0; i < KEYS; i++)
          for (int64_t d = 0; d < a.dim; d += W)
            v_store(room.line + i * room.wide + d, v_get<D>(rows + i * row + d * size, a.dim - d));
        rows = (const char*)room.line;
      }
    }
    for (int64_t i = 0; i < KEYS; i += W) turn(rows + i * stride, stride, room.units, room.keys + at + i);
  }
}

template <int D, bool PAIRS>
static void pack_values(const Attention& a, const Chunk& c, Room& room) {
  const int size = D == F32 ? 4 : 2;
  const int64_t row = a.dim * size;
  const char* base = (const char*)a.v;
#if defined(ISA_BF16)
  if (PAIRS) {
    alignas(64) uint16_t order[64];
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / 2 + 32 * (i % 2)), order[i + 32] = (uint16_t)(order[i] + 16);
    const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
    for (int64_t i = c.first / 2 * 2; i < c.last; i += 2) {
      const char* p = base + ((c.block[i / KEYS] * a.kv_heads + c.head) * KEYS + i % KEYS) * row;
      const uint32_t even = i >= c.first ? ~0u : 0, odd = i + 1 < c.last ? ~0u : 0;  // unseen ones may hold anything
      float* to = room.values + i / 2 * room.wide;
      for (int64_t d = 0; d < a.dim; d += 32) {
        const uint32_t have = a.dim - d >= 32 ? ~0u : (1u << (a.dim - d)) - 1;
        const __m512i x = _mm512_maskz_loadu_epi16(have & even, p + d * 2);
        const __m512i y = _mm512_maskz_loadu_epi16(have & odd, p + row + d * 2);
        _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(x, low, y));
        if (a.dim - d > 16) _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(x, high, y));
      }
    }
    return;
  }
#endif
  for (int64_t i = c.first; i < c.last; i++) {
    const char* p = base + ((c.block[i / KEYS] * a.kv_heads + c.head) * KEYS + i % KEYS) * row;
    float* to = room.values + i * room.wide;
    for (int64_t d = 0; d < a.dim; d += W) v_store(to + d, v_get<D>(p + d * size, a.dim - d));
  }
}

template <bool PAIRS>
__attribute__((always_inline)) static inline V product(V sum, V a, const float* by) {
#if defined(ISA_BF16)
  if (PAIRS) {
    int32_t two;
    __builtin_memcpy(&two, by, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(two));
  }
#endif
  return v_fma(a, v_set(*by), sum);
}

// to[m][i] = fade[m] · to[m][i] + Σ_u by[m][u] · what[u][i], for M rows and N vectors; without `fade`, just the sum.
template <bool PAIRS, int M, int N>
static inline void sum_tile(const float* what, int64_t step, int64_t count, const float* by, int64_t by_step, const float* fade,
                            float* to, int64_t to_step) {
  V sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++)
      sum[m][n] = fade ? v_mul(v_load(to + m * to_step + n * W), v_set(fade[m])) : v_zero();
  for (int64_t u = 0; u < count; u++) {
    V a[N];
    for (int n = 0; n < N; n++) a[n] = v_load(what + u * step + n * W);
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) sum[m][n] = product<PAIRS>(sum[m][n], a[n], by + m * by_step + u);
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) v_store(to + m * to_step + n * W, sum[m][n]);
}

template <bool PAIRS, int M>
static inline void sum_rows(const float* what, int64_t step, int64_t count, const float* by, int64_t by_step, const float* fade,
                            float* to, int64_t to_step, int64_t width) {
  int64_t i = 0;
  for (; i + MOST_VECTORS * W <= width; i += MOST_VECTORS * W)
    sum_tile<PAIRS, M, MOST_VECTORS>(what + i, step, count, by, by_step, fade, to + i, to_step);
  for (; i + 2 * W <= width; i += 2 * W) sum_tile<PAIRS, M, 2>(what + i, step, count, by, by_step, fade, to + i, to_step);
  for (; i < width; i += W) sum_tile<PAIRS, M, 1>(what + i, step, count, by, by_step, fade, to + i, to_step);
}

// The above for any number of rows; `width` is a multiple of W.
template <bool PAIRS>
static void sum_all(const float* what, int64_t step, int64_t count, const float* by, int64_t by_step, const float* fade,
                    float* to, int64_t to_step, int64_t width, int64_t rows) {
  int64_t m = 0;
  for (; m + MOST_ROWS <= rows; m += MOST_ROWS)
    sum_rows<PAIRS, MOST_ROWS>(what, step, count, by + m * by_step, by_step, fade ? fade + m : fade, to + m * to_step, to_step, width);
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  if (rows - m == 3) {
    sum_rows<PAIRS, 3>(what, step, count, by + m * by_step, by_step, fade ? fade + m : fade, to + m * to_step, to_step, width);
    m += 3;
  }
  if (rows - m == 2) {
    sum_rows<PAIRS, 2>(what, step, count, by + m * by_step, by_step, fade ? fade + m : fade, to + m * to_step, to_step, width);
    m += 2;
  }
#endif
  if (m < rows)
    sum_rows<PAIRS, 1>(what, step, count, by + m * by_step, by_step, fade ? fade + m : fade, to + m * to_step, to_step, width);
}
