#include "softmax_forward.cuh"

template cudaError_t fusewright::cuda::softmax_forward<float>(const SoftmaxForwardParams&, void*);
