#include "softmax_forward.cuh"

template cudaError_t fusewright::cuda::softmax_forward<__nv_bfloat16>(const SoftmaxForwardParams&, void*);
