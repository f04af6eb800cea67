// The operators' schemas and their CPU kernels, for Python and for programs without it. Sees only torch's stable ABI: one binary
// serves every torch from 2.10 on.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <chrono>

#include "common.h"

namespace {

using namespace fpet::binding;

// The first touch of a large fresh output costs more than computing it, page by page; in huge pages it does not.
void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failing is fine
#else
  (void)data, (void)bytes;
#endif
}

constexpr int64_t kHugeBytes = 8 << 20;

// PyTorch's threads. A region of theirs ends when the last of them has come and gone. Where other processes keep the cores busy, one
// that gets no core holds a small call up for a hundred times as long as it takes. So after a small call that was held up, the next
// ones stay on the caller's thread: more of them each time that the other threads were tried again and held it up again.
class Threads {
 public:
  // For a call that reads so many elements.
  static fpet::Parallel for_call(int64_t elements) {
    fpet::Parallel parallel;
    const bool small = elements <= kSmallElements;
    if (small && alone().load(std::memory_order_relaxed) > 0 && alone().fetch_sub(1, std::memory_order_relaxed) > 0)
      return parallel;
    parallel.threads = torch::stable::get_num_threads();
    parallel.run = small ? run_small : run;
    return parallel;
  }

 private:
  static constexpr int64_t kSmallElements = 1 << 20;
  static constexpr int64_t kLeastAlone = 16, kMostAlone = 1024;  // calls
  static constexpr std::chrono::microseconds kHeldUp{200};       // far above the time that threads with a core take to come
  static std::atomic<int64_t>& alone() {
    static std::atomic<int64_t> calls{0};
    return calls;
  }

  static void run(void*, int64_t count, void (*body)(void*, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(context, task);
    });
  }

  static void run_small(void* pool, int64_t count, void (*body)(void*, int64_t), void* context) {
    using Clock = std::chrono::steady_clock;
    struct Timed {
      void (*body)(void*, int64_t);
      void* context;
      Clock::time_point done;
    } timed{body, context, Clock::now()};
    const Clock::time_point begin = timed.done;
    run(
        pool, count,
        [](void* of, int64_t task) {
          Timed& t = *static_cast<Timed*>(of);
          t.body(t.context, task);
          if (task == 0) t.done = Clock::now();  // the caller's own task
        },
        &timed);
    static std::atomic<int64_t> next{kLeastAlone};
    if (Clock::now() - timed.done < std::max<Clock::duration>(kHeldUp, timed.done - begin)) {
      next.store(kLeastAlone, std::memory_order_relaxed);
      return;
    }
    const int64_t calls = next.load(std::memory_order_relaxed);
    alone().store(calls, std::memory_order_relaxed);
    next.store(std::min(2 * calls, kMostAlone), std::memory_order_relaxed);
  }
};

class CpuKernels {
 public:
  CpuKernels(const Tensor&, const char*) {}

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    Tensor tensor = empty_on(on, sizes, dtype);
    int64_t bytes = dtype == ScalarType::Double || dtype == ScalarType::Long     ? 8
                    : dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? 2
                    : dtype == ScalarType::Byte                                  ? 1
                                                                                 : 4;
    for (const int64_t size : sizes) bytes *= std::max<int64_t>(size, 1);
    if (bytes >= kHugeBytes) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
    return tensor;
  }

  void forward(const fpet::Problem& p, const fpet::ForwardOutputs& out) const {
    const fpet::Parallel threads = Threads::for_call(p.batch * p.tokens * p.dim);
    const Workspace workspace(*this, fpet::cpu_forward_workspace(p, threads.threads));
    fpet::cpu_forward(p, out, threads, workspace.data);
  }

  void backward(const fpet::Problem& p, const fpet::BackwardInputs& in, const fpet::BackwardOutputs& out) const {
    const fpet::Parallel threads = Threads::for_call(p.batch * p.tokens * p.dim);
    const Workspace workspace(*this, fpet::cpu_backward_workspace(p, out, threads.threads));
    fpet::cpu_backward(p, in, out, threads, workspace.data);
  }

  void average_heads(const fpet::Problem& p, void* out) const {
    const fpet::Parallel threads = Threads::for_call(p.batch * p.heads * p.tokens * p.channels);
    const Workspace workspace(*this, fpet::cpu_average_heads_workspace(p, threads.threads));
    fpet::cpu_average_heads(p, out, threads, workspace.data);
  }

  void unmerge(const fpet::UnmergeProblem& p) const { fpet::cpu_unmerge(p, Threads::for_call(elements(p))); }

  void unmerge_backward(const fpet::UnmergeProblem& p) const {
    const fpet::Parallel threads = Threads::for_call(elements(p));
    const Workspace workspace(*this, fpet::cpu_unmerge_backward_workspace(p, threads.threads));
    fpet::cpu_unmerge_backward(p, threads, workspace.data);
  }

  const Device on{0, 0, true};  // DeviceType::CPU

 private:
  // Scratch from PyTorch's allocator, so that its profiler counts it.
  struct Workspace {
    Workspace(const CpuKernels& kernels, size_t bytes) : tensor(kernels.empty({int64_t(bytes) + 64}, ScalarType::Byte)) {
      const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
      data = reinterpret_cast<void*>((address + 63) & ~uintptr_t(63));
    }
    Tensor tensor;
    void* data;
  };

  static int64_t elements(const fpet::UnmergeProblem& p) { return p.batch * (p.prefix + p.num_a + p.num_b) * p.dim; }
};

}  // namespace

namespace {

// As STABLE_TORCH_LIBRARY_FRAGMENT(fpet, m), which ends the process where a schema is there already.
const struct Schemas {
  Schemas() {
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_fragment(FPET_TEXT(FPET_NAMESPACE), __FILE__, __LINE__, &library));
    define(library);
  }
  ~Schemas() { aoti_torch_delete_library_object(library); }
  TorchLibraryHandle library = nullptr;
} schemas;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FPET_NAMESPACE, CPU, m) {
  Operators<CpuKernels>::add_to(m);
  Operators<CpuKernels>::add_recorded_to(m);
}
