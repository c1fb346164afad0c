// Packed rows to float32. A span begins at a multiple of 32 columns; `into` has room for its end rounded up to 32 and is
// zero from `end` on.

static void widen(const void* from, int dtype, int64_t n, float* into) {
  int64_t i = 0;
  if (dtype == F32) {
    __builtin_memcpy(into, from, (size_t)n * 4);
    return;
  }
  if (dtype == CODES) {
    const uint8_t* p = (const uint8_t*)from;
    for (; i + W <= n; i += W) v_store(into + i, v_codes(p + i));
    for (; i < n; i++) into[i] = (float)p[i];
    return;
  }
  const uint16_t* p = (const uint16_t*)from;
  if (dtype == BF16) {
    for (; i + W <= n; i += W) v_store(into + i, v_bf16(p + i));
    for (; i < n; i++) into[i] = one_bf16(p[i]);
  } else {
    for (; i + W <= n; i += W) v_store(into + i, v_f16(p + i));
    for (; i < n; i++) into[i] = one_f16(p[i]);
  }
}

static void narrow(const float* from, int64_t n, int dtype, void* into) {
  if (dtype == F32) {
    __builtin_memcpy(into, from, (size_t)n * 4);
    return;
  }
  uint16_t* p = (uint16_t*)into;
  int64_t i = 0;
#if defined(ISA_BF16)
  if (dtype == BF16)
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(p + i), (__m256i)_mm512_cvtneps_pbh(v_load(from + i)));
#endif
  if (dtype == BF16)
    for (; i < n; i++) p[i] = to_bf16(from[i]);
  else
    for (; i < n; i++) p[i] = to_f16(from[i]);
}

// A word of a plane in the order of its columns.
static inline uint32_t plane_word(const Term& t, int plane, int64_t row, int64_t word) {
  if (!t.woven) return t.packed[plane][row * t.words + word];
  const uint32_t w = t.packed[plane][(row / WEAVE * t.words + word) * WEAVE + row % WEAVE];
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  return _pext_u32(w, 0x0F0F0F0Fu) | _pext_u32(w, 0xF0F0F0F0u) << 16;
#else
  uint32_t plain = 0;
  for (int p = 0; p < 32; p++) plain |= (w >> p & 1u) << woven_column(p);
  return plain;
#endif
}

static void decode_signs(const Term& t, int64_t row, int64_t begin, int64_t end, float* into) {
  for (int64_t c = begin, word = begin / 32; c < end; c += 32, word++) {
    uint32_t bits[2 * MAX_PLANES];
    for (int p = 0; p < t.planes; p++) bits[p] = plane_word(t, p, row, word);
    const uint32_t kept = t.mask ? t.mask[row * t.words + word] : 0;
    for (int lane = 0; lane < 32; lane += W) {
      V sum = v_zero();
      for (int p = 0; p < t.planes; p++) {
        V sign = v_signs(bits[p] >> lane);
        if (t.mask) sign = v_keep(kept >> lane, sign);
        if (t.axis == COLUMN) {
          float scale[W];
          for (int i = 0; i < W; i++) scale[i] = c + lane + i < t.in ? t.scales[p][c + lane + i] : 0.f;
          sum = v_add(sum, v_mul(sign, v_load(scale)));
        } else {
          sum = v_add(sum, v_mul(sign, v_set(t.scales[p][t.axis == ROW ? row : 0])));
        }
      }
      v_store(into + (c - begin) + lane, sum);
    }
  }
}

static void decode_sparse(const Term& t, int64_t row, int64_t begin, int64_t end, float* into) {
  const uint32_t* words = t.mask + row * t.words;
  int64_t at = t.first[row];
  for (int64_t i = 0; i < begin / 32; i++) at += __builtin_popcount(words[i]);
  const float gain = t.gain[t.gain_by_row ? row : 0];
  const int size = t.dtype == F32 ? 4 : t.dtype == CODES ? 1 : 2;
  for (int64_t c = begin; c < end; c += 32) {
    const uint32_t word = words[c / 32];
    float* to = into + (c - begin);
    const int count = __builtin_popcount(word);
    float kept[32];
    widen((const char*)t.values + at * size, t.dtype, count, kept);
    for (int i = 0; i < count; i++) kept[i] = (kept[i] * t.factor - t.zero) * gain;
#if defined(ISA_AVX512)
    const __mmask16 low = (__mmask16)word, high = (__mmask16)(word >> 16);
    _mm512_storeu_ps(to, _mm512_maskz_expand_ps(low, _mm512_loadu_ps(kept)));
    float upper[32];
    const int taken = __builtin_popcount((uint32_t)low);
    __builtin_memcpy(upper, kept + taken, (size_t)(count - taken) * 4);
    _mm512_storeu_ps(to + 16, _mm512_maskz_expand_ps(high, _mm512_loadu_ps(upper)));
#else
    for (int i = 0; i < 32; i++) to[i] = 0.f;
    int i = 0;
    for (uint32_t rest = word; rest; rest &= rest - 1) to[__builtin_ctz(rest)] = kept[i++];
#endif
    at += count;
  }
}

static void decode_codes(const Term& t, int64_t row, int64_t begin, int64_t end, float* into) {
  const uint8_t* bytes = (const uint8_t*)(t.packed[0] + row * t.words);
  const int64_t have = t.words * 4;
  const uint64_t low = ((1ull << t.bits) - 1) * 0x0101010101010101ull;
  const int64_t group = t.group ? t.group : t.in;
  const float* steps = t.steps + row * t.groups;
  const uint8_t* zeros = t.zeros ? t.zeros + row * t.groups : nullptr;
  for (int64_t c = begin; c < end; c += 32) {
    uint64_t spread[4];  // eight codes each, a byte a code
    for (int part = 0; part < 4; part++) {
      const int64_t at = (c + part * 8) / 8 * t.bits;
      uint64_t eight = 0;
      if (at + 8 <= have)
        __builtin_memcpy(&eight, bytes + at, 8);
      else if (at < have)
        __builtin_memcpy(&eight, bytes + at, (size_t)(have - at));
#if defined(ISA_AVX512) || defined(ISA_AVX2)
      spread[part] = _pdep_u64(eight, low);
#else
      spread[part] = 0;
      for (int i = 0; i < 8; i++) spread[part] |= ((eight >> (i * t.bits)) & (low & 0xFF)) << (8 * i);
#endif
    }
    float* to = into + (c - begin);
    const int64_t g = c / group;
    const int64_t last = (c + 31 < t.in ? c + 31 : t.in - 1) / group;
    if (g == last) {
      const V step = v_set(steps[g]), zero = v_set(-(zeros ? (float)zeros[g] : t.zero)), factor = v_set(t.factor);
      for (int i = 0; i < 32; i += W) v_store(to + i, v_mul(v_fma(v_bytes(spread, i), factor, zero), step));
    } else {
      for (int i = 0; i < 32 && c + i < t.in; i++) {
        const int64_t own = (c + i) / group;
        const float code = (float)(spread[i / 8] >> (i % 8 * 8) & 0xFF);
        to[i] = (code * t.factor - (zeros ? (float)zeros[own] : t.zero)) * steps[own];
      }
    }
  }
}

static void decode(const Term& t, int64_t row, int64_t begin, int64_t end, float* into) {
  if (t.kind == SIGNS) {
    decode_signs(t, row, begin, end, into);
  } else if (t.kind == SPARSE) {
    decode_sparse(t, row, begin, end, into);
  } else if (t.kind == GROUPED_INT) {
    decode_codes(t, row, begin, end, into);
  } else {
    const int size = t.dtype == F32 ? 4 : 2;
    widen((const char*)t.values + (row * t.in + begin) * size, t.dtype, end - begin, into);
  }
  for (int64_t i = end - begin; i < (end - begin + 31) / 32 * 32; i++) into[i] = 0.f;
}
