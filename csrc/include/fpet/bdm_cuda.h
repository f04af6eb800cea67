// CUDA launchers of bipartite differentiable matching. No torch header. Problems and outputs are those of bdm.h; every pointer
// in them, split lists included, is a device pointer. Nothing here synchronises, allocates, or uses another stream, so every
// call can be captured in a CUDA graph. Results are bitwise the same from run to run, and for one image in any batch.
#pragma once

#include <cuda_runtime_api.h>

#include "fpet/bdm.h"

namespace fpet {

// What a launch said, and which kernel said it. `kernel` is a static string, null where all went well.
struct CudaStatus {
  cudaError_t error = cudaSuccess;
  const char* kernel = nullptr;
};

// Why these kernels don't take this problem (a static string), or null where they do. Needs no device.
const char* cuda_refuses(const Problem&);

// Bytes of scratch memory on the device, aligned to 256, that a call needs; they may be 0. Linear in N.
size_t cuda_forward_workspace(const Problem&);
size_t cuda_backward_workspace(const Problem&, const BackwardOutputs&);

CudaStatus cuda_forward(const Problem&, const ForwardOutputs&, void* workspace, cudaStream_t);
CudaStatus cuda_backward(const Problem&, const BackwardInputs&, const BackwardOutputs&, void* workspace, cudaStream_t);
// As cpu_average_heads.
CudaStatus cuda_average_heads(const Problem&, void* out, cudaStream_t);
CudaStatus cuda_unmerge(const UnmergeProblem&, cudaStream_t);
size_t cuda_unmerge_backward_workspace(const UnmergeProblem&);
CudaStatus cuda_unmerge_backward(const UnmergeProblem&, void* workspace, cudaStream_t);

// One compiled kernel on the current device. Asking needs a device; `error` says what went wrong without one.
struct CudaKernelFacts {
  const char* name = nullptr;
  int registers = 0, spilled_bytes = 0, threads = 0, blocks_per_sm = 0;
  size_t static_shared = 0, dynamic_shared = 0;
  cudaError_t error = cudaSuccess;
};
// Facts of the index-th kernel; `name` is null from the number of kernels on.
CudaKernelFacts cuda_kernel_facts(int index);

}  // namespace fpet
