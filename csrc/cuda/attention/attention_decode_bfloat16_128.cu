#include "attention_decode_launch.cuh"

template cudaError_t fusewright::cuda::attention_decode<__nv_bfloat16, 128>(const AttentionDecodeKernelParams&, int64_t,
                                                                            void*);
