// Vectors of FPET_VEC_BYTES bytes in the compiler's own vector types (GCC, Clang), and conversions to and from storage types.
// Included once per instruction set, inside a namespace of its own: nothing here may be shared between instruction sets, and
// no inline function of the standard library may be called, or the linker could hand AVX-512 code to a machine without it.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace fpet {
namespace FPET_ISA {
namespace {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(FPET_VEC_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = FPET_VEC_BYTES / sizeof(T);

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using Int = typename IntOf<T>::type;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class A, class B>
struct SameType {
  static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

typedef uint16_t U16Half __attribute__((vector_size(FPET_VEC_BYTES / 2)));

template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <class V, class P>
inline V load_bytes(const P* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class P>
inline void store_bytes(P* p, V v) {
  memcpy(p, &v, sizeof(V));
}

template <class To, class From>
inline To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

template <int... I>
struct Indices {};
template <int N, int... I>
struct IndicesTo : IndicesTo<N - 1, N - 1, I...> {};
template <int... I>
struct IndicesTo<0, I...> {
  using type = Indices<I...>;
};

// --- scalars -----------------------------------------------------------------------------------------------------------

inline float to_compute(float v) { return v; }
inline double to_compute(double v) { return v; }
inline uint32_t to_compute(uint32_t v) { return v; }  // a pair of bfloat16
inline float to_compute(bf16 v) { return bit_copy<float>(uint32_t(v.bits) << 16); }
inline float to_compute(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, exponent = (v.bits >> 10) & 31u, fraction = v.bits & 1023u;
  if (exponent == 31) return bit_copy<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent) return bit_copy<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float magnitude = float(fraction) * 0x1p-24f;  // subnormal: exact in float32
  return sign ? -magnitude : magnitude;
}

inline void from_compute(float v, float* out) { *out = v; }
inline void from_compute(double v, double* out) { *out = v; }
inline void from_compute(float v, bf16* out) {
  const uint32_t bits = bit_copy<uint32_t>(v);
  out->bits = v != v ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_compute(float v, f16* out) {
  const uint32_t bits = bit_copy<uint32_t>(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    half = bit_copy<uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = ((magnitude - 0x38000000u) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

// --- vectors -----------------------------------------------------------------------------------------------------------

inline Vec<float> load(const float* p) { return load_bytes<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_bytes<Vec<double>>(p); }
inline Vec<uint32_t> load(const uint32_t* p) { return load_bytes<Vec<uint32_t>>(p); }
inline Vec<float> load(const bf16* p) {
  return bit_copy<Vec<float>>(__builtin_convertvector(load_bytes<U16Half>(p), Vec<uint32_t>) << 16);
}
inline Vec<float> load(const f16* p) {
#if FPET_VEC_BYTES == 64
  return _mm512_cvtph_ps(load_bytes<__m256i>(p));
#elif FPET_VEC_BYTES == 32
  return _mm256_cvtph_ps(load_bytes<__m128i>(p));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(load_bytes<uint16x4_t>(p)));
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = to_compute(p[l]);
  return v;
#endif
}

inline void store(float* p, Vec<float> v) { store_bytes(p, v); }
inline void store(double* p, Vec<double> v) { store_bytes(p, v); }
inline void store(uint32_t* p, Vec<uint32_t> v) { store_bytes(p, v); }
inline void store(bf16* p, Vec<float> v) {
  const Vec<uint32_t> bits = bit_copy<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t> quiet = (bits >> 16) | 0x40u;
  store_bytes(p, __builtin_convertvector(v != v ? quiet : rounded, U16Half));
}
inline void store(f16* p, Vec<float> v) {
#if FPET_VEC_BYTES == 64
  store_bytes(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FPET_VEC_BYTES == 32
  store_bytes(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  store_bytes(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  for (int l = 0; l < kLanes<float>; ++l) from_compute(float(v[l]), p + l);
#endif
}

inline float square_root(float v) { return __builtin_sqrtf(v); }
inline double square_root(double v) { return __builtin_sqrt(v); }

// The sum of all lanes, always in the same order.
template <class T>
inline T sum_lanes(Vec<T> v) {
  constexpr int lanes = kLanes<T>;
  T parts[lanes];
  store_bytes(parts, v);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) parts[l] += parts[l + width];
  return parts[0];
}

// One level of the tree that sums the lanes of many vectors at once: a and b hold groups of 2 * Half lanes, the result the groups
// of a, then of b, each folded to Half lanes.
template <class T, int Half, int... I>
inline Vec<T> fold(Vec<T> a, Vec<T> b, Indices<I...>) {
  constexpr int half = kLanes<T> / 2;
  return __builtin_shufflevector(a, b, (I / half * kLanes<T> + I % half / Half * 2 * Half + I % Half)...) +
         __builtin_shufflevector(a, b, (I / half * kLanes<T> + I % half / Half * 2 * Half + I % Half + Half)...);
}

// v[0] becomes the vector of the sums of v[0], v[1], ... v[kLanes - 1].
template <class T, int Half = kLanes<T> / 2>
__attribute__((always_inline)) inline void sum_each(Vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < Half; ++i) v[i] = fold<T, Half>(v[2 * i], v[2 * i + 1], typename IndicesTo<kLanes<T>>::type{});
  if constexpr (Half > 1) sum_each<T, Half / 2>(v);
}

// One level of a transposition: of a and b, whose blocks of Half elements change places, the low or the high half.
template <class T, int Half, int High, int... I>
inline Vec<T> exchange(Vec<T> a, Vec<T> b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / (2 * Half) * (2 * Half) + I % Half + High * Half + I / Half % 2 * kLanes<T>)...);
}

// v, kLanes vectors, becomes its transpose.
template <class T, int Half = 1>
__attribute__((always_inline)) inline void transpose(Vec<T>* v) {
  using All = typename IndicesTo<kLanes<T>>::type;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    if (!(i & Half)) {
      const Vec<T> low = exchange<T, Half, 0>(v[i], v[i + Half], All{}), high = exchange<T, Half, 1>(v[i], v[i + Half], All{});
      v[i] = low;
      v[i + Half] = high;
    }
  if constexpr (2 * Half < kLanes<T>) transpose<T, 2 * Half>(v);
}

// e^z for z <= 0, to 2 units in the last place; NaN stays NaN.
inline Vec<float> exp_nonpositive(Vec<float> z) {
  z = z < -87.0f ? splat(-87.0f) : z;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> shifted = z * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec<int32_t> exponent = bit_copy<Vec<int32_t>>(shifted) << 23;
  return bit_copy<Vec<float>>(bit_copy<Vec<int32_t>>(p) + exponent);
}
inline Vec<double> exp_nonpositive(Vec<double> z) {
  Vec<double> e;
  for (int l = 0; l < kLanes<double>; ++l) e[l] = exp(z[l]);
  return e;
}

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
