// Positions of the two sets, and the sources of every destination.

namespace fpet {
namespace FPET_ISA {
namespace {

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

struct UnmergePositions {
  int64_t *a, *b;
  void plan(Arena& arena, const UnmergeProblem& p) {
    a = arena.take<int64_t>(p.num_a);
    b = arena.take<int64_t>(p.num_b);
  }
};

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
