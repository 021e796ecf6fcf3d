#include "softmax_forward.cuh"

template cudaError_t fusewright::cuda::softmax_forward<__half>(const SoftmaxForwardParams&, void*);
