// The instructions that CUDA C++ has no name for, as PTX that every GPU from sm_80 on has. csrc/tests/emulator has a file of the same
// name with the same functions for the host, which the emulated build finds first: no other file knows which of the two it gets.
//
// mma_f16, mma_bf16: d += A B for A (16 × 16), B (16 × 8), d (16 × 8) float32. mma_tf32: A (16 × 8), B (8 × 8). With
// g = lane / 4, t = lane % 4 a lane holds
//   a[0]: A[g][2t, 2t+1]  a[1]: A[g+8][2t, 2t+1]  a[2]: A[g][2t+8, 2t+9]  a[3]: A[g+8][2t+8, 2t+9]   (16-bit pairs, low first)
//   b[0]: B[2t, 2t+1][g]  b[1]: B[2t+8, 2t+9][g]
//   d[0], d[1]: D[g][2t, 2t+1]   d[2], d[3]: D[g+8][2t, 2t+1]
//   tf32: a[0]: A[g][t]  a[1]: A[g+8][t]  a[2]: A[g][t+4]  a[3]: A[g+8][t+4]   b[0]: B[t][g]  b[1]: B[t+4][g]
// So two neighbouring d of one product, packed, are an a of the next one: d of columns 16k .. 16k+7 gives a[0], a[1], the next
// eight columns a[2], a[3].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define FPET_DEVICE __device__ __forceinline__

namespace fpet {
namespace cuda {

FPET_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// The number of this lane, read where it stands: what depends on it isn't carried through loops in registers.
FPET_DEVICE int lane_index_anew() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The same number, of which the compiler does not know where it comes from: what is worked out from it, anew in every tile, does not
// wait in registers through the products.
FPET_DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// At one of the places of places.cuh.
template <int number>
FPET_DEVICE void pass() {
#ifdef FPET_COUNT
  asm volatile("pmevent.mask %0;" ::"n"(number));
#endif
}

// --- 16-bit numbers --------------------------------------------------------------------------------------------------------------------

FPET_DEVICE float f16_to_float(uint16_t bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
// Two values rounded to 16 bits each; the first one in the lower half.
FPET_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
FPET_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// --- matrix units ----------------------------------------------------------------------------------------------------------------------

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

// --- copies ------------------------------------------------------------------------------------------------------------------------------

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

}  // namespace cuda
}  // namespace fpet
