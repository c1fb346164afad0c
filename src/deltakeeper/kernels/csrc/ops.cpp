// The products as torch operators: everything is checked before memory is touched, then tiles of outputs run in parallel.
#include <cstring>

#include "registry.hpp"

namespace deltakeeper {
namespace {

using torch::headeronly::ScalarType;

// Groups of rows with their terms looked up, and what keeps those alive.
struct Plan {
  std::vector<Group> groups;
  std::vector<const Term*> terms;
  std::vector<float*> shrunk;
  std::vector<std::shared_ptr<const Held>> held;
  std::vector<float> thin;  // rows of x times right factors
  bool wide = false;        // whether float32 rows of x are needed
  bool woven = false;       // whether woven planes are multiplied
};

Plan plan_groups(const Tensor& table, const Tensor& slots, const Tensor& starts, int64_t rows, int64_t out, int64_t in,
                 int64_t merge_from, bool narrow_signs) {
  check_tensor(slots, "the slots", ScalarType::Long, {slots.numel()});
  check_tensor(starts, "the starts", ScalarType::Long, {slots.numel() + 1});
  STD_TORCH_CHECK(table.dim() == 2, "the table has a row for each slot");
  check_tensor(table, "the table", ScalarType::Long, {});
  const int64_t n = slots.numel(), capacity = table.size(0), depth = table.size(1);
  const int64_t* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  const int64_t* start = static_cast<const int64_t*>(starts.const_data_ptr());
  const int64_t* ids = static_cast<const int64_t*>(table.const_data_ptr());
  STD_TORCH_CHECK(start[0] == 0 && start[n] == rows, "the groups cover ", start[n], " rows and there are ", rows);
  Plan plan;
  plan.groups.resize((size_t)n);
  plan.terms.reserve((size_t)(n * depth));
  plan.shrunk.resize((size_t)(n * depth), nullptr);
  size_t thin = 0;
  for (int64_t g = 0; g < n; g++) {
    Group& group = plan.groups[(size_t)g];
    STD_TORCH_CHECK(slot[g] >= 0 && slot[g] < capacity, "slot ", slot[g], " is not in a table of ", capacity);
    STD_TORCH_CHECK(start[g] <= start[g + 1], "the starts of the groups decrease");
    group.start = start[g];
    group.stop = start[g + 1];
    group.merged = group.stop - group.start >= merge_from;
    const size_t first = plan.terms.size();
    for (int64_t d = 0; d < depth && group.start < group.stop; d++) {
      const int64_t id = ids[slot[g] * depth + d];
      if (id == 0) continue;
      plan.held.push_back(find_term(id));
      const Term& t = plan.held.back()->term;
      STD_TORCH_CHECK(t.out == out && t.in == in, "a term of ", t.out, " by ", t.in, " is in the table of a module of ", out, " by ", in);
      if (t.kind == LOWRANK) {
        group.merged = false;  // two thin products are less work
        thin += (size_t)(t.rank * (group.stop - group.start));
      }
      plan.terms.push_back(&t);
    }
    group.count = (int)(plan.terms.size() - first);
    group.terms = plan.terms.data() + first;
    group.shrunk = plan.shrunk.data() + first;
    if (group.count == 0) group.merged = false;
    for (int i = 0; i < group.count && !group.merged; i++) {
      const bool looked_up = narrow_signs && group.terms[i]->kind == SIGNS && group.terms[i]->woven;
      (looked_up ? plan.woven : plan.wide) = true;
    }
  }
  plan.thin.resize(thin);
  return plan;
}

// Rows of x with a stride of a multiple of 32 entries and zeros at the end; x itself where it has that already.
template <typename T>
const T* pad_rows(const T* x, int64_t rows, int64_t in, int64_t stride, std::vector<T>& room) {
  if (in == stride) return x;
  room.assign((size_t)(rows * stride), T(0));
  for (int64_t m = 0; m < rows; m++) std::memcpy(room.data() + m * stride, x + m * in, (size_t)in * sizeof(T));
  return room.data();
}

void run_product(Plan& plan, Product& p, const void* x, int x_dtype, const Kernels& k) {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  p.stride = (p.in + 31) / 32 * 32;
  // rows a multiple of half a page apart would fall into the same sets of the first cache
  if (p.rows >= 4 && p.stride % 1024 == 0) p.stride += 32;
  if (x_dtype == BF16) p.x = pad_rows(static_cast<const uint16_t*>(x), p.rows, p.in, p.stride, narrow);
  if (plan.wide) {
    if (x_dtype == F32) {
      p.wide = pad_rows(static_cast<const float*>(x), p.rows, p.in, p.stride, wide);
    } else {
      wide.assign((size_t)(p.rows * p.stride), 0.f);
      for (int64_t m = 0; m < p.rows; m++)
        k.widen(static_cast<const uint16_t*>(x) + m * p.in, x_dtype, p.in, wide.data() + m * p.stride);
      p.wide = wide.data();
    }
  }
  float* thin = plan.thin.data();
  for (Group& group : plan.groups) {
    for (int i = 0; i < group.count; i++) {
      const Term& t = *group.terms[i];
      if (t.kind != LOWRANK) continue;
      const int64_t rows = group.stop - group.start;
      float* into = thin;
      thin += t.rank * rows;
      plan.shrunk[(size_t)(group.terms - plan.terms.data() + i)] = into;
      const float* from = p.wide + group.start * p.stride;
      torch::stable::parallel_for(0, t.rank, 8, [&](int64_t a, int64_t b) { k.shrink(t, from, p.stride, rows, into, a, b); });
    }
  }
  std::vector<Tables> tables;
  std::vector<uint16_t> woven;
  std::vector<uint8_t> sums;
  if (plan.woven) {
    tables.resize((size_t)p.rows);
    woven.resize((size_t)(p.rows * p.stride));
    sums.resize((size_t)(p.rows * p.stride * SUMS));
    p.tables = tables.data();
    p.woven = woven.data();
    for (const Group& group : plan.groups) {
      if (!group.count || group.merged) continue;
      torch::stable::parallel_for(group.start, group.stop, 1 + 32768 / p.stride, [&](int64_t a, int64_t b) {
        for (int64_t m = a; m < b; m++)
          k.tabulate(p.x + m * p.stride, p.stride, woven.data() + m * p.stride, sums.data() + m * p.stride * SUMS, &tables[(size_t)m]);
      });
    }
  }
  p.groups = plan.groups.data();
  p.n_groups = (int64_t)plan.groups.size();
  // of many rows the tables, not the weight, are what must be read again for each tile
  p.tile = plan.woven && p.rows >= 64 ? TILE : p.out >= 2048 ? 64 : 32;
  const int64_t tiles = (p.out + p.tile - 1) / p.tile;
  // a thread is worth its start from about a hundred thousand multiplications
  const int64_t grain = 1 + 100000 / (p.tile * p.in * (p.rows ? p.rows : 1));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t a, int64_t b) { k.run(p, a, b); });
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor table, Tensor slots, Tensor starts, int64_t merge_from) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and the weight are matrices");
  check_tensor(x, "x", ScalarType::BFloat16, {});
  check_tensor(weight, "the weight", ScalarType::BFloat16, {weight.size(0), x.size(1)});
  if (bias) check_tensor(*bias, "the bias", ScalarType::BFloat16, {weight.size(0)});
  const Kernels& k = kernels();
  const bool narrow = k.narrow_signs;
  Product p;
  p.rows = x.size(0);
  p.in = x.size(1);
  p.out = weight.size(0);
  Plan plan = plan_groups(table, slots, starts, p.rows, p.out, p.in, merge_from, narrow);
  Tensor y = torch::stable::new_empty(x, {p.rows, p.out});
  p.weight = static_cast<const uint16_t*>(weight.const_data_ptr());
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.y_dtype = BF16;
  if (p.rows) run_product(plan, p, x.const_data_ptr(), BF16, k);
  return y;
}

void add_terms(Tensor y, Tensor x, Tensor table, Tensor slots, Tensor starts) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0), "x and y are matrices of as many rows");
  check_tensor(x, "x", x.scalar_type(), {});
  check_tensor(y, "y", y.scalar_type(), {});
  const Kernels& k = kernels();
  const int x_dtype = dtype_code(x);
  Product p;
  p.rows = x.size(0);
  p.in = x.size(1);
  p.out = y.size(1);
  p.y_dtype = dtype_code(y);
  const bool narrow = k.narrow_signs && x_dtype == BF16;
  Plan plan = plan_groups(table, slots, starts, p.rows, p.out, p.in, INT64_MAX, narrow);
  p.y = y.mutable_data_ptr();
  if (p.rows && !plan.terms.empty()) run_product(plan, p, x.const_data_ptr(), x_dtype, k);
}

void add_rows(Tensor y, Tensor ids, Tensor table, Tensor row_slots) {
  STD_TORCH_CHECK(y.dim() == 2 && table.dim() == 2, "y and the table are matrices");
  const int64_t rows = y.size(0), width = y.size(1), capacity = table.size(0), depth = table.size(1);
  check_tensor(y, "y", y.scalar_type(), {});
  check_tensor(ids, "the ids", ScalarType::Long, {rows});
  check_tensor(row_slots, "the slots", ScalarType::Long, {rows});
  check_tensor(table, "the table", ScalarType::Long, {});
  const Kernels& k = kernels();
  const int dtype = dtype_code(y);
  const int size = dtype == F32 ? 4 : 2;
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t* slot = static_cast<const int64_t*>(row_slots.const_data_ptr());
  const int64_t* numbers = static_cast<const int64_t*>(table.const_data_ptr());
  const int64_t stride = (width + 31) / 32 * 32;
  std::vector<float> sum((size_t)stride), part((size_t)stride);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t m = 0; m < rows; m++) {
    STD_TORCH_CHECK(slot[m] >= 0 && slot[m] < capacity, "slot ", slot[m], " is not in a table of ", capacity);
    bool any = false;
    for (int64_t d = 0; d < depth; d++) {
      const int64_t number = numbers[slot[m] * depth + d];
      if (number == 0) continue;
      const auto held = find_term(number);
      const Term& t = held->term;
      STD_TORCH_CHECK(t.in == width && id[m] >= 0 && id[m] < t.out, "id ", id[m], " is not a row of a term of ", t.out, " by ", t.in);
      if (!any) k.widen(out + m * width * size, dtype, width, sum.data());
      any = true;
      if (t.kind == LOWRANK) {
        for (int64_t r = 0; r < t.rank; r++) {
          float by;
          std::vector<float> factors((size_t)(t.left_term ? 32 : 1));
          if (t.left_term) {
            k.decode(*t.left_term, r, id[m] / 32 * 32, id[m] + 1, factors.data());
            by = factors[(size_t)(id[m] % 32)];
          } else {
            k.widen(static_cast<const char*>(t.left) + (id[m] * t.rank + r) * (t.dtype == F32 ? 4 : 2), t.dtype, 1, &by);
          }
          if (t.right_term)
            k.decode(*t.right_term, r, 0, width, part.data());
          else
            k.widen(static_cast<const char*>(t.right) + r * width * (t.dtype == F32 ? 4 : 2), t.dtype, width, part.data());
          for (int64_t i = 0; i < width; i++) sum[(size_t)i] += *t.gain * by * part[(size_t)i];
        }
      } else {
        k.decode(t, id[m], 0, width, part.data());
        for (int64_t i = 0; i < width; i++) sum[(size_t)i] += part[(size_t)i];
      }
    }
    if (any) k.narrow(sum.data(), width, dtype, out + m * width * size);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deltakeeper, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor table, Tensor slots, Tensor starts, int merge_from) -> Tensor");
  m.def("add_terms(Tensor(a!) y, Tensor x, Tensor table, Tensor slots, Tensor starts) -> ()");
  m.def("add_rows(Tensor(a!) y, Tensor ids, Tensor table, Tensor row_slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deltakeeper, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("add_terms", TORCH_BOX(&add_terms));
  m.impl("add_rows", TORCH_BOX(&add_rows));
}

}  // namespace deltakeeper
