// The N_A × N_B work of the backward, each tile formed once: dM on matrix units over D, scores anew, ds, and its products with the
// keys of either side. A tile of ds goes through shared memory as bfloat16 parts, since it is a left factor both as it is and
// transposed.
#include "backward.cuh"

namespace fpet {
namespace cuda {
namespace {

constexpr int kPartBytes = kTileA * kTileB * 2, kWeightBytes = 3 * kPartBytes;  // a part of ds': two panels of (64, 64)

struct PairVectors {
  union {
    struct {
      float inverse_n[kTileB], gamma[kTileB];
    } column;
    float sums[4][kTileA];  // of ds over the columns of a warp
  };
  float inverse_b[kTileB];
  float mid[kTileA], size[kTileA], inverse_a[kTileA];
  int best[kTileA], second[kTileA];
};

constexpr size_t pair_shared(int stages) { return size_t(stages) * kStageBytes + kWeightBytes + sizeof(PairVectors); }

FPET_DEVICE float row_total(const PairVectors& v, int row) {
  return ((v.sums[0][row] + v.sums[1][row]) + v.sums[2][row]) + v.sums[3][row];
}

// What comes into the ring, in the order in which it is used: of every tile D in steps of 128 bytes, then the parts of the keys
// that make scores, then the parts that ds is multiplied with.
template <class S>
struct PairLoader {
  static constexpr int kDepth = kRowBytes / int(sizeof(S));
  const PairParams<float>& p;
  int i0, j0, i_end, j_begin, j_end;
  int phase = 0, pair = 0, first = 0;  // `first` column of x, or channel of a key
  int token[kTileA / 32];

  FPET_DEVICE PairLoader(const PairParams<float>& params, int i_begin, int i_stop, int j_start, int j_stop)
      : p(params), i0(i_begin), j0(j_start), i_end(i_stop), j_begin(j_start), j_end(j_stop) {
    find_tokens();
  }
  FPET_DEVICE void find_tokens() {
    const Problem& q = p.q;
#pragma unroll
    for (int r = 0; r < kTileA / 32; ++r) {
      const int i = i0 + copy_row(r);
      token[r] = i < i_end ? int(source_token(q, i)) : 0;
    }
  }
  FPET_DEVICE void operator()(char* stage) {
    if (i0 >= i_end) return;
    const Problem& q = p.q;
    const PreparedKeys<float>& keys = p.keys;
    const int64_t b = opaque(int(blockIdx.x)) / (p.chunks * p.segments);
    if (phase == 0) {
      const int at = first + copy_chunk() * (16 / int(sizeof(S)));
      const S* x = (const S*)q.x.data + b * q.x.stride[0];
#pragma unroll
      for (int r = 0; r < kTileA / 32; ++r)
        copy_row_chunk(copy_target(stage, r), x + token[r] * q.x.stride[1], at, int(q.dim), q.x.stride[2], p.x_aligned,
                       i0 + copy_row(r) < i_end);
      const View& grad = p.in.grad_tokens;
      const S* row = (const S*)grad.data + b * grad.stride[0] + (q.prefix + j0) * grad.stride[1];
#pragma unroll 2
      for (int r = 0; r < kTileB / 32; ++r)
        copy_row_chunk(copy_target(stage + kTileA * kRowBytes, r), row + copy_row(r) * grad.stride[1], at, int(q.dim),
                       grad.stride[2], p.grad_aligned, j0 + copy_row(r) < j_end);
      first += kDepth;
      if (first < q.dim) return;
      first = 0, phase = 1, pair = first_pair(keys.parts);
      return;
    }
    const bool scores = phase == 1;
    copy_keys(stage, keys.part, keys.parts, keys.padded, b * (q.num_a + q.num_b), q.num_a, q.num_b, i0, j0, first,
              scores ? pair_left(pair) : pair, scores ? pair_right(pair) : pair);
    if (scores ? ++pair < kPairs : --pair >= 0) return;
    pair = scores ? first_pair(keys.parts) : keys.parts - 1;
    first += kChannelBlock;
    if (first < keys.padded) return;
    first = 0;
    if (scores) {
      phase = 2, pair = keys.parts - 1;
      return;
    }
    phase = 0;
    j0 += kTileB;
    if (j0 < j_end) return;
    j0 = j_begin;
    i0 += kTileA;
    if (i0 < i_end) find_tokens();
  }
};

// Writes the parts of ds' for others to multiply.
FPET_DEVICE void write_weights(char* weights, const Tile& ds) {
  const int l = opaque(lane_index()), w = opaque(warp_index()), row = w / 4 * 32, column = w % 4 * 32;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Three three = split_three(ds[m][n][2 * half], ds[m][n][2 * half + 1]);
        char* panel = weights + column / 64 * (kTileA * kRowBytes) + (row + m * 16 + half * 8) * kRowBytes;
        char* at = panel + (turned(l / 4, 0) ^ (column % 64 / 8 + n) << 4) + l % 4 * 4;
#pragma unroll
        for (int i = 0; i < 3; ++i) *(uint32_t*)(at + i * kPartBytes) = three.part[i];
      }
}

// a (64 × 64 channels) += ds' k'_B, 32 × 16 a warp; b (128 × 64 channels) += ds'ᵀ k'_A, 32 × 32 a warp.
struct KeySums {
  float a[2][2][4], b[2][4][4];

  FPET_DEVICE void add(const char* weights, const char* stage) {
    const char *keys_a = stage, *keys_b = stage + kTileA * kRowBytes;
    const int w = warp_index();
#pragma unroll 2
    for (int k = 0; k < kTileB; k += 16) {
      uint32_t left[2][4], right[2][2];
      const char* panel = weights + k / 64 * (kTileA * kRowBytes);
      load_right_turned(right, keys_b, k, w % 4 * 2);
#pragma unroll
      for (int m = 0; m < 2; ++m) load_left(left[m], panel, w / 4 * 32 + m * 16, k % 64 / 8);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_bf16(a[m][n], left[m], right[n]);
    }
    const int row = w / 2 * 32;  // of destinations
#pragma unroll 1
    for (int k = 0; k < kTileA; k += 16) {
      uint32_t left[2][4], right[2][2][2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_left_turned(left[m], weights + row / 64 * (kTileA * kRowBytes), k, (row % 64 + m * 16) / 8);
#pragma unroll
      for (int n = 0; n < 2; ++n) load_right_turned(right[n], keys_a, k, w % 2 * 4 + n * 2);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_bf16(b[m][n], left[m], right[n / 2][n % 2]);
    }
  }
};

// (+)= at two neighbouring channels; the same thread comes back to the same place.
FPET_DEVICE void add_pair(float* at, float v0, float v1, bool first) {
  float2 v = first ? make_float2(0.f, 0.f) : *(const float2*)at;
  v.x += v0, v.y += v1;
  *(float2*)at = v;
}

template <class S>
__global__ void __launch_bounds__(kTileThreads, 2) pair_tiles(const __grid_constant__ PairParams<float> p) {
  const Problem& q = p.q;
  const int per_image = p.chunks * p.segments;
  const int rest = int(blockIdx.x) % per_image;
  const int num_a = int(q.num_a), num_b = int(q.num_b);
  const int i_begin = rest / p.segments * p.chunk, i_end = min(num_a, i_begin + p.chunk);
  const int j_begin = rest % p.segments * p.segment, j_end = min(num_b, j_begin + p.segment);
  const int padded = p.keys.padded, parts = p.keys.parts;
  Ring<> ring{shared_memory(), p.stages};
  char* weights = ring.base + p.stages * kStageBytes;
  PairVectors& v = *(PairVectors*)(weights + kWeightBytes);
  PairLoader<S> fill(p, i_begin, i_end, j_begin, j_end);
  ring.start(fill);

  for (int i0 = i_begin; i0 < i_end; i0 += kTileA)
    for (int j0 = j_begin; j0 < j_end; j0 += kTileB) {
      __syncthreads();  // the last tile has read these
      const int64_t b = opaque(int(blockIdx.x)) / per_image, image_row = b * (num_a + num_b);
      for (int c = int(threadIdx.x); c < kTileB; c += kTileThreads) {
        const int j = j0 + c;
        const bool exists = j < j_end;
        const View& n = p.in.merged_size;
        v.column.inverse_n[c] = exists ? 1.f / load_any<float>(n, b * n.stride[0] + (q.prefix + j) * n.stride[1]) : 0.f;
        v.column.gamma[c] = exists ? ((const float*)p.gamma)[b * num_b + j] : 0.f;
        v.inverse_b[c] = exists ? p.keys.inverse(image_row + q.num_a + j) : 0.f;
      }
      for (int r = int(threadIdx.x) - kTileB; r >= 0 && r < kTileA; r += kTileThreads) {
        const int i = i0 + r;
        const bool exists = i < i_end;
        v.best[r] = exists ? int(matched(q, p.in.match[b * num_a + i]) - q.prefix) - j0 : -1;
        v.second[r] = exists ? int(matched(q, p.in.second[b * num_a + i]) - q.prefix) - j0 : -1;
        v.mid[r] = exists ? ((const float*)p.in.mid)[b * num_a + i] : 0.f;
        v.inverse_a[r] = exists ? p.keys.inverse(image_row + i) : 0.f;
        v.size[r] = !exists        ? 0.f
                    : !q.size.data ? 1.f
                                   : load_any<float>(q.size, b * q.size.stride[0] + source_token(q, i) * q.size.stride[1]);
      }

      Tile grad = {};  // G_j · x_i
      for (int d = 0; d < int(q.dim); d += PairLoader<S>::kDepth) add_products<S, false>(grad, ring.next(fill));
      // Out of the registers until scores are there; where the parts of the last ds' were, which all have read.
      float* own = (float*)weights + opaque(int(threadIdx.x));
#pragma unroll
      for (int e = 0; e < 32; ++e) own[e * kTileThreads] = grad[e / 16][e / 4 % 4][e % 4];
      Tile scores = {};
      for (int channel = 0; channel < padded; channel += kChannelBlock)
        for (int pair = first_pair(parts); pair < kPairs; ++pair) add_products<bf16, true>(scores, ring.next(fill));

      float row_sum[2][2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = opaque(tile_row(m, half)), left = opaque(tile_column(0));
          const float mid = v.mid[row], size = v.size[row], inverse_a = v.inverse_a[row];
          float sum = 0.f;
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = left + n * 8 + e;
              const float scale = inverse_a * v.inverse_b[column];
              const float g = own[(m * 16 + n * 4 + 2 * half + e) * kTileThreads];
              const float grad_match = (g * v.column.inverse_n[column] + v.column.gamma[column]) * size;
              float& score = scores[m][n][2 * half + e];
              const float t = expf(-fabsf(score * scale - mid));  // p (1 − p) is even in s − m
              const float ds = grad_match * __fdividef(t, (1.f + t) * (1.f + t));
              sum += ds;
              score = ds * scale;  // from here on, ds'
            }
          row_sum[m][half] = warp_sum<4>(sum);
        }
      __syncthreads();  // sums lie where other warps may still have read
      if (opaque(lane_index()) % 4 == 0)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) v.sums[opaque(warp_index()) % 4][opaque(tile_row(m, half))] = row_sum[m][half];
      if (p.whole_rows) {  // what the mean of the two best takes from each of them
        __syncthreads();
        const int left = opaque(tile_column(0));
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = opaque(tile_row(m, half)), best = v.best[row], second = v.second[row];
            const float share = row_total(v, row) / 2.f * v.inverse_a[row];
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int column = left + n * 8 + e;
                if (column == best || column == second) scores[m][n][2 * half + e] -= share * v.inverse_b[column];
              }
          }
      }
      write_weights(weights, scores);

      for (int channel = 0; channel < padded; channel += kChannelBlock) {
        KeySums sums = {};
#pragma unroll 1
        for (int part = parts - 1; part >= 0; --part) {
          const char* stage = ring.next(fill);
#pragma unroll 1
          for (int i = 2 - part; i >= 0; --i) sums.add(weights + i * kPartBytes, stage);  // the smallest products first
        }
        const int block = opaque(int(blockIdx.x)), outer = block / p.segments, inner = block % p.segments;
        const int g = opaque(lane_index() / 4), t = lane_index() % 4, w = warp_index();
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = i0 + w / 4 * 32 + m * 16 + half * 8 + g, j = j0 + w / 2 * 32 + m * 16 + half * 8 + g;
            float* to_a =
                p.part_a + (int64_t(outer / p.chunks * p.segments + inner) * num_a + i) * padded + channel + w % 4 * 16 + 2 * t;
            float* to_b = p.part_b + (int64_t(outer) * num_b + j) * padded + channel + w % 2 * 32 + 2 * t;
            if (i < i_end)
#pragma unroll
              for (int n = 0; n < 2; ++n)
                add_pair(to_a + n * 8, sums.a[m][n][2 * half], sums.a[m][n][2 * half + 1], j0 == j_begin);
            if (j < j_end)
#pragma unroll
              for (int n = 0; n < 4; ++n)
                add_pair(to_b + n * 8, sums.b[m][n][2 * half], sums.b[m][n][2 * half + 1], i0 % p.chunk == 0);
          }
      }
      // A barrier of the ring lies between this and the sums of the warps.
      const int row = int(threadIdx.x);
      if (!p.whole_rows && row < kTileA && i0 + row < i_end) {
        const int block = opaque(int(blockIdx.x));
        float* to = p.sums + (int64_t(block / per_image) * p.segments + block % p.segments) * num_a + i0 + row;
        *to = j0 == j_begin ? row_total(v, row) : *to + row_total(v, row);
      }
    }
}

// --- float64 ---------------------------------------------------------------------------------------------------------------------------

constexpr int kWideThreads = 256, kDepth = 16, kPad = kDepth + 1;
constexpr size_t kWideShared = (2 * kWideTile * kPad + kWideTile * (kWideTile + 1)) * sizeof(double);

// The same in float64 multiply-adds: tiles of 32 × 32, 2 × 2 a thread.
__global__ void __launch_bounds__(kWideThreads, 2) pair_wide(const __grid_constant__ PairParams<double> p) {
  const Problem& q = p.q;
  const int per_image = p.chunks * p.segments, padded = p.keys.padded;
  const int64_t b = blockIdx.x / per_image;
  const int rest = int(blockIdx.x - b * per_image), chunk = rest / p.segments, segment = rest % p.segments;
  const int64_t i_begin = chunk * p.chunk, i_end = min(q.num_a, i_begin + p.chunk);
  const int64_t j_begin = segment * p.segment, j_end = min(q.num_b, j_begin + p.segment);
  const int64_t image_row = b * (q.num_a + q.num_b);
  double* left = (double*)shared_memory();
  double* right = left + kWideTile * kPad;
  double* weights = right + kWideTile * kPad;  // ds', (32, 33)
  const int r = int(threadIdx.x) / 16, c = int(threadIdx.x) % 16;
  for (int64_t i0 = i_begin; i0 < i_end; i0 += kWideTile)
    for (int64_t j0 = j_begin; j0 < j_end; j0 += kWideTile) {
      const auto product = [&](double (&sum)[2][2], int64_t depth, const auto& load_left, const auto& load_right) {
        for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
          __syncthreads();
          for (int e = int(threadIdx.x); e < kWideTile * kDepth; e += kWideThreads) {
            const int row = e / kDepth, k = e % kDepth;
            left[row * kPad + k] = i0 + row < i_end && k0 + k < depth ? load_left(i0 + row, k0 + k) : 0.0;
            right[row * kPad + k] = j0 + row < j_end && k0 + k < depth ? load_right(j0 + row, k0 + k) : 0.0;
          }
          __syncthreads();
          for (int k = 0; k < kDepth; ++k)
            for (int m = 0; m < 2; ++m)
              for (int n = 0; n < 2; ++n) sum[m][n] += left[(r + 16 * m) * kPad + k] * right[(c + 16 * n) * kPad + k];
        }
      };
      const View &x = q.x, &g = p.in.grad_tokens, &sizes = p.in.merged_size;
      double grad[2][2] = {}, scores[2][2] = {};
      product(
          grad, q.dim,
          [&](int64_t i, int64_t d) {
            return load_any<double>(x, b * x.stride[0] + source_token(q, i) * x.stride[1] + d * x.stride[2]);
          },
          [&](int64_t j, int64_t d) {
            return load_any<double>(g, b * g.stride[0] + (q.prefix + j) * g.stride[1] + d * g.stride[2]);
          });
      product(
          scores, padded, [&](int64_t i, int64_t k) { return p.keys.at(image_row + i, int(k)); },
          [&](int64_t j, int64_t k) { return p.keys.at(image_row + q.num_a + j, int(k)); });
      for (int m = 0; m < 2; ++m) {
        const int64_t i = i0 + r + 16 * m;
        double sum = 0;
        for (int n = 0; n < 2; ++n) {
          const int64_t j = j0 + c + 16 * n;
          double ds = 0, scale = 0;
          if (i < i_end && j < j_end) {
            const int64_t at = b * q.num_b + j;
            const double n_j = load_any<double>(sizes, b * sizes.stride[0] + (q.prefix + j) * sizes.stride[1]);
            const double gamma = q.x.dtype == DType::f64 ? ((const double*)p.gamma)[at] : double(((const float*)p.gamma)[at]);
            const double size =
                q.size.data ? load_any<double>(q.size, b * q.size.stride[0] + source_token(q, i) * q.size.stride[1]) : 1.0;
            scale = p.keys.inverse(image_row + i) * p.keys.inverse(image_row + q.num_a + j);
            const double t = exp(-fabs(scores[m][n] * scale - ((const double*)p.in.mid)[b * q.num_a + i]));
            ds = (grad[m][n] / n_j + gamma) * size * (t / ((1.0 + t) * (1.0 + t)));
          }
          sum += ds;
          weights[(r + 16 * m) * (kWideTile + 1) + c + 16 * n] = ds * scale;
        }
        sum = warp_sum<16>(sum);
        if (c == 0 && i < i_end) {
          double* to = p.sums + (b * p.segments + segment) * q.num_a + i;
          *to = j0 == j_begin ? sum : *to + sum;
        }
      }
      __syncthreads();
      for (int e = int(threadIdx.x); e < kWideTile * padded; e += kWideThreads) {
        const int row = e / padded, k = e - row * padded;
        double sum_a = 0, sum_b = 0;
        for (int o = 0; o < kWideTile; ++o) {
          if (j0 + o < j_end) sum_a += weights[row * (kWideTile + 1) + o] * p.keys.at(image_row + q.num_a + j0 + o, k);
          if (i0 + o < i_end) sum_b += weights[o * (kWideTile + 1) + row] * p.keys.at(image_row + i0 + o, k);
        }
        if (i0 + row < i_end) {
          double* to = p.part_a + ((b * p.segments + segment) * q.num_a + i0 + row) * padded + k;
          *to = j0 == j_begin ? sum_a : *to + sum_a;
        }
        if (j0 + row < j_end) {
          double* to = p.part_b + ((b * p.chunks + chunk) * q.num_b + j0 + row) * padded + k;
          *to = i0 == i_begin ? sum_b : *to + sum_b;
        }
      }
      __syncthreads();  // ds' has been read
    }
}

// As many stages as leave room for two blocks.
int pair_stages() {
  int stages = 2;
  while (stages < 4 && pair_shared(stages + 1) <= limits().shared_for_two()) ++stages;
  return stages;
}

}  // namespace

CudaStatus pair_gradient(PairParams<float> p, cudaStream_t stream) {
  const Problem& q = p.q;
  p.x_aligned = rows_aligned(q.x, q.dim), p.grad_aligned = rows_aligned(p.in.grad_tokens, q.dim);
  p.stages = pair_stages();
  const dim3 grid(unsigned(q.batch * p.chunks * p.segments));
  switch (q.x.dtype) {
    case DType::bf16: return launch<pair_tiles<bf16>>(grid, kTileThreads, pair_shared(p.stages), stream, p);
    case DType::f16: return launch<pair_tiles<f16>>(grid, kTileThreads, pair_shared(p.stages), stream, p);
    default: return launch<pair_tiles<float>>(grid, kTileThreads, pair_shared(p.stages), stream, p);
  }
}

CudaStatus pair_gradient(const PairParams<double>& p, cudaStream_t stream) {
  return launch<pair_wide>(dim3(unsigned(p.q.batch * p.chunks * p.segments)), kWideThreads, kWideShared, stream, p);
}

KernelList pair_gradient_kernels() {
  const size_t shared = pair_shared(pair_stages());
  return {
      entry<pair_tiles<float>>("pair_tiles<float>", kTileThreads, shared),
      entry<pair_tiles<bf16>>("pair_tiles<bf16>", kTileThreads, shared),
      entry<pair_tiles<f16>>("pair_tiles<f16>", kTileThreads, shared),
      entry<pair_wide>("pair_wide", kWideThreads, kWideShared),
  };
}

}  // namespace cuda
}  // namespace fpet
