#include "registry.hpp"

#include <atomic>
#include <cstring>

namespace deltakeeper {
namespace {

std::shared_mutex lock;
std::unordered_map<int64_t, std::shared_ptr<const Held>> terms;
int64_t next_id = 1;
std::atomic<const Kernels*> active{nullptr};

int64_t keep(std::shared_ptr<const Held> held) {
  const std::unique_lock<std::shared_mutex> guard(lock);
  terms.emplace(next_id, std::move(held));
  return next_id++;
}

int64_t bit_words(int64_t columns) { return (columns + 31) / 32; }

std::shared_ptr<Held> matrix(int kind, int64_t out, int64_t in) {
  STD_TORCH_CHECK(out > 0 && in > 0, "a term must have rows and columns");
  auto held = std::make_shared<Held>();
  held->term.kind = kind;
  held->term.out = out;
  held->term.in = in;
  held->term.words = bit_words(in);
  return held;
}

template <typename T>
const T* view(Held& held, const Tensor& t) {
  held.owned.push_back(t);
  return static_cast<const T*>(t.const_data_ptr());
}

using torch::headeronly::ScalarType;

int64_t woven_words(int64_t out, int64_t count) { return (out + WEAVE - 1) / WEAVE * WEAVE * count; }

// The words of 16 rows side by side, nibbles in the order that look-ups want; rows past the last are zeros.
std::shared_ptr<uint32_t> weave(const uint32_t* words, const uint32_t* others, int64_t out, int64_t count) {
  std::shared_ptr<uint32_t> woven = allocate_words((size_t)woven_words(out, count));
  for (int64_t row = 0; row < out; row++)
    for (int64_t i = 0; i < count; i++) {
      const uint32_t w = words[row * count + i] | (others ? ~others[row * count + i] : 0u);
      uint32_t low = w & 0xFFFFu, high = w >> 16;
      for (uint32_t* half : {&low, &high}) {  // four nibbles to the low halves of four bytes
        *half = (*half | *half << 8) & 0x00FF00FFu;
        *half = (*half | *half << 4) & 0x0F0F0F0Fu;
      }
      woven.get()[(row / WEAVE * count + i) * WEAVE + row % WEAVE] = low | high << 4;
    }
  return woven;
}

int64_t hold_signs(std::vector<Tensor> packed, std::vector<Tensor> scales, std::optional<Tensor> nonzero, int64_t out,
                   int64_t in, int64_t axis) {
  auto held = matrix(SIGNS, out, in);
  Term& t = held->term;
  STD_TORCH_CHECK(!packed.empty() && packed.size() <= MAX_PLANES && packed.size() == scales.size(), "1 to 16 planes, each with its scale");
  STD_TORCH_CHECK(axis >= TENSOR && axis <= COLUMN, "the axis of the scales is 0, 1 or 2");
  const std::vector<int64_t> bits = {out, t.words};
  if (nonzero) check_tensor(*nonzero, "the mask of non-zeros", ScalarType::Int, bits);
  const uint32_t* mask = nonzero ? static_cast<const uint32_t*>(nonzero->const_data_ptr()) : nullptr;
  t.axis = (int)axis;
  t.woven = kernels().narrow_signs && axis != COLUMN;
  if (nonzero && !t.woven) t.mask = view<uint32_t>(*held, *nonzero);
  for (size_t p = 0; p < packed.size(); p++) {
    check_tensor(packed[p], "a sign plane", ScalarType::Int, bits);
    STD_TORCH_CHECK(scales[p].numel() == (axis == TENSOR ? 1 : axis == ROW ? out : in), "a scale has the wrong size");
    check_tensor(scales[p], "a scale", ScalarType::Float, {});
    if (!t.woven) {
      t.packed[t.planes] = view<uint32_t>(*held, packed[p]);
      t.scales[t.planes++] = view<float>(*held, scales[p]);
      continue;
    }
    const uint32_t* words = static_cast<const uint32_t*>(packed[p].const_data_ptr());
    const float* scale = static_cast<const float*>(scales[p].const_data_ptr());
    std::vector<float> own(scale, scale + scales[p].numel());
    if (axis == ROW) own.resize((size_t)((out + WEAVE - 1) / WEAVE * WEAVE), 0.f);
    // zeros: the mean of a plane in which they are minus and one in which they are plus
    for (float& s : own) s = mask ? s / 2 : s;
    held->woven_scales.push_back(std::move(own));
    for (int copy = 0; copy < (mask ? 2 : 1); copy++) {
      held->woven.push_back(weave(words, copy ? mask : nullptr, out, t.words));
      held->woven_bytes += woven_words(out, t.words) * 4;
      t.scales[t.planes++] = held->woven_scales.back().data();
    }
  }
  for (size_t p = 0; p < held->woven.size(); p++) t.packed[p] = held->woven[p].get();
  return keep(held);
}

int64_t hold_dense(Tensor values) {
  STD_TORCH_CHECK(values.dim() == 2, "a dense term is a matrix");
  auto held = matrix(DENSE, values.size(0), values.size(1));
  held->term.dtype = dtype_code(values);
  check_tensor(values, "a dense term", values.scalar_type(), {});
  held->term.values = view<char>(*held, values);
  return keep(held);
}

int64_t hold_sparse(Tensor mask, Tensor values, Tensor first, Tensor gain, int64_t in, double zero) {
  STD_TORCH_CHECK(mask.dim() == 2, "a mask is a matrix of words");
  auto held = matrix(SPARSE, mask.size(0), in);
  Term& t = held->term;
  check_tensor(mask, "the mask", ScalarType::Int, {t.out, t.words});
  check_tensor(first, "the row starts", ScalarType::Long, {t.out + 1});
  check_tensor(values, "the kept values", values.scalar_type(), {});
  check_tensor(gain, "the gain", ScalarType::Float, {});
  STD_TORCH_CHECK(gain.numel() == 1 || gain.numel() == t.out, "the gain is one number, or one for each row");
  t.mask = view<uint32_t>(*held, mask);
  t.first = view<int64_t>(*held, first);
  for (int64_t row = 0, at = 0; row < t.out; row++) {  // what the products will trust
    STD_TORCH_CHECK(t.first[row] == at, "the row starts are not those of the mask");
    for (int64_t w = 0; w < t.words; w++) at += __builtin_popcount(t.mask[row * t.words + w]);
    STD_TORCH_CHECK(t.first[row + 1] == at && at <= values.numel(), "the mask keeps more than there are values");
  }
  t.dtype = values.scalar_type() == ScalarType::Byte ? (int)CODES : dtype_code(values);
  t.values = view<char>(*held, values);
  t.gain = view<float>(*held, gain);
  t.gain_by_row = gain.numel() > 1;
  t.zero = (float)zero;
  return keep(held);
}

int64_t hold_codes(Tensor packed, Tensor steps, std::optional<Tensor> zeros, int64_t in, int64_t bits, int64_t group) {
  STD_TORCH_CHECK(packed.dim() == 2 && bits >= 1 && bits <= 8 && group >= 0, "codes are rows of words, of 1 to 8 bits");
  auto held = matrix(GROUPED_INT, packed.size(0), in);
  Term& t = held->term;
  t.words = (in * bits + 31) / 32;
  t.bits = (int)bits;
  t.group = group;
  t.groups = group ? (in + group - 1) / group : 1;
  check_tensor(packed, "the codes", ScalarType::Int, {t.out, t.words});
  check_tensor(steps, "the steps", ScalarType::Float, {t.out, t.groups});
  t.packed[0] = view<uint32_t>(*held, packed);
  t.steps = view<float>(*held, steps);
  if (zeros) {
    check_tensor(*zeros, "the zero points", ScalarType::Byte, {t.out, t.groups});
    t.zeros = view<uint8_t>(*held, *zeros);
  }
  t.factor = bits == 1 && !zeros ? 2.f : 1.f;
  t.zero = bits == 1 ? 1.f : (float)(1 << (bits - 1));
  return keep(held);
}

int64_t hold_factors(Tensor left, Tensor right, Tensor gain) {
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0), "factors share their rank");
  STD_TORCH_CHECK(left.scalar_type() == right.scalar_type() && gain.numel() == 1, "factors have one dtype and one gain");
  auto held = matrix(LOWRANK, left.size(0), right.size(1));
  Term& t = held->term;
  check_tensor(left, "the left factor", left.scalar_type(), {});
  check_tensor(right, "the right factor", right.scalar_type(), {});
  check_tensor(gain, "the gain", ScalarType::Float, {});
  t.dtype = dtype_code(left);
  t.rank = left.size(1);
  t.left = view<char>(*held, left);
  t.right = view<char>(*held, right);
  t.gain = view<float>(*held, gain);
  return keep(held);
}

int64_t hold_packed_factors(int64_t left, int64_t right, Tensor gain) {
  const auto u = find_term(left), v = find_term(right);
  STD_TORCH_CHECK(u->term.out == v->term.out && u->term.kind != LOWRANK && v->term.kind != LOWRANK && gain.numel() == 1,
                  "packed factors share their rank and have one gain");
  auto held = matrix(LOWRANK, u->term.in, v->term.in);
  Term& t = held->term;
  check_tensor(gain, "the gain", ScalarType::Float, {});
  t.rank = u->term.out;
  t.left_term = &u->term;
  t.right_term = &v->term;
  t.gain = view<float>(*held, gain);
  held->parts = {u, v};
  return keep(held);
}

void release(int64_t id) {
  std::unique_lock<std::shared_mutex> guard(lock);
  const auto gone = terms.extract(id);
  guard.unlock();  // its memory is given back when nobody waits for the lock
}

int64_t bytes_of(const Held& held) {
  int64_t bytes = held.woven_bytes;
  for (const Tensor& t : held.owned) bytes += t.numel() * (int64_t)t.element_size();
  for (const auto& scales : held.woven_scales) bytes += (int64_t)(scales.size() * sizeof(float));
  for (const auto& part : held.parts) bytes += bytes_of(*part);
  return bytes;
}

int64_t held_bytes(int64_t id) { return bytes_of(*find_term(id)); }

bool supported(const std::string& name) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                                     __builtin_cpu_supports("avx512vnni");
#endif
  return name == "scalar";
}

const Kernels* by_name(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512bf16") return &AVX512BF16;
  if (name == "avx512") return &AVX512;
  if (name == "avx2") return &AVX2;
#endif
  return &SCALAR;
}

bool use_isa(std::string name) {
  if (!supported(name)) return false;
  active.store(by_name(name));
  return true;
}

std::string isa() { return kernels().name; }

}  // namespace

std::shared_ptr<const Held> find_term(int64_t id) {
  const std::shared_lock<std::shared_mutex> guard(lock);
  const auto found = terms.find(id);
  STD_TORCH_CHECK(found != terms.end(), "term ", id, " is not held; it was released while a table still named it");
  return found->second;
}

const Kernels& kernels() {
  const Kernels* chosen = active.load();
  if (!chosen) {
    for (const char* name : {"avx512bf16", "avx512", "avx2", "scalar"})
      if (supported(name)) {
        chosen = by_name(name);
        break;
      }
    active.store(chosen);
  }
  return *chosen;
}

int dtype_code(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "numbers must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? F32 : dtype == ScalarType::BFloat16 ? BF16 : F16;
}

void check_tensor(const Tensor& t, const char* what, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype, what, " must be contiguous, on the CPU, and of its dtype");
  if (shape.empty()) return;
  STD_TORCH_CHECK(t.dim() == (int64_t)shape.size(), what, " has the wrong number of dimensions");
  for (size_t i = 0; i < shape.size(); i++) STD_TORCH_CHECK(t.size((int64_t)i) == shape[i], what, " has the wrong shape");
}

STABLE_TORCH_LIBRARY_FRAGMENT(deltakeeper, m) {
  m.def("hold_signs(Tensor[] packed, Tensor[] scales, Tensor? nonzero, int out, int columns, int axis) -> int");
  m.def("hold_dense(Tensor values) -> int");
  m.def("hold_sparse(Tensor mask, Tensor values, Tensor first, Tensor gain, int columns, float zero) -> int");
  m.def("hold_codes(Tensor packed, Tensor steps, Tensor? zeros, int columns, int bits, int group) -> int");
  m.def("hold_factors(Tensor left, Tensor right, Tensor gain) -> int");
  m.def("hold_packed_factors(int left, int right, Tensor gain) -> int");
  m.def("release(int id) -> ()");
  m.def("held_bytes(int id) -> int");
  m.def("use_isa(str name) -> bool");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(deltakeeper, CompositeExplicitAutograd, m) {
  m.impl("hold_signs", TORCH_BOX(&hold_signs));
  m.impl("hold_dense", TORCH_BOX(&hold_dense));
  m.impl("hold_sparse", TORCH_BOX(&hold_sparse));
  m.impl("hold_codes", TORCH_BOX(&hold_codes));
  m.impl("hold_factors", TORCH_BOX(&hold_factors));
  m.impl("hold_packed_factors", TORCH_BOX(&hold_packed_factors));
  m.impl("release", TORCH_BOX(&release));
  m.impl("held_bytes", TORCH_BOX(&held_bytes));
  m.impl("use_isa", TORCH_BOX(&use_isa));
  m.impl("isa", TORCH_BOX(&isa));
}

}  // namespace deltakeeper
