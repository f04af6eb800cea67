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
  int64_t tasks, chunks, pair_cols, row_chunks, group_images, groups, weight_size;
  bool key_path, weights, by_image, stream;
  Shared<T> shared;

  struct Image {
    Groups<M> groups;
    M *inverse_size, *grad_size;  // (N_B): 1 / n_j, and γ'_j
    Keys<T> keys;
    T *grad_a, *grad_b;  // (N_A, cp); (chunks or 1) times (N_B, cp)
    T* row_sums;         // (N_A): Σ_j ds_ij
    T* grad_weights;     // (row_chunks or 1) times weight_size
  };
  struct Task {
    KeyScratch<T> key;
    T* scores;                    // (kPairRows, pair_cols)
    M *products, *x, *g, *sizes;  // (kPairRows, pair_cols); turned rows of x, converted rows of G; (pair_cols)
    T *mids, *sums;               // (pair_cols)
    M* row;                       // two rows of x
    const S** x_rows;
    T *grad, *grad_hidden;  // (kKeyRows, cp), (kKeyRows, hp)
  };

  Backward(const Problem& problem, const BackwardOutputs& outputs, int64_t threads) : p(problem), out(outputs) {
    weights = out.w_down != nullptr;
    key_path = weights || out.refined || out.key;
    const int64_t work = p.batch * (p.tokens * p.dim + (key_path ? p.num_a * p.num_b * (p.dim + 3 * p.channels) : 0));
    tasks = work < kSerialWork ? 1 : threads;
    by_image = tasks == 1 || p.batch >= 2 * tasks || p.batch > kMaxGroups;
    stream = p.batch * p.tokens * p.dim * int64_t(sizeof(S)) >= kStreamBytes;
    chunks = max64(1, min64(kMaxChunks, min64(ceil_div(p.num_a, 28), ceil_div(p.num_a, kLanes<M>))));
    pair_cols =
        max64(min64(kPairCols, round_up(p.num_a, kLanes<M>)), ceil_div(ceil_div(p.num_a, kLanes<M>), chunks) * kLanes<M>);
    row_chunks = ceil_div(p.num_a + p.num_b, kKeyRows);
    group_images = max64(1, ceil_div(p.batch, kMaxGroups));
    groups = ceil_div(p.batch, group_images);
  }

  // The first source of a chunk: chunks of about the same length, in whole vectors.
  int64_t chunk_begin(int64_t chunk) const { return min64(p.num_a, ceil_div(p.num_a, kLanes<M>) * chunk / chunks * kLanes<M>); }

  int64_t in_stride_g = 0;  // of G's last dimension

  void plan_image(Arena& arena, Image& image) const {
    image.groups.plan(arena, p);
    image.inverse_size = arena.take<M>(p.num_b);
    image.grad_size = arena.take<M>(p.num_b);
    if (!key_path) return;
    image.keys.plan(arena, p, shared, true);
    image.grad_a = arena.take<T>(p.num_a * shared.cp);
    image.grad_b = arena.take<T>((by_image ? 1 : chunks) * p.num_b * shared.cp);
    image.row_sums = arena.take<T>(p.num_a);
    image.grad_weights = weights ? arena.take<T>((by_image ? 1 : row_chunks) * weight_size) : nullptr;
  }
  void plan_task(Arena& arena, Task& task) const {
    task.row = arena.take<M>(2 * p.dim);
    if (!key_path) return;
    task.key.plan(arena, shared);
    task.scores = arena.take<T>(kPairRows * pair_cols);
    task.products = arena.take<M>(kPairRows * pair_cols);
    task.sizes = arena.take<M>(pair_cols);
    task.mids = arena.take<T>(pair_cols);
    task.sums = arena.take<T>(pair_cols);
    task.x_rows = arena.take<const S*>(pair_cols);
    task.grad = arena.take<T>(kKeyRows * max64(shared.cp, shared.hp));
    task.grad_hidden = arena.take<T>(kKeyRows * shared.hp);
    task.x = arena.take<M>(round_up(pair_cols, kPanel) * p.dim);
    task.g = arena.take<M>(sizeof(S) == sizeof(M) ? 0 : min64(kPairRows, p.num_b) * p.dim);
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

  static constexpr int64_t kPanel = kTileVecs * kLanes<M>;

  // Whether the products of dM take pairs of bfloat16 as they are stored.
  bool in_pairs() const {
    const View& g = in->grad_tokens;
    return kPairsBf16 && SameType<S, bf16>::value && p.x.stride[2] == 1 && in_stride_g == 1 && p.dim % 2 == 0 &&
           g.stride[0] % 2 == 0 && g.stride[1] % 2 == 0 && uintptr_t(g.data) % 4 == 0;
  }

  // The rows of `cols` sources from i0 on, turned, and what else is needed of them.
  void take_sources(const Task& task, const Image& image, int64_t b, int64_t i0, int64_t cols) const {
    const T* mid = (const T*)in->mid + b * p.num_a;
    for (int64_t i = 0; i < round_up(cols, kLanes<M>); ++i) {
      const bool is_one = i < cols;
      task.sizes[i] = is_one ? image.groups.size[shared.pos_a[i0 + i]] : M(0);
      task.mids[i] = is_one ? mid[i0 + i] : T(0);
      task.sums[i] = 0;
      if (is_one) task.x_rows[i] = x_row(b, shared.pos_a[i0 + i]);
    }
    if (in_pairs()) {
      turn_rows((uint32_t*)task.x, kPanel, (const uint32_t* const*)task.x_rows, 1, cols, p.dim / 2);
    } else {
      turn_rows(task.x, kPanel, task.x_rows, p.x.stride[2], cols, p.dim);
    }
  }

  // G_j · x_i of `rows` destinations from j0 on and the sources taken.
  void multiply(const Task& task, int64_t b, int64_t j0, int64_t rows, int64_t cols, Ahead* ahead) const {
    const S* g = grad_row(b, p.prefix + j0);
    const int64_t row = in->grad_tokens.stride[1];
    if constexpr (sizeof(S) == sizeof(M)) {
      multiply_rows(task, g, row, in_stride_g, task.x, p.dim, rows, cols, ahead);
    } else if (in_pairs()) {
      if constexpr (kPairsBf16)
        multiply_rows(task, (const uint32_t*)g, row / 2, 1, (const uint32_t*)task.x, p.dim / 2, rows, cols, ahead);
    } else {
      for (int64_t r = 0; r < rows; ++r) read_row(task.g + r * p.dim, g + r * row, in_stride_g, p.dim);
      multiply_rows(task, task.g, p.dim, 1, task.x, p.dim, rows, cols, ahead);
    }
  }

  // A slice of a panel stays in the first-level cache while all rows pass.
  template <class U>
  void multiply_rows(const Task& task, const U* g, int64_t row, int64_t col, const U* x, int64_t dim, int64_t rows,
                     int64_t cols, Ahead* ahead) const {
    for (int64_t i = 0; i < cols; i += kPanel)
      for (int64_t d = 0; d < dim; d += kPairDepth)
        matmul(rows, min64(kPanel, round_up(cols - i, kLanes<M>)), min64(kPairDepth, dim - d), g + d * col, row, col,
               x + i * dim + d * kPanel, kPanel, task.products + i, pair_cols, d > 0, ahead);
  }

  // ds of a tile, in place of its scores; sums[i] += Σ_j ds_ij.
  void score_gradients(const Task& task, const Image& image, int64_t j0, int64_t rows, int64_t cols) const {
    T* sums = task.sums;
    for (int64_t r = 0; r < rows; ++r) {
      const M inverse_size = image.inverse_size[j0 + r], grad_size = image.grad_size[j0 + r];
      const M* products = task.products + r * pair_cols;
      T* scores = task.scores + r * pair_cols;
      if constexpr (sizeof(T) == sizeof(M)) {
        for (int64_t i = 0; i < cols; i += kLanes<T>) {
          const Vec<T> grad_match = (load(products + i) * inverse_size + grad_size) * load(task.sizes + i);
          const Vec<T> z = load(scores + i) - load(task.mids + i);
          const Vec<T> e = exp_nonpositive(z < T(0) ? z : -z);  // p (1 - p) is even in z
          const Vec<T> ds = grad_match * (e / ((e + T(1)) * (e + T(1))));
          store(scores + i, ds);
          store(sums + i, load(sums + i) + ds);
        }
      } else {
        for (int64_t i = 0; i < cols; ++i) {
          const T grad_match = (T(products[i]) * T(inverse_size) + T(grad_size)) * T(task.sizes[i]);
          const T e = T(exp(-__builtin_fabs(double(scores[i] - task.mids[i]))));
          sums[i] += scores[i] = grad_match * (e / ((e + T(1)) * (e + T(1))));
        }
      }
    }
  }

  // dk̂ of the sources of the chunks [first, last), and their shares of dk̂_B: summed up, or each by itself. As many chunks at once
  // as a tile has columns, and at least one, so that their sums are the same however chunks are handed out.
  void pair_chunks(const Task& task, const Image& image, int64_t b, int64_t first, int64_t last, bool by_itself,
                   Ahead* ahead) const {
    const int64_t cp = shared.cp;
    if (!p.num_a) memset(image.grad_b, 0, size_t(p.num_b * cp) * sizeof(T));
    for (int64_t next; first < last; first = next) {
      const int64_t i0 = chunk_begin(first);
      for (next = first + 1; next < last && chunk_begin(next + 1) - i0 <= pair_cols;) ++next;
      const int64_t cols = chunk_begin(next) - i0;
      take_sources(task, image, b, i0, cols);
      for (int64_t j0 = 0; j0 < p.num_b; j0 += kPairRows) {
        const int64_t rows = min64(kPairRows, p.num_b - j0);
        multiply(task, b, j0, rows, cols, ahead);
        const T* unit_b = image.keys.b + j0 * cp;
        for (int64_t i = i0; i < i0 + cols;) {  // k̂_Aᵀ has panels of its own
          const int64_t at = i % shared.panel_cols, some = min64(shared.panel_cols - at, i0 + cols - i);
          matmul(rows, round_up(some, kLanes<T>), p.channels, unit_b, cp, int64_t(1),
                 image.keys.turned + (i - at) * p.channels + at, shared.panel_cols, task.scores + i - i0, pair_cols, false);
          i += some;
        }
        score_gradients(task, image, j0, rows, cols);
        matmul(cols, cp, rows, task.scores, int64_t(1), pair_cols, unit_b, cp, image.grad_a + i0 * cp, cp, j0 > 0);
        for (int64_t c = first; c < next; ++c) {
          const int64_t begin = chunk_begin(c);
          T* part = image.grad_b + ((by_itself ? c * p.num_b : 0) + j0) * cp;
          matmul(rows, cp, chunk_begin(c + 1) - begin, task.scores + begin - i0, pair_cols, int64_t(1),
                 image.keys.a + begin * cp, cp, part, cp, !by_itself && c > 0);
        }
      }
      memcpy(image.row_sums + i0, task.sums, size_t(cols) * sizeof(T));
    }
  }

  // The gradient through m_i, the mean of the two largest scores: -½ Σ_j ds_ij at both. Added to the rows of dk̂ in task.grad.
  void mid_gradients(const Task& task, const Image& image, int64_t b, int64_t begin, int64_t rows) const {
    constexpr int lanes = kLanes<T>;
    const int64_t cp = shared.cp, *first = in->match + b * p.num_a, *second = in->second + b * p.num_a;
    for (int64_t i = 0; i < p.num_a; ++i) {
      const T half = image.row_sums[i] * T(-0.5);
      const int64_t j1 = first[i] - p.prefix, j2 = second[i] - p.prefix;
      const T *a = image.keys.a + i * cp, *b1 = image.keys.b + j1 * cp, *b2 = image.keys.b + j2 * cp;
      if (i >= begin && i < begin + rows) {
        T* grad = task.grad + (i - begin) * cp;
        for (int64_t c = 0; c < cp; c += lanes) store(grad + c, load(grad + c) + (load(b1 + c) + load(b2 + c)) * half);
      }
      const int64_t best[2] = {p.num_a + j1, p.num_a + j2};
      for (const int64_t row : best)
        if (row >= begin && row < begin + rows) {
          T* grad = task.grad + (row - begin) * cp;
          for (int64_t c = 0; c < cp; c += lanes) store(grad + c, load(grad + c) + load(a + c) * half);
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
      for (int64_t c = 0; c < cp; c += lanes) {
        Vec<T> sum = load((j < 0 ? image.grad_a + row * cp : image.grad_b + j * cp) + c);
        if (j >= 0)
          for (int64_t q = 1; q < parts_b; ++q) sum += load(image.grad_b + (q * p.num_b + j) * cp + c);
        store(grad + c, sum);
      }
    }
    mid_gradients(task, image, b, begin, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = begin + r, j = row - p.num_a;
      T* grad = task.grad + r * cp;
      if (p.cosine) {
        const T* unit = j < 0 ? image.keys.a + row * cp : image.keys.b + j * cp;
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
          const int64_t ahead = position(p, shared, begin + min64(r + kKeyAhead, rows - 1));
          read_key(task.key.key + r * cp, task.key.row, p, cp, b, position(p, shared, begin + r), ahead);
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

  void run(const BackwardInputs& inputs, const Parallel& parallel, char* base) {
    in = &inputs;
    in_stride_g = inputs.grad_tokens.stride[2];
    if (p.dim == 1) in_stride_g = 1;
    plan(base);
    shared.fill(p);
    const int64_t merged = p.prefix + p.num_b;
    if (weights) memset(group_weights, 0, size_t(groups * weight_size) * sizeof(T));
    if (by_image) {
      const int64_t runs = min64(groups, tasks == 1 ? 1 : tasks * kRuns);
      const int64_t items[] = {runs, weights ? ceil_div(p.channels + p.hidden, kWeightRows) : 0};
      run_phases(
          parallel, tasks, items,
          [&](int phase, int64_t t, int64_t item) {
            const Task task = this->task_at(t);
            if (phase == 1) return write_weights(task, item);
            const int64_t end = min64(p.batch, groups * (item + 1) / runs * group_images);
            for (int64_t b = groups * item / runs * group_images; b < end; ++b)
              whole_image(task, this->image_at(t), b, b + 1 < end);
          },
          [](int) {});
      return;
    }
    for (int64_t b = 0; b < p.batch; ++b) prepare_image(this->image_at(b), b);
    // Of every image: its keys and merged tokens, its chunks of sources, its keys again.
    const int64_t keys = key_path ? row_chunks : 0,
                  pieces[] = {keys + ceil_div(merged, kMergeRows), key_path ? chunks : 0, keys};
    const int64_t items[] = {p.batch * pieces[0], p.batch * pieces[1], p.batch * pieces[2]};
    run_phases(
        parallel, tasks, items,
        [&](int phase, int64_t t, int64_t item) {
          const Task task = this->task_at(t);
          const int64_t b = item / pieces[phase], piece = item % pieces[phase];
          const Image image = this->image_at(b);
          if (phase == 2) return key_chunk(task, image, b, piece, chunks, image.grad_weights + piece * weight_size);
          if (phase == 1) return pair_chunks(task, image, b, piece, piece + 1, true, nullptr);
          if (piece < keys) {
            refine_keys(p, shared, image.keys, task.key, b, piece * kKeyRows, min64(p.num_a + p.num_b, (piece + 1) * kKeyRows));
          } else {
            const int64_t begin = (piece - keys) * kMergeRows;
            values(task, image, b, begin, min64(merged, begin + kMergeRows));
          }
        },
        [](int) {});
    if (!weights) return;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t c = 0; c < row_chunks; ++c)
        add_to(group_weights + b * weight_size, this->image_at(b).grad_weights + c * weight_size, weight_size);
    for (int64_t c = 0; c * kWeightRows < p.channels + p.hidden; ++c) write_weights(this->task_at(0), c);
  }

  // All of one image; meanwhile what the next one begins with is fetched.
  void whole_image(const Task& task, const Image& image, int64_t b, bool next) const {
    prepare_image(image, b);
    values(task, image, b, 0, p.prefix + p.num_b);
    if (!key_path) return;
    refine_keys(p, shared, image.keys, task.key, b, 0, p.num_a + p.num_b);
    Ahead ahead = next ? tokens_ahead(b + 1) : Ahead{};
    pair_chunks(task, image, b, 0, chunks, false, &ahead);
    for (int64_t c = 0; c < row_chunks; ++c) {
      key_chunk(task, image, b, c, 1, image.grad_weights);
      if (weights) add_to(group_weights + b / group_images * weight_size, image.grad_weights, weight_size);
    }
  }

  // What image b begins with: its gradient, its merged tokens and its sources.
  Ahead tokens_ahead(int64_t b) const {
    Ahead ahead;
    const auto add = [&](const View& v, int64_t count, const int64_t* index) {
      constexpr int64_t bytes = sizeof(S);
      if (v.stride[2] == 1) ahead.add((const S*)v.data + b * v.stride[0], v.stride[1] * bytes, p.dim * bytes, count, index);
    };
    add(in->grad_tokens, p.prefix + p.num_b, nullptr);
    add(in->tokens, p.prefix + p.num_b, nullptr);
    add(p.x, p.num_a, shared.pos_a);
    return ahead;
  }

  void add_to(T* sum, const T* part, int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes<T>) store(sum + i, load(sum + i) + load(part + i));
  }

  // kWeightRows rows of the weight gradients, W_up's before W_down's, summed over groups.
  void write_weights(const Task& task, int64_t chunk) const {
    const int64_t cp = shared.cp, hp = shared.hp, begin = chunk * kWeightRows;
    for (int64_t r = begin; r < min64(begin + kWeightRows, p.channels + p.hidden); ++r) {
      const bool is_up = r < p.channels;
      const int64_t row = is_up ? r : r - p.channels, padded = is_up ? hp : cp, width = is_up ? p.hidden : p.channels;
      const T* part = group_weights + (is_up ? row * hp : p.channels * hp + row * cp);
      for (int64_t c = 0; c < padded; c += kLanes<T>) {
        Vec<T> total{};
        for (int64_t g = 0; g < groups; ++g) total += load(part + g * weight_size + c);
        store(task.grad + c, is_up ? total * T(p.scale) : total);
      }
      write_any(is_up ? out.w_up : out.w_down, out.weight_dtype, row * width, task.grad, width);
    }
  }
};

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
