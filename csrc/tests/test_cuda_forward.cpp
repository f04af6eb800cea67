// The CUDA forward against a float64 oracle, on a GPU or emulated on the host: errors at most twice those of float32 arithmetic,
// another match only where scores tie within rounding, the same bits for one image whatever the batch, the share of a block, and
// the order in which threads run; every output written, nothing read that a problem doesn't hold.
#include <cstdlib>
#include <functional>
#include <map>

#include "oracle.h"
#ifdef FPET_EMULATE_CUDA
#include "cuda_emulator.h"
#endif

namespace {

using namespace oracle;

struct Results {
  vector<char> tokens, merged_size, mid;
  vector<int64_t> match, second;

  bool operator==(const Results& o) const {
    return tokens == o.tokens && merged_size == o.merged_size && mid == o.mid && match == o.match && second == o.second;
  }
};

// Everything a case needs on the device.
struct Device {
  const Case& t;
  std::map<const Tensor*, Buffer> buffers;
  Buffer a, b;

  explicit Device(const Case& c) : t(c), a(c.pos_a), b(c.pos_b) {
    for (const Tensor* tensor : {&t.x, &t.key, &t.size, &t.w_down, &t.w_up, &t.mask, &t.delta})
      buffers.emplace(tensor, Buffer(tensor->data));
  }
  fpet::Problem problem(int64_t first, int64_t count) const {
    return t.problem(a.as<int64_t>(), b.as<int64_t>(), [&](const Tensor& x) { return buffers.at(&x).get(); }, first, count);
  }
};

Results run(const Case& t, const Device& device, int64_t first, int64_t count, int64_t shift = 0) {
  const fpet::Problem p = device.problem(first, count);
  CHECK(!fpet::cuda_refuses(p), "refused: %s", fpet::cuda_refuses(p));
  const int64_t wide = t.c.x == DType::f64 ? 8 : 4, element = bytes_of(t.c.x);
  const Buffer tokens(u((count * t.merged * t.c.dim + shift) * element)), merged_size(u(count * t.merged * wide)),
      match(u(count * t.num_a * 8)), second(u(count * t.num_a * 8)), mid(u(count * t.num_a * (p.wide_scores ? 8 : 4))),
      workspace(fpet::cuda_forward_workspace(p));
  fpet::ForwardOutputs out;
  out.tokens = tokens.as<char>() + shift * element;
  out.merged_size = merged_size.get();
  out.match = match.as<int64_t>();
  out.second = second.as<int64_t>();
  out.mid = mid.get();
  const fpet::CudaStatus status = fpet::cuda_forward(p, out, workspace.get(), nullptr);
  CHECK(status.error == cudaSuccess, "%s: %s", status.kernel, cudaGetErrorString(status.error));
  const cudaError_t error = cudaDeviceSynchronize();
  CHECK(error == cudaSuccess, "%s", cudaGetErrorString(error));
  Results r{tokens.read<char>(), merged_size.read<char>(), mid.read<char>(), match.read<int64_t>(), second.read<int64_t>()};
  r.tokens.erase(r.tokens.begin(), r.tokens.begin() + shift * element);
  return r;
}

Results image_of(const Results& r, int64_t count, int64_t image) {
  const auto part = [&](const auto& v) {
    const auto step = int64_t(v.size()) / count;
    return std::decay_t<decltype(v)>(v.begin() + image * step, v.begin() + (image + 1) * step);
  };
  return {part(r.tokens), part(r.merged_size), part(r.mid), part(r.match), part(r.second)};
}

struct Worst {
  double error = 0, allowed = 0;
  void add(double got, double truth, double rounded32) {
    error = std::max(error, std::fabs(got - truth));
    allowed = std::max(allowed, std::fabs(rounded32 - truth));
  }
};

void check_image(const Case& t, const Results& r, int64_t b) {
  const Config& c = t.c;
  const int64_t A = t.num_a, B = t.num_b;
  const Scores<double> truth(t, b);
  const bool wide = t.wide();
  vector<double> plain(truth.score.size());  // as float32 (float64 where scores are) computes them
  if (wide) plain = truth.score;
  else
    for (size_t at = 0; const float s : Scores<float>(t, b).score) plain[at++] = s;
  double largest = 0, noise = 0;
  for (size_t at = 0; at < plain.size(); ++at) {
    largest = std::max(largest, std::fabs(truth.score[at]));
    noise = std::max(noise, std::fabs(plain[at] - truth.score[at]));
  }
  noise = 2 * noise + largest * (wide ? 16 * epsilon(DType::f64) : epsilon(DType::f32));
  Worst mids;
  for (int64_t i = 0; i < A; ++i) {
    const double* row = &truth.score[u(i * B)];
    const int64_t got = r.match[u(b * A + i)] - c.prefix, other = r.second[u(b * A + i)] - c.prefix;
    CHECK(got >= 0 && got < B && other >= 0 && other < B && got != other, "image %lld source %lld: match %lld, %lld",
          (long long)b, (long long)i, (long long)got, (long long)other);
    if (got < 0 || got >= B || other < 0 || other >= B) return;
    int64_t best = 0, next = -1;
    for (int64_t j = 1; j < B; ++j)
      if (row[j] > row[best]) best = j;
    for (int64_t j = 0; j < B; ++j)
      if (j != best && (next < 0 || row[j] > row[next])) next = j;
    CHECK(row[best] - row[got] <= 2 * noise, "image %lld source %lld: matched %lld, best %lld by %g", (long long)b,
          (long long)i, (long long)got, (long long)best, row[best] - row[got]);
    CHECK(std::fabs(row[next] - row[other == best ? got : other]) <= 2 * noise,
          "image %lld source %lld: second %lld, want %lld", (long long)b, (long long)i, (long long)other, (long long)next);
    if (c.values == Values::tied)
      CHECK(row[best] != row[got] || got == best, "a tie goes to %lld, not %lld", (long long)got, (long long)best);
    const double want = (row[best] + row[next]) / 2;
    const double mid = decode(&r.mid[u((b * A + i) * (wide ? 8 : 4))], wide ? DType::f64 : DType::f32);
    CHECK(std::fabs(mid - want) <= noise, "image %lld source %lld: mid %.9g, want %.9g within %g", (long long)b, (long long)i,
          mid, want, noise);
  }
  const int64_t* match = r.match.data() + b * A;
  const Merged<double> merged(t, b, match);
  vector<double> tokens32(merged.tokens.size());
  if (c.x == DType::f64) tokens32 = merged.tokens;
  else
    for (size_t at = 0; const float v : Merged<float>(t, b, match).tokens) tokens32[at++] = v;
  const DType wide_size = c.x == DType::f64 ? DType::f64 : DType::f32;
  Worst tokens;
  double largest_token = 0;
  for (int64_t m = 0; m < t.merged; ++m) {
    const double size = decode(&r.merged_size[u((b * t.merged + m) * bytes_of(wide_size))], wide_size);
    CHECK(size == merged.size[u(m)], "image %lld token %lld: size %g, want %g", (long long)b, (long long)m, size,
          merged.size[u(m)]);
    for (int64_t d = 0; d < c.dim; ++d) {
      const double want = merged.tokens[u(m * c.dim + d)];
      const double got = decode(&r.tokens[u(((b * t.merged + m) * c.dim + d) * bytes_of(c.x))], c.x);
      CHECK(std::isfinite(got), "image %lld token %lld column %lld is not a number: not written?", (long long)b, (long long)m,
            (long long)d);
      if (!std::isfinite(got)) return;
      tokens.add(got, want, rounded(tokens32[u(m * c.dim + d)], c.x));
      largest_token = std::max(largest_token, std::fabs(want));
    }
  }
  CHECK(tokens.error <= 2 * tokens.allowed + 2 * largest_token * 0x1p-24 * (c.x == DType::f64 ? 0x1p-28 : 1.0),
        "image %lld: tokens are off by %g, float32's by %g", (long long)b, tokens.error, tokens.allowed);
}

// The ways of running that must not change a bit.
void each_way(const std::function<void(const char*)>& f) {
#ifdef FPET_EMULATE_CUDA
  using emulator::Order;
  const struct {
    const char* name;
    Order order;
    int multiprocessors;
  } ways[] = {{"descending", Order::descending, 2}, {"shuffled, narrow shares", Order::shuffled, 64}};
  const emulator::Options before = emulator::options;
  for (const auto& way : ways) {
    emulator::options.order = way.order;
    emulator::options.multiprocessors = way.multiprocessors;
    ++emulator::options.seed;
    f(way.name);
    const unsigned seed = emulator::options.seed;
    emulator::options = before;
    emulator::options.seed = seed;
  }
#else
  f("again");
#endif
}

void check_case(const Config& c, const std::string& name) {
  const int before = failures;
  const Case t(c);
  const Device device(t);
  const int64_t shift = c.layout == Layout::shifted ? 1 : 0;
  const Results r = run(t, device, 0, c.batch, shift);
  for (int64_t b = 0; b < c.batch; ++b) check_image(t, r, b);
  each_way([&](const char* way) { CHECK(run(t, device, 0, c.batch, shift) == r, "other bits: %s", way); });
  if (c.batch > 1)
    CHECK(run(t, device, c.batch - 1, 1, shift) == image_of(r, c.batch, c.batch - 1), "other bits for an image alone");
  if (failures != before) std::printf("  in %s\n", name.c_str());
}

// NaN, infinite and constant keys: the match stays valid, and ties go to the lowest index.
void check_degenerate(DType key, int64_t hidden, bool cosine) {
  for (const double fill : {0.0, 1.0, double(NAN), double(INFINITY), -double(INFINITY)}) {
    Config c;
    c.batch = 2;
    c.grid_h = 5;
    c.grid_w = 6;
    c.dim = 10;
    c.channels = 7;
    c.key = key;
    c.hidden = hidden;
    c.cosine = cosine;
    Case t(c);
    t.key.fill([&] { return fill; });
    const Results r = run(t, Device(t), 0, c.batch);
    for (size_t i = 0; i < r.match.size(); ++i) {
      CHECK(r.match[i] == c.prefix, "constant key %g: match %lld", fill, (long long)r.match[i]);
      CHECK(r.second[i] == c.prefix + 1, "constant key %g: second %lld", fill, (long long)r.second[i]);
    }
  }
}

// One destination without a number is never taken, nor does it harm the others.
void check_one_nan(DType key, bool cosine) {
  for (const double bad : {double(NAN), double(INFINITY)}) {
    Config c;
    c.grid_h = c.grid_w = 8;
    c.channels = 16;
    c.key = key;
    c.cosine = cosine;
    Case t(c);
    const Results clean = run(t, Device(t), 0, 1);
    t.key.set({0, 0, c.prefix + t.pos_b[5], 3}, bad);
    const Results r = run(t, Device(t), 0, 1);
    for (size_t i = 0; i < r.match.size(); ++i) {
      CHECK(r.match[i] >= c.prefix && r.match[i] < t.merged, "match %lld", (long long)r.match[i]);
      if (std::isinf(bad) && !cosine) continue;  // an infinite score is the largest
      CHECK(r.match[i] != c.prefix + 5 && r.second[i] != c.prefix + 5, "NaN was taken");
      if (clean.match[i] != c.prefix + 5) CHECK(r.match[i] == clean.match[i], "NaN changed another match");
    }
  }
}

// Problems of any kind; the same ones in every run.
Config random_config(std::mt19937& rng) {
  const auto pick = [&](int64_t least, int64_t most) { return least + int64_t(rng() % u(most - least + 1)); };
  const DType types[] = {DType::f32, DType::bf16, DType::f16};
  Config c;
  c.batch = pick(1, 3);
  c.prefix = pick(0, 5);
  c.grid_h = pick(1, 12);
  c.grid_w = pick(c.grid_h < 3 ? 4 : 2, 14);
  c.dim = pick(0, 1) ? 8 * pick(1, 40) : pick(1, 200);
  c.channels = pick(0, 1) ? 8 * pick(1, 16) : pick(1, 128);
  c.heads = pick(0, 2) ? 1 : pick(2, 5);
  c.hidden = pick(0, 1) ? pick(1, 64) : 0;
  c.x = types[pick(0, 2)];
  c.key = types[pick(0, 2)];
  c.weight = types[pick(0, 2)];
  c.size = pick(0, 1);
  c.delta = pick(0, 2) == 0;
  c.cosine = pick(0, 3) != 0;
  c.lists = pick(0, 1);
  if (c.lists && pick(0, 1)) c.num_a = pick(0, c.grid_h * c.grid_w - 2);
  c.mask = Mask(pick(0, 4));
  c.layout = Layout(pick(0, 3));
  c.values = Values(pick(0, 2));
  return c;
}

void check_facts() {
  int kernels = 0;
  for (fpet::CudaKernelFacts facts; (facts = fpet::cuda_kernel_facts(kernels)).name; ++kernels) {
    CHECK(facts.error == cudaSuccess, "%s: %s", facts.name, cudaGetErrorString(facts.error));
    CHECK(facts.blocks_per_sm > 0, "%s: no block fits on a multiprocessor", facts.name);
  }
  CHECK(kernels >= 6, "%d kernels", kernels);
  CHECK(!fpet::cuda_kernel_facts(-1).name, "a kernel before the first");
  fpet::Problem p;
  p.num_b = 2;
  p.dim = p.channels = 1;
  CHECK(!fpet::cuda_refuses(p), "refused: %s", fpet::cuda_refuses(p));
  fpet::Problem wide = p;
  wide.channels = 1 << 20;
  CHECK(fpet::cuda_refuses(wide), "keys too wide for shared memory");
  p.tokens = int64_t(1) << 40;
  CHECK(fpet::cuda_refuses(p), "too many tokens");
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  const DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const Layout padded = Layout::padded, strided = Layout::strided, shifted = Layout::shifted;
  const auto make = [](const std::function<void(Config&)>& set) {
    Config c;
    set(c);
    return c;
  };
  const std::pair<const char*, Config> cases[] = {
      {"bf16", make([&](Config& c) { c.batch = 2, c.dim = 192, c.x = c.key = bf16; })},
      {"bf16, refined", make([&](Config& c) { c.batch = 2, c.dim = 768, c.x = c.key = bf16, c.hidden = 32, c.size = true; })},
      {"float32", make([&](Config& c) { c.batch = 3, c.dim = 64; })},
      {"float32, refined, heads", make([&](Config& c) { c.heads = 3, c.hidden = 32, c.size = true, c.mask = Mask::boolean; })},
      {"f16, dot", make([&](Config& c) { c.x = c.key = f16, c.cosine = false, c.dim = 72; })},
      {"autocast", make([&](Config& c) { c.key = bf16, c.hidden = 8, c.mask = Mask::f32, c.dim = 384, c.heads = 12; })},
      {"everything", make([&](Config& c) {
         c.batch = 3, c.prefix = 5, c.grid_h = 7, c.grid_w = 9, c.dim = 33, c.channels = 40, c.heads = 2, c.hidden = 24;
         c.x = bf16, c.key = f16, c.weight = bf16, c.size = c.delta = c.lists = true, c.mask = Mask::bf16, c.layout = padded;
       })},
      {"everything, strided", make([&](Config& c) {
         c.batch = 2, c.prefix = 0, c.grid_h = 6, c.grid_w = 5, c.dim = 17, c.channels = 33, c.heads = 2, c.hidden = 9;
         c.x = f16, c.weight = f16, c.size = c.delta = true, c.mask = Mask::f64, c.layout = strided, c.cosine = false;
       })},
      {"f16, refined", make([&](Config& c) { c.x = c.key = f16, c.hidden = 32, c.dim = 64, c.grid_w = 6; })},
      {"autocast, plain bf16", make([&](Config& c) { c.key = bf16, c.dim = 64, c.grid_w = 6; })},
      {"autocast, f16", make([&](Config& c) { c.key = f16, c.hidden = 16, c.heads = 2, c.dim = 64, c.grid_w = 6; })},
      {"autocast, plain f16", make([&](Config& c) { c.key = f16, c.dim = 64, c.grid_w = 6; })},
      {"kept mean, bf16", make([&](Config& c) { c.x = c.weight = bf16, c.hidden = 32, c.dim = 64, c.grid_w = 6; })},
      {"kept mean, f16", make([&](Config& c) { c.x = c.weight = f16, c.hidden = 32, c.dim = 64, c.grid_w = 6; })},
      {"several passes",
       make([&](Config& c) { c.batch = 4, c.grid_h = 4, c.grid_w = 5, c.dim = 1040, c.channels = 32, c.size = true; })},
      {"several passes, odd", make([&](Config& c) {
         c.batch = 4, c.grid_h = 4, c.grid_w = 5, c.dim = 301, c.channels = 32, c.size = true, c.x = f16;
       })},
      {"few channels, many hidden", make([&](Config& c) { c.channels = 24, c.hidden = 50, c.grid_w = 6, c.weight = bf16; })},
      {"wide keys", make([&](Config& c) { c.channels = 128, c.hidden = 64, c.grid_h = 6, c.delta = true; })},
      {"wide raw keys", make([&](Config& c) { c.channels = 96, c.x = c.key = bf16, c.layout = padded, c.grid_w = 6; })},
      {"shifted", make([&](Config& c) { c.grid_h = c.grid_w = 7, c.dim = 64, c.x = c.key = bf16, c.layout = shifted; })},
      {"shifted, refined", make([&](Config& c) {
         c.grid_h = c.grid_w = 7, c.dim = 20, c.layout = shifted, c.hidden = 16, c.mask = Mask::boolean, c.delta = true;
       })},
      {"raw strided", make([&](Config& c) { c.grid_h = 9, c.dim = 8, c.channels = 20, c.key = f16, c.layout = strided; })},
      {"D = 1, C = 3", make([&](Config& c) { c.grid_h = 5, c.grid_w = 7, c.dim = 1, c.channels = 3, c.key = bf16; })},
      {"one channel", make([&](Config& c) { c.grid_h = 2, c.grid_w = 2, c.dim = 2, c.channels = 1, c.prefix = 0; })},
      {"ties", make([&](Config& c) { c.channels = 6, c.values = Values::tied, c.key = bf16, c.cosine = false, c.dim = 4; })},
      {"ties, float32", make([&](Config& c) { c.channels = 6, c.values = Values::tied, c.cosine = false, c.dim = 4; })},
      {"exact", make([&](Config& c) { c.values = Values::coarse, c.cosine = false, c.dim = 24, c.key = f16, c.x = f16; })},
      {"no sources", make([&](Config& c) { c.grid_h = c.grid_w = 4, c.lists = true, c.num_a = 0, c.prefix = 2; })},
      {"one destination each", make([&](Config& c) { c.grid_h = 1, c.grid_w = 40, c.lists = true, c.num_a = 38, c.dim = 40; })},
      {"few sources", make([&](Config& c) { c.lists = true, c.num_a = 3, c.dim = 8; })},
      {"most destinations", make([&](Config& c) { c.grid_h = 32, c.grid_w = 32, c.dim = 8, c.channels = 8, c.key = bf16; })},
      {"most split destinations", make([&](Config& c) { c.grid_h = 20, c.grid_w = 32, c.dim = 8, c.channels = 8; })},
      {"no images", make([&](Config& c) { c.batch = 0; })},
      {"beyond short", make([&](Config& c) { c.grid_h = c.grid_w = 33, c.dim = 8, c.channels = 8, c.key = bf16; })},
      {"wide scores",
       make([&](Config& c) { c.x = f64, c.key = f64, c.grid_h = 6, c.grid_w = 6, c.dim = 12, c.channels = 20; })},
  };
  for (const auto& [name, config] : cases)
    if (argc < 2 || std::string(name) == argv[1]) {
      check_case(config, name);
      if (std::getenv("FPET_TEST_VERBOSE")) std::printf("%s: %d failures so far\n", name, failures), std::fflush(stdout);
    }
  const int problems = argc > 2 && std::string(argv[1]) == "random" ? std::atoi(argv[2]) : argc < 2 ? 24 : 0;
  std::mt19937 rng(11);
  for (int i = 0; i < problems; ++i) check_case(random_config(rng), "random problem " + std::to_string(i));
  if (argc < 2)
    for (const DType key : {f32, bf16, f16})
      for (const bool cosine : {true, false}) {
        check_degenerate(key, 0, cosine);
        check_one_nan(key, cosine);
      }
  if (argc < 2) {
    check_degenerate(bf16, 4, true);
    check_facts();
#ifdef FPET_EMULATE_CUDA
    // Where short kernels need more, the long ones take over.
    const Config wide = make([&](Config& c) { c.grid_h = 28, c.channels = 128, c.dim = 8; });
    check_case(wide, "enough shared memory");
    emulator::options.shared_per_block = 99 << 10;
    check_case(wide, "little shared memory");
#endif
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
