#define FPET_ISA avx512bf16
#define FPET_VEC_BYTES 64
#include "bdm_impl.h"
