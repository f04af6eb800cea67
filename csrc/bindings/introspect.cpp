// fpet_kernels._introspect: facts about this build and what it uses here, for the doctor. No torch header.
// From CMake: FPET_COMPILER, FPET_FLAGS. The CUDA library speaks for itself (cuda_ops.cpp).
#include <pybind11/pybind11.h>

#include "fpet/bdm.h"

namespace py = pybind11;

namespace {

py::object words(const char* text) { return py::str(text).attr("split")(); }

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = FPET_COMPILER;
  facts["flags"] = words(FPET_FLAGS);
  facts["cxx_standard"] = __cplusplus;
  facts["cpu_isas_compiled"] = words(fpet::cpu_isas_compiled());
  facts["cpu_isa_in_use"] = fpet::cpu_isa();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "Facts about the native build.";
  m.def("build_facts", &build_facts, "compiler, flags, cxx_standard, cpu_isas_compiled (best first), cpu_isa_in_use.");
}
