// The products for scalar.
#include "attention.hpp"
#include "pointwise.hpp"
#include "term.hpp"

namespace deltakeeper {
namespace scalar {
#include "vector.inc.hpp"
#include "decode.inc.hpp"
#include "products.inc.hpp"
#include "math.inc.hpp"
#include "attention.inc.hpp"
#include "pointwise.inc.hpp"
}  // namespace scalar
extern const Kernels SCALAR = {"scalar", false, scalar::run, scalar::tabulate, scalar::shrink, scalar::decode, scalar::widen, scalar::narrow,
                              scalar::attend, scalar::norm, scalar::gate, scalar::rotate};
}  // namespace deltakeeper
