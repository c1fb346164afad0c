// A decoder layer of the Llama shape in one operator. For one token of one request a step is otherwise mostly the calls of
// operators, whose code a layer's weights have pushed out of the caches each time.
#include "operators.hpp"

namespace deltakeeper {
namespace {

using torch::headeronly::ScalarType;

// y = x + y, rounded as torch does.
void add_residual(const Tensor& x, Tensor& y) {
  const Kernels& k = kernels();
  const int64_t entries = x.numel();
  const uint16_t* from = static_cast<const uint16_t*>(x.const_data_ptr());
  uint16_t* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  float a[512], b[512];
  for (int64_t at = 0; at < entries; at += 512) {
    const int64_t count = entries - at < 512 ? entries - at : 512;
    k.widen(from + at, BF16, count, a);
    k.widen(to + at, BF16, count, b);
    for (int64_t i = 0; i < count; i++) b[i] = a[i] + b[i];
    k.narrow(b, count, BF16, to + at);
  }
}

Tensor heads(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(dim > 0 && x.size(1) % dim == 0, "the outputs of a projection are no whole number of heads of ", dim);
  return torch::stable::view(x, {x.size(0), x.size(1) / dim, dim});
}

Tensor decoder_layer(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> norms, std::vector<Tensor> norm_slots, Tensor terms,
                     Tensor slots, Tensor starts, Tensor cos, Tensor sin, Tensor cache_k, Tensor cache_v, Tensor places, Tensor tables,
                     Tensor query_starts, Tensor lengths, double eps, double scale, int64_t window, double softcap,
                     int64_t merge_from) {
  STD_TORCH_CHECK(weights.size() == 7 && norms.size() == 2 && norm_slots.size() == 2 && cache_k.dim() == 4,
                  "a layer has seven weights and two norms, and its cache four dimensions");
  check_tensor(x, "x", ScalarType::BFloat16, {});
  for (const size_t last : {3, 6})  // what is added to x again
    STD_TORCH_CHECK(x.dim() == 2 && weights[last].dim() == 2 && weights[last].size(0) == x.size(1),
                    "output and down projections give as many columns as x has");
  STD_TORCH_CHECK(terms.dim() == 3 && terms.size(0) == 7, "a layer has a table for each of its seven weights");
  const int64_t dim = cache_k.size(3);
  const Tensor before = rms_norm(x, norms[0], norm_slots[0], eps, 0, true);
  std::vector<Tensor> qkv = products(before, {weights[0], weights[1], weights[2]}, terms, 0, slots, starts, merge_from);
  const auto [q, k] = rotate(heads(qkv[0], dim), heads(qkv[1], dim), cos, sin);
  write_cache(cache_k, cache_v, k, heads(qkv[2], dim), places);
  const Tensor seen = paged_attention(q, cache_k, cache_v, tables, query_starts, lengths, scale, window, softcap, std::nullopt);
  Tensor y = products(torch::stable::view(seen, {x.size(0), q.size(1) * dim}), {weights[3]}, terms, 3, slots, starts, merge_from)[0];
  add_residual(x, y);
  const Tensor between = rms_norm(y, norms[1], norm_slots[1], eps, 0, true);
  const std::vector<Tensor> gate_up = products(between, {weights[4], weights[5]}, terms, 4, slots, starts, merge_from);
  Tensor out = products(silu_mul(gate_up[0], gate_up[1]), {weights[6]}, terms, 6, slots, starts, merge_from)[0];
  add_residual(y, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deltakeeper, m) {
  m.def(
      "decoder_layer(Tensor x, Tensor[] weights, Tensor[] norms, Tensor[] norm_slots, Tensor terms, Tensor slots, Tensor starts, "
      "Tensor cos, Tensor sin, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor places, Tensor tables, Tensor query_starts, "
      "Tensor lengths, float eps, float scale, int window, float softcap, int merge_from) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(deltakeeper, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }

}  // namespace deltakeeper
