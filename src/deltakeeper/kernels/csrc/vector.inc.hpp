// Float32 vectors of one instruction set, included once per set inside its namespace. Nothing here is inlined elsewhere:
// a template of the standard library compiled with AVX-512 on could replace its plain copy for the whole program.

#if defined(ISA_AVX512)

constexpr int W = 16;
typedef __m512 V;
static inline V v_zero() { return _mm512_setzero_ps(); }
static inline V v_set(float a) { return _mm512_set1_ps(a); }
static inline V v_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void v_store(float* p, V a) { _mm512_storeu_ps(p, a); }
static inline V v_add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline float v_sum(V a) { return _mm512_reduce_add_ps(a); }
// Sums of four vectors, side by side; each sum adds its lanes in one order, whatever the other three are.
static inline void v_sum4(V a, V b, V c, V d, float* to) {
  const V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const V all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline V v_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline V v_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline V v_codes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// The codes from the i-th on of words of eight bytes; kept in registers, since small stores are slow to load again at once.
static inline V v_bytes(const uint64_t* words, int i) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_set_epi64x((long long)words[i / 8 + 1], (long long)words[i / 8])));
}
static inline V v_signs(uint32_t bits) {  // +1 where a bit is set, else -1; the low 16 bits
  return _mm512_mask_blend_ps((__mmask16)bits, _mm512_set1_ps(-1.f), _mm512_set1_ps(1.f));
}
static inline V v_keep(uint32_t bits, V a) { return _mm512_maskz_mov_ps((__mmask16)bits, a); }

#elif defined(ISA_AVX2)

constexpr int W = 8;
typedef __m256 V;
static inline V v_zero() { return _mm256_setzero_ps(); }
static inline V v_set(float a) { return _mm256_set1_ps(a); }
static inline V v_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void v_store(float* p, V a) { _mm256_storeu_ps(p, a); }
static inline V v_add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline float v_sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline void v_sum4(V a, V b, V c, V d, float* to) {
  to[0] = v_sum(a), to[1] = v_sum(b), to[2] = v_sum(c), to[3] = v_sum(d);
}
static inline V v_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline V v_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline V v_codes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline V v_bytes(const uint64_t* words, int i) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)words[i / 8])));
}
static inline __m256i v_lanes(uint32_t bits) {  // all ones in the lanes whose bit is set
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each);
}
static inline V v_signs(uint32_t bits) {
  return _mm256_blendv_ps(_mm256_set1_ps(-1.f), _mm256_set1_ps(1.f), _mm256_castsi256_ps(v_lanes(bits)));
}
static inline V v_keep(uint32_t bits, V a) { return _mm256_and_ps(a, _mm256_castsi256_ps(v_lanes(bits))); }

#else

constexpr int W = 1;
typedef float V;
static inline V v_zero() { return 0.f; }
static inline V v_set(float a) { return a; }
static inline V v_load(const float* p) { return *p; }
static inline void v_store(float* p, V a) { *p = a; }
static inline V v_add(V a, V b) { return a + b; }
static inline V v_mul(V a, V b) { return a * b; }
static inline V v_fma(V a, V b, V c) { return a * b + c; }
static inline float v_sum(V a) { return a; }
static inline void v_sum4(V a, V b, V c, V d, float* to) { to[0] = a, to[1] = b, to[2] = c, to[3] = d; }
static inline float widen_bf16(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline float widen_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  float f;
  uint32_t u;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    f = (float)fraction * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  u = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline V v_bf16(const uint16_t* p) { return widen_bf16(*p); }
static inline V v_f16(const uint16_t* p) { return widen_f16(*p); }
static inline V v_codes(const uint8_t* p) { return (float)*p; }
static inline V v_bytes(const uint64_t* words, int i) { return (float)(words[i / 8] >> (i % 8 * 8) & 0xFF); }
static inline V v_signs(uint32_t bits) { return bits & 1 ? 1.f : -1.f; }
static inline V v_keep(uint32_t bits, V a) { return bits & 1 ? a : 0.f; }

#endif

static inline float one_bf16(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

static inline float one_f16(uint16_t h) {
  uint16_t eight[16] = {h};
  float wide[16];
  v_store(wide, v_f16(eight));
  return wide[0];
}

static inline uint16_t to_f16(float f) {  // to nearest, ties to even
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
  u &= 0x7FFFFFFFu;
  if (u > 0x7F800000u) return sign | 0x7E00;
  if (u >= 0x477FF000u) return sign | 0x7C00;  // rounds past 65504
  if (u < 0x38800000u) {                       // subnormal: let the float adder round
    float a;
    __builtin_memcpy(&a, &u, 4);
    a += 0.5f;
    __builtin_memcpy(&u, &a, 4);
    return sign | (uint16_t)(u - 0x3F000000u);
  }
  return sign | (uint16_t)((u - 0x38000000u + 0xFFF + ((u >> 13) & 1)) >> 13);
}
