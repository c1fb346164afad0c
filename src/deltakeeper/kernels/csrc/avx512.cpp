// The products for avx512.
#include "term.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,popcnt")
#define ISA_AVX512
namespace deltakeeper {
namespace avx512 {
#include "vector.inc.hpp"
#include "decode.inc.hpp"
#include "products.inc.hpp"
}  // namespace avx512
extern const Kernels AVX512 = {"avx512", false, avx512::run, avx512::tabulate, avx512::shrink, avx512::decode, avx512::widen, avx512::narrow};
}  // namespace deltakeeper
#endif
