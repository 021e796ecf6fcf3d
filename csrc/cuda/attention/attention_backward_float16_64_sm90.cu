#include "attention_backward_launch_sm90.cuh"

template cudaError_t fusewright::cuda::attention_backward_sm90<__half, 64>(const AttentionBackwardParams&, int64_t,
                                                                           bool, void*, void*);
