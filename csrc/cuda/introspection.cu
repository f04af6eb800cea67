// What is known about the device and the compiled kernels.
#include <mutex>

#include "launch.cuh"

namespace fpet {
namespace cuda {

namespace {

Limits ask(int device) {
  Limits l;
  int multiprocessors = 0, per_block = 0, per_multiprocessor = 0, l2 = 0;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device) == cudaSuccess) {
    l.multiprocessors = multiprocessors;
    l.shared_per_block = size_t(per_block);
    l.shared_per_multiprocessor = size_t(per_multiprocessor);
    l.l2_bytes = size_t(l2);
  } else {
    cudaGetLastError();
  }
  return l;
}

}  // namespace

const Limits& limits() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    static const Limits none;
    return none;
  }
#ifndef FPET_EMULATE_CUDA  // whose device tests change
  constexpr int kDevices = 64;
  if (device < kDevices) {
    static Limits known[kDevices];
    static std::once_flag asked[kDevices];
    std::call_once(asked[device], [&] { known[device] = ask(device); });
    return known[device];
  }
#endif
  thread_local Limits now;
  now = ask(device);
  return now;
}

}  // namespace cuda

const char* cuda_refuses(const Problem& p) {
  constexpr int64_t most = int64_t(1) << 30;
  if (p.tokens > most || p.prefix + p.num_b > most) return "more than 2^30 tokens in an image";
  if (p.dim > most || p.channels > most || p.hidden > most) return "rows of more than 2^30 elements";
  if (p.batch > most) return "more than 2^30 images";
  if (p.num_b < 1) return "no destinations";
  if (p.dim < 1 || p.channels < 1) return "tokens or keys without elements";
  for (const View* v : {&p.x, &p.key, &p.size, &p.w_down, &p.w_up, &p.key_delta})
    if (v->data && v->dtype == DType::boolean) return "a boolean tensor other than the dropout mask";
  return cuda::tiled_refuses(p);
}

CudaKernelFacts cuda_kernel_facts(int index) {
  CudaKernelFacts facts;
  if (index < 0) return facts;
  for (const cuda::KernelList& list :
       {cuda::forward_short_kernels(), cuda::forward_long_kernels(), cuda::backward_kernels(), cuda::other_kernels()}) {
    if (index >= list.count) {
      index -= list.count;
      continue;
    }
    const cuda::KernelEntry& kernel = list.entries[index];
    facts.name = kernel.name;
    facts.threads = kernel.threads;
    facts.dynamic_shared = kernel.dynamic_shared;
    cudaFuncAttributes attributes;
    facts.error = cudaFuncGetAttributes(&attributes, kernel.function);
    if (facts.error == cudaSuccess) {
      facts.registers = attributes.numRegs;
      facts.spilled_bytes = int(attributes.localSizeBytes);
      facts.static_shared = attributes.sharedSizeBytes;
      if (kernel.dynamic_shared > size_t(48 << 10))
        facts.error =
            cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kernel.dynamic_shared));
    }
    if (facts.error == cudaSuccess)
      facts.error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&facts.blocks_per_sm, kernel.function, kernel.threads,
                                                                  kernel.dynamic_shared);
    if (facts.error != cudaSuccess) cudaGetLastError();
    return facts;
  }
  return facts;
}

}  // namespace fpet
