#define FPET_ISA baseline
#define FPET_VEC_BYTES 16
#include "bdm_impl.h"
