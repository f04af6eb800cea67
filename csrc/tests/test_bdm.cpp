// The torch-free kernels against a float64 oracle that follows docs/mathematics.md line by line; and the promises that a
// comparison can't see: the same bits whatever the threads, every output element written, no byte outside the workspace.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fpet/bdm.h"
#include "numbers.h"

namespace {

using namespace oracle;

// A tensor with its own strides: padded in every dimension, optionally with a strided last dimension.
struct Tensor {
  vector<int64_t> sizes, strides;
  DType dtype = DType::f32;
  vector<char> data;

  Tensor() = default;
  Tensor(vector<int64_t> shape, DType type, bool strided = false)
      : sizes(std::move(shape)), strides(sizes.size()), dtype(type) {
    int64_t step = strided ? 2 : 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = step;
      step *= std::max<int64_t>(sizes[d], 1) + (strided ? 1 : 0);
    }
    data.assign(u(step * bytes_of(type)), char(0xff));  // NaN until written
  }
  int64_t offset(std::initializer_list<int64_t> index) const {
    int64_t at = 0;
    size_t d = 0;
    for (int64_t i : index) at += i * strides[d++];
    return at;
  }
  double at(std::initializer_list<int64_t> index) const { return decode(&data[u(offset(index) * bytes_of(dtype))], dtype); }
  void set(std::initializer_list<int64_t> index, double v) { encode(&data[u(offset(index) * bytes_of(dtype))], dtype, v); }
  fpet::View view() const {
    fpet::View v;
    if (data.empty()) return v;
    v.data = data.data();
    v.dtype = dtype;
    for (size_t d = 0; d < strides.size(); ++d) v.stride[d] = strides[d];
    return v;
  }
  explicit operator bool() const { return !data.empty(); }
};

std::mt19937 rng(7);
// Multiples of 1/64 in [-2, 2): exact in every dtype.
double draw() { return double(int(rng() % 256) - 128) / 64.0; }

template <class F>
void for_each_index(const vector<int64_t>& sizes, const F& f) {
  if (sizes.size() == 2)
    for (int64_t i = 0; i < sizes[0]; ++i)
      for (int64_t j = 0; j < sizes[1]; ++j) f(i, j, int64_t(-1));
  else
    for (int64_t i = 0; i < sizes[0]; ++i)
      for (int64_t j = 0; j < sizes[1]; ++j)
        for (int64_t k = 0; k < sizes[2]; ++k) f(i, j, k);
}

Tensor random(vector<int64_t> sizes, DType type, bool strided, const std::function<double()>& value = draw) {
  Tensor t(sizes, type, strided);
  if (sizes.size() == 4) {
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t h = 0; h < sizes[1]; ++h)
        for (int64_t n = 0; n < sizes[2]; ++n)
          for (int64_t c = 0; c < sizes[3]; ++c) t.set({b, h, n, c}, value());
    return t;
  }
  for_each_index(sizes, [&](int64_t i, int64_t j, int64_t k) { k < 0 ? t.set({i, j}, value()) : t.set({i, j, k}, value()); });
  return t;
}

struct Config {
  int64_t batch, prefix, grid_h, grid_w, dim, channels, heads, hidden;
  DType x, key, weight;
  bool size, mask, delta, cosine, strided, alternating, no_sources = false;
};

struct Case {
  Config c;
  int64_t n, num_a, num_b, merged;
  Tensor x, key, size, w_down, w_up, mask, delta, grad, grad_size;
  vector<int64_t> pos_a, pos_b;  // without prefix
  fpet::Problem problem;

  explicit Case(const Config& config) : c(config) {
    const int64_t patches = c.grid_h * c.grid_w;
    for (int64_t i = 0; i < patches; ++i) {
      const bool in_a = c.no_sources ? false : c.alternating ? i % 2 == 0 : (i / c.grid_w + i % c.grid_w) % 2 == 0;
      (in_a ? pos_a : pos_b).push_back(i);
    }
    num_a = int64_t(pos_a.size());
    num_b = int64_t(pos_b.size());
    n = c.prefix + patches;
    merged = c.prefix + num_b;
    x = random({c.batch, n, c.dim}, c.x, c.strided);
    key = random({c.batch, c.heads, n, c.channels}, c.key, c.strided);
    if (c.size)
      size = random({c.batch, n}, c.x == DType::f64 ? DType::f64 : DType::f32, c.strided, [] { return 1.0 + rng() % 4; });
    if (c.hidden) {
      w_down = random({c.hidden, c.channels}, c.weight, c.strided, [] { return draw() / 4; });
      w_up = random({c.channels, c.hidden}, c.weight, c.strided, [] { return draw() / 4; });
      if (c.mask) mask = random({c.batch, n, c.hidden}, DType::boolean, c.strided, [] { return double(rng() % 4 != 0); });
    }
    if (c.delta) delta = random({c.batch, n, c.channels}, c.key, c.strided);
    grad = random({c.batch, merged, c.dim}, c.x, c.strided);
    grad_size = random({c.batch, merged}, c.x == DType::f64 ? DType::f64 : DType::f32, c.strided);
    fpet::Problem& p = problem;
    p.batch = c.batch;
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
    if (c.alternating || c.no_sources) {
      p.split_a = pos_a.data();
      p.split_b = pos_b.data();
    }
    p.scale = 0.75;
    p.cosine = c.cosine;
    for (const Tensor* t : {&x, &key, &size, &w_down, &w_up, &delta}) p.wide_scores |= *t && t->dtype == DType::f64;
    p.x = x.view();
    p.key = key.view();
    p.size = size.view();
    p.w_down = w_down.view();
    p.w_up = w_up.view();
    p.dropout_mask = mask.view();
    p.key_delta = delta.view();
  }
};

struct Results {
  Tensor tokens, merged_size, grad_x, grad_in_size, grad_down, grad_up, grad_refined, grad_key;
  vector<int64_t> match, second;
  vector<char> mid;

  bool same_bits(const Results& o) const {
    return tokens.data == o.tokens.data && merged_size.data == o.merged_size.data && match == o.match && second == o.second &&
           mid == o.mid && grad_x.data == o.grad_x.data && grad_in_size.data == o.grad_in_size.data &&
           grad_down.data == o.grad_down.data && grad_up.data == o.grad_up.data && grad_refined.data == o.grad_refined.data &&
           grad_key.data == o.grad_key.data;
  }
};

fpet::Parallel threads_of(int64_t count) {
  fpet::Parallel parallel;
  parallel.threads = count;
  parallel.pool = reinterpret_cast<void*>(count);
  parallel.run = [](void* pool, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    vector<std::thread> threads;
    const int64_t count = reinterpret_cast<int64_t>(pool);
    for (int64_t t = 0; t < count; ++t)
      threads.emplace_back([=] {
        for (int64_t task = t; task < tasks; task += count) body(context, task);
      });
    for (std::thread& thread : threads) thread.join();
  };
  return parallel;
}

// All tasks on one thread, the last one first: as where a pool is held up, or inside of another parallel region.
fpet::Parallel in_turn(int64_t count) {
  fpet::Parallel parallel;
  parallel.threads = count;
  parallel.run = [](void*, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    for (int64_t task = tasks; task-- > 0;) body(context, task);
  };
  return parallel;
}

// Exactly as much scratch as was asked for, full of NaN, with a guard behind it.
struct Scratch {
  explicit Scratch(size_t bytes) : size(bytes), base(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    std::memset(base, 0xff, (bytes + 127) / 64 * 64);
  }
  ~Scratch() {
    for (size_t i = size; i < (size + 127) / 64 * 64; ++i)
      CHECK(base[i] == char(0xff), "byte %zu behind the workspace", i - size);
    std::free(base);
  }
  size_t size;
  char* base;
};

Results run(const Case& t, const fpet::Parallel& parallel) {
  const int64_t threads = parallel.threads;
  const Config& c = t.c;
  Results r;
  const DType wide = c.x == DType::f64 ? DType::f64 : DType::f32;
  r.tokens = Tensor({c.batch, t.merged, c.dim}, c.x);
  r.merged_size = Tensor({c.batch, t.merged}, wide);
  r.match.assign(u(c.batch * t.num_a), -1);
  r.second = r.match;
  r.mid.assign(u(c.batch * t.num_a * (t.problem.wide_scores ? 8 : 4)), char(0xff));
  fpet::ForwardOutputs out;
  out.tokens = r.tokens.data.data();
  out.merged_size = r.merged_size.data.data();
  out.match = r.match.data();
  out.second = r.second.data();
  out.mid = r.mid.data();
  {
    Scratch scratch(fpet::cpu_forward_workspace(t.problem, threads));
    fpet::cpu_forward(t.problem, out, parallel, scratch.base);
  }
  fpet::BackwardInputs in;
  in.grad_tokens = t.grad.view();
  in.grad_size = t.grad_size.view();
  in.tokens = r.tokens.view();
  in.merged_size = r.merged_size.view();
  in.match = r.match.data();
  in.second = r.second.data();
  in.mid = r.mid.data();
  r.grad_x = Tensor({c.batch, t.n, c.dim}, c.x);
  r.grad_in_size = Tensor({c.batch, t.n}, wide);
  r.grad_refined = Tensor({c.batch, t.n, c.channels}, c.key);
  r.grad_key = Tensor({c.batch, t.n, c.channels}, c.key);
  fpet::BackwardOutputs back;
  back.x = r.grad_x.data.data();
  back.size = r.grad_in_size.data.data();
  back.size_dtype = wide;
  back.refined = r.grad_refined.data.data();
  back.refined_dtype = c.key;
  back.key = r.grad_key.data.data();
  back.key_dtype = c.key;
  if (c.hidden) {
    r.grad_down = Tensor({c.hidden, c.channels}, c.weight);
    r.grad_up = Tensor({c.channels, c.hidden}, c.weight);
    back.w_down = r.grad_down.data.data();
    back.w_up = r.grad_up.data.data();
    back.weight_dtype = c.weight;
  }
  Scratch scratch(fpet::cpu_backward_workspace(t.problem, back, threads));
  fpet::cpu_backward(t.problem, in, back, parallel, scratch.base);
  return r;
}

// Compares with a tolerance of some units of `type` (and of `compute`, the precision inside), scaled by the largest value.
void close(const char* name, const vector<double>& got, const vector<double>& want, DType type, DType compute, double units) {
  double largest = 1e-3, error = 0;
  for (double v : want) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < want.size(); ++i) {
    CHECK(std::isfinite(got[i]), "%s[%zu] is not a number: not written?", name, i);
    error = std::max(error, std::fabs(got[i] - want[i]));
  }
  const double allowed = largest * (epsilon(type) + units * epsilon(compute));
  CHECK(error <= allowed, "%s: error %g, allowed %g", name, error, allowed);
}

vector<double> flat(const Tensor& t) {
  vector<double> values;
  for_each_index(t.sizes, [&](int64_t i, int64_t j, int64_t k) { values.push_back(k < 0 ? t.at({i, j}) : t.at({i, j, k})); });
  return values;
}

void check_case(const Config& c, const std::string& name) {
  const int before = failures;
  const Case t(c);
  const Results r = run(t, threads_of(1));
  for (int64_t threads : {2, 3, 5})
    CHECK(run(t, threads_of(threads)).same_bits(r), "%lld threads change the result", (long long)threads);
  CHECK(run(t, in_turn(3)).same_bits(r), "tasks in turn change the result");

  const DType compute = t.problem.wide_scores ? DType::f64 : DType::f32;
  const int64_t A = t.num_a, B = t.num_b, C = c.channels, H = c.hidden, N = t.n, M = t.merged, D = c.dim;
  vector<double> dx(u(c.batch * N * D)), dsize(u(c.batch * N)), drefined(u(c.batch * N * C)), dkey(drefined.size()),
      ddown(u(H * C)), dup(u(C * H)), tokens(u(c.batch * M * D)), sizes(u(c.batch * M));
  for (int64_t b = 0; b < c.batch; ++b) {
    const auto token_a = [&](int64_t i) { return c.prefix + t.pos_a[u(i)]; };
    const auto token_b = [&](int64_t j) { return c.prefix + t.pos_b[u(j)]; };
    const auto s_in = [&](int64_t n) { return c.size ? t.size.at({b, n}) : 1.0; };
    // k', hidden units, norms, unit keys of every token
    vector<double> key(u(N * C)), hidden(u(N * H)), refined(u(N * C)), norm(u(N), 1.0), unit(refined.size());
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t ch = 0; ch < C; ++ch) {
        double sum = 0;
        for (int64_t h = 0; h < c.heads; ++h) sum += t.key.at({b, h, n, ch});
        key[u(n * C + ch)] = sum / double(c.heads);
      }
      for (int64_t h = 0; h < H; ++h) {
        double sum = 0;
        for (int64_t ch = 0; ch < C; ++ch) sum += t.w_down.at({h, ch}) * key[u(n * C + ch)];
        hidden[u(n * H + h)] = std::max(sum, 0.0) * (c.mask ? t.mask.at({b, n, h}) : 1.0);
      }
      double squares = 0;
      for (int64_t ch = 0; ch < C; ++ch) {
        double v = key[u(n * C + ch)];
        for (int64_t h = 0; h < H; ++h) v += t.problem.scale * t.w_up.at({ch, h}) * hidden[u(n * H + h)];
        if (c.delta) v += t.delta.at({b, n, ch});
        refined[u(n * C + ch)] = v;
        squares += v * v;
      }
      if (c.cosine) norm[u(n)] = std::sqrt(squares);
      for (int64_t ch = 0; ch < C; ++ch) unit[u(n * C + ch)] = refined[u(n * C + ch)] / norm[u(n)];
    }
    vector<double> score(u(A * B));
    vector<int64_t> match(u(A)), second(u(A));
    for (int64_t i = 0; i < A; ++i) {
      for (int64_t j = 0; j < B; ++j) {
        double s = 0;
        for (int64_t ch = 0; ch < C; ++ch) s += unit[u(token_a(i) * C + ch)] * unit[u(token_b(j) * C + ch)];
        score[u(i * B + j)] = s;
      }
      const double* row = &score[u(i * B)];
      const int64_t got = r.match[u(b * A + i)] - c.prefix, other = r.second[u(b * A + i)] - c.prefix;
      CHECK(got >= 0 && got < B && other >= 0 && other < B && got != other, "match %lld, %lld", (long long)got,
            (long long)other);
      if (got < 0 || got >= B || other < 0 || other >= B) return;
      int64_t best = 0, next = -1;
      for (int64_t j = 1; j < B; ++j)
        if (row[j] > row[best]) best = j;
      for (int64_t j = 0; j < B; ++j)
        if (j != best && (next < 0 || row[j] > row[next])) next = j;
      // Another decision is right only where the scores tie within rounding.
      const double tie = (c.cosine ? 1.0 : std::fabs(row[best]) + 1.0) * 64 * epsilon(compute);
      CHECK(row[best] - row[got] <= tie, "image %lld source %lld: matched %lld, best %lld", (long long)b, (long long)i,
            (long long)got, (long long)best);
      CHECK(std::fabs(row[next] - row[other == best ? got : other]) <= tie, "second %lld, want %lld", (long long)other,
            (long long)next);
      match[u(i)] = got;
      second[u(i)] = other;
    }
    vector<double> n_out(u(M)), y(u(M * D)), g(u(M * D)), grad_n(u(M));
    for (int64_t m = 0; m < M; ++m) {
      const int64_t own = m < c.prefix ? m : token_b(m - c.prefix);
      double total = s_in(own);
      vector<double> sum(u(D));
      for (int64_t d = 0; d < D; ++d) sum[u(d)] = s_in(own) * t.x.at({b, own, d});
      for (int64_t i = 0; i < A; ++i)
        if (match[u(i)] + c.prefix == m) {
          total += s_in(token_a(i));
          for (int64_t d = 0; d < D; ++d) sum[u(d)] += s_in(token_a(i)) * t.x.at({b, token_a(i), d});
        }
      n_out[u(m)] = sizes[u(b * M + m)] = total;
      grad_n[u(m)] = t.grad_size.at({b, m});
      for (int64_t d = 0; d < D; ++d) {
        y[u(m * D + d)] = tokens[u((b * M + m) * D + d)] = sum[u(d)] / total;
        g[u(m * D + d)] = t.grad.at({b, m, d}) / total;
        grad_n[u(m)] -= g[u(m * D + d)] * y[u(m * D + d)];
      }
    }
    const auto values = [&](int64_t n, int64_t m) {
      double along = 0;
      for (int64_t d = 0; d < D; ++d) {
        dx[u((b * N + n) * D + d)] = s_in(n) * g[u(m * D + d)];
        along += t.x.at({b, n, d}) * g[u(m * D + d)];
      }
      dsize[u(b * N + n)] = grad_n[u(m)] + along;
    };
    for (int64_t m = 0; m < M; ++m) values(m < c.prefix ? m : token_b(m - c.prefix), m);
    for (int64_t i = 0; i < A; ++i) values(token_a(i), match[u(i)] + c.prefix);

    vector<double> dunit(unit.size());
    for (int64_t i = 0; i < A; ++i) {
      const double mid = (score[u(i * B + match[u(i)])] + score[u(i * B + second[u(i)])]) / 2;
      vector<double> ds(u(B));
      double total = 0;
      for (int64_t j = 0; j < B; ++j) {
        double dm = grad_n[u(j + c.prefix)];
        for (int64_t d = 0; d < D; ++d) dm += g[u((j + c.prefix) * D + d)] * t.x.at({b, token_a(i), d});
        const double p = 1 / (1 + std::exp(mid - score[u(i * B + j)]));
        total += ds[u(j)] = dm * s_in(token_a(i)) * p * (1 - p);
      }
      ds[u(match[u(i)])] -= total / 2;
      ds[u(second[u(i)])] -= total / 2;
      for (int64_t j = 0; j < B; ++j)
        for (int64_t ch = 0; ch < C; ++ch) {
          dunit[u(token_a(i) * C + ch)] += ds[u(j)] * unit[u(token_b(j) * C + ch)];
          dunit[u(token_b(j) * C + ch)] += ds[u(j)] * unit[u(token_a(i) * C + ch)];
        }
    }
    for (int64_t n = c.prefix; n < N; ++n) {
      double along = 0;
      for (int64_t ch = 0; ch < C; ++ch) along += unit[u(n * C + ch)] * dunit[u(n * C + ch)];
      vector<double> dk(u(C)), dhidden(u(H));
      for (int64_t ch = 0; ch < C; ++ch) {
        const double v = dunit[u(n * C + ch)];
        dk[u(ch)] = c.cosine ? (v - unit[u(n * C + ch)] * along) / norm[u(n)] : v;
        drefined[u((b * N + n) * C + ch)] = dk[u(ch)];
        for (int64_t h = 0; h < H; ++h) {
          dup[u(ch * H + h)] += t.problem.scale * dk[u(ch)] * hidden[u(n * H + h)];
          if (hidden[u(n * H + h)] != 0)
            dhidden[u(h)] += t.problem.scale * t.w_up.at({ch, h}) * dk[u(ch)] * (c.mask ? t.mask.at({b, n, h}) : 1.0);
        }
      }
      for (int64_t ch = 0; ch < C; ++ch) {
        double v = dk[u(ch)];
        for (int64_t h = 0; h < H; ++h) {
          ddown[u(h * C + ch)] += dhidden[u(h)] * key[u(n * C + ch)];
          v += dhidden[u(h)] * t.w_down.at({h, ch});
        }
        dkey[u((b * N + n) * C + ch)] = v / double(c.heads);
      }
    }
  }
  const double sums = 16 * std::sqrt(double(D + A + C)), many = sums * std::sqrt(double(c.batch * N));
  close("tokens", flat(r.tokens), tokens, c.x, compute, 8);
  close("merged_size", flat(r.merged_size), sizes, DType::f64, DType::f64, 0);
  close("grad_x", flat(r.grad_x), dx, c.x, compute, 8);
  // γ' takes the merged tokens as they were rounded to x's dtype
  close("grad_size", flat(r.grad_in_size), dsize, c.x, compute, sums);
  const DType rounded = c.x == DType::f64 ? compute : c.x;
  close("grad_refined", flat(r.grad_refined), drefined, c.key, rounded, sums);
  close("grad_key", flat(r.grad_key), dkey, c.key, rounded, sums);
  if (H) {
    close("grad_down", flat(r.grad_down), ddown, c.weight, rounded, many);
    close("grad_up", flat(r.grad_up), dup, c.weight, rounded, many);
  }
  if (failures != before) std::printf("  in %s\n", name.c_str());
}

// NaN, infinite and constant keys: the match stays in range, and ties go to the lowest index.
void check_degenerate() {
  for (const double fill : {0.0, 1.0, double(NAN), double(INFINITY), -double(INFINITY)})
    for (const bool cosine : {true, false}) {
      Config c{2, 1, 5, 6, 10, 7, 1, 0, DType::f32, DType::f32, DType::f32, false, false, false, cosine, false, false};
      Case t(c);
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t n = 0; n < t.n; ++n)
          for (int64_t ch = 0; ch < c.channels; ++ch) {
            const float v = float(fill);
            std::memcpy(&t.key.data[u(t.key.offset({b, 0, n, ch}) * 4)], &v, 4);
          }
      t.problem.key = t.key.view();
      const Results r = run(t, threads_of(2));
      for (size_t i = 0; i < r.match.size(); ++i) {
        CHECK(r.match[i] == c.prefix, "constant key %g: match %lld", fill, (long long)r.match[i]);
        CHECK(r.second[i] == c.prefix + 1, "constant key %g: second %lld", fill, (long long)r.second[i]);
      }
    }
}

void check_unmerge() {
  const int64_t batch = 3, prefix = 2, dim = 37, num_a = 10, num_b = 10, merged = prefix + num_b, n = prefix + num_a + num_b;
  for (const DType type : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (const bool strided : {false, true}) {
      const Tensor tokens = random({batch, merged, dim}, type, strided), grad = random({batch, n, dim}, type, strided);
      vector<int64_t> match(u(batch * num_a)), a, b;
      for (int64_t& m : match) m = int64_t(rng() % u(merged));
      for (int64_t i = 0; i < 20; ++i) ((i / 5 + i % 5) % 2 == 0 ? a : b).push_back(i);
      fpet::UnmergeProblem p;
      p.batch = batch;
      p.dim = dim;
      p.prefix = prefix;
      p.num_a = num_a;
      p.num_b = num_b;
      p.grid_h = 4;
      p.grid_w = 5;
      p.match = match.data();
      p.input = tokens.view();
      Tensor out({batch, n, dim}, type), back({batch, merged, dim}, type);
      p.output = out.data.data();
      fpet::cpu_unmerge(p, threads_of(2));
      fpet::UnmergeProblem q = p;
      q.input = grad.view();
      q.output = back.data.data();
      Scratch scratch(fpet::cpu_unmerge_backward_workspace(q, 2));
      fpet::cpu_unmerge_backward(q, threads_of(2), scratch.base);
      for (int64_t image = 0; image < batch; ++image) {
        vector<int64_t> origin(u(n));
        for (int64_t k = 0; k < prefix; ++k) origin[u(k)] = k;
        for (int64_t j = 0; j < num_b; ++j) origin[u(prefix + b[u(j)])] = prefix + j;
        for (int64_t i = 0; i < num_a; ++i) origin[u(prefix + a[u(i)])] = match[u(image * num_a + i)];
        for (int64_t d = 0; d < dim; ++d) {
          vector<double> want(u(merged));
          for (int64_t k = 0; k < n; ++k) {
            CHECK(out.at({image, k, d}) == tokens.at({image, origin[u(k)], d}), "unmerge");
            want[u(origin[u(k)])] += grad.at({image, k, d});
          }
          for (int64_t m = 0; m < merged; ++m)
            CHECK(std::fabs(back.at({image, m, d}) - want[u(m)]) <= 16 * epsilon(type), "unmerge gradient");
        }
      }
    }
}

}  // namespace

int main() {
  const std::string compiled = fpet::cpu_isas_compiled();
  try {
    std::printf("instruction set: %s (compiled: %s)\n", fpet::cpu_isa(), compiled.c_str());
  } catch (const std::runtime_error& error) {
    const bool known = (" " + compiled + " ").find(" " + std::string(std::getenv("FPET_CPU_ISA")) + " ") != std::string::npos;
    std::printf("%s%s\n", known ? "skipped: " : "", error.what());
    return known ? 77 : 1;
  }
  const DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  // batch prefix H W dim channels heads hidden | x key weight | size mask delta cosine strided alternating
  const Config configs[] = {
      {2, 1, 14, 14, 192, 64, 1, 32, f32, f32, f32, false, false, false, true, false, false},
      {1, 1, 14, 14, 96, 64, 3, 32, f32, f32, f32, true, true, false, true, false, false},
      {5, 0, 7, 7, 33, 12, 2, 6, f32, f32, f32, true, true, true, true, true, false},
      {3, 5, 3, 9, 17, 5, 1, 0, f64, f64, f64, true, false, true, false, false, false},
      {4, 2, 8, 8, 130, 16, 4, 8, f64, f32, f32, true, true, true, true, true, true},
      {7, 1, 6, 5, 64, 33, 2, 9, f32, f64, f64, false, true, false, true, false, false},
      {2, 1, 10, 10, 200, 64, 2, 32, bf16, bf16, f32, true, false, false, true, false, false},
      {2, 1, 10, 10, 70, 20, 1, 7, bf16, f32, bf16, false, true, true, false, true, false},
      {2, 1, 10, 10, 72, 24, 3, 16, f16, f16, f32, true, false, false, true, false, true},
      {1, 0, 2, 2, 1, 1, 1, 1, f32, f32, f32, false, false, false, true, false, false},
      {1, 3, 1, 5, 3, 2, 1, 2, f32, f32, f32, false, false, false, false, false, false},
      {1, 1, 40, 41, 24, 8, 1, 4, f32, f32, f32, true, false, false, true, false, false},  // several chunks and panels
      {300, 0, 2, 3, 8, 4, 1, 2, f32, f32, f32, false, false, false, true, false, false},  // more images than groups
      {1, 1, 66, 66, 40, 8, 1, 4, f32, f32, f32, false, false, false, true, false,
       false},  // more sources a chunk than a tile has
      {2, 1, 12, 13, 300, 12, 3, 8, bf16, bf16, bf16, true, false, false, true, false, false},  // several slices of x
      {2, 1, 4, 5, 40, 8, 2, 4, f32, f32, f32, true, false, false, true, false, false, true},   // nothing to merge
  };
  int index = 0;
  for (const Config& c : configs) check_case(c, "case " + std::to_string(index++));
  check_degenerate();
  check_unmerge();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
