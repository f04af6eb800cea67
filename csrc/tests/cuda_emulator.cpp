#include "cuda_emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Options options;
Record record;
Thread* self = nullptr;
dim3 block_size, grid_size;

namespace {

constexpr size_t kStack = 512 << 10, kGuard = 256;

struct Copy {
  void* to;
  const void* from;
  int bytes, from_bytes;
};

#if defined(__x86_64__)
// Saves the registers that a called function must keep on the old stack and takes them from the new one.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

struct Fiber : Thread {
  Context context;
  char* stack = nullptr;
  bool done = false;
  const uint32_t* waits_for = nullptr;  // a generation, and its value on arrival
  uint32_t seen = 0;
  const char* waits_in = nullptr;
  std::vector<std::vector<Copy>> groups;  // the last one is open
};

struct Barrier {
  int arrived = 0, held = 0, result = 0, wanted = 0;
  uint32_t generation = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::vector<Group>> warps;
Barrier barriers[16];
int threads_left = 0, threads_total = 0;
Context scheduler;
const std::function<void()>* body = nullptr;
std::string kernel_name;
char* shared_memory = nullptr;
std::mt19937 rng;

void start(Context* from, Context* to, bool ending) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ending ? nullptr : &from->fake_stack, to->bottom, to->size);
#else
  (void)from, (void)to, (void)ending;
#endif
}
// After arriving in `own`; what was left tells the scheduler's stack when it is first left.
void arrive(Context* own, Context* left) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own->fake_stack, &left->bottom, &left->size);
#else
  (void)own, (void)left;
#endif
}

void switch_to(Context* from, Context* to, bool ending = false) {
  start(from, to, ending);
#if defined(__x86_64__)
  emulator_switch(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
  Context ignored;
  arrive(from, from == &scheduler ? &ignored : &scheduler);
}

Fiber* current() { return static_cast<Fiber*>(self); }

void yield() { switch_to(&current()->context, &scheduler); }

void wait(const uint32_t* generation, uint32_t seen, const char* name) {
  Fiber* fiber = current();
  fiber->waits_for = generation;
  fiber->seen = seen;
  fiber->waits_in = name;
  while (*generation == seen) yield();
  fiber->waits_for = nullptr;
}

void finish(const Copy& copy) {
  std::memcpy(copy.to, copy.from, size_t(copy.from_bytes));
  std::memset((char*)copy.to + copy.from_bytes, 0, size_t(copy.bytes - copy.from_bytes));
}

void release_if_full(Barrier& b) {
  const int wanted = b.wanted ? b.wanted : threads_left;
  if (!b.arrived || b.arrived < wanted) return;
  b.result = b.held;
  b.arrived = b.held = 0;
  ++b.generation;
}

void run_fiber() {
  arrive(&current()->context, &scheduler);
  (*body)();
  Fiber* fiber = current();
  copy_wait(0);
  fiber->done = true;
  --threads_left;
  release_if_full(barriers[0]);  // a thread that has left is not waited for
  switch_to(&fiber->context, &scheduler, true);
  std::abort();
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    fiber.stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);
#endif
  fiber.context.bottom = fiber.stack;
  fiber.context.size = kStack;
  fiber.context.fake_stack = nullptr;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);  // aligned as a call leaves it: 8 below a multiple of 16
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context.stack_pointer = top;
#else
  getcontext(&fiber.context.context);
  fiber.context.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.context.uc_stack.ss_size = kStack;
  fiber.context.context.uc_link = nullptr;
  makecontext(&fiber.context.context, run_fiber, 0);
#endif
  fiber.done = false;
  fiber.waits_for = nullptr;
  fiber.groups.assign(1, {});
}

template <class T>
void arrange(std::vector<T>& order) {
  for (size_t i = 0; i < order.size(); ++i) order[i] = T(i);
  if (options.order == Order::descending) std::reverse(order.begin(), order.end());
  if (options.order == Order::shuffled) std::shuffle(order.begin(), order.end(), rng);
}

void run_block(dim3 index) {
  const unsigned count = block_size.x * block_size.y * block_size.z;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  warps.assign((count + 31) / 32, {});
  for (auto& groups : warps) groups.reserve(32);  // lanes keep pointers into it
  for (Barrier& b : barriers) b = Barrier{};
  threads_left = threads_total = int(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.block_index = index;
    fiber.thread_index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    fiber.linear = int(i);
    fiber.lane = int(i % 32);
    fiber.warp = int(i / 32);
    prepare(fiber);
  }
  // One warp runs for as long as it can before the next one does, so that what a barrier should have held back shows.
  std::vector<unsigned> warp_order((count + 31) / 32), lane_order;
  while (threads_left) {
    arrange(warp_order);
    bool moved = false;
    for (const unsigned w : warp_order) {
      lane_order.resize(std::min(32u, count - 32 * w));
      for (bool again = true; again;) {
        again = false;
        arrange(lane_order);
        for (const unsigned lane : lane_order) {
          Fiber& fiber = *fibers[32 * w + lane];
          if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
          self = &fiber;
          switch_to(&scheduler, &fiber.context);
          moved = again = true;
        }
        if (options.order == Order::shuffled && rng() % 16 == 0) break;
      }
    }
    if (moved) continue;
    std::fprintf(stderr, "%s, block %u: threads wait for each other\n", kernel_name.c_str(), index.x);
    for (unsigned i = 0; i < count; ++i)
      if (!fibers[i]->done && (i % 32 == 0 || fibers[i]->waits_in != fibers[i - 1]->waits_in))
        std::fprintf(stderr, "  from thread %u on: in %s\n", i, fibers[i]->waits_in);
    std::abort();
  }
}

}  // namespace

void fail(const char* format, ...) {
  std::fprintf(stderr, "%s: ", kernel_name.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

char* shared() { return shared_memory; }

void launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> alone(one_at_a_time);
  Dl_info info{};
  kernel_name = dladdr(function, &info) && info.dli_sname ? info.dli_sname : "a kernel";
  if (self) fail("launched from a kernel");
  if (block.x * block.y * block.z > 1024) fail("%u threads in a block", block.x * block.y * block.z);
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) fail("grid of %u × %u × %u", grid.x, grid.y, grid.z);
  if (shared_bytes > size_t(options.shared_per_block)) fail("%zu bytes of shared memory", shared_bytes);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  record.launches.push_back({function, block.x * block.y * block.z, blocks, shared_bytes, {}, {}});
  block_size = block;
  grid_size = grid;
  body = &kernel;
  rng.seed(options.seed);
  const size_t allocated = (shared_bytes + kGuard + 127) / 128 * 128;
  shared_memory = static_cast<char*>(std::aligned_alloc(128, allocated));
  std::vector<uint64_t> order(blocks);
  arrange(order);
  for (const uint64_t i : order) {
    std::memset(shared_memory, 0xff, allocated);  // NaN
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(shared_memory + shared_bytes, allocated - shared_bytes);
#endif
    run_block(dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)));
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(shared_memory + shared_bytes, allocated - shared_bytes);
#endif
    for (size_t at = shared_bytes; at < allocated; ++at)
      if (shared_memory[at] != char(0xff)) fail("wrote %zu bytes behind shared memory", at - shared_bytes);
  }
  std::free(shared_memory);
  self = nullptr;
}

int barrier(int id, int threads, bool predicate) {
  count("barrier");
  Barrier& b = barriers[id];
  if (b.arrived && b.wanted != threads) fail("barrier %d: threads disagree on how many come", id);
  b.wanted = threads;
  ++b.arrived;
  b.held += predicate;
  const uint32_t seen = b.generation;
  release_if_full(b);
  if (b.generation == seen) wait(&b.generation, seen, "a barrier");
  return b.result;
}

void collective(const char* name, unsigned mask, const void* in, void* out, const std::function<void(const Group&)>& compute) {
  const int lane = self->lane;
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its mask %08x", name, lane, mask);
  const int lanes = std::min(32, threads_total - self->warp * 32);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  std::vector<Group>& groups = warps[size_t(self->warp)];
  Group* group = nullptr;
  for (Group& g : groups)
    if (g.mask == mask) group = &g;
  if (!group) {
    if (groups.size() == 32) fail("%s: too many different masks", name);
    groups.emplace_back();
    group = &groups.back();
    group->mask = mask;
  }
  if (group->arrived && std::strcmp(group->name, name)) fail("lanes of a warp meet in %s and in %s", group->name, name);
  group->name = name;
  group->in[lane] = in;
  group->out[lane] = out;
  group->arrived |= 1u << lane;
  const uint32_t seen = group->generation;
  if (group->arrived == mask) {
    compute(*group);
    count(name);
    group->arrived = 0;
    ++group->generation;
    return;
  }
  wait(&group->generation, seen, name);
}

void copy_begin(void* to, const void* from, int bytes, int from_bytes) {
  count("copied bytes", from_bytes);
  const Copy copy{to, from, bytes, from_bytes};
  if (reinterpret_cast<uintptr_t>(to) % size_t(bytes) || (from_bytes && reinterpret_cast<uintptr_t>(from) % size_t(bytes)))
    fail("copy of %d bytes that is not aligned to them", bytes);
  if (options.order == Order::descending || (options.order == Order::shuffled && rng() % 2)) return finish(copy);
  std::memset(to, 0xff, size_t(bytes));
  current()->groups.back().push_back(copy);
}

void copy_commit() { current()->groups.emplace_back(); }

void copy_wait(int newest_left) {
  auto& groups = current()->groups;
  const int closed = int(groups.size()) - 1;  // what has not been committed is not waited for
  const int finished = std::max(0, closed - newest_left);
  for (int g = 0; g < finished; ++g)
    for (const Copy& copy : groups[size_t(g)]) finish(copy);
  groups.erase(groups.begin(), groups.begin() + finished);
}

}  // namespace emulator

cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION((char*)*p + bytes, (bytes + 255) / 256 * 256 - bytes);
#endif
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  if (bytes) std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = emulator::options.device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Options& o = emulator::options;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = o.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = o.shared_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = o.shared_per_multiprocessor; break;
    case cudaDevAttrL2CacheSize: *value = o.l2_bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error ? "error" : "no error"; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  ++emulator::record.attributes_asked;
  *attributes = {};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  emulator::record.shared_allowed[function].push_back(value);
  return value <= emulator::options.shared_per_block ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t emulator_may_launch(const void* function, const cudaLaunchConfig_t& config) {
  const auto found = emulator::record.shared_allowed.find(function);
  const size_t allowed = found == emulator::record.shared_allowed.end() ? 48 << 10 : size_t(found->second.back());
  return config.dynamicSmemBytes <= allowed ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
