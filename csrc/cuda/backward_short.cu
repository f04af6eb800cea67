// Backward of short grids in one launch: a block takes an image. G, the sources of x, y and the keys are read once; dx, dsize and what
// the key path asks for are written once, and nothing in between but an image's share of the weights' gradient.
//
// D comes in steps of 128 bytes, G and sources through a ring in shared memory: while a step is there, its columns of dx are written
// and G · y, G · x summed up, and matrix units add to dM, which stays in registers. Then k' of all rows is formed in shared memory,
// dM becomes ds, and ds is multiplied with k' on either side, 32 sources at a time; dk' takes the place of k'.
#include "backward.cuh"

namespace fpet {
namespace cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;  // four by four warps with 32 × 32 of dM each

// At most: sources and destinations, channels, hidden units.
constexpr int kSide = 128, kChannels = 64, kHidden = 32;

constexpr int kPanel = kSide * kRowBytes, kStep = 2 * kPanel;  // a stage of the ring: sources of x, then G
constexpr int kBand = 32;                                      // sources whose ds is in shared memory
// Rows of k', of a band of ds: for neither of the ways in which matrix units read them all lanes meet in few banks.
constexpr int kKeyStride = kChannels + 4, kBandStride = kSide + 8;

// By row, sources first: 128 of either.
struct RowVectors {
  int token[2 * kSide];  // -1 where there is none

  float mid[kSide], size[kSide], inverse_n[kSide], gamma[kSide], inverse[2 * kSide];  // the last: of the norm of k'
  uint8_t target[kSide], second[kSide];
  union {
    float ratio[2 * kSide];             // size over the merged size, until dx is written
    float sums[4][kSide];               // of ds by source, then of k' · dk̂ by destination, over the columns of a warp
    float along[kChannels / 8][kBand];  // k' · dk̂ of a band, by eight channels
  };
};

static_assert(sizeof(RowVectors) % 128 == 0, "the ring follows");
constexpr int kChunk = 32;  // rows summed into weights at a time
static_assert(kChunk * (kHidden + 4) * sizeof(float) <= sizeof(RowVectors) - sizeof(RowVectors::token),
              "gradients of hidden units");

struct ImageGradientParams {
  SpreadParams s;  // of what is asked for here, too; γ' stays in shared memory
  BackwardOutputs out;
  float* weight_parts;                // (B, 2, C h): dW_up, then dW_down
  int rows_a, rows_b;                 // in shared memory, multiples of 16, the last ones zeros
  int channels, hidden, unit_stride;  // rounded up to multiples of 16
  int unit_rows, chunk;               // rows refined, and rows summed into weights, at a time
  int tail, down, up, pool;           // offsets in shared memory, the last three within the tail
  int stages;
  bool ahead;  // the ring has memory of its own and fetches the next image before this one is done
  bool aligned_keys, short_keys, aligned_x, aligned_grad;
  size_t bytes;

  // Bytes of shared memory besides the row vectors and the ring.
  size_t plan(const Problem& q) {
    rows_a = int(round_up(q.num_a, int64_t(16))), rows_b = int(round_up(q.num_b, int64_t(16)));
    channels = int(round_up(q.channels, int64_t(16))), hidden = int(round_up(q.hidden, int64_t(16)));
    unit_stride = hidden + 4;
    const int keys = (rows_a + rows_b) * kKeyStride * 4, band = kBand * kBandStride * 4;
    const int weights = hidden ? (hidden * kKeyStride + channels * unit_stride) * 4 : 0;
    down = keys, up = down + hidden * kKeyStride * 4, pool = keys + weights;
    const auto total = [&] {
      const int units = unit_rows * unit_stride * 4, summed = chunk * (kKeyStride + unit_stride) * 4;
      return size_t(keys + max(band, hidden ? weights + max(units, summed) : 0));
    };
    unit_rows = 64, chunk = kChunk;
    if (sizeof(RowVectors) + total() > kSharedEverywhere) unit_rows = chunk = 16;
    return total();
  }
  // The whole of it: a ring of its own where there is room, so that the next image comes while this one's keys are worked on.
  void plan_memory(const Problem& q, const Limits& gpu) {
    const size_t rest = plan(q), room = gpu.shared_per_block - sizeof(RowVectors);
    ahead = room >= rest + 2 * kStep;
    stages = int(min(size_t(4), (room - (ahead ? rest : 0)) / kStep));
    const size_t ring = size_t(stages * kStep);
    tail = int(sizeof(RowVectors) + (ahead ? ring : 0));
    bytes = sizeof(RowVectors) + (ahead ? ring + rest : max(ring, rest));
  }
};

using StepRing = Ring<kStep>;

// Where the ring is filled from next.
struct Source {
  int image, first;  // column
};

template <class S>
struct StepLoader {
  static constexpr int kDepth = kRowBytes / int(sizeof(S));
  const ImageGradientParams& p;
  Source& from;

  FPET_DEVICE void operator()(char* stage) const {
    const Problem& q = p.s.q;
    const View& grad = p.s.in.grad_tokens;
    if (from.image >= q.batch) return;
    const int* token = ((const RowVectors*)shared_memory())->token;
    const S* x = (const S*)q.x.data + from.image * q.x.stride[0];
    const S* g = (const S*)grad.data + from.image * grad.stride[0] + q.prefix * grad.stride[1];
    const int thread = opaque(int(threadIdx.x)), at = from.first + thread % 8 * (16 / int(sizeof(S)));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = thread / 8 + 64 * r, t = token[row];
      char* to = stage + turned(row, thread % 8);
      copy_row_chunk(to, x + max(t, 0) * q.x.stride[1], at, int(q.dim), q.x.stride[2], p.aligned_x, t >= 0);
      copy_row_chunk(to + kPanel, g + row * grad.stride[1], at, int(q.dim), grad.stride[2], p.aligned_grad, row < int(q.num_b));
    }
    from.first += kDepth;
    if (from.first < q.dim) return;
    from.first = 0;
    from.image = p.ahead ? from.image + int(gridDim.x) : int(q.batch);
  }
};

// --- the parts of an image's work -----------------------------------------------------------------------------------------------------

FPET_DEVICE RowVectors& row_vectors() { return *(RowVectors*)shared_memory(); }
FPET_DEVICE float* key_rows(const ImageGradientParams& p) { return (float*)(shared_memory() + p.tail); }
FPET_DEVICE float* in_tail(const ImageGradientParams& p, int offset) { return (float*)(shared_memory() + p.tail + offset); }
// Where a row of k' is among the vectors.
FPET_DEVICE int vector_row(const ImageGradientParams& p, int row) { return row < p.rows_a ? row : kSide + row - p.rows_a; }
FPET_DEVICE float2 pair_along(const float* at) { return *(const float2*)at; }
FPET_DEVICE float2 pair_across(const float* at, int stride) { return make_float2(at[0], at[stride]); }

// f(row, column, value) for what a lane has of a 16 × 8 tile at (row, column).
template <class F>
FPET_DEVICE void each_of_tile(const float (&d)[4], int row, int column, const F& f) {
  const int lane = lane_index_anew();
  row += lane / 4, column += lane % 4 * 2;
#pragma unroll
  for (int e = 0; e < 4; ++e) f(row + e / 2 * 8, column + e % 2, d[e]);
}

FPET_DEVICE void find_rows(const ImageGradientParams& p) {
  const Problem& q = p.s.q;
  RowVectors& v = row_vectors();
  for (int i = int(threadIdx.x); i < 2 * kSide; i += kThreads) {
    const int j = i - kSide;
    v.token[i] = j < 0 ? i < q.num_a ? int(source_token(q, i)) : -1 : j < q.num_b ? int(destination_token(q, j)) : -1;
  }
}

FPET_DEVICE void load_vectors(const ImageGradientParams& p, int64_t image) {
  const Problem& q = p.s.q;
  const View& merged = p.s.in.merged_size;
  RowVectors& v = row_vectors();
  for (int i = int(threadIdx.x); i < 2 * kSide; i += kThreads) {
    const int token = v.token[i];
    const bool source = i < kSide;
    const int64_t at = image * q.num_a + i;
    int target = i - kSide;
    float size = 0.f, n = 1.f;
    if (token >= 0) {
      if (source) target = int(matched(q, p.s.in.match[at]) - q.prefix);
      size = q.size.data ? load_any<float>(q.size, image * q.size.stride[0] + token * q.size.stride[1]) : 1.f;
      n = load_any<float>(merged, image * merged.stride[0] + (q.prefix + target) * merged.stride[1]);
    } else if (source) {
      target = 0;
    }
    v.ratio[i] = size / n;
    if (source) {
      v.target[i] = uint8_t(target);
      v.second[i] = uint8_t(token < 0 ? 0 : matched(q, p.s.in.second[at]) - q.prefix);
      v.mid[i] = token < 0 ? 0.f : ((const float*)p.s.in.mid)[at];
      v.size[i] = size;
    } else {
      v.inverse_n[i - kSide] = 1.f / n;
    }
  }
}

// Every column of G, and with it dx, dsize, γ' and the image's dM without γ'.
template <class S>
FPET_DEVICE void spread_image(const ImageGradientParams& p, int image, Tile& grad, StepRing& ring, Source& from) {
  constexpr int lanes = Lanes<S>::count, kDepth = StepLoader<S>::kDepth;
  const SpreadParams& s = p.s;
  const Problem& q = s.q;
  const View& y = s.in.tokens;
  RowVectors& v = row_vectors();
  const int thread = opaque(int(threadIdx.x));
  const int own = thread / 8, piece = thread % 8;  // rows own and own + 64, one of the step's eight pieces
  const bool wants_size = s.grad_size != nullptr;
  const StepLoader<S> fill{p, from};
  if (!p.ahead || image == int(blockIdx.x)) {
    from = {image, 0};
    ring.start(fill);
  }
  for (int64_t row = opaque(warp_index()) * 4; row < q.prefix; row += kThreads / kRowLanes)
    spread_row<S>(s, image, row + opaque(lane_index()) / kRowLanes, q.prefix);
  float along_y[2] = {0.f, 0.f}, along_b[2] = {0.f, 0.f}, along_a[2] = {0.f, 0.f};
  for (int d = 0; d < int(q.dim); d += kDepth) {
    pass<place::steps>();
    const char* stage = ring.next(fill);
    const int at = d + piece * lanes;
    uint4 y_raw[2], x_raw[2];
    const auto load_rows = [&] {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int j = own + 64 * r, token = v.token[kSide + j];
        const S* y_row = (const S*)y.data + image * y.stride[0] + (q.prefix + j) * y.stride[1];
        const S* x_row = (const S*)q.x.data + image * q.x.stride[0] + token * q.x.stride[1];
        y_raw[r] = load_piece(y_row, at, q.dim, y.stride[2], s.aligned, token >= 0);
        x_raw[r] = load_piece(x_row, at, q.dim, q.x.stride[2], s.aligned, wants_size && token >= 0);
      }
    };
    if (sizeof(S) == 2) load_rows();  // under way during the products; those of float32 need the registers
    add_products<S, false>(grad, stage, stage + kPanel);
    pass<place::step_rows>();
    if (sizeof(S) == 4) load_rows();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = own + 64 * r;
#pragma unroll
      for (int side = 0; side < 2; ++side) {  // sources, destinations
        const int token = v.token[side * kSide + row];
        if (token < 0) continue;
        Lanes<S> g = unpack<S>(*(const uint4*)(stage + kPanel + turned(side ? row : v.target[row], piece)));
        if (side) {
          add_along(along_y[r], g, unpack<S>(y_raw[r]));
          add_along(along_b[r], g, unpack<S>(x_raw[r]));
        } else if (wants_size) {
          add_along(along_a[r], g, unpack<S>(*(const uint4*)(stage + turned(row, piece))));
        }
        if (!s.grad_x) continue;
        scale_lanes(g, v.ratio[side * kSide + row]);
        store_piece((S*)s.grad_x + (image * q.tokens + token) * q.dim, at, q.dim, s.aligned, repack<S>(g));
      }
    }
  }
  pass<place::steps_done>();
  const View &sizes = s.in.merged_size, &own_grad = s.in.grad_size;
  const auto merged = [&](int j) { return load_any<float>(sizes, image * sizes.stride[0] + (q.prefix + j) * sizes.stride[1]); };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int j = own + 64 * r;
    along_y[r] = warp_sum<kRowLanes>(along_y[r]), along_b[r] = warp_sum<kRowLanes>(along_b[r]);
    along_a[r] = warp_sum<kRowLanes>(along_a[r]);
    if (piece != 0 || j >= q.num_b) continue;
    const float n = merged(j);
    const float gamma =
        (own_grad.data ? load_any<float>(own_grad, image * own_grad.stride[0] + (q.prefix + j) * own_grad.stride[1]) : 0.f) -
        along_y[r] / n;
    v.gamma[j] = gamma;
    if (wants_size) store_any(s.grad_size, s.size_dtype, image * q.tokens + v.token[kSide + j], gamma + along_b[r] / n);
  }
  __syncthreads();
  if (!wants_size || piece != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = own + 64 * r;
    if (i >= q.num_a) continue;
    store_any(s.grad_size, s.size_dtype, image * q.tokens + v.token[i],
              v.gamma[v.target[i]] + along_a[r] / merged(v.target[i]));
  }
}

// Means over heads of `rows` rows of k' from `first` on, to (rows, kKeyStride); zeros where there is no token, and behind the last channel.
FPET_DEVICE void load_keys(const ImageGradientParams& p, int64_t image, int first, int rows, float* to) {
  const Problem& q = p.s.q;
  const int lanes = p.aligned_keys ? 16 / size_of(q.key.dtype) : 1, chunks = ceil_div(p.channels, lanes);
  const int at_once = kThreads / chunks, own = int(threadIdx.x) / chunks, c = (int(threadIdx.x) - own * chunks) * lanes;
  if (own >= at_once) return;  // chunks are no divisor of the threads
  for (int r = own; r < rows; r += at_once) {
    pass<place::keys>();
    const int token = row_vectors().token[vector_row(p, first + r)];
    float* at = to + r * kKeyStride + c;
    if (token >= 0 && c < int(q.channels)) {
      mean_key(q, p.aligned_keys, image, token, c, at);
    } else {
      for (int l = 0; l < lanes; ++l) at[l] = 0.f;
    }
  }
}

// A matrix of `rows` × `columns`, with zeros behind them, to shared memory: a row by a warp.
template <class S>
FPET_DEVICE void load_matrix(const View& view, int rows, int columns, int padded_rows, int padded_columns, float* to,
                             int stride) {
  for (int r = warp_index(); r < padded_rows; r += kWarps)
    for (int c = lane_index(); c < padded_columns; c += 32) {
      pass<place::matrix>();
      const bool exists = r < rows && c < columns;
      to[r * stride + c] = exists ? to_compute(((const S*)view.data)[r * view.stride[0] + c * view.stride[1]]) : 0.f;
    }
}

FPET_DEVICE void load_matrix(const View& view, int64_t rows, int64_t columns, int padded_rows, int padded_columns, float* to,
                             int stride) {
  if (view.dtype == DType::f32) {
    load_matrix<float>(view, int(rows), int(columns), padded_rows, padded_columns, to, stride);
  } else if (view.dtype == DType::bf16) {
    load_matrix<bf16>(view, int(rows), int(columns), padded_rows, padded_columns, to, stride);
  } else {
    load_matrix<f16>(view, int(rows), int(columns), padded_rows, padded_columns, to, stride);
  }
}

FPET_DEVICE void load_weights(const ImageGradientParams& p) {
  const Problem& q = p.s.q;
  load_matrix(q.w_down, q.hidden, q.channels, p.hidden, p.channels, in_tail(p, p.down), kKeyStride);
  load_matrix(q.w_up, q.channels, q.hidden, p.channels, p.hidden, in_tail(p, p.up), p.unit_stride);
  pass<place::matrices_loaded>();
}

// What the dropout mask makes of hidden unit h of a row of k'.
FPET_DEVICE float masked(const ImageGradientParams& p, int64_t image, int row, int h, float value) {
  const View& mask = p.s.q.dropout_mask;
  const int token = row_vectors().token[vector_row(p, row)];
  if (!mask.data || token < 0 || h >= p.s.q.hidden) return value;
  return value * load_any<float>(mask, image * mask.stride[0] + token * mask.stride[1] + h * mask.stride[2]);
}

// A tile of ReLU(key W_downᵀ) ⊙ mask, to `units`: rows of keys from `row` on, which are rows `first` .. of k'.
FPET_DEVICE void form_units(const ImageGradientParams& p, int64_t image, const float* keys, int first, int tile, float* units) {
  const int row = tile / (p.hidden / 8) * 16, column = tile % (p.hidden / 8) * 8;
  const float* down = in_tail(p, p.down);
  float d[1][1][4] = {};
  multiply_wide<place::units, 1, 1>(
      d, p.channels, false, [&](int r, int k) { return pair_along(keys + (row + r) * kKeyStride + k); },
      [&](int h, int k) { return pair_along(down + (column + h) * kKeyStride + k); });
  each_of_tile(d[0][0], row, column, [&](int r, int h, float v) {
    units[r * p.unit_stride + h] = masked(p, image, first + r, h, v < 0.f ? 0.f : v);  // NaN passes
  });
}

// k' of all rows, their norms and inverses.
FPET_DEVICE void prepare_image(const ImageGradientParams& p, int64_t image) {
  const Problem& q = p.s.q;
  RowVectors& v = row_vectors();
  float* keys = key_rows(p);
  const int rows = p.rows_a + p.rows_b;
  load_keys(p, image, 0, rows, keys);
  pass<place::keys_loaded>();
  if (p.hidden) {
    load_weights(p);
    float *units = in_tail(p, p.pool), *up = in_tail(p, p.up);
#pragma unroll 1
    for (int first = 0; first < rows; first += p.unit_rows) {
      const int strips = min(p.unit_rows, rows - first) / 16;
      __syncthreads();
      for (int tile = warp_index(); tile < strips * (p.hidden / 8); tile += kWarps)
        form_units(p, image, keys + first * kKeyStride, first, tile, units);
      __syncthreads();
      for (int tile = warp_index(); tile < strips * (p.channels / 8); tile += kWarps) {
        const int row = tile / (p.channels / 8) * 16, column = tile % (p.channels / 8) * 8;
        float d[1][1][4] = {};
        multiply_wide<place::refined, 1, 1>(
            d, p.hidden, false, [&](int r, int k) { return pair_along(units + (row + r) * p.unit_stride + k); },
            [&](int c, int k) { return pair_along(up + (column + c) * p.unit_stride + k); });
        each_of_tile(d[0][0], first + row, column,
                     [&](int r, int c, float sum) { keys[r * kKeyStride + c] += sum * float(q.scale); });
      }
    }
  }
  __syncthreads();
  const View& delta = q.key_delta;
  for (int r = int(threadIdx.x) / 8; r < rows; r += kThreads / 8) {
    pass<place::norms>();
    const int at = vector_row(p, r), token = v.token[at];
    float squares = 0.f;
    for (int c = int(threadIdx.x) % 8; c < p.channels; c += 8) {
      float k = keys[r * kKeyStride + c];
      if (delta.data && token >= 0 && c < int(q.channels)) {
        k += load_any<float>(delta, image * delta.stride[0] + token * delta.stride[1] + c * delta.stride[2]);
        keys[r * kKeyStride + c] = k;
      }
      squares += k * k;
    }
    squares = warp_sum<8>(squares);
    if (threadIdx.x % 8) continue;
    v.inverse[at] = q.cosine ? inverse_norm(sqrtf(squares)) : 1.f;
  }
  pass<place::norms_done>();
  __syncthreads();
}

// From dM to ds' = ds / (‖k'_i‖ ‖k'_j‖), scores formed on the way.
FPET_DEVICE void differentiate_scores(const ImageGradientParams& p, Tile& grad) {
  RowVectors& v = row_vectors();
  const float *keys_a = key_rows(p) + warp_row() * kKeyStride, *keys_b = key_rows(p) + (p.rows_a + warp_column()) * kKeyStride;
  const int num_a = int(p.s.q.num_a), num_b = int(p.s.q.num_b);
  float row_sum[2][2] = {};
#pragma unroll
  for (int right = 0; right < 2; ++right) {
    float scores[2][2][4] = {};
    if (warp_row() < p.rows_a && warp_column() + 16 * right < p.rows_b)
      multiply_wide<place::scores, 2, 2>(
          scores, p.channels, p.short_keys, [&](int r, int k) { return pair_along(keys_a + r * kKeyStride + k); },
          [&](int r, int k) { return pair_along(keys_b + (16 * right + r) * kKeyStride + k); });
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile_row(m, half);
        const float mid = v.mid[row], size = v.size[row], inverse_a = v.inverse[row];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = tile_column(2 * right + n) + e;
            const float scale = inverse_a * v.inverse[kSide + column];
            float& g = grad[m][2 * right + n][2 * half + e];
            const float t = expf(-fabsf(scores[m][n][2 * half + e] * scale - mid));  // p (1 − p) is even in s − m
            const float ds = (g * v.inverse_n[column] + v.gamma[column]) * size * __fdividef(t, (1.f + t) * (1.f + t));
            const bool exists = row < num_a && column < num_b;
            row_sum[m][half] += exists ? ds : 0.f;
            g = exists ? ds * scale : 0.f;
          }
      }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = warp_sum<4>(row_sum[m][half]);
      if (lane_index() % 4 == 0) v.sums[warp_index() % 4][tile_row(m, half)] = sum;
    }
  __syncthreads();
  // What the mean of the two best takes from each of them.
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row(m, half), best = v.target[row], second = v.second[row];
      if (row >= num_a) continue;
      const float share = (((v.sums[0][row] + v.sums[1][row]) + v.sums[2][row]) + v.sums[3][row]) / 2.f * v.inverse[row];
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = tile_column(n) + e;
          if (column == best || column == second) grad[m][n][2 * half + e] -= share * v.inverse[kSide + column];
        }
    }
}

// dk' of one element, from dk̂ / ‖k'‖ and the row's k' · dk̂ / ‖k'‖; a norm at its floor is a constant, and nothing flows through it.
FPET_DEVICE float through_norm(const ImageGradientParams& p, int at, float grad, float key, float along) {
  const RowVectors& v = row_vectors();
  if (!p.s.q.cosine || v.inverse[at] == inverse_norm(0.f)) return grad;
  return grad - key * (along * v.inverse[at] * v.inverse[at]);
}

// dk' takes the place of k', by bands of sources, then of the destinations.
FPET_DEVICE void differentiate_keys(const ImageGradientParams& p, const Tile& ds) {
  RowVectors& v = row_vectors();
  const int num_a = int(p.s.q.num_a), num_b = int(p.s.q.num_b), w = opaque(warp_index());
  float *keys_a = key_rows(p), *keys_b = keys_a + p.rows_a * kKeyStride, *band = in_tail(p, p.down);
  const int row_b = w / 4 * 32, column_b = w % 4 * 16, row_a = w / 8 * 16, column_a = w % 8 * 8;
  float grad_b[2][2][4] = {};
#pragma unroll 1
  for (int first = 0; first < num_a; first += kBand, keys_a += kBand * kKeyStride) {
    if (warp_row() == first)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *(float2*)(band + (tile_row(m, half) - first) * kBandStride + tile_column(n)) =
                make_float2(ds[m][n][2 * half], ds[m][n][2 * half + 1]);
    __syncthreads();
    const int depth = min(kBand, p.rows_a - first);
    float grad_a[1][1][4] = {};
    if (column_a < p.channels && row_a < depth) {
      multiply_wide<place::of_sources, 1, 1>(
          grad_a, p.rows_b, false, [&](int r, int k) { return pair_along(band + (row_a + r) * kBandStride + k); },
          [&](int c, int k) { return pair_across(keys_b + k * kKeyStride + column_a + c, kKeyStride); });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_a + 8 * half + lane_index() / 4;
        const float2 key = pair_along(keys_a + row * kKeyStride + column_a + lane_index() % 4 * 2);
        const float along = warp_sum<4>(grad_a[0][0][2 * half] * key.x + grad_a[0][0][2 * half + 1] * key.y);
        if (lane_index() % 4 == 0) v.along[w % 8][row] = along;
      }
    }
    if (row_b < p.rows_b && column_b < p.channels)
      multiply_wide<place::of_destinations, 2, 2>(
          grad_b, depth, false, [&](int r, int k) { return pair_across(band + k * kBandStride + row_b + r, kBandStride); },
          [&](int c, int k) { return pair_across(keys_a + k * kKeyStride + column_b + c, kKeyStride); });
    __syncthreads();
    if (column_a < p.channels && row_a < depth)
      each_of_tile(grad_a[0][0], row_a, column_a, [&](int r, int c, float g) {
        if (first + r >= num_a) return;
        float along = 0.f;
        for (int o = 0; o < p.channels / 8; ++o) along += v.along[o][r];
        float& key = keys_a[r * kKeyStride + c];
        key = through_norm(p, first + r, g, key, along);
      });
  }
  __syncthreads();  // the sums of the last band have been read
  if (row_b < p.rows_b && column_b < p.channels)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_b + 16 * m + 8 * half + lane_index() / 4;
        float along = 0.f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float2 key = pair_along(keys_b + min(row, p.rows_b - 1) * kKeyStride + column_b + 8 * n + lane_index() % 4 * 2);
          along += grad_b[m][n][2 * half] * key.x + grad_b[m][n][2 * half + 1] * key.y;
        }
        along = warp_sum<4>(along);
        if (lane_index() % 4 == 0) v.sums[w % 4][row] = along;
      }
  __syncthreads();
  if (row_b < p.rows_b && column_b < p.channels)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        each_of_tile(grad_b[m][n], row_b + 16 * m, column_b + 8 * n, [&](int j, int c, float g) {
          if (j >= num_b) return;
          float along = 0.f;
          for (int o = 0; o < p.channels / 16; ++o) along += v.sums[o][j];
          float& key = keys_b[j * kKeyStride + c];
          key = through_norm(p, kSide + j, g, key, along);
        });
  __syncthreads();
}

// dk', and the gradient of keys that nothing refined.
FPET_DEVICE void write_key_gradients(const ImageGradientParams& p, int64_t image) {
  const Problem& q = p.s.q;
  const BackwardOutputs& out = p.out;
  pass<place::tail_of_image>();
  const bool key = out.key && !p.hidden;
  if (!out.refined && !out.key) return;
  for (int64_t e = threadIdx.x; e < q.prefix * q.channels; e += kThreads) {
    const int64_t at = image * q.tokens * q.channels + e;
    if (out.refined) store_any(out.refined, out.refined_dtype, at, 0.f);
    if (out.key) store_any(out.key, out.key_dtype, at, 0.f);
  }
  for (int r = warp_index(); r < p.rows_a + p.rows_b; r += kWarps) {
    const int token = row_vectors().token[vector_row(p, r)];
    if (token < 0) continue;
    for (int c = lane_index(); c < int(q.channels); c += 32) {
      const int64_t at = (image * q.tokens + token) * q.channels + c;
      const float grad = key_rows(p)[r * kKeyStride + c];
      if (out.refined) store_any(out.refined, out.refined_dtype, at, grad);
      if (key) store_any(out.key, out.key_dtype, at, grad / float(q.heads));
    }
  }
}

// From dk' to the image's share of dW_up and dW_down, and to the gradient of refined keys.
FPET_DEVICE void differentiate_weights(const ImageGradientParams& p, int64_t image) {
  const Problem& q = p.s.q;
  const BackwardOutputs& out = p.out;
  const int rows = p.rows_a + p.rows_b, w = opaque(warp_index()), stride = p.unit_stride;
  const int across_units = p.hidden / 8, across_keys = p.channels / 8;
  float *mean = in_tail(p, p.pool), *units = mean + p.chunk * kKeyStride;
  float* grad_units = row_vectors().mid;  // but for the tokens, the vectors have been read
  const float *up = in_tail(p, p.up), *down = in_tail(p, p.down);
  float grad_up[1][1][4] = {}, grad_down[1][1][4] = {};
  load_weights(p);
#pragma unroll 1
  for (int first = 0; first < rows; first += p.chunk) {
    const int count = min(p.chunk, rows - first), strips = count / 16;
    const float* grad = key_rows(p) + first * kKeyStride;
    load_keys(p, image, first, count, mean);
    pass<place::keys_loaded>();
    __syncthreads();
    float d[1][1][4] = {};
    const int tile = w - kWarps / 2, row = tile / across_units * 16, column = tile % across_units * 8;
    const bool has_tile = tile >= 0 && tile < strips * across_units;
    if (w < strips * across_units) form_units(p, image, mean, first, w, units);
    if (has_tile)
      multiply_wide<place::of_units, 1, 1>(
          d, p.channels, false, [&](int r, int k) { return pair_along(grad + (row + r) * kKeyStride + k); },
          [&](int h, int k) { return pair_across(up + k * stride + column + h, stride); });
    __syncthreads();
    if (has_tile)
      each_of_tile(d[0][0], row, column, [&](int r, int h, float v) {
        v = units[r * stride + h] != 0.f ? v * float(q.scale) : 0.f;
        grad_units[r * stride + h] = masked(p, image, first + r, h, v);
      });
    __syncthreads();
    if (out.w_down && w < p.channels / 16 * across_units) {
      const int c0 = w / across_units * 16, h0 = w % across_units * 8;
      multiply_wide<place::of_up, 1, 1>(
          grad_up, count, false, [&](int c, int k) { return pair_across(grad + k * kKeyStride + c0 + c, kKeyStride); },
          [&](int h, int k) { return pair_across(units + k * stride + h0 + h, stride); });
    }
    if (out.w_down && w < p.hidden / 16 * across_keys) {
      const int h0 = w / across_keys * 16, c0 = w % across_keys * 8;
      multiply_wide<place::of_down, 1, 1>(
          grad_down, count, false, [&](int h, int k) { return pair_across(grad_units + k * stride + h0 + h, stride); },
          [&](int c, int k) { return pair_across(mean + k * kKeyStride + c0 + c, kKeyStride); });
    }
    if (out.key && w < strips * across_keys) {
      const int r0 = w / across_keys * 16, c0 = w % across_keys * 8;
      float key[1][1][4] = {};
      multiply_wide<place::of_keys, 1, 1>(
          key, p.hidden, false, [&](int r, int k) { return pair_along(grad_units + (r0 + r) * stride + k); },
          [&](int c, int k) { return pair_across(down + k * kKeyStride + c0 + c, kKeyStride); });
      each_of_tile(key[0][0], r0, c0, [&](int r, int c, float v) {
        const int token = row_vectors().token[vector_row(p, first + r)];
        if (token >= 0 && c < int(q.channels))
          store_any(out.key, out.key_dtype, (image * q.tokens + token) * q.channels + c,
                    (grad[r * kKeyStride + c] + v) / float(q.heads));
      });
    }
    __syncthreads();
  }
  if (!out.w_down) return;
  const int size = int(q.channels * q.hidden);
  float* to = p.weight_parts + image * 2 * size;
  if (w < p.channels / 16 * across_units)
    each_of_tile(grad_up[0][0], w / across_units * 16, w % across_units * 8, [&](int c, int h, float v) {
      if (c < int(q.channels) && h < int(q.hidden)) to[c * int(q.hidden) + h] = v;
    });
  if (w < p.hidden / 16 * across_keys)
    each_of_tile(grad_down[0][0], w / across_keys * 16, w % across_keys * 8, [&](int h, int c, float v) {
      if (c < int(q.channels) && h < int(q.hidden)) to[size + h * int(q.channels) + c] = v;
    });
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) image_gradient(const __grid_constant__ ImageGradientParams p) {
  const Problem& q = p.s.q;
  pass<place::other>();
  StepRing ring{shared_memory() + sizeof(RowVectors), p.stages};
  Source from{int(blockIdx.x), 0};
  find_rows(p);
#pragma unroll 1
  for (int image = int(blockIdx.x); image < int(q.batch); image += int(gridDim.x)) {
    __syncthreads();  // rows have been found, or the last image's vectors and stages read
    pass<place::image>();
    load_vectors(p, image);
    if (p.aligned_keys) {
      const int64_t bytes = size_of(q.key.dtype);
      const char* key = (const char*)q.key.data + image * q.key.stride[0] * bytes;
      for (int head = 0; head < int(q.heads); ++head)
        prefetch_block(key + head * q.key.stride[1] * bytes, int(q.tokens), q.key.stride[2] * bytes, int(q.channels * bytes));
    }
    Tile grad = {};
    spread_image<S>(p, image, grad, ring, from);
    prepare_image(p, image);
    differentiate_scores(p, grad);
    differentiate_keys(p, grad);
    write_key_gradients(p, image);
    if (p.hidden && (p.out.w_down || p.out.key)) differentiate_weights(p, image);
  }
}

}  // namespace

bool backward_short_takes(const Problem& q) {
  if (q.wide_scores || q.x.dtype == DType::f64 || q.channels > kChannels || q.hidden > kHidden) return false;
  if (q.num_a > kSide || q.num_b > kSide || q.tokens > INT32_MAX) return false;
  return sizeof(RowVectors) + max(ImageGradientParams().plan(q), size_t(2 * kStep)) <= kSharedEverywhere;
}

CudaStatus backward_short(const SpreadParams& s, const BackwardOutputs& out, float* weight_parts, cudaStream_t stream) {
  const Problem& q = s.q;
  ImageGradientParams p{};
  p.plan_memory(q, limits());
  p.s = s;
  p.out = out;
  p.weight_parts = weight_parts;
  p.aligned_keys = keys_aligned(q);
  p.short_keys = q.heads == 1 && !q.hidden && !q.key_delta.data && (q.key.dtype == DType::bf16 || q.key.dtype == DType::f16);
  p.aligned_x = rows_aligned(q.x, q.dim), p.aligned_grad = rows_aligned(s.in.grad_tokens, q.dim);
  const dim3 grid(unsigned(min(q.batch, int64_t(limits().multiprocessors))));
  switch (q.x.dtype) {
    case DType::bf16: return launch<image_gradient<bf16>>(grid, kThreads, p.bytes, stream, p);
    case DType::f16: return launch<image_gradient<f16>>(grid, kThreads, p.bytes, stream, p);
    default: return launch<image_gradient<float>>(grid, kThreads, p.bytes, stream, p);
  }
}

KernelList backward_short_kernels() {
  ImageGradientParams p{};
  p.plan_memory(typical_problem(true), limits());
  return {
      entry<image_gradient<float>>("image_gradient<float>", kThreads, p.bytes),
      entry<image_gradient<bf16>>("image_gradient<bf16>", kThreads, p.bytes),
      entry<image_gradient<f16>>("image_gradient<f16>", kThreads, p.bytes),
  };
}

}  // namespace cuda
}  // namespace fpet
