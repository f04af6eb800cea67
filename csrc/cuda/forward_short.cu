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

struct ShortForward {
  Problem p;
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
template <class S, bool split, int Q>
FPET_DEVICE void prepare(Tiles<Q>& high, Tiles<Q>& low, float (&unscale)[2], const ShortForward& k, const Weights& weights,
                         int64_t image, const int (&token)[2]) {
  if constexpr (split) {
    Strip<Q> keys;
    refined_keys(keys, weights, k.p, k.reads, image, token);
    split_keys(high, low, unscale, keys, k.p.cosine);
  } else {
    load_raw_keys(high, k.p, image, token, k.reads.key);
    unscale[0] = unscale[1] = 1.f;
    if (!k.p.cosine) return;
    sum_squares<S>(unscale, high);
#pragma unroll
    for (int i = 0; i < 2; ++i) unscale[i] = inverse_norm(sqrtf(unscale[i]));
  }
}

// Keeps what rows g and g + 8 of a strip have found; `writes` its results to memory, too.
FPET_DEVICE void keep_match(const ShortForward& k, TopTwo<float> (&best)[2], int64_t image, int row, bool writes) {
  const int num_a = int(k.p.num_a);
  uint32_t* members = (uint32_t*)(shared_memory() + k.layout.members);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    best[i].merge_lane(1);
    best[i].merge_lane(2);
    const int source = row + (lane_index() >> 2) + 8 * i;
    if ((lane_index() & 3) != 0 || source >= num_a) continue;
    float mid;
    best[i].settle(int(k.p.num_b), &mid);
    atomicOr(members + best[i].first_at * k.layout.words + source / 32, 1u << (source & 31));
    if (!writes) continue;
    const int64_t to = image * num_a + source;
    k.out.match[to] = k.p.prefix + best[i].first_at;
    k.out.second[to] = k.p.prefix + best[i].second_at;
    ((float*)k.out.mid)[to] = mid;
  }
}

template <class S, bool split, int Q>
FPET_DEVICE void match_image(const ShortForward& k, int64_t image, bool writes) {
  char* memory = shared_memory();
  const Layout& at = k.layout;
  const int stride = plane_stride(k.groups);
  const Weights weights(memory + at.weights, k.hidden_groups, k.groups);
  if (split && k.p.hidden) fill_weights<Q>(weights, k.p, k.reads.down, k.reads.up);
  __syncthreads();  // positions and weights

  // Destinations, then sources: one copy of the code that prepares keys.
#pragma unroll 1
  for (int matching = 0; matching < 2; ++matching) {
    const int rows = int(matching ? k.p.num_a : k.p.num_b);
    const int* tokens = (const int*)(memory + (matching ? at.token_a : at.token_b));
#pragma unroll 1
    for (int row = 16 * warp_index(); row < rows; row += 16 * kWarps) {
      const int g = lane_index_anew() >> 2, t = lane_index_anew() & 3;
      int token[2];
      Tiles<Q> high, low;
      float unscale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) token[i] = row + g + 8 * i < rows ? tokens[row + g + 8 * i] : -1;
      prepare<S, split>(high, low, unscale, k, weights, image, token);
      uint16_t* keys_b = (uint16_t*)(memory + at.keys);
      float* unscale_b = (float*)(memory + at.unscale_b);
      if (matching) {
        TopTwo<float> best[2];
        rank<S, split>(best, high, low, unscale, keys_b, unscale_b, at.plane_rows, k.groups);
        keep_match(k, best, image, row, writes);
      } else {
        store_tiles(keys_b, stride, row, high, k.groups);
        if (split) store_tiles(keys_b + at.plane_rows * stride, stride, row, low, k.groups);
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
FPET_DEVICE void merge_rows(const ShortForward& k, int64_t image, int part) {
  char* memory = shared_memory();
  const Layout& at = k.layout;
  const int *token_a = (const int*)(memory + at.token_a), *token_b = (const int*)(memory + at.token_b);
  const float *size_a = (const float*)(memory + at.size_a), *size_b = (const float*)(memory + at.size_b);
  const uint32_t* members = (const uint32_t*)(memory + at.members);
  int* next_row = (int*)(memory + at.next_row);
  const int lane = lane_index(), prefix = int(k.p.prefix), merged = prefix + int(k.p.num_b);
  const int begin = part * k.part_units, end = min(k.units, begin + k.part_units);
  const int64_t row_stride = k.p.x.stride[1], stride = k.p.x.stride[2];
  const S* x = (const S*)k.p.x.data + image * k.p.x.stride[0];
  S* y = (S*)k.out.tokens + image * merged * k.p.dim;

  int ticket = lane == 0 ? atomicAdd(next_row, 1) : 0;
  for (int row; (row = __shfl_sync(kFullWarp, ticket, 0)) < merged;) {
    if (lane == 0) ticket = atomicAdd(next_row, 1);  // known by the time this row is done
    // Destinations first: prefix tokens have no sources, so the last to be taken are short.
    const int j = row < merged - prefix ? row : -1, m = j < 0 ? row - (merged - prefix) : prefix + j;
    const int64_t own = j < 0 ? m : token_b[j];
    const float weight = j >= 0 ? size_b[j]
                         : k.p.size.data != nullptr
                             ? load_any<float>(k.p.size, image * k.p.size.stride[0] + m * k.p.size.stride[1])
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
        now = later;
        const float w = size_a[source];
        n += w;
        source = sources.next();
        if (source >= 0) later.load(x + int64_t(token_a[source]) * row_stride, stride, unit, end);
        sums.each(now, unit, end, [&](float& sum, float v) { sum += w * v; });
      }
      sums.store(y + m * k.p.dim, unit, end, n);
    }
    if (part == 0 && lane == 0) ((float*)k.out.merged_size)[image * merged + m] = n;
  }
}

// S is the type of keys whose products are exact as they are; split, float32 keys and those that something is added to.
template <class S, bool split, int Q>
__global__ void __launch_bounds__(kThreads, split&& Q > 2 ? 1 : 2) merge_short(const __grid_constant__ ShortForward k) {
  char* memory = shared_memory();
  const Problem& p = k.p;
  const Layout& at = k.layout;
  const int64_t image = blockIdx.x / unsigned(k.parts);
  const int part = int(blockIdx.x % unsigned(k.parts)), thread = int(threadIdx.x);
  const int num_a = int(p.num_a), num_b = int(p.num_b);

  if (k.reads.key) {
    const int64_t bytes = size_of(p.key.dtype);
    const char* key = (const char*)p.key.data + image * p.key.stride[0] * bytes;
    for (int head = 0; head < int(p.heads); ++head)
      prefetch_block(key + head * p.key.stride[1] * bytes, int(p.tokens), p.key.stride[2] * bytes, int(p.channels * bytes));
  }
  if (k.vectors) {
    const int64_t bytes = size_of(p.x.dtype);
    prefetch_block((const char*)p.x.data + image * p.x.stride[0] * bytes + int64_t(16) * part * k.part_units, k.prefetch_rows,
                   p.x.stride[1] * bytes, 16 * min(k.part_units, k.units - part * k.part_units));
  }
  for (int i = thread; i < num_a + num_b; i += kThreads) {
    const bool is_a = i < num_a;
    const int64_t token = is_a ? source_token(p, i) : destination_token(p, i - num_a);
    const float size = p.size.data ? load_any<float>(p.size, image * p.size.stride[0] + token * p.size.stride[1]) : 1.f;
    (is_a ? (int*)(memory + at.token_a) + i : (int*)(memory + at.token_b) + i - num_a)[0] = int(token);
    (is_a ? (float*)(memory + at.size_a) + i : (float*)(memory + at.size_b) + i - num_a)[0] = size;
  }
  for (int i = thread; i < num_b * at.words; i += kThreads) ((uint32_t*)(memory + at.members))[i] = 0;
  if (thread == 0) *(int*)(memory + at.next_row) = 0;

  match_image<S, split, Q>(k, image, part == 0);

  if (p.x.dtype == DType::f32) {
    k.vectors ? merge_rows<float, true>(k, image, part) : merge_rows<float, false>(k, image, part);
  } else if (p.x.dtype == DType::bf16) {
    k.vectors ? merge_rows<bf16, true>(k, image, part) : merge_rows<bf16, false>(k, image, part);
  } else {
    k.vectors ? merge_rows<f16, true>(k, image, part) : merge_rows<f16, false>(k, image, part);
  }
}

bool splits_keys(const Problem& p) {
  return p.hidden || p.key_delta.data || p.heads != 1 || (p.key.dtype != DType::bf16 && p.key.dtype != DType::f16);
}

int groups_of(int64_t columns) { return int(ceil_div<int64_t>(columns, 32)); }

template <class S, bool split, int Q>
CudaStatus start(const ShortForward& k, cudaStream_t stream) {
  const auto kernel = merge_short<S, split, Q>;
  return launch("merge_short", kernel, dim3(unsigned(k.p.batch * k.parts)), kThreads, size_t(k.layout.total), stream, k);
}

template <class S, bool split>
CudaStatus start_width(const ShortForward& k, cudaStream_t stream) {
  return k.groups <= 2 && k.hidden_groups <= kHiddenGroups<2> ? start<S, split, 2>(k, stream) : start<S, split, 4>(k, stream);
}

}  // namespace

bool forward_short_takes(const Problem& p) {
  const bool split = splits_keys(p);
  if (p.wide_scores || p.x.dtype == DType::f64 || p.channels > 128 || p.hidden > 32 * kHiddenGroups<4>) return false;
  if (p.num_a > kMaxSources || p.num_b > (split ? kMaxSplitDestinations : kMaxDestinations)) return false;
  if (p.tokens > INT32_MAX) return false;
  return size_t(Layout(p, groups_of(p.channels), groups_of(p.hidden), split).total) <= limits().shared_per_block;
}

CudaStatus forward_short(const Problem& p, const ForwardOutputs& out, cudaStream_t stream) {
  const Limits& gpu = limits();
  const bool split = splits_keys(p);
  ShortForward k;
  k.p = p;
  k.out = out;
  k.groups = groups_of(p.channels);
  k.hidden_groups = groups_of(p.hidden);
  k.layout = Layout(p, k.groups, k.hidden_groups, split);
  k.reads = KeyReads(p);
  const int bytes = size_of(p.x.dtype);
  const bool contiguous = p.x.stride[2] == 1 || p.dim == 1;
  k.vectors = contiguous && aligned16(p.x.data, p.x.dtype, {p.dim, p.x.stride[0], p.x.stride[1]}) &&
              aligned16(out.tokens, p.x.dtype, {});
  k.units = int(k.vectors ? p.dim * bytes / 16 : p.dim);
  // Two blocks a multiprocessor where matching anew is cheap, one where it isn't; no less than a line of columns in each.
  const int64_t wanted = std::max<int64_t>(1, gpu.multiprocessors * (split ? 1 : 2) / std::max<int64_t>(p.batch, 1));
  const int line = k.vectors ? 8 : 128 / bytes;
  k.part_units = round_up(ceil_div(k.units, int(std::min<int64_t>(wanted, k.units))), line);
  k.parts = ceil_div(k.units, k.part_units);
  const int64_t resident = std::min<int64_t>(p.batch * k.parts, 2 * gpu.multiprocessors);
  k.prefetch_rows =
      int(std::min<int64_t>(p.tokens, int64_t(gpu.l2_bytes / 2) / std::max<int64_t>(1, resident * 16 * k.part_units)));
  if (split) return start_width<f16, true>(k, stream);
  return p.key.dtype == DType::bf16 ? start_width<bf16, false>(k, stream) : start_width<f16, false>(k, stream);
}

KernelList forward_short_kernels() {
  static const KernelEntry entries[] = {
      {"merge_short<bf16, 64>", (const void*)merge_short<bf16, false, 2>, kThreads, 24 << 10},
      {"merge_short<bf16, 128>", (const void*)merge_short<bf16, false, 4>, kThreads, 40 << 10},
      {"merge_short<f16, 64>", (const void*)merge_short<f16, false, 2>, kThreads, 24 << 10},
      {"merge_short<f16, 128>", (const void*)merge_short<f16, false, 4>, kThreads, 40 << 10},
      {"merge_short<split, 64>", (const void*)merge_short<f16, true, 2>, kThreads, 56 << 10},
      {"merge_short<split, 128>", (const void*)merge_short<f16, true, 4>, kThreads, 108 << 10},
  };
  return {entries, int(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace cuda
}  // namespace fpet
