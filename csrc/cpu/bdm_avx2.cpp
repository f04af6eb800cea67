#define FPET_ISA avx2
#define FPET_VEC_BYTES 32
#include "bdm_impl.h"
