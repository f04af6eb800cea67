// How often warps pass the places of csrc/cuda/places.cuh, and what else the emulator counts, in one image of the typical problem: JSON
// for benchmarks/count_instructions.py. With the argument "mean" the keys are the float32 mean that a forward keeps for its backward.
#include "emulated_run.h"

int main(int argc, char** argv) {
  const bool mean = argc > 1 && std::string(argv[1]) == "mean";
  oracle::Config c = oracle::typical(true);
  c.dim = 768;
  if (mean) c.heads = 1, c.key = oracle::DType::f32;
  oracle::Run run(c);
  run.out.size = run.out.refined = nullptr;  // what tuning by FPET asks for: x and the weights
  emulator::options.multiprocessors = 1;     // one block an image
  run.forward();
  run.backward();
  std::printf("[");
  const char* separator = "";
  for (const emulator::Launched& launch : emulator::record.launches) {
    std::printf("%s{\"kernel\": \"%s\", \"passes\": {", separator, fpet::cuda::kernel_name(launch.function));
    const char* comma = "";
    for (const auto& [place, count] : launch.passes)
      std::printf("%s\"%d\": %lld", comma, place, (long long)count), comma = ", ";
    std::printf("}, \"events\": {");
    comma = "";
    for (const auto& [name, count] : launch.events)
      std::printf("%s\"%s\": %lld", comma, name.c_str(), (long long)count), comma = ", ";
    std::printf("}}");
    separator = ",\n ";
  }
  std::printf("]\n");
}
