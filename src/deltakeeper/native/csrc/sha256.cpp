// SHA-256 of two streams at once (FIPS 180-4), by the SHA instructions of x86.
//
// One stream leaves the unit idle most of the time, because each round waits for the one before it; two streams fill the
// gaps and take hardly longer than one. Hashing is most of the time of a compression, and OpenSSL, which Python uses
// and which stands in where these instructions are missing, has no call for two.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#include <immintrin.h>
#define HAVE_X86 1
#define SHA __attribute__((target("sha,sse4.1,ssse3")))
#endif

namespace {

struct State {
    uint32_t h[8];
    uint64_t length;
    uint8_t tail[64];
};

#ifdef HAVE_X86
alignas(16) constexpr uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// Blocks of 64 bytes of N streams, in step.
template <int N>
SHA void take_blocks(State* const* states, const uint8_t* const* data, int64_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i abef[N], cdgh[N];
    for (int n = 0; n < N; ++n) {  // the instructions want the words as ABEF and CDGH
        const __m128i* h = reinterpret_cast<const __m128i*>(states[n]->h);
        const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(h), 0xb1);
        const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(h + 1), 0x1b);
        abef[n] = _mm_alignr_epi8(badc, hgfe, 8);
        cdgh[n] = _mm_blend_epi16(hgfe, badc, 0xf0);
    }
    for (int64_t block = 0; block < blocks; ++block) {
        __m128i w[N][4], first[N], second[N];
        for (int n = 0; n < N; ++n) {
            const __m128i* words = reinterpret_cast<const __m128i*>(data[n] + 64 * block);
            for (int i = 0; i < 4; ++i) w[n][i] = _mm_shuffle_epi8(_mm_loadu_si128(words + i), swap);
            first[n] = abef[n];
            second[n] = cdgh[n];
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const __m128i k = _mm_load_si128(reinterpret_cast<const __m128i*>(K) + i);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                __m128i& now = w[n][i % 4];
                const __m128i sum = _mm_add_epi32(now, k);
                cdgh[n] = _mm_sha256rnds2_epu32(cdgh[n], abef[n], sum);
                abef[n] = _mm_sha256rnds2_epu32(abef[n], cdgh[n], _mm_shuffle_epi32(sum, 0x0e));
                if (i < 12) {  // the words of four rounds, four steps ahead
                    const __m128i next = w[n][(i + 1) % 4], late = w[n][(i + 2) % 4], last = w[n][(i + 3) % 4];
                    const __m128i part = _mm_add_epi32(_mm_sha256msg1_epu32(now, next), _mm_alignr_epi8(last, late, 4));
                    now = _mm_sha256msg2_epu32(part, last);
                }
            }
        }
        for (int n = 0; n < N; ++n) {
            abef[n] = _mm_add_epi32(abef[n], first[n]);
            cdgh[n] = _mm_add_epi32(cdgh[n], second[n]);
        }
    }
    for (int n = 0; n < N; ++n) {
        __m128i* h = reinterpret_cast<__m128i*>(states[n]->h);
        const __m128i feba = _mm_shuffle_epi32(abef[n], 0x1b);
        const __m128i dchg = _mm_shuffle_epi32(cdgh[n], 0xb1);
        _mm_storeu_si128(h, _mm_blend_epi16(feba, dchg, 0xf0));
        _mm_storeu_si128(h + 1, _mm_alignr_epi8(dchg, feba, 8));
    }
}

void take_one(State* state, const uint8_t* data, int64_t blocks) {
    take_blocks<1>(&state, &data, blocks);
}

// Fill the tail that an earlier piece left, so that whole blocks follow; moves `data` and `size` past what it took.
void fill_tail(State* state, const uint8_t*& data, int64_t& size) {
    const int64_t held = static_cast<int64_t>(state->length % 64);
    state->length += size;
    if (!held) return;
    const int64_t taken = size < 64 - held ? size : 64 - held;
    std::memcpy(state->tail + held, data, taken);
    data += taken;
    size -= taken;
    if (held + taken == 64) take_one(state, state->tail, 1);
}

void keep_tail(State* state, const uint8_t* data, int64_t size) {
    if (size) std::memcpy(state->tail, data, size);  // of nothing, what the tail holds already stays
}
#endif

bool has_sha() {
#ifdef HAVE_X86
    unsigned a, b, c, d;
    static const bool found = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) &&
                              __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("ssse3");
    return found;
#else
    return false;
#endif
}

}  // namespace

extern "C" {

// 1 where the functions below may be called.
int deltakeeper_has_sha() { return has_sha(); }

int64_t deltakeeper_sha256_state_bytes() { return sizeof(State); }

void deltakeeper_sha256_begin(State* state) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::memset(state, 0, sizeof *state);
    std::memcpy(state->h, start, sizeof start);
}

// The next piece of each of two streams, of any two sizes.
void deltakeeper_sha256_update_two(State* one, const uint8_t* data_one, int64_t size_one, State* two,
                                   const uint8_t* data_two, int64_t size_two) {
#ifdef HAVE_X86
    fill_tail(one, data_one, size_one);
    fill_tail(two, data_two, size_two);
    const int64_t blocks_one = size_one / 64, blocks_two = size_two / 64;
    const int64_t both = blocks_one < blocks_two ? blocks_one : blocks_two;
    State* const states[2] = {one, two};
    const uint8_t* const data[2] = {data_one, data_two};
    take_blocks<2>(states, data, both);
    take_one(one, data_one + 64 * both, blocks_one - both);
    take_one(two, data_two + 64 * both, blocks_two - both);
    keep_tail(one, data_one + 64 * blocks_one, size_one % 64);
    keep_tail(two, data_two + 64 * blocks_two, size_two % 64);
#endif
}

// The 32 bytes of the hash; the state is spent.
void deltakeeper_sha256_finish(State* state, uint8_t* out) {
#ifdef HAVE_X86
    const uint64_t bits = 8 * state->length;
    const int64_t held = static_cast<int64_t>(state->length % 64);
    uint8_t last[128] = {};
    std::memcpy(last, state->tail, held);
    last[held] = 0x80;
    const int64_t end = held < 56 ? 64 : 128;
    for (int i = 0; i < 8; ++i) last[end - 1 - i] = static_cast<uint8_t>(bits >> (8 * i));
    take_one(state, last, end / 64);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 4; ++j) out[4 * i + j] = static_cast<uint8_t>(state->h[i] >> (24 - 8 * j));
#endif
}

}  // extern "C"
