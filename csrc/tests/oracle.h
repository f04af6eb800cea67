// Random problems for the CUDA kernels, and the forward in float64 (the truth) and in float32 (what it may be compared with), as
// docs/mathematics.md has it. Tests of the same source run on a GPU and, emulated, on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fpet/bdm_cuda.h"
#include "numbers.h"

namespace oracle {

// How a tensor lies in memory.
enum class Layout { packed, padded, strided, shifted };  // rows padded by 16 bytes or so; every second element; one element off

struct Tensor {
  vector<int64_t> sizes, strides;
  DType dtype = DType::f32;
  int64_t start = 0;  // of the first element
  vector<char> data;

  Tensor() = default;
  Tensor(vector<int64_t> shape, DType type, Layout layout = Layout::packed)
      : sizes(std::move(shape)), strides(sizes.size()), dtype(type) {
    int64_t step = layout == Layout::strided ? 2 : 1, last = 1;
    start = layout == Layout::shifted ? 1 : 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = step;
      last += std::max<int64_t>(sizes[d] - 1, 0) * step;
      step *= std::max<int64_t>(sizes[d], 1);
      if (layout == Layout::padded) step += 16;
      if (layout == Layout::strided) step += 1;
    }
    data.assign(u((start + last) * bytes_of(type)), char(0xff));  // NaN until written, and no byte more than needed
  }
  int64_t offset(const vector<int64_t>& index) const {
    int64_t at = start;
    for (size_t d = 0; d < index.size(); ++d) at += index[d] * strides[d];
    return at;
  }
  double at(const vector<int64_t>& index) const { return decode(&data[u(offset(index) * bytes_of(dtype))], dtype); }
  void set(const vector<int64_t>& index, double v) { encode(&data[u(offset(index) * bytes_of(dtype))], dtype, v); }
  fpet::View view(const void* device) const {
    fpet::View v;
    if (data.empty()) return v;
    v.data = static_cast<const char*>(device) + start * bytes_of(dtype);
    v.dtype = dtype;
    for (size_t d = 0; d < strides.size(); ++d) v.stride[d] = strides[d];
    return v;
  }
  template <class F>
  void fill(const F& value) {
    vector<int64_t> index(sizes.size(), 0);
    for (const int64_t n : sizes)
      if (n == 0) return;
    for (;;) {
      set(index, value());
      size_t d = sizes.size();
      while (d-- > 0) {
        if (++index[d] < sizes[d]) break;
        index[d] = 0;
      }
      if (d == size_t(-1)) return;
    }
  }
  explicit operator bool() const { return !data.empty(); }
};

// Memory of the device, with what is to be read there.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : size_(bytes) {
    if (bytes && cudaMalloc(&p_, bytes) != cudaSuccess) std::printf("no memory\n"), std::abort();
    if (bytes) cudaMemset(p_, 0xff, bytes);
  }
  template <class T>
  explicit Buffer(const vector<T>& v) : Buffer(v.size() * sizeof(T)) {
    if (size_) cudaMemcpy(p_, v.data(), size_, cudaMemcpyHostToDevice);
  }
  Buffer(Buffer&& o) noexcept : p_(std::exchange(o.p_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(p_, o.p_);
    std::swap(size_, o.size_);
    return *this;
  }
  ~Buffer() { cudaFree(p_); }
  void* get() const { return p_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(p_);
  }
  template <class T>
  vector<T> read() const {
    vector<T> v(size_ / sizeof(T));
    if (size_) cudaMemcpy(v.data(), p_, size_, cudaMemcpyDeviceToHost);
    return v;
  }

 private:
  void* p_ = nullptr;
  size_t size_ = 0;
};

enum class Mask { none, boolean, f32, bf16, f64 };
enum class Values { coarse, normal, tied };  // multiples of 1/64; any number; few different keys

struct Config {
  int64_t batch = 1, prefix = 1, grid_h = 14, grid_w = 14, dim = 32, channels = 64, heads = 1, hidden = 0;
  DType x = DType::f32, key = DType::f32, weight = DType::f32;
  bool size = false, delta = false, cosine = true, lists = false;
  Mask mask = Mask::none;
  Layout layout = Layout::packed;
  Values values = Values::normal;
  int64_t num_a = -1;  // with lists: so many sources, the rest destinations
};

struct Case {
  Config c;
  int64_t n, num_a, num_b, merged;
  Tensor x, key, size, w_down, w_up, mask, delta, grad, grad_size;
  vector<int64_t> pos_a, pos_b;  // without prefix
  std::mt19937 rng;

  explicit Case(const Config& config, unsigned seed = 7) : c(config), rng(seed) {
    const int64_t patches = c.grid_h * c.grid_w;
    for (int64_t i = 0; i < patches; ++i) {
      const bool in_a = c.num_a >= 0 ? i < c.num_a : c.lists ? i % 2 == 0 : (i / c.grid_w + i % c.grid_w) % 2 == 0;
      (in_a ? pos_a : pos_b).push_back(i);
    }
    if (c.lists) std::shuffle(pos_b.begin(), pos_b.end(), rng);  // any order is a split
    num_a = int64_t(pos_a.size());
    num_b = int64_t(pos_b.size());
    n = c.prefix + patches;
    merged = c.prefix + num_b;
    const DType wide = c.x == DType::f64 ? DType::f64 : DType::f32;
    x = random({c.batch, n, c.dim}, c.x);
    key = random({c.batch, c.heads, n, c.channels}, c.key);
    if (c.values == Values::tied) key.fill([&] { return double(int(rng() % 2)) - 0.5; });
    if (c.size) {
      size = Tensor({c.batch, n}, wide, c.layout);
      size.fill([&] { return 1.0 + rng() % 4; });
    }
    if (c.hidden) {
      w_down = random({c.hidden, c.channels}, c.weight, 0.25);
      w_up = random({c.channels, c.hidden}, c.weight, 0.25);
      if (c.mask != Mask::none) {
        const DType type = c.mask == Mask::boolean ? DType::boolean
                           : c.mask == Mask::f32   ? DType::f32
                           : c.mask == Mask::bf16  ? DType::bf16
                                                   : DType::f64;
        mask = Tensor({c.batch, n, c.hidden}, type, c.layout);
        mask.fill([&] { return rng() % 4 ? (c.mask == Mask::boolean ? 1.0 : 1.25) : 0.0; });
      }
    }
    if (c.delta) delta = random({c.batch, n, c.channels}, c.key);
    grad = random({c.batch, merged, c.dim}, c.x);
    grad_size = random({c.batch, merged}, wide);
  }

  Tensor random(vector<int64_t> shape, DType type, double scale = 1) {
    Tensor t(std::move(shape), type, c.layout);
    if (c.values == Values::normal) {
      std::normal_distribution<double> normal(0, scale);
      t.fill([&] { return normal(rng); });
    } else {
      t.fill([&] { return scale * double(int(rng() % 256) - 128) / 64; });
    }
    return t;
  }

  // Of images [first, first + count); `device` maps a tensor to its address there.
  template <class F>
  fpet::Problem problem(const int64_t* a, const int64_t* b, const F& device, int64_t first, int64_t count) const {
    fpet::Problem p;
    p.batch = count;
    p.tokens = n;
    p.dim = c.dim;
    p.channels = c.channels;
    p.heads = c.heads;
    p.hidden = c.hidden;
    p.prefix = c.prefix;
    p.num_a = num_a;
    p.num_b = num_b;
    p.grid_h = c.grid_h;
    p.grid_w = c.grid_w;
    if (c.lists) {
      p.split_a = a;
      p.split_b = b;
    }
    p.scale = 0.75;
    p.cosine = c.cosine;
    for (const Tensor* t : {&x, &key, &size, &w_down, &w_up, &delta}) p.wide_scores |= *t && t->dtype == DType::f64;
    const auto image = [&](const Tensor& t) {
      fpet::View v = t.view(device(t));
      if (v.data) v.data = static_cast<const char*>(v.data) + first * v.stride[0] * bytes_of(v.dtype);
      return v;
    };
    p.x = image(x);
    p.key = image(key);
    p.size = image(size);
    p.w_down = w_down.view(device(w_down));
    p.w_up = w_up.view(device(w_up));
    p.dropout_mask = image(mask);
    p.key_delta = image(delta);
    return p;
  }
  bool wide() const {
    bool yes = false;
    for (const Tensor* t : {&x, &key, &size, &w_down, &w_up, &delta}) yes |= *t && t->dtype == DType::f64;
    return yes;
  }
};

// Scores of one image, computed in T.
template <class T>
struct Scores {
  vector<T> key, hidden, refined, norm, unit;  // (N, C), (N, h), (N, C), (N), (N, C)
  vector<T> score;                             // (N_A, N_B)

  Scores(const Case& t, int64_t b) {
    const Config& c = t.c;
    const int64_t N = t.n, C = c.channels, H = c.hidden;
    key.resize(u(N * C));
    hidden.resize(u(N * H));
    refined.resize(u(N * C));
    unit.resize(u(N * C));
    norm.assign(u(N), T(1));
    vector<T> down(u(H * C)), up(u(C * H));
    for (int64_t h = 0; h < H; ++h)
      for (int64_t ch = 0; ch < C; ++ch) {
        down[u(h * C + ch)] = T(t.w_down.at({h, ch}));
        up[u(ch * H + h)] = T(t.w_up.at({ch, h}));
      }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t ch = 0; ch < C; ++ch) {
        T sum = 0;
        for (int64_t h = 0; h < c.heads; ++h) sum += T(t.key.at({b, h, n, ch}));
        key[u(n * C + ch)] = sum / T(c.heads);
      }
      for (int64_t h = 0; h < H; ++h) {
        T sum = 0;
        for (int64_t ch = 0; ch < C; ++ch) sum += down[u(h * C + ch)] * key[u(n * C + ch)];
        hidden[u(n * H + h)] = std::max(sum, T(0)) * (t.mask ? T(t.mask.at({b, n, h})) : T(1));
      }
      T squares = 0;
      for (int64_t ch = 0; ch < C; ++ch) {
        T delta = 0;
        for (int64_t h = 0; h < H; ++h) delta += up[u(ch * H + h)] * hidden[u(n * H + h)];
        T v = key[u(n * C + ch)] + T(0.75) * delta;
        if (t.delta) v += T(t.delta.at({b, n, ch}));
        refined[u(n * C + ch)] = v;
        squares += v * v;
      }
      if (c.cosine) norm[u(n)] = std::max(std::sqrt(squares), T(1e-12));
      for (int64_t ch = 0; ch < C; ++ch) unit[u(n * C + ch)] = refined[u(n * C + ch)] / norm[u(n)];
    }
    score.resize(u(t.num_a * t.num_b));
    for (int64_t i = 0; i < t.num_a; ++i)
      for (int64_t j = 0; j < t.num_b; ++j) {
        const T *a = &unit[u((c.prefix + t.pos_a[u(i)]) * C)], *k = &unit[u((c.prefix + t.pos_b[u(j)]) * C)];
        T s = 0;
        for (int64_t ch = 0; ch < C; ++ch) s += a[ch] * k[ch];
        score[u(i * t.num_b + j)] = s;
      }
  }
};

// Tokens (M, D) and sizes (M) of one image for a given match, computed in T.
template <class T>
struct Merged {
  vector<T> size, tokens;

  Merged(const Case& t, int64_t b, const int64_t* match) : size(u(t.merged)), tokens(u(t.merged * t.c.dim)) {
    const Config& c = t.c;
    for (int64_t m = 0; m < t.merged; ++m) {
      const int64_t own = m < c.prefix ? m : c.prefix + t.pos_b[u(m - c.prefix)];
      add(t, b, m, own);
    }
    for (int64_t i = 0; i < t.num_a; ++i) add(t, b, match[i], c.prefix + t.pos_a[u(i)]);
    for (int64_t m = 0; m < t.merged; ++m)
      for (int64_t d = 0; d < c.dim; ++d) tokens[u(m * c.dim + d)] /= size[u(m)];
  }
  void add(const Case& t, int64_t b, int64_t m, int64_t n) {
    const T w = t.size ? T(t.size.at({b, n})) : T(1);
    size[u(m)] += w;
    for (int64_t d = 0; d < t.c.dim; ++d) tokens[u(m * t.c.dim + d)] += w * T(t.x.at({b, n, d}));
  }
};

}  // namespace oracle
