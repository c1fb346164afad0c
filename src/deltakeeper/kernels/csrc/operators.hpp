// Operators that a whole layer is made of.
#pragma once
#include <tuple>

#include "registry.hpp"

namespace deltakeeper {

// Products of x with several weights, whose tables of terms are `first` and those after it.
std::vector<Tensor> products(const Tensor& x, const std::vector<Tensor>& weights, const Tensor& tables, int64_t first,
                             const Tensor& slots, const Tensor& starts, int64_t merge_from);
Tensor rms_norm(Tensor x, Tensor weight, Tensor row_slots, double eps, double offset, bool round_first);
std::tuple<Tensor, Tensor> rotate(Tensor q, Tensor k, Tensor cos, Tensor sin);
void write_cache(Tensor cache_k, Tensor cache_v, Tensor k, Tensor v, Tensor places);
Tensor paged_attention(Tensor q, Tensor cache_k, Tensor cache_v, Tensor tables, Tensor query_starts, Tensor lengths, double scale,
                       int64_t window, double softcap, std::optional<Tensor> sinks);
Tensor silu_mul(Tensor gate, Tensor up);

}  // namespace deltakeeper
