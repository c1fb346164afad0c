// What attention and the pointwise passes need beside vector.inc.hpp: rows of any dtype and length, rounding, e^x.

static inline float settle(float a) {  // keeps a product from being fused with the sum it goes into
#if defined(__x86_64__)
  __asm__("" : "+x"(a));
#elif defined(__aarch64__)
  __asm__("" : "+w"(a));
#endif
  return a;
}

#if defined(ISA_AVX512)

static inline V v_settle(V a) {
  __asm__("" : "+v"(a));
  return a;
}
static inline V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V v_div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V v_max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
static inline V v_min(V a, V b) { return _mm512_min_ps(a, b); }
static inline float v_top(V a) { return _mm512_reduce_max_ps(a); }
static inline V v_only(uint32_t bits, V a, float other) {  // `other` in the lanes whose bit is not set
  return _mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)bits, a);
}
static inline V v_two_to(V n, V a) { return _mm512_scalef_ps(a, n); }  // a · 2^n for a whole n
static inline V v_round_bf16(V a) {
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_mask_mov_epi32(near, nan, quiet), _mm512_set1_epi32((int)0xFFFF0000)));
}
static inline V v_round_f16(V a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }

// The first n entries at p, n ≤ W, as float32 with zeros after them; nothing past them is read.
template <int D>
static inline V v_get(const void* p, int64_t n) {
  const __mmask16 m = (__mmask16)(n >= 16 ? 0xFFFF : (1u << n) - 1);
  if (D == F32) return _mm512_maskz_loadu_ps(m, p);
  const __m256i half = _mm256_maskz_loadu_epi16(m, p);
  if (D == F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
template <int D>
static inline void v_put(void* p, V a, int64_t n) {  // rounds
  const __mmask16 m = (__mmask16)(n >= 16 ? 0xFFFF : (1u << n) - 1);
  if (D == F32)
    _mm512_mask_storeu_ps(p, m, a);
  else if (D == F16)
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  else
    _mm256_mask_storeu_epi16(
        p, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v_round_bf16(a)), 16)));
}

#elif defined(ISA_AVX2)

static inline V v_settle(V a) {
  __asm__("" : "+x"(a));
  return a;
}
static inline V v_sub(V a, V b) { return _mm256_sub_ps(a, b); }
static inline V v_div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V v_max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V v_min(V a, V b) { return _mm256_min_ps(a, b); }
static inline float v_top(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline V v_only(uint32_t bits, V a, float other) {
  return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(v_lanes(bits)));
}
static inline V v_two_to(V n, V a) {  // in two steps, so that results may be subnormal
  const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1), rest = _mm256_sub_epi32(all, half);
  const __m256i one = _mm256_set1_epi32(127);
  const V x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
  const V y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, x), y);
}
static inline V v_round_bf16(V a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const V nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const V all = _mm256_blendv_ps(_mm256_castsi256_ps(near), _mm256_castsi256_ps(quiet), nan);
  return _mm256_and_ps(all, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xFFFF0000)));
}
static inline V v_round_f16(V a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
template <int D>
static inline V v_get(const void* p, int64_t n) {
  alignas(32) char room[32];
  if (n < 8) {
    __builtin_memset(room, 0, sizeof room);
    __builtin_memcpy(room, p, (size_t)n * (D == F32 ? 4 : 2));
    p = room;
  }
  if (D == F32) return _mm256_loadu_ps((const float*)p);
  return D == F16 ? v_f16((const uint16_t*)p) : v_bf16((const uint16_t*)p);
}
template <int D>
static inline void v_put(void* p, V a, int64_t n) {
  __m256i room;
  if (D == F32) {
    room = _mm256_castps_si256(a);
  } else if (D == F16) {
    room = _mm256_castsi128_si256(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m256i u = _mm256_srli_epi32(_mm256_castps_si256(v_round_bf16(a)), 16);
    room = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
  }
  if (n >= 8 && D == F32)
    _mm256_storeu_si256((__m256i*)p, room);
  else if (n >= 8)
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(room));
  else
    __builtin_memcpy(p, &room, (size_t)n * (D == F32 ? 4 : 2));
}

#else

static inline V v_settle(V a) { return settle(a); }
static inline V v_sub(V a, V b) { return a - b; }
static inline V v_div(V a, V b) { return a / b; }
static inline V v_max(V a, V b) { return a > b ? a : b; }
static inline V v_min(V a, V b) { return a < b ? a : b; }
static inline float v_top(V a) { return a; }
static inline V v_only(uint32_t bits, V a, float other) { return bits & 1 ? a : other; }
static inline V v_two_to(V n, V a) {
  if (n != n) return n;
  const int32_t all = (int32_t)n, half = all >> 1, rest = all - half;
  const uint32_t u = (uint32_t)(half + 127) << 23, w = (uint32_t)(rest + 127) << 23;
  float x, y;
  __builtin_memcpy(&x, &u, 4);
  __builtin_memcpy(&y, &w, 4);
  return a * x * y;
}
static inline V v_round_bf16(V a) { return widen_bf16(to_bf16(a)); }
static inline V v_round_f16(V a) { return widen_f16(to_f16(a)); }
template <int D>
static inline V v_get(const void* p, int64_t n) {
  if (n < 1) return 0.f;
  if (D == F32) return *(const float*)p;
  return D == F16 ? widen_f16(*(const uint16_t*)p) : widen_bf16(*(const uint16_t*)p);
}
template <int D>
static inline void v_put(void* p, V a, int64_t n) {
  if (n < 1) return;
  if (D == F32)
    *(float*)p = a;
  else
    *(uint16_t*)p = D == F16 ? to_f16(a) : to_bf16(a);
}

#endif

template <int D>
static inline V v_round(V a) {
  return D == F32 ? a : D == F16 ? v_round_f16(a) : v_round_bf16(a);
}

// e^x within 1.1 units in the last place of a normal result; 0 from -104 down, infinite from 88.8 up, NaN stays NaN, 1 at 0.
static inline V v_exp(V x) {
  x = v_min(v_set(89.5f), v_max(v_set(-105.f), x));
  const V shift = v_set(12582912.f);  // 1.5 · 2^23: adding it rounds to a whole number
  const V n = v_sub(v_fma(x, v_set(1.44269504f), shift), shift);
  V f = v_fma(n, v_set(-0.693359375f), x);  // x - n · ln 2, with ln 2 in two parts
  f = v_fma(n, v_set(2.12194440e-4f), f);
  V p = v_fma(f, v_set(1.39262508e-3f), v_set(8.36323288e-3f));
  p = v_fma(p, f, v_set(4.16665542e-2f));
  p = v_fma(p, f, v_set(1.66665767e-1f));
  p = v_fma(p, f, v_set(0.5f));
  p = v_fma(p, v_mul(f, f), f);
  return v_two_to(n, v_add(p, v_set(1.f)));
}

// tanh x = 1 - 2 / (e^2x + 1), within 2e-7 of the true value.
static inline V v_tanh(V x) {
  const V e = v_exp(v_add(x, x));
  return v_sub(v_set(1.f), v_div(v_set(2.f), v_add(e, v_set(1.f))));
}
