// What all C++ tests share: checks that are counted, and numbers of every dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fpet/bdm.h"

namespace oracle {

using fpet::DType;
using std::vector;

inline size_t u(int64_t n) { return static_cast<size_t>(n); }

inline int failures = 0;
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      ++oracle::failures;                                         \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

inline int64_t bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::boolean ? 1 : 2; }
inline double epsilon(DType t) {
  return t == DType::f64 ? 0x1p-52 : t == DType::f32 ? 0x1p-23 : t == DType::bf16 ? 0x1p-7 : 0x1p-10;
}

inline double decode(const char* p, DType t) {
  if (t == DType::f64) {
    double v;
    std::memcpy(&v, p, 8);
    return v;
  }
  if (t == DType::f32) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
  }
  if (t == DType::boolean) return *p != 0;
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (t == DType::bf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  }
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

// The nearest number of type t, with ties to even; f16 without infinities but those given.
inline double rounded(double v, DType t) {
  if (t == DType::f64 || !std::isfinite(v) || v == 0) return v;
  if (t == DType::f32) return double(float(v));
  int e = 0;
  std::frexp(v, &e);
  const int quantum = t == DType::bf16 ? e - 8 : std::max(e - 11, -24);
  return std::ldexp(std::nearbyint(std::ldexp(v, -quantum)), quantum);
}

inline void encode(char* p, DType t, double v) {
  v = rounded(v, t);
  if (t == DType::f64) {
    std::memcpy(p, &v, 8);
  } else if (t == DType::boolean) {
    *p = v != 0;
  } else if (t == DType::f32 || t == DType::bf16) {
    const float f = float(v);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t upper = uint16_t(bits >> 16);
    if (t == DType::f32) std::memcpy(p, &f, 4);
    else std::memcpy(p, &upper, 2);
  } else {
    uint16_t half = std::signbit(v) ? 0x8000 : 0;
    if (std::isnan(v)) {
      half |= 0x7e00;
    } else if (std::isinf(v)) {
      half |= 0x7c00;
    } else if (v != 0) {
      int e = 0;
      const double m = std::frexp(std::fabs(v), &e);  // v = m 2^e, m in [0.5, 1)
      half |= e < -13 ? uint16_t(std::ldexp(std::fabs(v), 24)) : uint16_t(((e + 14) << 10) | (int(m * 2048) - 1024));
    }
    std::memcpy(p, &half, 2);
  }
}

}  // namespace oracle
