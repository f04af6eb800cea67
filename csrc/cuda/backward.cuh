// What the two files of the backward share.
#pragma once

#include "prepared_keys.cuh"
#include "tiles.cuh"

namespace fpet {
namespace cuda {

constexpr int kWideTile = 32;  // sources and destinations of a tile in float64

// From the tiles of scores to dk̂, summed up in parts that a small batch can work on at the same time: sources in chunks,
// destinations in segments. How many depends on the shape of one image alone.
//
// Kept in the scale of k', not of k̂: with ds' = ds / (‖k'_i‖ ‖k'_j‖), dk̂_i / ‖k'_i‖ = Σ_j ds'_ij k'_j, and likewise for j.
template <class T>
struct PairParams {
  Problem q;
  BackwardInputs in;
  PreparedKeys<T> keys;
  const void* gamma;                     // (B, N_B) γ', float64 for float64 x
  T* part_a;                             // (B, segments, N_A, padded)
  T* part_b;                             // (B, chunks, N_B, padded)
  T* sums;                               // (B, segments, N_A): Σ_j ds_ij
  int chunks, segments, chunk, segment;  // how many, and sources, destinations in one
  // All destinations are in one tile: the mean of the two best takes its share there, before sums could cancel, and not in the end.
  bool whole_rows;
  int stages;
  bool x_aligned, grad_aligned;

  void plan(Arena& arena, const Problem& problem, const int a, const int b) {
    q = problem;
    keys.plan(arena, q);
    whole_rows = sizeof(T) == 4 && q.num_b <= b;
    const int64_t blocks_a = ceil_div(q.num_a, int64_t(a)), blocks_b = ceil_div(q.num_b, int64_t(b));
    chunk = int(ceil_div(blocks_a, max(int64_t(1), min(blocks_a, int64_t(8))))) * a;
    segment = int(ceil_div(blocks_b, min(blocks_b, int64_t(4)))) * b;
    chunks = int(ceil_div(q.num_a, int64_t(max(chunk, 1))));
    segments = int(ceil_div(q.num_b, int64_t(segment)));
    gamma = q.x.dtype == DType::f64 ? (const void*)arena.take<double>(q.batch * q.num_b)
                                    : (const void*)arena.take<float>(q.batch * q.num_b);
    part_a = arena.take<T>(q.batch * segments * q.num_a * keys.padded);
    part_b = arena.take<T>(q.batch * chunks * q.num_b * keys.padded);
    sums = arena.take<T>(whole_rows ? 0 : q.batch * segments * q.num_a);
  }
};

CudaStatus pair_gradient(PairParams<float>, cudaStream_t);
CudaStatus pair_gradient(const PairParams<double>&, cudaStream_t);
KernelList pair_gradient_kernels();

}  // namespace cuda
}  // namespace fpet
