// Found before the toolkit's header of this name where kernels are compiled for the host.
#pragma once
#include "../cuda_emulator.h"
