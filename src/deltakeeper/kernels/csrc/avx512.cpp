// The products for avx512.
#include "attention.hpp"
#include "pointwise.hpp"
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
#include "math.inc.hpp"
#include "attention.inc.hpp"
#include "pointwise.inc.hpp"
}  // namespace avx512
extern const Kernels AVX512 = {"avx512", false, avx512::run, avx512::tabulate, avx512::shrink, avx512::decode, avx512::widen, avx512::narrow,
                              avx512::attend, avx512::norm, avx512::gate, avx512::rotate};
}  // namespace deltakeeper
#endif
