// Host side of the CUDA kernels: launching, limits of the device, the list of kernels, and what one file of launchers calls in
// another.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

#include "device.cuh"
#include "fpet/bdm_cuda.h"

namespace fpet {
namespace cuda {

// --- shared memory: every limit that a kernel is planned by -------------------------------------------------------------------------

constexpr size_t kSharedWithoutOptIn = 48 << 10;  // of a block, before the runtime is told that a kernel may take more
// Of a block on every GPU from sm_80 on: whether a problem takes one launch or tiles depends on its shape alone, and so do its bits.
constexpr size_t kSharedEverywhere = 99 << 10;
constexpr size_t kSharedReserved = 1 << 10;  // of a multiprocessor's, by the driver for each of its blocks
constexpr size_t kSharedOfKeyTile =
    64 << 10;  // of a tile of keys with its hidden units, in float32 or float64 (prepared_keys.cuh)

// Of the current device; of a small one where there is none. Asked once per device.
struct Limits {
  int multiprocessors = 1;
  size_t shared_per_block = kSharedEverywhere, shared_per_multiprocessor = kSharedEverywhere + kSharedReserved;
  size_t l2_bytes = 4 << 20;

  // As much for each of two blocks of a multiprocessor.
  size_t shared_for_two() const { return std::min(shared_per_block, shared_per_multiprocessor / 2 - kSharedReserved); }
};
const Limits& limits();

// --- launching -----------------------------------------------------------------------------------------------------------------------

// Lets a kernel take as much shared memory as a block of the current device can have: once per kernel and device, and always to the
// most, so that no thread takes from another what its launch needs.
template <auto kernel>
cudaError_t allow_shared() {
  static std::atomic<uint64_t> allowed{0};  // on which devices
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limits().shared_per_block));
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// The name under which a kernel is listed (all_kernels): of each instance of a template its own.
const char* kernel_name(const void* function);

// Nothing is launched where the grid is empty.
template <auto kernel, class Params>
CudaStatus launch(dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, const Params& p) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  cudaError_t error = shared > kSharedWithoutOptIn ? allow_shared<kernel>() : cudaSuccess;
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, p);
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // not left behind for whoever asks next
  return {error, kernel_name((const void*)kernel)};
}

// --- the list of kernels ---------------------------------------------------------------------------------------------------------------

// What introspection tells about a kernel: the launch of it that a typical problem makes on the current device.
struct KernelEntry {
  const char* name;
  const void* function;
  cudaError_t (*allow)();  // allow_shared of it
  unsigned threads;
  size_t dynamic_shared;
};
template <auto kernel>
KernelEntry entry(const char* name, unsigned threads, size_t dynamic_shared) {
  return {name, (const void*)kernel, allow_shared<kernel>, threads, dynamic_shared};
}

// One list per source file.
using KernelList = std::vector<KernelEntry>;
KernelList forward_short_kernels();
KernelList forward_long_kernels();
KernelList backward_kernels();
KernelList backward_short_kernels();
KernelList pair_gradient_kernels();
KernelList unmerge_kernels();
KernelList all_kernels();

// The typical problem: ViT-B/16 at 224 pixels in bfloat16; `refined`: 32 hidden units over the mean of 12 heads.
Problem typical_problem(bool refined);

// --- problems ----------------------------------------------------------------------------------------------------------------------------

// The same problem with strides that count: that of a dimension of size one says nothing, and must not forbid vector loads.
Problem with_plain_strides(Problem);
BackwardInputs with_plain_strides(const Problem&, BackwardInputs);
UnmergeProblem with_plain_strides(UnmergeProblem);

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
