#include "normalization_forward.cuh"

template cudaError_t fusewright::cuda::norm_forward<__half>(const NormForwardParams&, void*);
