// Sums over the tokens that were merged into one, in a fixed order: the forward's merge, and the backward of unmerge.
#pragma once

#include "prepared_keys.cuh"

namespace fpet {
namespace cuda {

constexpr int kMergeThreads = 512, kMergeRows = 32, kMergeCapacity = kMergeThreads * 4;

struct MergeParams {
  Problem q;             // x is what is summed
  const int64_t* match;  // (B, N_A)
  void* tokens;          // (B, M, D)
  void* merged_size;     // (B, M); null: nothing is divided by it
  int blocks;            // of kMergeRows merged rows, per image
  bool aligned, mean;
};

// y_e = Σ size_t x_t / Σ size_t over the token kept as e and then its sources in their order; without `mean`, plain sums.
template <class S>
__global__ void __launch_bounds__(kMergeThreads, 2) merge_lists(const __grid_constant__ MergeParams p) {
  using M = Compute<S>;
  constexpr int lanes = Lanes<S>::count, span = 32 * lanes;
  constexpr int groups = sizeof(S) == 2 ? 3 : 6;  // so many times 16 bytes of a row at once: 768 columns
  const Problem& q = p.q;
  int2* list = (int2*)shared_memory();
  int* warp_counts = (int*)(list + kMergeCapacity);
  const int64_t b = blockIdx.x / p.blocks, merged = q.prefix + q.num_b;
  const int64_t first = (blockIdx.x - b * p.blocks) * kMergeRows, end = min(merged, first + kMergeRows);
  const int64_t* const match[1] = {p.match + b * q.num_a};
  const S* x = (const S*)q.x.data + b * q.x.stride[0];

  Collected<kMergeThreads, 1> found;
  found.run(match, 0, q.num_a, first, end, list, kMergeCapacity, warp_counts);
  const bool whole = found.next >= q.num_a;  // else so many sources came to these rows that they are listed part by part
  for (int turn = 0; turn < kMergeRows; turn += kMergeThreads / 32)
    for (int64_t d0 = 0; d0 < q.dim; d0 += groups * span) {
      const int own = turn + warp_index();
      const int64_t e = first + own;
      const bool exists = e < end;
      M sum[groups][lanes] = {}, size = 0;
      const auto add = [&](int64_t token) {
        const M weight = p.mean && q.size.data ? load_any<M>(q.size, b * q.size.stride[0] + token * q.size.stride[1]) : M(1);
        size += weight;
        const S* row = x + token * q.x.stride[1];
        if (p.aligned) {
          uint4 raw[groups];
#pragma unroll
          for (int g = 0; g < groups; ++g) {
            const int64_t d = d0 + g * span + lane_index() * lanes;
            raw[g] = d < q.dim ? load16(row + d) : make_uint4(0, 0, 0, 0);
          }
#pragma unroll
          for (int g = 0; g < groups; ++g) {
            const Lanes<S> v = unpack<S>(raw[g]);
#pragma unroll
            for (int l = 0; l < lanes; ++l) sum[g][l] += weight * v.v[l];
          }
        } else {
#pragma unroll
          for (int g = 0; g < groups; ++g)
#pragma unroll
            for (int l = 0; l < lanes; ++l) {
              const int64_t d = d0 + g * span + l * 32 + lane_index();
              if (d < q.dim) sum[g][l] += weight * to_compute(row[d * q.x.stride[2]]);
            }
        }
      };
      if (exists) add(e < q.prefix ? e : destination_token(q, e - q.prefix));
      for (int64_t from = 0;;) {
        if (!whole) found.run(match, from, q.num_a, first, end, list, kMergeCapacity, warp_counts);
        if (exists)
          for (int k = 0; k < found.count; ++k)
            if (list[k].y == own) add(source_token(q, list[k].x));
        from = found.next;
        if (from >= q.num_a) break;
      }
      if (!exists) continue;
      const M divisor = p.mean ? size : M(1);
      S* out = (S*)p.tokens + (b * merged + e) * q.dim;
      if (p.aligned) {
#pragma unroll
        for (int g = 0; g < groups; ++g) {
          Lanes<S> v;
#pragma unroll
          for (int l = 0; l < lanes; ++l) v.v[l] = p.mean ? sum[g][l] / divisor : sum[g][l];
          const int64_t d = d0 + g * span + lane_index() * lanes;
          if (d < q.dim) store16(out + d, repack<S>(v));
        }
      } else {
#pragma unroll
        for (int g = 0; g < groups; ++g)
#pragma unroll
          for (int l = 0; l < lanes; ++l) {
            const int64_t d = d0 + g * span + l * 32 + lane_index();
            if (d < q.dim) out[d] = from_compute<S>(p.mean ? sum[g][l] / divisor : sum[g][l]);
          }
      }
      if (p.merged_size && d0 == 0 && lane_index() == 0) ((M*)p.merged_size)[b * merged + e] = size;
    }
}

constexpr size_t kMergeShared = kMergeCapacity * sizeof(int2) + kMergeThreads / 32 * sizeof(int);

inline CudaStatus launch_merge_lists(MergeParams p, cudaStream_t stream) {
  const Problem& q = p.q;
  p.blocks = int(ceil_div(q.prefix + q.num_b, int64_t(kMergeRows)));
  p.aligned = q.x.stride[2] == 1 && q.dim * size_of(q.x.dtype) % 16 == 0 &&
              aligned16(q.x.data, q.x.dtype, {q.x.stride[0], q.x.stride[1]}) && aligned16(p.tokens, q.x.dtype, {q.dim});
  const dim3 grid(unsigned(q.batch * p.blocks));
  switch (q.x.dtype) {
    case DType::f64: return FPET_LAUNCH(merge_lists<double>, grid, kMergeThreads, kMergeShared, stream, p);
    case DType::bf16: return FPET_LAUNCH(merge_lists<bf16>, grid, kMergeThreads, kMergeShared, stream, p);
    case DType::f16: return FPET_LAUNCH(merge_lists<f16>, grid, kMergeThreads, kMergeShared, stream, p);
    default: return FPET_LAUNCH(merge_lists<float>, grid, kMergeThreads, kMergeShared, stream, p);
  }
}

}  // namespace cuda
}  // namespace fpet
