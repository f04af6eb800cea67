// The table of kernels that every instruction set fills.
#pragma once

#include "fpet/bdm.h"

namespace fpet {

struct Kernels {
  size_t (*forward_workspace)(const Problem&, int64_t);
  size_t (*backward_workspace)(const Problem&, const BackwardOutputs&, int64_t);
  void (*forward)(const Problem&, const ForwardOutputs&, const Parallel&, void*);
  void (*backward)(const Problem&, const BackwardInputs&, const BackwardOutputs&, const Parallel&, void*);
  size_t (*average_heads_workspace)(const Problem&, int64_t);
  void (*average_heads)(const Problem&, void*, const Parallel&, void*);
  void (*unmerge)(const UnmergeProblem&, const Parallel&);
  size_t (*unmerge_backward_workspace)(const UnmergeProblem&, int64_t);
  void (*unmerge_backward)(const UnmergeProblem&, const Parallel&, void*);
};

}  // namespace fpet
