// CUDA kernels of the operators that libfpet_ops.so or Python defines, under torch's stable ABI: one binary for every torch from
// 2.10 on. libtorch_cuda.so is looked for at the first call, not when this is loaded, so that loading never fails for want of it.
// Also, for fpet_kernels/backends.py, in plain C: what was compiled, and what it is on a device.
//
// With FPET_EMULATE_CUDA, for tests: the same over emulated kernels, for CPU tensors, under the name fpet_emulated.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>

#ifndef FPET_EMULATE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include "common.h"
#include "fpet/bdm_cuda.h"
#include "json.h"

#ifndef FPET_CUDA_ARCHITECTURES
#define FPET_CUDA_ARCHITECTURES ""
#define FPET_NVCC ""
#endif

namespace {

using namespace fpet::binding;

#ifndef FPET_EMULATE_CUDA
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// aoti_torch_get_current_cuda_stream; before torch 2.13 the stable ABI of libtorch_cpu.so has no way to a stream's handle.
CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* found = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
  STD_TORCH_CHECK(found, "libtorch_cuda.so is not loaded: this torch has no CUDA");
  return reinterpret_cast<CurrentStream>(found);
}

cudaStream_t current_stream(int32_t device) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

void check(const fpet::CudaStatus& status) {
  STD_TORCH_CHECK(status.error == cudaSuccess, "CUDA kernel ", status.kernel ? status.kernel : "?",
                  " could not be launched: ", cudaGetErrorString(status.error));
}

#ifndef FPET_EMULATE_CUDA
// Torch's, which makes no context on the device that it goes back to where the thread had none there. What is current is the
// driver's: the CUDA runtime linked in here sees it.
using DeviceGuard = torch::stable::accelerator::DeviceGuard;
#else
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#endif

Device device_of(const Tensor& t, const char* name) {
#ifndef FPET_EMULATE_CUDA
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
  return {aoti_torch_device_type_cuda(), t.get_device_index(), false};
#else
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  return {aoti_torch_device_type_cpu(), 0, true};
#endif
}

class CudaKernels {
 public:
  CudaKernels(const Tensor& first, const char* name) : on(device_of(first, name)), guard_(on.index) {
#ifndef FPET_EMULATE_CUDA
    stream_ = current_stream(on.index);
#endif
  }

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const { return empty_on(on, sizes, dtype); }

  void forward(const fpet::Problem& p, const fpet::ForwardOutputs& out) const {
    admit(p);
    const Workspace workspace(*this, fpet::cuda_forward_workspace(p));
    check(fpet::cuda_forward(p, out, workspace.data, stream_));
  }

  void backward(const fpet::Problem& p, const fpet::BackwardInputs& in, const fpet::BackwardOutputs& out) const {
    admit(p);
    const Workspace workspace(*this, fpet::cuda_backward_workspace(p, out));
    check(fpet::cuda_backward(p, in, out, workspace.data, stream_));
  }

  void average_heads(const fpet::Problem& p, void* out) const { check(fpet::cuda_average_heads(p, out, stream_)); }
  void unmerge(const fpet::UnmergeProblem& p) const { check(fpet::cuda_unmerge(p, stream_)); }

  void unmerge_backward(const fpet::UnmergeProblem& p) const {
    const Workspace workspace(*this, fpet::cuda_unmerge_backward_workspace(p));
    check(fpet::cuda_unmerge_backward(p, workspace.data, stream_));
  }

  const Device on;

 private:
  // Scratch from torch's caching allocator. The stream orders its next owner after these kernels.
  struct Workspace {
    Workspace(const CudaKernels& kernels, size_t bytes) {
      if (!bytes) return;
      constexpr uintptr_t alignment = 256;
      tensor = kernels.empty({int64_t(bytes + alignment)}, ScalarType::Byte);
      const auto address = reinterpret_cast<uintptr_t>(tensor->mutable_data_ptr());
      data = reinterpret_cast<void*>((address + alignment - 1) & ~(alignment - 1));
    }
    OptTensor tensor;
    void* data = nullptr;
  };

  static void admit(const fpet::Problem& p) {
    const char* why = fpet::cuda_refuses(p);
    STD_TORCH_CHECK(!why, "the CUDA kernels don't take this problem: ", why ? why : "");
  }

  DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

std::string kernel_facts() {
  std::string list;
  for (int i = 0;; ++i) {
    const fpet::CudaKernelFacts facts = fpet::cuda_kernel_facts(i);
    if (!facts.name) return list;
    char numbers[256];
    std::snprintf(numbers, sizeof(numbers),
                  "\"registers\": %d, \"spilled_bytes\": %d, \"threads\": %d, \"blocks_per_sm\": %d, "
                  "\"static_shared\": %zu, \"dynamic_shared\": %zu",
                  facts.registers, facts.spilled_bytes, facts.threads, facts.blocks_per_sm, facts.static_shared,
                  facts.dynamic_shared);
    const char* error = facts.error == cudaSuccess ? "" : cudaGetErrorString(facts.error);
    list += (i ? ", {\"name\": " : "{\"name\": ") + quoted(facts.name) + ", " + numbers + ", \"error\": " + quoted(error) + "}";
  }
}

}  // namespace

// JSON, valid until this thread calls again: what was compiled. Needs no device and no driver.
extern "C" __attribute__((visibility("default"))) const char* fpet_cuda_build() {
  thread_local std::string result;
  int runtime = 0;
#ifndef FPET_EMULATE_CUDA
  cudaRuntimeGetVersion(&runtime);
#endif
  result = "{\"nvcc\": " + quoted(FPET_NVCC) + ", \"architectures\": " + quoted(FPET_CUDA_ARCHITECTURES) +
           ", \"runtime\": " + std::to_string(runtime) + "}";
  return result.c_str();
}

// The CUDA version that the driver here is for, as 1000 major + 10 minor; 0 without a driver. Makes no context, so it can be asked while
// a stream is captured.
extern "C" __attribute__((visibility("default"))) int fpet_cuda_driver() {
  int version = 0;
#ifndef FPET_EMULATE_CUDA
  cudaDriverGetVersion(&version);
#endif
  return version;
}

// JSON, likewise: the kernels as they are on this device, or the error met on the way. Makes a context on the device. Of device
// -1 nothing is asked: what is known without one.
extern "C" __attribute__((visibility("default"))) const char* fpet_cuda_kernels(int device) {
  thread_local std::string result;
  try {
    std::optional<DeviceGuard> guard;
    if (device >= 0) guard.emplace(device);
    result = "{\"kernels\": [" + kernel_facts() + "]}";
  } catch (const std::exception& error) {
    result = "{\"error\": " + quoted(error.what()) + "}";
  }
  return result.c_str();
}

#ifndef FPET_EMULATE_CUDA
STABLE_TORCH_LIBRARY_IMPL(FPET_NAMESPACE, CUDA, m) {
  Operators<CudaKernels>::add_to(m);
  Operators<CudaKernels>::add_recorded_to(m);
}
#else
STABLE_TORCH_LIBRARY_IMPL(fpet_emulated, CPU, m) { Operators<CudaKernels>::add_to(m); }
#endif
