// Unmerge and its gradient.

namespace fpet {
namespace FPET_ISA {
namespace {

template <class S>
void unmerge(const UnmergeProblem& p, const Parallel& parallel) {
  const int64_t tokens = p.prefix + p.num_a + p.num_b;
  const View& v = p.input;
  const auto copy = [&](int64_t image, int64_t n, int64_t from) {
    const S* row = (const S*)v.data + image * v.stride[0] + from * v.stride[1];
    S* out = (S*)p.output + (image * tokens + n) * p.dim;
    if (v.stride[2] == 1) {
      memcpy(out, row, size_t(p.dim) * sizeof(S));
    } else {
      for (int64_t d = 0; d < p.dim; ++d) out[d] = row[d * v.stride[2]];
    }
  };
  const int64_t threads = p.batch * tokens * p.dim < kSerialWork ? 1 : parallel.threads;
  run_ranges(parallel, p.batch, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t n = 0; n < p.prefix; ++n) copy(b, n, n);
      if (p.split_b) {
        for (int64_t i = 0; i < p.num_a; ++i) copy(b, p.prefix + p.split_a[i], p.match[b * p.num_a + i]);
        for (int64_t j = 0; j < p.num_b; ++j) copy(b, p.prefix + p.split_b[j], p.prefix + j);
        continue;
      }
      int64_t i = 0, j = 0, n = p.prefix;
      for (int64_t row = 0; row < p.grid_h; ++row)
        for (int64_t col = 0; col < p.grid_w; ++col, ++n)
          copy(b, n, (row + col) & 1 ? p.prefix + j++ : p.match[b * p.num_a + i++]);
    }
  });
}

// A source may also have been sent to a prefix token by hand, so groups are over all merged tokens here.
template <class S>
struct UnmergeBackward : Scratch<UnmergeBackward<S>> {
  using M = Compute<S>;
  const UnmergeProblem& p;
  int64_t tasks;
  UnmergePositions positions;

  struct Task {
    int32_t *start, *list;
    const S** rows;
    M *weights, *sum;
  };
  UnmergeBackward(const UnmergeProblem& problem, int64_t threads) : p(problem) {
    tasks = p.batch * (p.num_a + p.num_b) * p.dim < kSerialWork ? 1 : max64(1, min64(threads, p.batch));
  }
  void plan_task(Arena& arena, Task& task) const {
    task.start = arena.take<int32_t>(p.prefix + p.num_b + 1);
    task.list = arena.take<int32_t>(p.num_a);
    task.rows = arena.take<const S*>(p.num_a + 1);
    task.weights = arena.take<M>(p.num_a + 1);
    task.sum = arena.take<M>(2 * p.dim);
  }
  struct Image {};  // none is kept
  void plan_image(Arena&, Image&) const {}
  void plan_shared(Arena& arena) { positions.plan(arena, p); }
  size_t plan(char* base) { return this->lay_out(base, tasks, 0); }

  void run(const Parallel& parallel, char* base) {
    plan(base);
    fill_positions(positions.a, positions.b, p.split_a, p.split_b, p.num_a, p.num_b, p.grid_h, p.grid_w, p.prefix);
    const int64_t merged = p.prefix + p.num_b;
    const View& v = p.input;
    run_ranges(parallel, p.batch, tasks, [&](int64_t t, int64_t begin, int64_t end) {
      const Task task = this->task_at(t);
      for (int64_t k = 0; k <= p.num_a; ++k) task.weights[k] = M(1);
      for (int64_t b = begin; b < end; ++b) {
        group_sources(p.match + b * p.num_a, p.num_a, merged, 0, task.start, task.list);
        const S* grad = (const S*)v.data + b * v.stride[0];
        for (int64_t m = 0; m < merged; ++m) {
          int64_t count = 0;
          task.rows[count++] = grad + (m < p.prefix ? m : positions.b[m - p.prefix]) * v.stride[1];
          for (int32_t k = task.start[m]; k < task.start[m + 1]; ++k)
            task.rows[count++] = grad + positions.a[task.list[k]] * v.stride[1];
          S* out = (S*)p.output + (b * merged + m) * p.dim;
          if (v.stride[2] == 1) {
            weighted_mean(out, task.rows, task.weights, count, M(1), p.dim, false);
            continue;
          }
          for (int64_t d = 0; d < p.dim; ++d) {
            M sum = 0;
            for (int64_t k = 0; k < count; ++k) sum += to_compute(task.rows[k][d * v.stride[2]]);
            from_compute(sum, out + d);
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
