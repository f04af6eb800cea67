// Merges the tokens of a batch of images, forward and backward, without torch and without Python: on the CPU, and on a GPU where
// these kernels were compiled for one and one is there. Prints what it did; the exit status is 1 where the results are wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "fpet/bdm.h"

#ifdef FPET_WITH_CUDA
#include "fpet/bdm_cuda.h"
#endif

namespace {

// 8 images of 1 + 14 x 14 tokens, 96 features, keys of 32 channels.
constexpr int64_t kBatch = 8, kHeight = 14, kWidth = 14, kPrefix = 1, kDim = 96, kChannels = 32;
constexpr int64_t kNumA = (kHeight * kWidth + 1) / 2, kNumB = kHeight * kWidth / 2;
constexpr int64_t kTokens = kPrefix + kNumA + kNumB, kMerged = kPrefix + kNumB;

struct Results {
  std::vector<float> tokens = std::vector<float>(kBatch * kMerged * kDim), size = std::vector<float>(kBatch * kMerged);
  std::vector<int64_t> match = std::vector<int64_t>(kBatch * kNumA), second = match;
  std::vector<float> mid = std::vector<float>(kBatch * kNumA);
  std::vector<float> grad_x = std::vector<float>(kBatch * kTokens * kDim),
                     grad_key = std::vector<float>(kBatch * kTokens * kChannels);
};

fpet::View view(const void* data, int64_t batch_stride, int64_t row_stride) {
  fpet::View v;
  v.data = data;
  v.stride[0] = batch_stride;
  v.stride[1] = row_stride;
  v.stride[2] = 1;
  return v;
}

fpet::Problem describe(const float* x, const float* key) {
  fpet::Problem p;
  p.batch = kBatch;
  p.tokens = kTokens;
  p.dim = kDim;
  p.channels = kChannels;
  p.prefix = kPrefix;
  p.num_a = kNumA;
  p.num_b = kNumB;
  p.grid_h = kHeight;
  p.grid_w = kWidth;
  p.x = view(x, kTokens * kDim, kDim);
  p.key = view(key, kTokens * kChannels, 0);  // (B, heads, N, C) with one head
  p.key.stride[2] = kChannels;
  p.key.stride[3] = 1;
  return p;
}

fpet::ForwardOutputs outputs(float* tokens, float* size, int64_t* match, int64_t* second, float* mid) {
  fpet::ForwardOutputs out;
  out.tokens = tokens;
  out.merged_size = size;
  out.match = match;
  out.second = second;
  out.mid = mid;
  return out;
}

// The gradient of the sum of tokens, half their squares: upstream, it is the tokens themselves.
fpet::BackwardInputs upstream(const fpet::ForwardOutputs& out) {
  fpet::BackwardInputs in;
  in.grad_tokens = in.tokens = view(out.tokens, kMerged * kDim, kDim);
  in.merged_size = view(out.merged_size, kMerged, 1);
  in.match = out.match;
  in.second = out.second;
  in.mid = out.mid;
  return in;
}

fpet::BackwardOutputs gradients(float* x, float* key) {
  fpet::BackwardOutputs out;
  out.x = x;
  out.key = key;
  return out;
}

// The kernels start no threads: whoever calls them says how tasks are run.
void run_on_threads(void*, int64_t count, void (*body)(void*, int64_t), void* context) {
  const int64_t threads = std::thread::hardware_concurrency();
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t)
    pool.emplace_back([=] {
      for (int64_t task = t; task < count; task += threads) body(context, task);
    });
  for (std::thread& thread : pool) thread.join();
}

void on_cpu(const std::vector<float>& x, const std::vector<float>& key, Results& r) {
  const fpet::Parallel parallel{int64_t(std::thread::hardware_concurrency()), nullptr, run_on_threads};
  const fpet::Problem p = describe(x.data(), key.data());
  const auto out = outputs(r.tokens.data(), r.size.data(), r.match.data(), r.second.data(), r.mid.data());
  const auto grads = gradients(r.grad_x.data(), r.grad_key.data());
  const auto with_workspace = [](size_t bytes, auto call) {
    void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    call(workspace);
    std::free(workspace);
  };
  with_workspace(fpet::cpu_forward_workspace(p, parallel.threads),
                 [&](void* workspace) { fpet::cpu_forward(p, out, parallel, workspace); });
  with_workspace(fpet::cpu_backward_workspace(p, grads, parallel.threads),
                 [&](void* workspace) { fpet::cpu_backward(p, upstream(out), grads, parallel, workspace); });
}

#ifdef FPET_WITH_CUDA
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
void check(const fpet::CudaStatus& status) { check(status.error, status.kernel ? status.kernel : "launch"); }

template <class T>
T* to_device(const std::vector<T>& host) {
  void* device;
  check(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return static_cast<T*>(device);
}

template <class T>
void to_host(std::vector<T>& host, T* device) {
  check(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  check(cudaFree(device), "cudaFree");
}

void on_gpu(const std::vector<float>& x, const std::vector<float>& key, Results& r) {
  float *device_x = to_device(x), *device_key = to_device(key);
  float *tokens = to_device(r.tokens), *size = to_device(r.size), *mid = to_device(r.mid);
  int64_t *match = to_device(r.match), *second = to_device(r.second);
  float *grad_x = to_device(r.grad_x), *grad_key = to_device(r.grad_key);
  const fpet::Problem p = describe(device_x, device_key);
  const auto out = outputs(tokens, size, match, second, mid);
  const auto grads = gradients(grad_x, grad_key);
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  void *forward_workspace, *backward_workspace;
  check(cudaMalloc(&forward_workspace, fpet::cuda_forward_workspace(p) + 1), "cudaMalloc");
  check(cudaMalloc(&backward_workspace, fpet::cuda_backward_workspace(p, grads) + 1), "cudaMalloc");
  check(fpet::cuda_forward(p, out, forward_workspace, stream));
  check(fpet::cuda_backward(p, upstream(out), grads, backward_workspace, stream));
  check(cudaStreamSynchronize(stream), "the kernels");
  to_host(r.tokens, tokens);
  to_host(r.size, size);
  to_host(r.mid, mid);
  to_host(r.match, match);
  to_host(r.second, second);
  to_host(r.grad_x, grad_x);
  to_host(r.grad_key, grad_key);
  for (void* p : {static_cast<void*>(device_x), static_cast<void*>(device_key), forward_workspace, backward_workspace})
    check(cudaFree(p), "cudaFree");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}
#endif

// What merging promises: no token is lost, and every source went to a destination.
bool report(const char* where, const Results& r) {
  double size = 0, largest = 0, gradient = 0;
  bool in_range = true;
  for (const float s : r.size) {
    size += s;
    largest = std::max(largest, double(s));
  }
  for (const int64_t m : r.match)
    if (m < kPrefix || m >= kMerged) in_range = false;
  for (const float g : r.grad_key) gradient = std::max(gradient, std::fabs(double(g)));
  std::printf(
      "%s: %lld images, %lld tokens -> %lld; the largest stands for %.0f; sizes add up to %.0f of %lld; "
      "largest key gradient %.3g\n",
      where, (long long)kBatch, (long long)kTokens, (long long)kMerged, largest, size, (long long)(kBatch * kTokens), gradient);
  return in_range && size == double(kBatch * kTokens) && gradient > 0;
}

}  // namespace

int main() {
  std::vector<float> x(kBatch * kTokens * kDim), key(kBatch * kTokens * kChannels);
  uint32_t state = 1;
  for (std::vector<float>* values : {&x, &key})
    for (float& v : *values) v = float(state = state * 1664525u + 1013904223u) / 4294967296.0f - 0.5f;

  Results cpu;
  on_cpu(x, key, cpu);
  bool good = report((std::string("CPU, ") + fpet::cpu_isa()).c_str(), cpu);

#ifdef FPET_WITH_CUDA
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("GPU: none here (%s)\n", cudaGetErrorString(error));
  } else {
    Results gpu;
    on_gpu(x, key, gpu);
    good &= report("GPU", gpu);
    int64_t different = 0;
    for (size_t i = 0; i < gpu.match.size(); ++i) different += gpu.match[i] != cpu.match[i];
    std::printf("the GPU decided %lld of %zu matches otherwise\n", (long long)different, gpu.match.size());
    good &= different * 100 <= int64_t(gpu.match.size());  // near ties, which float32 sums in another order may turn
  }
#else
  std::printf("GPU: the CUDA kernels were not compiled in\n");
#endif
  return good ? 0 : 1;
}
