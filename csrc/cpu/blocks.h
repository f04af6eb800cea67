// The inner loops: small matrix products over register tiles, and row operations over storage types.
// Included after vec.h, once per instruction set.

namespace fpet {
namespace FPET_ISA {
namespace {

// Register tiles: rows x vectors that leave room for the operands in 32 (AVX-512, Arm) or 16 vector registers.
#if FPET_VEC_BYTES == 64 || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVecs = 4;
#else
constexpr int kTileRows = 6, kTileVecs = 2;
#endif

// --- C (m x n) [+]= A (m x k) B (k x n) ----------------------------------------------------------------------------------
// A has any strides; B and C are row-major with n padded to whole vectors. Every element is summed over k in order, by the
// same instructions wherever it lies in the tile, so results do not depend on how rows are cut into tasks. The operands U are
// of the sums' type T, or pairs of bfloat16.

inline Vec<float> multiply_add(Vec<float> acc, Vec<float> a, Vec<float> b) { return acc + a * b; }
inline Vec<double> multiply_add(Vec<double> acc, Vec<double> a, Vec<double> b) { return acc + a * b; }
// A product of two bfloat16 is exact in float32, so they need no conversion where the machine multiplies them itself.
#ifdef __AVX512BF16__
inline Vec<float> multiply_add(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
  return _mm512_dpbf16_ps(acc, bit_copy<__m512bh>(a), bit_copy<__m512bh>(b));
}
constexpr bool kPairsBf16 = true;
#else
constexpr bool kPairsBf16 = false;
#endif

template <int R, int V, class T, class U>
inline void matmul_tile(int64_t k, const U* a, int64_t a_row, int64_t a_col, const U* b, int64_t b_row, T* c, int64_t c_row,
                        bool accumulate, Ahead* ahead) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  Ahead::Piece fetch = ahead ? ahead->take(k / 2) : Ahead::Piece{};
  for (int64_t p = 0; p < k; ++p) {
    if (p % 2 == 0 && fetch.at < fetch.end) {  // no faster: too many at once hold up the product
      __builtin_prefetch(fetch.at, 0, 2);
      fetch.at += 64;
    }
    Vec<U> bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bv[v] = load(b + p * b_row + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<U> av = splat(a[r * a_row + p * a_col]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(acc[r][v], av, bv[v]);
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

// Columns one vector wide take tiles of eight rows: as many sums as hide a multiplication's latency.
template <int V, class T, class U>
inline void matmul_rows(int64_t m, int64_t k, const U* a, int64_t a_row, int64_t a_col, const U* b, int64_t b_row, T* c,
                        int64_t c_row, bool accumulate, Ahead* ahead) {
  constexpr int most = V == 1 ? 8 : kTileRows;
  for (int64_t rows; m > 0; m -= rows, a += rows * a_row, c += rows * c_row) {
    rows = m > most && m <= most + 2 ? (m + 1) / 2 : min64(m, most);  // not one large tile and a tiny one
    switch (rows) {
      case 8:
        if constexpr (most == 8) matmul_tile<8, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead);
        break;
      case 7:
        if constexpr (most == 8) matmul_tile<7, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead);
        break;
      case 6: matmul_tile<6, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
      case 5: matmul_tile<5, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
      case 4: matmul_tile<4, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
      case 3: matmul_tile<3, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
      case 2: matmul_tile<2, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
      default: matmul_tile<1, V>(k, a, a_row, a_col, b, b_row, c, c_row, accumulate, ahead); break;
    }
  }
}

template <class T, class U>
void matmul(int64_t m, int64_t n, int64_t k, const U* a, int64_t a_row, int64_t a_col, const U* b, int64_t b_row, T* c,
            int64_t c_row, bool accumulate, Ahead* ahead = nullptr) {
  constexpr int lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + kTileVecs * lanes <= n; j += kTileVecs * lanes)
    matmul_rows<kTileVecs>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead);
  switch ((n - j) / lanes) {
    case 3: matmul_rows<3>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead); break;
    case 2: matmul_rows<2>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead); break;
    case 1: matmul_rows<1>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate, ahead); break;
    default: break;
  }
}

// --- rows turned into columns ------------------------------------------------------------------------------------------------

// `count` rows of k elements, `stride` apart, as panels of (k, cols): element p of row r is panels[(r / cols * k + p) * cols + r % cols].
// Rows that fill up the last vector are zeros.
template <class U, class S>
void turn_rows(U* panels, int64_t cols, const S* const* rows, int64_t stride, int64_t count, int64_t k) {
  constexpr int lanes = kLanes<U>;
  for (int64_t r0 = 0; r0 < count; r0 += lanes) {
    U* panel = panels + r0 / cols * cols * k + r0 % cols;
    const int64_t some = min64(lanes, count - r0);
    int64_t p = 0;
    if (stride == 1)
      for (; p + lanes <= k; p += lanes) {
        Vec<U> block[lanes];
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) block[r] = r < some ? load(rows[r0 + r] + p) : Vec<U>{};
        transpose<U>(block);
#pragma GCC unroll 16
        for (int q = 0; q < lanes; ++q) store(panel + (p + q) * cols, block[q]);
      }
    for (; p < k; ++p)
      for (int64_t r = 0; r < lanes; ++r) panel[p * cols + r] = r < some ? U(to_compute(rows[r0 + r][p * stride])) : U(0);
  }
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

// out = (Σ_k w[k] · rows[k]) / n, while `ahead` rows, `soon` of them, are fetched. A quotient by a power of two is exact as a
// product, and most n are 1 or 2.
template <bool Stream, class S>
void weighted_mean_of(S* out, const S* const* rows, const Compute<S>* w, int64_t count, Compute<S> n, int64_t dim,
                      const S* const* ahead, int64_t soon) {
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
    for (int64_t k = 0; k < soon; ++k) prefetch_lines(ahead[k] + d, unroll * lanes * int64_t(sizeof(S)));
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
void weighted_mean(S* out, const S* const* rows, const Compute<S>* w, int64_t count, Compute<S> n, int64_t dim, bool stream,
                   const S* const* ahead = nullptr, int64_t soon = 0) {
  if (stream && can_stream(out, dim)) {
    weighted_mean_of<true>(out, rows, w, count, n, dim, ahead, soon);
  } else {
    weighted_mean_of<false>(out, rows, w, count, n, dim, ahead, soon);
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
