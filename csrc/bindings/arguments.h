// The operators' arguments: their schemas, and the same lists as structs, read off the dispatcher's stack. fpet_kernels/ops.py has
// them for Python, and defines the schemas where no library did; a test compares the two.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <optional>
#include <string>

// From torch 2.12 on; null before.
extern "C" __attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
extern "C" __attribute__((weak)) AOTITorchError torch_library_def_with_tags(TorchLibraryHandle, const char*, const int32_t*,
                                                                            int32_t);

namespace fpet::binding {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// The arguments of one call, in order.
class Stack {
 public:
  Stack(const StableIValue* values, uint64_t count, uint64_t expected) : next_(values) {
    STD_TORCH_CHECK(count == expected, "the schema in use has ", count, " arguments, and this library is built for ", expected);
  }
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  const StableIValue* next_;
};

#define FPET_INPUTS "Tensor x, Tensor key, Tensor? size, Tensor? w_down, Tensor? w_up, Tensor? dropout_mask, Tensor? key_delta"
struct Inputs {
  Tensor x, key;
  OptTensor size, w_down, w_up, dropout_mask, key_delta;

  explicit Inputs(Stack& s)
      : x(s.take<Tensor>()),
        key(s.take<Tensor>()),
        size(s.take<OptTensor>()),
        w_down(s.take<OptTensor>()),
        w_up(s.take<OptTensor>()),
        dropout_mask(s.take<OptTensor>()),
        key_delta(s.take<OptTensor>()) {}
  static constexpr int kCount = 7;
};

#define FPET_PLACES "Tensor? split_a, Tensor? split_b, SymInt grid_h, SymInt grid_w, int num_prefix_tokens"
struct Places {
  OptTensor split_a, split_b;
  int64_t grid_h, grid_w, prefix;

  explicit Places(Stack& s)
      : split_a(s.take<OptTensor>()),
        split_b(s.take<OptTensor>()),
        grid_h(s.take<int64_t>()),
        grid_w(s.take<int64_t>()),
        prefix(s.take<int64_t>()) {}
  static constexpr int kCount = 5;
};

#define FPET_COMPARISON "float scale, bool cosine"
struct Comparison {
  double scale;
  bool cosine;

  explicit Comparison(Stack& s) : scale(s.take<double>()), cosine(s.take<bool>()) {}
  static constexpr int kCount = 2;
};

#define FPET_RESULTS "Tensor tokens, Tensor merged_size, Tensor match, Tensor second, Tensor mid"
struct Results {
  Tensor tokens, merged_size, match, second, mid;

  explicit Results(Stack& s)
      : tokens(s.take<Tensor>()),
        merged_size(s.take<Tensor>()),
        match(s.take<Tensor>()),
        second(s.take<Tensor>()),
        mid(s.take<Tensor>()) {}
  static constexpr int kCount = 5;
};

#define FPET_NEEDS "bool need_x, bool need_size, bool need_weights, bool need_refined, bool need_key"
struct Needs {
  bool x, size, weights, refined, key;

  explicit Needs(Stack& s)
      : x(s.take<bool>()), size(s.take<bool>()), weights(s.take<bool>()), refined(s.take<bool>()), key(s.take<bool>()) {}
  static constexpr int kCount = 5;
};

#define FPET_FORWARD FPET_INPUTS ", " FPET_PROBLEM
#define FPET_GRADIENT_OF_OUTPUTS "Tensor grad_tokens, Tensor? grad_size"
#define FPET_PROBLEM FPET_PLACES ", " FPET_COMPARISON
#define FPET_BACKWARD FPET_GRADIENT_OF_OUTPUTS ", " FPET_INPUTS ", " FPET_RESULTS ", " FPET_PROBLEM ", " FPET_NEEDS
#define FPET_GRADIENTS \
  "(Tensor grad_x, Tensor grad_in_size, Tensor grad_w_down, Tensor grad_w_up, Tensor grad_refined, Tensor grad_key)"

inline void define(TorchLibraryHandle library) {
  for (const char* schema : {
           "bdm_forward(" FPET_FORWARD ") -> (" FPET_RESULTS ")",
           "bdm_backward(" FPET_BACKWARD ") -> " FPET_GRADIENTS,
           "average_heads(Tensor key, bool wide) -> Tensor",
           "bdm_unmerge(Tensor tokens, Tensor match, " FPET_PLACES ") -> Tensor",
           "bdm_unmerge_backward(Tensor grad, Tensor match, " FPET_PLACES ") -> Tensor",
           "merge(" FPET_FORWARD ", str backend) -> (" FPET_RESULTS ")",
           "merge_backward(" FPET_BACKWARD ", str backend) -> " FPET_GRADIENTS,
           "unmerge(Tensor tokens, Tensor match, " FPET_PLACES ") -> Tensor",
           "unmerge_backward(Tensor grad, Tensor match, " FPET_PLACES ") -> Tensor",
       }) {
    // An error means that another copy of this library, or Python without one, was first; PyTorch has said so on stderr.
    if (torch_library_def_with_tags && torch_tag_pt2_compliant_tag) {
      const int32_t tag = torch_tag_pt2_compliant_tag();
      (void)torch_library_def_with_tags(library, schema, &tag, 1);
    } else {
      (void)aoti_torch_library_def(library, schema);
    }
  }
}

}  // namespace fpet::binding
