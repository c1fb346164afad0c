// Attention over a paged cache and the passes over rows beside it as torch operators. Everything that a loop will trust is
// checked here, before memory is touched.
#include <cstring>

#include "attention.hpp"
#include "pointwise.hpp"
#include "operators.hpp"

namespace deltakeeper {
namespace {

using torch::headeronly::ScalarType;

// The dtype of tensors that must share it, on the CPU, with dense last dimensions.
int dense_dtype(const char* what, int64_t dims, const std::initializer_list<const Tensor*>& tensors) {
  const ScalarType dtype = (*tensors.begin())->scalar_type();
  for (const Tensor* t : tensors) {
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == dims && t->scalar_type() == dtype, what, " must be of ", dims,
                    " dimensions, of one dtype, and on the CPU");
    STD_TORCH_CHECK(t->size(dims - 1) <= 1 || t->stride(dims - 1) == 1, what, " must have a contiguous last dimension");
  }
  return dtype_code(**tensors.begin());
}

void check_cache(const Tensor& k, const Tensor& v, int64_t dim, ScalarType dtype) {
  STD_TORCH_CHECK(k.dim() == 4 && k.size(2) == KEYS && k.size(3) == dim, "a cache is (blocks, kv_heads, 16, dim) with the dim of its tokens");
  const std::vector<int64_t> shape = {k.size(0), k.size(1), KEYS, dim};
  check_tensor(k, "the cache of keys", dtype, shape);
  check_tensor(v, "the cache of values", dtype, shape);
}

}  // namespace

void write_cache(Tensor cache_k, Tensor cache_v, Tensor k, Tensor v, Tensor places) {
  const int64_t row = dense_dtype("k and v", 3, {&k, &v}) == F32 ? 4 * k.size(2) : 2 * k.size(2);
  const int64_t tokens = k.size(0), heads = k.size(1), dim = k.size(2);
  check_cache(cache_k, cache_v, dim, k.scalar_type());
  STD_TORCH_CHECK(heads == cache_k.size(1) && v.size(0) == tokens && v.size(1) == heads && v.size(2) == dim,
                  "k and v are (tokens, kv_heads, dim) with the heads of the cache");
  check_tensor(places, "the places", ScalarType::Long, {tokens});
  const int64_t* place = static_cast<const int64_t*>(places.const_data_ptr());
  const int64_t capacity = cache_k.size(0) * KEYS;
  for (int64_t t = 0; t < tokens; t++)
    STD_TORCH_CHECK(place[t] < capacity, "place ", place[t], " is not in a cache of ", capacity, " tokens");
  if (!tokens || !row) return;
  const int64_t size = row / dim;
  const Tensor* from[] = {&k, &v};
  const Tensor* into[] = {&cache_k, &cache_v};
  for (int part = 0; part < 2; part++) {
    const char* base = static_cast<const char*>(from[part]->const_data_ptr());
    char* cache = static_cast<char*>(into[part]->mutable_data_ptr());
    const int64_t by_token = from[part]->stride(0) * size, by_head = from[part]->stride(1) * size;
    for (int64_t t = 0; t < tokens; t++) {
      if (place[t] < 0) continue;
      const int64_t block = place[t] / KEYS, offset = place[t] % KEYS;
      for (int64_t h = 0; h < heads; h++)
        std::memcpy(cache + ((block * heads + h) * KEYS + offset) * row, base + t * by_token + h * by_head, (size_t)row);
    }
  }
}

Tensor paged_attention(Tensor q, Tensor cache_k, Tensor cache_v, Tensor tables, Tensor query_starts, Tensor lengths, double scale,
                       int64_t window, double softcap, std::optional<Tensor> sinks) {
  Attention a;
  a.dtype = dense_dtype("q", 3, {&q});
  const int64_t tokens = q.size(0), requests = lengths.numel();
  a.heads = q.size(1);
  a.dim = q.size(2);
  check_cache(cache_k, cache_v, a.dim, q.scalar_type());
  a.kv_heads = cache_k.size(1);
  STD_TORCH_CHECK(a.dim > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0, a.heads, " heads cannot share ", a.kv_heads, " heads of keys");
  STD_TORCH_CHECK(window >= 0 && softcap >= 0, "the window and the softcap are 0 for none, or positive");
  STD_TORCH_CHECK(tables.dim() == 2 && tables.size(0) == requests, "the tables have a row for each request");
  check_tensor(tables, "the tables", ScalarType::Int, {});
  check_tensor(query_starts, "the query starts", ScalarType::Int, {requests + 1});
  check_tensor(lengths, "the lengths", ScalarType::Int, {requests});
  a.q_token = q.stride(0);
  a.q_head = q.stride(1);
  a.table = tables.size(1);
  a.tables = static_cast<const int32_t*>(tables.const_data_ptr());
  a.starts = static_cast<const int32_t*>(query_starts.const_data_ptr());
  a.lengths = static_cast<const int32_t*>(lengths.const_data_ptr());
  a.scale = (float)scale;
  a.softcap = (float)softcap;
  a.window = window;
  const Kernels& kernel = kernels();
  std::vector<float> sink;
  if (sinks) {
    check_tensor(*sinks, "the sinks", sinks->scalar_type(), {a.heads});
    sink.resize((size_t)a.heads);
    kernel.widen(sinks->const_data_ptr(), dtype_code(*sinks), a.heads, sink.data());
    a.sinks = sink.data();
  }
  STD_TORCH_CHECK(a.starts[0] == 0 && a.starts[requests] == tokens, "the requests have ", a.starts[requests], " queries and q has ", tokens);
  const int64_t group = a.heads / a.kv_heads, blocks = cache_k.size(0);
  a.tokens = group < 48 ? 48 / group : 1;
  std::vector<Span> spans;
  spans.reserve((size_t)(requests * a.kv_heads));
  int64_t work = 0, longest = 0;
  for (int64_t r = 0; r < requests; r++) {
    const int64_t n = (int64_t)a.starts[r + 1] - a.starts[r], length = a.lengths[r];
    STD_TORCH_CHECK(n >= 0, "the query starts decrease");
    STD_TORCH_CHECK(length >= n && length <= a.table * KEYS, "request ", r, " has ", length, " tokens of context, ", n,
                    " of this pass, and a table for ", a.table * KEYS);
    if (n == 0) continue;
    const int64_t begin = window && length - n + 1 > window ? length - n + 1 - window : 0;
    for (int64_t i = begin / KEYS; i * KEYS < length; i++) {
      const int64_t block = a.tables[r * a.table + i];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "the table of request ", r, " names block ", block, " of a cache of ", blocks);
    }
    // late queries see more keys than early ones: first and last in turn, so that threads get equal shares
    const int64_t parts = (n + a.tokens - 1) / a.tokens;
    for (int64_t i = 0; i < parts; i++)
      for (int64_t h = 0; h < a.kv_heads; h++)
        spans.push_back({(int32_t)r, (int32_t)h, (int32_t)((i % 2 ? parts - 1 - i / 2 : i / 2) * a.tokens)});
    work += n * (length - begin);
    longest = n > longest ? n : longest;
  }
  Tensor out = torch::stable::new_empty(q, {tokens, a.heads, a.dim});
  if (spans.empty()) return out;
  if (longest < a.tokens) a.tokens = longest;  // no more memory than needed
  a.q = q.const_data_ptr();
  a.k = cache_k.const_data_ptr();
  a.v = cache_v.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.spans = spans.data();
  const int64_t count = (int64_t)spans.size();
  // a thread is worth its start from about a million multiplications
  const int64_t grain = 1 + 1000000 * count / (1 + 2 * work * a.heads * a.dim);
  torch::stable::parallel_for(0, count, grain, [&](int64_t from, int64_t to) { kernel.attend(a, from, to); });
  return out;
}

namespace {

// Entries from which a pass over rows is worth a thread.
int64_t row_grain(int64_t width) { return 1 + 32768 / (width > 0 ? width : 1); }

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, Tensor row_slots, double eps, double offset, bool round_first) {
  Norm p;
  p.dtype = dense_dtype("x and the weight", 2, {&x, &weight});
  const int64_t rows = x.size(0), slots = weight.size(0);
  p.dim = x.size(1);
  STD_TORCH_CHECK(weight.size(1) == p.dim && weight.is_contiguous(), "the weight is (slots, ", p.dim, "), contiguous");
  check_tensor(row_slots, "the slots", ScalarType::Long, {rows});
  p.slots = static_cast<const int64_t*>(row_slots.const_data_ptr());
  for (int64_t m = 0; m < rows; m++)
    STD_TORCH_CHECK(p.slots[m] >= 0 && p.slots[m] < slots, "slot ", p.slots[m], " is not in a weight of ", slots);
  p.stride = x.stride(0);
  p.eps = (float)eps;
  p.offset = (float)offset;
  p.round_first = round_first;
  Tensor out = torch::stable::new_empty(x, {rows, p.dim});
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, rows, row_grain(p.dim), [&](int64_t from, int64_t to) { kernel.norm(p, from, to); });
  return out;
}

static Tensor gated(const Tensor& gate, const Tensor& up, int activation) {
  Gate p;
  p.dtype = dense_dtype("gate and up", 2, {&gate, &up});
  p.activation = activation;
  const int64_t rows = gate.size(0);
  p.width = gate.size(1);
  STD_TORCH_CHECK(up.size(0) == rows && up.size(1) == p.width, "gate and up are of one shape");
  p.gate_stride = gate.stride(0);
  p.up_stride = up.stride(0);
  Tensor out = torch::stable::new_empty(gate, {rows, p.width});
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, rows, row_grain(4 * p.width), [&](int64_t from, int64_t to) { kernel.gate(p, from, to); });
  return out;
}

Tensor silu_mul(Tensor gate, Tensor up) { return gated(gate, up, SILU); }
static Tensor gelu_tanh_mul(Tensor gate, Tensor up) { return gated(gate, up, GELU_TANH); }

std::tuple<Tensor, Tensor> rotate(Tensor q, Tensor k, Tensor cos, Tensor sin) {
  Rotation p;
  p.dtype = dense_dtype("q and k", 3, {&q, &k});
  STD_TORCH_CHECK(dense_dtype("cos and sin", 2, {&cos, &sin}) == p.dtype, "cos and sin have the dtype of q");
  const int64_t tokens = q.size(0);
  p.dim = q.size(2);
  p.turned = cos.size(1);
  STD_TORCH_CHECK(k.size(0) == tokens && k.size(2) == p.dim, "q and k share their tokens and their dim");
  STD_TORCH_CHECK(cos.size(0) == tokens && sin.size(0) == tokens && sin.size(1) == p.turned && p.turned <= p.dim && p.turned % 2 == 0,
                  "cos and sin are (tokens, an even number of the ", p.dim, " entries of a head)");
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.cos_stride = cos.stride(0);
  p.sin_stride = sin.stride(0);
  const Kernels& kernel = kernels();
  const auto turn = [&](const Tensor& x) {
    p.heads = x.size(1);
    p.token_stride = x.stride(0);
    p.head_stride = x.stride(1);
    Tensor out = torch::stable::new_empty(x, {tokens, p.heads, p.dim});
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    torch::stable::parallel_for(0, tokens, row_grain(p.heads * p.dim), [&](int64_t from, int64_t to) { kernel.rotate(p, from, to); });
    return out;
  };
  Tensor turned_q = turn(q);
  return {turned_q, turn(k)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(deltakeeper, m) {
  m.def("write_cache_(Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor k, Tensor v, Tensor places) -> ()");
  m.def("paged_attention(Tensor q, Tensor cache_k, Tensor cache_v, Tensor tables, Tensor query_starts, Tensor lengths, float scale, "
        "int window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, Tensor row_slots, float eps, float offset=0.0, bool round_first=True) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("gelu_tanh_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("rotate(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(deltakeeper, CPU, m) {
  m.impl("write_cache_", TORCH_BOX(&write_cache));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("gelu_tanh_mul", TORCH_BOX(&gelu_tanh_mul));
  m.impl("rotate", TORCH_BOX(&rotate));
}

}  // namespace deltakeeper
