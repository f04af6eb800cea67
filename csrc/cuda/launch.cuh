// Host side of the CUDA kernels: launching, limits of the device, the list of kernels, and what one file of launchers calls in
// another.
#pragma once

#include <cstddef>
#include <utility>

#include "device.cuh"
#include "fpet/bdm_cuda.h"

namespace fpet {
namespace cuda {

#ifdef FPET_EMULATE_CUDA
template <class... P, class... A>
CudaStatus launch(const char* name, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, cudaStream_t,
                  const A&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  emulator::launch(name, grid, dim3(threads), shared, [&] { kernel(arguments...); });
  return {};
}
#else
template <class... P, class... A>
CudaStatus launch(const char* name, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
                  const A&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  if (shared > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // not left behind for whoever asks next
      return {error, name};
    }
  }
  void* pointers[] = {(void*)&arguments...};
  static_assert((std::is_same<std::remove_cv_t<P>, A>::value && ...), "arguments must have the kernel's types");
  const cudaError_t error = cudaLaunchKernel((const void*)kernel, grid, dim3(threads), pointers, shared, stream);
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {error, name};
}
#endif

// CudaStatus of a launch; nothing is launched where the grid is empty. In parentheses where the kernel's name has a comma.
#define FPET_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  ::fpet::cuda::launch(#kernel, kernel, grid, threads, shared, stream, __VA_ARGS__)

// Of the current device; of a small one where there is none. Asked once per device.
struct Limits {
  int multiprocessors = 1;
  size_t shared_per_block = 99 << 10, shared_per_multiprocessor = 100 << 10, l2_bytes = 4 << 20;
};
const Limits& limits();

// What introspection tells about a kernel: a typical launch of it.
struct KernelEntry {
  const char* name;
  const void* function;
  int threads;
  size_t dynamic_shared;
};
struct KernelList {
  const KernelEntry* entries;
  int count;
};
// One list per source file.
KernelList forward_short_kernels();
KernelList forward_long_kernels();
KernelList backward_kernels();
KernelList other_kernels();

// Why the tiled kernels, which the backward always needs, don't take a problem; null where they do.
const char* tiled_refuses(const Problem&);

// Short grids, in one launch: whether the keys of all destinations fit in shared memory.
bool forward_short_takes(const Problem&);
CudaStatus forward_short(const Problem&, const ForwardOutputs&, cudaStream_t);

bool backward_short_takes(const Problem&);

// Any problem that cuda_refuses lets pass.
size_t forward_long_workspace(const Problem&);
CudaStatus forward_long(const Problem&, const ForwardOutputs&, void* workspace, cudaStream_t);
size_t backward_long_workspace(const Problem&, const BackwardOutputs&);
CudaStatus backward_long(const Problem&, const BackwardInputs&, const BackwardOutputs&, void* workspace, cudaStream_t);

}  // namespace cuda
}  // namespace fpet
