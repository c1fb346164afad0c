// Passes over rows of one instruction set, rounded where transformers in plain torch rounds.

// The sum of squares in the order in which torch sums a row: 4 × 8 lanes, added up every 16 steps, then every 256, ….
template <int D>
static float sum_squares(const char* x, int64_t n) {
  constexpr int64_t SIZE = D == F32 ? 4 : 2, LANES = 32, PARTS = LANES / W;
  const int64_t eights = n / 8, steps = eights / 4;
  float levels[4][LANES];
  for (auto& level : levels)
    for (float& lane : level) lane = 0.f;
  for (int64_t i = 0; i < steps;) {
    const int64_t stop = i + 16 <= steps ? i + 16 : steps;
    V sum[PARTS];
    for (int64_t j = 0; j < PARTS; j++) sum[j] = v_load(levels[0] + j * W);
    const bool whole = stop == i + 16;
    for (; i < stop; i++)
      for (int64_t j = 0; j < PARTS; j++) {
        const V a = v_get<D>(x + (i * LANES + j * W) * SIZE, W);
        sum[j] = v_add(sum[j], v_settle(v_mul(a, a)));
      }
    for (int64_t j = 0; j < PARTS; j++) v_store(levels[0] + j * W, sum[j]);
    for (int level = 1; whole && level < 4; level++) {
      for (int64_t j = 0; j < LANES; j++) {
        levels[level][j] += levels[level - 1][j];
        levels[level - 1][j] = 0.f;
      }
      if (i & (15ll << (level * 4))) break;
    }
  }
  float* lanes = levels[0];
  for (int level = 1; level < 4; level++)
    for (int64_t j = 0; j < LANES; j++) lanes[j] += levels[level][j];
  const auto square = [&](int64_t i) {
    float a[W];
    v_store(a, v_get<D>(x + i * SIZE, 1));
    return settle(a[0] * a[0]);
  };
  for (int64_t i = steps * LANES; i < eights * 8; i++) lanes[i % 8] += square(i);
  for (int64_t part = 1; part < 4; part++)
    for (int64_t j = 0; j < 8; j++) lanes[j] += lanes[part * 8 + j];
  float total = 0.f;
  for (int64_t i = eights * 8; i < n; i++) total += square(i);
  for (int64_t j = 0; j < 8; j++) total += lanes[j];
  return total;
}

template <int D>
static void norm_rows(const Norm& p, int64_t first, int64_t last) {
  constexpr int64_t SIZE = D == F32 ? 4 : 2;
  const V offset = v_set(p.offset);
  for (int64_t m = first; m < last; m++) {
    const char* x = (const char*)p.x + m * p.stride * SIZE;
    const char* weight = (const char*)p.weight + p.slots[m] * p.dim * SIZE;
    char* out = (char*)p.out + m * p.dim * SIZE;
    const V by = v_set(1.f / __builtin_sqrtf(sum_squares<D>(x, p.dim) / (float)p.dim + p.eps));
    for (int64_t i = 0; i < p.dim; i += W) {
      V y = v_mul(v_get<D>(x + i * SIZE, p.dim - i), by);
      if (p.round_first) y = v_round<D>(y);
      v_put<D>(out + i * SIZE, v_mul(y, v_add(v_get<D>(weight + i * SIZE, p.dim - i), offset)), p.dim - i);
    }
  }
}

// x / (1 + e^-x), or x/2 · (1 + tanh u) with u = √(2/π)(x + 0.044715 x³), step by step as torch has it.
static inline V activate(V x, int activation) {
  if (activation == SILU) return v_div(x, v_add(v_set(1.f), v_exp(v_sub(v_zero(), x))));
  const V cube = v_mul(v_mul(x, x), x);
  const V u = v_mul(v_set(0.7978845608f), v_add(x, v_settle(v_mul(v_set(0.044715f), cube))));
  return v_mul(v_mul(v_set(0.5f), x), v_add(v_set(1.f), v_tanh(u)));
}

template <int D>
static void gate_rows(const Gate& p, int64_t first, int64_t last) {
  constexpr int64_t SIZE = D == F32 ? 4 : 2;
  for (int64_t m = first; m < last; m++) {
    const char* gate = (const char*)p.gate + m * p.gate_stride * SIZE;
    const char* up = (const char*)p.up + m * p.up_stride * SIZE;
    char* out = (char*)p.out + m * p.width * SIZE;
    for (int64_t i = 0; i < p.width; i += W) {
      const V y = v_round<D>(activate(v_get<D>(gate + i * SIZE, p.width - i), p.activation));
      v_put<D>(out + i * SIZE, v_mul(y, v_get<D>(up + i * SIZE, p.width - i)), p.width - i);
    }
  }
}

template <int D>
static void rotate_rows(const Rotation& p, int64_t first, int64_t last) {
  constexpr int64_t SIZE = D == F32 ? 4 : 2;
  const int64_t half = p.turned / 2;
  for (int64_t m = first; m < last; m++) {
    const char* cos = (const char*)p.cos + m * p.cos_stride * SIZE;
    const char* sin = (const char*)p.sin + m * p.sin_stride * SIZE;
    for (int64_t h = 0; h < p.heads; h++) {
      const char* x = (const char*)p.x + (m * p.token_stride + h * p.head_stride) * SIZE;
      char* out = (char*)p.out + (m * p.heads + h) * p.dim * SIZE;
      for (int64_t i = 0; i < half; i += W) {
        const int64_t n = half - i, low = i * SIZE, high = (half + i) * SIZE;
        const V a = v_get<D>(x + low, n), b = v_get<D>(x + high, n);
        const V a_cos = v_settle(v_round<D>(v_mul(a, v_get<D>(cos + low, n))));
        const V b_sin = v_settle(v_round<D>(v_mul(b, v_get<D>(sin + low, n))));
        const V b_cos = v_settle(v_round<D>(v_mul(b, v_get<D>(cos + high, n))));
        const V a_sin = v_settle(v_round<D>(v_mul(a, v_get<D>(sin + high, n))));
        v_put<D>(out + low, v_sub(a_cos, b_sin), n);
        v_put<D>(out + high, v_add(b_cos, a_sin), n);
      }
      __builtin_memcpy(out + p.turned * SIZE, x + p.turned * SIZE, (size_t)((p.dim - p.turned) * SIZE));
    }
  }
}

static void norm(const Norm& p, int64_t first, int64_t last) {
  p.dtype == F32 ? norm_rows<F32>(p, first, last) : p.dtype == F16 ? norm_rows<F16>(p, first, last) : norm_rows<BF16>(p, first, last);
}

static void gate(const Gate& p, int64_t first, int64_t last) {
  p.dtype == F32 ? gate_rows<F32>(p, first, last) : p.dtype == F16 ? gate_rows<F16>(p, first, last) : gate_rows<BF16>(p, first, last);
}

static void rotate(const Rotation& p, int64_t first, int64_t last) {
  p.dtype == F32   ? rotate_rows<F32>(p, first, last)
  : p.dtype == F16 ? rotate_rows<F16>(p, first, last)
                   : rotate_rows<BF16>(p, first, last);
}
