// Attention of one instruction set. Keys are taken in chunks that begin at multiples of CHUNK positions, and every sum runs
// in one order over them, so what a query gets depends on its own context alone: not on the other rows of the pass, nor on
// whether it came alone or in the middle of a prompt. Keys outside of what a query sees add exact zeros.
//
// A chunk of keys is turned on its side first, (dim, CHUNK), so that a vector holds one entry of many keys and no sum runs
// across lanes. Bfloat16 with dot products in hardware multiplies pairs of entries; the weights of the values are then
// rounded to bfloat16, and their sum is that of the rounded ones. All else is float32.

#include "attention_tiles.inc.hpp"
#include "attention_few.inc.hpp"

// Scores of a row to weights; keys low ≤ i < high of the chunk are seen, scores are there for `count` ones from `from` on.
template <bool PAIRS>
static inline void weigh(const Attention& a, int64_t low, int64_t high, int64_t from, int64_t count, int64_t row, Room& room) {
  float* s = room.scores + row * CHUNK;
  uint16_t* rounded = (uint16_t*)(room.weights + row * (CHUNK / 2));
  (void)rounded;
  if (low >= from + count || high <= from || low >= high) {
    for (int64_t i = from; i < from + count; i += W) {
      if (PAIRS)
        __builtin_memset(rounded + i, 0, W * 2);
      else
        v_store(s + i, v_zero());
    }
    room.fade[row] = 1.f;
    return;
  }
  const V scale = v_set(a.scale);
  V top = v_set(-__builtin_inff());
  for (int64_t i = from; i < from + count; i += W) {
    V x = v_mul(v_load(s + i), scale);
    if (a.softcap > 0) x = v_mul(v_set(a.softcap), v_tanh(v_div(x, v_set(a.softcap))));
    if (i < low || i + W > high) x = v_only(span_bits(low - i, high - i), x, -__builtin_inff());
    v_store(s + i, x);
    top = v_max(top, x);
  }
  const float before = room.top[row], found = v_top(top);
  const float now = found > before ? found : before;
  const V most = v_set(now), fade = v_exp(v_sub(v_set(before), most));
  V total = v_settle(v_mul(v_load(room.total + row * W), fade));  // rounded, also where zeros follow
  for (int64_t i = from; i < from + count; i += W) {
    const V p = v_exp(v_sub(v_load(s + i), most));
#if defined(ISA_BF16)
    if (PAIRS) {
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(p);
      _mm256_storeu_si256((__m256i*)(rounded + i), half);
      total = v_add(total, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
      continue;
    }
#endif
    v_store(s + i, p);
    total = v_add(total, p);
  }
  v_store(room.total + row * W, total);
  float fades[W];
  v_store(fades, fade);
  room.fade[row] = fades[0];
  room.top[row] = now;
}

// Where a span stands: its queries, and the context that they see.
struct Reach {
  int64_t tokens, rows, position, end, begin;
};

static inline Reach reach_of(const Attention& a, const Span& span) {
  const int64_t n = a.starts[span.request + 1] - a.starts[span.request];
  Reach r;
  r.tokens = n - span.first < a.tokens ? n - span.first : a.tokens;
  r.rows = r.tokens * (a.heads / a.kv_heads);
  r.position = a.lengths[span.request] - n + span.first;  // of the first query
  r.end = r.position + r.tokens;                          // past the last key that any row sees
  r.begin = past(r.position, a.window) / CHUNK * CHUNK;
  return r;
}

template <int D, bool PAIRS>
static inline void attend_chunk(const Attention& a, const Chunk& c, const Reach& reach, [[maybe_unused]] const Chunk* next, Room& room) {
  const int64_t from = c.first / KEYS * KEYS, count = (c.last - from + KEYS - 1) / KEYS * KEYS, rows = reach.rows;
#if defined(ISA_BF16)
  const bool few = PAIRS && rows <= 4;
  if (few) {
    rows == 1 ? score_few<1>(a, c, room) : rows == 2 ? score_few<2>(a, c, room) : rows == 3 ? score_few<3>(a, c, room) : score_few<4>(a, c, room);
  } else
#endif
  {
    pack_keys<D, PAIRS>(a, c, room);
    sum_all<PAIRS>(room.keys + from, CHUNK, room.units, room.q, room.step, nullptr, room.scores + from, CHUNK, count, rows);
  }
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t own = reach.position + r / group;
    weigh<PAIRS>(a, past(own, a.window) - c.start, own + 1 - c.start, from, count, r, room);
  }
#if defined(ISA_BF16)
  if (few) {
    rows == 1   ? value_few<1>(a, c, next, room)
    : rows == 2 ? value_few<2>(a, c, next, room)
    : rows == 3 ? value_few<3>(a, c, next, room)
                : value_few<4>(a, c, next, room);
    return;
  }
#endif
  pack_values<D, PAIRS>(a, c, room);
  const int64_t skip = PAIRS ? c.first / 2 : c.first, stop = PAIRS ? (c.last + 1) / 2 : c.last;
  sum_all<PAIRS>(room.values + skip * room.wide, room.wide, stop - skip, room.weights + skip, PAIRS ? CHUNK / 2 : CHUNK, room.fade,
                 room.sums, room.wide, (a.dim + W - 1) / W * W, rows);
}

template <int D, bool PAIRS>
static void attend_span(const Attention& a, const Span* span, const Span* past_last, Room& room) {
  const int size = D == F32 ? 4 : 2;
  const Reach reach = reach_of(a, *span);
  const int64_t group = a.heads / a.kv_heads, rows = reach.rows;
  const int64_t token = a.starts[span->request] + span->first, head = span->kv_head * group;
  for (int64_t r = 0; r < rows; r++) {
    const char* q = (const char*)a.q + ((token + r / group) * a.q_token + (head + r % group) * a.q_head) * size;
    float* to = room.q + r * room.step;
    if (PAIRS)
      __builtin_memcpy(to, q, (size_t)(a.dim * 2));
    else
      for (int64_t d = 0; d < a.dim; d += W) v_store(to + d, v_get<D>(q + d * size, a.dim - d));
    room.top[r] = -__builtin_inff();
    for (int64_t i = 0; i < W; i++) room.total[r * W + i] = 0.f;
    for (int64_t i = 0; i < room.wide; i++) room.sums[r * room.wide + i] = 0.f;
  }
  Chunk c = chunk_at(a, *span, reach.begin, reach.position, reach.end);
  for (int64_t start = reach.begin; start < reach.end; start += CHUNK) {
    Chunk next;  // whose keys are asked for in time
    const bool more = start + CHUNK < reach.end;
    if (more) {
      next = chunk_at(a, *span, start + CHUNK, reach.position, reach.end);
    } else if (span + 1 < past_last) {
      const Reach other = reach_of(a, span[1]);
      next = chunk_at(a, span[1], other.begin, other.position, other.end);
    }
    attend_chunk<D, PAIRS>(a, c, reach, more || span + 1 < past_last ? &next : nullptr, room);
    c = next;
  }
  for (int64_t r = 0; r < rows; r++) {
    float total = v_sum(v_load(room.total + r * W));
    float by = 1.f;
    if (a.sinks) {  // a key without a value
      const float sink = a.sinks[head + r % group], top = room.top[r] > sink ? room.top[r] : sink;
      float own[W], fade[W];
      v_store(own, v_exp(v_set(sink - top)));
      v_store(fade, v_exp(v_set(room.top[r] - top)));
      by = fade[0];
      total = total * by + own[0];
    }
    const V share = v_set(by / total);
    char* to = (char*)a.out + ((token + r / group) * a.heads + head + r % group) * a.dim * size;
    for (int64_t d = 0; d < a.dim; d += W)
      v_put<D>(to + d * size, v_mul(v_load(room.sums + r * room.wide + d), share), a.dim - d);
  }
}

static void attend(const Attention& a, int64_t first, int64_t last) {
#if defined(ISA_BF16)
  const bool pairs = a.dtype == BF16;
#else
  const bool pairs = false;
#endif
  Room room;
  const int64_t rows = a.tokens * (a.heads / a.kv_heads);
  room.wide = (a.dim + 31) / 32 * 32;
  room.units = ((pairs ? (a.dim + 1) / 2 : a.dim) + 3) / 4 * 4;
  room.step = (room.units + 15) / 16 * 16;
  const int64_t parts[] = {room.units * CHUNK, CHUNK * room.wide, rows * room.step, rows * CHUNK, pairs ? rows * CHUNK / 2 : 0,
                           rows * room.wide,   rows * W,          rows,              rows,         2 * KEYS * room.wide};
  float** to[] = {&room.keys, &room.values, &room.q, &room.scores, &room.weights,
                  &room.sums, &room.total,  &room.top, &room.fade, &room.line};
  int64_t all = 16;
  for (int64_t part : parts) all += (part + 15) / 16 * 16;
  char* memory = (char*)__builtin_malloc((size_t)all * 4);
  float* at = (float*)(((uintptr_t)memory + 63) / 64 * 64);
  for (int i = 0; i < 10; i++) {
    *to[i] = at;
    at += (parts[i] + 15) / 16 * 16;
  }
  if (!pairs) room.weights = room.scores;
  for (int64_t i = 0; i < rows * room.step; i++) room.q[i] = 0.f;  // what pads a row stays zero
  for (int64_t i = 0; i < 2 * KEYS * room.wide; i++) room.line[i] = 0.f;
  for (int64_t i = first; i < last; i++) {
#if defined(ISA_BF16)
    if (pairs) {
      attend_span<BF16, true>(a, a.spans + i, a.spans + last, room);
      continue;
    }
#endif
    if (a.dtype == F32)
      attend_span<F32, false>(a, a.spans + i, a.spans + last, room);
    else if (a.dtype == F16)
      attend_span<F16, false>(a, a.spans + i, a.spans + last, room);
    else
      attend_span<BF16, false>(a, a.spans + i, a.spans + last, room);
  }
  __builtin_free(memory);
}
