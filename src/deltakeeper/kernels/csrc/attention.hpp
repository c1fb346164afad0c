// Attention over a cache of blocks as the operators see it: raw views, checked before.
#pragma once
#include "term.hpp"

namespace deltakeeper {

constexpr int64_t KEYS = 16;  // tokens of a block of the cache

// Some adjacent queries of one request, for all heads that share a head of keys.
struct Span {
  int32_t request, kv_head, first;  // `first` is a token of the request's part of the pass
};

struct Attention {
  int dtype = 0;
  const void* q = nullptr;  // (tokens, heads, dim), rows apart by these strides
  int64_t q_token = 0, q_head = 0;
  const void* k = nullptr;  // (blocks, kv_heads, KEYS, dim)
  const void* v = nullptr;
  void* out = nullptr;  // (tokens, heads, dim)
  int64_t heads = 0, kv_heads = 0, dim = 0;
  const int32_t* tables = nullptr;  // (requests, table)
  int64_t table = 0;
  const int32_t* starts = nullptr;
  const int32_t* lengths = nullptr;
  float scale = 1, softcap = 0;
  int64_t window = 0;
  const float* sinks = nullptr;  // (heads), or null
  const Span* spans = nullptr;
  int64_t tokens = 1;  // most tokens of a span
};

}  // namespace deltakeeper
