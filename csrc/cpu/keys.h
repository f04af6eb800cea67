// The key path: keys read, averaged over heads, refined and normalised.

namespace fpet {
namespace FPET_ISA {
namespace {

// What all images share: positions of the two sets, and the refinement's weights in compute precision, padded.
template <class T>
struct Shared {
  int64_t cp, hp, nap;     // C, h and N_A padded to whole vectors
  int64_t *pos_a, *pos_b;  // (N_A), (N_B): index in the N tokens
  T *down_t, *up_t;        // (C, hp), (h, cp): W_downᵀ, W_upᵀ
  T *down, *up;            // (h, cp), (C, hp): backward only

  static constexpr int64_t panel_cols = kTileVecs * kLanes<T>;

  void plan(Arena& arena, const Problem& p, bool backward) {
    cp = round_up(p.channels, kLanes<T>);
    hp = round_up(p.hidden, kLanes<T>);
    nap = round_up(p.num_a, kLanes<T>);
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
  T* turned;  // k̂_Aᵀ, panels of (C, panel_cols)
  T* b;       // (N_B, cp)
  T* a;       // (N_A, cp), backward only, like what follows
  T* norm;    // (N_A + N_B)
  T* hidden;  // (N_A + N_B, hp), after ReLU and dropout mask

  void plan(Arena& arena, const Problem& p, const Shared<T>& s, bool backward) {
    turned = arena.take<T>(round_up(p.num_a, s.panel_cols) * p.channels);
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

// Σ over heads of contiguous keys, `head` elements apart, and divided by their number. Memory is read in the order in which heads
// lie, and that of `ahead`, the heads of a later token, is fetched at the same pace: more requests at once would be dropped.
template <class S>
void average_heads(Compute<S>* out, const S* key, const S* ahead, int64_t head, int64_t heads, int64_t channels) {
  using T = Compute<S>;
  constexpr int lanes = kLanes<T>, most = 8;
  int64_t c = 0;
  for (; c + lanes <= channels; c += most * lanes) {
    const int64_t vectors = min64(most, (channels - c) / lanes);
    Vec<T> sums[most];
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = h * head + c;
      prefetch_lines(ahead + at, vectors * lanes * int64_t(sizeof(S)));
      if (vectors == most) {
#pragma GCC unroll 8
        for (int v = 0; v < most; ++v) sums[v] = h ? sums[v] + load(key + at + v * lanes) : load(key + at + v * lanes);
      } else {
        for (int64_t v = 0; v < vectors; ++v) sums[v] = h ? sums[v] + load(key + at + v * lanes) : load(key + at + v * lanes);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) store(out + c + v * lanes, sums[v] / T(heads));
  }
  for (c = channels / lanes * lanes; c < channels; ++c) {
    T sum = to_compute(key[c]);
    for (int64_t h = 1; h < heads; ++h) sum += to_compute(key[h * head + c]);
    out[c] = sum / T(heads);
  }
}

// The key of token n, averaged over heads, zero-padded to cp; meanwhile that of token `ahead` is fetched.
template <class T>
void read_key(T* out, T* row, const Problem& p, int64_t cp, int64_t image, int64_t n, int64_t ahead) {
  constexpr int lanes = kLanes<T>;
  const View& v = p.key;
  int64_t offset = image * v.stride[0] + n * v.stride[2];
  const auto average = [&](auto* key) {
    average_heads(out, key + offset, key + offset + (ahead - n) * v.stride[2], v.stride[1], p.heads, p.channels);
  };
  for (int64_t c = p.channels; c < cp; ++c) out[c] = 0;
  if (v.stride[3] == 1 && p.heads > 1) {
    if constexpr (sizeof(T) == 4) {
      if (v.dtype == DType::f32) return average((const float*)v.data);
      if (v.dtype == DType::bf16) return average((const bf16*)v.data);
      if (v.dtype == DType::f16) return average((const f16*)v.data);
    } else {
      if (v.dtype == DType::f64) return average((const double*)v.data);
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
void turn_key(const Problem& p, const Shared<T>& s, T* turned, const T* key, int64_t at) {
  for (int64_t column = at; column < (at == p.num_a - 1 ? s.nap : at + 1); ++column) {
    T* panel = turned + column / s.panel_cols * s.panel_cols * p.channels + column % s.panel_cols;
    for (int64_t c = 0; c < p.channels; ++c) panel[c * s.panel_cols] = column == at ? key[c] : T(0);
  }
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
      const int64_t ahead = position(p, s, min64(r0 + r + kKeyAhead, end - 1));
      read_key(t.key + r * s.cp, t.row, p, s.cp, image, position(p, s, r0 + r), ahead);
    }
    if (p.hidden) {
      T* hidden = keys.hidden ? keys.hidden + r0 * s.hp : t.hidden;
      matmul(rows, s.hp, p.channels, t.key, s.cp, int64_t(1), s.down_t, s.hp, hidden, s.hp, false, ahead);
      for (int64_t i = 0; i < rows * s.hp; i += lanes) {
        const Vec<T> v = load(hidden + i);
        store(hidden + i, v < T(0) ? Vec<T>{} : v);  // NaN passes
      }
      if (const View& mask = p.dropout_mask; mask.data)
        for (int64_t r = 0; r < rows; ++r) {
          read_any(t.row, mask, image * mask.stride[0] + position(p, s, r0 + r) * mask.stride[1], mask.stride[2], p.hidden);
          for (int64_t h = 0; h < p.hidden; ++h) hidden[r * s.hp + h] *= t.row[h];
        }
      matmul(rows, s.cp, p.hidden, hidden, s.hp, int64_t(1), s.up_t, s.cp, t.delta, s.cp, false, ahead);
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
      } else {
        turn_key(p, s, keys.turned, k, row);
        if (keys.a) memcpy(keys.a + row * s.cp, k, size_t(s.cp) * sizeof(T));
      }
    }
  }
}

// --- means over heads, for a backward that would else read every head again -------------------------------------------------------

size_t average_heads_workspace(const Problem& p, int64_t threads) { return size_t(threads * 2 * (p.channels + 64) * 8); }

template <class T>
void average_heads_of(const Problem& p, T* out, const Parallel& parallel, char* base) {
  const int64_t cp = round_up(p.channels, kLanes<T>), rows = p.batch * p.tokens;
  const int64_t threads = rows * p.heads * p.channels < kSerialWork ? 1 : parallel.threads;
  run_ranges(parallel, rows, threads, [&](int64_t t, int64_t begin, int64_t end) {
    T* row = (T*)(base + t * 2 * (p.channels + 64) * 8);
    for (int64_t r = begin; r < end; ++r) {
      read_key(row, row + cp, p, cp, r / p.tokens, r % p.tokens, min64(r % p.tokens + kKeyAhead, p.tokens - 1));
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

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
