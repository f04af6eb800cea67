// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fpet {

#define FPET_DECLARE(isa)        \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
#if defined(__x86_64__)
FPET_DECLARE(avx512bf16)
FPET_DECLARE(avx512)
FPET_DECLARE(avx2)
#endif
FPET_DECLARE(baseline)
#undef FPET_DECLARE

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512bf16", &avx512bf16::kKernels, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }},
    {"avx512", &avx512::kKernels, has_avx512},
    {"avx2", &avx2::kKernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::kKernels, [] { return true; }},
};

const Isa& choose() {
  const char* wanted = std::getenv("FPET_CPU_ISA");
  std::string here;  // all that run on this machine
  bool known = false;
  for (const Isa& isa : kIsas) {
    const bool is_wanted = wanted && std::strcmp(wanted, isa.name) == 0, runs = isa.runs_here();
    if (runs && (is_wanted || !wanted || !*wanted)) return isa;
    known |= is_wanted;
    if (runs) here += (here.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::runtime_error("FPET_CPU_ISA: expected one of " + here + ", or nothing; got " + wanted +
                           (known ? ", which this machine does not have" : ""));
}

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace

const char* cpu_isa() { return isa().name; }

const char* cpu_isas_compiled() {
#if defined(__x86_64__)
  return "avx512bf16 avx512 avx2 baseline";
#else
  return "baseline";
#endif
}

size_t cpu_forward_workspace(const Problem& p, int64_t threads) { return isa().kernels->forward_workspace(p, threads); }
size_t cpu_backward_workspace(const Problem& p, const BackwardOutputs& out, int64_t threads) {
  return isa().kernels->backward_workspace(p, out, threads);
}
void cpu_forward(const Problem& p, const ForwardOutputs& out, const Parallel& parallel, void* workspace) {
  isa().kernels->forward(p, out, parallel, workspace);
}
void cpu_backward(const Problem& p, const BackwardInputs& in, const BackwardOutputs& out, const Parallel& parallel,
                  void* workspace) {
  isa().kernels->backward(p, in, out, parallel, workspace);
}
size_t cpu_average_heads_workspace(const Problem& p, int64_t threads) {
  return isa().kernels->average_heads_workspace(p, threads);
}
void cpu_average_heads(const Problem& p, void* out, const Parallel& parallel, void* workspace) {
  isa().kernels->average_heads(p, out, parallel, workspace);
}
void cpu_unmerge(const UnmergeProblem& p, const Parallel& parallel) { isa().kernels->unmerge(p, parallel); }
size_t cpu_unmerge_backward_workspace(const UnmergeProblem& p, int64_t threads) {
  return isa().kernels->unmerge_backward_workspace(p, threads);
}
void cpu_unmerge_backward(const UnmergeProblem& p, const Parallel& parallel, void* workspace) {
  isa().kernels->unmerge_backward(p, parallel, workspace);
}

}  // namespace fpet
