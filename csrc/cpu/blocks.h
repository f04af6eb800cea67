// The inner loops: small matrix products over register tiles, and row operations over storage types.
// Included after vec.h, once per instruction set.

namespace fpet {
namespace FPET_ISA {
namespace {

// Register tiles: rows x vectors that leave room for the operands in 32 (AVX-512, Arm) or 16 vector registers.
#if FPET_VEC_BYTES == 64 || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVecs = 4, kDotRows = 4, kDotCols = 6;
#else
constexpr int kTileRows = 6, kTileVecs = 2, kDotRows = 3, kDotCols = 4;
#endif

// Memory that is wanted soon: fetched into the second-level cache from inside a product that leaves memory idle.
struct Ahead {
  const char *at = nullptr, *end = nullptr;

  // The next `bytes`, or null where fewer are left.
  const char* take(int64_t bytes) {
    if (end - at < bytes) return nullptr;
    at += bytes;
    return at - bytes;
  }
};
inline void prefetch_lines(const char* p, int lines) {
#pragma GCC unroll 16
  for (int u = 0; u < lines; ++u) __builtin_prefetch(p + u * 64, 0, 2);
}

// --- C (m x n) [+]= A (m x k) B (k x n) ----------------------------------------------------------------------------------
// A has any strides; B and C are row-major with n padded to whole vectors. Every element is summed over k in order, by the
// same instructions wherever it lies in the tile, so results do not depend on how rows are cut into tasks.

template <class T, int R, int V>
inline void matmul_tile(int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* c, int64_t c_row,
                        bool accumulate, Ahead* ahead) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  const char* fetch = ahead ? ahead->take(k * 192) : nullptr;
  for (int64_t p = 0; p < k; ++p) {
    if (fetch) prefetch_lines(fetch + p * 192, 3);
    Vec<T> bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bv[v] = load(b + p * b_row + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> av = splat(a[r * a_row + p * a_col]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += av * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* p = c + r * c_row + v * lanes;
      store(p, accumulate ? load(p) + acc[r][v] : acc[r][v]);
    }
}

template <class T, int V>
inline void matmul_rows(int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* c,
                        int64_t c_row, bool accumulate, Ahead* ahead) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    matmul_tile<T, kTileRows, V>(k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate, ahead);
  a += i * a_row;
  c += i * c_row;
  switch (m - i) {
    case 5: matmul_tile<T, 5, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
    case 4: matmul_tile<T, 4, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
    case 3: matmul_tile<T, 3, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
    case 2: matmul_tile<T, 2, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
    case 1: matmul_tile<T, 1, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
    default: break;
  }
}

template <class T>
void matmul(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* c,
            int64_t c_row, bool accumulate, Ahead* ahead = nullptr) {
  constexpr int lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + kTileVecs * lanes <= n; j += kTileVecs * lanes)
    matmul_rows<T, kTileVecs>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead);
  switch ((n - j) / lanes) {
    case 3: matmul_rows<T, 3>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead); break;
    case 2: matmul_rows<T, 2>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead); break;
    case 1: matmul_rows<T, 1>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead); break;
    default: break;
  }
}

// --- C (m x n) = X Gᵀ over rows given by pointers, each of `dim` elements: the products of dM ---------------------------------

// One step: acc += x · g over as many elements as a vector of E has. A product of two bfloat16 is exact in float32, so rows of
// bfloat16 need no conversion where the machine multiplies them itself.
template <class E>
struct DotStep {
  using T = E;
  static constexpr int count = kLanes<E>;
  using Row = Vec<E>;
  static Row read(const E* p) { return load(p); }
  static Vec<T> add(Vec<T> acc, Row x, Row g) { return acc + x * g; }
};
#ifdef __AVX512BF16__
template <>
struct DotStep<bf16> {
  using T = float;
  static constexpr int count = 32;
  using Row = __m512bh;
  static Row read(const bf16* p) { return load_bytes<__m512bh>(p); }
  static Vec<float> add(Vec<float> acc, Row x, Row g) { return _mm512_dpbf16_ps(acc, x, g); }
};
constexpr bool kDotsBf16 = true;
#else
constexpr bool kDotsBf16 = false;
#endif

// The type whose rows are multiplied: S itself where the machine can, else what it computes in.
template <class S, bool Native>
struct DotType {
  using type = Compute<S>;
};
template <class S>
struct DotType<S, true> {
  using type = S;
};

template <class E, int R, int Q>
inline void dot_tile(int64_t dim, const void* const* x, const void* const* g, Compute<E>* c, int64_t c_row, Ahead* ahead) {
  using Step = DotStep<E>;
  using T = Compute<E>;
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[R][Q];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) acc[r][q] = Vec<T>{};
  const E *xr[R], *gq[Q];
  for (int r = 0; r < R; ++r) xr[r] = (const E*)x[r];
  for (int q = 0; q < Q; ++q) gq[q] = (const E*)g[q];
  const char* fetch = ahead->take(dim / Step::count * 64);
  int64_t d = 0;
  for (; d + Step::count <= dim; d += Step::count) {
    if (fetch) prefetch_lines(fetch + d / Step::count * 64, 1);
    typename Step::Row xv[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) xv[r] = Step::read(xr[r] + d);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const typename Step::Row gv = Step::read(gq[q] + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][q] = Step::add(acc[r][q], xv[r], gv);
    }
  }
  // The sums of all accumulators, as many at once as a vector has lanes.
  constexpr int padded = (R * Q + lanes - 1) / lanes * lanes;
  Vec<T> flat[padded];
#pragma GCC unroll 32
  for (int i = 0; i < padded; ++i) flat[i] = i < R * Q ? acc[i / Q % R][i % Q] : Vec<T>{};
  T sums[padded];
#pragma GCC unroll 32
  for (int i = 0; i < padded; i += lanes) {
    sum_each<T>(flat + i);
    store(sums + i, flat[i]);
  }
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < Q; ++q) {
      T total = sums[r * Q + q];
      for (int64_t e = d; e < dim; ++e) total += to_compute(xr[r][e]) * to_compute(gq[q][e]);
      c[r * c_row + q] = total;
    }
}

template <class E, int R>
inline void dot_rows(int64_t n, int64_t dim, const void* const* x, const void* const* g, Compute<E>* c, int64_t c_row,
                     Ahead* ahead) {
  int64_t j = 0;
  for (; j + kDotCols <= n; j += kDotCols) dot_tile<E, R, kDotCols>(dim, x, g + j, c + j, c_row, ahead);
  for (; j + 2 <= n; j += 2) dot_tile<E, R, 2>(dim, x, g + j, c + j, c_row, ahead);
  for (; j < n; ++j) dot_tile<E, R, 1>(dim, x, g + j, c + j, c_row, ahead);
}

template <class E>
void dot_products(int64_t m, int64_t n, int64_t dim, const void* const* x, const void* const* g, Compute<E>* c, int64_t c_row,
                  Ahead* ahead) {
  int64_t i = 0;
  for (; i + kDotRows <= m; i += kDotRows) dot_rows<E, kDotRows>(n, dim, x + i, g, c + i * c_row, c_row, ahead);
  for (; i + 2 <= m; i += 2) dot_rows<E, 2>(n, dim, x + i, g, c + i * c_row, c_row, ahead);
  for (; i < m; ++i) dot_rows<E, 1>(n, dim, x + i, g, c + i * c_row, c_row, ahead);
}

// --- rows of any storage type ----------------------------------------------------------------------------------------------

template <class T, class S>
inline void read_strided(T* out, const S* in, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = T(to_compute(in[i * stride]));
}

template <class S>
inline void read_row(Compute<S>* out, const S* in, int64_t stride, int64_t n) {
  constexpr int lanes = kLanes<Compute<S>>;
  int64_t i = 0;
  if (stride == 1)
    for (; i + lanes <= n; i += lanes) store(out + i, load(in + i));
  read_strided(out + i, in + i * stride, stride, n - i);
}

// n elements of `view` from element offset `offset`, `stride` apart, converted to T.
template <class T>
void read_any(T* out, const View& view, int64_t offset, int64_t stride, int64_t n) {
  switch (view.dtype) {
    case DType::f32:
      if constexpr (sizeof(T) == 4) read_row(out, (const float*)view.data + offset, stride, n);
      else read_strided(out, (const float*)view.data + offset, stride, n);
      break;
    case DType::bf16:
      if constexpr (sizeof(T) == 4) read_row(out, (const bf16*)view.data + offset, stride, n);
      else read_strided(out, (const bf16*)view.data + offset, stride, n);
      break;
    case DType::f16:
      if constexpr (sizeof(T) == 4) read_row(out, (const f16*)view.data + offset, stride, n);
      else read_strided(out, (const f16*)view.data + offset, stride, n);
      break;
    case DType::f64: read_strided(out, (const double*)view.data + offset, stride, n); break;
    case DType::boolean:
      for (int64_t i = 0; i < n; ++i) out[i] = T(((const uint8_t*)view.data)[offset + i * stride] != 0);
      break;
  }
}

template <class T>
T read_one(const View& view, int64_t offset) {
  T value;
  read_any(&value, view, offset, 0, 1);
  return value;
}

template <class T>
void write_any(void* out, DType dtype, int64_t offset, const T* in, int64_t n) {
  switch (dtype) {
    case DType::f32:
      for (int64_t i = 0; i < n; ++i) ((float*)out)[offset + i] = float(in[i]);
      break;
    case DType::f64:
      for (int64_t i = 0; i < n; ++i) ((double*)out)[offset + i] = double(in[i]);
      break;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) from_compute(float(in[i]), (bf16*)out + offset + i);
      break;
    case DType::f16:
      for (int64_t i = 0; i < n; ++i) from_compute(float(in[i]), (f16*)out + offset + i);
      break;
    case DType::boolean: break;  // never an output
  }
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::boolean ? 1 : 2;
}

// Whether whole vectors may be written past the caches: worth it where an output is larger than they are, since a store then
// need not read the line first.
template <class S>
inline bool can_stream(const S* out, int64_t dim) {
  constexpr int64_t bytes = kLanes<Compute<S>> * sizeof(S);
  return FPET_VEC_BYTES >= 32 && dim * int64_t(sizeof(S)) % bytes == 0 && uintptr_t(out) % bytes == 0;
}

template <bool Stream, class S, class V>
inline void put(S* p, V v) {
#if FPET_VEC_BYTES >= 32
  if constexpr (Stream) {
    alignas(64) S line[sizeof(V) / sizeof(Compute<S>)];
    store(line, v);
    if constexpr (sizeof(line) == 64) {
      _mm512_stream_si512((__m512i*)p, load_bytes<__m512i>(line));
    } else if constexpr (sizeof(line) == 32) {
      _mm256_stream_si256((__m256i*)p, load_bytes<__m256i>(line));
    } else {
      _mm_stream_si128((__m128i*)p, load_bytes<__m128i>(line));
    }
    return;
  }
#endif
  store(p, v);
}

// out = (Σ_k w[k] · rows[k]) / n. A quotient by a power of two is exact as a product, and most n are 1 or 2.
template <bool Stream, class S>
void weighted_mean_of(S* out, const S* const* rows, const Compute<S>* w, int64_t count, Compute<S> n, int64_t dim) {
  using T = Compute<S>;
  constexpr int lanes = kLanes<T>, unroll = 4;
  const T inverse = T(1) / n;
  // Exact for n = 2^e, where the fraction bits of n are zero; NaN, infinity and subnormal n take the division.
  const bool power_of_two = sizeof(T) == 4
                                ? (bit_copy<uint32_t>(float(n)) & 0x7fffffu) == 0 && n >= 0x1p-60f && n <= 0x1p60f
                                : (bit_copy<uint64_t>(double(n)) & 0xfffffffffffffull) == 0 && n >= 0x1p-60 && n <= 0x1p60;
  int64_t d = 0;
  for (; d + unroll * lanes <= dim; d += unroll * lanes) {
    Vec<T> acc[unroll];
#pragma GCC unroll 4
    for (int u = 0; u < unroll; ++u) acc[u] = load(rows[0] + d + u * lanes) * w[0];
    for (int64_t k = 1; k < count; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) acc[u] += load(rows[k] + d + u * lanes) * w[k];
#pragma GCC unroll 4
    for (int u = 0; u < unroll; ++u) put<Stream>(out + d + u * lanes, power_of_two ? acc[u] * inverse : acc[u] / n);
  }
  for (; d + lanes <= dim; d += lanes) {
    Vec<T> acc = load(rows[0] + d) * w[0];
    for (int64_t k = 1; k < count; ++k) acc += load(rows[k] + d) * w[k];
    put<Stream>(out + d, power_of_two ? acc * inverse : acc / n);
  }
  for (; d < dim; ++d) {
    T acc = to_compute(rows[0][d]) * w[0];
    for (int64_t k = 1; k < count; ++k) acc += to_compute(rows[k][d]) * w[k];
    from_compute(power_of_two ? acc * inverse : acc / n, out + d);
  }
}

template <class S>
void weighted_mean(S* out, const S* const* rows, const Compute<S>* w, int64_t count, Compute<S> n, int64_t dim, bool stream) {
  if (stream && can_stream(out, dim)) {
    weighted_mean_of<true>(out, rows, w, count, n, dim);
  } else {
    weighted_mean_of<false>(out, rows, w, count, n, dim);
  }
}

// out = w · row
template <class S>
void scaled_row(S* out, const S* row, Compute<S> w, int64_t dim, bool stream) {
  using T = Compute<S>;
  constexpr int lanes = kLanes<T>;
  int64_t d = 0;
  if (stream && can_stream(out, dim))
    for (; d + lanes <= dim; d += lanes) put<true>(out + d, load(row + d) * w);
  for (; d + lanes <= dim; d += lanes) store(out + d, load(row + d) * w);
  for (; d < dim; ++d) from_compute(T(to_compute(row[d]) * w), out + d);
}

// Σ_d a_d b_d
template <class S>
Compute<S> dot(const S* a, const S* b, int64_t dim) {
  using T = Compute<S>;
  constexpr int lanes = kLanes<T>;
  Vec<T> s0{}, s1{};
  int64_t d = 0;
  for (; d + 2 * lanes <= dim; d += 2 * lanes) {
    s0 += load(a + d) * load(b + d);
    s1 += load(a + d + lanes) * load(b + d + lanes);
  }
  for (; d + lanes <= dim; d += lanes) s0 += load(a + d) * load(b + d);
  T total = sum_lanes<T>(s0 + s1);
  for (; d < dim; ++d) total += to_compute(a[d]) * to_compute(b[d]);
  return total;
}

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
