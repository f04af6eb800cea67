// Matrix units, and the copies that feed them: PTX that every GPU from sm_80 on has, and the same on the host for the emulator.
//
// mma_f16, mma_bf16: d += A B for A (16 × 16), B (16 × 8), d (16 × 8) float32. mma_tf32: A (16 × 8), B (8 × 8). With
// g = lane / 4, t = lane % 4 a lane holds
//   a[0]: A[g][2t, 2t+1]  a[1]: A[g+8][2t, 2t+1]  a[2]: A[g][2t+8, 2t+9]  a[3]: A[g+8][2t+8, 2t+9]   (16-bit pairs, low first)
//   b[0]: B[2t, 2t+1][g]  b[1]: B[2t+8, 2t+9][g]
//   d[0], d[1]: D[g][2t, 2t+1]   d[2], d[3]: D[g+8][2t, 2t+1]
//   tf32: a[0]: A[g][t]  a[1]: A[g+8][t]  a[2]: A[g][t+4]  a[3]: A[g+8][t+4]   b[0]: B[t][g]  b[1]: B[t+4][g]
// So two neighbouring d of one product, packed, are an a of the next one: d of columns 16k .. 16k+7 gives a[0], a[1], the next
// eight columns a[2], a[3]. The units cut off low bits of a sum where float32 would round it: keep sums within one call
// (mma_exact) where every bit counts.
#pragma once

#include "device.cuh"

namespace fpet {
namespace cuda {

#ifdef FPET_EMULATE_CUDA

namespace host {

struct Fragments {
  const uint32_t *a, *b;
  float* d;
};

// c + Σ products as the matrix units add: aligned to the largest, cut off one bit below float32's last, in blocks.
inline float add_products(float c, const double* products, int count, int block) {
  for (int start = 0; start < count; start += block) {
    double largest = std::fabs(double(c)), exact = c;
    for (int k = start; k < start + block; ++k) {
      largest = std::fmax(largest, std::fabs(products[k]));
      exact += products[k];
    }
    if (!std::isfinite(exact)) {
      c = float(exact);
      continue;
    }
    if (largest == 0) continue;
    int e = 0;
    std::frexp(largest, &e);
    const double up = std::ldexp(1.0, 25 - e);
    int64_t sum = int64_t(double(c) * up);
    for (int k = start; k < start + block; ++k) sum += int64_t(products[k] * up);
    const double value = std::ldexp(double(sum), e - 25);
    c = float(value);
    if (std::fabs(double(c)) > std::fabs(value)) c = std::nextafter(c, 0.f);
  }
  return c;
}

template <int depth, class A, class B>
void multiply(const char* name, float (&d)[4], const uint32_t* a, const uint32_t* b, int block, A element_a, B element_b) {
  const Fragments own{a, b, d};
  emulator::collective(name, kFullWarp, &own, nullptr, [&](const emulator::Group& group) {
    float wide_a[16][depth], wide_b[8][depth];
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *(const Fragments*)group.in[lane];
      element_a(f.a, lane / 4, lane % 4, wide_a);
      element_b(f.b, lane / 4, lane % 4, wide_b);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        double products[depth];
        for (int k = 0; k < depth; ++k)
          products[k] = double(wide_a[lane / 4 + e / 2 * 8][k]) * double(wide_b[lane % 4 * 2 + e % 2][k]);
        float& sum = ((const Fragments*)group.in[lane])->d[e];
        sum = add_products(sum, products, depth, block);
      }
  });
}

template <class S>
void multiply16(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<16>(
      name, d, a, b, 8,
      [](const uint32_t* a, int g, int t, float (*wide)[16]) {
        for (int r = 0; r < 4; ++r) {
          wide[g + r % 2 * 8][2 * t + r / 2 * 8] = low_half<S>(a[r]);
          wide[g + r % 2 * 8][2 * t + r / 2 * 8 + 1] = high_half<S>(a[r]);
        }
      },
      [](const uint32_t* b, int g, int t, float (*wide)[16]) {
        for (int r = 0; r < 2; ++r) {
          wide[g][2 * t + r * 8] = low_half<S>(b[r]);
          wide[g][2 * t + r * 8 + 1] = high_half<S>(b[r]);
        }
      });
}

inline float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

}  // namespace host

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply16<f16>("mma_f16", d, a, b);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply16<bf16>("mma_bf16", d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply<8>(
      "mma_tf32", d, a, b, 4,
      [](const uint32_t* a, int g, int t, float (*wide)[8]) {
        for (int r = 0; r < 4; ++r) wide[g + r % 2 * 8][t + r / 2 * 4] = host::tf32(a[r]);
      },
      [](const uint32_t* b, int g, int t, float (*wide)[8]) {
        for (int r = 0; r < 2; ++r) wide[g][t + r * 4] = host::tf32(b[r]);
      });
}

// Four 8 × 8 matrices of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8, 16 bytes, aligned to them.
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: row not aligned to 16 bytes");
  emulator::collective("ldmatrix", kFullWarp, row, r, [](const emulator::Group& group) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        std::memcpy((uint32_t*)group.out[lane] + m, (const char*)group.in[8 * m + lane / 4] + lane % 4 * 4, 4);
  });
}
// The same, transposed: lane l gets elements [2t][g] and [2t+1][g] of each.
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix_transposed: row not aligned to 16 bytes");
  emulator::collective("ldmatrix_transposed", kFullWarp, row, r, [](const emulator::Group& group) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int e = 0; e < 2; ++e)
          std::memcpy((char*)((uint32_t*)group.out[lane] + m) + 2 * e,
                      (const char*)group.in[8 * m + lane % 4 * 2 + e] + lane / 4 * 2, 2);
  });
}

template <int bytes>
inline void copy_async(void* to_shared, const void* from, bool valid = true) {
  emulator::copy_begin(to_shared, from, bytes, valid ? bytes : 0);
}
inline void copy_async_commit() { emulator::copy_commit(); }
template <int newest_left>
inline void copy_async_wait() {
  emulator::copy_wait(newest_left);
}
inline void prefetch_l2(const void*) {}

#else

#define FPET_MMA(name, shape)                                                                           \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                            \
  }
FPET_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
FPET_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FPET_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FPET_MMA

FPET_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8 × 8 matrices of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8, 16 bytes, aligned to them.
FPET_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, transposed: lane l gets elements [2t][g] and [2t+1][g] of each.
FPET_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 4, 8 or 16 bytes, aligned to their number, to shared memory; zeros if not valid, and then `from` is not read. Copies
// belong to the thread: it commits and waits, and a barrier follows before others read.
template <int bytes>
FPET_DEVICE void copy_async(void* to_shared, const void* from, bool valid = true) {
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to_shared)), "l"(from), "n"(bytes),
                 "r"(valid ? bytes : 0)
                 : "memory");
  }
}
FPET_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the `newest_left` newest groups of this thread are still under way.
template <int newest_left>
FPET_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest_left) : "memory");
}
FPET_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

#endif

// Starts fetching `rows` rows of `bytes` into the second-level cache, by all threads of the block.
FPET_DEVICE void prefetch_block(const char* p, int rows, int64_t row_stride, int bytes) {
  const int lines = ceil_div(bytes, 128);
  for (int i = int(threadIdx.x); i < rows * lines; i += int(blockDim.x))
    prefetch_l2(p + i / lines * row_stride + 128 * (i % lines));
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
// k + 1; depth is a multiple of 8. `short_factors`: they are tf32 as they are.
template <int M, int N, class A, class B>
FPET_DEVICE void multiply_wide(float (&d)[M][N][4], int depth, bool short_factors, const A& a, const B& b) {
  const int lane = lane_index_anew(), g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int k = 2 * t; k < depth + 2 * t; k += 8) {
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
}

}  // namespace cuda
}  // namespace fpet
