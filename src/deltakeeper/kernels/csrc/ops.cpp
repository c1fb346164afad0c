// The products as torch operators: everything is checked before memory is touched, then tiles of outputs run in parallel.
#include <cstring>

#include "operators.hpp"

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
  bool panels = false;      // whether kept entries are multiplied one by one
};

// The rows of a table of terms, or of one of several tables: int64 (slots, depth).
struct Table {
  const int64_t* ids;
  int64_t capacity, depth;
  explicit Table(const Tensor& tables, int64_t which = 0) {
    check_tensor(tables, "the table", ScalarType::Long, {});
    capacity = tables.size(tables.dim() - 2);
    depth = tables.size(tables.dim() - 1);
    ids = static_cast<const int64_t*>(tables.const_data_ptr()) + which * capacity * depth;
  }
};

Plan plan_groups(const Table& table, const Tensor& slots, const Tensor& starts, int64_t rows, int64_t out, int64_t in,
                 int64_t merge_from, bool narrow_signs) {
  check_tensor(slots, "the slots", ScalarType::Long, {slots.numel()});
  check_tensor(starts, "the starts", ScalarType::Long, {slots.numel() + 1});
  const int64_t n = slots.numel(), capacity = table.capacity, depth = table.depth;
  const int64_t* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  const int64_t* start = static_cast<const int64_t*>(starts.const_data_ptr());
  const int64_t* ids = table.ids;
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
      const bool kept = group.terms[i]->kind == SPARSE;
      (looked_up ? plan.woven : kept ? plan.panels : plan.wide) = true;
    }
  }
  plan.thin.resize(thin);
  return plan;
}

// Memory of the calling thread that lasts from call to call: fresh pages for every product would cost as much as a small one.
template <int WHICH>
char* scratch(size_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local size_t room = 0;
  if (bytes + 64 > room) {
    memory.reset(new char[bytes + 64]);
    room = bytes + 64;
  }
  return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
}

// What products of one x share: its rows padded, in float32, in woven order, and their tables.
struct Inputs {
  int64_t rows = 0, in = 0, stride = 0;
  const uint16_t* x = nullptr;
  const float* wide = nullptr;
  const float* panels = nullptr;
  const uint16_t* woven = nullptr;
  Tables* tables = nullptr;
};

// Rows side by side, so that one entry of a weight meets a vector of them; rows past the last are zero.
void lay_panel(const float* wide, int64_t stride, int64_t in, int64_t rows, float* to) {
  for (int64_t j = 0; j < in; j++)
    for (int64_t m = 0; m < PANEL; m++) to[j * PANEL + m] = m < rows ? wide[m * stride + j] : 0.f;
}

Inputs prepare_inputs(const Tensor& tensor, int dtype, bool need_wide, bool need_woven, bool need_panels, const Kernels& k) {
  Inputs r;
  r.rows = tensor.size(0);
  r.in = tensor.size(1);
  r.stride = (r.in + 31) / 32 * 32;
  // rows a multiple of half a page apart would fall into the same sets of the first cache
  if (r.rows >= 4 && r.stride % 1024 == 0) r.stride += 32;
  const void* x = tensor.const_data_ptr();
  const size_t entries = (size_t)(r.rows * r.stride), gap = (size_t)(r.stride - r.in);
  if (dtype == BF16) {
    r.x = static_cast<const uint16_t*>(x);
    if (gap) {
      uint16_t* to = reinterpret_cast<uint16_t*>(scratch<0>(entries * 2));
      for (int64_t m = 0; m < r.rows; m++) {
        std::memcpy(to + m * r.stride, r.x + m * r.in, (size_t)r.in * 2);
        std::memset(to + m * r.stride + r.in, 0, gap * 2);
      }
      r.x = to;
    }
  }
  if (need_wide || need_panels) {
    if (dtype == F32 && !gap) {
      r.wide = static_cast<const float*>(x);
    } else {
      float* to = reinterpret_cast<float*>(scratch<1>(entries * 4));
      for (int64_t m = 0; m < r.rows; m++) {
        k.widen(static_cast<const char*>(x) + m * r.in * (dtype == F32 ? 4 : 2), dtype, r.in, to + m * r.stride);
        std::memset(to + m * r.stride + r.in, 0, gap * 4);
      }
      r.wide = to;
    }
  }
  if (need_panels) {
    const int64_t count = (r.rows + PANEL - 1) / PANEL;
    float* to = reinterpret_cast<float*>(scratch<3>((size_t)(count * PANEL * r.in) * 4));
    torch::stable::parallel_for(0, count, 1 + 32768 / (PANEL * r.in), [&](int64_t a, int64_t b) {
      for (int64_t n = a; n < b; n++) {
        const int64_t first = n * PANEL, left = r.rows - first;
        lay_panel(r.wide + first * r.stride, r.stride, r.in, left < PANEL ? left : PANEL, to + first * r.in);
      }
    });
    r.panels = to;
  }
  if (need_woven) {
    const size_t tables = (size_t)r.rows * sizeof(Tables);
    char* room = scratch<2>(entries * (2 + SUMS) + tables + 128);
    uint8_t* sums = reinterpret_cast<uint8_t*>(room);
    r.woven = reinterpret_cast<uint16_t*>(room + entries * SUMS);
    r.tables = reinterpret_cast<Tables*>(room + (entries * (2 + SUMS) + 63) / 64 * 64);
    uint16_t* woven = const_cast<uint16_t*>(r.woven);
    torch::stable::parallel_for(0, r.rows, 1 + 32768 / r.stride, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; m++)
        k.tabulate(r.x + m * r.stride, r.in, r.stride, woven + m * r.stride, sums + m * r.stride * SUMS, r.tables + m);
    });
  }
  return r;
}

struct Job {
  Plan plan;
  Product product;
};

// Products of one x with several weights: tiles of all of them run side by side.
void run_products(std::vector<Job>& jobs, const Tensor& x, int dtype, const Kernels& k) {
  bool wide = false, woven = false, panels = false;
  for (const Job& job : jobs) {
    wide |= job.plan.wide;
    panels |= job.plan.panels;
    woven |= job.plan.woven;
  }
  const Inputs inputs = prepare_inputs(x, dtype, wide, woven, panels, k);
  int64_t work = 0;
  for (Job& job : jobs) {
    Plan& plan = job.plan;
    Product& p = job.product;
    p.rows = inputs.rows;
    p.in = inputs.in;
    p.stride = inputs.stride;
    p.x = inputs.x;
    p.wide = inputs.wide;
    p.panels = inputs.panels;
    p.woven = inputs.woven;
    p.tables = inputs.tables;
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
    p.groups = plan.groups.data();
    p.n_groups = (int64_t)plan.groups.size();
    // what is read again for each tile has to be little: tables of x are long, and the weight's rows should stay in cache
    const int64_t fits = (256 << 10) / (2 * (p.in < 2048 ? p.in : 2048)) / 32 * 32;
    p.tile = plan.woven ? TILE : fits < 32 ? 32 : fits < TILE ? fits : TILE;
    work += p.out * p.in * p.rows;
  }
  // a thread is worth its start from about two hundred thousand multiplications; each gets an equal part of every weight
  const int64_t threads = work < 400000 ? 1 : torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t a, int64_t b) {
    for (int64_t t = a; t < b; t++)
      for (const Job& job : jobs) {
        const int64_t blocks = (job.product.out + 31) / 32;
        const int64_t from = blocks * t / threads * 32, to = blocks * (t + 1) / threads * 32;
        if (from < to) k.run(job.product, from, to < job.product.out ? to : job.product.out);
      }
  });
}

// The job of one weight; its outputs are made here.
Job plan_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Table& table,
                const Tensor& slots, const Tensor& starts, int64_t merge_from, const Kernels& k, std::vector<Tensor>& outputs) {
  STD_TORCH_CHECK(weight.dim() == 2, "the weight is a matrix");
  check_tensor(weight, "the weight", ScalarType::BFloat16, {weight.size(0), x.size(1)});
  if (bias) check_tensor(*bias, "the bias", ScalarType::BFloat16, {weight.size(0)});
  Job job;
  job.product.out = weight.size(0);
  job.plan = plan_groups(table, slots, starts, x.size(0), weight.size(0), x.size(1), merge_from, k.narrow_signs);
  outputs.push_back(torch::stable::new_empty(x, {x.size(0), weight.size(0)}));
  job.product.weight = static_cast<const uint16_t*>(weight.const_data_ptr());
  job.product.bias = bias ? bias->const_data_ptr() : nullptr;
  job.product.y = outputs.back().mutable_data_ptr();
  job.product.y_dtype = BF16;
  return job;
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor table, Tensor slots, Tensor starts, int64_t merge_from) {
  STD_TORCH_CHECK(x.dim() == 2 && table.dim() == 2, "x and the table are matrices");
  check_tensor(x, "x", ScalarType::BFloat16, {});
  const Kernels& k = kernels();
  std::vector<Tensor> y;
  std::vector<Job> jobs;
  jobs.push_back(plan_linear(x, weight, bias, Table(table), slots, starts, merge_from, k, y));
  if (x.size(0)) run_products(jobs, x, BF16, k);
  return y[0];
}

}  // namespace

std::vector<Tensor> products(const Tensor& x, const std::vector<Tensor>& weights, const Tensor& tables, int64_t first,
                             const Tensor& slots, const Tensor& starts, int64_t merge_from) {
  STD_TORCH_CHECK(x.dim() == 2 && tables.dim() == 3 && first >= 0 && tables.size(0) >= first + (int64_t)weights.size(),
                  "x is a matrix, and there is a table for each weight");
  check_tensor(x, "x", ScalarType::BFloat16, {});
  const Kernels& k = kernels();
  std::vector<Tensor> y;
  std::vector<Job> jobs;
  for (size_t i = 0; i < weights.size(); i++)
    jobs.push_back(plan_linear(x, weights[i], std::nullopt, Table(tables, first + (int64_t)i), slots, starts, merge_from, k, y));
  if (x.size(0)) run_products(jobs, x, BF16, k);
  return y;
}

namespace {

std::vector<Tensor> linears(Tensor x, std::vector<Tensor> weights, Tensor tables, Tensor slots, Tensor starts, int64_t merge_from) {
  return products(x, weights, tables, 0, slots, starts, merge_from);
}

void add_terms(Tensor y, Tensor x, Tensor table, Tensor slots, Tensor starts) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && table.dim() == 2, "x and y are matrices of as many rows, and the table is one");
  check_tensor(x, "x", x.scalar_type(), {});
  check_tensor(y, "y", y.scalar_type(), {});
  const Kernels& k = kernels();
  const int dtype = dtype_code(x);
  std::vector<Job> jobs(1);
  Product& p = jobs[0].product;
  p.out = y.size(1);
  p.y_dtype = dtype_code(y);
  jobs[0].plan = plan_groups(Table(table), slots, starts, x.size(0), p.out, x.size(1), INT64_MAX, k.narrow_signs && dtype == BF16);
  p.y = y.mutable_data_ptr();
  if (x.size(0) && !jobs[0].plan.terms.empty()) run_products(jobs, x, dtype, k);
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
  m.def("linears(Tensor x, Tensor[] weights, Tensor tables, Tensor slots, Tensor starts, int merge_from) -> Tensor[]");
  m.def("add_terms(Tensor(a!) y, Tensor x, Tensor table, Tensor slots, Tensor starts) -> ()");
  m.def("add_rows(Tensor(a!) y, Tensor ids, Tensor table, Tensor row_slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deltakeeper, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("add_terms", TORCH_BOX(&add_terms));
  m.impl("add_rows", TORCH_BOX(&add_rows));
}

}  // namespace deltakeeper
