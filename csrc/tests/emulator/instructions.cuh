// csrc/cuda/instructions.cuh for the emulator: what the matrix units, the copies and the conversions of a GPU compute, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define FPET_DEVICE inline __attribute__((always_inline))

namespace fpet {
namespace cuda {

inline char* shared_memory() { return emulator::shared(); }
inline int lane_index_anew() { return int(threadIdx.x) & 31; }
inline int opaque(int v) { return v; }

template <int number>
inline void pass() {
  if (!emulator::self->lane) emulator::count_pass(number);
}

// --- 16-bit numbers --------------------------------------------------------------------------------------------------------------------

inline float f16_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24));
}
inline float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

inline uint32_t pack_bf16(float low, float high) {
  const auto one = [](float v) -> uint32_t {
    const uint32_t b = __float_as_uint(v);
    return std::isnan(v) ? 0x7fffu : (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
  };
  return one(low) | one(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  const auto one = [](float v) -> uint32_t {
    const uint32_t sign = std::signbit(v) ? 0x8000u : 0;
    if (std::isnan(v)) return 0x7fffu;
    const float a = std::fabs(v);
    if (a >= 65520.f) return sign | 0x7c00u;
    if (a == 0) return sign;
    int e = 0;
    std::frexp(a, &e);  // a in [2^(e-1), 2^e)
    const int quantum = e - 11 < -24 ? -24 : e - 11;
    const uint32_t units = uint32_t(std::nearbyint(std::ldexp(a, -quantum)));  // carries into the exponent by itself
    return sign | (quantum == -24 ? units : (uint32_t(quantum + 24) << 10) + units);
  };
  return one(low) | one(high) << 16;
}

// --- matrix units ----------------------------------------------------------------------------------------------------------------------

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
  emulator::collective(name, 0xffffffffu, &own, nullptr, [&](const emulator::Group& group) {
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

template <float (*number)(uint16_t)>
void multiply16(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<16>(
      name, d, a, b, 8,
      [](const uint32_t* a, int g, int t, float (*wide)[16]) {
        for (int r = 0; r < 4; ++r) {
          wide[g + r % 2 * 8][2 * t + r / 2 * 8] = number(uint16_t(a[r]));
          wide[g + r % 2 * 8][2 * t + r / 2 * 8 + 1] = number(uint16_t(a[r] >> 16));
        }
      },
      [](const uint32_t* b, int g, int t, float (*wide)[16]) {
        for (int r = 0; r < 2; ++r) {
          wide[g][2 * t + r * 8] = number(uint16_t(b[r]));
          wide[g][2 * t + r * 8 + 1] = number(uint16_t(b[r] >> 16));
        }
      });
}

inline float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

}  // namespace host

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply16<f16_to_float>("mma_f16", d, a, b);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply16<bf16_to_float>("mma_bf16", d, a, b);
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
  emulator::collective("ldmatrix", 0xffffffffu, row, r, [](const emulator::Group& group) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        std::memcpy((uint32_t*)group.out[lane] + m, (const char*)group.in[8 * m + lane / 4] + lane % 4 * 4, 4);
  });
}
// The same, transposed: lane l gets elements [2t][g] and [2t+1][g] of each.
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix_transposed: row not aligned to 16 bytes");
  emulator::collective("ldmatrix_transposed", 0xffffffffu, row, r, [](const emulator::Group& group) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int e = 0; e < 2; ++e)
          std::memcpy((char*)((uint32_t*)group.out[lane] + m) + 2 * e,
                      (const char*)group.in[8 * m + lane % 4 * 2 + e] + lane / 4 * 2, 2);
  });
}

// --- copies ------------------------------------------------------------------------------------------------------------------------------

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

}  // namespace cuda
}  // namespace fpet
