#include "normalization_forward.cuh"

template cudaError_t fusewright::cuda::norm_forward<float>(const NormForwardParams&, void*);
