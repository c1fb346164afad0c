// Parts of attention for few rows in bfloat16: a decoding request reads each key and value once, and nothing is copied
// between. The sums are those of attention_tiles.inc.hpp to the last bit.

#if defined(ISA_BF16)
static inline void ask(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);  // the first cache has too few misses under way
}

template <int M, int B>  // B blocks of keys side by side hide the time that a sum waits for the one before
static inline void score_blocks(const char* const* rows, int64_t stride, const Room& room, float* to) {
  V sum[B][M];
  for (int b = 0; b < B; b++)
    for (int m = 0; m < M; m++) sum[b][m] = v_zero();
  for (int64_t u = 0; u < room.units; u += 4)
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
      V key[4];
      turn_four(rows[b] + u * 4, stride, key);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) sum[b][m] = product<true>(sum[b][m], key[i], room.q + m * room.step + u + i);
    }
  for (int b = 0; b < B; b++)
    for (int m = 0; m < M; m++) v_store(to + m * CHUNK + b * KEYS, sum[b][m]);
}

template <int M>
static void score_few(const Attention& a, const Chunk& c, Room& room) {
  const int64_t row = a.dim * 2, slab = KEYS * row;
  for (int64_t at = c.first / KEYS * KEYS; at < c.last; at += 2 * KEYS) {
    const char* rows[2];
    const int count = at + KEYS < c.last ? 2 : 1;
    int64_t stride = row;
    for (int b = 0; b < count; b++) {
      const int64_t from = (c.block[at / KEYS + b] * a.kv_heads + c.head) * slab;
      rows[b] = (const char*)a.k + from;
      ask((const char*)a.v + from, slab);
      if (row % 16) rows[b] = copy_keys(rows[b], row, room, b);
    }
    if (row % 16) stride = room.wide * 4;
    count == 2 ? score_blocks<M, 2>(rows, stride, room, room.scores + at) : score_blocks<M, 1>(rows, stride, room, room.scores + at);
  }
}

template <int M, int N>
static inline void value_tile(const Attention& a, const Chunk& c, int64_t d, const Chunk* next, Room& room) {
  const int64_t row = a.dim * 2, slab = KEYS * row;
  const __m512i each = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2,
                                        1, 1, 0, 0);
  const __m512i low = _mm512_mask_add_epi16(each, 0xAAAAAAAA, each, _mm512_set1_epi16(32));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  uint32_t have[N / 2];
  for (int n = 0; n < N / 2; n++) have[n] = a.dim - d - n * 32 >= 32 ? ~0u : (1u << (a.dim - d - n * 32)) - 1;
  V sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sum[m][n] = v_mul(v_load(room.sums + m * room.wide + d + n * W), v_set(room.fade[m]));
  for (int64_t at = c.first / 2 * 2; at < c.last; at += 2) {
    const int64_t block = at / KEYS;
    const char* p = (const char*)a.v + (c.block[block] * a.kv_heads + c.head) * slab + at % KEYS * row + d * 2;
    if (next && block >= next->first / KEYS && block * KEYS < next->last)
      ask((const char*)a.k + (next->block[block] * a.kv_heads + next->head) * slab + at % KEYS * row, 2 * row);
    const uint32_t even = at >= c.first ? ~0u : 0, odd = at + 1 < c.last ? ~0u : 0;  // unseen ones may hold anything
    V value[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; n += 2) {
      const __m512i x = _mm512_maskz_loadu_epi16(have[n / 2] & even, p + n * 32);
      const __m512i y = _mm512_maskz_loadu_epi16(have[n / 2] & odd, p + row + n * 32);
      value[n] = (V)_mm512_permutex2var_epi16(x, low, y);
      value[n + 1] = (V)_mm512_permutex2var_epi16(x, high, y);
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) sum[m][n] = product<true>(sum[m][n], value[n], room.weights + m * (CHUNK / 2) + at / 2);
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) v_store(room.sums + m * room.wide + d + n * W, sum[m][n]);
}

template <int M>
static void value_few(const Attention& a, const Chunk& c, const Chunk* next, Room& room) {
  int64_t d = 0;
  for (; a.dim - d > 32; d += 64, next = nullptr) value_tile<M, 4>(a, c, d, next, room);
  if (d < a.dim) value_tile<M, 2>(a, c, d, next, room);
}
#endif
