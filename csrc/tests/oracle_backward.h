// The backward for a given match, as docs/mathematics.md has it, computed in T.
#pragma once

#include "oracle.h"

namespace oracle {

// What the forward hands on, for all images, computed on the host and rounded to its dtypes.
struct Handed {
  Tensor tokens, merged_size, mid;
  vector<int64_t> match, second;

  explicit Handed(const Case& t) {
    const Config& c = t.c;
    const DType wide = c.x == DType::f64 ? DType::f64 : DType::f32;
    tokens = Tensor({c.batch, t.merged, c.dim}, c.x, c.layout);
    merged_size = Tensor({c.batch, t.merged}, wide);
    mid = Tensor({c.batch, t.num_a}, t.wide() ? DType::f64 : DType::f32);
    for (int64_t b = 0; b < c.batch; ++b) {
      const Scores<double> s(t, b);
      for (int64_t i = 0; i < t.num_a; ++i) {
        const double* row = &s.score[u(i * t.num_b)];
        int64_t best = 0, next = -1;
        for (int64_t j = 1; j < t.num_b; ++j)
          if (row[j] > row[best]) best = j;
        for (int64_t j = 0; j < t.num_b; ++j)
          if (j != best && (next < 0 || row[j] > row[next])) next = j;
        match.push_back(c.prefix + best);
        second.push_back(c.prefix + next);
        mid.set({b, i}, (row[best] + row[next]) / 2);
      }
      const Merged<double> m(t, b, match.data() + b * t.num_a);
      for (int64_t e = 0; e < t.merged; ++e) {
        merged_size.set({b, e}, m.size[u(e)]);
        for (int64_t d = 0; d < c.dim; ++d) tokens.set({b, e, d}, m.tokens[u(e * c.dim + d)]);
      }
    }
  }
};

template <class T>
struct Gradients {
  vector<T> x, size, refined, key;  // (B, N, D), (B, N), (B, N, C), (B, N, C)
  vector<T> down, up;               // (h, C), (C, h)

  Gradients(const Case& t, const Handed& f, bool grad_size_given) {
    const Config& c = t.c;
    const int64_t N = t.n, A = t.num_a, B = t.num_b, C = c.channels, H = c.hidden, D = c.dim, M = t.merged;
    x.resize(u(c.batch * N * D));
    size.resize(u(c.batch * N));
    refined.resize(u(c.batch * N * C));
    key.resize(refined.size());
    down.resize(u(H * C));
    up.resize(u(H * C));
    vector<T> w_down(u(H * C)), w_up(u(H * C));
    for (int64_t h = 0; h < H; ++h)
      for (int64_t ch = 0; ch < C; ++ch) {
        w_down[u(h * C + ch)] = T(t.w_down.at({h, ch}));
        w_up[u(ch * H + h)] = T(t.w_up.at({ch, h}));
      }
    for (int64_t b = 0; b < c.batch; ++b) {
      const Scores<T> s(t, b);
      vector<T> g(u(M * D)), gamma(u(M)), tokens(u(N * D));
      for (int64_t n = 0; n < N; ++n)
        for (int64_t d = 0; d < D; ++d) tokens[u(n * D + d)] = T(t.x.at({b, n, d}));
      for (int64_t m = 0; m < M; ++m) {
        const T n = T(f.merged_size.at({b, m}));
        T along = 0;
        for (int64_t d = 0; d < D; ++d) {
          const T grad = T(t.grad.at({b, m, d}));
          g[u(m * D + d)] = grad / n;
          along += grad * T(f.tokens.at({b, m, d}));
        }
        gamma[u(m)] = (grad_size_given ? T(t.grad_size.at({b, m})) : T(0)) - along / n;
      }
      const auto own_size = [&](int64_t n) { return t.size ? T(t.size.at({b, n})) : T(1); };
      const auto dot = [&](int64_t m, int64_t n) {
        T sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += g[u(m * D + d)] * tokens[u(n * D + d)];
        return sum;
      };
      const auto values = [&](int64_t n, int64_t m) {
        for (int64_t d = 0; d < D; ++d) x[u((b * N + n) * D + d)] = own_size(n) * g[u(m * D + d)];
        size[u(b * N + n)] = gamma[u(m)] + dot(m, n);
      };
      const auto token_a = [&](int64_t i) { return c.prefix + t.pos_a[u(i)]; };
      const auto token_b = [&](int64_t j) { return c.prefix + t.pos_b[u(j)]; };
      for (int64_t m = 0; m < M; ++m) values(m < c.prefix ? m : token_b(m - c.prefix), m);
      vector<T> unit_grad(u(N * C));
      for (int64_t i = 0; i < A; ++i) {
        const int64_t best = f.match[u(b * A + i)], second = f.second[u(b * A + i)], a = token_a(i);
        values(a, best);
        const T mid = T(f.mid.at({b, i}));
        vector<T> ds(u(B));
        T total = 0;
        for (int64_t j = 0; j < B; ++j) {
          const T grad_match = (dot(j + c.prefix, a) + gamma[u(j + c.prefix)]) * own_size(a);
          const T e = std::exp(-std::abs(s.score[u(i * B + j)] - mid));
          total += ds[u(j)] = grad_match * (e / ((T(1) + e) * (T(1) + e)));
        }
        ds[u(best - c.prefix)] -= total / 2;
        ds[u(second - c.prefix)] -= total / 2;
        for (int64_t j = 0; j < B; ++j)
          for (int64_t ch = 0; ch < C; ++ch) {
            unit_grad[u(a * C + ch)] += ds[u(j)] * s.unit[u(token_b(j) * C + ch)];
            unit_grad[u(token_b(j) * C + ch)] += ds[u(j)] * s.unit[u(a * C + ch)];
          }
      }
      for (int64_t n = c.prefix; n < N; ++n) {
        T along = 0;
        const bool projected = c.cosine && s.norm[u(n)] > T(1e-12);
        if (projected)
          for (int64_t ch = 0; ch < C; ++ch) along += s.unit[u(n * C + ch)] * unit_grad[u(n * C + ch)];
        vector<T> dk(u(C)), dh(u(H));
        for (int64_t ch = 0; ch < C; ++ch)
          refined[u((b * N + n) * C + ch)] = dk[u(ch)] =
              (unit_grad[u(n * C + ch)] - s.unit[u(n * C + ch)] * along) / s.norm[u(n)];
        for (int64_t h = 0; h < H; ++h) {
          const T unit = s.hidden[u(n * H + h)];
          for (int64_t ch = 0; ch < C; ++ch) {
            up[u(ch * H + h)] += T(0.75) * dk[u(ch)] * unit;
            if (unit != T(0)) dh[u(h)] += dk[u(ch)] * w_up[u(ch * H + h)];
          }
          dh[u(h)] *= T(0.75) * (t.mask ? T(t.mask.at({b, n, h})) : T(1));
          for (int64_t ch = 0; ch < C; ++ch) down[u(h * C + ch)] += dh[u(h)] * s.key[u(n * C + ch)];
        }
        for (int64_t ch = 0; ch < C; ++ch) {
          T v = dk[u(ch)];
          for (int64_t h = 0; h < H; ++h) v += dh[u(h)] * w_down[u(h * C + ch)];
          key[u((b * N + n) * C + ch)] = v / T(c.heads);
        }
      }
    }
  }
};

}  // namespace oracle
