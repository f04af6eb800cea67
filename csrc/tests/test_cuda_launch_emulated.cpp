// How the CUDA kernels are launched, which the emulator records and a GPU does not tell: names and shared memory as introspection lists
// them, what is allowed and asked on the way, vector loads, scratch memory, passes over a match.
#include <set>

#include "emulated_run.h"

namespace {

using namespace oracle;

std::map<std::string, fpet::CudaKernelFacts> listed() {
  std::map<std::string, fpet::CudaKernelFacts> all;
  int count = 0;
  for (fpet::CudaKernelFacts facts; (facts = fpet::cuda_kernel_facts(count)).name; ++count) all[facts.name] = facts;
  CHECK(int(all.size()) == count, "%d kernels share %zu names", count, all.size());
  return all;
}

// Each launch has a name of its own, threads and shared memory as listed, on GPUs of any size.
void check_listed_launches() {
  std::set<std::string> seen;
  for (const int shared : {99 << 10, 163 << 10, 227 << 10}) {
    emulator::options.shared_per_block = shared;
    emulator::options.shared_per_multiprocessor = shared + 1024;
    const auto facts = listed();
    for (const DType key : {DType::bf16, DType::f16, DType::f32, DType::f64})
      for (const bool refined : {false, true})
        for (const bool tiled : {false, true}) {
          Run run(typical(refined, key));
          run.tiled = tiled;
          emulator::record = {};
          CHECK(run.forward().error == cudaSuccess && run.backward().error == cudaSuccess, "not launched");
          for (const emulator::Launched& launch : emulator::record.launches) {
            const std::string name = fpet::cuda::kernel_name(launch.function);
            CHECK(facts.count(name), "%s is not listed", name.c_str());
            const fpet::CudaKernelFacts& fact = facts.at(name);
            CHECK(unsigned(fact.threads) == launch.threads, "%s: %d threads are listed, %u launched", name.c_str(),
                  fact.threads, launch.threads);
            seen.insert(name);
            // Of those that work on hidden units the refined problem is the one that is listed.
            bool refines = false;
            for (const char* part : {"split", "image_gradient", "key_gradient", "prepare_keys"})
              refines |= name.find(part) != std::string::npos;
            if (refines && !refined) continue;
            CHECK(fact.dynamic_shared == launch.shared, "%s: %zu bytes of shared memory are listed, %zu launched", name.c_str(),
                  fact.dynamic_shared, launch.shared);
          }
        }
  }
  emulator::options = {};
  for (const char* name :
       {"merge_short<bf16 keys, bf16>", "merge_short<f16 keys, f16>", "merge_short<split bf16 keys, bf16>",
        "image_gradient<bf16>", "pair_tiles<float>", "pair_tiles<bf16>", "key_gradient<double>", "prepare_keys<double>"})
    CHECK(seen.count(name), "%s was never launched", name);
}

// Shared memory is allowed once for a kernel and a device, to the most; introspection takes nothing back; a launch asks no attributes.
void check_shared_allowed() {
  emulator::options.device = 3;
  Config small = typical(true);
  small.grid_h = 4;
  const Run large(typical(true)), other(small);
  emulator::record = {};
  for (const Run* run : {&other, &large, &other})
    CHECK(run->forward().error == cudaSuccess && run->backward().error == cudaSuccess, "not launched");
  CHECK(emulator::record.attributes_asked == 0, "a call asked for the attributes of %d kernels",
        emulator::record.attributes_asked);
  CHECK(!emulator::record.shared_allowed.empty(), "nothing was allowed more than 48 KB");
  listed();
  CHECK(large.forward().error == cudaSuccess && large.backward().error == cudaSuccess, "introspection took memory away");
  for (const auto& [function, values] : emulator::record.shared_allowed)
    CHECK(values == vector<int>{emulator::options.shared_per_block}, "%s was allowed %zu times, %d bytes first",
          fpet::cuda::kernel_name(function), values.size(), values[0]);
  emulator::options.device = 1000;
}

int64_t total(const char* event) {
  int64_t sum = 0;
  for (const emulator::Launched& launch : emulator::record.launches) {
    const auto found = launch.events.find(event);
    if (found != launch.events.end()) sum += found->second;
  }
  return sum;
}

// The stride of a dimension of size one says nothing: no fewer 16-byte loads than of packed tensors.
void check_strides_of_one() {
  for (const bool heads : {false, true})
    for (const bool tiled : {false, true}) {
      Config c = typical(heads);
      c.grid_h = c.grid_w = 6;
      c.size = c.delta = true;
      if (tiled) c.channels = 136;
      Run run(c);
      const auto loads = [&] {
        emulator::record = {};
        run.forward(), run.backward();
        fpet::cuda_average_heads(run.problem, Buffer(u(c.batch * run.t.n * c.channels * 4)).get(), nullptr);
        fpet::UnmergeProblem unmerge;
        unmerge.batch = c.batch, unmerge.dim = c.dim, unmerge.prefix = c.prefix;
        unmerge.num_a = run.t.num_a, unmerge.num_b = run.t.num_b, unmerge.grid_h = c.grid_h, unmerge.grid_w = c.grid_w;
        unmerge.match = run.in.match;
        unmerge.input = run.in.tokens;
        const Buffer all(u(c.batch * run.t.n * c.dim * 2));
        unmerge.output = all.get();
        fpet::cuda_unmerge(unmerge, nullptr);
        return std::pair(total("load16"), total("copied bytes"));
      };
      const auto packed = loads();
      CHECK(packed.first > 100, "%lld loads of 16 bytes", (long long)packed.first);
      for (fpet::View* view : {&run.problem.x, &run.problem.key, &run.problem.size, &run.problem.key_delta, &run.in.grad_tokens,
                               &run.in.grad_size, &run.in.tokens, &run.in.merged_size})
        view->stride[0] = 12345679;
      if (!heads) run.problem.key.stride[1] = 7;
      const auto odd = loads();
      CHECK(odd == packed, "heads %d, tiled %d: %lld loads of 16 bytes instead of %lld, %lld bytes copied instead of %lld",
            heads, tiled, (long long)odd.first, (long long)packed.first, (long long)odd.second, (long long)packed.second);
    }
}

fpet::Problem square(int64_t side, int64_t batch, bool everything) {
  fpet::Problem p;
  p.batch = batch, p.prefix = 1, p.grid_h = p.grid_w = side, p.tokens = side * side + 1;
  p.num_a = (side * side + 1) / 2, p.num_b = side * side / 2;
  p.dim = everything ? 32 : 768, p.channels = everything ? 32 : 64, p.heads = everything ? 2 : 12, p.hidden = 32;
  return p;
}

// Scratch memory: at 4097 tokens less than a byte for each pair of a source and a destination; it grows with N.
void check_scratch() {
  char wanted;
  for (const bool everything : {false, true}) {
    fpet::BackwardOutputs out;
    out.x = out.w_down = out.w_up = &wanted;
    if (everything) out.size = out.refined = out.key = &wanted;
    for (const int64_t batch : {1, 2, 4, 16}) {
      const fpet::Problem p = square(64, batch, everything);
      const size_t pairs = size_t(batch * p.num_a * p.num_b);
      const size_t forward = fpet::cuda_forward_workspace(p), backward = fpet::cuda_backward_workspace(p, out);
      CHECK(forward < pairs / 2 && backward < pairs, "batch %lld: %zu forward, %zu backward for %zu pairs", (long long)batch,
            forward, backward, pairs);
    }
    for (const int64_t side : {18, 24, 32, 37, 48, 64, 90, 128}) {
      const size_t one = fpet::cuda_backward_workspace(square(side, 1, everything), out);
      const size_t four = fpet::cuda_backward_workspace(square(2 * side, 1, everything), out);
      CHECK(four < 5 * one + (size_t(1) << 20), "%lld × %lld: %zu bytes, four times the tokens: %zu", (long long)side,
            (long long)side, one, four);
      for (const int multiprocessors : {1, 132}) {
        emulator::options.multiprocessors = multiprocessors;
        CHECK(fpet::cuda_backward_workspace(square(side, 1, everything), out) == one,
              "scratch depends on the GPU: so may bits");
        CHECK(fpet::cuda_backward_workspace(square(side, 8, everything), out) <= 8 * one,
              "scratch of an image depends on its batch");
      }
      emulator::options = {};
    }
  }
}

// The lists of who merged into a few rows are made in one pass over the match, however long it is.
void check_passes() {
  for (const int64_t side : {32, 68, 100}) {
    Config c;
    c.grid_h = c.grid_w = side, c.dim = 4, c.channels = 1;
    Case t(c);
    vector<int64_t> match(u(t.num_a));
    for (int64_t& m : match) m = int64_t(t.rng() % u(t.merged));
    const Buffer device_match(match), grad(t.x.data), back(u(t.merged * c.dim * 4));
    fpet::UnmergeProblem p;
    p.batch = 1, p.dim = c.dim, p.prefix = c.prefix, p.num_a = t.num_a, p.num_b = t.num_b, p.grid_h = p.grid_w = side;
    p.match = device_match.as<int64_t>();
    p.input = t.x.view(grad.get());
    p.output = back.get();
    emulator::record = {};
    fpet::cuda_unmerge_backward(p, nullptr, nullptr);
    const emulator::Launched& launch = emulator::record.launches.at(0);
    // Two barriers a turn of 1,024 sources, and one at the end.
    const int64_t turns = (t.num_a + 1023) / 1024, wanted = int64_t(launch.blocks) * launch.threads * (2 * turns + 1);
    CHECK(launch.events.at("barrier") == wanted, "%lld sources: %lld barriers, %lld for one pass", (long long)t.num_a,
          (long long)launch.events.at("barrier"), (long long)wanted);
  }
}

}  // namespace

int main() {
  check_listed_launches();
  check_shared_allowed();
  check_strides_of_one();
  check_scratch();
  check_passes();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
