#include "softmax_backward.cuh"

template cudaError_t fusewright::cuda::softmax_backward<float>(const SoftmaxBackwardParams&, void*);
