// Backward. Without a gradient on the key path it is a gather, in one launch. With one, short grids take one launch, too
// (backward_short.cu); all others the gather, the preparing of keys, tiles of scores (backward_pairs.cu), and from dk̂ to k' and the
// weights' shares. The shares are summed in a launch of their own.
#include "backward.cuh"

namespace fpet {
namespace cuda {
namespace {

// --- dx, dsize, γ' -------------------------------------------------------------------------------------------------------------------

constexpr int kSpreadRows = kKeyThreads / kRowLanes;  // per block

template <class S>
__global__ void __launch_bounds__(kKeyThreads, 3) spread(const __grid_constant__ SpreadParams p) {
  const int64_t b = blockIdx.x / p.blocks;
  spread_row<S>(p, b, (blockIdx.x - b * p.blocks) * kSpreadRows + int(threadIdx.x) / kRowLanes, p.q.tokens);
}

// --- from dk̂ to k' and the weights -----------------------------------------------------------------------------------------------------

template <class T>
struct KeyGradientParams {
  PairParams<T> pairs;
  BackwardOutputs out;
  T* weight_parts;                            // (B, blocks, 2, C h): dW_up, then dW_down
  int ld_key, ld_hidden, rows, span, blocks;  // `span` rows a block, `rows` at a time
  bool aligned;
  size_t bytes;

  void plan(const PairParams<T>& pair_params, const BackwardOutputs& outputs);
};

constexpr int kListed = kKeyThreads * 4 * 2;  // entries of Collected: one turn
constexpr size_t kListBytes = kListed * sizeof(int2) + kKeyThreads / 32 * sizeof(int64_t);

template <class T>
void KeyGradientParams<T>::plan(const PairParams<T>& pair_params, const BackwardOutputs& outputs) {
  pairs = pair_params;
  out = outputs;
  const Problem& q = pairs.q;
  const KeyTile<T> tile(q, 2, kListBytes);
  ld_key = tile.ld_key, ld_hidden = tile.ld_hidden, rows = tile.rows, bytes = tile.bytes;
  // A block's share of the weights' gradient is written once: more rows, fewer shares.
  span = out.w_down ? (q.tokens <= 512 ? 128 : 512) : rows;
  blocks = int(ceil_div(q.num_a + q.num_b, int64_t(span)));
  aligned = keys_aligned(q);
}

template <class T>
__global__ void __launch_bounds__(kKeyThreads, 2) key_gradient(const __grid_constant__ KeyGradientParams<T> p) {
  const PairParams<T>& pairs = p.pairs;
  const PreparedKeys<T>& keys = pairs.keys;
  const Problem& q = pairs.q;
  const BackwardOutputs& out = p.out;
  const int64_t b = blockIdx.x / p.blocks, all = q.num_a + q.num_b, image_row = b * all;
  const int channels = int(q.channels), hidden = int(q.hidden), padded = keys.padded;
  int2* list = (int2*)shared_memory();
  int* warp_counts = (int*)(list + kListed);
  int64_t* tokens = (int64_t*)((char*)list + kListBytes);
  T* stage = (T*)(tokens + p.rows);
  T* grad = stage + (hidden ? kProductDepth * kProductTile : 0);
  T* key = grad + p.rows * p.ld_key;
  T* units = key + p.rows * p.ld_key;
  T* grad_units = units + p.rows * p.ld_hidden;
  const int64_t* const targets[2] = {pairs.in.match + b * q.num_a, pairs.in.second + b * q.num_a};

  const int64_t begin = (blockIdx.x - b * p.blocks) * p.span, end = min(all, begin + p.span);
  if (begin == 0)
    for (int64_t e = threadIdx.x; e < q.prefix * channels; e += kKeyThreads) {
      const int64_t at = b * q.tokens * channels + e;
      if (out.refined) store_any(out.refined, out.refined_dtype, at, T(0));
      if (out.key) store_any(out.key, out.key_dtype, at, T(0));
    }
  // What the mean of the two best takes from each of them, in the scale of k'.
  const auto share = [&](int64_t i) {
    T sum = 0;
    for (int s = 0; s < pairs.segments; ++s) sum += pairs.sums[(b * pairs.segments + s) * q.num_a + i];
    return sum / T(2) * keys.inverse(image_row + i);
  };

  for (int64_t first = begin; first < end; first += p.rows) {
    const int rows = int(min(int64_t(p.rows), end - first));
    __syncthreads();
    for (int r = int(threadIdx.x); r < rows; r += kKeyThreads) tokens[r] = row_token(q, first + r);
    for (int r = warp_index(); r < rows; r += kKeyThreads / 32) {
      const int64_t row = first + r, j = row - q.num_a;
      if (j < 0) {
        for (int c = lane_index(); c < channels; c += 32) {
          T sum = 0;
          for (int s = 0; s < pairs.segments; ++s) sum += pairs.part_a[((b * pairs.segments + s) * q.num_a + row) * padded + c];
          grad[r * p.ld_key + c] = sum;
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (pairs.whole_rows) break;
          const int64_t to = image_row + q.num_a + matched(q, targets[k][row]) - q.prefix;
          const T taken = share(row) * keys.inverse(to);
          for (int c = lane_index(); c < channels; c += 32) grad[r * p.ld_key + c] -= taken * keys.at(to, c);
        }
      } else {
        for (int c = lane_index(); c < channels; c += 32) {
          T sum = 0;
          for (int s = 0; s < pairs.chunks; ++s) sum += pairs.part_b[((b * pairs.chunks + s) * q.num_b + j) * padded + c];
          grad[r * p.ld_key + c] = sum;
        }
      }
    }
    const int64_t low = max(first - q.num_a, int64_t(0)), high = first + rows - q.num_a;  // destinations among the rows
    if (high > low && !pairs.whole_rows) {
      Collected<kKeyThreads, 2> found;
      for (int64_t from = 0; from < q.num_a; from = found.next) {
        found.run(targets, from, q.num_a, q.prefix + low, q.prefix + high, list, kListed, warp_counts);
        for (int r = warp_index(); r < rows; r += kKeyThreads / 32) {
          const int64_t j = first + r - q.num_a;
          if (j < 0) continue;
          const T inverse = keys.inverse(image_row + q.num_a + j);
          for (int k = 0; k < found.count; ++k) {
            if (list[k].y != int(j - low)) continue;
            const int64_t i = list[k].x;
            const T taken = share(i) * inverse;
            for (int c = lane_index(); c < channels; c += 32) grad[r * p.ld_key + c] -= taken * keys.at(image_row + i, c);
          }
        }
      }
    }
    // dk' = (dk̂ − k̂ (k̂ · dk̂)) / ‖k'‖; a norm at its floor is a constant, and nothing flows through it.
    for (int r = warp_index(); r < rows; r += kKeyThreads / 32) {
      const int64_t row = image_row + first + r;
      const bool projected = q.cosine && !(keys.norm[row] < T(1e-12));
      T along = 0;
      if (projected) {
        for (int c = lane_index(); c < channels; c += 32) along += keys.at(row, c) * grad[r * p.ld_key + c];
        const T inverse = keys.inverse(row);
        along = warp_sum(along) * inverse * inverse;
      }
      const int64_t at = (b * q.tokens + row_token(q, first + r)) * channels;
      for (int c = lane_index(); c < channels; c += 32) {
        T& g = grad[r * p.ld_key + c];
        if (projected) g -= keys.at(row, c) * along;
        if (out.refined) store_any(out.refined, out.refined_dtype, at + c, g);
        if (out.key && !hidden) store_any(out.key, out.key_dtype, at + c, g / T(q.heads));
      }
    }
    if (!hidden || !(out.w_down || out.key)) continue;

    __syncthreads();
    load_mean_keys(q, p.aligned, b, tokens, rows, key, p.ld_key);
    __syncthreads();
    block_units(q, b, tokens, rows, key, p.ld_key, stage, units, p.ld_hidden);
    const View &up = q.w_up, &down = q.w_down, &mask = q.dropout_mask;
    block_product<T>(
        rows, hidden, channels, stage, [&](int r, int c) { return grad[r * p.ld_key + c]; },
        [&](int c, int h) { return load_any<T>(up, c * up.stride[0] + h * up.stride[1]); },
        [&](int r, int h, T v) {  // this thread wrote the unit
          v = units[r * p.ld_hidden + h] != T(0) ? v * T(q.scale) : T(0);
          if (mask.data) v *= load_any<T>(mask, b * mask.stride[0] + tokens[r] * mask.stride[1] + h * mask.stride[2]);
          grad_units[r * p.ld_hidden + h] = v;
        });
    if (out.w_down) {
      T* part = p.weight_parts + int64_t(blockIdx.x) * 2 * channels * hidden;
      const bool begins = first == begin;
      const auto add = [&](T* at, T v) { *at = begins ? v : *at + v; };
      block_product<T>(
          channels, hidden, rows, stage, [&](int c, int r) { return grad[r * p.ld_key + c]; },
          [&](int r, int h) { return units[r * p.ld_hidden + h]; }, [&](int c, int h, T v) { add(part + c * hidden + h, v); });
      part += channels * hidden;
      block_product<T>(
          hidden, channels, rows, stage, [&](int h, int r) { return grad_units[r * p.ld_hidden + h]; },
          [&](int r, int c) { return key[r * p.ld_key + c]; }, [&](int h, int c, T v) { add(part + h * channels + c, v); });
    }
    if (out.key)
      block_product<T>(
          rows, channels, hidden, stage, [&](int r, int h) { return grad_units[r * p.ld_hidden + h]; },
          [&](int h, int c) { return load_any<T>(down, h * down.stride[0] + c * down.stride[1]); },
          [&](int r, int c, T v) {
            store_any(out.key, out.key_dtype, (b * q.tokens + tokens[r]) * channels + c,
                      (grad[r * p.ld_key + c] + v) / T(q.heads));
          });
  }
}

// --- the weights ---------------------------------------------------------------------------------------------------------------------------

template <class T>
struct SumWeightsParams {
  const T* parts;
  BackwardOutputs out;
  T scale;
  int64_t pieces;
  int size;  // C h
};

// 32 elements a block; every eighth piece to one of its warps, then the eight sums in their order.
constexpr int kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_weights(const __grid_constant__ SumWeightsParams<T> p) {
  T* sums = (T*)shared_memory();
  const int at = int(blockIdx.x) * 32 + lane_index();
  T sum = 0;
  if (at < 2 * p.size)
#pragma unroll 8
    for (int64_t piece = warp_index(); piece < p.pieces; piece += 8) sum += p.parts[piece * 2 * p.size + at];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp_index() || at >= 2 * p.size) return;
  for (int w = 1; w < 8; ++w) sum += sums[w * 32 + lane_index()];
  if (at < p.size) {
    store_any(p.out.w_up, p.out.weight_dtype, at, sum * p.scale);
  } else {
    store_any(p.out.w_down, p.out.weight_dtype, at - p.size, sum);
  }
}

// --- launching -----------------------------------------------------------------------------------------------------------------------------

bool has_key_path(const BackwardOutputs& out) { return out.w_down || out.refined || out.key; }

template <class T>
struct Plan {
  PairParams<T> pairs;
  KeyGradientParams<T> last;
  size_t bytes;

  Plan(const Problem& q, const BackwardOutputs& out, char* base) {
    Arena arena{base};
    pairs.plan(arena, q, sizeof(T) == 8 ? kWideTile : kTileA, sizeof(T) == 8 ? kWideTile : kTileB);
    last.plan(pairs, out);
    last.weight_parts = arena.take<T>(out.w_down ? q.batch * last.blocks * 2 * q.channels * q.hidden : 0);
    bytes = arena.used;
  }
};

CudaStatus launch_spread(const SpreadParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.q.batch * p.blocks));
  switch (p.q.x.dtype) {
    case DType::f64: return launch<spread<double>>(grid, kKeyThreads, 0, stream, p);
    case DType::bf16: return launch<spread<bf16>>(grid, kKeyThreads, 0, stream, p);
    case DType::f16: return launch<spread<f16>>(grid, kKeyThreads, 0, stream, p);
    default: return launch<spread<float>>(grid, kKeyThreads, 0, stream, p);
  }
}

// Bytes of weight gradients that the images of a short grid leave to be summed up.
size_t share_bytes(const Problem& q, const BackwardOutputs& out) {
  return out.w_down ? size_t(q.batch * 2 * q.channels * q.hidden) * sizeof(float) : 0;
}

template <class T>
CudaStatus sum_shares(const Problem& q, const BackwardOutputs& out, const T* parts, int64_t pieces, cudaStream_t stream) {
  if (!out.w_down) return {};
  const SumWeightsParams<T> p{parts, out, T(q.scale), pieces, int(q.channels * q.hidden)};
  return launch<sum_weights<T>>(dim3(unsigned(ceil_div(2 * p.size, 32))), kSumThreads, kSumThreads * sizeof(T), stream, p);
}

SpreadParams spread_params(const Problem& q, const BackwardInputs& in, const BackwardOutputs& out) {
  SpreadParams s{};
  s.q = q;
  s.in = in;
  s.grad_x = out.x;
  s.grad_size = out.size;
  s.size_dtype = out.size_dtype;
  s.blocks = int(ceil_div(q.tokens, int64_t(kSpreadRows)));
  s.aligned = rows_aligned(in.grad_tokens, q.dim) && rows_aligned(in.tokens, q.dim) && rows_aligned(q.x, q.dim) &&
              aligned16(out.x, q.x.dtype, {q.dim});
  return s;
}

// Of tiles: any problem with a key path.
template <class T>
CudaStatus run(SpreadParams s, const BackwardOutputs& out, void* workspace, cudaStream_t stream) {
  const Problem& q = s.q;
  Plan<T> plan(q, out, (char*)workspace);
  s.gamma = const_cast<void*>(plan.pairs.gamma);
  CudaStatus status = launch_spread(s, stream);
  if (status.kernel) return status;
  status = launch_prepare_keys(PrepareKeysParams<T>(q, plan.pairs.keys), stream);
  if (status.kernel) return status;
  plan.pairs.in = s.in;
  status = pair_gradient(plan.pairs, stream);
  if (status.kernel) return status;
  KeyGradientParams<T>& last = plan.last;
  last.pairs = plan.pairs;
  status = launch<key_gradient<T>>(dim3(unsigned(q.batch * last.blocks)), kKeyThreads, last.bytes, stream, last);
  if (status.kernel) return status;
  return sum_shares<T>(q, out, last.weight_parts, q.batch * last.blocks, stream);
}

}  // namespace

const char* tiled_refuses(const Problem& q) {
  const size_t shared = q.wide_scores ? KeyTile<double>(q, 2, kListBytes).bytes : KeyTile<float>(q, 2, kListBytes).bytes;
  if (shared > kSharedEverywhere) return "more key channels and hidden units than shared memory holds four rows of";
  // No kernel has more blocks than the one that prepares keys, four at least in each.
  if (q.batch * (q.tokens / 4 + 1) > 0x7fffffff) return "more than 2^31 thread blocks in a launch";
  return nullptr;
}

KernelList backward_kernels() {
  const Problem q = typical_problem(true);
  char weights;  // asked for: what counts is that there is one
  BackwardOutputs out;
  out.w_down = out.w_up = &weights;
  return {
      entry<spread<float>>("spread<float>", kKeyThreads, 0),
      entry<spread<double>>("spread<double>", kKeyThreads, 0),
      entry<spread<bf16>>("spread<bf16>", kKeyThreads, 0),
      entry<spread<f16>>("spread<f16>", kKeyThreads, 0),
      entry<key_gradient<float>>("key_gradient<float>", kKeyThreads, Plan<float>(q, out, nullptr).last.bytes),
      entry<key_gradient<double>>("key_gradient<double>", kKeyThreads, Plan<double>(q, out, nullptr).last.bytes),
      entry<sum_weights<float>>("sum_weights<float>", kSumThreads, kSumThreads * sizeof(float)),
      entry<sum_weights<double>>("sum_weights<double>", kSumThreads, kSumThreads * sizeof(double)),
  };
}

size_t backward_long_workspace(const Problem& q, const BackwardOutputs& out) {
  if (!q.batch || !has_key_path(out)) return 0;
  return q.wide_scores ? Plan<double>(q, out, nullptr).bytes : Plan<float>(q, out, nullptr).bytes;
}
CudaStatus backward_long(const Problem& q, const BackwardInputs& in, const BackwardOutputs& out, void* workspace,
                         cudaStream_t stream) {
  const SpreadParams s = spread_params(q, in, out);
  if (!has_key_path(out)) return launch_spread(s, stream);
  return q.wide_scores ? run<double>(s, out, workspace, stream) : run<float>(s, out, workspace, stream);
}

}  // namespace cuda

size_t cuda_backward_workspace(const Problem& q, const BackwardOutputs& out) {
  if (q.batch && cuda::has_key_path(out) && cuda::backward_short_takes(q)) return cuda::share_bytes(q, out);
  return cuda::backward_long_workspace(q, out);
}

CudaStatus cuda_backward(const Problem& problem, const BackwardInputs& given, const BackwardOutputs& out, void* workspace,
                         cudaStream_t stream) {
  const Problem q = cuda::with_plain_strides(problem);
  const BackwardInputs in = cuda::with_plain_strides(q, given);
  if (!q.batch) {  // no image, no gradient
    const size_t bytes = out.w_down ? size_t(q.channels * q.hidden * cuda::size_of(out.weight_dtype)) : 0;
    for (void* p : {out.w_down, out.w_up})
      if (const cudaError_t error = bytes ? cudaMemsetAsync(p, 0, bytes, stream) : cudaSuccess; error != cudaSuccess)
        return {error, "cudaMemsetAsync"};
    return {};
  }
  if (!out.x && !out.size && !cuda::has_key_path(out)) return {};
  // One launch where it takes the problem, by shape and dtypes alone: an image's bits must not depend on its batch.
  if (!cuda::has_key_path(out) || !cuda::backward_short_takes(q)) return cuda::backward_long(q, in, out, workspace, stream);
  const CudaStatus status = cuda::backward_short(cuda::spread_params(q, in, out), out, (float*)workspace, stream);
  return status.kernel ? status : cuda::sum_shares(q, out, (const float*)workspace, q.batch, stream);
}

}  // namespace fpet
