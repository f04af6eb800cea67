// The key path of long grids, and of every backward: mean keys, hidden units, prepared keys in scratch memory, any C and h.
//
// Prepared keys: k' of every row, sources then destinations, as one to three bfloat16 that add up to the float32 (float64 where
// scores are). A bfloat16 key that nothing was added to is one part as it is; a float16 key, two; float32 needs three, and then
// the products of parts (a, b) with a + b < 3 leave out less than 2^-24 of the product of the two keys.
#pragma once

#include "launch.cuh"

namespace fpet {
namespace cuda {

constexpr int kKeyThreads = 256, kKeyRows = 64, kChannelBlock = 64;
constexpr int kProductTile = 64, kProductDepth = 32;

// Scratch memory is cut up by the same code that counts it: base is null while counting.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = base ? (T*)(base + used) : nullptr;
    used += round_up(size_t(n) * sizeof(T), size_t(256));
    return p;
  }
};

template <class T>
FPET_DEVICE T inverse_norm(T norm) {
  return T(1) / (norm < T(1e-12) ? T(1e-12) : norm);  // NaN passes
}

// Sources first, then destinations.
FPET_DEVICE int64_t row_token(const Problem& q, int64_t row) {
  return row < q.num_a ? source_token(q, row) : destination_token(q, row - q.num_a);
}

inline bool keys_aligned(const Problem& q) {
  const View& v = q.key;
  return v.stride[3] == 1 && q.channels * size_of(v.dtype) % 16 == 0 &&
         aligned16(v.data, v.dtype, {v.stride[0], v.stride[1], v.stride[2]});
}

// --- prepared keys -----------------------------------------------------------------------------------------------------------------

template <class T>
struct PreparedKeys {
  bf16* part = nullptr;    // (B, N_A + N_B, parts, padded); float32 scores
  double* wide = nullptr;  // (B, N_A + N_B, padded); float64 scores
  T* norm = nullptr;       // (B, N_A + N_B) for cosine
  int parts = 1, padded = 0;
  bool cosine = false;

  void plan(Arena& arena, const Problem& q) {
    const bool plain = q.heads == 1 && !q.hidden && !q.key_delta.data;
    parts = plain && q.key.dtype == DType::bf16 ? 1 : plain && q.key.dtype == DType::f16 ? 2 : 3;
    padded = int(round_up(q.channels, int64_t(kChannelBlock)));
    cosine = q.cosine;
    const int64_t rows = q.batch * (q.num_a + q.num_b);
    if (sizeof(T) == 8) {
      wide = arena.take<double>(rows * padded);
    } else {
      part = arena.take<bf16>(rows * padded * parts);
    }
    norm = arena.take<T>(cosine ? rows : 0);
  }
  FPET_DEVICE T at(int64_t row, int c) const {
    if constexpr (sizeof(T) == 8) {
      return wide[row * padded + c];
    } else {
      const bf16* p = part + row * padded * parts + c;
      float v = to_compute(p[0]);
      for (int i = 1; i < parts; ++i) v += to_compute(p[i * padded]);  // exact
      return v;
    }
  }
  FPET_DEVICE void put(int64_t row, int c, T v) const {
    if constexpr (sizeof(T) == 8) {
      wide[row * padded + c] = v;
    } else {
      bf16* p = part + row * padded * parts + c;
      for (int i = 0; i < parts; ++i) {
        const bf16 rounded = from_compute<bf16>(v);
        p[i * padded] = rounded;
        v -= to_compute(rounded);
      }
    }
  }
  FPET_DEVICE T inverse(int64_t row) const { return cosine ? inverse_norm(norm[row]) : T(1); }
};

// --- products of small matrices ------------------------------------------------------------------------------------------------------

// emit(r, n, Σ_k a(r, k) b(k, n)) by all 256 threads. b goes through `stage`, kProductDepth × kProductTile; a is read where it is,
// in shared memory, and may have been written just before; what emit writes needs a barrier before others read it.
template <class T, class A, class B, class Emit>
FPET_DEVICE void block_product(int rows, int columns, int depth, T* stage, const A& a, const B& b, const Emit& emit) {
  const int own_row = int(threadIdx.x) / 16 * 4, own_column = int(threadIdx.x) % 16 * 4;
  for (int r0 = 0; r0 < rows; r0 += kProductTile)
    for (int n0 = 0; n0 < columns; n0 += kProductTile) {
      const int r = r0 + own_row, n = n0 + own_column;
      T sum[4][4] = {};
      for (int start = 0; start < depth; start += kProductDepth) {
        const int steps = min(kProductDepth, depth - start);
        __syncthreads();
        for (int e = int(threadIdx.x); e < steps * kProductTile; e += kKeyThreads) {
          const int column = n0 + e % kProductTile;
          stage[e] = column < columns ? b(start + e / kProductTile, column) : T(0);
        }
        __syncthreads();
        if (r >= rows) continue;
        for (int k = 0; k < steps; ++k) {
          T left[4], right[4];
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            left[m] = a(min(r + m, rows - 1), start + k);
            right[m] = stage[k * kProductTile + own_column + m];
          }
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[m][e] += left[m] * right[e];
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (r + m < rows && n + e < columns) emit(r + m, n + e, sum[m][e]);
    }
}

// --- keys of some rows ---------------------------------------------------------------------------------------------------------------

template <class S, class T>
FPET_DEVICE void mean_chunk(const Problem& q, int64_t offset, T* out) {
  constexpr int lanes = Lanes<S>::count;
  const S* p = (const S*)q.key.data + offset;
  T sum[lanes] = {};
#pragma unroll 4
  for (int64_t h = 0; h < q.heads; ++h) {
    const Lanes<S> v = unpack<S>(load16(p + h * q.key.stride[1]));
#pragma unroll
    for (int e = 0; e < lanes; ++e) sum[e] += T(v.v[e]);
  }
#pragma unroll
  for (int e = 0; e < lanes; ++e) out[e] = q.heads == 1 ? sum[e] : sum[e] / T(q.heads);
}

// The mean over heads of `count` channels of token n from channel c on: 16 bytes of them if aligned, else one.
template <class T>
FPET_DEVICE void mean_key(const Problem& q, bool aligned, int64_t b, int64_t n, int c, T* out) {
  const View& v = q.key;
  const int64_t offset = b * v.stride[0] + n * v.stride[2] + c * v.stride[3];
  if (!aligned) {
    T sum = load_any<T>(v, offset);
    for (int64_t h = 1; h < q.heads; ++h) sum += load_any<T>(v, offset + h * v.stride[1]);
    *out = q.heads == 1 ? sum : sum / T(q.heads);
  } else if (v.dtype == DType::f32) {
    mean_chunk<float>(q, offset, out);
  } else if (v.dtype == DType::bf16) {
    mean_chunk<bf16>(q, offset, out);
  } else if (v.dtype == DType::f16) {
    mean_chunk<f16>(q, offset, out);
  } else {
    mean_chunk<double>(q, offset, out);
  }
}

// Means over heads of the keys of tokens[0 .. rows), to out (rows, ld), by all threads of the block.
template <class T>
FPET_DEVICE void load_mean_keys(const Problem& q, bool aligned, int64_t b, const int64_t* tokens, int rows, T* out, int ld) {
  const int lanes = aligned ? 16 / size_of(q.key.dtype) : 1, chunks = int(q.channels) / lanes;
  for (int e = int(threadIdx.x); e < rows * chunks; e += int(blockDim.x)) {
    const int r = e / chunks, c = (e - r * chunks) * lanes;
    mean_key(q, aligned, b, tokens[r], c, out + r * ld + c);
  }
}

// units (rows, ld) = ReLU(key W_downᵀ) ⊙ mask.
template <class T>
FPET_DEVICE void block_units(const Problem& q, int64_t b, const int64_t* tokens, int rows, const T* key, int ld_key, T* stage,
                             T* units, int ld) {
  const View &down = q.w_down, &mask = q.dropout_mask;
  block_product<T>(
      rows, int(q.hidden), int(q.channels), stage, [&](int r, int c) { return key[r * ld_key + c]; },
      [&](int c, int h) { return load_any<T>(down, h * down.stride[0] + c * down.stride[1]); },
      [&](int r, int h, T v) {
        v = v < T(0) ? T(0) : v;  // NaN passes
        if (mask.data) v *= load_any<T>(mask, b * mask.stride[0] + tokens[r] * mask.stride[1] + h * mask.stride[2]);
        units[r * ld + h] = v;
      });
}

// `copies` of (rows, C) and of (rows, h) in shared memory, besides `other` bytes: leading dimensions, and how many rows fit.
template <class T>
struct KeyTile {
  int ld_key, ld_hidden, rows;
  size_t bytes;
  KeyTile(const Problem& q, int copies, size_t other) {
    ld_key = int(q.channels | 1);
    ld_hidden = q.hidden ? int(q.hidden | 1) : 0;
    rows = kKeyRows;
    while (rows > 4 && size_for(copies) + other > kSharedOfKeyTile) rows /= 2;
    bytes = size_for(copies) + other;
  }
  size_t size_for(int copies) const {
    const size_t stage = ld_hidden ? kProductDepth * kProductTile : 0;
    return size_t(rows) * 8 + sizeof(T) * (size_t(rows) * size_t(copies * (ld_key + ld_hidden)) + stage);
  }
};

// --- preparing -----------------------------------------------------------------------------------------------------------------------

template <class T>
struct PrepareKeysParams {
  Problem q;
  PreparedKeys<T> keys;
  int ld_key, ld_hidden, rows, blocks;  // blocks of `rows` rows in an image
  bool aligned;
  size_t bytes;

  PrepareKeysParams(const Problem& problem, const PreparedKeys<T>& prepared) : q(problem), keys(prepared) {
    const KeyTile<T> tile(q, 1, 0);
    ld_key = tile.ld_key, ld_hidden = tile.ld_hidden, rows = tile.rows, bytes = tile.bytes;
    blocks = int(ceil_div(q.num_a + q.num_b, int64_t(rows)));
    aligned = keys_aligned(q);
  }
};

// In forward_long.cu.
CudaStatus launch_prepare_keys(const PrepareKeysParams<float>&, cudaStream_t);
CudaStatus launch_prepare_keys(const PrepareKeysParams<double>&, cudaStream_t);

// --- who merged into a few rows --------------------------------------------------------------------------------------------------------

// The sources whose target is one of the merged rows [low, high), in their order, by all `threads` of the block: entries (source,
// target − low), no more than `capacity`, at least what one turn can add. Scanning every source for every few rows costs less than
// sorting: it reads 8 bytes a source, from the second-level cache.
template <int threads, int targets>
struct Collected {
  static constexpr int kPerThread = 4, kTurn = threads * kPerThread;
  int count = 0;     // entries
  int64_t next = 0;  // the first source that was not looked at

  FPET_DEVICE void run(const int64_t* const (&target)[targets], int64_t from, int64_t sources, int64_t low, int64_t high,
                       int2* list, int capacity, int* warp_counts) {
    count = 0;
    for (next = from; next < sources && count + kTurn * targets <= capacity; next += kTurn) {
      const int64_t i0 = next + int64_t(threadIdx.x) * kPerThread;
      int at[kPerThread][targets], found = 0;
#pragma unroll
      for (int k = 0; k < kPerThread; ++k)
#pragma unroll
        for (int t = 0; t < targets; ++t) {
          const int64_t e = i0 + k < sources ? target[t][i0 + k] : -1;
          at[k][t] = e >= low && e < high ? int(e - low) : -1;
          found += at[k][t] >= 0;
        }
      int before = found;
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int other = __shfl_up_sync(kFullWarp, before, lanes);
        if (lane_index() >= lanes) before += other;
      }
      __syncthreads();  // the counts of the last turn and the list of the last call have been read
      if (lane_index() == 31) warp_counts[warp_index()] = before;
      __syncthreads();
      int place = count + before - found;
      for (int w = 0; w < threads / 32; ++w) {
        if (w < warp_index()) place += warp_counts[w];
        count += warp_counts[w];
      }
#pragma unroll
      for (int k = 0; k < kPerThread; ++k)
#pragma unroll
        for (int t = 0; t < targets; ++t)
          if (at[k][t] >= 0) list[place++] = make_int2(int(i0 + k), at[k][t]);
    }
    if (next > sources) next = sources;
    __syncthreads();
  }
};

}  // namespace cuda
}  // namespace fpet
