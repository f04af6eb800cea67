// Forward for grids of any length, in three launches, four where few images must fill the GPU: keys are prepared, tiles of scores
// keep a running top two as flash attention keeps a running maximum, and every block of merged rows looks up who came to it. What
// goes through memory besides results grows with N.
#include "prepared_keys.cuh"
#include "merge_lists.cuh"
#include "tiles.cuh"

namespace fpet {
namespace cuda {
namespace {

// --- preparing ---------------------------------------------------------------------------------------------------------------------------

// k' = mean key + scale · units W_upᵀ + delta, and its norm, of one block of rows.
template <class T>
__global__ void __launch_bounds__(kKeyThreads, 2) prepare_keys(const __grid_constant__ PrepareKeysParams<T> p) {
  const Problem& q = p.q;
  const int64_t b = blockIdx.x / p.blocks, all = q.num_a + q.num_b, first = (blockIdx.x - b * p.blocks) * p.rows;
  const int rows = int(min(int64_t(p.rows), all - first)), channels = int(q.channels);
  int64_t* tokens = (int64_t*)shared_memory();
  T* stage = (T*)(tokens + p.rows);
  T* key = stage + (q.hidden ? kProductDepth * kProductTile : 0);
  T* units = key + p.rows * p.ld_key;
  for (int r = int(threadIdx.x); r < rows; r += kKeyThreads) tokens[r] = row_token(q, first + r);
  __syncthreads();
  load_mean_keys(q, p.aligned, b, tokens, rows, key, p.ld_key);
  if (q.hidden) {
    const View& up = q.w_up;
    __syncthreads();
    block_units(q, b, tokens, rows, key, p.ld_key, stage, units, p.ld_hidden);
    block_product<T>(
        rows, channels, int(q.hidden), stage, [&](int r, int h) { return units[r * p.ld_hidden + h]; },
        [&](int h, int c) { return load_any<T>(up, c * up.stride[0] + h * up.stride[1]); },
        [&](int r, int c, T v) { key[r * p.ld_key + c] += v * T(q.scale); });
  }
  __syncthreads();
  const View& delta = q.key_delta;
  for (int r = warp_index(); r < rows; r += kKeyThreads / 32) {
    const int64_t row = b * all + first + r, offset = b * delta.stride[0] + tokens[r] * delta.stride[1];
    T squares = 0;
    for (int c = lane_index(); c < p.keys.padded; c += 32) {
      T v = c < channels ? key[r * p.ld_key + c] : T(0);
      if (delta.data && c < channels) v += load_any<T>(delta, offset + c * delta.stride[2]);
      squares += v * v;
      p.keys.put(row, c, v);
    }
    if (!q.cosine) continue;
    squares = warp_sum(squares);
    if (lane_index() == 0) p.keys.norm[row] = sqrt(squares);
  }
}

template <class T>
CudaStatus launch_prepare(const PrepareKeysParams<T>& p, cudaStream_t stream) {
  return launch<prepare_keys<T>>(dim3(unsigned(p.q.batch * p.blocks)), kKeyThreads, p.bytes, stream, p);
}

// --- matching ------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Candidate {
  T first, second;
  int first_at, second_at;
};

template <class T>
struct MatchParams {
  Problem q;
  PreparedKeys<T> keys;
  int64_t *match, *second;
  T* mid;
  Candidate<T>* candidates;               // (B, segments, N_A), where there is more than one segment of destinations
  int blocks, segments, segment, stages;  // blocks of sources; destinations in a segment
};

template <class T>
FPET_DEVICE void write_match(const MatchParams<T>& p, int64_t b, int64_t i, TopTwo<T> best) {
  T mid;
  best.settle(int(p.q.num_b), &mid);
  const int64_t at = b * p.q.num_a + i;
  p.match[at] = p.q.prefix + best.first_at;
  p.second[at] = p.q.prefix + best.second_at;
  p.mid[at] = mid;
}

template <class T>
FPET_DEVICE void give_candidate(const MatchParams<T>& p, int64_t b, int segment, int64_t i, const TopTwo<T>& best) {
  if (p.segments == 1) {
    write_match(p, b, i, best);
  } else {
    p.candidates[(b * p.segments + segment) * p.q.num_a + i] = {best.first, best.second, best.first_at, best.second_at};
  }
}

// 64 sources against one segment of destinations, 128 of them at a time.
__global__ void __launch_bounds__(kTileThreads, 2) match_tiles(const __grid_constant__ MatchParams<float> p) {
  const Problem& q = p.q;
  const int64_t b = blockIdx.x / (p.blocks * p.segments);
  const int rest = int(blockIdx.x - b * (p.blocks * p.segments)), segment = rest % p.segments;
  const int64_t i0 = int64_t(rest / p.segments) * kTileA, image_row = b * (q.num_a + q.num_b);
  const int64_t j_begin = int64_t(segment) * p.segment, j_end = min(q.num_b, j_begin + p.segment);
  Ring<> ring{shared_memory(), p.stages};
  float* inverse_b = (float*)(ring.base + p.stages * kStageBytes);    // (128)
  Candidate<float>* found = (Candidate<float>*)(inverse_b + kTileB);  // (4, 64)
  // A thread's top two of each of its rows wait here for the rare score that is better than the second: registers are short.
  TopTwo<float>* best = (TopTwo<float>*)(found + 4 * kTileA) + threadIdx.x;  // (4, 256)
  float second[2][2];

  const int first = first_pair(p.keys.parts);
  int64_t load_j = j_begin;
  int load_channel = 0, load_pair = first;
  const auto fill = [&](char* stage) {
    if (load_j >= j_end) return;
    copy_keys(stage, p.keys.part, p.keys.parts, p.keys.padded, image_row, q.num_a, q.num_b, i0, load_j, load_channel,
              pair_left(load_pair), pair_right(load_pair));
    if (++load_pair < kPairs) return;
    load_pair = first;
    load_channel += kChannelBlock;
    if (load_channel < p.keys.padded) return;
    load_channel = 0;
    load_j += kTileB;
  };
  ring.start(fill);

  float inverse_a[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = i0 + tile_row(m, half);
      inverse_a[m][half] = i < q.num_a ? p.keys.inverse(image_row + i) : 0.f;
      second[m][half] = -INFINITY;
      best[(2 * m + half) * kTileThreads] = TopTwo<float>{};
    }
  for (int64_t j0 = j_begin; j0 < j_end; j0 += kTileB) {
    __syncthreads();  // the norms of the last tile have been read
    if (int(threadIdx.x) < kTileB) {
      const int64_t j = j0 + int(threadIdx.x);
      inverse_b[threadIdx.x] = j < j_end ? p.keys.inverse(image_row + q.num_a + j) : 0.f;
    }
    Tile scores = {};
    for (int channel = 0; channel < p.keys.padded; channel += kChannelBlock)
      for (int pair = first; pair < kPairs; ++pair) add_products<bf16, true>(scores, ring.next(fill));
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[m][n][2 * half + e];
            if (q.cosine) score = score * inverse_a[m][half] * inverse_b[tile_column(n) + e];
            if (j0 + tile_column(n) + e >= j_end) score = -INFINITY;
            largest = fmaxf(largest, score);
          }
        if (!(largest > second[m][half])) continue;  // most tiles change nothing
        TopTwo<float> top = best[(2 * m + half) * kTileThreads];
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) top.add(scores[m][n][2 * half + e], int(j0) + tile_column(n) + e);
        best[(2 * m + half) * kTileThreads] = top;
        second[m][half] = top.second;
      }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      TopTwo<float> top = best[(2 * m + half) * kTileThreads];
      top.merge_lane(1);
      top.merge_lane(2);
      if (lane_index() % 4 == 0)
        found[warp_index() % 4 * kTileA + tile_row(m, half)] = {top.first, top.second, top.first_at, top.second_at};
    }
  __syncthreads();
  const int row = int(threadIdx.x);
  if (row >= kTileA || i0 + row >= q.num_a) return;
  TopTwo<float> top;
  for (int w = 0; w < 4; ++w) {
    const Candidate<float>& c = found[w * kTileA + row];
    top.merge(c.first, c.first_at, c.second, c.second_at);
  }
  give_candidate(p, b, segment, i0 + row, top);
}

constexpr int kMatchStages = 3;
constexpr size_t match_shared(int stages) {
  return size_t(stages) * kStageBytes + kTileB * sizeof(float) + 4 * kTileA * sizeof(Candidate<float>) +
         4 * kTileThreads * sizeof(TopTwo<float>);
}

// The same in float64: 32 sources, 32 destinations at a time, 2 × 2 of them a thread.
constexpr int kWide = 32, kWideDepth = 16, kMatchWideThreads = 256;
constexpr size_t kMatchWideShared = 2 * kWide * (kWideDepth + 1) * sizeof(double);

__global__ void __launch_bounds__(kMatchWideThreads, 2) match_wide(const __grid_constant__ MatchParams<double> p) {
  const Problem& q = p.q;
  const int64_t b = blockIdx.x / (p.blocks * p.segments);
  const int rest = int(blockIdx.x - b * (p.blocks * p.segments)), segment = rest % p.segments;
  const int64_t i0 = int64_t(rest / p.segments) * kWide, image_row = b * (q.num_a + q.num_b);
  const int64_t j_begin = int64_t(segment) * p.segment, j_end = min(q.num_b, j_begin + p.segment);
  double* left = (double*)shared_memory();  // (32, 17), as right
  double* right = left + kWide * (kWideDepth + 1);
  const int r = int(threadIdx.x) / 16, c = int(threadIdx.x) % 16;
  TopTwo<double> best[2];
  for (int64_t j0 = j_begin; j0 < j_end; j0 += kWide) {
    double sum[2][2] = {};
    for (int k0 = 0; k0 < p.keys.padded; k0 += kWideDepth) {
      __syncthreads();
      for (int e = int(threadIdx.x); e < kWide * kWideDepth; e += kMatchWideThreads) {
        const int row = e / kWideDepth, k = e % kWideDepth, at = row * (kWideDepth + 1) + k;
        left[at] = i0 + row < q.num_a ? p.keys.at(image_row + i0 + row, k0 + k) : 0.0;
        right[at] = j0 + row < j_end ? p.keys.at(image_row + q.num_a + j0 + row, k0 + k) : 0.0;
      }
      __syncthreads();
      for (int k = 0; k < kWideDepth; ++k)
        for (int m = 0; m < 2; ++m)
          for (int n = 0; n < 2; ++n)
            sum[m][n] += left[(r + 16 * m) * (kWideDepth + 1) + k] * right[(c + 16 * n) * (kWideDepth + 1) + k];
    }
    for (int m = 0; m < 2; ++m)
      for (int n = 0; n < 2; ++n) {
        const int64_t i = i0 + r + 16 * m, j = j0 + c + 16 * n;
        if (i >= q.num_a || j >= j_end) continue;
        best[m].add(sum[m][n] * p.keys.inverse(image_row + i) * p.keys.inverse(image_row + q.num_a + j), int(j));
      }
  }
  for (int m = 0; m < 2; ++m) {
    for (int lanes = 1; lanes < 16; lanes *= 2) best[m].merge_lane(lanes);
    if (c == 0 && i0 + r + 16 * m < q.num_a) give_candidate(p, b, segment, i0 + r + 16 * m, best[m]);
  }
}

constexpr int kJoinThreads = 256;

template <class T>
__global__ void __launch_bounds__(kJoinThreads) join_candidates(const __grid_constant__ MatchParams<T> p) {
  const int64_t at = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (at >= p.q.batch * p.q.num_a) return;
  const int64_t b = at / p.q.num_a, i = at - b * p.q.num_a;
  TopTwo<T> best;
  for (int s = 0; s < p.segments; ++s) {
    const Candidate<T>& c = p.candidates[(b * p.segments + s) * p.q.num_a + i];
    best.merge(c.first, c.first_at, c.second, c.second_at);
  }
  write_match(p, b, i, best);
}

// --- merging -----------------------------------------------------------------------------------------------------------------------------

// The sources of a block's rows are listed in one pass over the match as long as there is room for those of another turn.
constexpr int kMergeThreads = 256, kMergeRows = 32, kMergeCapacity = 2 * Collected<kMergeThreads, 1>::kTurn;

// y_e = Σ size_t x_t / Σ size_t over the token kept as e and then its sources in their order; without `mean`, plain sums.
template <class S>
__global__ void __launch_bounds__(kMergeThreads, sizeof(S) == 2 ? 3 : 2)
    merge_lists(const __grid_constant__ MergeListsParams p) {
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

// --- launching -----------------------------------------------------------------------------------------------------------------------------

// How many segments destinations are cut into, for a small batch to fill the GPU. A top two does not depend on it.
constexpr int kMaxSegments = 8;

template <class T>
struct Plan {
  MatchParams<T> match;
  size_t bytes;

  Plan(const Problem& q, char* base) {
    Arena arena{base};
    match.q = q;
    match.keys.plan(arena, q);
    const int64_t a = sizeof(T) == 8 ? kWide : kTileA, b = sizeof(T) == 8 ? kWide : kTileB;
    match.blocks = int(ceil_div(q.num_a, a));
    const int64_t wanted = ceil_div(int64_t(2) * limits().multiprocessors, max(int64_t(1), q.batch * match.blocks));
    const int64_t tiles = ceil_div(q.num_b, b);
    match.segment = int(ceil_div(tiles, min(min(wanted, int64_t(kMaxSegments)), tiles)) * b);
    match.segments = int(ceil_div(q.num_b, int64_t(match.segment)));
    match.candidates = arena.take<Candidate<T>>(match.segments > 1 ? q.batch * match.segments * q.num_a : 0);
    bytes = arena.used;
  }
};

template <class T>
CudaStatus match_all(const Problem& q, const ForwardOutputs& out, void* workspace, cudaStream_t stream) {
  Plan<T> plan(q, (char*)workspace);
  MatchParams<T>& p = plan.match;
  p.match = out.match;
  p.second = out.second;
  p.mid = (T*)out.mid;
  const PrepareKeysParams<T> prepare(q, p.keys);
  CudaStatus status = launch_prepare_keys(prepare, stream);
  if (status.kernel) return status;
  const dim3 grid(unsigned(q.batch * p.blocks * p.segments));
  if constexpr (sizeof(T) == 8) {
    status = launch<match_wide>(grid, kMatchWideThreads, kMatchWideShared, stream, p);
  } else {
    p.stages = kMatchStages;
    status = launch<match_tiles>(grid, kTileThreads, match_shared(p.stages), stream, p);
  }
  if (status.kernel || p.segments == 1) return status;
  return launch<join_candidates<T>>(dim3(unsigned(ceil_div(q.batch * q.num_a, int64_t(kJoinThreads)))), kJoinThreads, 0, stream,
                                    p);
}

}  // namespace

CudaStatus launch_prepare_keys(const PrepareKeysParams<float>& p, cudaStream_t stream) { return launch_prepare(p, stream); }
CudaStatus launch_prepare_keys(const PrepareKeysParams<double>& p, cudaStream_t stream) { return launch_prepare(p, stream); }

CudaStatus launch_merge_lists(MergeListsParams p, cudaStream_t stream) {
  const Problem& q = p.q;
  p.blocks = int(ceil_div(q.prefix + q.num_b, int64_t(kMergeRows)));
  p.aligned = q.x.stride[2] == 1 && q.dim * size_of(q.x.dtype) % 16 == 0 &&
              aligned16(q.x.data, q.x.dtype, {q.x.stride[0], q.x.stride[1]}) && aligned16(p.tokens, q.x.dtype, {q.dim});
  const dim3 grid(unsigned(q.batch * p.blocks));
  switch (q.x.dtype) {
    case DType::f64: return launch<merge_lists<double>>(grid, kMergeThreads, kMergeShared, stream, p);
    case DType::bf16: return launch<merge_lists<bf16>>(grid, kMergeThreads, kMergeShared, stream, p);
    case DType::f16: return launch<merge_lists<f16>>(grid, kMergeThreads, kMergeShared, stream, p);
    default: return launch<merge_lists<float>>(grid, kMergeThreads, kMergeShared, stream, p);
  }
}

size_t forward_long_workspace(const Problem& q) {
  if (!q.num_a || !q.batch) return 0;
  return q.wide_scores ? Plan<double>(q, nullptr).bytes : Plan<float>(q, nullptr).bytes;
}

CudaStatus forward_long(const Problem& q, const ForwardOutputs& out, void* workspace, cudaStream_t stream) {
  if (!q.batch) return {};
  if (q.num_a) {
    const CudaStatus status =
        q.wide_scores ? match_all<double>(q, out, workspace, stream) : match_all<float>(q, out, workspace, stream);
    if (status.kernel) return status;
  }
  MergeListsParams merge{};
  merge.q = q;
  merge.match = out.match;
  merge.tokens = out.tokens;
  merge.merged_size = out.merged_size;
  merge.mean = true;
  return launch_merge_lists(merge, stream);
}

KernelList forward_long_kernels() {
  const Problem q = typical_problem(true);
  return {
      entry<prepare_keys<float>>("prepare_keys<float>", kKeyThreads, PrepareKeysParams<float>(q, {}).bytes),
      entry<prepare_keys<double>>("prepare_keys<double>", kKeyThreads, PrepareKeysParams<double>(q, {}).bytes),
      entry<match_tiles>("match_tiles", kTileThreads, match_shared(kMatchStages)),
      entry<match_wide>("match_wide", kMatchWideThreads, kMatchWideShared),
      entry<join_candidates<float>>("join_candidates<float>", kJoinThreads, 0),
      entry<join_candidates<double>>("join_candidates<double>", kJoinThreads, 0),
      entry<merge_lists<float>>("merge_lists<float>", kMergeThreads, kMergeShared),
      entry<merge_lists<double>>("merge_lists<double>", kMergeThreads, kMergeShared),
      entry<merge_lists<bf16>>("merge_lists<bf16>", kMergeThreads, kMergeShared),
      entry<merge_lists<f16>>("merge_lists<f16>", kMergeThreads, kMergeShared),
  };
}

}  // namespace cuda
}  // namespace fpet
