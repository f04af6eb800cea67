// What this build is and what it uses here, for the doctor: a plain C function, so that the library is tied to no Python.
// From CMake: FPET_COMPILER, FPET_FLAGS. The CUDA library speaks for itself (cuda_ops.cpp).
#include "fpet/bdm.h"
#include "json.h"

// JSON that stays valid.
extern "C" __attribute__((visibility("default"))) const char* fpet_cpu_build() {
  using fpet::binding::quoted;
  static const std::string result = "{\"compiler\": " + quoted(FPET_COMPILER) + ", \"flags\": " + quoted(FPET_FLAGS) +
                                    ", \"cxx_standard\": " + std::to_string(__cplusplus) +
                                    ", \"cpu_isas_compiled\": " + quoted(fpet::cpu_isas_compiled()) +
                                    ", \"cpu_isa_in_use\": " + quoted(fpet::cpu_isa()) + "}";
  return result.c_str();
}
