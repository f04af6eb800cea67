// Scratch memory of a call, and the sizes that it is cut into.

namespace fpet {
namespace FPET_ISA {
namespace {

constexpr int64_t kKeyRows = 48;                    // rows of the key path that are refined at once
constexpr int64_t kScoreRows = 24;                  // destinations whose scores are ranked at once
constexpr int64_t kMergeRows = 8;                   // merged tokens that one thread takes at once
constexpr int64_t kWeightRows = 16;                 // rows of the weight gradients, likewise
constexpr int64_t kPairRows = 48, kPairCols = 128;  // a tile of dM and ds in the backward: destinations, sources
constexpr int64_t kPairDepth = 256;                 // elements of x and G that are multiplied at once
constexpr int64_t kMaxChunks = 16;                  // of sources, each with its own partial sum of dk̂_B
constexpr int64_t kMaxGroups = 256;                 // of images, each with its own partial sum of the weight gradients

constexpr int64_t kStreamBytes = 16 << 20;  // outputs from this size on are written past the caches
constexpr int64_t kKeyAhead = 4;            // rows between fetching a key and using it

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
  size_t whole_lines() const { return (used + 63) & ~size_t(63); }
};

// The scratch of a call: a part that all share, then a Task for every thread, then an Image for every image that is worked on at
// once. `Call` says what is in them: plan_shared(arena), plan_task(arena, task), plan_image(arena, image).
template <class Call>
class Scratch {
 public:
  // Lays the shared part out from `base` on, and returns the bytes of all parts; with a null base, it only counts.
  size_t lay_out(char* base, int64_t tasks, int64_t images) {
    Call& call = static_cast<Call&>(*this);
    Arena shared{base}, one{nullptr}, two{nullptr};
    typename Call::Task task;
    typename Call::Image image;
    call.plan_shared(shared);
    call.plan_task(one, task);
    call.plan_image(two, image);
    base_ = base;
    task_bytes_ = one.whole_lines();
    image_bytes_ = two.whole_lines();
    first_task_ = shared.whole_lines();
    first_image_ = first_task_ + size_t(tasks) * task_bytes_;
    return first_image_ + size_t(images) * image_bytes_;
  }
  auto task_at(int64_t t) const {
    Arena arena{base_ + first_task_ + size_t(t) * task_bytes_};
    typename Call::Task task;
    static_cast<const Call&>(*this).plan_task(arena, task);
    return task;
  }
  auto image_at(int64_t i) const {
    Arena arena{base_ + first_image_ + size_t(i) * image_bytes_};
    typename Call::Image image;
    static_cast<const Call&>(*this).plan_image(arena, image);
    return image;
  }

 private:
  char* base_;
  size_t task_bytes_, image_bytes_, first_task_, first_image_;
};

}  // namespace
}  // namespace FPET_ISA
}  // namespace fpet
