#include "softmax_backward.cuh"

template cudaError_t fusewright::cuda::softmax_backward<__nv_bfloat16>(const SoftmaxBackwardParams&, void*);
