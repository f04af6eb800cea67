// Forward and backward of bipartite differentiable matching for one instruction set. docs/mathematics.md has the formulas.
//
// One image is a sequence of phases, each over rows that can be worked on in any order. With enough images every thread takes
// whole images, whose scratch then stays in its cache; with few, every phase is spread over the threads. Both ways do the same
// arithmetic in the same order: rows are independent, and what is summed over rows is summed per fixed chunk, then over chunks.
#include "kernels.h"
#include "vec.h"

#include "ahead.h"
#include "blocks.h"
#include "tasks.h"
#include "scratch.h"
#include "lists.h"
#include "keys.h"
#include "forward.h"
#include "backward.h"
#include "unmerge.h"

namespace fpet {
namespace FPET_ISA {
namespace {
// Calls f with the storage type of x and the type of scores.
template <class F>
auto dispatch(DType x, bool wide, const F& f) {
  switch (x) {
    case DType::f64: return f(double{}, double{});
    case DType::bf16: return wide ? f(bf16{}, double{}) : f(bf16{}, float{});
    case DType::f16: return wide ? f(f16{}, double{}) : f(f16{}, float{});
    default: return wide ? f(float{}, double{}) : f(float{}, float{});
  }
}

size_t forward_workspace(const Problem& p, int64_t threads) {
  return dispatch(p.x.dtype, p.wide_scores,
                  [&](auto s, auto t) { return Forward<decltype(s), decltype(t)>(p, threads).plan(nullptr); });
}

size_t backward_workspace(const Problem& p, const BackwardOutputs& out, int64_t threads) {
  return dispatch(p.x.dtype, p.wide_scores,
                  [&](auto s, auto t) { return Backward<decltype(s), decltype(t)>(p, out, threads).plan(nullptr); });
}

void forward(const Problem& p, const ForwardOutputs& out, const Parallel& parallel, void* workspace) {
  dispatch(p.x.dtype, p.wide_scores, [&](auto s, auto t) {
    Forward<decltype(s), decltype(t)>(p, parallel.threads).run(out, parallel, (char*)workspace);
  });
}

void backward(const Problem& p, const BackwardInputs& in, const BackwardOutputs& out, const Parallel& parallel,
              void* workspace) {
  dispatch(p.x.dtype, p.wide_scores, [&](auto s, auto t) {
    Backward<decltype(s), decltype(t)>(p, out, parallel.threads).run(in, parallel, (char*)workspace);
  });
}

void unmerge_any(const UnmergeProblem& p, const Parallel& parallel) {
  dispatch(p.input.dtype, false, [&](auto s, auto) { unmerge<decltype(s)>(p, parallel); });
}

size_t unmerge_backward_workspace(const UnmergeProblem& p, int64_t threads) {
  return dispatch(p.input.dtype, false, [&](auto s, auto) { return UnmergeBackward<decltype(s)>(p, threads).plan(nullptr); });
}

void unmerge_backward(const UnmergeProblem& p, const Parallel& parallel, void* workspace) {
  dispatch(p.input.dtype, false,
           [&](auto s, auto) { UnmergeBackward<decltype(s)>(p, parallel.threads).run(parallel, (char*)workspace); });
}

}  // namespace

// The only symbol of an instruction set that others see.
extern const Kernels kKernels;
const Kernels kKernels = {
    forward_workspace, backward_workspace,         forward,          backward, average_heads_workspace, average_heads,
    unmerge_any,       unmerge_backward_workspace, unmerge_backward,
};

}  // namespace FPET_ISA
}  // namespace fpet
