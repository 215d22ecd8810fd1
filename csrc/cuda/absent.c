/* absent.c: built instead of the CUDA backend where no nvcc is found, or BITNET_NO_CUDA is set. */
#include "kernels/backend.h"

const bn_backend *bn_cuda_backend(void) { return NULL; }
