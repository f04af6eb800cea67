// Forward of short grids in one launch. A block takes one image, or a share of its columns of x where there are too few images to
// fill the GPU; each of an image's blocks matches anew. Keys of the destinations lie in shared memory, those of the sources in
// registers; scores never leave the registers of the warp that ranks them. The match becomes one bit set per destination, whose
// order of sources needs no sorting. While keys are worked on, the tokens are on their way to the second-level cache.
#include <algorithm>

#include "keys.cuh"
#include "launch.cuh"

namespace fpet {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxSources = 512, kMaxDestinations = 512, kMaxSplitDestinations = 320;
constexpr int kVectors = 4;  // 16-byte vectors of a row that a lane has under way

// Offsets in shared memory.
struct Layout {
  int token_a, token_b, size_a, size_b, unscale_b, members, next_row, keys, weights, total;
  int words;       // of 32 sources, in the bit set of one destination
  int plane_rows;  // destinations, padded to strips

  Layout() = default;
  Layout(const Problem& p, int groups, int hidden_groups, bool split) {
    int at = 0;
    const auto take = [&](int64_t bytes) {
      const int start = at;
      at = int(round_up<int64_t>(at + bytes, 16));
      return start;
    };
    words = int(ceil_div<int64_t>(p.num_a, 32));
    plane_rows = int(round_up<int64_t>(p.num_b, 16));
    keys = take(int64_t(plane_rows) * plane_stride(groups) * 2 * (split ? 2 : 1));
    weights = take(p.hidden ? int64_t(Weights::bytes(hidden_groups, groups)) : 0);
    token_a = take(4 * p.num_a);
    token_b = take(4 * p.num_b);
    size_a = take(4 * p.num_a);
    size_b = take(4 * p.num_b);
    unscale_b = take(4 * plane_rows);
    members = take(4 * p.num_b * words);
    next_row = take(4);
    total = at;
  }
};

struct MergeShortParams {
  Problem q;
  ForwardOutputs out;
  Layout layout;
  KeyReads reads;
  int groups, hidden_groups;  // of 32 channels, of 32 hidden units
  int parts, part_units;      // blocks an image, and columns of each: in 16-byte vectors, or in elements where not vectors
  int units;                  // of a row
  int prefetch_rows;          // tokens fetched ahead
  bool vectors;
};

// One lane's share of the matching: the best two of rows g and g + 8 of the strip, over all destinations.
template <class S, bool split, int Q>
FPET_DEVICE void rank(TopTwo<float> (&best)[2], const Tiles<Q>& high, const Tiles<Q>& low, const float (&unscale)[2],
                      const uint16_t* keys_b, const float* unscale_b, int plane_rows, int groups) {
  const int t = lane_index() & 3, stride = plane_stride(groups);
  const uint16_t* right = right_address(keys_b, stride);
  for (int j = 0; j < plane_rows; j += 16, right += 16 * stride) {
    pass<place::ranked>();
    float d[2][4] = {};
    if constexpr (split) {
      multiply_split(d, high, low, right, plane_rows * stride, groups);
    } else {
      multiply_raw<S>(d, high, right, groups);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int at = j + 8 * n + 2 * t;
      const float2 unscales = *(const float2*)(unscale_b + at);  // NaN behind the last destination
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        best[i].add(d[n][2 * i] * unscale[i] * unscales.x, at);
        best[i].add(d[n][2 * i + 1] * unscale[i] * unscales.y, at + 1);
      }
    }
  }
}

// Keys of two tokens, ready for products, and by what to multiply these.
template <class T, class S, bool split, int Q>
FPET_DEVICE void prepare(Tiles<Q>& high, Tiles<Q>& low, float (&unscale)[2], const MergeShortParams& p, const Weights& weights,
                         int64_t image, const int (&token)[2]) {
  if constexpr (split) {
    Strip<Q> keys;
    refined_keys<typename T::Key>(keys, weights, p.q, p.reads, image, token);
    split_keys(high, low, unscale, keys, p.q.cosine);
  } else {
    load_raw_keys<!T::any>(high, p.q, image, token, p.reads.key);
    unscale[0] = unscale[1] = 1.f;
    if (!p.q.cosine) return;
    sum_squares<S>(unscale, high);
#pragma unroll
    for (int i = 0; i < 2; ++i) unscale[i] = inverse_norm(sqrtf(unscale[i]));
  }
}

// Keeps what rows g and g + 8 of a strip have found; `writes` its results to memory, too.
FPET_DEVICE void keep_match(const MergeShortParams& p, TopTwo<float> (&best)[2], int64_t image, int row, bool writes) {
  const int num_a = int(p.q.num_a);
  uint32_t* members = (uint32_t*)(shared_memory() + p.layout.members);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    best[i].merge_lane(1);
    best[i].merge_lane(2);
    const int source = row + (lane_index() >> 2) + 8 * i;
    if ((lane_index() & 3) != 0 || source >= num_a) continue;
    float mid;
    best[i].settle(int(p.q.num_b), &mid);
    atomicOr(members + best[i].first_at * p.layout.words + source / 32, 1u << (source & 31));
    if (!writes) continue;
    const int64_t to = image * num_a + source;
    p.out.match[to] = p.q.prefix + best[i].first_at;
    p.out.second[to] = p.q.prefix + best[i].second_at;
    ((float*)p.out.mid)[to] = mid;
  }
}

template <class T, class S, bool split, int Q>
FPET_DEVICE void match_image(const MergeShortParams& p, int64_t image, bool writes) {
  char* memory = shared_memory();
  const Layout& at = p.layout;
  const int stride = plane_stride(p.groups);
  const Weights weights(memory + at.weights, p.hidden_groups, p.groups);
  if (split && p.q.hidden) fill_weights<!T::any, Q>(weights, p.q, p.reads.down, p.reads.up);
  pass<place::other>();
  __syncthreads();  // positions and weights

  // Destinations, then sources: one copy of the code that prepares keys.
#pragma unroll 1
  for (int matching = 0; matching < 2; ++matching) {
    const int rows = int(matching ? p.q.num_a : p.q.num_b);
    const int* tokens = (const int*)(memory + (matching ? at.token_a : at.token_b));
#pragma unroll 1
    for (int row = 16 * warp_index(); row < rows; row += 16 * kWarps) {
      const int g = lane_index_anew() >> 2, t = lane_index_anew() & 3;
      pass<place::strips>();
      int token[2];
      Tiles<Q> high, low;
      float unscale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) token[i] = row + g + 8 * i < rows ? tokens[row + g + 8 * i] : -1;
      prepare<T, S, split>(high, low, unscale, p, weights, image, token);
      uint16_t* keys_b = (uint16_t*)(memory + at.keys);
      float* unscale_b = (float*)(memory + at.unscale_b);
      if (matching) {
        TopTwo<float> best[2];
        rank<S, split>(best, high, low, unscale, keys_b, unscale_b, at.plane_rows, p.groups);
        pass<place::matched>();
        keep_match(p, best, image, row, writes);
      } else {
        pass<place::strips_kept>();
        store_tiles(keys_b, stride, row, high, p.groups);
        if (split) store_tiles(keys_b + at.plane_rows * stride, stride, row, low, p.groups);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (t == 0) unscale_b[row + g + 8 * i] = token[i] < 0 ? NAN : unscale[i];
      }
    }
    __syncthreads();
  }
}

// The sources of one destination, in increasing order.
struct Members {
  const uint32_t* words;
  int count, word = 0;
  uint32_t left;

  FPET_DEVICE Members(const uint32_t* words_, int count_) : words(words_), count(count_) { left = count > 0 ? words[0] : 0; }
  // The next source, or -1.
  FPET_DEVICE int next() {
    while (left == 0) {
      if (++word >= count) return -1;
      left = words[word];
    }
    const int bit = __ffs(int(left)) - 1;
    left &= left - 1;
    return 32 * word + bit;
  }
};

// A row's units of columns that a lane has under way: 16-byte vectors, or single elements.
template <class S, bool vectors>
struct Piece;
template <class S>
struct Piece<S, true> {
  uint4 raw[kVectors];

  FPET_DEVICE void load(const S* row, int64_t, int unit, int end) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (unit + 32 * u < end) raw[u] = load16((const uint4*)row + unit + 32 * u);
  }
};
template <class S>
struct Piece<S, false> {
  S raw[kVectors];

  FPET_DEVICE void load(const S* row, int64_t stride, int unit, int end) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (unit + 32 * u < end) raw[u] = row[(unit + 32 * u) * stride];
  }
};

// One row of sums in a lane.
template <class S, bool vectors>
struct Sums {
  static constexpr int count = vectors ? Lanes<S>::count : 1;
  float v[kVectors][count];

  template <class F>
  FPET_DEVICE void each(const Piece<S, vectors>& piece, int unit, int end, const F& f) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (unit + 32 * u >= end) break;
      if constexpr (vectors) {
        const Lanes<S> x = unpack<S>(piece.raw[u]);
#pragma unroll
        for (int e = 0; e < count; ++e) f(v[u][e], x.v[e]);
      } else {
        f(v[u][0], to_compute(piece.raw[u]));
      }
    }
  }
  FPET_DEVICE void store(S* row, int unit, int end, float n) const {
    const float inverse = 1.f / n;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (unit + 32 * u >= end) break;
      // Rounded to 16 bits the difference doesn't show.
      const auto mean = [&](float sum) { return sizeof(S) == 4 ? quotient(sum, n, inverse) : sum * inverse; };
      if constexpr (vectors) {
        Lanes<S> y;
#pragma unroll
        for (int e = 0; e < count; ++e) y.v[e] = mean(v[u][e]);
        store16((uint4*)row + unit + 32 * u, repack(y));
      } else {
        row[unit + 32 * u] = from_compute<S>(mean(v[u][0]));
      }
    }
  }
};

// This block's columns of all merged tokens: a warp takes the next row as soon as it is done with one.
template <class S, bool vectors>
FPET_DEVICE void merge_rows(const MergeShortParams& p, int64_t image, int part) {
  char* memory = shared_memory();
  const Layout& at = p.layout;
  const int *token_a = (const int*)(memory + at.token_a), *token_b = (const int*)(memory + at.token_b);
  const float *size_a = (const float*)(memory + at.size_a), *size_b = (const float*)(memory + at.size_b);
  const uint32_t* members = (const uint32_t*)(memory + at.members);
  int* next_row = (int*)(memory + at.next_row);
  const int lane = lane_index(), prefix = int(p.q.prefix), merged = prefix + int(p.q.num_b);
  const int begin = part * p.part_units, end = min(p.units, begin + p.part_units);
  const int64_t row_stride = p.q.x.stride[1], stride = p.q.x.stride[2];
  const S* x = (const S*)p.q.x.data + image * p.q.x.stride[0];
  S* y = (S*)p.out.tokens + image * merged * p.q.dim;

  int ticket = lane == 0 ? atomicAdd(next_row, 1) : 0;
  for (int row; (row = __shfl_sync(kFullWarp, ticket, 0)) < merged;) {
    pass<place::merged_row>();
    if (lane == 0) ticket = atomicAdd(next_row, 1);  // known by the time this row is done
    // Destinations first: prefix tokens have no sources, so the last to be taken are short.
    const int j = row < merged - prefix ? row : -1, m = j < 0 ? row - (merged - prefix) : prefix + j;
    const int64_t own = j < 0 ? m : token_b[j];
    const float weight = j >= 0 ? size_b[j]
                         : p.q.size.data != nullptr
                             ? load_any<float>(p.q.size, image * p.q.size.stride[0] + m * p.q.size.stride[1])
                             : 1.f;
    float n = weight;
    for (int unit = begin + lane; unit - lane < end; unit += 32 * kVectors) {
      Piece<S, vectors> now, later;
      Sums<S, vectors> sums;
      Members sources(members + j * at.words, j < 0 ? 0 : at.words);
      now.load(x + own * row_stride, stride, unit, end);
      int source = sources.next();
      if (source >= 0) later.load(x + int64_t(token_a[source]) * row_stride, stride, unit, end);
      n = weight;
      sums.each(now, unit, end, [&](float& sum, float v) { sum = weight * v; });
      while (source >= 0) {
        pass<place::merged_source>();
        now = later;
        const float w = size_a[source];
        n += w;
        source = sources.next();
        if (source >= 0) later.load(x + int64_t(token_a[source]) * row_stride, stride, unit, end);
        sums.each(now, unit, end, [&](float& sum, float v) { sum += w * v; });
      }
      pass<place::merged_written>();
      sums.store(y + m * p.q.dim, unit, end, n);
    }
    if (part == 0 && lane == 0) ((float*)p.out.merged_size)[image * merged + m] = n;
  }
}

// S is the type of keys whose products are exact as they are; split, float32 keys and those that something is added to. Two blocks on a
// multiprocessor, but for the widest split keys, for which nvcc 13.0 takes 236 registers (sm_90a); 128 would spill.
template <class T, class S, bool split, int Q>
__global__ void __launch_bounds__(kThreads, split&& Q > 2 ? 1 : 2) merge_short(const __grid_constant__ MergeShortParams p) {
  pass<place::other>();
  char* memory = shared_memory();
  const Problem& q = p.q;
  const Layout& at = p.layout;
  const int64_t image = blockIdx.x / unsigned(p.parts);
  const int part = int(blockIdx.x % unsigned(p.parts)), thread = int(threadIdx.x);
  const int num_a = int(q.num_a), num_b = int(q.num_b);

  if (p.reads.key) {
    const int64_t bytes = size_of(q.key.dtype);
    const char* key = (const char*)q.key.data + image * q.key.stride[0] * bytes;
    for (int head = 0; head < int(q.heads); ++head)
      prefetch_block(key + head * q.key.stride[1] * bytes, int(q.tokens), q.key.stride[2] * bytes, int(q.channels * bytes));
  }
  if (p.vectors) {
    const int64_t bytes = size_of(q.x.dtype);
    prefetch_block((const char*)q.x.data + image * q.x.stride[0] * bytes + int64_t(16) * part * p.part_units, p.prefetch_rows,
                   q.x.stride[1] * bytes, 16 * min(p.part_units, p.units - part * p.part_units));
  }
  for (int i = thread; i < num_a + num_b; i += kThreads) {
    pass<place::positions>();
    const bool is_a = i < num_a;
    const int64_t token = is_a ? source_token(q, i) : destination_token(q, i - num_a);
    const float size = q.size.data ? load_any<float>(q.size, image * q.size.stride[0] + token * q.size.stride[1]) : 1.f;
    (is_a ? (int*)(memory + at.token_a) + i : (int*)(memory + at.token_b) + i - num_a)[0] = int(token);
    (is_a ? (float*)(memory + at.size_a) + i : (float*)(memory + at.size_b) + i - num_a)[0] = size;
  }
  pass<place::other>();
  for (int i = thread; i < num_b * at.words; i += kThreads) ((uint32_t*)(memory + at.members))[i] = 0;
  if (thread == 0) *(int*)(memory + at.next_row) = 0;

  match_image<T, S, split, Q>(p, image, part == 0);

  if constexpr (!T::any) {
    merge_rows<typename T::Value, true>(p, image, part);
  } else if (q.x.dtype == DType::f32) {
    p.vectors ? merge_rows<float, true>(p, image, part) : merge_rows<float, false>(p, image, part);
  } else if (q.x.dtype == DType::bf16) {
    p.vectors ? merge_rows<bf16, true>(p, image, part) : merge_rows<bf16, false>(p, image, part);
  } else {
    p.vectors ? merge_rows<f16, true>(p, image, part) : merge_rows<f16, false>(p, image, part);
  }
}

bool splits_keys(const Problem& q) {
  return q.hidden || q.key_delta.data || q.heads != 1 || (q.key.dtype != DType::bf16 && q.key.dtype != DType::f16);
}

int groups_of(int64_t columns) { return int(ceil_div<int64_t>(columns, 32)); }

template <class T, class S, bool split, int Q>
CudaStatus start(const MergeShortParams& p, cudaStream_t stream) {
  return launch<merge_short<T, S, split, Q>>(dim3(unsigned(p.q.batch * p.parts)), kThreads, size_t(p.layout.total), stream, p);
}

template <class S, bool split>
CudaStatus start_any(const MergeShortParams& p, cudaStream_t stream) {
  return p.groups <= 2 && p.hidden_groups <= kHiddenGroups<2> ? start<Any<>, S, split, 2>(p, stream)
                                                              : start<Any<>, S, split, 4>(p, stream);
}

// Keys of K: split, or as they are where they can be.
template <class K, class X>
CudaStatus start_typed(const MergeShortParams& p, bool split, cudaStream_t stream) {
  if constexpr (sizeof(K) == 2) {
    if (!split) return start<Typed<K, X>, K, false, 2>(p, stream);
  }
  return start<Typed<K, X>, f16, true, 2>(p, stream);
}

// The pairs of types that a model has: all of one type, float32 x under autocast, and the float32 mean of the keys kept for a backward.
CudaStatus start_of_types(const MergeShortParams& p, bool split, cudaStream_t stream) {
  const Problem& q = p.q;
  const bool weights = !q.hidden || (p.reads.down && p.reads.up);
  if (p.vectors && p.reads.key && weights && !q.dropout_mask.data && !q.key_delta.data && p.groups <= 2 &&
      p.hidden_groups <= kHiddenGroups<2>) {
    const DType x = q.x.dtype;
    switch (q.key.dtype) {
      case DType::bf16:
        if (x == DType::bf16) return start_typed<bf16, bf16>(p, split, stream);
        if (x == DType::f32) return start_typed<bf16, float>(p, split, stream);
        break;
      case DType::f16:
        if (x == DType::f16) return start_typed<f16, f16>(p, split, stream);
        if (x == DType::f32) return start_typed<f16, float>(p, split, stream);
        break;
      case DType::f32:
        if (x == DType::bf16) return start_typed<float, bf16>(p, split, stream);
        if (x == DType::f16) return start_typed<float, f16>(p, split, stream);
        if (x == DType::f32) return start_typed<float, float>(p, split, stream);
        break;
      default: break;
    }
  }
  if (split) return start_any<f16, true>(p, stream);
  return q.key.dtype == DType::bf16 ? start_any<bf16, false>(p, stream) : start_any<f16, false>(p, stream);
}

size_t shared_of(const Problem& q) {
  return size_t(Layout(q, groups_of(q.channels), groups_of(q.hidden), splits_keys(q)).total);
}

}  // namespace

bool forward_short_takes(const Problem& q) {
  if (q.wide_scores || q.x.dtype == DType::f64 || q.channels > 128 || q.hidden > 32 * kHiddenGroups<4>) return false;
  if (q.num_a > kMaxSources || q.num_b > (splits_keys(q) ? kMaxSplitDestinations : kMaxDestinations)) return false;
  return q.tokens <= INT32_MAX && shared_of(q) <= limits().shared_per_block;
}

CudaStatus forward_short(const Problem& q, const ForwardOutputs& out, cudaStream_t stream) {
  const Limits& gpu = limits();
  const bool split = splits_keys(q);
  MergeShortParams p;
  p.q = q;
  p.out = out;
  p.groups = groups_of(q.channels);
  p.hidden_groups = groups_of(q.hidden);
  p.layout = Layout(q, p.groups, p.hidden_groups, split);
  p.reads = KeyReads(q);
  const int bytes = size_of(q.x.dtype);
  p.vectors = q.x.stride[2] == 1 && aligned16(q.x.data, q.x.dtype, {q.dim, q.x.stride[0], q.x.stride[1]}) &&
              aligned16(out.tokens, q.x.dtype, {});
  p.units = int(p.vectors ? q.dim * bytes / 16 : q.dim);
  // Two blocks a multiprocessor where matching anew is cheap, one where it isn't; no less than a line of columns in each.
  const int64_t wanted = std::max<int64_t>(1, gpu.multiprocessors * (split ? 1 : 2) / std::max<int64_t>(q.batch, 1));
  const int line = p.vectors ? 8 : 128 / bytes;
  p.part_units = round_up(ceil_div(p.units, int(std::min<int64_t>(wanted, p.units))), line);
  p.parts = ceil_div(p.units, p.part_units);
  const int64_t resident = std::min<int64_t>(q.batch * p.parts, 2 * gpu.multiprocessors);
  p.prefetch_rows =
      int(std::min<int64_t>(q.tokens, int64_t(gpu.l2_bytes / 2) / std::max<int64_t>(1, resident * 16 * p.part_units)));
  return start_of_types(p, split, stream);
}

KernelList forward_short_kernels() {
  const auto shared = [](bool refined, int64_t channels, int64_t hidden) {
    Problem q = typical_problem(refined);
    q.channels = channels;
    q.hidden = hidden;
    return shared_of(q);
  };
  const size_t raw = shared(false, 64, 0), split = shared(true, 64, 32);
  return {
      entry<merge_short<Typed<bf16, bf16>, bf16, false, 2>>("merge_short<bf16 keys, bf16>", kThreads, raw),
      entry<merge_short<Typed<bf16, float>, bf16, false, 2>>("merge_short<bf16 keys, float>", kThreads, raw),
      entry<merge_short<Typed<f16, f16>, f16, false, 2>>("merge_short<f16 keys, f16>", kThreads, raw),
      entry<merge_short<Typed<f16, float>, f16, false, 2>>("merge_short<f16 keys, float>", kThreads, raw),
      entry<merge_short<Typed<bf16, bf16>, f16, true, 2>>("merge_short<split bf16 keys, bf16>", kThreads, split),
      entry<merge_short<Typed<bf16, float>, f16, true, 2>>("merge_short<split bf16 keys, float>", kThreads, split),
      entry<merge_short<Typed<f16, f16>, f16, true, 2>>("merge_short<split f16 keys, f16>", kThreads, split),
      entry<merge_short<Typed<f16, float>, f16, true, 2>>("merge_short<split f16 keys, float>", kThreads, split),
      entry<merge_short<Typed<float, bf16>, f16, true, 2>>("merge_short<split float keys, bf16>", kThreads, split),
      entry<merge_short<Typed<float, f16>, f16, true, 2>>("merge_short<split float keys, f16>", kThreads, split),
      entry<merge_short<Typed<float, float>, f16, true, 2>>("merge_short<split float keys, float>", kThreads, split),
      entry<merge_short<Any<>, bf16, false, 2>>("merge_short<bf16, 64>", kThreads, raw),
      entry<merge_short<Any<>, bf16, false, 4>>("merge_short<bf16, 128>", kThreads, shared(false, 128, 0)),
      entry<merge_short<Any<>, f16, false, 2>>("merge_short<f16, 64>", kThreads, raw),
      entry<merge_short<Any<>, f16, false, 4>>("merge_short<f16, 128>", kThreads, shared(false, 128, 0)),
      entry<merge_short<Any<>, f16, true, 2>>("merge_short<split, 64>", kThreads, split),
      entry<merge_short<Any<>, f16, true, 4>>("merge_short<split, 128>", kThreads, shared(true, 128, 64)),
  };
}

}  // namespace cuda
}  // namespace fpet
