// What this build is and what it uses here, for the doctor: a plain C function, so that the library is tied to no Python.
// From CMake: FPET_COMPILER, FPET_FLAGS. The CUDA library speaks for itself (cuda_ops.cpp).
#include <exception>
#include <utility>

#include "fpet/bdm.h"
#include "json.h"

// JSON that stays valid. cpu_isa_refused says why FPET_CPU_ISA can't be followed; it is empty where it can.
extern "C" __attribute__((visibility("default"))) const char* fpet_cpu_build() {
  using fpet::binding::quoted;
  static const auto isa = [] {
    try {
      return std::pair<std::string, std::string>(fpet::cpu_isa(), "");
    } catch (const std::exception& error) {
      return std::pair<std::string, std::string>("", error.what());
    }
  }();
  static const std::string result =
      "{\"compiler\": " + quoted(FPET_COMPILER) + ", \"flags\": " + quoted(FPET_FLAGS) +
      ", \"cxx_standard\": " + std::to_string(__cplusplus) + ", \"cpu_isas_compiled\": " + quoted(fpet::cpu_isas_compiled()) +
      ", \"cpu_isa_in_use\": " + quoted(isa.first.c_str()) + ", \"cpu_isa_refused\": " + quoted(isa.second.c_str()) + "}";
  return result.c_str();
}
