// The products for avx2.
#include "attention.hpp"
#include "pointwise.hpp"
#include "term.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,bmi2")
#define ISA_AVX2
namespace deltakeeper {
namespace avx2 {
#include "vector.inc.hpp"
#include "decode.inc.hpp"
#include "products.inc.hpp"
#include "math.inc.hpp"
#include "attention.inc.hpp"
#include "pointwise.inc.hpp"
}  // namespace avx2
extern const Kernels AVX2 = {"avx2", false, avx2::run, avx2::tabulate, avx2::shrink, avx2::decode, avx2::widen, avx2::narrow,
                              avx2::attend, avx2::norm, avx2::gate, avx2::rotate};
}  // namespace deltakeeper
#endif
