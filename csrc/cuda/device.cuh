// What every kernel file shares: types, loads and stores, warp helpers. The same source is compiled twice: by nvcc, and by the
// host compiler against csrc/tests/emulator, where every thread is a fiber.
//
// Conventions
// - Kernels take one struct by value (`const __grid_constant__ Params p`), which holds the Problem and what the launcher worked
//   out, and are launched by launch<kernel> (launch.cuh), which names the kernel in the status it returns.
// - All shared memory is dynamic: shared_memory() is its start, aligned to 128 bytes. No __shared__ variables.
// - A full warp reaches every warp-wide operation (kFullWarp); no __activemask, no spinning on memory.
// - Storage types are bf16 and f16 below, plain 16 bits: no cuda_bf16.h or cuda_fp16.h, which take longer to compile than the
//   kernels. Hot loads are templates on the storage type, 16 bytes a thread; operands that aren't hot go through
//   load_any(view, offset), a switch over dtypes.
// - Offsets into tensors are int64_t; indices within an image may be int.
// - No float atomics. What is summed is summed in an order that depends on the shape of one image alone.
// - x / y and sqrt are rounded correctly (nvcc's default); nothing is compiled with -use_fast_math, so NaN stays NaN.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include <instructions.cuh>

#include "fpet/bdm.h"

namespace fpet {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type in which values of a storage type are summed.
template <class S>
using Compute = std::conditional_t<std::is_same<S, double>::value, double, float>;

template <class S>
constexpr DType dtype_of() {
  if (std::is_same<S, double>::value) return DType::f64;
  if (std::is_same<S, bf16>::value) return DType::bf16;
  if (std::is_same<S, f16>::value) return DType::f16;
  return DType::f32;
}

__host__ __device__ constexpr int size_of(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::boolean ? 1 : 2;
}

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return (a + b - 1) / b * b;
}

// What is known of a problem when a kernel of short grids is compiled: keys of K, x of X; rows of both, of gradients, tokens and weights can
// be read 16 bytes (eight keys) at a time; no mask, no delta. Kernels of Any take all other problems.
template <class K, class X>
struct Typed {
  using Key = K;
  using Value = X;
  static constexpr bool any = false;
};
template <class X = void>
struct Any {
  using Key = void;
  using Value = X;
  static constexpr bool any = true;
};

// --- conversions -----------------------------------------------------------------------------------------------------------------

FPET_DEVICE float to_compute(float v) { return v; }
FPET_DEVICE double to_compute(double v) { return v; }
FPET_DEVICE float to_compute(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }

FPET_DEVICE float to_compute(f16 v) { return f16_to_float(v.bits); }

// Two values rounded to 16 bits each; the first one in the lower half.
template <class S>
FPET_DEVICE uint32_t pack(float low, float high) {
  if constexpr (std::is_same<S, bf16>::value) {
    return pack_bf16(low, high);
  } else {
    return pack_f16(low, high);
  }
}

template <class S>
FPET_DEVICE float low_half(uint32_t packed) {
  return to_compute(S{uint16_t(packed & 0xffffu)});
}
template <class S>
FPET_DEVICE float high_half(uint32_t packed) {
  if constexpr (std::is_same<S, bf16>::value) return __uint_as_float(packed & 0xffff0000u);
  return to_compute(S{uint16_t(packed >> 16)});
}

template <class S, class T>
FPET_DEVICE S from_compute(T v) {
  if constexpr (std::is_same<S, float>::value || std::is_same<S, double>::value) {
    return S(v);
  } else {
    return S{uint16_t(pack<S>(float(v), 0.f) & 0xffffu)};
  }
}

// v / n rounded correctly, for inverse = 1 / n: fewer instructions than a division where many are divided by the same.
FPET_DEVICE float quotient(float v, float n, float inverse) {
  const float q = v * inverse, rest = fmaf(-q, n, v);
  return rest == rest ? fmaf(rest, inverse, q) : q;  // no rest of infinity
}

// --- one element of anything -------------------------------------------------------------------------------------------------------

// Element `offset` of v, as T (float or double).
template <class T>
FPET_DEVICE T load_any(const View& v, int64_t offset) {
  switch (v.dtype) {
    case DType::f32: return T(((const float*)v.data)[offset]);
    case DType::f64: return T(((const double*)v.data)[offset]);
    case DType::bf16: return T(to_compute(((const bf16*)v.data)[offset]));
    case DType::f16: return T(to_compute(((const f16*)v.data)[offset]));
    default: return T(((const uint8_t*)v.data)[offset] != 0);
  }
}

template <class T>
FPET_DEVICE void store_any(void* p, DType type, int64_t offset, T v) {
  switch (type) {
    case DType::f32: ((float*)p)[offset] = float(v); return;
    case DType::f64: ((double*)p)[offset] = double(v); return;
    case DType::bf16: ((bf16*)p)[offset] = from_compute<bf16>(v); return;
    case DType::f16: ((f16*)p)[offset] = from_compute<f16>(v); return;
    default: return;
  }
}

// --- 16 bytes ------------------------------------------------------------------------------------------------------------------------

// As many elements of S as 16 bytes hold.
template <class S>
struct Lanes {
  static constexpr int count = 16 / int(sizeof(S));
  Compute<S> v[count];
};

template <class S>
FPET_DEVICE Lanes<S> unpack(uint4 raw) {
  Lanes<S> r;
  if constexpr (std::is_same<S, double>::value) {
    r.v[0] = __longlong_as_double((long long)((uint64_t(raw.y) << 32) | raw.x));
    r.v[1] = __longlong_as_double((long long)((uint64_t(raw.w) << 32) | raw.z));
  } else if constexpr (std::is_same<S, float>::value) {
    r.v[0] = __uint_as_float(raw.x), r.v[1] = __uint_as_float(raw.y);
    r.v[2] = __uint_as_float(raw.z), r.v[3] = __uint_as_float(raw.w);
  } else {
    r.v[0] = low_half<S>(raw.x), r.v[1] = high_half<S>(raw.x);
    r.v[2] = low_half<S>(raw.y), r.v[3] = high_half<S>(raw.y);
    r.v[4] = low_half<S>(raw.z), r.v[5] = high_half<S>(raw.z);
    r.v[6] = low_half<S>(raw.w), r.v[7] = high_half<S>(raw.w);
  }
  return r;
}

template <class S>
FPET_DEVICE uint4 repack(const Lanes<S>& a) {
  if constexpr (std::is_same<S, double>::value) {
    const uint64_t u = uint64_t(__double_as_longlong(a.v[0])), w = uint64_t(__double_as_longlong(a.v[1]));
    return make_uint4(uint32_t(u), uint32_t(u >> 32), uint32_t(w), uint32_t(w >> 32));
  } else if constexpr (std::is_same<S, float>::value) {
    return make_uint4(__float_as_uint(a.v[0]), __float_as_uint(a.v[1]), __float_as_uint(a.v[2]), __float_as_uint(a.v[3]));
  } else {
    return make_uint4(pack<S>(a.v[0], a.v[1]), pack<S>(a.v[2], a.v[3]), pack<S>(a.v[4], a.v[5]), pack<S>(a.v[6], a.v[7]));
  }
}

// sum += a · b, one element after the other.
template <class S>
FPET_DEVICE void add_along(Compute<S>& sum, const Lanes<S>& a, const Lanes<S>& b) {
#pragma unroll
  for (int e = 0; e < Lanes<S>::count; ++e) sum += a.v[e] * b.v[e];
}
template <class S>
FPET_DEVICE void scale_lanes(Lanes<S>& a, Compute<S> factor) {
#pragma unroll
  for (int e = 0; e < Lanes<S>::count; ++e) a.v[e] *= factor;
}

FPET_DEVICE uint4 load16(const void* p) { return __ldg((const uint4*)p); }  // of what no thread of the launch writes
FPET_DEVICE void store16(void* p, uint4 v) { *(uint4*)p = v; }
// Past the first-level cache and first to leave the second: results that no kernel soon reads.
FPET_DEVICE void store16_streaming(void* p, uint4 v) { __stcs((uint4*)p, v); }

// Moves 16 bytes down by an element, lets `v` in at the top, and returns the one at the bottom: what loops over elements without
// unrolling them, which makes small code of a rare way.
template <class S>
FPET_DEVICE S shift_in(uint4& piece, S v) {
  union {
    S value;
    uint32_t word[sizeof(S) == 8 ? 2 : 1];
  } in{v}, out{};
  if constexpr (sizeof(S) == 8) {
    out.word[0] = piece.x, out.word[1] = piece.y;
    piece = make_uint4(piece.z, piece.w, in.word[0], in.word[1]);
  } else if constexpr (sizeof(S) == 4) {
    out.word[0] = piece.x;
    piece = make_uint4(piece.y, piece.z, piece.w, in.word[0]);
  } else {
    out.word[0] = piece.x & 0xffffu;
    piece = make_uint4(piece.x >> 16 | piece.y << 16, piece.y >> 16 | piece.z << 16, piece.z >> 16 | piece.w << 16,
                       piece.w >> 16 | in.word[0] << 16);
  }
  return out.value;
}

// 16 bytes of a row of `length` elements, from element `at` on; zeros behind its end and where it is not valid.
template <class S>
FPET_DEVICE uint4 load_piece(const S* row, int64_t at, int64_t length, int64_t stride, bool aligned, bool valid = true) {
  valid = valid && at < length;
  if (aligned && valid) return load16(row + at);
  uint4 piece = make_uint4(0, 0, 0, 0);
  if (!valid) return piece;
#pragma unroll 1
  for (int e = 0; e < 16 / int(sizeof(S)); ++e) shift_in(piece, at + e < length ? row[(at + e) * stride] : S{});
  return piece;
}
// The same way back, to a contiguous row.
template <class S>
FPET_DEVICE void store_piece(S* row, int64_t at, int64_t length, bool aligned, uint4 piece) {
  if (at >= length) return;
  if (aligned) return store16_streaming(row + at, piece);
#pragma unroll 1
  for (int64_t e = at; e < min(length, at + 16 / int64_t(sizeof(S))); ++e) row[e] = shift_in(piece, S{});
}

// Whether rows that start at multiples of `strides` elements of `type` from p can be read 16 bytes at a time.
inline bool aligned16(const void* p, DType type, std::initializer_list<int64_t> strides) {
  bool yes = uintptr_t(p) % 16 == 0;
  for (const int64_t s : strides) yes = yes && s * size_of(type) % 16 == 0;
  return yes;
}

// --- shared memory, warps ------------------------------------------------------------------------------------------------------------

FPET_DEVICE int lane_index() { return int(threadIdx.x) & 31; }
FPET_DEVICE int warp_index() { return int(threadIdx.x) >> 5; }

// Sums over groups of `width` neighbouring lanes (a power of two), always in the same order.
template <int width = 32, class T>
FPET_DEVICE T warp_sum(T v) {
#pragma unroll
  for (int lanes = width / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kFullWarp, v, lanes);
  return v;
}
template <int width = 32, class T>
FPET_DEVICE T warp_max(T v) {
#pragma unroll
  for (int lanes = width / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, v, lanes);
    v = other > v ? other : v;
  }
  return v;
}

// --- positions ---------------------------------------------------------------------------------------------------------------------

// Row and column parity of the i-th source (odd = 0) or destination (odd = 1) of a checkerboard, as its index on the grid. Two
// rows hold `width` cells of each set.
FPET_DEVICE int64_t checkerboard_cell(int64_t i, int64_t width, int odd) {
  const int64_t pair = i / width, rest = i - pair * width;
  const int64_t first = (width + 1 - odd) / 2;  // cells of this set in an even row
  const bool below = rest >= first;
  const int64_t col = below ? 2 * (rest - first) + 1 - odd : 2 * rest + odd;
  return (2 * pair + below) * width + col;
}

// An index that lies on the device, which no host has checked, kept within [low, high).
FPET_DEVICE int64_t within(int64_t index, int64_t low, int64_t high) { return max(low, min(index, high - 1)); }

// Index in the N tokens of source i and of destination j.
FPET_DEVICE int64_t source_token(const Problem& p, int64_t i) {
  return p.prefix + (p.split_b ? within(p.split_a[i], 0, p.tokens - p.prefix) : checkerboard_cell(i, p.grid_w, 0));
}
FPET_DEVICE int64_t destination_token(const Problem& p, int64_t j) {
  return p.prefix + (p.split_b ? within(p.split_b[j], 0, p.tokens - p.prefix) : checkerboard_cell(j, p.grid_w, 1));
}
// The merged row that a match names.
FPET_DEVICE int64_t matched(const Problem& p, int64_t e) { return within(e, p.prefix, p.prefix + p.num_b); }

// --- top two -------------------------------------------------------------------------------------------------------------------------

// The two largest scores seen and their destinations; equal ones go to the lower index, NaN and -inf are never taken.
template <class T>
struct TopTwo {
  T first = T(-INFINITY), second = T(-INFINITY);
  int first_at = 0x7fffffff, second_at = 0x7fffffff;

  // Destinations come in increasing order.
  FPET_DEVICE void add(T score, int at) {
    const bool beats_first = score > first, beats_second = score > second;
    second = beats_first ? first : beats_second ? score : second;
    second_at = beats_first ? first_at : beats_second ? at : second_at;
    first = beats_first ? score : first;
    first_at = beats_first ? at : first_at;
  }
  // What was found among other destinations.
  FPET_DEVICE void merge(T other_first, int other_first_at, T other_second, int other_second_at) {
    const auto better = [](T a, int a_at, T b, int b_at) { return a > b || (a == b && a_at < b_at); };
    if (better(other_first, other_first_at, first, first_at)) {
      const bool keep = better(first, first_at, other_second, other_second_at);
      second = keep ? first : other_second;
      second_at = keep ? first_at : other_second_at;
      first = other_first;
      first_at = other_first_at;
    } else if (better(other_first, other_first_at, second, second_at)) {
      second = other_first;
      second_at = other_first_at;
    }
  }
  // With what the lane `lanes` away has found.
  FPET_DEVICE void merge_lane(int lanes) {
    merge(__shfl_xor_sync(kFullWarp, first, lanes), __shfl_xor_sync(kFullWarp, first_at, lanes),
          __shfl_xor_sync(kFullWarp, second, lanes), __shfl_xor_sync(kFullWarp, second_at, lanes));
  }
  // Fewer than two numbers among the scores: the lowest destinations that are left, so that a match is always valid.
  FPET_DEVICE void settle(int num_b, T* mid) {
    const bool too_few = second_at >= num_b;
    if (first_at >= num_b) first_at = 0;
    if (too_few) second_at = first_at == 0 ? 1 : 0;
    *mid = too_few ? T(NAN) : (first + second) / T(2);
  }
};

}  // namespace cuda
}  // namespace fpet
