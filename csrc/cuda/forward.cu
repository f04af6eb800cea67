// Forward: short grids in one launch, all others tiled.
#include "launch.cuh"

namespace fpet {

size_t cuda_forward_workspace(const Problem& p) { return cuda::forward_short_takes(p) ? 0 : cuda::forward_long_workspace(p); }

CudaStatus cuda_forward(const Problem& problem, const ForwardOutputs& out, void* workspace, cudaStream_t stream) {
  const Problem p = cuda::with_plain_strides(problem);
  return cuda::forward_short_takes(p) ? cuda::forward_short(p, out, stream) : cuda::forward_long(p, out, workspace, stream);
}

}  // namespace fpet
