// Means over heads, and the way back from merged tokens to all positions.
#include "merge_lists.cuh"

namespace fpet {
namespace cuda {
namespace {

struct AverageParams {
  Problem q;
  void* out;
  int chunk;  // channels a thread
  int64_t count;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(256, 4) average_heads(const __grid_constant__ AverageParams p) {
  const Problem& q = p.q;
  const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x, chunks = q.channels / p.chunk;
  if (at >= p.count) return;
  const int64_t row = at / chunks, b = row / q.tokens;
  mean_key(q, p.aligned, b, row - b * q.tokens, int(at - row * chunks) * p.chunk, (T*)p.out + at * p.chunk);
}

// --- unmerge -----------------------------------------------------------------------------------------------------------------------------

struct CopyParams {
  Problem q;  // positions only
  const int64_t* match;
  View input;  // strides in words
  void* output;
  int words;   // in a row
  int blocks;  // per image
};

constexpr int kCopyRows = 8;

// Word: 2 to 16 bytes. Rows here: prefix tokens, destinations, sources.
template <class Word>
__global__ void __launch_bounds__(256) copy_rows(const __grid_constant__ CopyParams p) {
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

KernelList other_kernels() {
  static const KernelEntry entries[] = {
      {"average_heads<float>", (const void*)average_heads<float>, 256, 0},
      {"average_heads<double>", (const void*)average_heads<double>, 256, 0},
      {"copy_rows<2 bytes>", (const void*)copy_rows<uint16_t>, 256, 0},
      {"copy_rows<4 bytes>", (const void*)copy_rows<uint32_t>, 256, 0},
      {"copy_rows<8 bytes>", (const void*)copy_rows<uint2>, 256, 0},
      {"copy_rows<16 bytes>", (const void*)copy_rows<uint4>, 256, 0},
  };
  return {entries, int(sizeof(entries) / sizeof(*entries))};
}

}  // namespace cuda

CudaStatus cuda_average_heads(const Problem& q, void* out, cudaStream_t stream) {
  using namespace cuda;
  AverageParams p;
  p.q = q;
  p.out = out;
  p.aligned = keys_aligned(q);
  p.chunk = p.aligned ? 16 / size_of(q.key.dtype) : 1;
  p.count = q.batch * q.tokens * (q.channels / p.chunk);
  const dim3 grid(unsigned(ceil_div(p.count, int64_t(256))));
  return q.wide_scores ? FPET_LAUNCH(average_heads<double>, grid, 256u, size_t(0), stream, p)
                       : FPET_LAUNCH(average_heads<float>, grid, 256u, size_t(0), stream, p);
}

CudaStatus cuda_unmerge(const UnmergeProblem& u, cudaStream_t stream) {
  using namespace cuda;
  CopyParams p;
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
    case 2: return FPET_LAUNCH(copy_rows<uint16_t>, grid, 256u, size_t(0), stream, p);
    case 4: return FPET_LAUNCH(copy_rows<uint32_t>, grid, 256u, size_t(0), stream, p);
    case 8: return FPET_LAUNCH(copy_rows<uint2>, grid, 256u, size_t(0), stream, p);
    default: return FPET_LAUNCH(copy_rows<uint4>, grid, 256u, size_t(0), stream, p);
  }
}

size_t cuda_unmerge_backward_workspace(const UnmergeProblem&) { return 0; }

CudaStatus cuda_unmerge_backward(const UnmergeProblem& u, void*, cudaStream_t stream) {
  using namespace cuda;
  MergeParams p{};
  p.q = positions_of(u);
  p.q.x = u.input;
  p.match = u.match;
  p.tokens = u.output;
  return launch_merge_lists(p, stream);
}

}  // namespace fpet
