// Runs CUDA kernels on the host, one thread block after another, so that their arithmetic, indexing and synchronisation can be
// tested without a GPU. Every CUDA thread is a fiber that runs until it waits: at a barrier, or in a warp-wide operation for the
// other lanes. The order in which threads and blocks run is chosen by `options.order`; a missing barrier then shows as a result
// that differs between orders, or as the NaN with which shared memory is filled. Nothing here is fast.
//
// What is stricter than a GPU: reading past shared memory, a warp-wide operation that not all lanes of its mask reach, and
// waiting for something that never comes end the program with a message. Kernels must take all shared memory dynamically
// (shared_memory() in device.cuh), and must not spin on memory that another thread writes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

enum class Order { ascending, descending, shuffled };

struct Options {
  Order order = Order::ascending;
  unsigned seed = 0;
  // As a device would report them.
  int device = 1000;  // too high a number for its limits to be remembered: tests change them
  int multiprocessors = 4, shared_per_block = 227 << 10, shared_per_multiprocessor = 228 << 10, l2_bytes = 1 << 20;
};
extern Options options;

// What has been done since a test last cleared it: launches in their order, with what happened in each, and what the runtime was asked.
struct Launched {
  const void* function;
  unsigned threads;
  uint64_t blocks;
  size_t shared;
  std::map<int, int64_t> passes;          // of warps, by csrc/cuda/places.cuh
  std::map<std::string, int64_t> events;  // warp-wide operations by their names; by threads: barrier, load16, copied bytes
};
struct Record {
  std::vector<Launched> launches;
  std::map<const void*, std::vector<int>> shared_allowed;  // what each kernel was allowed, call by call
  int attributes_asked = 0;
};
extern Record record;
inline void count_pass(int place) { ++record.launches.back().passes[place]; }
inline void count(const char* event, int64_t n = 1) { record.launches.back().events[event] += n; }

struct Group {
  unsigned mask = 0, arrived = 0;
  uint32_t generation = 0;
  const char* name = nullptr;
  const void* in[32];
  void* out[32];
};

struct Thread {
  dim3 thread_index, block_index;
  int linear = 0, lane = 0, warp = 0;
};
extern Thread* self;
extern dim3 block_size, grid_size;

// Runs kernel() for every thread of every block.
void launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
char* shared();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Waits until `threads` threads (0: all of the block) have come to barrier `id`; returns whether, and for how many, a predicate held.
int barrier(int id, int threads, bool predicate);
// Waits for the lanes of `mask`; the last to come calls f(in, out) over the pointers that all have brought.
void collective(const char* name, unsigned mask, const void* in, void* out, const std::function<void(const Group&)>& compute);
// Asynchronous copies: begun, closed into a group, and finished at the latest when waited for. In ascending order they finish
// as late as they may, in descending order at once, in shuffled order at either time.
void copy_begin(void* to, const void* from, int bytes, int from_bytes);
void copy_commit();
void copy_wait(int newest_left);

template <class T, class F>
T exchange(const char* name, unsigned mask, T value, F from_lane) {  // value of lane from_lane(own lane)
  T result{};
  collective(name, mask, &value, &result, [&](const Group& g) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(g.mask >> lane & 1)) continue;
      int source = from_lane(lane);
      if (source < 0 || source > 31) source = lane;
      if (!(g.mask >> source & 1)) fail("%s: lane %d reads lane %d, which is not in the mask %08x", name, lane, source, g.mask);
      *(T*)g.out[lane] = *(const T*)g.in[source];
    }
  });
  return result;
}

template <class T, class F>
T reduce(const char* name, unsigned mask, T value, F combine) {
  T result{};
  collective(name, mask, &value, &result, [&](const Group& g) {
    T total{};
    bool first = true;
    for (int lane = 0; lane < 32; ++lane)
      if (g.mask >> lane & 1) {
        const T v = *(const T*)g.in[lane];
        total = first ? v : combine(total, v);
        first = false;
      }
    for (int lane = 0; lane < 32; ++lane)
      if (g.mask >> lane & 1) *(T*)g.out[lane] = total;
  });
  return result;
}

}  // namespace emulator

#define threadIdx (::emulator::self->thread_index)
#define blockIdx (::emulator::self->block_index)
inline const dim3& blockDim = ::emulator::block_size;
inline const dim3& gridDim = ::emulator::grid_size;
constexpr int warpSize = 32;

inline void __syncthreads() { emulator::barrier(0, 0, false); }
inline int __syncthreads_or(int p) { return emulator::barrier(0, 0, p != 0) > 0; }
inline int __syncthreads_count(int p) { return emulator::barrier(0, 0, p != 0); }
inline int __syncthreads_and(int p) { return emulator::barrier(0, 0, p == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::collective("__syncwarp", mask, nullptr, nullptr, [](const emulator::Group&) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  // Every lane may name another source: it travels with the value.
  struct Pair {
    T value;
    int source;
  } pair{v, (emulator::self->lane & ~(width - 1)) | (source & (width - 1))};
  T result{};
  emulator::collective("__shfl_sync", mask, &pair, &result, [](const emulator::Group& g) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(g.mask >> lane & 1)) continue;
      const int from = ((const Pair*)g.in[lane])->source;
      if (!(g.mask >> from & 1)) emulator::fail("__shfl_sync: lane %d reads lane %d, which is not in the mask", lane, from);
      *(T*)g.out[lane] = ((const Pair*)g.in[from])->value;
    }
  });
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int = 32) {
  return emulator::exchange("__shfl_xor_sync", mask, v, [=](int lane) { return lane ^ lanes; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return emulator::exchange("__shfl_down_sync", mask, v,
                            [=](int lane) { return lane % width + int(delta) < width ? lane + int(delta) : lane; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return emulator::exchange("__shfl_up_sync", mask, v,
                            [=](int lane) { return lane % width >= int(delta) ? lane - int(delta) : lane; });
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return emulator::reduce("__ballot_sync", mask, p ? 1u << emulator::self->lane : 0u,
                          [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
inline unsigned __activemask() { emulator::fail("__activemask means nothing here"); }
template <class T>
T __reduce_add_sync(unsigned mask, T v) {
  return emulator::reduce("__reduce_add_sync", mask, v, [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T v) {
  return emulator::reduce("__reduce_max_sync", mask, v, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T v) {
  return emulator::reduce("__reduce_min_sync", mask, v, [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  return emulator::reduce("__reduce_or_sync", mask, v, [](unsigned a, unsigned b) { return a | b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  unsigned result = 0;
  emulator::collective("__match_any_sync", mask, &v, &result, [](const emulator::Group& g) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(g.mask >> lane & 1)) continue;
      unsigned same = 0;
      for (int other = 0; other < 32; ++other)
        if ((g.mask >> other & 1) && *(const T*)g.in[lane] == *(const T*)g.in[other]) same |= 1u << other;
      *(unsigned*)g.out[lane] = same;
    }
  });
  return result;
}

template <class T>
T atomicAdd(T* p, T v) {
  static_assert(T(1) / T(2) == T(0), "sums of floating point numbers would depend on the order of threads");
  const T old = *p;
  *p = T(old + v);
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  if (v > old) *p = v;
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  if (v < old) *p = v;
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

template <class To, class From>
inline To emulator_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  std::memcpy(&r, &v, sizeof(r));
  return r;
}
inline unsigned __float_as_uint(float v) { return emulator_bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulator_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulator_bits<float>(v); }
inline float __int_as_float(int v) { return emulator_bits<float>(v); }
inline long long __double_as_longlong(double v) { return emulator_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emulator_bits<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
template <class T>
T __ldg(const T* p) {
  if (sizeof(T) == 16) emulator::count("load16");
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
inline float rsqrtf(float v) { return float(1 / std::sqrt(double(v))); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
using std::fmax;
using std::fmin;
using std::isfinite;
using std::isinf;
using std::isnan;

// --- the runtime calls that launchers and tests make -------------------------------------------------------------------------------

typedef int cudaError_t;
typedef struct CUstream_st* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
                      cudaErrorInvalidConfiguration = 9;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0, localSizeBytes = 0;
  int numRegs = 0, maxThreadsPerBlock = 1024;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
// Also fails where more shared memory is asked for than the kernel has been allowed.
cudaError_t emulator_may_launch(const void* function, const cudaLaunchConfig_t&);
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  const cudaError_t error = emulator_may_launch((const void*)kernel, *config);
  if (error != cudaSuccess) return error;
  emulator::launch((const void*)kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                   [&] { kernel(arguments...); });
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind);
cudaError_t cudaMemset(void* p, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* function);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads, size_t shared);
