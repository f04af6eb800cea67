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
  constexpr int kDevices = 64;
  if (device < kDevices) {
    static Limits known[kDevices];
    static std::once_flag asked[kDevices];
    std::call_once(asked[device], [&] { known[device] = ask(device); });
    return known[device];
  }
  thread_local Limits now;
  now = ask(device);
  return now;
}

KernelList all_kernels() {
  KernelList all;
  for (const KernelList& list : {forward_short_kernels(), forward_long_kernels(), backward_short_kernels(), backward_kernels(),
                                 pair_gradient_kernels(), unmerge_kernels()})
    all.insert(all.end(), list.begin(), list.end());
  return all;
}

const char* kernel_name(const void* function) {
  for (const KernelEntry& kernel : all_kernels())
    if (kernel.function == function) return kernel.name;
  return "that no list names";
}

Problem typical_problem(bool refined) {
  Problem p;
  p.batch = 64;
  p.prefix = 1;
  p.grid_h = p.grid_w = 14;
  p.num_a = p.num_b = 98;
  p.tokens = 197;
  p.dim = 768;
  p.channels = 64;
  p.heads = refined ? 12 : 1;
  p.hidden = refined ? 32 : 0;
  p.x.dtype = p.key.dtype = p.w_down.dtype = p.w_up.dtype = DType::bf16;
  return p;
}

namespace {

void mend(View& v, std::initializer_list<int64_t> sizes) {
  int d = 0;
  for (const int64_t size : sizes) {
    if (size == 1) v.stride[d] = d + 1 == int(sizes.size()) ? 1 : 0;
    ++d;
  }
}

}  // namespace

Problem with_plain_strides(Problem q) {
  mend(q.x, {q.batch, q.tokens, q.dim});
  mend(q.key, {q.batch, q.heads, q.tokens, q.channels});
  mend(q.size, {q.batch, q.tokens});
  mend(q.w_down, {q.hidden, q.channels});
  mend(q.w_up, {q.channels, q.hidden});
  mend(q.dropout_mask, {q.batch, q.tokens, q.hidden});
  mend(q.key_delta, {q.batch, q.tokens, q.channels});
  return q;
}
BackwardInputs with_plain_strides(const Problem& q, BackwardInputs in) {
  const int64_t merged = q.prefix + q.num_b;
  mend(in.grad_tokens, {q.batch, merged, q.dim});
  mend(in.grad_size, {q.batch, merged});
  mend(in.tokens, {q.batch, merged, q.dim});
  mend(in.merged_size, {q.batch, merged});
  return in;
}
UnmergeProblem with_plain_strides(UnmergeProblem u) {
  mend(u.input, {u.batch, 2, u.dim});  // rows: merged tokens or all of them, two at least
  return u;
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
  const cuda::KernelList all = cuda::all_kernels();
  if (index < 0 || size_t(index) >= all.size()) return facts;
  const cuda::KernelEntry& kernel = all[size_t(index)];
  facts.name = kernel.name;
  facts.threads = int(kernel.threads);
  facts.dynamic_shared = kernel.dynamic_shared;
  cudaFuncAttributes attributes;
  facts.error = cudaFuncGetAttributes(&attributes, kernel.function);
  if (facts.error == cudaSuccess) {
    facts.registers = attributes.numRegs;
    facts.spilled_bytes = int(attributes.localSizeBytes);
    facts.static_shared = attributes.sharedSizeBytes;
    if (kernel.dynamic_shared > cuda::kSharedWithoutOptIn) facts.error = kernel.allow();
  }
  if (facts.error == cudaSuccess)
    facts.error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&facts.blocks_per_sm, kernel.function, facts.threads,
                                                                kernel.dynamic_shared);
  if (facts.error != cudaSuccess) cudaGetLastError();
  return facts;
}

}  // namespace fpet
