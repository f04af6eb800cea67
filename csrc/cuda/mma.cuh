// Products on matrix units (instructions.cuh) in the accuracy of float32. The units cut off low bits of a sum where float32 would round
// it: sums within one call (mma_exact) where every bit counts.
#pragma once

#include "device.cuh"
#include "places.cuh"

namespace fpet {
namespace cuda {

// Starts fetching `rows` rows of `bytes` into the second-level cache, by all threads of the block.
FPET_DEVICE void prefetch_block(const char* p, int rows, int64_t row_stride, int bytes) {
  const int lines = ceil_div(bytes, 128);
  for (int i = int(threadIdx.x); i < rows * lines; i += int(blockDim.x))
    pass<place::fetch_ahead>(), prefetch_l2(p + i / lines * row_stride + 128 * (i % lines));
  pass<place::other>();
}

template <class S>
FPET_DEVICE void mma16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<S, bf16>::value) {
    mma_bf16(d, a, b);
  } else {
    mma_f16(d, a, b);
  }
}

// d += A B with the sum over tiles rounded as float32 sums are.
template <class S>
FPET_DEVICE void mma_exact(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float part[4] = {0.f, 0.f, 0.f, 0.f};
  mma16<S>(part, a, b);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += part[e];
}

// float32 on matrix units: v = high + low with 11 bits each, where |v| is scaled near 2^12 (f16's range is small: numbers far
// below the largest one of a row keep an absolute precision of 2^-24). Of the product of two such sums only low · low is left out.
struct SplitPair {
  uint32_t high, low;
};
FPET_DEVICE SplitPair split_pair(float v0, float v1) {
  SplitPair r;
  r.high = pack<f16>(v0, v1);
  r.low = pack<f16>(v0 - low_half<f16>(r.high), v1 - high_half<f16>(r.high));
  return r;
}
// The power of two that brings `largest` into [2^12, 2^13), and 1 for zero, tiny and non-finite numbers.
FPET_DEVICE float split_scale(float largest) {
  const int exponent = int(__float_as_uint(largest) >> 23) & 255;
  return exponent < 16 || exponent == 255 ? 1.f : __uint_as_float(uint32_t(127 + 12 + 127 - exponent) << 23);
}

// float32 as the sum of two tf32, up to 2^-21 of it, in the range of float32; `whole`: it is one as it is. Units look at no other
// bits than tf32's. NaN stays in one of the two.
struct TwoParts {
  uint32_t high, low;
};
FPET_DEVICE TwoParts two_parts(float v, bool whole) {
  const uint32_t bits = __float_as_uint(v), high = whole ? bits : (bits + 0x1000u) & 0xffffe000u;  // to the nearest
  return {high, __float_as_uint(v - __uint_as_float(high))};
}

// d += A B of 16 M rows and 8 N columns in float32's accuracy, by one warp. a(row, k) and b(column, k) give the elements at k and
// k + 1; depth is a multiple of 8. `short_factors`: they are tf32 as they are. Counted as `where`, what follows as the next place.
template <int where, int M, int N, class A, class B>
FPET_DEVICE void multiply_wide(float (&d)[M][N][4], int depth, bool short_factors, const A& a, const B& b) {
  const int lane = lane_index_anew(), g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int k = 2 * t; k < depth + 2 * t; k += 8) {
    pass<where>();
    TwoParts left[M][4];  // the units' columns t and t + 4 stand for k and k + 1, on both sides
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 v = a(16 * m + 8 * half + g, k);
        left[m][half] = two_parts(v.x, short_factors);
        left[m][2 + half] = two_parts(v.y, short_factors);
      }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float2 v = b(8 * n + g, k);
      const TwoParts right[2] = {two_parts(v.x, short_factors), two_parts(v.y, short_factors)};
      const uint32_t high[2] = {right[0].high, right[1].high}, low[2] = {right[0].low, right[1].low};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const uint32_t left_high[4] = {left[m][0].high, left[m][1].high, left[m][2].high, left[m][3].high};
        float part[4] = {0.f, 0.f, 0.f, 0.f};
        if (!short_factors) {  // the smallest products first
          const uint32_t left_low[4] = {left[m][0].low, left[m][1].low, left[m][2].low, left[m][3].low};
          mma_tf32(part, left_low, high);
          mma_tf32(part, left_high, low);
        }
        mma_tf32(part, left_high, high);
#pragma unroll
        for (int e = 0; e < 4; ++e) d[m][n][e] += part[e];
      }
    }
  }
  pass<where + 1>();
}

}  // namespace cuda
}  // namespace fpet
