// The CUDA backward, the forward of long grids, unmerge and means over heads against a float64 oracle, on a GPU or emulated on the
// host: errors at most twice those of float32 arithmetic, the same bits whatever the order in which threads run, the batch an image
// is in, and what else is asked for; every output written, nothing read that a problem doesn't hold.
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "oracle_backward.h"
#ifdef FPET_EMULATE_CUDA
#include "cuda_emulator.h"
#endif

// Of csrc/cuda/launch.cuh, which only compilers of kernels can read: cuda_forward and cuda_backward have other ways for short grids.
namespace fpet::cuda {
bool backward_short_takes(const Problem&);
size_t backward_long_workspace(const Problem&, const BackwardOutputs&);
CudaStatus backward_long(const Problem&, const BackwardInputs&, const BackwardOutputs&, void* workspace, cudaStream_t);
size_t forward_long_workspace(const Problem&);
CudaStatus forward_long(const Problem&, const ForwardOutputs&, void* workspace, cudaStream_t);
}  // namespace fpet::cuda

namespace {

using namespace oracle;

struct Results {
  vector<char> x, size, refined, key, down, up;
  bool operator==(const Results& o) const {
    return x == o.x && size == o.size && refined == o.refined && key == o.key && down == o.down && up == o.up;
  }
};

// Which gradients are asked for, and whether of the kernels for any grid.
struct Wanted {
  bool x = true, size = true, weights = true, refined = true, key = true, grad_size = true, tiled = false;
};

struct Device {
  const Case& t;
  const Handed& handed;
  std::map<const Tensor*, Buffer> buffers;
  Buffer a, b, match, second;

  Device(const Case& c, const Handed& h) : t(c), handed(h), a(c.pos_a), b(c.pos_b), match(h.match), second(h.second) {
    for (const Tensor* tensor : {&t.x, &t.key, &t.size, &t.w_down, &t.w_up, &t.mask, &t.delta, &t.grad, &t.grad_size, &h.tokens,
                                 &h.merged_size, &h.mid})
      buffers.emplace(tensor, Buffer(tensor->data));
  }
  const void* at(const Tensor& x) const { return buffers.at(&x).get(); }
  fpet::Problem problem(int64_t first, int64_t count) const {
    return t.problem(a.as<int64_t>(), b.as<int64_t>(), [&](const Tensor& x) { return at(x); }, first, count);
  }
  fpet::View image(const Tensor& x, int64_t first) const {
    fpet::View v = x.view(at(x));
    if (v.data) v.data = static_cast<const char*>(v.data) + first * v.stride[0] * bytes_of(v.dtype);
    return v;
  }
};

bool succeeded(const fpet::CudaStatus& status) {
  CHECK(status.error == cudaSuccess, "%s: %s", status.kernel, cudaGetErrorString(status.error));
  const cudaError_t error = cudaDeviceSynchronize();
  CHECK(error == cudaSuccess, "%s", cudaGetErrorString(error));
  return status.error == cudaSuccess && error == cudaSuccess;
}

Results run(const Device& device, const Wanted& wanted, int64_t first, int64_t count) {
  const Case& t = device.t;
  const Config& c = t.c;
  const Handed& h = device.handed;
  const fpet::Problem p = device.problem(first, count);
  CHECK(!fpet::cuda_refuses(p), "refused: %s", fpet::cuda_refuses(p));
  const DType wide = c.x == DType::f64 ? DType::f64 : DType::f32;
  const int64_t shift = c.layout == Layout::shifted ? 1 : 0;
  fpet::BackwardInputs in;
  in.grad_tokens = device.image(t.grad, first);
  if (wanted.grad_size) in.grad_size = device.image(t.grad_size, first);
  in.tokens = device.image(h.tokens, first);
  in.merged_size = device.image(h.merged_size, first);
  in.match = device.match.as<int64_t>() + first * t.num_a;
  in.second = device.second.as<int64_t>() + first * t.num_a;
  in.mid = device.image(h.mid, first).data;
  const bool weights = wanted.weights && c.hidden;
  const Buffer x(wanted.x ? u((count * t.n * c.dim + shift) * bytes_of(c.x)) : 0),
      size(wanted.size ? u(count * t.n * bytes_of(wide)) : 0),
      refined(wanted.refined ? u(count * t.n * c.channels * bytes_of(c.key)) : 0),
      key(wanted.key ? u(count * t.n * c.channels * bytes_of(c.key)) : 0),
      down(weights ? u(c.hidden * c.channels * bytes_of(c.weight)) : 0),
      up(weights ? u(c.hidden * c.channels * bytes_of(c.weight)) : 0);
  fpet::BackwardOutputs out;
  out.x = wanted.x ? x.as<char>() + shift * bytes_of(c.x) : nullptr;
  out.size = size.get();
  out.size_dtype = wide;
  out.w_down = down.get();
  out.w_up = up.get();
  out.weight_dtype = c.weight;
  out.refined = refined.get();
  out.key = key.get();
  out.refined_dtype = out.key_dtype = c.key;
  const Buffer workspace(wanted.tiled ? fpet::cuda::backward_long_workspace(p, out) : fpet::cuda_backward_workspace(p, out));
  if (!succeeded(wanted.tiled ? fpet::cuda::backward_long(p, in, out, workspace.get(), nullptr)
                              : fpet::cuda_backward(p, in, out, workspace.get(), nullptr)))
    return {};
  Results r{x.read<char>(), size.read<char>(), refined.read<char>(), key.read<char>(), down.read<char>(), up.read<char>()};
  if (wanted.x) r.x.erase(r.x.begin(), r.x.begin() + shift * bytes_of(c.x));
  return r;
}

// Errors at most twice those that `plain` makes in the output's dtype; `cut` sums are cut off instead of rounded.
template <class Truth, class Plain>
void close(const char* name, const vector<char>& got, DType type, const vector<Truth>& truth, const vector<Plain>& plain,
           double cut) {
  double error = 0, allowed = 0, largest = 0;
  CHECK(got.size() == truth.size() * u(bytes_of(type)), "%s: %zu bytes", name, got.size());
  for (size_t i = 0; i < truth.size(); ++i) {
    const double value = decode(&got[i * u(bytes_of(type))], type), want = double(truth[i]);
    CHECK(std::isfinite(value), "%s[%zu] is not a number: not written?", name, i);
    if (!std::isfinite(value)) return;
    error = std::max(error, std::fabs(value - want));
    allowed = std::max(allowed, std::fabs(rounded(double(plain[i]), type) - want));
    largest = std::max(largest, std::fabs(want));
  }
  const double unit = sizeof(Plain) == 8 ? 0x1p-53 : 0x1p-24;
  CHECK(error <= 2 * allowed + (2 + cut) * unit * largest, "%s: off by %g, %s by %g, largest %g", name, error,
        sizeof(Plain) == 8 ? "float64" : "float32", allowed, largest);
  if (std::getenv("FPET_TEST_VERBOSE")) std::printf("  %-8s %.2e, plain %.2e, largest %.2e\n", name, error, allowed, largest);
}

// The ways of running that must not change a bit of so many images.
void each_way(int64_t batch, const std::function<void(const char*)>& f) {
#ifdef FPET_EMULATE_CUDA
  using emulator::Order;
  const struct {
    const char* name;
    Order order;
    int multiprocessors, shared;
  } ways[] = {{"descending", Order::descending, 2, 99 << 10},
              {"shuffled, many multiprocessors", Order::shuffled, 64, 227 << 10},
              {"one multiprocessor for all images", Order::ascending, 1, 163 << 10}};
  const emulator::Options before = emulator::options;
  for (const auto& way : ways) {
    if (batch == 1 && way.multiprocessors == 1) continue;
    emulator::options.order = way.order;
    emulator::options.multiprocessors = way.multiprocessors;
    emulator::options.shared_per_block = way.shared;
    emulator::options.shared_per_multiprocessor = way.shared + 1024;
    ++emulator::options.seed;
    f(way.name);
    const unsigned seed = emulator::options.seed;
    emulator::options = before;
    emulator::options.seed = seed;
  }
#else
  (void)batch;
  f("again");
#endif
}

template <class Truth, class Plain>
void check_values(const Case& t, const Handed& h, const Results& r, bool grad_size) {
  const Config& c = t.c;
  const Gradients<Truth> truth(t, h, grad_size);
  const Gradients<Plain> plain(t, h, grad_size);
  const DType wide = c.x == DType::f64 ? DType::f64 : DType::f32;
  // Matrix units sum 16 products of 16-bit numbers at a time, and cut off.
  const double cut = c.x == DType::bf16 || c.x == DType::f16 ? double(c.dim) / 16 : 0;
  close("x", r.x, c.x, truth.x, plain.x, 0);
  close("size", r.size, wide, truth.size, plain.size, 0);
  close("refined", r.refined, c.key, truth.refined, plain.refined, cut);
  close("key", r.key, c.key, truth.key, plain.key, cut);
  if (!c.hidden) return;
  close("down", r.down, c.weight, truth.down, plain.down, cut);
  close("up", r.up, c.weight, truth.up, plain.up, cut);
}

Results check_case(const Config& c, bool tiled) {
  const Case t(c);
  const Handed h(t);
  const Device device(t, h);
  const Wanted everything{true, true, true, true, true, true, tiled};
  const Results all = run(device, everything, 0, c.batch);
  if (c.x == DType::f64) {
    check_values<long double, double>(t, h, all, true);
  } else {
    check_values<double, float>(t, h, all, true);
  }
  each_way(c.batch, [&](const char* way) { CHECK(run(device, everything, 0, c.batch) == all, "other bits: %s", way); });

  if (c.batch > 1) {
    const Results r = run(device, everything, c.batch - 1, 1);
    const auto last = [&](const vector<char>& v) { return vector<char>(v.end() - int64_t(v.size()) / c.batch, v.end()); };
    CHECK(r.x == last(all.x) && r.size == last(all.size) && r.refined == last(all.refined) && r.key == last(all.key),
          "other bits for an image alone");
  }
  if (t.n > 128) return all;
  const auto some = [&](bool x, bool size, bool weights, bool refined, bool key) {
    const Results r = run(device, {x, size, weights, refined, key, true, tiled}, 0, c.batch);
    CHECK((!x || r.x == all.x) && (!size || r.size == all.size) && (!refined || r.refined == all.refined) &&
              (!key || r.key == all.key) && (!weights || (r.up == all.up && r.down == all.down)),
          "asked for x %d, size %d, weights %d, refined %d, key %d: other bits", x, size, weights, refined, key);
  };
  some(true, false, false, false, false);
  some(false, true, false, false, false);
  some(true, true, true, false, false);
  some(false, false, false, true, false);
  some(false, false, false, false, true);
  return all;
}

// One launch for short grids, tiles for all others: which of them a problem takes, and that both agree.
void check_both(const std::string& name, const Config& c) {
  static const std::set<std::string> too_large = {
      "wide keys",        "many units", "tiles of sources",     "tiles of destinations",
      "few destinations", "float64",    "float64 keys of bf16", "float64 of bf16 keys"};
  const Results tiled = check_case(c, true);
  const Case t(c);
  const Handed h(t);
  const bool takes = fpet::cuda::backward_short_takes(Device(t, h).problem(0, c.batch));
  CHECK(takes == !too_large.count(name), "one launch: %d", takes);
  if (!takes) return;
  const Results whole = check_case(c, false);
  CHECK(whole.x == tiled.x && whole.size == tiled.size, "the gradients of x and of sizes have other bits than without tiles");
}

// No gradient of the sizes, with and without a key path.
void check_without_grad_size() {
  Config c;
  c.grid_h = c.grid_w = 6;
  c.channels = 12;
  c.hidden = 4;
  c.size = true;
  const Case t(c);
  const Handed h(t);
  const Device device(t, h);
  Wanted wanted;
  wanted.grad_size = false;
  for (const bool tiled : {false, true}) {
    wanted.tiled = tiled;
    check_values<double, float>(t, h, run(device, wanted, 0, 1), false);
  }
}

// All keys zero: norms at their floor; NaN keys: no crash, and x's gradient is not touched.
void check_degenerate() {
  for (const double fill : {0.0, double(NAN), double(INFINITY)}) {
    Config c;
    c.grid_h = 5;
    c.grid_w = 6;
    c.dim = 10;
    c.channels = 7;
    c.hidden = 3;
    Case t(c);
    const Handed good(t);
    const Results want = run(Device(t, good), {true, true, false, false, false, true}, 0, 1);
    t.key.fill([&] { return fill; });
    const Device device(t, good);
    for (const bool tiled : {false, true}) {
      const Results r = run(device, {true, true, true, true, true, true, tiled}, 0, 1);
      CHECK(r.x == want.x && r.size == want.size, "keys of %g change the gradient of x", fill);
      if (fill != 0) continue;
      for (const float v : vector<float>((const float*)r.refined.data(), (const float*)(r.refined.data() + r.refined.size())))
        CHECK(std::isfinite(v), "the gradient at a zero key is not a number");
    }
  }
}

// Indices on the device that point nowhere give wrong results, and touch no other memory.
void check_wrong_indices() {
  Config c;
  c.batch = 2;
  c.grid_h = 5;
  c.grid_w = 6;
  c.dim = 12;
  c.channels = 8;
  c.hidden = 4;
  c.lists = true;
  Case t(c);
  Handed h(t);
  for (const int64_t wrong : {int64_t(-1), int64_t(1000), INT64_MIN, INT64_MAX}) {
    h.match[3] = h.second[5] = h.match[u(t.num_a + 1)] = wrong;
    t.pos_a[2] = t.pos_b[4] = wrong;
    const Device device(t, h);
    for (const bool tiled : {false, true}) run(device, {true, true, true, true, true, true, tiled}, 0, 2);
  }
}

// --- forward of long grids ----------------------------------------------------------------------------------------------------------

void check_long_forward(const Config& c) {
  const Case t(c);
  const Handed h(t);
  const Device device(t, h);
  const int64_t A = t.num_a, B = t.num_b, shift = c.layout == Layout::shifted ? 1 : 0;
  const DType wide = c.x == DType::f64 ? DType::f64 : DType::f32, score = t.wide() ? DType::f64 : DType::f32;
  struct Forward {
    vector<char> tokens, size, mid;
    vector<int64_t> match, second;
    bool operator==(const Forward& o) const {
      return tokens == o.tokens && size == o.size && mid == o.mid && match == o.match && second == o.second;
    }
  };
  const auto forward = [&](int64_t first, int64_t count) {
    const fpet::Problem p = device.problem(first, count);
    const Buffer tokens(u((count * t.merged * c.dim + shift) * bytes_of(c.x))), size(u(count * t.merged * bytes_of(wide))),
        mid(u(count * A * bytes_of(score))), match(u(count * A * 8)), second(u(count * A * 8)),
        workspace(fpet::cuda::forward_long_workspace(p));
    fpet::ForwardOutputs out;
    out.tokens = tokens.as<char>() + shift * bytes_of(c.x);
    out.merged_size = size.get();
    out.mid = mid.get();
    out.match = match.as<int64_t>();
    out.second = second.as<int64_t>();
    succeeded(fpet::cuda::forward_long(p, out, workspace.get(), nullptr));
    Forward r{tokens.read<char>(), size.read<char>(), mid.read<char>(), match.read<int64_t>(), second.read<int64_t>()};
    r.tokens.erase(r.tokens.begin(), r.tokens.begin() + shift * bytes_of(c.x));
    return r;
  };
  const Forward r = forward(0, c.batch);
  each_way(c.batch, [&](const char* way) { CHECK(forward(0, c.batch) == r, "other bits: %s", way); });
  if (c.batch > 1) {
    const Forward one = forward(c.batch - 1, 1);
    CHECK(std::equal(one.tokens.begin(), one.tokens.end(), r.tokens.end() - int64_t(one.tokens.size())) &&
              std::equal(one.match.begin(), one.match.end(), r.match.end() - A) &&
              std::equal(one.mid.begin(), one.mid.end(), r.mid.end() - int64_t(one.mid.size())),
          "other bits for an image alone");
  }
  vector<double> tokens_truth, tokens_plain, size_truth, mid_truth, mid_plain;
  for (int64_t b = 0; b < c.batch; ++b) {
    const Scores<double> s(t, b);
    double noise = 0, largest = 0;
    {
      const Scores<float> plain(t, b);
      for (size_t k = 0; k < s.score.size(); ++k) {
        noise = std::max(noise, t.wide() ? 0.0 : std::fabs(double(plain.score[k]) - s.score[k]));
        largest = std::max(largest, std::fabs(s.score[k]));
      }
    }
    noise = 2 * noise + largest * (t.wide() ? 64 * 0x1p-52 : 0x1p-23);
    for (int64_t i = 0; i < A; ++i) {
      const int64_t got = r.match[u(b * A + i)] - c.prefix, other = r.second[u(b * A + i)] - c.prefix;
      const int64_t best = h.match[u(b * A + i)] - c.prefix, next = h.second[u(b * A + i)] - c.prefix;
      CHECK(got >= 0 && got < B && other >= 0 && other < B && got != other, "match %lld, %lld", (long long)got,
            (long long)other);
      if (got < 0 || got >= B || other < 0 || other >= B) return;
      const double* row = &s.score[u(i * B)];
      CHECK(got == best || row[best] - row[got] <= (c.values == Values::tied ? 0 : noise),
            "image %lld source %lld: %lld, best %lld", (long long)b, (long long)i, (long long)got, (long long)best);
      CHECK(c.values != Values::tied || got == best, "a tie goes to %lld, not %lld", (long long)got, (long long)best);
      CHECK(std::fabs(row[next] - row[other == best ? got : other]) <= noise, "second %lld, want %lld", (long long)other,
            (long long)next);
      const double mid = decode(&r.mid[u((b * A + i) * bytes_of(score))], score), want = (row[best] + row[next]) / 2;
      CHECK(std::fabs(mid - want) <= noise, "image %lld source %lld: mid %.9g, want %.9g", (long long)b, (long long)i, mid,
            want);
    }
    const Merged<double> truth(t, b, r.match.data() + b * A);
    const Merged<float> plain(t, b, r.match.data() + b * A);
    for (size_t k = 0; k < truth.tokens.size(); ++k) {
      tokens_truth.push_back(truth.tokens[k]);
      tokens_plain.push_back(c.x == DType::f64 ? truth.tokens[k] : double(plain.tokens[k]));
    }
    for (const double v : truth.size) size_truth.push_back(v);
  }
  close("tokens", r.tokens, c.x, tokens_truth, tokens_plain, c.x == DType::f64 ? 4 : 0x1p29);
  close("sizes", r.size, wide, size_truth, size_truth, 0);
}

// --- unmerge, means over heads --------------------------------------------------------------------------------------------------------

void check_unmerge(DType type, Layout layout, int64_t dim, bool lists) {
  Config c;
  c.batch = 3;
  c.prefix = 2;
  c.grid_h = 5;
  c.grid_w = 9;
  c.dim = dim;
  c.x = type;
  c.layout = layout;
  c.lists = lists;
  c.channels = 1;
  Case t(c);
  vector<int64_t> match(u(c.batch * t.num_a));
  for (int64_t& m : match) m = int64_t(t.rng() % u(t.merged));
  const Buffer a(t.pos_a), b(t.pos_b), device_match(match), tokens(t.grad.data), grad(t.x.data);
  fpet::UnmergeProblem p;
  p.batch = c.batch;
  p.dim = dim;
  p.prefix = c.prefix;
  p.num_a = t.num_a;
  p.num_b = t.num_b;
  p.grid_h = c.grid_h;
  p.grid_w = c.grid_w;
  p.split_a = lists ? a.as<int64_t>() : nullptr;
  p.split_b = lists ? b.as<int64_t>() : nullptr;
  p.match = device_match.as<int64_t>();
  p.input = t.grad.view(tokens.get());
  const Buffer out(u(c.batch * t.n * dim * bytes_of(type))), back(u(c.batch * t.merged * dim * bytes_of(type)));
  p.output = out.get();
  succeeded(fpet::cuda_unmerge(p, nullptr));
  fpet::UnmergeProblem q = p;
  q.input = t.x.view(grad.get());
  q.output = back.get();
  const Buffer workspace(fpet::cuda_unmerge_backward_workspace(q));
  succeeded(fpet::cuda_unmerge_backward(q, workspace.get(), nullptr));
  const vector<char> got = out.read<char>(), got_back = back.read<char>();
  for (int64_t image = 0; image < c.batch; ++image) {
    vector<int64_t> origin(u(t.n));
    for (int64_t k = 0; k < c.prefix; ++k) origin[u(k)] = k;
    for (int64_t j = 0; j < t.num_b; ++j) origin[u(c.prefix + t.pos_b[u(j)])] = c.prefix + j;
    for (int64_t i = 0; i < t.num_a; ++i) origin[u(c.prefix + t.pos_a[u(i)])] = match[u(image * t.num_a + i)];
    for (int64_t d = 0; d < dim; ++d) {
      vector<double> want(u(t.merged)), magnitude(u(t.merged));
      for (int64_t k = 0; k < t.n; ++k) {
        const double value = decode(&got[u(((image * t.n + k) * dim + d) * bytes_of(type))], type);
        CHECK(value == t.grad.at({image, origin[u(k)], d}), "unmerge: token %lld column %lld", (long long)k, (long long)d);
        want[u(origin[u(k)])] += t.x.at({image, k, d});
        magnitude[u(origin[u(k)])] += std::fabs(t.x.at({image, k, d}));
      }
      for (int64_t m = 0; m < t.merged; ++m) {
        const double value = decode(&got_back[u(((image * t.merged + m) * dim + d) * bytes_of(type))], type);
        const double inside = type == DType::f64 ? 0x1p-52 : 0x1p-23;
        CHECK(std::fabs(value - want[u(m)]) <= epsilon(type) / 2 * std::fabs(want[u(m)]) + 8 * inside * magnitude[u(m)],
              "gradient of unmerge: %g, want %g", value, want[u(m)]);
      }
    }
  }
}

void check_average(DType type, Layout layout, int64_t channels, int64_t heads) {
  Config c;
  c.batch = 2;
  c.grid_h = 3;
  c.grid_w = 4;
  c.key = type;
  c.layout = layout;
  c.channels = channels;
  c.heads = heads;
  const Case t(c);
  const Buffer key(t.key.data);
  for (const bool wide : {false, true}) {
    if (!wide && type == DType::f64) continue;
    fpet::Problem p;
    p.batch = c.batch;
    p.tokens = t.n;
    p.channels = channels;
    p.heads = heads;
    p.wide_scores = wide;
    p.key = t.key.view(key.get());
    const DType to = wide ? DType::f64 : DType::f32;
    const Buffer out(u(c.batch * t.n * channels * bytes_of(to)));
    succeeded(fpet::cuda_average_heads(p, out.get(), nullptr));
    const vector<char> got = out.read<char>();
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t n = 0; n < t.n; ++n)
        for (int64_t ch = 0; ch < channels; ++ch) {
          double sum = 0;
          float plain = 0;
          for (int64_t h = 0; h < heads; ++h) {
            sum += t.key.at({b, h, n, ch});
            plain += float(t.key.at({b, h, n, ch}));
          }
          const double value = decode(&got[u(((b * t.n + n) * channels + ch) * bytes_of(to))], to);
          const double want = wide ? sum / double(heads) : double(plain / float(heads));
          CHECK(value == want, "mean over heads: %.17g, want %.17g", value, want);
        }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  const DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const Layout packed = Layout::packed, padded = Layout::padded, strided = Layout::strided, shifted = Layout::shifted;
  const auto make = [](const std::function<void(Config&)>& set) {
    Config c;
    set(c);
    return c;
  };
  const std::pair<const char*, Config> cases[] = {
      {"bf16", make([&](Config& c) { c.batch = 2, c.dim = 96, c.x = c.key = bf16; })},
      {"bf16, refined", make([&](Config& c) { c.x = c.key = bf16, c.dim = 72, c.hidden = 32, c.size = true; })},
      {"kept mean", make([&](Config& c) { c.x = c.weight = bf16, c.dim = 72, c.hidden = 32; })},
      {"mixed weights", make([&](Config& c) { c.x = c.key = f16, c.weight = bf16, c.dim = 40, c.hidden = 16, c.grid_w = 8; })},
      {"float32", make([&](Config& c) { c.dim = 72, c.channels = 32; })},
      {"float32, refined, heads", make([&](Config& c) {
         c.heads = 3, c.hidden = 16, c.size = true, c.mask = Mask::boolean, c.grid_h = 9, c.channels = 24;
       })},
      {"f16, dot", make([&](Config& c) { c.x = c.key = f16, c.cosine = false, c.dim = 72, c.grid_h = 7; })},
      {"autocast", make([&](Config& c) { c.key = bf16, c.hidden = 8, c.mask = Mask::f32, c.heads = 4, c.grid_w = 6; })},
      {"everything", make([&](Config& c) {
         c.batch = 3, c.prefix = 5, c.grid_h = 7, c.grid_w = 9, c.dim = 33, c.channels = 40, c.heads = 2, c.hidden = 24;
         c.x = bf16, c.key = f16, c.weight = bf16, c.size = c.delta = c.lists = true, c.mask = Mask::bf16, c.layout = padded;
       })},
      {"everything, strided", make([&](Config& c) {
         c.batch = 2, c.prefix = 0, c.grid_h = 6, c.grid_w = 5, c.dim = 17, c.channels = 33, c.heads = 2, c.hidden = 9;
         c.x = f16, c.weight = f16, c.size = c.delta = true, c.mask = Mask::f64, c.layout = strided, c.cosine = false;
       })},
      {"shifted",
       make([&](Config& c) { c.grid_h = c.grid_w = 7, c.dim = 64, c.x = c.key = bf16, c.layout = shifted, c.hidden = 16; })},
      {"16 × 16", make([&](Config& c) {
         c.grid_h = c.grid_w = 16, c.batch = 3, c.x = c.key = bf16, c.hidden = 32, c.prefix = 5, c.mask = Mask::f32;
       })},
      {"15 × 15",
       make([&](Config& c) { c.grid_h = c.grid_w = 15, c.dim = 40, c.hidden = 20, c.channels = 50, c.weight = bf16; })},
      {"heads, delta", make([&](Config& c) {
         c.batch = 5, c.grid_h = 7, c.grid_w = 7, c.x = f16, c.key = bf16, c.heads = 4, c.delta = true, c.channels = 48;
       })},
      {"many units", make([&](Config& c) { c.grid_h = 5, c.grid_w = 6, c.hidden = 40, c.x = bf16; })},
      {"wide keys", make([&](Config& c) { c.channels = 130, c.hidden = 70, c.grid_h = 4, c.delta = true; })},
      {"tiles of sources", make([&](Config& c) {
         c.grid_h = 1, c.grid_w = 530, c.lists = true, c.num_a = 515, c.dim = 16, c.channels = 8, c.x = c.key = bf16;
       })},
      {"tiles of destinations", make([&](Config& c) {
         c.grid_h = 1, c.grid_w = 560, c.lists = true, c.num_a = 20, c.dim = 4, c.channels = 4, c.hidden = 2, c.prefix = 0;
       })},
      {"D = 1, C = 1",
       make([&](Config& c) { c.grid_h = 2, c.grid_w = 2, c.dim = 1, c.channels = 1, c.cosine = false, c.prefix = 0; })},
      {"one row",
       make([&](Config& c) { c.grid_h = 1, c.grid_w = 5, c.dim = 3, c.channels = 2, c.cosine = false, c.prefix = 3; })},
      {"no sources", make([&](Config& c) { c.grid_h = c.grid_w = 4, c.lists = true, c.num_a = 0, c.hidden = 4; })},
      {"few destinations",
       make([&](Config& c) { c.grid_h = 1, c.grid_w = 140, c.lists = true, c.num_a = 138, c.dim = 8, c.channels = 6; })},
      {"no images", make([&](Config& c) { c.batch = 0, c.hidden = 4; })},
      {"ties", make([&](Config& c) { c.channels = 6, c.values = Values::tied, c.key = bf16, c.cosine = false, c.dim = 4; })},
      {"float64", make([&](Config& c) {
         c.batch = 2, c.x = c.key = c.weight = f64, c.grid_h = 7, c.grid_w = 10, c.dim = 20, c.channels = 21, c.hidden = 6;
         c.size = c.delta = true, c.heads = 2;
       })},
      {"float64 keys of bf16", make([&](Config& c) {
         c.x = bf16, c.key = f64, c.grid_h = 6, c.grid_w = 6, c.dim = 24, c.channels = 12, c.hidden = 6, c.size = true;
       })},
      {"float64 of bf16 keys", make([&](Config& c) {
         c.x = f64, c.key = bf16, c.grid_h = 11, c.grid_w = 12, c.dim = 10, c.channels = 16, c.lists = true;
       })},
  };
  for (const auto& [name, config] : cases)
    if (argc < 2 || std::string(name) == argv[1]) {
      if (std::getenv("FPET_TEST_VERBOSE")) std::printf("%s, %d failures so far\n", name, failures), std::fflush(stdout);
      const int before = failures;
      check_both(name, config);
      check_long_forward(config);
      if (failures != before) std::printf("  in %s\n", name);
    }
  if (argc < 2 || std::string("others") == argv[1]) {
    check_without_grad_size();
    check_degenerate();
    check_wrong_indices();
    for (const DType type : {f32, f64, bf16, f16})
      for (const Layout layout : {packed, padded, strided, shifted}) {
        check_unmerge(type, layout, layout == strided ? 37 : 40, layout == padded);
        check_average(type, layout, layout == strided ? 5 : 16, type == f16 ? 1 : 3);
      }
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
