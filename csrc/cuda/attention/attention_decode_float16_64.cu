#include "attention_decode_launch.cuh"

template cudaError_t fusewright::cuda::attention_decode<__half, 64>(const AttentionDecodeKernelParams&, int64_t, void*);
