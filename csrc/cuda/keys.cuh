// The key path in registers: sixteen keys at a time are averaged over heads, refined and normalised by one warp, in the layout in
// which matrix units take a left factor, so that nothing passes through shared memory in between.
//
// A strip is 16 rows of up to 32 Q columns. With g = lane / 4, t = lane % 4 a lane holds of rows g and g + 8, from each 32
// columns, the eight from 8t on: 16 bytes of a 16-bit row. Matrix units sum over columns in any order, so the fragments of
// mma.cuh are filled with what a lane has, and the right factors in shared memory have their columns in the order that fits:
// column 8t + 2j + e of 32 lies at 8j + 2t + e (column_position, its own inverse). A product whose right factor has its *rows* in
// that order, too, leaves its result in a strip again.
#pragma once

#include "mma.cuh"

namespace fpet {
namespace cuda {

FPET_DEVICE int column_position(int c) { return (c & ~30) | ((c << 2) & 24) | ((c >> 2) & 6); }

template <int Q>
struct Strip {
  float v[Q][2][8];
};
// Groups of 32 hidden units that go with Q groups of channels: more would not fit into registers.
template <int Q>
constexpr int kHiddenGroups = Q / 2;
// The same as pairs of 16 bits.
template <int Q>
struct Tiles {
  uint32_t w[Q][2][4];
};

// Whether eight neighbouring columns of a row can be read at once; `strides` are those of the other dimensions.
inline bool reads_eight(const View& v, int64_t columns, int64_t column_stride, std::initializer_list<int64_t> strides) {
  if (!v.data || v.dtype == DType::f64 || columns % 8 || column_stride != 1) return false;
  const int64_t bytes = v.dtype == DType::boolean ? 8 : 16;
  bool yes = int64_t(uintptr_t(v.data)) % bytes == 0;
  for (const int64_t s : strides) yes = yes && s * size_of(v.dtype) % bytes == 0;
  return yes;
}

// --- loading -----------------------------------------------------------------------------------------------------------------------

// Eight neighbouring elements.
template <class S>
struct Eight {
  static constexpr int count = int(sizeof(S)) / 2;
  uint4 raw[count];

  FPET_DEVICE void load(const S* p, bool valid) {
#pragma unroll
    for (int i = 0; i < count; ++i) raw[i] = valid ? load16(p + 8 / count * i) : make_uint4(0, 0, 0, 0);
  }
  FPET_DEVICE void add_to(float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Lanes<S> part = unpack<S>(raw[i]);
#pragma unroll
      for (int e = 0; e < 8 / count; ++e) v[8 / count * i + e] += part.v[e];
    }
  }
};
template <>
struct Eight<uint8_t> {  // booleans
  uint2 raw;

  FPET_DEVICE void load(const uint8_t* p, bool valid) { raw = valid ? __ldg((const uint2*)p) : make_uint2(0, 0); }
  FPET_DEVICE void add_to(float (&v)[8]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      v[e] += (raw.x >> 8 * e & 255) != 0 ? 1.f : 0.f;
      v[4 + e] += (raw.y >> 8 * e & 255) != 0 ? 1.f : 0.f;
    }
  }
};

// Two rows of `columns` elements, which start at `offset`; rows that are not valid count as zeros. With `count` such matrices
// `step` apart it is their sum that is meant.
struct RowPair {
  int64_t offset[2];
  bool valid[2];
  int columns, count;
  int64_t step;
};

template <class S, int Q>
FPET_DEVICE void add_rows(Strip<Q>& s, const View& view, const RowPair& rows) {
  const int column = 8 * (lane_index_anew() & 3);
  const S *row0 = (const S*)view.data + rows.offset[0] + column, *row1 = (const S*)view.data + rows.offset[1] + column;
#pragma unroll(sizeof(S) <= 2 ? 2 : 1)
  for (int k = 0; k < rows.count; ++k) {
    pass<place::heads>();
    Eight<S> part[Q][2];  // all under way before the first is needed
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      part[q][0].load(row0 + 32 * q, rows.valid[0] && 32 * q + column < rows.columns);
      part[q][1].load(row1 + 32 * q, rows.valid[1] && 32 * q + column < rows.columns);
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      part[q][0].add_to(s.v[q][0]);
      part[q][1].add_to(s.v[q][1]);
    }
    row0 += rows.step;
    row1 += rows.step;
  }
}

// s += rows of any type. `eight`: reads_eight of the view, which is known of `eights`.
template <bool eights = false, int Q>
FPET_DEVICE void add_any(Strip<Q>& s, const View& view, const RowPair& rows, int64_t column_stride, bool eight) {
  if (eights || eight) {
    if (view.dtype == DType::f32) {
      add_rows<float>(s, view, rows);
    } else if (view.dtype == DType::bf16) {
      add_rows<bf16>(s, view, rows);
    } else if (view.dtype == DType::f16) {
      add_rows<f16>(s, view, rows);
    } else if (!eights) {
      add_rows<uint8_t>(s, view, rows);
    }
    return;
  }
  if constexpr (!eights) {
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int column = 32 * q + 8 * (lane_index() & 3) + e;
          if (!rows.valid[i] || column >= rows.columns) continue;
          int64_t at = rows.offset[i] + column * column_stride;
#pragma unroll 1
          for (int k = 0; k < rows.count; ++k, at += rows.step) s.v[q][i][e] += load_any<float>(view, at);
        }
  }
}

template <int Q>
FPET_DEVICE void clear(Strip<Q>& s) {
#pragma unroll
  for (int q = 0; q < Q; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) s.v[q][i][e] = 0.f;
}

// Rows of two tokens (-1: none) of a (B, N, columns) tensor.
FPET_DEVICE RowPair token_rows(const View& view, int64_t image, const int (&token)[2], int columns) {
  RowPair rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.valid[i] = token[i] >= 0;
    rows.offset[i] = image * view.stride[0] + (token[i] < 0 ? 0 : token[i]) * view.stride[1];
  }
  rows.columns = columns;
  rows.count = 1;
  rows.step = 0;
  return rows;
}

// Keys of two tokens, averaged over heads; -1: zeros. K: their type where they can be read eight at a time, or void: any.
template <class K, int Q>
FPET_DEVICE void load_keys(Strip<Q>& s, const Problem& p, int64_t image, const int (&token)[2], bool eight) {
  RowPair rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.valid[i] = token[i] >= 0;
    rows.offset[i] = image * p.key.stride[0] + (token[i] < 0 ? 0 : token[i]) * p.key.stride[2];
  }
  rows.columns = int(p.channels);
  rows.count = int(p.heads);
  rows.step = p.key.stride[1];
  clear(s);
  if constexpr (std::is_void<K>::value) {
    add_any(s, p.key, rows, p.key.stride[3], eight);
  } else {
    add_rows<K>(s, p.key, rows);
  }
  pass<place::strips_summed>();
  if (p.heads == 1) return;
  const float heads = float(p.heads), inverse = 1.f / heads;
#pragma unroll
  for (int q = 0; q < Q; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) s.v[q][i][e] = quotient(s.v[q][i][e], heads, inverse);
}

// 16-bit keys as they are stored; no mean over heads. `eights`: they can be read eight at a time.
template <bool eights, int Q>
FPET_DEVICE void load_raw_keys(Tiles<Q>& s, const Problem& p, int64_t image, const int (&token)[2], bool eight) {
  const int t = lane_index() & 3;
#pragma unroll
  for (int q = 0; q < Q; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 32 * q + 8 * t;
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (token[i] >= 0 && column < int(p.channels)) {
        const uint16_t* row = (const uint16_t*)p.key.data + image * p.key.stride[0] + token[i] * p.key.stride[2];
        if (eights || eight) {
          raw = load16(row + column);
        } else {
          uint32_t half[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) half[e] = column + e < int(p.channels) ? row[(column + e) * p.key.stride[3]] : 0;
          raw = make_uint4(half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16);
        }
      }
      s.w[q][i][0] = raw.x, s.w[q][i][1] = raw.y, s.w[q][i][2] = raw.z, s.w[q][i][3] = raw.w;
    }
}

// --- rows of a strip -----------------------------------------------------------------------------------------------------------------

// Σ v² of both rows.
template <int Q>
FPET_DEVICE void sum_squares(float (&sum)[2], const Strip<Q>& s) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float part = 0.f;
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int e = 0; e < 8; ++e) part += s.v[q][i][e] * s.v[q][i][e];
    sum[i] = warp_sum<4>(part);
  }
}
template <class S, int Q>
FPET_DEVICE void sum_squares(float (&sum)[2], const Tiles<Q>& s) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float part = 0.f;
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = low_half<S>(s.w[q][i][j]), high = high_half<S>(s.w[q][i][j]);
        part += low * low;
        part += high * high;
      }
    sum[i] = warp_sum<4>(part);
  }
}

// 1 / max(norm, 1e-12); NaN passes.
FPET_DEVICE float inverse_norm(float norm) { return 1.f / (norm < 1e-12f ? 1e-12f : norm); }

// The power of two by which the rows are multiplied before they are split, so that their largest number is near 2^12.
template <int Q>
FPET_DEVICE void split_scales(float (&scale)[2], const Strip<Q>& s) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = 0.f;
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(s.v[q][i][e]));
    scale[i] = split_scale(warp_max<4>(largest));
  }
}

template <int Q>
FPET_DEVICE void split_strip(Tiles<Q>& high, Tiles<Q>& low, const Strip<Q>& s, const float (&scale)[2]) {
#pragma unroll
  for (int q = 0; q < Q; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const SplitPair pair = split_pair(s.v[q][i][2 * j] * scale[i], s.v[q][i][2 * j + 1] * scale[i]);
        high.w[q][i][j] = pair.high;
        low.w[q][i][j] = pair.low;
      }
}

// --- right factors in shared memory: rows of `stride` elements, an odd multiple of 16 bytes, columns in column_position's order ------

__host__ __device__ constexpr int plane_stride(int groups) { return 32 * groups + 8; }

// Rows `row` .. `row` + 15.
template <int Q>
FPET_DEVICE void store_tiles(uint16_t* plane, int stride, int row, const Tiles<Q>& s, int groups = Q) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (q >= groups) break;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) *(uint32_t*)(plane + (row + g + 8 * i) * stride + 32 * q + 8 * j + 2 * t) = s.w[q][i][j];
  }
}

// The fragment of 16 columns: half h of group q.
template <int Q>
FPET_DEVICE void left_fragment(uint32_t (&a)[4], const Tiles<Q>& s, int q, int h) {
  a[0] = s.w[q][0][2 * h], a[1] = s.w[q][1][2 * h], a[2] = s.w[q][0][2 * h + 1], a[3] = s.w[q][1][2 * h + 1];
}

// Where this lane reads from for ldmatrix of 16 rows and 16 columns.
FPET_DEVICE const uint16_t* right_address(const uint16_t* plane, int stride) {
  const int lane = lane_index_anew();
  return plane + ((lane >> 4) * 8 + (lane & 7)) * stride + (lane >> 3 & 1) * 8;
}

// d[n] += strip · (rows 8n .. 8n+7 of the plane)ᵀ over `groups` × 32 columns; `right` is right_address of the first row.
template <class S, int Q>
FPET_DEVICE void multiply_raw(float (&d)[2][4], const Tiles<Q>& a, const uint16_t* right, int groups) {
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (q >= groups) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t left[4], both[4];
      left_fragment(left, a, q, h);
      ldmatrix(both, right + 32 * q + 16 * h);
      const uint32_t b0[2] = {both[0], both[1]}, b1[2] = {both[2], both[3]};
      mma_exact<S>(d[0], left, b0);
      mma_exact<S>(d[1], left, b1);
    }
  }
}

// One step over 16 columns of numbers split in two; the low parts of the right factor lie `low_offset` elements behind the high
// ones. `no_low`: the left factor has none. The small products are summed apart.
FPET_DEVICE void split_step(float (&d)[2][4], float (&small)[2][4], const uint32_t (&left)[4], const uint32_t (&left_low)[4],
                            const uint16_t* right, int low_offset, bool no_low) {
  uint32_t both[4], both_low[4];
  ldmatrix(both, right);
  ldmatrix(both_low, right + low_offset);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t b[2] = {both[2 * n], both[2 * n + 1]}, b_low[2] = {both_low[2 * n], both_low[2 * n + 1]};
    mma_exact<f16>(d[n], left, b);
    mma_f16(small[n], left, b_low);
    if (!no_low) mma_f16(small[n], left_low, b);
  }
}

// multiply_raw of numbers split in two.
template <int Q>
FPET_DEVICE void multiply_split(float (&d)[2][4], const Tiles<Q>& high, const Tiles<Q>& low, const uint16_t* right,
                                int low_offset, int groups) {
  float small[2][4] = {};
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (q >= groups) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t left[4], left_low[4];
      left_fragment(left, high, q, h);
      left_fragment(left_low, low, q, h);
      split_step(d, small, left, left_low, right + 32 * q + 16 * h, low_offset, false);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) d[n][e] += small[n][e];
}

// --- refinement ----------------------------------------------------------------------------------------------------------------------

// W_down and W_up in shared memory, split: rows in column_position's order, and by what to multiply a row's products.
struct Weights {
  uint16_t *down, *up;                // 2 planes (32 hidden groups, C), 2 planes (32 channel groups, h)
  float *down_unscale, *up_unscale;   // by hidden unit, by channel
  int hidden_groups, channel_groups;  // of 32

  __host__ __device__ static size_t bytes(int hidden_groups, int channel_groups) {
    return size_t(4) * (32 * hidden_groups * plane_stride(channel_groups) + 32 * channel_groups * plane_stride(hidden_groups)) +
           size_t(4) * 32 * (hidden_groups + channel_groups);
  }
  FPET_DEVICE Weights(char* memory, int hidden_groups_, int channel_groups_)
      : hidden_groups(hidden_groups_), channel_groups(channel_groups_) {
    down = (uint16_t*)memory;
    up = down + 2 * down_low();
    down_unscale = (float*)(up + 2 * up_low());
    up_unscale = down_unscale + 32 * hidden_groups;
  }
  FPET_DEVICE int down_low() const { return 32 * hidden_groups * plane_stride(channel_groups); }
  FPET_DEVICE int up_low() const { return 32 * channel_groups * plane_stride(hidden_groups); }
};

// A warp's share of one weight matrix: strip `strip` of its rows.
template <bool eights, int Q>
FPET_DEVICE void store_weights(const View& view, int rows, int columns, bool eight, int strip, uint16_t* plane, int low_offset,
                               int groups, float* unscale) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  Strip<Q> s;
  Tiles<Q> high, low;
  float scale[2];
  RowPair pair;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = column_position(16 * strip + g + 8 * i);
    pair.valid[i] = row < rows;
    pair.offset[i] = pair.valid[i] ? row * view.stride[0] : 0;
  }
  pair.columns = columns;
  pair.count = 1;
  pair.step = 0;
  clear(s);
  add_any<eights>(s, view, pair, view.stride[1], eight);
  split_scales(scale, s);
  split_strip(high, low, s, scale);
  store_tiles(plane, plane_stride(groups), 16 * strip, high, groups);
  store_tiles(plane + low_offset, plane_stride(groups), 16 * strip, low, groups);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (t == 0) unscale[column_position(16 * strip + g + 8 * i)] = 1.f / scale[i];
}

// All of both matrices, by all warps of the block; a barrier must follow.
template <bool eights, int Q>
FPET_DEVICE void fill_weights(const Weights& w, const Problem& p, bool down_eight, bool up_eight) {
  const int warps = int(blockDim.x) / 32, down_strips = 2 * w.hidden_groups, strips = down_strips + 2 * w.channel_groups;
  for (int s = warp_index(); s < strips; s += warps) {
    pass<place::weights>();
    if (s < down_strips)
      store_weights<eights, Q>(p.w_down, int(p.hidden), int(p.channels), down_eight, s, w.down, w.down_low(), w.channel_groups,
                               w.down_unscale);
    else
      store_weights<eights, kHiddenGroups<Q>>(p.w_up, int(p.channels), int(p.hidden), up_eight, s - down_strips, w.up,
                                              w.up_low(), w.hidden_groups, w.up_unscale);
  }
}

// key += scale · ReLU(key W_downᵀ) ⊙ mask W_upᵀ, without a mask if not `masks`. `short_key`: the key has no more than f16's 11 bits.
template <bool masks, int Q>
FPET_DEVICE void refine(Strip<Q>& key, const Weights& w, const Problem& p, int64_t image, const int (&token)[2], bool short_key,
                        bool mask_eight) {
  constexpr int H = kHiddenGroups<Q>;
  const int t = lane_index_anew() & 3;
  Strip<H> hidden;
  float scale[2];
  {
    split_scales(scale, key);
    const float unscale[2] = {1.f / scale[0], 1.f / scale[1]};
    const int stride = plane_stride(w.channel_groups);
    const uint16_t* right = right_address(w.down, stride);
    float d[H][2][2][4] = {}, small[H][2][2][4] = {};
    // Sixteen columns of the key are split at a time: those of all would fill the registers.
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      if (q >= w.channel_groups) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t left[4], left_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &key.v[q][i & 1][4 * h + (i & 2)];
          const SplitPair split = split_pair(pair[0] * scale[i & 1], pair[1] * scale[i & 1]);
          left[i] = split.high;
          left_low[i] = split.low;
        }
#pragma unroll
        for (int units = 0; units < H; ++units) {
          if (units >= w.hidden_groups) break;
#pragma unroll
          for (int half = 0; half < 2; ++half)
            split_step(d[units][half], small[units][half], left, left_low,
                       right + (32 * units + 16 * half) * stride + 32 * q + 16 * h, w.down_low(), short_key);
        }
      }
    }
#pragma unroll
    for (int units = 0; units < H; ++units)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = 4 * half + 2 * n + e % 2;
            const float unit = units < w.hidden_groups ? (d[units][half][n][e] + small[units][half][n][e]) * unscale[e / 2] *
                                                             w.down_unscale[32 * units + 8 * t + at]
                                                       : 0.f;
            hidden.v[units][e / 2][at] = unit < 0.f ? 0.f : unit;  // NaN passes
          }
  }
  if (masks && p.dropout_mask.data) {
    Strip<H> keep;
    clear(keep);
    add_any(keep, p.dropout_mask, token_rows(p.dropout_mask, image, token, int(p.hidden)), p.dropout_mask.stride[2],
            mask_eight);
#pragma unroll
    for (int q = 0; q < H; ++q)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) hidden.v[q][i][e] *= keep.v[q][i][e];
  }
  Tiles<H> high, low;
  split_scales(scale, hidden);
  split_strip(high, low, hidden, scale);
  const float unscale[2] = {1.f / scale[0], 1.f / scale[1]}, factor = float(p.scale);
  const int stride = plane_stride(w.hidden_groups);
  const uint16_t* right = right_address(w.up, stride);
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (q >= w.channel_groups) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float d[2][4] = {};
      multiply_split(d, high, low, right + (32 * q + 16 * h) * stride, w.up_low(), w.hidden_groups);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = 4 * h + 2 * n + e % 2;
          key.v[q][e / 2][at] += factor * (d[n][e] * unscale[e / 2] * w.up_unscale[32 * q + 8 * t + at]);
        }
    }
  }
}

// What was asked of the vector loads, found by the launcher.
struct KeyReads {
  bool key, delta, mask, down, up;

  KeyReads() = default;
  explicit KeyReads(const Problem& p)
      : key(reads_eight(p.key, p.channels, p.key.stride[3],
                        {p.key.stride[0], p.heads > 1 ? p.key.stride[1] : 0, p.key.stride[2]})),
        delta(reads_eight(p.key_delta, p.channels, p.key_delta.stride[2], {p.key_delta.stride[0], p.key_delta.stride[1]})),
        mask(reads_eight(p.dropout_mask, p.hidden, p.dropout_mask.stride[2],
                         {p.dropout_mask.stride[0], p.dropout_mask.stride[1]})),
        down(reads_eight(p.w_down, p.channels, p.w_down.stride[1], {p.w_down.stride[0]})),
        up(reads_eight(p.w_up, p.hidden, p.w_up.stride[1], {p.w_up.stride[0]})) {}
};

// k' of two tokens: mean over heads, refinement, delta. Of K other than void (load_keys) there is no mask and no delta.
template <class K, int Q>
FPET_DEVICE void refined_keys(Strip<Q>& s, const Weights& w, const Problem& p, const KeyReads& reads, int64_t image,
                              const int (&token)[2]) {
  constexpr bool any = std::is_void<K>::value;
  load_keys<K>(s, p, image, token, reads.key);
  if (p.hidden) {
    const bool short_key = p.heads == 1 && (p.key.dtype == DType::bf16 || p.key.dtype == DType::f16);
    refine<any>(s, w, p, image, token, short_key, reads.mask);
  }
  if (any && p.key_delta.data)
    add_any(s, p.key_delta, token_rows(p.key_delta, image, token, int(p.channels)), p.key_delta.stride[2], reads.delta);
}

// Splits k̂ (k' if not cosine) for a product with other keys, whose result is to be multiplied by both rows' `unscale`.
template <int Q>
FPET_DEVICE void split_keys(Tiles<Q>& high, Tiles<Q>& low, float (&unscale)[2], Strip<Q>& s, bool cosine) {
  float scale[2];
  if (cosine) {
    float squares[2];
    sum_squares(squares, s);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = inverse_norm(sqrtf(squares[i]));
#pragma unroll
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int e = 0; e < 8; ++e) s.v[q][i][e] *= inverse;
    }
  }
  split_scales(scale, s);
  split_strip(high, low, s, scale);
#pragma unroll
  for (int i = 0; i < 2; ++i) unscale[i] = 1.f / scale[i];
}

}  // namespace cuda
}  // namespace fpet
