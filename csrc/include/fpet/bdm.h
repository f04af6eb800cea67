// Bipartite differentiable matching: plain-old-data problem descriptions and launch declarations. No torch header.
//
// Symbols, here and in the kernels: B images of N tokens (`prefix` tokens first, then the patches), D features, C key
// channels, h hidden units of the refinement; N_A sources are merged into N_B destinations, M = prefix + N_B remain.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fpet {

enum class DType : int32_t { f32, f64, bf16, f16, boolean };

// A strided tensor that is read; strides in elements. `data` is null where the argument is absent.
struct View {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
};

struct Problem {
  int64_t batch = 0, tokens = 0, dim = 0, channels = 0, heads = 1, hidden = 0, prefix = 0, num_a = 0, num_b = 0;
  int64_t grid_h = 0, grid_w = 0;  // the checkerboard, where split_b is null
  const int64_t* split_a = nullptr;
  const int64_t* split_b = nullptr;
  double scale = 1.0;
  bool cosine = true;
  bool wide_scores = false;  // scores in float64: some input is float64
  View x;                    // (B, N, D)
  View key;                  // (B, heads, N, C)
  View size;                 // (B, N)
  View w_down, w_up;         // (h, C), (C, h)
  View dropout_mask;         // (B, N, h)
  View key_delta;            // (B, N, C)
};

// All outputs are contiguous.
struct ForwardOutputs {
  void* tokens = nullptr;       // (B, M, D) in x's dtype
  void* merged_size = nullptr;  // (B, M) float64 for float64 x, else float32
  int64_t* match = nullptr;     // (B, N_A) index into the merged tokens
  int64_t* second = nullptr;    // (B, N_A) the second best, likewise
  void* mid = nullptr;          // (B, N_A) mean of the two best scores; float64 if wide_scores, else float32
};

struct BackwardInputs {
  View grad_tokens;  // (B, M, D) in x's dtype
  View grad_size;    // (B, M), or absent
  View tokens;       // (B, M, D)
  View merged_size;  // (B, M)
  const int64_t* match = nullptr;
  const int64_t* second = nullptr;
  const void* mid = nullptr;
};

// Contiguous; null where a gradient is not asked for. The two weight gradients come together or not at all.
struct BackwardOutputs {
  void* x = nullptr;  // (B, N, D) in x's dtype
  void* size = nullptr;
  DType size_dtype = DType::f32;  // (B, N)
  void* w_down = nullptr;
  void* w_up = nullptr;
  DType weight_dtype = DType::f32;  // (h, C), (C, h)
  void* refined = nullptr;
  DType refined_dtype = DType::f32;  // (B, N, C): gradient at k'
  void* key = nullptr;
  DType key_dtype = DType::f32;  // (B, N, C): gradient of every head's key
};

// Unmerge: (B, M, D) <-> (B, N, D), both in `dtype`.
struct UnmergeProblem {
  int64_t batch = 0, dim = 0, prefix = 0, num_a = 0, num_b = 0, grid_h = 0, grid_w = 0;
  const int64_t* split_a = nullptr;
  const int64_t* split_b = nullptr;
  const int64_t* match = nullptr;  // (B, N_A)
  View input;                      // merged tokens, or the gradient of all tokens
  void* output = nullptr;
};

// Threads come from outside: run(pool, count, body, context) calls body(context, task) for every task in [0, count), in
// any order, on any threads, and returns when all are done. Results never depend on how many there are.
struct Parallel {
  int64_t threads = 1;
  void* pool = nullptr;
  void (*run)(void* pool, int64_t count, void (*body)(void*, int64_t), void* context) = nullptr;
};

// Bytes of scratch memory, aligned to 64, that a call needs. Linear in N.
size_t cpu_forward_workspace(const Problem&, int64_t threads);
size_t cpu_backward_workspace(const Problem&, const BackwardOutputs&, int64_t threads);

void cpu_forward(const Problem&, const ForwardOutputs&, const Parallel&, void* workspace);
void cpu_backward(const Problem&, const BackwardInputs&, const BackwardOutputs&, const Parallel&, void* workspace);
// Means over the heads of problem.key, (B, N, C) contiguous, float64 if wide_scores, else float32. Needs the fields batch,
// tokens, channels, heads, wide_scores and key.
size_t cpu_average_heads_workspace(const Problem&, int64_t threads);
void cpu_average_heads(const Problem&, void* out, const Parallel&, void* workspace);
void cpu_unmerge(const UnmergeProblem&, const Parallel&);
size_t cpu_unmerge_backward_workspace(const UnmergeProblem&, int64_t threads);
void cpu_unmerge_backward(const UnmergeProblem&, const Parallel&, void* workspace);

// The instruction set in use ("avx512bf16", "avx512", "avx2", "baseline"); FPET_CPU_ISA in the environment chooses a lesser one.
// Any other name there makes this function and all above throw std::runtime_error.
const char* cpu_isa();
// All that were compiled in, best first, separated by spaces.
const char* cpu_isas_compiled();

}  // namespace fpet
