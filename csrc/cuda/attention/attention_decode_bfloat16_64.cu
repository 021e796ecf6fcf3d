#include "attention_decode_launch.cuh"

template cudaError_t fusewright::cuda::attention_decode<__nv_bfloat16, 64>(const AttentionDecodeKernelParams&, int64_t,
                                                                           void*);
