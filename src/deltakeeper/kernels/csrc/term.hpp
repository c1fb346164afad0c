// A packed term as the products see it: raw views, checked once when the term was made.
#pragma once
#include <cstddef>
#include <cstdint>

using std::size_t;

namespace deltakeeper {

enum Kind : int { SIGNS = 0, LOWRANK = 1, SPARSE = 2, GROUPED_INT = 3, DENSE = 4 };
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2, CODES = 3 };
enum Axis : int { TENSOR = 0, ROW = 1, COLUMN = 2 };

constexpr int MAX_PLANES = 16;

struct Term {
  int kind = 0;
  int64_t out = 0, in = 0;
  int64_t words = 0;  // 32-bit words of a row of bits or codes

  int planes = 0;  // signs
  int axis = 0;
  const uint32_t* packed[2 * MAX_PLANES] = {};  // a woven plane with zeros is two
  const float* scales[2 * MAX_PLANES] = {};
  const uint32_t* mask = nullptr;  // signs: entries that are not zero, or null; sparse: kept entries
  bool woven = false;  // signs: word i of 16 rows lies together, its nibbles in the order of `weave`; there is no mask then

  int dtype = 0;                  // of `values`
  const void* values = nullptr;   // dense, sparse
  const int64_t* first = nullptr; // sparse: index of the first value of each row, (out + 1)
  const float* gain = nullptr;    // sparse: (1) or (out); lowrank: (1)
  bool gain_by_row = false;

  int bits = 0;  // grouped_int; sparse codes of one byte have none
  int64_t group = 0, groups = 0;
  const float* steps = nullptr;    // (out, groups)
  const uint8_t* zeros = nullptr;  // (out, groups) or null
  float zero = 0;                  // the zero of every code where `zeros` is null
  float factor = 1;                // value = factor * code - zero

  int64_t rank = 0;  // lowrank
  const void* left = nullptr;   // (out, rank) of `dtype`
  const void* right = nullptr;  // (rank, in) of `dtype`
  const Term* left_term = nullptr;   // (rank, out)
  const Term* right_term = nullptr;  // (rank, in)
};

// One group of rows with the terms of its slot.
struct Group {
  int64_t start = 0, stop = 0;
  const Term* const* terms = nullptr;
  int count = 0;
  bool merged = false;
  float* const* shrunk = nullptr;  // per term: (rows, rank) where it is low-rank, float32
};

// Sums of a row of x that woven planes look up: for every four columns the sums for all sixteen patterns of signs, in whole
// numbers of `step`. Two bytes a sum, apart: for 16 columns 64 low bytes, then 64 high ones.
struct Tables {
  const uint8_t* sums = nullptr;  // null where the row's entries differ too much: it is multiplied exactly
  float step = 0;
};

// What a product works on. `x` and `wide` have rows of `stride` entries, zero past `in`.
struct Product {
  int64_t rows = 0, in = 0, out = 0, stride = 0;
  const uint16_t* x = nullptr;      // bfloat16, or null
  const float* wide = nullptr;      // float32, or null where nothing needs it
  const float* panels = nullptr;    // float32, PANEL rows side by side: (rows / PANEL, in, PANEL), or null where nothing needs it
  const uint16_t* woven = nullptr;  // bfloat16 in the order of woven words, or null
  const Tables* tables = nullptr;   // of each row, or null
  int64_t tile = 32;                // output rows of a tile, a multiple of 32
  const uint16_t* weight = nullptr; // bfloat16 (out, in), or null: terms alone
  const void* bias = nullptr;       // bfloat16 (out), or null
  void* y = nullptr;                // (rows, out): written where there is a weight, else added to
  int y_dtype = 0;
  const Group* groups = nullptr;
  int64_t n_groups = 0;
};

struct Attention;  // attention.hpp
struct Norm;       // pointwise.hpp
struct Gate;
struct Rotation;

struct Kernels {
  const char* name;
  bool narrow_signs;  // planes are woven, and multiply bfloat16 as it is
  void (*run)(const Product&, int64_t begin, int64_t end);  // output rows, from a multiple of 32
  // a row of x, bfloat16, zero to its stride: in woven order, and its tables (`sums` has room for stride * SUMS bytes)
  void (*tabulate)(const uint16_t* x, int64_t in, int64_t stride, uint16_t* woven, uint8_t* sums, Tables* tables);
  // rows of a right factor times rows of x: into[m * rank + r]
  void (*shrink)(const Term&, const float* x, int64_t stride, int64_t rows, float* into, int64_t first, int64_t last);
  void (*decode)(const Term&, int64_t row, int64_t begin, int64_t end, float* into);
  void (*widen)(const void* from, int dtype, int64_t n, float* into);
  void (*narrow)(const float* from, int64_t n, int dtype, void* into);
  void (*attend)(const Attention&, int64_t first_span, int64_t last_span);
  void (*norm)(const Norm&, int64_t first_row, int64_t last_row);
  void (*gate)(const Gate&, int64_t first_row, int64_t last_row);
  void (*rotate)(const Rotation&, int64_t first_token, int64_t last_token);
};

constexpr int64_t TILE = 256;   // most output rows of a tile
constexpr int64_t WEAVE = 16;   // rows whose words lie together
constexpr int64_t PANEL = 16;   // rows of x that lie side by side where they are multiplied with one entry at a time
constexpr int64_t SUMS = 8;     // bytes of tables for each column

// Bit p of a woven word is the column `woven_column(p)` of its 32: byte g holds columns 4g to 4g + 3 and 16 more.
constexpr int woven_column(int p) { return 4 * (p / 8) + p % 4 + (p % 8 < 4 ? 0 : 16); }

extern const Kernels SCALAR, AVX2, AVX512, AVX512BF16;

}  // namespace deltakeeper
