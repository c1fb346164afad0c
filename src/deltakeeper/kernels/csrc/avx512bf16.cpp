// The products for avx512bf16.
#include "attention.hpp"
#include "pointwise.hpp"
#include "term.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx512vbmi,avx2,fma,f16c,bmi2,popcnt")
#define ISA_AVX512
#define ISA_BF16
namespace deltakeeper {
namespace avx512bf16 {
#include "vector.inc.hpp"
#include "decode.inc.hpp"
#include "products.inc.hpp"
#include "math.inc.hpp"
#include "attention.inc.hpp"
#include "pointwise.inc.hpp"
}  // namespace avx512bf16
extern const Kernels AVX512BF16 = {"avx512bf16", true, avx512bf16::run, avx512bf16::tabulate, avx512bf16::shrink, avx512bf16::decode, avx512bf16::widen, avx512bf16::narrow,
                              avx512bf16::attend, avx512bf16::norm, avx512bf16::gate, avx512bf16::rotate};
}  // namespace deltakeeper
#endif
