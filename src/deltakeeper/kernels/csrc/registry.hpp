// Terms by number. A product holds what it uses, so a term that is released meanwhile stays until the product is done.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "arena.hpp"
#include "term.hpp"

namespace deltakeeper {

using torch::stable::Tensor;

struct Held {
  Term term;
  std::vector<Tensor> owned;
  std::vector<std::shared_ptr<const Held>> parts;  // packed factors
  std::vector<std::shared_ptr<uint32_t>> woven;
  int64_t woven_bytes = 0;
  std::vector<std::vector<float>> woven_scales;  // padded; halves where a plane with zeros is two
};

std::shared_ptr<const Held> find_term(int64_t id);
const Kernels& kernels();
int dtype_code(const Tensor& t);  // F32, BF16 or F16; refuses any other
void check_tensor(const Tensor& t, const char* what, torch::headeronly::ScalarType dtype, const std::vector<int64_t>& shape);

}  // namespace deltakeeper
