// CPU kernels of the operators that fpet_kernels/ops.py declares. The only file that sees torch, and only its stable ABI:
// one binary serves every torch from 2.10 on. It trusts nothing: the operators can be called directly.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>

#include "fpet/bdm.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int32_t kCpu = 0;  // DeviceType::CPU

fpet::DType dtype_of(const Tensor& t, const char* name, bool allow_bool = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return fpet::DType::f32;
    case ScalarType::Double: return fpet::DType::f64;
    case ScalarType::BFloat16: return fpet::DType::bf16;
    case ScalarType::Half: return fpet::DType::f16;
    case ScalarType::Bool:
      STD_TORCH_CHECK(allow_bool, name, ": expected a floating dtype, got bool");
      return fpet::DType::boolean;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64"); return fpet::DType::f32;
  }
}

ScalarType scalar_of(fpet::DType dtype) {
  switch (dtype) {
    case fpet::DType::f64: return ScalarType::Double;
    case fpet::DType::bf16: return ScalarType::BFloat16;
    case fpet::DType::f16: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

// Checks that t is a CPU tensor of these sizes.
fpet::View view_of(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, bool allow_bool = false) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  const auto got = t.sizes();
  STD_TORCH_CHECK(got.size() == sizes.size(), name, ": expected ", sizes.size(), " dimensions, got ", got.size());
  fpet::View view;
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

fpet::View view_of(const OptTensor& t, const char* name, std::initializer_list<int64_t> sizes, bool allow_bool = false) {
  return t ? view_of(*t, name, sizes, allow_bool) : fpet::View{};
}

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

// An uninitialised contiguous CPU tensor, by the shim that skips the boxed dispatcher.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
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
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.data(), code, kCpu, 0, &handle));
  Tensor tensor(handle);
  const int64_t bytes = step * (dtype == ScalarType::Double || dtype == ScalarType::Long     ? 8
                                : dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? 2
                                : dtype == ScalarType::Byte                                  ? 1
                                                                                             : 4);
  if (bytes >= kHugeBytes) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

// Scratch from PyTorch's allocator, so that its profiler counts it.
struct Workspace {
  explicit Workspace(size_t bytes) : tensor(empty({int64_t(bytes) + 64}, ScalarType::Byte)) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    data = reinterpret_cast<void*>((address + 63) & ~uintptr_t(63));
  }
  Tensor tensor;
  void* data;
};

fpet::Parallel torch_threads() {
  fpet::Parallel parallel;
  parallel.threads = torch::stable::get_num_threads();
  parallel.run = [](void*, int64_t count, void (*body)(void*, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(context, task);
    });
  };
  return parallel;
}

struct Split {
  int64_t num_a, num_b;
  const int64_t *a = nullptr, *b = nullptr;
};

// `a` and `b` must be in range, and no position may be in both: kernels write one output row for each.
Split split_of(const OptTensor& a, const OptTensor& b, int64_t grid_h, int64_t grid_w) {
  if (!a || !b) {
    STD_TORCH_CHECK(!a && !b, "split_a, split_b: expected both or neither");
    STD_TORCH_CHECK(grid_h > 0 && grid_w > 0, "grid_h, grid_w: expected at least 1, got ", grid_h, " and ", grid_w);
    const int64_t n = grid_h * grid_w;
    STD_TORCH_CHECK(n / 2 >= 2, "grid_h, grid_w: fewer than two destinations");
    return {(n + 1) / 2, n / 2};
  }
  Split split{a->size(0), b->size(0)};
  const int64_t n = split.num_a + split.num_b;
  STD_TORCH_CHECK(split.num_b >= 2, "split_b: expected at least two destinations, got ", split.num_b);
  const std::unique_ptr<bool[]> seen(new bool[size_t(n)]());
  for (const Tensor* t : {&*a, &*b}) {
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->scalar_type() == ScalarType::Long && t->is_contiguous(),
                    "split_a, split_b: expected contiguous 1-D int64 CPU tensors");
    const int64_t* data = static_cast<const int64_t*>(t->const_data_ptr());
    for (int64_t i = 0; i < t->size(0); ++i) {
      STD_TORCH_CHECK(data[i] >= 0 && data[i] < n && !seen[data[i]], "split_a, split_b: expected every position of range(", n,
                      ") once, got ", data[i]);
      seen[data[i]] = true;
    }
    (t == &*a ? split.a : split.b) = data;
  }
  return split;
}

// (B, N_A) indices in [low, high).
const int64_t* indices_of(const Tensor& t, const char* name, int64_t batch, int64_t num_a, int64_t low, int64_t high) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == batch && t.size(1) == num_a && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Long,
                  name, ": expected a contiguous int64 CPU tensor of shape (", batch, ", ", num_a, ")");
  const int64_t* data = static_cast<const int64_t*>(t.const_data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < batch * num_a; ++i) inside &= data[i] >= low && data[i] < high;
  STD_TORCH_CHECK(inside, name, ": index out of range: expected [", low, ", ", high, ")");
  return data;
}

fpet::Problem problem_of(const Tensor& x, const Tensor& key, const OptTensor& size, const OptTensor& w_down,
                         const OptTensor& w_up, const OptTensor& dropout_mask, const OptTensor& key_delta,
                         const OptTensor& split_a, const OptTensor& split_b, int64_t grid_h, int64_t grid_w, int64_t prefix,
                         double scale, bool cosine) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (B, N, D), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(key.dim() == 3 || key.dim() == 4, "key: expected (B, N, C) or (B, heads, N, C), got ", key.dim(),
                  " dimensions");
  STD_TORCH_CHECK(prefix >= 0, "num_prefix_tokens: expected at least 0, got ", prefix);
  const Split split = split_of(split_a, split_b, grid_h, grid_w);
  fpet::Problem p;
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.dim = x.size(2);
  p.heads = key.dim() == 4 ? key.size(1) : 1;
  p.channels = key.size(key.dim() - 1);
  p.hidden = w_down ? w_down->size(0) : 0;
  p.prefix = prefix;
  p.num_a = split.num_a;
  p.num_b = split.num_b;
  p.grid_h = grid_h;
  p.grid_w = grid_w;
  p.split_a = split.a;
  p.split_b = split.b;
  p.scale = scale;
  p.cosine = cosine;
  STD_TORCH_CHECK(p.tokens == prefix + p.num_a + p.num_b, "x: expected N = ", prefix + p.num_a + p.num_b, ", got ", p.tokens);
  STD_TORCH_CHECK(p.dim > 0 && p.channels > 0 && p.heads > 0, "x, key: expected D, C and heads of at least 1");
  STD_TORCH_CHECK(w_down.has_value() == w_up.has_value(), "w_down, w_up: expected both or neither");
  p.x = view_of(x, "x", {p.batch, p.tokens, p.dim});
  if (key.dim() == 4) {
    p.key = view_of(key, "key", {p.batch, p.heads, p.tokens, p.channels});
  } else {
    p.key = view_of(key, "key", {p.batch, p.tokens, p.channels});
    p.key.stride[3] = p.key.stride[2];
    p.key.stride[2] = p.key.stride[1];
    p.key.stride[1] = 0;
  }
  p.size = view_of(size, "size", {p.batch, p.tokens, 1});
  p.w_down = view_of(w_down, "w_down", {p.hidden, p.channels});
  p.w_up = view_of(w_up, "w_up", {p.channels, p.hidden});
  STD_TORCH_CHECK(!dropout_mask || w_down, "dropout_mask: given without w_down and w_up");
  p.dropout_mask = view_of(dropout_mask, "dropout_mask", {p.batch, p.tokens, p.hidden}, true);
  p.key_delta = view_of(key_delta, "key_delta", {p.batch, p.tokens, p.channels});
  for (const fpet::View* v : {&p.x, &p.key, &p.size, &p.w_down, &p.w_up, &p.key_delta})
    p.wide_scores |= v->data && v->dtype == fpet::DType::f64;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor x, const Tensor key, const OptTensor size,
                                                           const OptTensor w_down, const OptTensor w_up,
                                                           const OptTensor dropout_mask, const OptTensor key_delta,
                                                           const OptTensor split_a, const OptTensor split_b, int64_t grid_h,
                                                           int64_t grid_w, int64_t prefix, double scale, bool cosine) {
  const fpet::Problem p =
      problem_of(x, key, size, w_down, w_up, dropout_mask, key_delta, split_a, split_b, grid_h, grid_w, prefix, scale, cosine);
  const int64_t merged = prefix + p.num_b;
  Tensor tokens = empty({p.batch, merged, p.dim}, x.scalar_type());
  Tensor merged_size = empty({p.batch, merged, 1}, p.x.dtype == fpet::DType::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor match = empty({p.batch, p.num_a}, ScalarType::Long);
  Tensor second = empty({p.batch, p.num_a}, ScalarType::Long);
  Tensor mid = empty({p.batch, p.num_a}, p.wide_scores ? ScalarType::Double : ScalarType::Float);
  fpet::ForwardOutputs out;
  out.tokens = tokens.mutable_data_ptr();
  out.merged_size = merged_size.mutable_data_ptr();
  out.match = static_cast<int64_t*>(match.mutable_data_ptr());
  out.second = static_cast<int64_t*>(second.mutable_data_ptr());
  out.mid = mid.mutable_data_ptr();
  if (p.batch > 0) {
    const fpet::Parallel parallel = torch_threads();
    const Workspace workspace(fpet::cpu_forward_workspace(p, parallel.threads));
    fpet::cpu_forward(p, out, parallel, workspace.data);
  }
  return {tokens, merged_size, match, second, mid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor grad_tokens, const OptTensor grad_size, const Tensor x, const Tensor key, const OptTensor size,
    const OptTensor w_down, const OptTensor w_up, const OptTensor dropout_mask, const OptTensor key_delta, const Tensor tokens,
    const Tensor merged_size, const Tensor match, const Tensor second, const Tensor mid, const OptTensor split_a,
    const OptTensor split_b, int64_t grid_h, int64_t grid_w, int64_t prefix, double scale, bool cosine, bool need_x,
    bool need_size, bool need_weights, bool need_refined, bool need_key) {
  const fpet::Problem p =
      problem_of(x, key, size, w_down, w_up, dropout_mask, key_delta, split_a, split_b, grid_h, grid_w, prefix, scale, cosine);
  STD_TORCH_CHECK(!need_weights || w_down, "need_weights: w_down and w_up were not given");
  const int64_t merged = prefix + p.num_b;
  fpet::BackwardInputs in;
  in.grad_tokens = view_of(grad_tokens, "grad_tokens", {p.batch, merged, p.dim});
  in.grad_size = view_of(grad_size, "grad_size", {p.batch, merged, 1});
  in.tokens = view_of(tokens, "tokens", {p.batch, merged, p.dim});
  in.merged_size = view_of(merged_size, "merged_size", {p.batch, merged, 1});
  in.match = indices_of(match, "match", p.batch, p.num_a, prefix, merged);
  in.second = indices_of(second, "second", p.batch, p.num_a, prefix, merged);
  STD_TORCH_CHECK(in.grad_tokens.dtype == p.x.dtype && in.tokens.dtype == p.x.dtype, "grad_tokens, tokens: expected x's dtype");
  const ScalarType score_dtype = p.wide_scores ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(mid.is_cpu() && mid.dim() == 2 && mid.size(0) == p.batch && mid.size(1) == p.num_a && mid.is_contiguous() &&
                      mid.scalar_type() == score_dtype,
                  "mid: expected what bdm_forward returned");
  in.mid = mid.const_data_ptr();

  fpet::BackwardOutputs out;
  const auto size_dtype = size ? p.size.dtype : p.x.dtype;
  const auto weight_dtype = w_down ? p.w_down.dtype : p.x.dtype;
  const auto refined_dtype = key_delta ? p.key_delta.dtype : p.key.dtype;
  const Tensor grad_x = need_x ? empty({p.batch, p.tokens, p.dim}, x.scalar_type()) : empty({0}, x.scalar_type());
  const Tensor grad_in_size =
      need_size ? empty({p.batch, p.tokens, 1}, scalar_of(size_dtype)) : empty({0}, scalar_of(size_dtype));
  const Tensor grad_down =
      need_weights ? empty({p.hidden, p.channels}, scalar_of(weight_dtype)) : empty({0}, scalar_of(weight_dtype));
  const auto up_dtype = w_up ? scalar_of(p.w_up.dtype) : x.scalar_type();
  STD_TORCH_CHECK(!need_weights || p.w_up.dtype == p.w_down.dtype, "w_up: expected w_down's dtype");
  const Tensor grad_up = need_weights ? empty({p.channels, p.hidden}, up_dtype) : empty({0}, up_dtype);
  const Tensor grad_refined =
      need_refined ? empty({p.batch, p.tokens, p.channels}, scalar_of(refined_dtype)) : empty({0}, scalar_of(refined_dtype));
  const Tensor grad_key = need_key ? empty({p.batch, p.tokens, p.channels}, key.scalar_type()) : empty({0}, key.scalar_type());
  if (need_x) out.x = grad_x.mutable_data_ptr();
  if (need_size) out.size = grad_in_size.mutable_data_ptr();
  if (need_weights) {
    out.w_down = grad_down.mutable_data_ptr();
    out.w_up = grad_up.mutable_data_ptr();
  }
  if (need_refined) out.refined = grad_refined.mutable_data_ptr();
  if (need_key) out.key = grad_key.mutable_data_ptr();
  out.size_dtype = size_dtype;
  out.weight_dtype = weight_dtype;
  out.refined_dtype = refined_dtype;
  out.key_dtype = p.key.dtype;
  if (p.batch > 0 || need_weights) {
    const fpet::Parallel parallel = torch_threads();
    const Workspace workspace(fpet::cpu_backward_workspace(p, out, parallel.threads));
    fpet::cpu_backward(p, in, out, parallel, workspace.data);
  }
  return {grad_x, grad_in_size, grad_down, grad_up, grad_refined, grad_key};
}

Tensor average_heads(const Tensor key, bool wide) {
  STD_TORCH_CHECK(key.dim() == 4, "key: expected (B, heads, N, C), got ", key.dim(), " dimensions");
  fpet::Problem p;
  p.batch = key.size(0);
  p.heads = key.size(1);
  p.tokens = key.size(2);
  p.channels = key.size(3);
  p.key = view_of(key, "key", {p.batch, p.heads, p.tokens, p.channels});
  p.wide_scores = wide || p.key.dtype == fpet::DType::f64;
  STD_TORCH_CHECK(p.heads > 0, "key: expected at least one head");
  Tensor mean = empty({p.batch, p.tokens, p.channels}, p.wide_scores ? ScalarType::Double : ScalarType::Float);
  if (p.batch * p.tokens * p.channels > 0) {
    const fpet::Parallel parallel = torch_threads();
    const Workspace workspace(fpet::cpu_average_heads_workspace(p, parallel.threads));
    fpet::cpu_average_heads(p, mean.mutable_data_ptr(), parallel, workspace.data);
  }
  return mean;
}

fpet::UnmergeProblem unmerge_problem(const Tensor& input, const char* name, const Tensor& match, const OptTensor& split_a,
                                     const OptTensor& split_b, int64_t grid_h, int64_t grid_w, int64_t prefix, bool merged_in) {
  STD_TORCH_CHECK(input.dim() == 3, name, ": expected 3 dimensions, got ", input.dim());
  STD_TORCH_CHECK(prefix >= 0, "num_prefix_tokens: expected at least 0, got ", prefix);
  const Split split = split_of(split_a, split_b, grid_h, grid_w);
  fpet::UnmergeProblem p;
  p.batch = input.size(0);
  p.dim = input.size(2);
  p.prefix = prefix;
  p.num_a = split.num_a;
  p.num_b = split.num_b;
  p.grid_h = grid_h;
  p.grid_w = grid_w;
  p.split_a = split.a;
  p.split_b = split.b;
  p.input = view_of(input, name, {p.batch, prefix + p.num_b + (merged_in ? 0 : p.num_a), p.dim});
  p.match = indices_of(match, "match", p.batch, p.num_a, 0, prefix + p.num_b);
  return p;
}

Tensor unmerge(const Tensor tokens, const Tensor match, const OptTensor split_a, const OptTensor split_b, int64_t grid_h,
               int64_t grid_w, int64_t prefix) {
  // A match sliced out of something larger is rare and small: it is copied rather than read in place.
  const Tensor index = torch::stable::contiguous(match);
  fpet::UnmergeProblem p = unmerge_problem(tokens, "tokens", index, split_a, split_b, grid_h, grid_w, prefix, true);
  Tensor output = empty({p.batch, prefix + p.num_a + p.num_b, p.dim}, tokens.scalar_type());
  p.output = output.mutable_data_ptr();
  fpet::cpu_unmerge(p, torch_threads());
  return output;
}

Tensor unmerge_backward(const Tensor grad, const Tensor match, const OptTensor split_a, const OptTensor split_b, int64_t grid_h,
                        int64_t grid_w, int64_t prefix) {
  const Tensor index = torch::stable::contiguous(match);
  fpet::UnmergeProblem p = unmerge_problem(grad, "grad", index, split_a, split_b, grid_h, grid_w, prefix, false);
  Tensor output = empty({p.batch, prefix + p.num_b, p.dim}, grad.scalar_type());
  p.output = output.mutable_data_ptr();
  const fpet::Parallel parallel = torch_threads();
  const Workspace workspace(fpet::cpu_unmerge_backward_workspace(p, parallel.threads));
  fpet::cpu_unmerge_backward(p, parallel, workspace.data);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpet, CPU, m) {
  m.impl("bdm_forward", TORCH_BOX(&forward));
  m.impl("bdm_backward", TORCH_BOX(&backward));
  m.impl("average_heads", TORCH_BOX(&average_heads));
  m.impl("bdm_unmerge", TORCH_BOX(&unmerge));
  m.impl("bdm_unmerge_backward", TORCH_BOX(&unmerge_backward));
}
