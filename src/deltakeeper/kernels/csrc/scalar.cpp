// The products for scalar.
#include "term.hpp"

namespace deltakeeper {
namespace scalar {
#include "vector.inc.hpp"
#include "decode.inc.hpp"
#include "products.inc.hpp"
}  // namespace scalar
extern const Kernels SCALAR = {"scalar", false, scalar::run, scalar::tabulate, scalar::shrink, scalar::decode, scalar::widen, scalar::narrow};
}  // namespace deltakeeper
