// What the two files of the backward share.
#pragma once

#include "prepared_keys.cuh"
#include "tiles.cuh"

namespace fpet {
namespace cuda {

// --- dx, dsize, γ' -------------------------------------------------------------------------------------------------------------------

struct SpreadParams {
  Problem q;
  BackwardInputs in;
  void *grad_x, *grad_size, *gamma;  // null where not asked for; γ' is (B, N_B)
  DType size_dtype;
  int blocks;  // per image
  bool aligned;
};

// Products along rows of G are summed in one order wherever they are formed: eight lanes take turns at the 16-byte pieces of a row,
// and their sums are added at the end.
constexpr int kRowLanes = 8;

// One token t, merged into row e: dx_t = size_t G_e / n_e, dsize_t = γ'_e + G_e · x_t / n_e with γ'_e = γ_e − G_e · y_e / n_e. Rows here:
// kept tokens in merged order, then sources; eight lanes a row, and all of a warp come, those with rows behind the end, too.
template <class S>
FPET_DEVICE void spread_row(const SpreadParams& p, int64_t b, int64_t r, int64_t end) {
  using M = Compute<S>;
  constexpr int lanes = Lanes<S>::count, span = kRowLanes * lanes;
  constexpr int groups = 3;  // pieces under way
  const Problem& q = p.q;
  const View &grad = p.in.grad_tokens, &tokens = p.in.tokens, &sizes = p.in.merged_size, &grad_sizes = p.in.grad_size;
  const bool exists = r < end;
  r = exists ? r : end - 1;
  const int64_t merged = q.prefix + q.num_b, i = r - merged;
  const int64_t e = i < 0 ? r : matched(q, p.in.match[b * q.num_a + i]);
  const int64_t token = i >= 0 ? source_token(q, i) : r < q.prefix ? r : destination_token(q, r - q.prefix);
  const M n = load_any<M>(sizes, b * sizes.stride[0] + e * sizes.stride[1]);
  const M size = q.size.data ? load_any<M>(q.size, b * q.size.stride[0] + token * q.size.stride[1]) : M(1);
  const M ratio = size / n;
  const bool wants_gamma = p.gamma && r >= q.prefix && i < 0, wants_dots = p.grad_size || wants_gamma;
  const S* g_row = (const S*)grad.data + b * grad.stride[0] + e * grad.stride[1];
  const S* y_row = (const S*)tokens.data + b * tokens.stride[0] + e * tokens.stride[1];
  const S* x_row = (const S*)q.x.data + b * q.x.stride[0] + token * q.x.stride[1];
  S* out = (S*)p.grad_x + (b * q.tokens + token) * q.dim;
  M along_y = 0, along_x = 0;
  for (int64_t d0 = lane_index() % kRowLanes * lanes; d0 < q.dim; d0 += groups * span) {
    uint4 g[groups], y[groups], x[groups];
#pragma unroll
    for (int k = 0; k < groups; ++k) {
      g[k] = load_piece(g_row, d0 + k * span, q.dim, grad.stride[2], p.aligned);
      y[k] = load_piece(y_row, d0 + k * span, q.dim, tokens.stride[2], p.aligned, wants_dots);
      x[k] = load_piece(x_row, d0 + k * span, q.dim, q.x.stride[2], p.aligned, p.grad_size != nullptr);
    }
#pragma unroll
    for (int k = 0; k < groups; ++k) {
      Lanes<S> v = unpack<S>(g[k]);
      if (wants_dots) {
        add_along(along_y, v, unpack<S>(y[k]));
        add_along(along_x, v, unpack<S>(x[k]));
      }
      if (!p.grad_x || !exists) continue;
      scale_lanes(v, ratio);
      store_piece(out, d0 + k * span, q.dim, p.aligned, repack<S>(v));
    }
  }
  along_y = warp_sum<kRowLanes>(along_y), along_x = warp_sum<kRowLanes>(along_x);
  if (!wants_dots || !exists || lane_index() % kRowLanes) return;
  const M own = grad_sizes.data ? load_any<M>(grad_sizes, b * grad_sizes.stride[0] + e * grad_sizes.stride[1]) : M(0);
  const M gamma = own - along_y / n;
  if (p.grad_size) store_any(p.grad_size, p.size_dtype, b * q.tokens + token, gamma + along_x / n);
  if (wants_gamma) ((M*)p.gamma)[b * q.num_b + r - q.prefix] = gamma;
}

inline bool rows_aligned(const View& v, int64_t dim) {
  return v.stride[2] == 1 && dim * size_of(v.dtype) % 16 == 0 && aligned16(v.data, v.dtype, {v.stride[0], v.stride[1]});
}

// --- the N_A × N_B work -----------------------------------------------------------------------------------------------------------------

constexpr int kWideTile = 32;  // sources and destinations of a tile in float64
constexpr int kMostChunks = 8, kMostSegments = 4;
constexpr int64_t kPartsRoom = int64_t(2) << 20;  // bytes of an image's parts of dk̂, where more than two by two are wanted

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
    const auto cut = [&](int most_chunks, int most_segments) {
      chunk = int(ceil_div(blocks_a, max(int64_t(1), min(blocks_a, int64_t(most_chunks))))) * a;
      segment = int(ceil_div(blocks_b, min(blocks_b, int64_t(most_segments)))) * b;
      chunks = int(ceil_div(q.num_a, int64_t(max(chunk, 1))));
      segments = int(ceil_div(q.num_b, int64_t(segment)));
      return (segments * q.num_a + chunks * q.num_b) * keys.padded * int64_t(sizeof(T));
    };
    // The longer an image, the fewer: at 4097 tokens two by two, which together take less than a byte for every pair of tokens.
    int most_chunks = kMostChunks, most_segments = kMostSegments;
    while (cut(most_chunks, most_segments) > kPartsRoom && most_chunks > 2) {
      if (most_chunks > most_segments) --most_chunks;
      else --most_segments;
    }
    gamma = q.x.dtype == DType::f64 ? (const void*)arena.take<double>(q.batch * q.num_b)
                                    : (const void*)arena.take<float>(q.batch * q.num_b);
    part_a = arena.take<T>(q.batch * segments * q.num_a * keys.padded);
    part_b = arena.take<T>(q.batch * chunks * q.num_b * keys.padded);
    sums = arena.take<T>(whole_rows ? 0 : q.batch * segments * q.num_a);
  }
};

CudaStatus pair_gradient(PairParams<float>, cudaStream_t);
CudaStatus pair_gradient(const PairParams<double>&, cudaStream_t);

// What backward_short_takes in one launch, whatever is asked for of the key path; weight_parts is (B, 2, C h).
CudaStatus backward_short(const SpreadParams&, const BackwardOutputs&, float* weight_parts, cudaStream_t);

}  // namespace cuda
}  // namespace fpet
