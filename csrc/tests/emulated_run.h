// One problem with everything that goes into and comes out of the emulated kernels, and the problem they are made for.
#pragma once

#include "cuda_emulator.h"
#include "oracle_backward.h"

// Of csrc/cuda/launch.cuh, which only compilers of kernels can read.
namespace fpet::cuda {
bool backward_short_takes(const Problem&);
size_t backward_long_workspace(const Problem&, const BackwardOutputs&);
CudaStatus backward_long(const Problem&, const BackwardInputs&, const BackwardOutputs&, void* workspace, cudaStream_t);
CudaStatus forward_long(const Problem&, const ForwardOutputs&, void* workspace, cudaStream_t);
size_t forward_long_workspace(const Problem&);
const char* kernel_name(const void* function);
}  // namespace fpet::cuda

namespace oracle {

struct Run {
  Case t;
  Handed h;
  bool tiled = false;
  fpet::Problem problem;
  fpet::BackwardInputs in;
  fpet::ForwardOutputs forward_out;
  fpet::BackwardOutputs out;
  vector<Buffer> buffers;

  explicit Run(const Config& c) : t(c), h(t) {
    const auto upload = [&](const auto& data) {
      buffers.emplace_back(data);
      return buffers.back().get();
    };
    const auto space = [&](int64_t bytes) {
      buffers.emplace_back(u(bytes));
      return buffers.back().get();
    };
    problem = t.problem((const int64_t*)upload(t.pos_a), (const int64_t*)upload(t.pos_b),
                        [&](const Tensor& x) { return upload(x.data); }, 0, c.batch);
    const int64_t wide = c.x == DType::f64 ? 8 : 4, score = t.wide() ? 8 : 4, rows = c.batch * t.n;
    forward_out = {space(c.batch * t.merged * c.dim * bytes_of(c.x)), space(c.batch * t.merged * wide),
                   (int64_t*)space(c.batch * t.num_a * 8), (int64_t*)space(c.batch * t.num_a * 8),
                   space(c.batch * t.num_a * score)};
    in = {t.grad.view(upload(t.grad.data)),
          t.grad_size.view(upload(t.grad_size.data)),
          h.tokens.view(upload(h.tokens.data)),
          h.merged_size.view(upload(h.merged_size.data)),
          (const int64_t*)upload(h.match),
          (const int64_t*)upload(h.second),
          upload(h.mid.data)};
    out.x = space(rows * c.dim * bytes_of(c.x));
    out.size = space(rows * wide);
    out.size_dtype = wide == 8 ? DType::f64 : DType::f32;
    if (c.hidden) out.w_down = space(c.hidden * c.channels * bytes_of(c.weight));
    if (c.hidden) out.w_up = space(c.hidden * c.channels * bytes_of(c.weight));
    out.weight_dtype = c.weight;
    out.refined = space(rows * c.channels * bytes_of(c.key));
    out.refined_dtype = c.key;
  }
  fpet::CudaStatus forward() const {
    const Buffer scratch(tiled ? fpet::cuda::forward_long_workspace(problem) : fpet::cuda_forward_workspace(problem));
    return tiled ? fpet::cuda::forward_long(problem, forward_out, scratch.get(), nullptr)
                 : fpet::cuda_forward(problem, forward_out, scratch.get(), nullptr);
  }
  fpet::CudaStatus backward() const {
    const Buffer scratch(tiled ? fpet::cuda::backward_long_workspace(problem, out)
                               : fpet::cuda_backward_workspace(problem, out));
    return tiled ? fpet::cuda::backward_long(problem, in, out, scratch.get(), nullptr)
                 : fpet::cuda_backward(problem, in, out, scratch.get(), nullptr);
  }
};

// ViT-B/16 in its keys; the columns of x don't count for what is checked here.
inline Config typical(bool refined, DType key = DType::bf16) {
  Config c;
  c.dim = 16;
  c.x = c.key = c.weight = key;
  c.heads = refined ? 12 : 1;
  c.hidden = refined ? 32 : 0;
  return c;
}

}  // namespace oracle
