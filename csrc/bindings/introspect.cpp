// fpet_kernels._introspect: facts about this build and what it uses here, for the doctor. No torch header.
// From CMake: FPET_COMPILER, FPET_FLAGS, FPET_CUDA_ARCHITECTURES (where CUDA kernels are compiled).
#include <pybind11/pybind11.h>

#include "fpet/bdm.h"

#ifndef FPET_CUDA_ARCHITECTURES
#define FPET_CUDA_ARCHITECTURES ""
#endif

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
  facts["cuda_architectures"] = words(FPET_CUDA_ARCHITECTURES);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "Facts about the native build.";
  m.def("build_facts", &build_facts,
        "compiler, flags, cxx_standard, cpu_isas_compiled (best first), cpu_isa_in_use, cuda_architectures.");
}
