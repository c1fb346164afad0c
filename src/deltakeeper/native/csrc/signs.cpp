// Sign planes in one pass: subtract, take the sign, pack, and sum; and the way back.
//
// A plain C interface over raw memory, called through ctypes, which lets other Python threads run meanwhile. Every
// function works on whole rows and is single-threaded; the caller cuts a matrix into blocks of rows. Sums are taken
// per row in 16 interleaved float64 lanes that are folded in a fixed order, so that the scalar, the AVX-512 and the
// NumPy version give the same bits, whatever the blocks and however many threads there are.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define HAVE_X86 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c")))
#endif

namespace {

enum Kind { F32 = 0, BF16 = 1, F16 = 2 };

float widen_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff, bits;
    if (exponent == 0x1f) {
        bits = sign | 0x7f800000 | (mantissa << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else if (mantissa) {
        exponent = 113;
        while (!(mantissa & 0x400)) {
            mantissa <<= 1;
            --exponent;
        }
        bits = sign | (exponent << 23) | ((mantissa & 0x3ff) << 13);
    } else {
        bits = sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float load_one(const void* data, int kind, int64_t i) {
    if (kind == F32) return static_cast<const float*>(data)[i];
    const uint16_t half = static_cast<const uint16_t*>(data)[i];
    if (kind == F16) return widen_half(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint16_t narrow_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t narrow_half(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // a subnormal half: let the float adder round
        float magnitude, magic = 0.5f;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += magic;
        std::memcpy(&bits, &magnitude, 4);
        return sign | static_cast<uint16_t>(bits - 0x3f000000);
    }
    return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}

void store_one(void* out, int kind, int64_t i, float value) {
    if (kind == F32)
        static_cast<float*>(out)[i] = value;
    else
        static_cast<uint16_t*>(out)[i] = kind == BF16 ? narrow_bf16(value) : narrow_half(value);
}

double fold(const double* lanes) {
    double t[16];
    std::memcpy(t, lanes, sizeof t);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) t[i] += t[i + width];
    return t[0];
}

// One row of `tuned - base` (or of `tuned` alone): sign bits, bits of non-zeros, and sums.
struct RowSums {
    double absolute, square;
    int64_t nonzero;
};

RowSums pack_row(const void* base, int base_kind, const void* tuned, int tuned_kind, int64_t at, int64_t columns,
                 bool minus, uint32_t* words, uint32_t* present) {
    double absolute[16] = {}, square[16] = {};
    int64_t nonzero = 0;
    const int64_t count = (columns + 31) / 32;
    for (int64_t w = 0; w < count; ++w) {
        uint32_t bits = 0, there = 0;
        const int64_t end = columns - 32 * w < 32 ? columns - 32 * w : 32;
        for (int64_t j = 0; j < end; ++j) {
            const int64_t i = at + 32 * w + j;
            float d = load_one(tuned, tuned_kind, i);
            if (base) d -= load_one(base, base_kind, i);
            bits |= static_cast<uint32_t>(minus ? d > 0 : d >= 0) << j;
            there |= static_cast<uint32_t>(d != 0) << j;
            const double a = d < 0 ? -static_cast<double>(d) : static_cast<double>(d);
            absolute[j % 16] += a;
            square[j % 16] += a * a;
        }
        words[w] = bits;
        if (present) present[w] = there;
        nonzero += __builtin_popcount(there);
    }
    return {fold(absolute), fold(square), nonzero};
}

// One row of the sum of planes, on top of a base row (or alone): rounded once to the kind of `out`.
struct Planes {
    int count;
    const uint32_t* const* words;   // per plane, (rows, words)
    const float* const* scales;     // per plane, one value, one a row, or one a column
    const uint32_t* present;        // (rows, words) or null
    int axis;                       // 0 tensor, 1 row, 2 column
};

void merge_row(const Planes& p, int64_t row, const void* base, int base_kind, int64_t at, int64_t columns, void* out,
               int out_kind) {
    const int64_t first = row * ((columns + 31) / 32);
    for (int64_t j = 0; j < columns; ++j) {
        const int64_t word = first + j / 32;
        const uint32_t bit = 1u << (j % 32);
        float total = 0;
        if (!p.present || (p.present[word] & bit))
            for (int k = 0; k < p.count; ++k) {
                const float scale = p.scales[k][p.axis == 0 ? 0 : p.axis == 1 ? row : j];
                total += (p.words[k][word] & bit) ? scale : -scale;
            }
        store_one(out, out_kind, at + j, base ? total + load_one(base, base_kind, at + j) : total);
    }
}

#ifdef HAVE_X86
AVX512 inline __m512 load16(const void* data, int kind, int64_t i, __mmask16 m) {
    if (kind == F32) return _mm512_maskz_loadu_ps(m, static_cast<const float*>(data) + i);
    const __m256i half = _mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(data) + i);
    if (kind == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512 inline void store16(void* out, int kind, int64_t i, __mmask16 m, __m512 value) {
    if (kind == F32) {
        _mm512_mask_storeu_ps(static_cast<float*>(out) + i, m, value);
        return;
    }
    __m256i half;
    if (kind == F16) {
        half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {  // no bf16 instruction: it flushes subnormals to zero
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        rounded = _mm512_srli_epi32(rounded, 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, m, half);
}

AVX512 RowSums pack_row_512(const void* base, int base_kind, const void* tuned, int tuned_kind, int64_t at,
                            int64_t columns, bool minus, uint32_t* words, uint32_t* present) {
    __m512d abs_low = _mm512_setzero_pd(), abs_high = abs_low, square_low = abs_low, square_high = abs_low;
    const __m512 zero = _mm512_setzero_ps();
    int64_t nonzero = 0;
    const int64_t count = 2 * ((columns + 31) / 32);
    uint16_t* bits = reinterpret_cast<uint16_t*>(words);
    uint16_t* there = reinterpret_cast<uint16_t*>(present);
    for (int64_t h = 0; h < count; ++h) {
        const int64_t left = columns - 16 * h;
        const __mmask16 m = left >= 16 ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
        __m512 d = load16(tuned, tuned_kind, at + 16 * h, m);
        if (base) d = _mm512_sub_ps(d, load16(base, base_kind, at + 16 * h, m));
        bits[h] = minus ? _mm512_mask_cmp_ps_mask(m, d, zero, _CMP_GT_OQ) : _mm512_mask_cmp_ps_mask(m, d, zero, _CMP_GE_OQ);
        const __mmask16 n = _mm512_mask_cmp_ps_mask(m, d, zero, _CMP_NEQ_UQ);
        if (there) there[h] = n;
        nonzero += __builtin_popcount(n);
        const __m512 a = _mm512_abs_ps(d);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
        abs_low = _mm512_add_pd(abs_low, low);
        abs_high = _mm512_add_pd(abs_high, high);
        square_low = _mm512_add_pd(square_low, _mm512_mul_pd(low, low));
        square_high = _mm512_add_pd(square_high, _mm512_mul_pd(high, high));
    }
    double absolute[16], square[16];
    _mm512_storeu_pd(absolute, abs_low);
    _mm512_storeu_pd(absolute + 8, abs_high);
    _mm512_storeu_pd(square, square_low);
    _mm512_storeu_pd(square + 8, square_high);
    return {fold(absolute), fold(square), nonzero};
}

AVX512 void merge_row_512(const Planes& p, int64_t row, const void* base, int base_kind, int64_t at, int64_t columns,
                          void* out, int out_kind) {
    const int64_t first = row * ((columns + 31) / 32) * 2;
    for (int64_t h = 0; 16 * h < columns; ++h) {
        const int64_t left = columns - 16 * h;
        const __mmask16 m = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        __m512 total = _mm512_setzero_ps();
        for (int k = 0; k < p.count; ++k) {
            const __mmask16 plus = reinterpret_cast<const uint16_t*>(p.words[k])[first + h];
            const __m512 scale = p.axis == 2 ? _mm512_maskz_loadu_ps(m, p.scales[k] + 16 * h)
                                             : _mm512_set1_ps(p.scales[k][p.axis == 1 ? row : 0]);
            total = _mm512_mask_add_ps(_mm512_sub_ps(total, scale), plus, total, scale);
        }
        if (p.present) {
            const __mmask16 there = reinterpret_cast<const uint16_t*>(p.present)[first + h];
            total = _mm512_maskz_mov_ps(there, total);
        }
        if (base) total = _mm512_add_ps(total, load16(base, base_kind, at + 16 * h, m));
        store16(out, out_kind, at + 16 * h, m, total);
    }
}
#endif

bool has_avx512() {
#ifdef HAVE_X86
    static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return found;
#else
    return false;
#endif
}

}  // namespace

extern "C" {

// 1 when the AVX-512 versions run, 0 when the scalar ones do.
int deltakeeper_has_avx512() { return has_avx512(); }

// Rows of `tuned - base` (or of `tuned`, if base is null) into words (rows, ceil(columns/32)); `present` may be null.
// `plain` forces the scalar version, for tests.
void deltakeeper_pack_signs(const void* base, int base_kind, const void* tuned, int tuned_kind, int64_t rows,
                            int64_t columns, int minus, uint32_t* words, uint32_t* present, double* absolute,
                            double* square, int64_t* nonzero, int plain) {
    const int64_t count = (columns + 31) / 32;
    for (int64_t r = 0; r < rows; ++r) {
        uint32_t* there = present ? present + r * count : nullptr;
        RowSums sums;
#ifdef HAVE_X86
        if (!plain && has_avx512())
            sums = pack_row_512(base, base_kind, tuned, tuned_kind, r * columns, columns, minus, words + r * count, there);
        else
#endif
            sums = pack_row(base, base_kind, tuned, tuned_kind, r * columns, columns, minus, words + r * count, there);
        absolute[r] = sums.absolute;
        square[r] = sums.square;
        nonzero[r] = sums.nonzero;
    }
}

// Rows of `base + sum of planes` (or of the sum, if base is null), rounded once to the kind of `out`. The pointers in
// `words`, `scales` (per row) and `present` are those of the first row of this block.
void deltakeeper_merge_signs(int planes, const uint32_t* const* words, const float* const* scales,
                             const uint32_t* present, int axis, const void* base, int base_kind, int64_t rows,
                             int64_t columns, void* out, int out_kind, int plain) {
    const Planes p{planes, words, scales, present, axis};
    for (int64_t r = 0; r < rows; ++r) {
#ifdef HAVE_X86
        if (!plain && has_avx512())
            merge_row_512(p, r, base, base_kind, r * columns, columns, out, out_kind);
        else
#endif
            merge_row(p, r, base, base_kind, r * columns, columns, out, out_kind);
    }
}

}  // extern "C"
