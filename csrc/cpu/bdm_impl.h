// Forward and backward of bipartite differentiable matching for one instruction set. docs/mathematics.md has the formulas.
//
// One image is a sequence of phases, each over rows that can be worked on in any order. With enough images every thread takes
// whole images, whose scratch then stays in its cache; with few, every phase is spread over the threads. Both ways do the same
// arithmetic in the same order: rows are independent, and what is summed over rows is summed per fixed chunk, then over chunks.
#include "kernels.h"
#include "vec.h"

#include "blocks.h"

namespace fpet {
namespace FPET_ISA {
namespace {

constexpr int64_t kKeyRows = 48;                    // rows of the key path that are refined at once
constexpr int64_t kScoreRows = 24;                  // destinations whose scores are ranked at once
constexpr int64_t kPairRows = 32, kPairCols = 128;  // a tile of dM and ds in the backward
constexpr int64_t kMaxChunks = 16;                  // of sources, each with its own partial sum of dk̂_B
constexpr int64_t kMaxGroups = 256;                 // of images, each with its own partial sum of the weight gradients
constexpr int64_t kSerialWork = 1 << 16;            // multiply-adds below which a second thread costs more than it saves

constexpr int64_t kStreamBytes = 16 << 20;  // outputs from this size on are written past the caches
constexpr int64_t kKeyAhead = 16;           // rows between fetching a key and using it
constexpr int64_t kAheadBytes = 640 << 10;  // fetched ahead of use: most of a second-level cache

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Arena {
  char* base;  // null: only count
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    used = (used + 63) & ~size_t(63);
    T* p = base ? (T*)(base + used) : nullptr;
    used += size_t(n > 0 ? n : 0) * sizeof(T);
    return p;
  }
};

template <class F>
void run_tasks(const Parallel& parallel, int64_t count, const F& f) {
  if (count <= 0) return;
  if (count == 1 || parallel.threads <= 1 || !parallel.run) {
    for (int64_t t = 0; t < count; ++t) f(t);
    return;
  }
  parallel.run(parallel.pool, count, [](void* context, int64_t task) { (*(const F*)context)(task); }, (void*)&f);
}

// Splits [0, n) into `parts` ranges and calls f(part, begin, end).
template <class F>
void run_ranges(const Parallel& parallel, int64_t n, int64_t parts, const F& f) {
  parts = max64(1, min64(parts, n));
  run_tasks(parallel, parts, [&](int64_t p) { f(p, n * p / parts, n * (p + 1) / parts); });
}

void fill_positions(int64_t* a, int64_t* b, const int64_t* split_a, const int64_t* split_b, int64_t num_a, int64_t num_b,
                    int64_t grid_h, int64_t grid_w, int64_t prefix) {
  if (split_b) {  // split_a may be empty, and then null
    for (int64_t i = 0; i < num_a; ++i) a[i] = split_a[i] + prefix;
    for (int64_t j = 0; j < num_b; ++j) b[j] = split_b[j] + prefix;
    return;
  }
  int64_t n = prefix;
  for (int64_t row = 0; row < grid_h; ++row)
    for (int64_t col = 0; col < grid_w; ++col, ++n) *((row + col) & 1 ? b++ : a++) = n;
}

// The sources of every destination in increasing order: those of j are list[start[j]] .. list[start[j + 1]].
void group_sources(const int64_t* match, int64_t num_a, int64_t num_b, int64_t prefix, int32_t* start, int32_t* list) {
  for (int64_t j = 0; j <= num_b; ++j) start[j] = 0;
  for (int64_t i = 0; i < num_a; ++i) ++start[match[i] - prefix + 1];
  for (int64_t j = 0; j < num_b; ++j) start[j + 1] += start[j];
  for (int64_t i = 0; i < num_a; ++i) list[start[match[i] - prefix]++] = int32_t(i);
  for (int64_t j = num_b; j > 0; --j) start[j] = start[j - 1];
  start[0] = 0;
}

// --- the key path ------------------------------------------------------------------------------------------------------------

// What all images share: positions of the two sets, and the refinement's weights in compute precision, padded.
template <class T>
struct Shared {
  int64_t cp, hp, nap, nbp;  // C, h, N_A and N_B padded to whole vectors
  int64_t *pos_a, *pos_b;    // (N_A), (N_B): index in the N tokens
  T *down_t, *up_t;          // (C, hp), (h, cp): W_downᵀ, W_upᵀ
  T *down, *up;              // (h, cp), (C, hp): backward only

  static constexpr int64_t panel_cols = kTileVecs * kLanes<T>;

  void plan(Arena& arena, const Problem& p, bool backward) {
    cp = round_up(p.channels, kLanes<T>);
    hp = round_up(p.hidden, kLanes<T>);
    nap = round_up(p.num_a, kLanes<T>);
    nbp = round_up(p.num_b, kLanes<T>);
    pos_a = arena.take<int64_t>(p.num_a);
    pos_b = arena.take<int64_t>(p.num_b);
    down_t = arena.take<T>(p.channels * hp);
    up_t = arena.take<T>(p.hidden * cp);
    down = backward ? arena.take<T>(p.hidden * cp) : nullptr;
    up = backward ? arena.take<T>(p.channels * hp) : nullptr;
  }

  void fill(const Problem& p) {
    fill_positions(pos_a, pos_b, p.split_a, p.split_b, p.num_a, p.num_b, p.grid_h, p.grid_w, p.prefix);
    if (!p.hidden) return;
    const View &d = p.w_down, &u = p.w_up;
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t h = p.hidden; h < hp; ++h) down_t[c * hp + h] = 0;
      read_any(down_t + c * hp, d, c * d.stride[1], d.stride[0], p.hidden);
    }
    for (int64_t h = 0; h < p.hidden; ++h) {
      for (int64_t c = p.channels; c < cp; ++c) up_t[h * cp + c] = 0;
      read_any(up_t + h * cp, u, h * u.stride[1], u.stride[0], p.channels);
    }
    if (!down) return;
    for (int64_t h = 0; h < p.hidden; ++h)
      for (int64_t c = 0; c < cp; ++c) down[h * cp + c] = c < p.channels ? down_t[c * hp + h] : T(0);
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t h = 0; h < hp; ++h) up[c * hp + h] = h < p.hidden ? up_t[h * cp + c] : T(0);
  }
};

// One image's refined and normalised keys; sources and destinations are rows 0 .. N_A and N_A .. N_A + N_B of one list.
template <class T>
struct Keys {
  T* turned;  // panels of (C, panel_cols): k̂_Aᵀ in the forward, k̂_Bᵀ in the backward
  T* b;       // (N_B, cp)
  T* a;       // (N_A, cp), backward only, like what follows
  T* norm;    // (N_A + N_B)
  T* hidden;  // (N_A + N_B, hp), after ReLU and dropout mask

  void plan(Arena& arena, const Problem& p, const Shared<T>& s, bool backward) {
    turned = arena.take<T>(round_up(backward ? p.num_b : p.num_a, s.panel_cols) * p.channels);
    b = arena.take<T>(p.num_b * s.cp);
    a = backward ? arena.take<T>(p.num_a * s.cp) : nullptr;
    norm = backward ? arena.take<T>(p.num_a + p.num_b) : nullptr;
    hidden = backward ? arena.take<T>((p.num_a + p.num_b) * s.hp) : nullptr;
  }
};

template <class T>
struct KeyScratch {
  T *key, *hidden, *delta, *row;  // (kKeyRows, cp), (kKeyRows, hp), (kKeyRows, cp), one row of anything

  void plan(Arena& arena, const Shared<T>& s) {
    key = arena.take<T>(kKeyRows * s.cp);
    hidden = arena.take<T>(kKeyRows * s.hp);
    delta = arena.take<T>(kKeyRows * s.cp);
    row = arena.take<T>(s.cp > s.hp ? s.cp : s.hp);
  }
};

template <class T>
inline int64_t position(const Problem& p, const Shared<T>& s, int64_t row) {
  return row < p.num_a ? s.pos_a[row] : s.pos_b[row - p.num_a];
}

// Σ over heads of contiguous keys, `head` elements apart, and divided by their number.
template <class S>
void average_heads(Compute<S>* out, const S* key, int64_t head, int64_t heads, int64_t channels) {
  using T = Compute<S>;
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    Vec<T> sum = load(key + c);
    for (int64_t h = 1; h < heads; ++h) sum += load(key + h * head + c);
    store(out + c, sum / T(heads));
  }
  for (; c < channels; ++c) {
    T sum = to_compute(key[c]);
    for (int64_t h = 1; h < heads; ++h) sum += to_compute(key[h * head + c]);
    out[c] = sum / T(heads);
  }
}

// The key of token n, averaged over heads, zero-padded to cp.
template <class T>
void read_key(T* out, T* row, const Problem& p, int64_t cp, int64_t image, int64_t n) {
  constexpr int lanes = kLanes<T>;
  const View& v = p.key;
  int64_t offset = image * v.stride[0] + n * v.stride[2];
  for (int64_t c = p.channels; c < cp; ++c) out[c] = 0;
  if (v.stride[3] == 1 && p.heads > 1) {
    if constexpr (sizeof(T) == 4) {
      if (v.dtype == DType::f32) return average_heads(out, (const float*)v.data + offset, v.stride[1], p.heads, p.channels);
      if (v.dtype == DType::bf16) return average_heads(out, (const bf16*)v.data + offset, v.stride[1], p.heads, p.channels);
      if (v.dtype == DType::f16) return average_heads(out, (const f16*)v.data + offset, v.stride[1], p.heads, p.channels);
    } else {
      if (v.dtype == DType::f64) return average_heads(out, (const double*)v.data + offset, v.stride[1], p.heads, p.channels);
    }
  }
  read_any(out, v, offset, v.stride[3], p.channels);
  if (p.heads == 1) return;
  for (int64_t c = p.channels; c < cp; ++c) row[c] = 0;
  for (int64_t h = 1; h < p.heads; ++h) {
    offset += v.stride[1];
    read_any(row, v, offset, v.stride[3], p.channels);
    for (int64_t c = 0; c < cp; c += lanes) store(out + c, load(out + c) + load(row + c));
  }
  for (int64_t c = 0; c < cp; c += lanes) store(out + c, load(out + c) / T(p.heads));
}

// Column `at` of the panels. Whole vectors are multiplied later: behind the last key there must be numbers.
template <class T>
void turn_key(const Problem& p, const Shared<T>& s, T* turned, const T* key, int64_t at, int64_t count, int64_t padded) {
  for (int64_t column = at; column < (at == count - 1 ? padded : at + 1); ++column) {
    T* panel = turned + column / s.panel_cols * s.panel_cols * p.channels + column % s.panel_cols;
    for (int64_t c = 0; c < p.channels; ++c) panel[c * s.panel_cols] = column == at ? key[c] : T(0);
  }
}

// Starts fetching the key of token n into the second-level cache.
inline void prefetch_key(const Problem& p, int64_t image, int64_t n) {
  if (p.key.stride[3] != 1) return;
  const int64_t bytes = size_of(p.key.dtype);
  const char* row = (const char*)p.key.data + (image * p.key.stride[0] + n * p.key.stride[2]) * bytes;
  for (int64_t h = 0; h < p.heads; ++h, row += p.key.stride[1] * bytes)
    for (int64_t at = 0; at < p.channels * bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Divides `rows` keys by their norms, as many at once as a vector has lanes; norms below 1e-12 count as 1e-12.
template <class T>
void normalise(T* keys, int64_t cp, int64_t rows, T* norms) {
  constexpr int lanes = kLanes<T>;
  for (int64_t r0 = 0; r0 < rows; r0 += lanes) {
    const int64_t count = min64(lanes, rows - r0);
    T* key = keys + r0 * cp;
    Vec<T> squares[lanes] = {};
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < cp; c += lanes) squares[r] += load(key + r * cp + c) * load(key + r * cp + c);
    sum_each<T>(squares);
    T norm[lanes], inverse[lanes];
    store(norm, squares[0]);
    for (int l = 0; l < lanes; ++l) norm[l] = square_root(norm[l]);
    const Vec<T> n = load(norm);
    store(inverse, T(1) / (n < T(1e-12) ? splat(T(1e-12)) : n));  // NaN passes
    for (int64_t r = 0; r < count; ++r) {
      if (norms) norms[r0 + r] = norm[r];
      for (int64_t c = 0; c < cp; c += lanes) store(key + r * cp + c, load(key + r * cp + c) * inverse[r]);
    }
  }
}

// k' and k̂ of rows [begin, end).
template <class T>
void refine_keys(const Problem& p, const Shared<T>& s, const Keys<T>& keys, const KeyScratch<T>& t, int64_t image,
                 int64_t begin, int64_t end, Ahead* ahead = nullptr) {
  constexpr int lanes = kLanes<T>;
  for (int64_t r0 = begin; r0 < end; r0 += kKeyRows) {
    const int64_t rows = min64(kKeyRows, end - r0);
    for (int64_t r = 0; r < rows; ++r) {
      if (r0 + r + kKeyAhead < end) prefetch_key(p, image, position(p, s, r0 + r + kKeyAhead));
      read_key(t.key + r * s.cp, t.row, p, s.cp, image, position(p, s, r0 + r));
      if (const char* fetch = ahead ? ahead->take(768) : nullptr) prefetch_lines(fetch, 12);
    }
    if (p.hidden) {
      T* hidden = keys.hidden ? keys.hidden + r0 * s.hp : t.hidden;
      matmul(rows, s.hp, p.channels, t.key, s.cp, int64_t(1), s.down_t, s.hp, hidden, s.hp, false);
      for (int64_t i = 0; i < rows * s.hp; i += lanes) {
        const Vec<T> v = load(hidden + i);
        store(hidden + i, v < T(0) ? Vec<T>{} : v);  // NaN passes
      }
      if (const View& mask = p.dropout_mask; mask.data)
        for (int64_t r = 0; r < rows; ++r) {
          read_any(t.row, mask, image * mask.stride[0] + position(p, s, r0 + r) * mask.stride[1], mask.stride[2], p.hidden);
          for (int64_t h = 0; h < p.hidden; ++h) hidden[r * s.hp + h] *= t.row[h];
        }
      matmul(rows, s.cp, p.hidden, hidden, s.hp, int64_t(1), s.up_t, s.cp, t.delta, s.cp, false);
      for (int64_t i = 0; i < rows * s.cp; i += lanes) store(t.key + i, load(t.key + i) + load(t.delta + i) * T(p.scale));
    }
    if (const View& delta = p.key_delta; delta.data)
      for (int64_t r = 0; r < rows; ++r) {
        read_any(t.row, delta, image * delta.stride[0] + position(p, s, r0 + r) * delta.stride[1], delta.stride[2], p.channels);
        for (int64_t c = 0; c < p.channels; ++c) t.key[r * s.cp + c] += t.row[c];
      }
    if (p.cosine) normalise(t.key, s.cp, rows, keys.norm ? keys.norm + r0 : nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      const T* k = t.key + r * s.cp;
      const int64_t row = r0 + r, j = row - p.num_a;
      if (j >= 0) {
        memcpy(keys.b + j * s.cp, k, size_t(s.cp) * sizeof(T));
        if (keys.a) turn_key(p, s, keys.turned, k, j, p.num_b, s.nbp);
      } else if (keys.a) {
        memcpy(keys.a + row * s.cp, k, size_t(s.cp) * sizeof(T));
      } else {
        turn_key(p, s, keys.turned, k, row, p.num_a, s.nap);
      }
    }
  }
}

// --- forward -------------------------------------------------------------------------------------------------------------------

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

// One image's sources by destination, and incoming sizes.
template <class M>
struct Groups {
  int32_t *start, *list;  // (N_B + 1), (N_A)
  M* size;                // (N)

  void plan(Arena& arena, const Problem& p) {
    start = arena.take<int32_t>(p.num_b + 1);
    list = arena.take<int32_t>(p.num_a);
    size = arena.take<M>(p.tokens);
  }

  void fill(const Problem& p, const int64_t* match, int64_t image) const {
    group_sources(match + image * p.num_a, p.num_a, p.num_b, p.prefix, start, list);
    if (p.size.data) {
      read_any(size, p.size, image * p.size.stride[0], p.size.stride[1], p.tokens);
    } else {
      for (int64_t n = 0; n < p.tokens; ++n) size[n] = M(1);
    }
  }
};

// The merged tokens [begin, end) of one image; meanwhile the keys of the next one are fetched.
template <class S, class T>
void merge_rows(const Problem& p, const ForwardOutputs& out, const Shared<T>& s, const Groups<Compute<S>>& groups,
                const S** rows, Compute<S>* weights, int64_t image, int64_t begin, int64_t end, bool stream, bool next) {
  using M = Compute<S>;
  const int64_t merged = p.prefix + p.num_b, stride = p.x.stride[2];
  const S* x = (const S*)p.x.data + image * p.x.stride[0];
  for (int64_t m = begin; m < end; ++m) {
    if (next)
      for (int64_t n = 2 * m; n < min64(2 * m + 2, p.tokens); ++n) prefetch_key(p, image + 1, n);
    int64_t count = 1;
    const int64_t j = m - p.prefix, at = j < 0 ? m : s.pos_b[j];
    rows[0] = x + at * p.x.stride[1];
    M n = weights[0] = groups.size[at];
    if (j >= 0)
      for (int32_t k = groups.start[j]; k < groups.start[j + 1]; ++k, ++count) {
        const int64_t source = s.pos_a[groups.list[k]];
        rows[count] = x + source * p.x.stride[1];
        n += weights[count] = groups.size[source];
      }
    ((M*)out.merged_size)[image * merged + m] = n;
    S* y = (S*)out.tokens + (image * merged + m) * p.dim;
    if (stride != 1) {
      for (int64_t d = 0; d < p.dim; ++d) {
        M sum = 0;
        for (int64_t k = 0; k < count; ++k) sum += weights[k] * to_compute(rows[k][d * stride]);
        from_compute(M(sum / n), y + d);
      }
    } else {
      weighted_mean(y, rows, weights, count, n, p.dim, stream);
    }
  }
}

template <class S, class T>
struct Forward {
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
    const S** rows;
    M* weights;
  };

  Forward(const Problem& problem, int64_t threads) : p(problem) {
    const int64_t work = p.batch * (p.tokens * p.dim + p.num_a * p.num_b * p.channels);
    tasks = work < kSerialWork ? 1 : threads;
    by_image = tasks == 1 || p.batch >= 2 * tasks;
  }

  void plan_image(Arena& arena, Image& image) const {
    image.keys.plan(arena, p, shared, false);
    image.groups.plan(arena, p);
  }
  void plan_task(Arena& arena, Task& task) const {
    task.key.plan(arena, shared);
    task.tile = arena.take<T>(kScoreRows * Shared<T>::panel_cols);
    task.rows = arena.take<const S*>(p.num_a + 1);
    task.weights = arena.take<M>(p.num_a + 1);
  }

  // Scratch of every task and image at a fixed distance from that of the first.
  size_t task_bytes, image_bytes, shared_bytes;
  size_t plan(char* base) {
    Arena arena{base};
    shared.plan(arena, p, false);
    shared_bytes = (arena.used + 63) & ~size_t(63);
    Arena one{nullptr}, two{nullptr};
    Task task;
    Image image;
    plan_task(one, task);
    plan_image(two, image);
    task_bytes = (one.used + 63) & ~size_t(63);
    image_bytes = (two.used + 63) & ~size_t(63);
    return shared_bytes + size_t(tasks) * task_bytes + size_t(images()) * image_bytes;
  }
  int64_t images() const { return by_image ? tasks : p.batch; }
  Task task_at(char* base, int64_t t) const {
    Arena arena{base + shared_bytes + size_t(t) * task_bytes};
    Task task;
    plan_task(arena, task);
    return task;
  }
  Image image_at(char* base, int64_t i) const {
    Arena arena{base + shared_bytes + size_t(tasks) * task_bytes + size_t(i) * image_bytes};
    Image image;
    plan_image(arena, image);
    return image;
  }

  void run(const ForwardOutputs& outputs, const Parallel& parallel, char* base) {
    out = &outputs;
    plan(base);
    shared.fill(p);
    const int64_t merged = p.prefix + p.num_b, key_rows = p.num_a + p.num_b;
    const int64_t key_bytes = p.heads * p.tokens * p.channels * size_of(p.key.dtype);
    const bool stream = p.batch * merged * p.dim * int64_t(sizeof(S)) >= kStreamBytes;
    if (by_image) {
      run_ranges(parallel, p.batch, tasks, [&](int64_t t, int64_t begin, int64_t end) {
        const Task task = task_at(base, t);
        const Image image = image_at(base, t);
        for (int64_t b = begin; b < end; ++b) {
          Ahead ahead = tokens_ahead(b);
          refine_keys(p, shared, image.keys, task.key, b, 0, key_rows, &ahead);
          match_rows(p, *out, shared, image.keys, task.tile, b, 0, p.num_a, &ahead);
          image.groups.fill(p, out->match, b);
          merge_rows<S, T>(p, *out, shared, image.groups, task.rows, task.weights, b, 0, merged, stream,
                           b + 1 < end && key_bytes <= kAheadBytes / 4);
        }
      });
      return;
    }
    over_rows(parallel, base, key_rows, [&](const Task& task, const Image& image, int64_t b, int64_t begin, int64_t end) {
      refine_keys(p, shared, image.keys, task.key, b, begin, end);
    });
    constexpr int64_t lanes = kLanes<T>;
    over_rows(parallel, base, shared.nap / lanes,
              [&](const Task& task, const Image& image, int64_t b, int64_t begin, int64_t end) {
                match_rows(p, *out, shared, image.keys, task.tile, b, begin * lanes, min64(p.num_a, end * lanes), nullptr);
              });
    for (int64_t b = 0; b < p.batch; ++b) image_at(base, b).groups.fill(p, out->match, b);
    over_rows(parallel, base, merged, [&](const Task& task, const Image& image, int64_t b, int64_t begin, int64_t end) {
      merge_rows<S, T>(p, *out, shared, image.groups, task.rows, task.weights, b, begin, end, stream, false);
    });
  }

  // The tokens of image b, as far as the second-level cache has room: merged next, fetched while scores are computed.
  Ahead tokens_ahead(int64_t b) const {
    if (p.x.stride[2] != 1 || p.x.stride[1] != p.dim) return {};
    const char* start = (const char*)((const S*)p.x.data + b * p.x.stride[0]);
    return {start, start + min64(p.tokens * p.dim * int64_t(sizeof(S)), kAheadBytes)};
  }

  // The rows of all images, cut into one range a task.
  template <class F>
  void over_rows(const Parallel& parallel, char* base, int64_t rows, const F& f) {
    run_ranges(parallel, p.batch * rows, tasks, [&](int64_t t, int64_t begin, int64_t end) {
      const Task task = task_at(base, t);
      for (int64_t at = begin; at < end;) {
        const int64_t b = at / rows, stop = min64(end, (b + 1) * rows);
        f(task, image_at(base, b), b, at - b * rows, stop - b * rows);
        at = stop;
      }
    });
  }
};

// --- backward ------------------------------------------------------------------------------------------------------------------

template <class S, class T>
struct Backward {
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

  size_t task_bytes, image_bytes, shared_bytes, group_bytes;
  T* group_weights;  // (groups, weight_size)
  size_t plan(char* base) {
    Arena arena{base};
    shared.plan(arena, p, key_path);
    weight_size = p.channels * shared.hp + p.hidden * shared.cp;
    group_weights = arena.take<T>(weights ? groups * weight_size : 0);
    shared_bytes = (arena.used + 63) & ~size_t(63);
    Arena one{nullptr}, two{nullptr};
    Task task;
    Image image;
    plan_task(one, task);
    plan_image(two, image);
    task_bytes = (one.used + 63) & ~size_t(63);
    image_bytes = (two.used + 63) & ~size_t(63);
    return shared_bytes + size_t(tasks) * task_bytes + size_t(images()) * image_bytes;
  }
  int64_t images() const { return by_image ? tasks : p.batch; }
  Task task_at(char* base, int64_t t) const {
    Arena arena{base + shared_bytes + size_t(t) * task_bytes};
    Task task;
    plan_task(arena, task);
    return task;
  }
  Image image_at(char* base, int64_t i) const {
    Arena arena{base + shared_bytes + size_t(tasks) * task_bytes + size_t(i) * image_bytes};
    Image image;
    plan_image(arena, image);
    return image;
  }

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
        const Task task = task_at(base, t);
        const Image image = image_at(base, t);
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
        for (int64_t b = begin; b < end; ++b) prepare_image(image_at(base, b), b);
      });
      over_items(parallel, base, merged,
                 [&](const Task& task, const Image& image, int64_t b, int64_t m) { values(task, image, b, m, m + 1); });
      if (!key_path) return;
      over_items(parallel, base, row_chunks, [&](const Task& task, const Image& image, int64_t b, int64_t c) {
        refine_keys(p, shared, image.keys, task.key, b, c * kKeyRows, min64(p.num_a + p.num_b, (c + 1) * kKeyRows));
      });
      over_items(parallel, base, chunks, [&](const Task& task, const Image& image, int64_t b, int64_t c) {
        Ahead none;
        pair_chunk(task, image, b, c, image.grad_b + c * part_b, &none);
      });
      over_items(parallel, base, row_chunks, [&](const Task& task, const Image& image, int64_t b, int64_t c) {
        key_chunk(task, image, b, c, chunks, image.grad_weights + c * weight_size);
      });
      if (weights)
        for (int64_t b = 0; b < p.batch; ++b)
          for (int64_t c = 0; c < row_chunks; ++c)
            add_to(group_weights + b * weight_size, image_at(base, b).grad_weights + c * weight_size, weight_size);
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
  void over_items(const Parallel& parallel, char* base, int64_t items, const F& f) {
    run_ranges(parallel, p.batch * items, tasks, [&](int64_t t, int64_t begin, int64_t end) {
      const Task task = task_at(base, t);
      for (int64_t at = begin; at < end; ++at) f(task, image_at(base, at / items), at / items, at % items);
    });
  }
};

// --- means over heads, for a backward that would else read every head again -------------------------------------------------------

size_t average_heads_workspace(const Problem& p, int64_t threads) { return size_t(threads * 2 * (p.channels + 64) * 8); }

template <class T>
void average_heads_of(const Problem& p, T* out, const Parallel& parallel, char* base) {
  const int64_t cp = round_up(p.channels, kLanes<T>), rows = p.batch * p.tokens;
  const int64_t threads = rows * p.heads * p.channels < kSerialWork ? 1 : parallel.threads;
  run_ranges(parallel, rows, threads, [&](int64_t t, int64_t begin, int64_t end) {
    T* row = (T*)(base + t * 2 * (p.channels + 64) * 8);
    for (int64_t r = begin; r < end; ++r) {
      if (r + kKeyAhead < end) prefetch_key(p, (r + kKeyAhead) / p.tokens, (r + kKeyAhead) % p.tokens);
      read_key(row, row + cp, p, cp, r / p.tokens, r % p.tokens);
      memcpy(out + r * p.channels, row, size_t(p.channels) * sizeof(T));
    }
  });
}

void average_heads(const Problem& p, void* out, const Parallel& parallel, void* workspace) {
  if (p.wide_scores) {
    average_heads_of(p, (double*)out, parallel, (char*)workspace);
  } else {
    average_heads_of(p, (float*)out, parallel, (char*)workspace);
  }
}

// --- unmerge -------------------------------------------------------------------------------------------------------------------

struct UnmergePositions {
  int64_t *a, *b;
  void plan(Arena& arena, const UnmergeProblem& p) {
    a = arena.take<int64_t>(p.num_a);
    b = arena.take<int64_t>(p.num_b);
  }
};

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
struct UnmergeBackward {
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
  size_t task_bytes, shared_bytes;
  size_t plan(char* base) {
    Arena arena{base}, one{nullptr};
    positions.plan(arena, p);
    shared_bytes = (arena.used + 63) & ~size_t(63);
    Task task;
    plan_task(one, task);
    task_bytes = (one.used + 63) & ~size_t(63);
    return shared_bytes + size_t(tasks) * task_bytes;
  }
  void run(const Parallel& parallel, char* base) {
    plan(base);
    fill_positions(positions.a, positions.b, p.split_a, p.split_b, p.num_a, p.num_b, p.grid_h, p.grid_w, p.prefix);
    const int64_t merged = p.prefix + p.num_b;
    const View& v = p.input;
    run_ranges(parallel, p.batch, tasks, [&](int64_t t, int64_t begin, int64_t end) {
      Arena arena{base + shared_bytes + size_t(t) * task_bytes};
      Task task;
      plan_task(arena, task);
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

// --- dtype dispatch --------------------------------------------------------------------------------------------------------------

// Calls f with the storage type of x and the type of scores.
template <class F>
auto dispatch(DType x, bool wide, const F& f) {
  switch (x) {
    case DType::f64: return f(double{}, double{});
    case DType::bf16: return wide ? f(bf16{}, double{}) : f(bf16{}, float{});
    case DType::f16: return wide ? f(f16{}, double{}) : f(f16{}, float{});
    default: return wide ? f(float{}, double{}) : f(float{}, float{});
  }
}

size_t forward_workspace(const Problem& p, int64_t threads) {
  return dispatch(p.x.dtype, p.wide_scores,
                  [&](auto s, auto t) { return Forward<decltype(s), decltype(t)>(p, threads).plan(nullptr); });
}

size_t backward_workspace(const Problem& p, const BackwardOutputs& out, int64_t threads) {
  return dispatch(p.x.dtype, p.wide_scores,
                  [&](auto s, auto t) { return Backward<decltype(s), decltype(t)>(p, out, threads).plan(nullptr); });
}

void forward(const Problem& p, const ForwardOutputs& out, const Parallel& parallel, void* workspace) {
  dispatch(p.x.dtype, p.wide_scores, [&](auto s, auto t) {
    Forward<decltype(s), decltype(t)>(p, parallel.threads).run(out, parallel, (char*)workspace);
  });
}

void backward(const Problem& p, const BackwardInputs& in, const BackwardOutputs& out, const Parallel& parallel,
              void* workspace) {
  dispatch(p.x.dtype, p.wide_scores, [&](auto s, auto t) {
    Backward<decltype(s), decltype(t)>(p, out, parallel.threads).run(in, parallel, (char*)workspace);
  });
}

void unmerge_any(const UnmergeProblem& p, const Parallel& parallel) {
  dispatch(p.input.dtype, false, [&](auto s, auto) { unmerge<decltype(s)>(p, parallel); });
}

size_t unmerge_backward_workspace(const UnmergeProblem& p, int64_t threads) {
  return dispatch(p.input.dtype, false, [&](auto s, auto) { return UnmergeBackward<decltype(s)>(p, threads).plan(nullptr); });
}

void unmerge_backward(const UnmergeProblem& p, const Parallel& parallel, void* workspace) {
  dispatch(p.input.dtype, false,
           [&](auto s, auto) { UnmergeBackward<decltype(s)>(p, parallel.threads).run(parallel, (char*)workspace); });
}

}  // namespace

// The only symbol of an instruction set that others see.
extern const Kernels kKernels;
const Kernels kKernels = {
    forward_workspace, backward_workspace,         forward,          backward, average_heads_workspace, average_heads,
    unmerge_any,       unmerge_backward_workspace, unmerge_backward,
};

}  // namespace FPET_ISA
}  // namespace fpet
