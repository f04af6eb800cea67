// Memory that is wanted soon, fetched into the second-level cache.

namespace fpet {
namespace FPET_ISA {
namespace {

constexpr int64_t kAheadBytes = 1 << 20;  // fetched ahead of use by one thread: what does not fit waits in the last-level cache

inline void prefetch_lines(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)p + at, 0, 2);
}

// Lists of rows, handed out piece by piece to products that leave memory idle.
class Ahead {
 public:
  struct Piece {
    const char *at = nullptr, *end = nullptr;
  };

  // `count` rows of `bytes` each: row r begins at first + index[r] · stride, or first + r · stride without an index.
  void add(const void* first, int64_t stride, int64_t bytes, int64_t count, const int64_t* index = nullptr) {
    count = min64(count, (kAheadBytes - bytes_) / max64(bytes, 1));
    if (count <= 0 || lists_ == kMost) return;
    list_[lists_++] = {(const char*)first, stride, bytes, count, index};
    bytes_ += bytes * count;
  }

  Piece take(int64_t lines) {
    if (row_ == list_[now_].count) {
      if (now_ + 1 >= lists_) return {};
      ++now_;
      row_ = 0;
    }
    const List& l = list_[now_];
    const char* from = l.first + (l.index ? l.index[row_] : row_) * l.stride + at_;
    const int64_t bytes = min64(lines * 64, l.bytes - at_);
    at_ += bytes;
    if (at_ == l.bytes) {
      at_ = 0;
      ++row_;
    }
    return {from, from + bytes};
  }

 private:
  struct List {
    const char* first;
    int64_t stride, bytes, count;
    const int64_t* index;
  };
  static constexpr int kMost = 3;
  List list_[kMost] = {};
  int lists_ = 0, now_ = 0;
  int64_t row_ = 0, at_ = 0, bytes_ = 0;
};

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
