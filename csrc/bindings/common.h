// What the bindings of the CPU and of CUDA share: the operators' arguments, checked and turned into plain problems, and their
// outputs. Only torch's stable ABI. It trusts nothing: the operators can be called directly.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "fpet/bdm.h"

// The namespace of the operators. A build for the Hub has one of its own, so that two versions can live in one process.
#ifndef FPET_NAMESPACE
#define FPET_NAMESPACE fpet
#endif
#define FPET_TEXT_OF(name) #name
#define FPET_TEXT(name) FPET_TEXT_OF(name)

namespace fpet::binding {

using torch::headeronly::ScalarType;

// Where a call runs. The memory of other devices can't be read here, so indices in it can't be checked.
struct Device {
  int32_t type, index;
  bool readable;

  bool holds(const Tensor& t) const {
    int32_t other;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &other));
    return other == type && (readable || t.get_device_index() == index);
  }
  std::string tensor() const { return readable ? "CPU tensor" : "tensor on cuda:" + std::to_string(index); }
};

inline DType dtype_of(const Tensor& t, const char* name, bool allow_bool = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Bool: STD_TORCH_CHECK(allow_bool, name, ": expected a floating dtype, got bool"); return DType::boolean;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64"); return DType::f32;
  }
}

inline ScalarType scalar_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return ScalarType::Double;
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

// An uninitialised contiguous tensor, by the shim that skips the boxed dispatcher.
inline Tensor empty_on(const Device& on, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 4> strides{};
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  AtenTensorHandle handle;
  const int32_t code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Double   ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::Long     ? aoti_torch_dtype_int64()
                                                       : aoti_torch_dtype_uint8();
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.data(), code, on.type, on.index, &handle));
  return Tensor(handle);
}

// Checks where t is and that it has these sizes.
inline View view_of(const Device& on, const Tensor& t, const char* name, std::initializer_list<int64_t> sizes,
                    bool allow_bool = false) {
  STD_TORCH_CHECK(on.holds(t), name, ": expected a ", on.tensor());
  const auto got = t.sizes();
  STD_TORCH_CHECK(got.size() == sizes.size(), name, ": expected ", sizes.size(), " dimensions, got ", got.size());
  View view;
  view.data = t.const_data_ptr();
  view.dtype = dtype_of(t, name, allow_bool);
  const auto strides = t.strides();
  size_t d = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(got[d] == size, name, ": expected size ", size, " in dimension ", d, ", got ", got[d]);
    view.stride[d] = strides[d];
    ++d;
  }
  return view;
}

inline View view_of(const Device& on, const OptTensor& t, const char* name, std::initializer_list<int64_t> sizes,
                    bool allow_bool = false) {
  return t ? view_of(on, *t, name, sizes, allow_bool) : View{};
}

struct Split {
  int64_t num_a, num_b;
  const int64_t *a = nullptr, *b = nullptr;
};

// `a` and `b` must be in range, and no position may be in both: kernels write one output row for each. Lists on another
// device are not read here; its kernels stay in bounds by themselves.
inline Split split_of(const Device& on, const Places& places) {
  const auto& [a, b, grid_h, grid_w, prefix] = places;
  STD_TORCH_CHECK(prefix >= 0, "num_prefix_tokens: expected at least 0, got ", prefix);
  if (!a || !b) {
    STD_TORCH_CHECK(!a && !b, "split_a, split_b: expected both or neither");
    STD_TORCH_CHECK(grid_h > 0 && grid_w > 0, "grid_h, grid_w: expected at least 1, got ", grid_h, " and ", grid_w);
    const int64_t n = grid_h * grid_w;
    STD_TORCH_CHECK(n / 2 >= 2, "grid_h, grid_w: fewer than two destinations");
    return {(n + 1) / 2, n / 2};
  }
  for (const Tensor* t : {&*a, &*b})
    STD_TORCH_CHECK(on.holds(*t) && t->dim() == 1 && t->scalar_type() == ScalarType::Long && t->is_contiguous(),
                    "split_a, split_b: expected contiguous 1-D int64 ", on.tensor(), "s");
  const Split split{a->size(0), b->size(0), static_cast<const int64_t*>(a->const_data_ptr()),
                    static_cast<const int64_t*>(b->const_data_ptr())};
  const int64_t n = split.num_a + split.num_b;
  STD_TORCH_CHECK(split.num_b >= 2, "split_b: expected at least two destinations, got ", split.num_b);
  if (!on.readable) return split;
  const std::unique_ptr<bool[]> seen(new bool[size_t(n)]());
  for (const auto& [data, count] : {std::pair(split.a, split.num_a), std::pair(split.b, split.num_b)}) {
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(data[i] >= 0 && data[i] < n && !seen[data[i]], "split_a, split_b: expected every position of range(", n,
                      ") once, got ", data[i]);
      seen[data[i]] = true;
    }
  }
  return split;
}

// (B, N_A) indices in [low, high), which only the CPU's are checked for.
inline const int64_t* indices_of(const Device& on, const Tensor& t, const char* name, int64_t batch, int64_t num_a, int64_t low,
                                 int64_t high) {
  STD_TORCH_CHECK(on.holds(t) && t.dim() == 2 && t.size(0) == batch && t.size(1) == num_a && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Long,
                  name, ": expected a contiguous int64 ", on.tensor(), " of shape (", batch, ", ", num_a, ")");
  const int64_t* data = static_cast<const int64_t*>(t.const_data_ptr());
  if (!on.readable) return data;
  bool inside = true;
  for (int64_t i = 0; i < batch * num_a; ++i) inside &= data[i] >= low && data[i] < high;
  STD_TORCH_CHECK(inside, name, ": index out of range: expected [", low, ", ", high, ")");
  return data;
}

inline Problem problem_of(const Device& on, const Inputs& inputs, const Places& places, const Comparison& comparison) {
  const auto& [x, key, size, w_down, w_up, dropout_mask, key_delta] = inputs;
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (B, N, D), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(key.dim() == 3 || key.dim() == 4, "key: expected (B, N, C) or (B, heads, N, C), got ", key.dim(),
                  " dimensions");
  const Split split = split_of(on, places);
  const int64_t prefix = places.prefix;
  Problem p;
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.dim = x.size(2);
  p.heads = key.dim() == 4 ? key.size(1) : 1;
  p.channels = key.size(key.dim() - 1);
  p.hidden = w_down ? w_down->size(0) : 0;
  p.prefix = prefix;
  p.num_a = split.num_a;
  p.num_b = split.num_b;
  p.grid_h = places.grid_h;
  p.grid_w = places.grid_w;
  p.split_a = split.a;
  p.split_b = split.b;
  p.scale = comparison.scale;
  p.cosine = comparison.cosine;
  STD_TORCH_CHECK(p.tokens == prefix + p.num_a + p.num_b, "x: expected N = ", prefix + p.num_a + p.num_b, ", got ", p.tokens);
  STD_TORCH_CHECK(p.dim > 0 && p.channels > 0 && p.heads > 0, "x, key: expected D, C and heads of at least 1");
  STD_TORCH_CHECK(w_down.has_value() == w_up.has_value(), "w_down, w_up: expected both or neither");
  p.x = view_of(on, x, "x", {p.batch, p.tokens, p.dim});
  if (key.dim() == 4) {
    p.key = view_of(on, key, "key", {p.batch, p.heads, p.tokens, p.channels});
  } else {
    p.key = view_of(on, key, "key", {p.batch, p.tokens, p.channels});
    p.key.stride[3] = p.key.stride[2];
    p.key.stride[2] = p.key.stride[1];
    p.key.stride[1] = 0;
  }
  p.size = view_of(on, size, "size", {p.batch, p.tokens, 1});
  p.w_down = view_of(on, w_down, "w_down", {p.hidden, p.channels});
  p.w_up = view_of(on, w_up, "w_up", {p.channels, p.hidden});
  STD_TORCH_CHECK(!dropout_mask || w_down, "dropout_mask: given without w_down and w_up");
  p.dropout_mask = view_of(on, dropout_mask, "dropout_mask", {p.batch, p.tokens, p.hidden}, true);
  p.key_delta = view_of(on, key_delta, "key_delta", {p.batch, p.tokens, p.channels});
  for (const View* v : {&p.x, &p.key, &p.size, &p.w_down, &p.w_up, &p.key_delta})
    p.wide_scores |= v->data && v->dtype == DType::f64;
  return p;
}

inline UnmergeProblem unmerge_problem(const Device& on, const Tensor& input, const char* name, const Tensor& match,
                                      const Places& places, bool merged_in) {
  STD_TORCH_CHECK(input.dim() == 3, name, ": expected 3 dimensions, got ", input.dim());
  const Split split = split_of(on, places);
  const int64_t prefix = places.prefix;
  UnmergeProblem p;
  p.batch = input.size(0);
  p.dim = input.size(2);
  p.prefix = prefix;
  p.num_a = split.num_a;
  p.num_b = split.num_b;
  p.grid_h = places.grid_h;
  p.grid_w = places.grid_w;
  p.split_a = split.a;
  p.split_b = split.b;
  p.input = view_of(on, input, name, {p.batch, prefix + p.num_b + (merged_in ? 0 : p.num_a), p.dim});
  p.match = indices_of(on, match, "match", p.batch, p.num_a, 0, prefix + p.num_b);
  return p;
}

// A match sliced out of something larger is rare and small: it is copied rather than read in place.
inline Tensor packed(const Tensor& match) { return match.is_contiguous() ? match : torch::stable::contiguous(match); }

// The operators of arguments.h over one backend's kernels. `Kernels` is made from a call's first tensor and its name; it
// has `on`, the Device; empty(sizes, dtype); and forward, backward, average_heads, unmerge and unmerge_backward, which compute.
template <class Kernels>
struct Operators {
  static constexpr int kForward = Inputs::kCount + Places::kCount + Comparison::kCount;
  static constexpr int kBackward = 2 + kForward + Results::kCount + Needs::kCount;

  static void forward(StableIValue* stack, uint64_t count, uint64_t) {
    Stack arguments(stack, count, kForward);
    forward(stack, arguments);
  }

  // With the backend's name, which Python reads: here the tensors' device has chosen.
  static void merge(StableIValue* stack, uint64_t count, uint64_t) {
    Stack arguments(stack, count, kForward + 1);
    Stack backend(stack + kForward, 1, 1);
    STD_TORCH_CHECK(backend.take<std::string>() != "triton", "backend: Triton's kernels need Python");
    forward(stack, arguments);
  }

  static void forward(StableIValue* stack, Stack& arguments) {
    const Inputs inputs(arguments);
    const Places places(arguments);
    const Comparison comparison(arguments);
    const Tensor& x = inputs.x;
    const Kernels kernels(x, "x");
    const Problem p = problem_of(kernels.on, inputs, places, comparison);
    const int64_t merged = p.prefix + p.num_b;
    Tensor tokens = kernels.empty({p.batch, merged, p.dim}, x.scalar_type());
    Tensor merged_size = kernels.empty({p.batch, merged, 1}, p.x.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
    Tensor match = kernels.empty({p.batch, p.num_a}, ScalarType::Long);
    Tensor second = kernels.empty({p.batch, p.num_a}, ScalarType::Long);
    Tensor mid = kernels.empty({p.batch, p.num_a}, p.wide_scores ? ScalarType::Double : ScalarType::Float);
    ForwardOutputs out;
    out.tokens = tokens.mutable_data_ptr();
    out.merged_size = merged_size.mutable_data_ptr();
    out.match = static_cast<int64_t*>(match.mutable_data_ptr());
    out.second = static_cast<int64_t*>(second.mutable_data_ptr());
    out.mid = mid.mutable_data_ptr();
    if (p.batch > 0) kernels.forward(p, out);
    torch::stable::detail::box_from_tuple(stack, std::tuple(tokens, merged_size, match, second, mid));
  }

  static void backward(StableIValue* stack, uint64_t count, uint64_t) {
    Stack arguments(stack, count, kBackward);
    const Tensor grad_tokens = arguments.take<Tensor>();
    const OptTensor grad_size = arguments.take<OptTensor>();
    const Inputs inputs(arguments);
    const Results results(arguments);
    const Places places(arguments);
    const Comparison comparison(arguments);
    const Needs need(arguments);
    const auto& [tokens, merged_size, match, second, mid] = results;
    const auto& [x, key, size, w_down, w_up, dropout_mask, key_delta] = inputs;
    const Kernels kernels(x, "x");
    const Device& on = kernels.on;
    const Problem p = problem_of(on, inputs, places, comparison);
    STD_TORCH_CHECK(!need.weights || w_down, "need_weights: w_down and w_up were not given");
    const int64_t prefix = p.prefix, merged = prefix + p.num_b;
    BackwardInputs in;
    in.grad_tokens = view_of(on, grad_tokens, "grad_tokens", {p.batch, merged, p.dim});
    in.grad_size = view_of(on, grad_size, "grad_size", {p.batch, merged, 1});
    in.tokens = view_of(on, tokens, "tokens", {p.batch, merged, p.dim});
    in.merged_size = view_of(on, merged_size, "merged_size", {p.batch, merged, 1});
    in.match = indices_of(on, match, "match", p.batch, p.num_a, prefix, merged);
    STD_TORCH_CHECK(in.grad_tokens.dtype == p.x.dtype && in.tokens.dtype == p.x.dtype,
                    "grad_tokens, tokens: expected x's dtype");
    if (need.weights || need.refined || need.key) {  // else nobody reads them
      in.second = indices_of(on, second, "second", p.batch, p.num_a, prefix, merged);
      const ScalarType score_dtype = p.wide_scores ? ScalarType::Double : ScalarType::Float;
      STD_TORCH_CHECK(on.holds(mid) && mid.dim() == 2 && mid.size(0) == p.batch && mid.size(1) == p.num_a &&
                          mid.is_contiguous() && mid.scalar_type() == score_dtype,
                      "mid: expected what bdm_forward returned");
      in.mid = mid.const_data_ptr();
    }

    BackwardOutputs out;
    out.size_dtype = size ? p.size.dtype : p.x.dtype;
    out.weight_dtype = w_down ? p.w_down.dtype : p.x.dtype;
    out.refined_dtype = key_delta ? p.key_delta.dtype : p.key.dtype;
    out.key_dtype = p.key.dtype;
    STD_TORCH_CHECK(!need.weights || p.w_up.dtype == p.w_down.dtype, "w_up: expected w_down's dtype");
    const auto gradient = [&](bool wanted, std::initializer_list<int64_t> sizes, DType dtype, void** data) {
      Tensor grad = wanted ? kernels.empty(sizes, scalar_of(dtype)) : kernels.empty({0}, scalar_of(dtype));
      if (wanted) *data = grad.mutable_data_ptr();
      return grad;
    };
    const Tensor grad_x = gradient(need.x, {p.batch, p.tokens, p.dim}, p.x.dtype, &out.x);
    const Tensor grad_in_size = gradient(need.size, {p.batch, p.tokens, 1}, out.size_dtype, &out.size);
    const Tensor grad_down = gradient(need.weights, {p.hidden, p.channels}, out.weight_dtype, &out.w_down);
    const Tensor grad_up = gradient(need.weights, {p.channels, p.hidden}, w_up ? p.w_up.dtype : p.x.dtype, &out.w_up);
    const Tensor grad_refined = gradient(need.refined, {p.batch, p.tokens, p.channels}, out.refined_dtype, &out.refined);
    const Tensor grad_key = gradient(need.key, {p.batch, p.tokens, p.channels}, p.key.dtype, &out.key);
    if (p.batch > 0 || need.weights) kernels.backward(p, in, out);
    torch::stable::detail::box_from_tuple(stack, std::tuple(grad_x, grad_in_size, grad_down, grad_up, grad_refined, grad_key));
  }

  static Tensor average_heads(const Tensor key, bool wide) {
    const Kernels kernels(key, "key");
    STD_TORCH_CHECK(key.dim() == 4, "key: expected (B, heads, N, C), got ", key.dim(), " dimensions");
    Problem p;
    p.batch = key.size(0);
    p.heads = key.size(1);
    p.tokens = key.size(2);
    p.channels = key.size(3);
    p.key = view_of(kernels.on, key, "key", {p.batch, p.heads, p.tokens, p.channels});
    p.wide_scores = wide || p.key.dtype == DType::f64;
    STD_TORCH_CHECK(p.heads > 0, "key: expected at least one head");
    Tensor mean = kernels.empty({p.batch, p.tokens, p.channels}, p.wide_scores ? ScalarType::Double : ScalarType::Float);
    if (p.batch * p.tokens * p.channels > 0) kernels.average_heads(p, mean.mutable_data_ptr());
    return mean;
  }

  static void unmerge(StableIValue* stack, uint64_t count, uint64_t) {
    Stack arguments(stack, count, 2 + Places::kCount);
    const Tensor tokens = arguments.take<Tensor>(), match = packed(arguments.take<Tensor>());
    const Places places(arguments);
    const Kernels kernels(tokens, "tokens");
    UnmergeProblem p = unmerge_problem(kernels.on, tokens, "tokens", match, places, true);
    Tensor output = kernels.empty({p.batch, p.prefix + p.num_a + p.num_b, p.dim}, tokens.scalar_type());
    p.output = output.mutable_data_ptr();
    if (p.batch > 0 && p.dim > 0) kernels.unmerge(p);
    stack[0] = torch::stable::detail::from(output);
  }

  static void unmerge_backward(StableIValue* stack, uint64_t count, uint64_t) {
    Stack arguments(stack, count, 2 + Places::kCount);
    const Tensor grad = arguments.take<Tensor>(), match = packed(arguments.take<Tensor>());
    const Places places(arguments);
    const Kernels kernels(grad, "grad");
    UnmergeProblem p = unmerge_problem(kernels.on, grad, "grad", match, places, false);
    Tensor output = kernels.empty({p.batch, p.prefix + p.num_b, p.dim}, grad.scalar_type());
    p.output = output.mutable_data_ptr();
    if (p.batch > 0 && p.dim > 0) kernels.unmerge_backward(p);
    stack[0] = torch::stable::detail::from(output);
  }

  static void add_to(torch::stable::detail::StableLibrary& m) {
    m.impl("bdm_forward", &forward);
    m.impl("bdm_backward", &backward);
    m.impl("average_heads", TORCH_BOX(&average_heads));
    m.impl("bdm_unmerge", &unmerge);
    m.impl("bdm_unmerge_backward", &unmerge_backward);
  }

  // For programs without Python, where nothing is differentiated.
  static void add_recorded_to(torch::stable::detail::StableLibrary& m) {
    m.impl("merge", &merge);
    m.impl("unmerge", &unmerge);
  }
};

}  // namespace fpet::binding
