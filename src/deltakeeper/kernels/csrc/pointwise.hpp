// Passes over rows as the operators see them: raw views, checked before. Strides count entries.
#pragma once
#include "term.hpp"

namespace deltakeeper {

struct Norm {
  int dtype = 0;
  const void* x = nullptr;  // (rows, dim)
  int64_t stride = 0, dim = 0;
  const void* weight = nullptr;  // (slots, dim)
  const int64_t* slots = nullptr;
  void* out = nullptr;
  float eps = 0, offset = 0;
  bool round_first = true;  // the normalised row is rounded before it is weighted
};

enum Activation : int { SILU = 0, GELU_TANH = 1 };

struct Gate {
  int dtype = 0, activation = 0;
  const void* gate = nullptr;  // (rows, width)
  const void* up = nullptr;
  int64_t gate_stride = 0, up_stride = 0, width = 0;
  void* out = nullptr;
};

struct Rotation {
  int dtype = 0;
  const void* x = nullptr;  // (tokens, heads, dim)
  int64_t token_stride = 0, head_stride = 0, heads = 0, dim = 0;
  const void* cos = nullptr;  // (tokens, turned)
  const void* sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0, turned = 0;
  void* out = nullptr;
};

}  // namespace deltakeeper
