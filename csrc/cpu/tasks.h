// Work spread over threads that come from outside.
#include <sched.h>

namespace fpet {
namespace FPET_ISA {
namespace {

constexpr int64_t kSerialWork = 1 << 16;  // multiply-adds below which a second thread costs more than it saves
constexpr int64_t kRuns = 4;              // per thread, of images one after another: who is held up takes fewer

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void run_tasks(const Parallel& parallel, int64_t count, const F& f) {
  if (count <= 0) return;
  if (count == 1 || parallel.threads <= 1 || !parallel.run) {
    for (int64_t t = 0; t < count; ++t) f(t);
    return;
  }
  parallel.run(parallel.pool, count, [](void* context, int64_t task) { (*(const F*)context)(task); }, (void*)&f);
}

// Splits [0, n) into `parts` ranges and calls f(part, begin, end).
template <class F>
void run_ranges(const Parallel& parallel, int64_t n, int64_t parts, const F& f) {
  parts = max64(1, min64(parts, n));
  run_tasks(parallel, parts, [&](int64_t p) { f(p, n * p / parts, n * (p + 1) / parts); });
}

struct alignas(64) Progress {
  int64_t next = 0, done = 0;  // items taken, items done
};

// Phases one after another within one parallel region: f(phase, task, item) for every item of a phase, in any order, on `tasks`
// threads; then(phase) once all of them are done; and only then the next phase. A thread takes the next item that nobody has, so
// none waits for one that begins late or gets no core, except for the item that this one has in hand.
template <int Count, class F, class Then>
void run_phases(const Parallel& parallel, int64_t tasks, const int64_t (&items)[Count], const F& f, const Then& then) {
  Progress progress[Count];
  run_tasks(parallel, tasks, [&](int64_t task) {
    for (int phase = 0; phase < Count; ++phase) {
      Progress& now = progress[phase];
      const int64_t count = items[phase];
      for (int64_t item; (item = __atomic_fetch_add(&now.next, 1, __ATOMIC_RELAXED)) < count;) {
        f(phase, task, item);
        if (__atomic_add_fetch(&now.done, 1, __ATOMIC_ACQ_REL) < count) continue;
        then(phase);
        __atomic_store_n(&now.done, count + 1, __ATOMIC_RELEASE);
      }
      if (phase + 1 == Count || count == 0) continue;
      for (int spins = 0; __atomic_load_n(&now.done, __ATOMIC_ACQUIRE) <= count; ++spins)
        if (spins < 1000) {
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
        } else {
          sched_yield();
        }
    }
  });
}

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
