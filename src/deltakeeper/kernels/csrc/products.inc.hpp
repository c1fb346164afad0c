// Products of one instruction set. Every sum over columns runs in one order whatever the number of rows beside it, so that
// what a row gets does not depend on its neighbours.

constexpr int64_t BLOCK = 64;  // rows of x whose sums are kept at a time: 64 × 32 floats stay in the first cache

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
constexpr int MANY = 6;
#else
constexpr int MANY = 2;
#endif

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
  for (int64_t from = 0; from < in; from += DEEP) {
    const int64_t to = from + DEEP < in ? from + DEEP : in;
    int64_t n = 0;
    if (rows == 1)
      for (; n + 8 <= height; n += 8) dot_block<8, 1>(w + n * ldw, ldw, x, ldx, from, to, acc + n);
    for (; n + 4 <= height; n += 4) dot_rows<4>(w + n * ldw, ldw, x, ldx, rows, from, to, acc + n);
    for (; n < height; n++) dot_rows<1>(w + n * ldw, ldw, x, ldx, rows, from, to, acc + n);
  }
}

// acc[m * TILE + n] += scale[n] * Σ ±x[m], of one plane; `words` and `mask` point at the first row of the block.
template <int N, int M, bool MASKED>
static inline void sign_block(const uint32_t* words, [[maybe_unused]] const uint32_t* mask, int64_t count,
                              [[maybe_unused]] const uint16_t* x, const float* wide, int64_t ldx, const float* scale, int by_row, float* acc) {
  V sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sum[m][n] = v_zero();
#if defined(ISA_BF16)
  if (x) {
    const __m512i plus = _mm512_set1_epi16(0x3F80), minus = _mm512_set1_epi16((short)0xBF80);
    for (int64_t start = 0; start < count; start += 16) {
      // the hardware does not follow rows of bits on its own: asking one page ahead nearly doubles the speed from memory
      for (int n = 0; n < N; n++) _mm_prefetch((const char*)(words + n * count + start) + AHEAD, _MM_HINT_T0);
      const int64_t stop = start + 16 < count ? start + 16 : count;
      for (int64_t i = start; i < stop; i++) {
        __m512bh b[M];
        for (int m = 0; m < M; m++) b[m] = (__m512bh)_mm512_loadu_si512(x + m * ldx + i * 32);
        for (int n = 0; n < N; n++) {
          __m512i sign = _mm512_mask_blend_epi16((__mmask32)words[n * count + i], minus, plus);
          if (MASKED) sign = _mm512_maskz_mov_epi16((__mmask32)mask[n * count + i], sign);
          for (int m = 0; m < M; m++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], (__m512bh)sign, b[m]);
        }
      }
    }
  } else
#endif
    for (int64_t i = 0; i < count; i++)
      for (int lane = 0; lane < 32; lane += W) {
        V b[M];
        for (int m = 0; m < M; m++) b[m] = v_load(wide + m * ldx + i * 32 + lane);
        for (int n = 0; n < N; n++) {
          V sign = v_signs(words[n * count + i] >> lane);
          if (MASKED) sign = v_keep(mask[n * count + i] >> lane, sign);
          for (int m = 0; m < M; m++) sum[m][n] = v_fma(sign, b[m], sum[m][n]);
        }
      }
  for (int m = 0; m < M; m++) {
    float found[N];
    put_sums<N>(sum[m], false, found);
    for (int n = 0; n < N; n++) acc[m * TILE + n] += scale[by_row * n] * found[n];
  }
}

template <int N, bool MASKED>
static inline void sign_rows(const uint32_t* words, const uint32_t* mask, int64_t count, const uint16_t* x,
                             const float* wide, int64_t ldx, int64_t rows, const float* scale, int by_row, float* acc) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    sign_block<N, 4, MASKED>(words, mask, count, x ? x + m * ldx : x, wide ? wide + m * ldx : wide, ldx, scale, by_row,
                             acc + m * TILE);
  for (; m < rows; m++)
    sign_block<N, 1, MASKED>(words, mask, count, x ? x + m * ldx : x, wide ? wide + m * ldx : wide, ldx, scale, by_row,
                             acc + m * TILE);
}

template <bool MASKED>
static void add_signs(const Term& t, const Product& p, int64_t row, int64_t rows, int64_t n0, int64_t height, float* acc) {
  const uint16_t* x = p.x ? p.x + row * p.stride : nullptr;
  const float* wide = p.wide ? p.wide + row * p.stride : nullptr;
#if !defined(ISA_BF16)
  x = nullptr;
#endif
  for (int plane = 0; plane < t.planes; plane++) {
    const int by_row = t.axis == ROW;
    int64_t n = 0;
    while (n < height) {
      const int64_t from = (n0 + n) * t.words;
      const uint32_t* words = t.packed[plane] + from;
      const uint32_t* mask = MASKED ? t.mask + from : nullptr;
      const float* scale = t.scales[plane] + by_row * (n0 + n);
      if (rows == 1 && n + 8 <= height) {
        sign_block<8, 1, MASKED>(words, mask, t.words, x, wide, p.stride, scale, by_row, acc + n);
        n += 8;
      } else if (n + 4 <= height) {
        sign_rows<4, MASKED>(words, mask, t.words, x, wide, p.stride, rows, scale, by_row, acc + n);
        n += 4;
      } else {
        sign_rows<1, MASKED>(words, mask, t.words, x, wide, p.stride, rows, scale, by_row, acc + n);
        n += 1;
      }
    }
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

static void add_terms(const Group& g, const Product& p, int64_t begin, int64_t end, int64_t n0, int64_t height, float* room,
                      float* acc) {
  for (int i = 0; i < g.count; i++) {
    const Term& t = *g.terms[i];
    if (t.kind == LOWRANK) {
      add_lowrank(t, g.shrunk[i] + (begin - g.start) * t.rank, end - begin, n0, height, room, acc);
    } else if (t.kind == SIGNS && t.axis != COLUMN) {
      t.mask ? add_signs<true>(t, p, begin, end - begin, n0, height, acc)
             : add_signs<false>(t, p, begin, end - begin, n0, height, acc);
    } else {
      for (int64_t n = 0; n < height; n++) {
        decode(t, n0 + n, 0, p.in, room);
        for (int64_t m = begin; m < end; m++)
          acc[(m - begin) * TILE + n] += dot_wide(room, p.wide + m * p.stride, p.stride);
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
          const uint32_t* words = t.packed[plane] + (n0 + n) * t.words;
          const V scale = v_set(t.scales[plane][t.axis == ROW ? n0 + n : 0]);
          for (int64_t j = 0; j < p.stride; j += W)
            v_store(sum + j, v_fma(v_signs(words[j / 32] >> (j % 32)), scale, v_load(sum + j)));
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

static void run(const Product& p, int64_t first_tile, int64_t last_tile) {
  alignas(64) float acc[BLOCK * TILE];
  int64_t widest = p.stride;
  for (int64_t g = 0; g < p.n_groups; g++)
    for (int i = 0; i < p.groups[g].count; i++)
      if (p.groups[g].terms[i]->rank > widest) widest = p.groups[g].terms[i]->rank;
  float* room = (float*)__builtin_malloc((size_t)(3 * widest + 64) * 4);
  uint16_t* merged = nullptr;
  for (int64_t tile = first_tile; tile < last_tile; tile++) {
    const int64_t n0 = tile * TILE;
    const int64_t height = p.out - n0 < TILE ? p.out - n0 : TILE;
    for (int64_t g = 0; g < p.n_groups;) {
      const Group& own = p.groups[g];
      const bool merging = own.merged && p.weight;
      int64_t last = g + 1;  // groups that share the base's product
      if (!merging)
        while (last < p.n_groups && !(p.groups[last].merged && p.weight)) last++;
      const uint16_t* w = p.weight ? p.weight + n0 * p.in : nullptr;
      int64_t ldw = p.in;
      if (merging) {
        if (!merged) merged = (uint16_t*)__builtin_malloc((size_t)(TILE * p.stride) * 2);
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
            if (from < to) add_terms(p.groups[h], p, from, to, n0, height, room, acc + (from - begin) * TILE);
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
