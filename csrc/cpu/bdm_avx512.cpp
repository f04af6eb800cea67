#define FPET_ISA avx512
#define FPET_VEC_BYTES 64
#include "bdm_impl.h"
