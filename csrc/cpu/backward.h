// The backward. docs/mathematics.md has the formulas.

namespace fpet {
namespace FPET_ISA {
namespace {

template <class S, class T>
struct Backward : Scratch<Backward<S, T>> {
  using M = Compute<S>;
  const Problem& p;
  const BackwardOutputs& out;
  const BackwardInputs* in = nullptr;
  int64_t tasks, chunks, row_chunks, group_images, groups, weight_size;
  bool key_path, weights, by_image, stream;
  Shared<T> shared;

  struct Image {
    Groups<M> groups;
    M *inverse_size, *grad_size;  // (nbp): 1 / n_j, and γ'_j
    Keys<T> keys;
    T *grad_a, *grad_b;  // (N_A, cp); (chunks or 2) times (N_B, cp)
    T* grad_weights;     // (row_chunks or 1) times weight_size
  };
  struct Task {
    KeyScratch<T> key;
    T *scores, *row_sums;       // (kPairRows, kPairCols), one for each source of a chunk
    M *products, *x, *g, *row;  // (kPairRows, kPairCols); converted rows of x, G; one row
    const void **x_rows, **g_rows;
    T *grad, *grad_hidden;  // (kKeyRows, cp), (kKeyRows, hp)
  };

  Backward(const Problem& problem, const BackwardOutputs& outputs, int64_t threads) : p(problem), out(outputs) {
    weights = out.w_down != nullptr;
    key_path = weights || out.refined || out.key;
    const int64_t work = p.batch * (p.tokens * p.dim + (key_path ? p.num_a * p.num_b * (p.dim + 3 * p.channels) : 0));
    tasks = work < kSerialWork ? 1 : threads;
    by_image = tasks == 1 || p.batch >= 2 * tasks || p.batch > kMaxGroups;
    stream = p.batch * p.tokens * p.dim * int64_t(sizeof(S)) >= kStreamBytes;
    chunks = max64(1, min64(kMaxChunks, ceil_div(p.num_a, 28)));
    row_chunks = ceil_div(p.num_a + p.num_b, kKeyRows);
    group_images = max64(1, ceil_div(p.batch, kMaxGroups));
    groups = ceil_div(p.batch, group_images);
  }

  // The first source of a chunk: chunks of about the same length, in whole tiles of dot_products.
  int64_t chunk_begin(int64_t chunk) const {
    return chunk == chunks ? p.num_a : p.num_a * chunk / chunks / kDotRows * kDotRows;
  }

  // Whether the products of dM take rows of x and G as they are stored, or in compute precision.
  static constexpr bool native = kDotsBf16 && sizeof(S) == 2 && SameType<S, bf16>::value;
  bool in_place() const { return (native || sizeof(S) == sizeof(M)) && p.x.stride[2] == 1 && in_stride_g == 1; }
  int64_t in_stride_g = 0;  // 0 while planning: room for converted rows is always made

  void plan_image(Arena& arena, Image& image) const {
    image.groups.plan(arena, p);
    image.inverse_size = arena.take<M>(shared.nbp);
    image.grad_size = arena.take<M>(shared.nbp);
    if (!key_path) return;
    image.keys.plan(arena, p, shared, true);
    image.grad_a = arena.take<T>(p.num_a * shared.cp);
    image.grad_b = arena.take<T>((by_image ? 2 : chunks) * p.num_b * shared.cp);
    image.grad_weights = weights ? arena.take<T>((by_image ? 1 : row_chunks) * weight_size) : nullptr;
  }
  void plan_task(Arena& arena, Task& task) const {
    task.row = arena.take<M>(2 * p.dim);
    if (!key_path) return;
    task.key.plan(arena, shared);
    task.scores = arena.take<T>(kPairRows * kPairCols);
    task.row_sums = arena.take<T>(ceil_div(p.num_a, chunks) + kDotRows);
    task.products = arena.take<M>(kPairRows * kPairCols);
    task.x_rows = arena.take<const void*>(kPairRows);
    task.g_rows = arena.take<const void*>(kPairCols);
    task.grad = arena.take<T>(kKeyRows * shared.cp);
    task.grad_hidden = arena.take<T>(kKeyRows * shared.hp);
    task.x = arena.take<M>(in_place() ? 0 : kPairRows * p.dim);
    task.g = arena.take<M>(in_place() ? 0 : min64(kPairCols, p.num_b) * p.dim);
  }

  T* group_weights;  // (groups, weight_size)
  void plan_shared(Arena& arena) {
    shared.plan(arena, p, key_path);
    weight_size = p.channels * shared.hp + p.hidden * shared.cp;
    group_weights = arena.take<T>(weights ? groups * weight_size : 0);
  }
  int64_t images() const { return by_image ? tasks : p.batch; }
  size_t plan(char* base) { return this->lay_out(base, tasks, images()); }

  const S* grad_row(int64_t image, int64_t m) const {
    return (const S*)in->grad_tokens.data + image * in->grad_tokens.stride[0] + m * in->grad_tokens.stride[1];
  }
  const S* x_row(int64_t image, int64_t n) const { return (const S*)p.x.data + image * p.x.stride[0] + n * p.x.stride[1]; }

  // ⟨row of G, other⟩, whatever the strides; `buffer` holds two rows.
  M product(const S* g, const S* other, int64_t other_stride, M* buffer) const {
    if (in_stride_g == 1 && other_stride == 1) return dot(g, other, p.dim);
    read_row(buffer, g, in_stride_g, p.dim);
    read_row(buffer + p.dim, other, other_stride, p.dim);
    return dot(buffer, buffer + p.dim, p.dim);
  }

  void prepare_image(const Image& image, int64_t b) const {
    image.groups.fill(p, in->match, b);
    for (int64_t j = p.num_b; j < shared.nbp; ++j) image.inverse_size[j] = image.grad_size[j] = 0;
    if (out.refined || out.key) {
      const T zero = 0;
      for (int64_t at = b * p.tokens * p.channels; at < (b * p.tokens + p.prefix) * p.channels; ++at) {
        if (out.refined) write_any(out.refined, out.refined_dtype, at, &zero, 1);
        if (out.key) write_any(out.key, out.key_dtype, at, &zero, 1);
      }
    }
  }

  // g_j, γ'_j, dx, dsize for the merged tokens [begin, end) and all that was merged into them.
  void values(const Task& task, const Image& image, int64_t b, int64_t begin, int64_t end) const {
    const View &sizes = in->merged_size, &y = in->tokens, &gs = in->grad_size;
    for (int64_t m = begin; m < end; ++m) {
      const int64_t j = m - p.prefix, at = j < 0 ? m : shared.pos_b[j];
      const M n = read_one<M>(sizes, b * sizes.stride[0] + m * sizes.stride[1]);
      const S* g = grad_row(b, m);
      M grad_n = 0;
      if (key_path || out.size) {
        const S* row = (const S*)y.data + b * y.stride[0] + m * y.stride[1];
        if (gs.data) grad_n = read_one<M>(gs, b * gs.stride[0] + m * gs.stride[1]);
        grad_n -= product(g, row, y.stride[2], task.row) / n;
        if (j >= 0) image.grad_size[j] = grad_n;
      }
      if (j >= 0) image.inverse_size[j] = M(1) / n;
      value_row(task, image, b, at, g, n, grad_n);
      if (j >= 0)
        for (int32_t k = image.groups.start[j]; k < image.groups.start[j + 1]; ++k)
          value_row(task, image, b, shared.pos_a[image.groups.list[k]], g, n, grad_n);
    }
  }

  // dx = size · G_j / n_j and dsize = γ'_j + x · G_j / n_j of token `at`.
  void value_row(const Task& task, const Image& image, int64_t b, int64_t at, const S* g, M n, M grad_n) const {
    if (out.x) {
      S* dx = (S*)out.x + (b * p.tokens + at) * p.dim;
      const M w = image.groups.size[at] / n;
      if (in_stride_g == 1) {
        scaled_row(dx, g, w, p.dim, stream);
      } else {
        for (int64_t d = 0; d < p.dim; ++d) from_compute(M(to_compute(g[d * in_stride_g]) * w), dx + d);
      }
    }
    if (out.size) {
      const M total = grad_n + product(g, x_row(b, at), p.x.stride[2], task.row) / n;
      write_any(out.size, out.size_dtype, b * p.tokens + at, &total, 1);
    }
  }

  // A row of x or G for the products of dM; converted into `buffer` where it can't be taken as it is.
  const void* product_row(const S* row, int64_t stride, M* buffer) const {
    if (in_place()) return row;
    read_row(buffer, row, stride, p.dim);
    return buffer;
  }

  // ds of one row of a tile, in place of its scores; returns its sum.
  T score_gradient(T* scores, const M* products, const M* inverse_size, const M* grad_size, M size, T mid, int64_t cols) const {
    if constexpr (sizeof(T) == sizeof(M)) {
      constexpr int lanes = kLanes<T>;
      Vec<T> sum{};
      for (int64_t j = 0; j < cols; j += lanes) {
        const Vec<T> grad_match = (load(products + j) * load(inverse_size + j) + load(grad_size + j)) * size;
        const Vec<T> z = load(scores + j) - mid;
        const Vec<T> e = exp_nonpositive(z < T(0) ? z : -z);  // p (1 - p) is even in z
        const Vec<T> ds = grad_match * (e / ((e + T(1)) * (e + T(1))));
        store(scores + j, ds);
        sum += ds;
      }
      return sum_lanes<T>(sum);
    } else {
      T sum = 0;
      for (int64_t j = 0; j < cols; ++j) {
        const T grad_match = (T(products[j]) * T(inverse_size[j]) + T(grad_size[j])) * T(size);
        const T e = T(exp(-__builtin_fabs(double(scores[j] - mid))));
        sum += scores[j] = grad_match * (e / ((e + T(1)) * (e + T(1))));
      }
      return sum;
    }
  }

  // dk̂ of the sources of one chunk, and that chunk's share of dk̂_B, into `part` (N_B, cp).
  void pair_chunk(const Task& task, const Image& image, int64_t b, int64_t chunk, T* part, Ahead* ahead) const {
    const int64_t begin = chunk_begin(chunk), end = chunk_begin(chunk + 1), cp = shared.cp;
    for (int64_t i = begin; i < end; ++i) task.row_sums[i - begin] = 0;
    for (int64_t j0 = 0; j0 < p.num_b; j0 += kPairCols) {
      const int64_t cols = min64(kPairCols, p.num_b - j0), padded = min64(kPairCols, shared.nbp - j0);
      for (int64_t j = 0; j < cols; ++j)
        task.g_rows[j] = product_row(grad_row(b, p.prefix + j0 + j), in_stride_g, task.g + j * p.dim);
      for (int64_t i0 = begin; i0 < end; i0 += kPairRows) {
        const int64_t rows = min64(kPairRows, end - i0);
        if (j0 == 0 || end - begin > kPairRows)  // else the rows of the only block are still there
          for (int64_t r = 0; r < rows; ++r)
            task.x_rows[r] = product_row(x_row(b, shared.pos_a[i0 + r]), p.x.stride[2], task.x + r * p.dim);
        if (native && in_place()) {
          dot_products<typename DotType<S, native>::type>(rows, cols, p.dim, task.x_rows, task.g_rows, task.products, kPairCols,
                                                          ahead);
        } else {
          dot_products<M>(rows, cols, p.dim, task.x_rows, task.g_rows, task.products, kPairCols, ahead);
        }
        const T* a = image.keys.a + i0 * cp;
        for (int64_t j = 0; j < padded; j += shared.panel_cols)
          matmul(rows, min64(shared.panel_cols, padded - j), p.channels, a, cp, int64_t(1),
                 image.keys.turned + (j0 + j) * p.channels, shared.panel_cols, task.scores + j, kPairCols, false);
        for (int64_t r = 0; r < rows; ++r) {
          M* products = task.products + r * kPairCols;
          for (int64_t j = cols; j < padded; ++j) products[j] = 0;
          const int64_t at = b * p.num_a + i0 + r;
          task.row_sums[i0 - begin + r] +=
              score_gradient(task.scores + r * kPairCols, products, image.inverse_size + j0, image.grad_size + j0,
                             image.groups.size[shared.pos_a[i0 + r]], ((const T*)in->mid)[at], padded);
        }
        matmul(rows, cp, cols, task.scores, kPairCols, int64_t(1), image.keys.b + j0 * cp, cp, image.grad_a + i0 * cp, cp,
               j0 > 0);
        matmul(cols, cp, rows, task.scores, int64_t(1), kPairCols, a, cp, part + j0 * cp, cp, i0 > begin);
      }
    }
    // The gradient through m_i, the mean of the two largest scores: -½ Σ_j ds_ij at both.
    constexpr int lanes = kLanes<T>;
    for (int64_t i = begin; i < end; ++i) {
      const T half = task.row_sums[i - begin] * T(-0.5);
      const int64_t at = b * p.num_a + i, j1 = in->match[at] - p.prefix, j2 = in->second[at] - p.prefix;
      const T *a = image.keys.a + i * cp, *b1 = image.keys.b + j1 * cp, *b2 = image.keys.b + j2 * cp;
      T *da = image.grad_a + i * cp, *d1 = part + j1 * cp, *d2 = part + j2 * cp;
      for (int64_t c = 0; c < cp; c += lanes) {
        store(da + c, load(da + c) + (load(b1 + c) + load(b2 + c)) * half);
        store(d1 + c, load(d1 + c) + load(a + c) * half);
        store(d2 + c, load(d2 + c) + load(a + c) * half);
      }
    }
  }

  // From dk̂ to k', the refinement and the key, for one chunk of kKeyRows rows; its share of the weight gradients into `part`.
  void key_chunk(const Task& task, const Image& image, int64_t b, int64_t chunk, int64_t parts_b, T* part) const {
    constexpr int lanes = kLanes<T>;
    const int64_t begin = chunk * kKeyRows, rows = min64(kKeyRows, p.num_a + p.num_b - begin), cp = shared.cp, hp = shared.hp;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = begin + r, j = row - p.num_a;
      T* grad = task.grad + r * cp;
      const T* unit = j < 0 ? image.keys.a + row * cp : image.keys.b + j * cp;
      for (int64_t c = 0; c < cp; c += lanes) {
        Vec<T> sum = load((j < 0 ? image.grad_a + row * cp : image.grad_b + j * cp) + c);
        if (j >= 0)
          for (int64_t q = 1; q < parts_b; ++q) sum += load(image.grad_b + (q * p.num_b + j) * cp + c);
        store(grad + c, sum);
      }
      if (p.cosine) {
        const T norm = image.keys.norm[row];
        const bool clamped = norm < T(1e-12);  // then k̂ = k' / 1e-12: no gradient through the norm
        const T along = clamped ? T(0) : dot(unit, grad, cp), divisor = clamped ? T(1e-12) : norm;
        for (int64_t c = 0; c < cp; c += lanes) store(grad + c, (load(grad + c) - load(unit + c) * along) / divisor);
      }
      if (out.refined)
        write_any(out.refined, out.refined_dtype, (b * p.tokens + position(p, shared, row)) * p.channels, grad, p.channels);
    }
    if (p.hidden && (weights || out.key)) {
      const T* hidden = image.keys.hidden + begin * hp;
      T* grad_hidden = task.grad_hidden;
      matmul(rows, hp, p.channels, task.grad, cp, int64_t(1), shared.up, hp, grad_hidden, hp, false);
      for (int64_t i = 0; i < rows * hp; i += lanes) {
        const Vec<T> v = load(hidden + i);
        store(grad_hidden + i, v != T(0) ? load(grad_hidden + i) * T(p.scale) : Vec<T>{});
      }
      if (const View& mask = p.dropout_mask; mask.data)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t n = position(p, shared, begin + r);
          read_any(task.key.row, mask, b * mask.stride[0] + n * mask.stride[1], mask.stride[2], p.hidden);
          for (int64_t h = 0; h < p.hidden; ++h) grad_hidden[r * hp + h] *= task.key.row[h];
        }
      if (weights) {
        matmul(p.channels, hp, rows, task.grad, int64_t(1), cp, hidden, hp, part, hp, false);
        // Read again: keeping the means of all rows would take as much memory as the refined keys.
        for (int64_t r = 0; r < rows; ++r) {
          if (r + kKeyAhead < rows) prefetch_key(p, b, position(p, shared, begin + r + kKeyAhead));
          read_key(task.key.key + r * cp, task.key.row, p, cp, b, position(p, shared, begin + r));
        }
        matmul(p.hidden, cp, rows, grad_hidden, int64_t(1), hp, task.key.key, cp, part + p.channels * hp, cp, false);
      }
      if (out.key) matmul(rows, cp, p.hidden, grad_hidden, hp, int64_t(1), shared.down, cp, task.grad, cp, true);
    }
    if (!out.key) return;
    for (int64_t r = 0; r < rows; ++r) {
      T* grad = task.grad + r * cp;
      for (int64_t c = 0; c < cp; c += lanes) store(grad + c, load(grad + c) / T(p.heads));
      write_any(out.key, out.key_dtype, (b * p.tokens + position(p, shared, begin + r)) * p.channels, grad, p.channels);
    }
  }

  Ahead tokens_ahead(const View& v, int64_t b) const {
    if (v.stride[2] != 1 || v.stride[1] != p.dim) return {};
    const char* start = (const char*)((const S*)v.data + b * v.stride[0]);
    return {start, start + min64((p.prefix + p.num_b) * p.dim * int64_t(sizeof(S)), kAheadBytes / 2)};
  }

  void add_to(T* sum, const T* part, int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes<T>) store(sum + i, load(sum + i) + load(part + i));
  }

  void run(const BackwardInputs& inputs, const Parallel& parallel, char* base) {
    in = &inputs;
    in_stride_g = inputs.grad_tokens.stride[2];
    if (p.dim == 1) in_stride_g = 1;
    plan(base);
    shared.fill(p);
    const int64_t merged = p.prefix + p.num_b, part_b = p.num_b * shared.cp;
    if (weights) memset(group_weights, 0, size_t(groups * weight_size) * sizeof(T));
    if (by_image) {
      run_ranges(parallel, groups, tasks, [&](int64_t t, int64_t first, int64_t last) {
        const Task task = this->task_at(t);
        const Image image = this->image_at(t);
        for (int64_t b = first * group_images; b < min64(p.batch, last * group_images); ++b) {
          prepare_image(image, b);
          values(task, image, b, 0, merged);
          if (!key_path) continue;
          refine_keys(p, shared, image.keys, task.key, b, 0, p.num_a + p.num_b);
          // What the next image begins with: its gradient, then its merged tokens.
          const bool more = b + 1 < min64(p.batch, last * group_images);
          Ahead grad = more ? tokens_ahead(in->grad_tokens, b + 1) : Ahead{};
          Ahead y = more ? tokens_ahead(in->tokens, b + 1) : Ahead{};
          for (int64_t c = 0; c < chunks; ++c) {
            pair_chunk(task, image, b, c, c == 0 ? image.grad_b : image.grad_b + part_b, 2 * c < chunks ? &grad : &y);
            if (c > 0) add_to(image.grad_b, image.grad_b + part_b, part_b);
          }
          for (int64_t c = 0; c < row_chunks; ++c) {
            key_chunk(task, image, b, c, 1, image.grad_weights);
            if (weights) add_to(group_weights + b / group_images * weight_size, image.grad_weights, weight_size);
          }
        }
      });
    } else {
      run_ranges(parallel, p.batch, tasks, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) prepare_image(this->image_at(b), b);
      });
      over_items(parallel, merged,
                 [&](const Task& task, const Image& image, int64_t b, int64_t m) { values(task, image, b, m, m + 1); });
      if (!key_path) return;
      over_items(parallel, row_chunks, [&](const Task& task, const Image& image, int64_t b, int64_t c) {
        refine_keys(p, shared, image.keys, task.key, b, c * kKeyRows, min64(p.num_a + p.num_b, (c + 1) * kKeyRows));
      });
      over_items(parallel, chunks, [&](const Task& task, const Image& image, int64_t b, int64_t c) {
        Ahead none;
        pair_chunk(task, image, b, c, image.grad_b + c * part_b, &none);
      });
      over_items(parallel, row_chunks, [&](const Task& task, const Image& image, int64_t b, int64_t c) {
        key_chunk(task, image, b, c, chunks, image.grad_weights + c * weight_size);
      });
      if (weights)
        for (int64_t b = 0; b < p.batch; ++b)
          for (int64_t c = 0; c < row_chunks; ++c)
            add_to(group_weights + b * weight_size, this->image_at(b).grad_weights + c * weight_size, weight_size);
    }
    if (weights) write_weights(parallel);
  }

  void write_weights(const Parallel& parallel) {
    const int64_t cp = shared.cp, hp = shared.hp;
    run_ranges(parallel, p.channels + p.hidden, groups * weight_size < kSerialWork ? 1 : tasks,
               [&](int64_t, int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   const bool is_up = r < p.channels;
                   const int64_t row = is_up ? r : r - p.channels, width = is_up ? p.hidden : p.channels;
                   const int64_t offset = is_up ? row * hp : p.channels * hp + row * cp;
                   for (int64_t c = 0; c < width; ++c) {
                     T sum = 0;
                     for (int64_t g = 0; g < groups; ++g) sum += group_weights[g * weight_size + offset + c];
                     if (is_up) sum *= T(p.scale);
                     write_any(is_up ? out.w_up : out.w_down, out.weight_dtype, row * width + c, &sum, 1);
                   }
                 }
               });
  }

  template <class F>
  void over_items(const Parallel& parallel, int64_t items, const F& f) {
    run_ranges(parallel, p.batch * items, tasks, [&](int64_t t, int64_t begin, int64_t end) {
      const Task task = this->task_at(t);
      for (int64_t at = begin; at < end; ++at) f(task, this->image_at(at / items), at / items, at % items);
    });
  }
};

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
