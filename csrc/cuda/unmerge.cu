// Means over heads, and the way back from merged tokens to all positions.
#include "merge_lists.cuh"

namespace fpet {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct AverageHeadsParams {
  Problem q;
  void* out;
  int chunk;  // channels a thread
  int64_t count;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) average_heads(const __grid_constant__ AverageHeadsParams p) {
  const Problem& q = p.q;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, chunks = q.channels / p.chunk;
  if (at >= p.count) return;
  const int64_t row = at / chunks, b = row / q.tokens;
  mean_key(q, p.aligned, b, row - b * q.tokens, int(at - row * chunks) * p.chunk, (T*)p.out + at * p.chunk);
}

// --- unmerge -----------------------------------------------------------------------------------------------------------------------------

struct CopyRowsParams {
  Problem q;  // positions only
  const int64_t* match;
  View input;  // strides in words
  void* output;
  int words;   // in a row
  int blocks;  // per image
};

constexpr int kCopyRows = kThreads / 32;

// Word: 2 to 16 bytes. Rows here: prefix tokens, destinations, sources.
template <class Word>
__global__ void __launch_bounds__(kThreads) copy_rows(const __grid_constant__ CopyRowsParams p) {
  const Problem& q = p.q;
  const int64_t b = blockIdx.x / p.blocks, merged = q.prefix + q.num_b;
  const int64_t r = (blockIdx.x - b * p.blocks) * kCopyRows + warp_index(), i = r - merged;
  if (r >= q.tokens) return;
  const int64_t from = i < 0 ? r : within(p.match[b * q.num_a + i], 0, merged);
  const int64_t token = i >= 0 ? source_token(q, i) : r < q.prefix ? r : destination_token(q, r - q.prefix);
  const Word* row = (const Word*)p.input.data + b * p.input.stride[0] + from * p.input.stride[1];
  Word* out = (Word*)p.output + (b * q.tokens + token) * p.words;
#pragma unroll 4
  for (int w = lane_index(); w < p.words; w += 32) out[w] = row[w * p.input.stride[2]];
}

Problem positions_of(const UnmergeProblem& u) {
  Problem q;
  q.batch = u.batch;
  q.tokens = u.prefix + u.num_a + u.num_b;
  q.dim = u.dim;
  q.prefix = u.prefix;
  q.num_a = u.num_a;
  q.num_b = u.num_b;
  q.grid_h = u.grid_h;
  q.grid_w = u.grid_w;
  q.split_a = u.split_a;
  q.split_b = u.split_b;
  return q;
}

}  // namespace

KernelList unmerge_kernels() {
  return {
      entry<average_heads<float>>("average_heads<float>", kThreads, 0),
      entry<average_heads<double>>("average_heads<double>", kThreads, 0),
      entry<copy_rows<uint16_t>>("copy_rows<2 bytes>", kThreads, 0),
      entry<copy_rows<uint32_t>>("copy_rows<4 bytes>", kThreads, 0),
      entry<copy_rows<uint2>>("copy_rows<8 bytes>", kThreads, 0),
      entry<copy_rows<uint4>>("copy_rows<16 bytes>", kThreads, 0),
  };
}

}  // namespace cuda

CudaStatus cuda_average_heads(const Problem& problem, void* out, cudaStream_t stream) {
  using namespace cuda;
  const Problem q = with_plain_strides(problem);
  AverageHeadsParams p;
  p.q = q;
  p.out = out;
  p.aligned = keys_aligned(q);
  p.chunk = p.aligned ? 16 / size_of(q.key.dtype) : 1;
  p.count = q.batch * q.tokens * (q.channels / p.chunk);
  const dim3 grid(unsigned(ceil_div(p.count, int64_t(kThreads))));
  return q.wide_scores ? launch<average_heads<double>>(grid, kThreads, 0, stream, p)
                       : launch<average_heads<float>>(grid, kThreads, 0, stream, p);
}

CudaStatus cuda_unmerge(const UnmergeProblem& problem, cudaStream_t stream) {
  using namespace cuda;
  const UnmergeProblem u = with_plain_strides(problem);
  CopyRowsParams p;
  p.q = positions_of(u);
  p.match = u.match;
  p.input = u.input;
  p.output = u.output;
  const int size = size_of(u.input.dtype);
  const bool rows = u.input.stride[2] == 1 && u.dim * size % 16 == 0 && aligned16(u.output, u.input.dtype, {}) &&
                    aligned16(u.input.data, u.input.dtype, {u.input.stride[0], u.input.stride[1]});
  const int word = rows ? 16 : size;
  for (int d = 0; d < 2; ++d) p.input.stride[d] = u.input.stride[d] * size / word;
  p.words = int(u.dim * size / word);
  p.blocks = int(ceil_div(p.q.tokens, int64_t(kCopyRows)));
  const dim3 grid(unsigned(u.batch * p.blocks));
  switch (word) {
    case 2: return launch<copy_rows<uint16_t>>(grid, kThreads, 0, stream, p);
    case 4: return launch<copy_rows<uint32_t>>(grid, kThreads, 0, stream, p);
    case 8: return launch<copy_rows<uint2>>(grid, kThreads, 0, stream, p);
    default: return launch<copy_rows<uint4>>(grid, kThreads, 0, stream, p);
  }
}

size_t cuda_unmerge_backward_workspace(const UnmergeProblem&) { return 0; }

CudaStatus cuda_unmerge_backward(const UnmergeProblem& problem, void*, cudaStream_t stream) {
  using namespace cuda;
  const UnmergeProblem u = with_plain_strides(problem);
  MergeListsParams p{};
  p.q = positions_of(u);
  p.q.x = u.input;
  p.match = u.match;
  p.tokens = u.output;
  return launch_merge_lists(p, stream);
}

}  // namespace fpet
