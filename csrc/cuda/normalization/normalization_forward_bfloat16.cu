#include "normalization_forward.cuh"

template cudaError_t fusewright::cuda::norm_forward<__nv_bfloat16>(const NormForwardParams&, void*);
