// The forward: scores ranked, tokens merged.

namespace fpet {
namespace FPET_ISA {
namespace {

// Matches the sources [begin, end), in whole vectors: a lane is a source, and destinations pass by in order, so that a score
// must be larger than those before it to take their place: ties go to the lowest index, and NaN, larger than nothing, loses.
template <class T>
void match_rows(const Problem& p, const ForwardOutputs& out, const Shared<T>& s, const Keys<T>& keys, T* tile, int64_t image,
                int64_t begin, int64_t end, Ahead* ahead) {
  constexpr int lanes = kLanes<T>;
  constexpr int64_t panel = Shared<T>::panel_cols;
  using At = Vec<Int<T>>;
  struct Best {
    Vec<T> first, second;
    At first_at, second_at;
  };
  for (int64_t i0 = begin; i0 < end;) {
    const int64_t stop = min64(end, i0 / panel * panel + panel), vectors = ceil_div(stop - i0, lanes);
    Best best[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v)
      best[v] = {splat(T(-INFINITY)), splat(T(-INFINITY)), splat(Int<T>(p.num_b)), splat(Int<T>(p.num_b))};
    const T* turned = keys.turned + i0 / panel * panel * p.channels + i0 % panel;
    for (int64_t j0 = 0; j0 < p.num_b; j0 += kScoreRows) {
      const int64_t rows = min64(kScoreRows, p.num_b - j0);
      matmul(rows, vectors * lanes, p.channels, keys.b + j0 * s.cp, s.cp, int64_t(1), turned, panel, tile, panel, false, ahead);
      for (int64_t v = 0; v < vectors; ++v) {
        Best now = best[v];
        for (int64_t r = 0; r < rows; ++r) {
          const Vec<T> score = load(tile + r * panel + v * lanes);
          const At at = splat(Int<T>(j0 + r));
          const auto beats_first = score > now.first, beats_second = score > now.second;
          now.second = beats_first ? now.first : (beats_second ? score : now.second);
          now.second_at = beats_first ? now.first_at : (beats_second ? at : now.second_at);
          now.first = beats_first ? score : now.first;
          now.first_at = beats_first ? at : now.first_at;
        }
        best[v] = now;
      }
    }
    for (int64_t i = i0; i < stop; ++i) {
      const Best& found = best[(i - i0) / lanes];
      const int lane = int((i - i0) % lanes);
      int64_t first = found.first_at[lane], second = found.second_at[lane];
      // No number above -inf among the scores: the lowest index that is left, so that the match is always valid.
      const bool too_few = second >= p.num_b;
      if (first >= p.num_b) first = 0;
      if (too_few) second = first == 0 ? 1 : 0;
      const int64_t at = image * p.num_a + i;
      out.match[at] = p.prefix + first;
      out.second[at] = p.prefix + second;
      ((T*)out.mid)[at] = too_few ? T(NAN) : (found.first[lane] + found.second[lane]) / T(2);
    }
    i0 = stop;
  }
}

// The tokens that become one merged token.
template <class S>
struct Sources {
  const S** rows;  // (N_A + 1)
  Compute<S>* weights;
  int64_t count;
};

// The merged tokens [begin, end) of one image; while one is formed, the sources of the next are fetched.
template <class S, class T>
void merge_rows(const Problem& p, const ForwardOutputs& out, const Shared<T>& s, const Groups<Compute<S>>& groups,
                Sources<S>* sources, int64_t image, int64_t begin, int64_t end, bool stream) {
  using M = Compute<S>;
  const int64_t merged = p.prefix + p.num_b, stride = p.x.stride[2];
  const S* x = (const S*)p.x.data + image * p.x.stride[0];
  const auto collect = [&](Sources<S>& to, int64_t m) {
    const int64_t j = m - p.prefix, at = j < 0 ? m : s.pos_b[j];
    to.rows[0] = x + at * p.x.stride[1];
    to.weights[0] = groups.size[at];
    to.count = 1;
    if (j >= 0)
      for (int32_t k = groups.start[j]; k < groups.start[j + 1]; ++k, ++to.count) {
        const int64_t source = s.pos_a[groups.list[k]];
        to.rows[to.count] = x + source * p.x.stride[1];
        to.weights[to.count] = groups.size[source];
      }
  };
  if (begin < end) collect(sources[begin % 2], begin);
  for (int64_t m = begin; m < end; ++m) {
    const Sources<S>& now = sources[m % 2];
    Sources<S>& next = sources[(m + 1) % 2];
    next.count = 0;
    if (m + 1 < end) collect(next, m + 1);
    M n = 0;
    for (int64_t k = 0; k < now.count; ++k) n += now.weights[k];
    ((M*)out.merged_size)[image * merged + m] = n;
    S* y = (S*)out.tokens + (image * merged + m) * p.dim;
    if (stride != 1) {
      for (int64_t d = 0; d < p.dim; ++d) {
        M sum = 0;
        for (int64_t k = 0; k < now.count; ++k) sum += now.weights[k] * to_compute(now.rows[k][d * stride]);
        from_compute(M(sum / n), y + d);
      }
    } else {
      weighted_mean(y, now.rows, now.weights, now.count, n, p.dim, stream, next.rows, next.count);
    }
  }
}

template <class S, class T>
struct Forward : Scratch<Forward<S, T>> {
  using M = Compute<S>;
  const Problem& p;
  const ForwardOutputs* out = nullptr;
  int64_t tasks = 1;     // threads that work at once
  bool by_image = true;  // every task takes whole images
  Shared<T> shared;

  struct Image {
    Keys<T> keys;
    Groups<M> groups;
  };
  struct Task {
    KeyScratch<T> key;
    T* tile;
    Sources<S> sources[2];
  };

  Forward(const Problem& problem, int64_t threads) : p(problem) {
    const int64_t work = p.batch * (p.tokens * p.dim + p.num_a * p.num_b * p.channels);
    tasks = work < kSerialWork ? 1 : threads;
    by_image = tasks == 1 || p.batch >= 2 * tasks || p.num_a == 0;
  }

  void plan_image(Arena& arena, Image& image) const {
    image.keys.plan(arena, p, shared, false);
    image.groups.plan(arena, p);
  }
  void plan_task(Arena& arena, Task& task) const {
    task.key.plan(arena, shared);
    task.tile = arena.take<T>(kScoreRows * Shared<T>::panel_cols);
    for (Sources<S>& sources : task.sources) {
      sources.rows = arena.take<const S*>(p.num_a + 1);
      sources.weights = arena.take<M>(p.num_a + 1);
    }
  }

  void plan_shared(Arena& arena) { shared.plan(arena, p, false); }
  int64_t images() const { return by_image ? tasks : p.batch; }
  size_t plan(char* base) { return this->lay_out(base, tasks, images()); }

  void run(const ForwardOutputs& outputs, const Parallel& parallel, char* base) {
    out = &outputs;
    plan(base);
    shared.fill(p);
    const int64_t merged = p.prefix + p.num_b, key_rows = p.num_a + p.num_b;
    const bool stream = p.batch * merged * p.dim * int64_t(sizeof(S)) >= kStreamBytes;
    const auto groups = [&](const Image& image, int64_t b) { image.groups.fill(p, out->match, b); };
    if (by_image) {
      const int64_t runs[] = {min64(p.batch, tasks == 1 ? 1 : tasks * kRuns)};
      run_phases(
          parallel, tasks, runs,
          [&](int, int64_t t, int64_t run) {
            Task task = this->task_at(t);
            const Image image = this->image_at(t);
            for (int64_t b = p.batch * run / runs[0]; b < p.batch * (run + 1) / runs[0]; ++b) {
              Ahead ahead = tokens_ahead(b);
              refine_keys(p, shared, image.keys, task.key, b, 0, key_rows, &ahead);
              match_rows(p, *out, shared, image.keys, task.tile, b, 0, p.num_a, &ahead);
              groups(image, b);
              merge_rows<S, T>(p, *out, shared, image.groups, task.sources, b, 0, merged, stream);
            }
          },
          [](int) {});
      return;
    }
    // Of every image: pieces of its keys, of its sources, of its merged tokens.
    constexpr int64_t lanes = kLanes<T>, panel = Shared<T>::panel_cols;
    const int64_t length[] = {kKeyRows / 2, p.num_a < 16 * panel ? min64(panel, 2 * lanes) : panel, kMergeRows};
    const int64_t total[] = {key_rows, p.num_a, merged};
    const int64_t pieces[] = {ceil_div(total[0], length[0]), ceil_div(total[1], length[1]), ceil_div(total[2], length[2])};
    const int64_t items[] = {p.batch * pieces[0], p.batch * pieces[1], p.batch * pieces[2]};
    run_phases(
        parallel, tasks, items,
        [&](int phase, int64_t t, int64_t item) {
          Task task = this->task_at(t);
          const int64_t b = item / pieces[phase], begin = item % pieces[phase] * length[phase];
          const int64_t end = min64(total[phase], begin + length[phase]);
          const Image image = this->image_at(b);
          if (phase == 0) refine_keys(p, shared, image.keys, task.key, b, begin, end);
          if (phase == 1) match_rows(p, *out, shared, image.keys, task.tile, b, begin, end, nullptr);
          if (phase == 2) merge_rows<S, T>(p, *out, shared, image.groups, task.sources, b, begin, end, stream);
        },
        [&](int phase) {
          for (int64_t b = 0; phase == 1 && b < p.batch; ++b) groups(this->image_at(b), b);
        });
  }

  // The tokens of image b, as far as the second-level cache has room: merged next, fetched while scores are computed.
  Ahead tokens_ahead(int64_t b) const {
    Ahead ahead;
    if (p.x.stride[2] == 1)
      ahead.add((const S*)p.x.data + b * p.x.stride[0], p.x.stride[1] * int64_t(sizeof(S)), p.dim * int64_t(sizeof(S)),
                p.tokens);
    return ahead;
  }
};

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
