#include "attention_backward_launch_sm90.cuh"

template cudaError_t fusewright::cuda::attention_backward_sm90<__nv_bfloat16, 64>(const AttentionBackwardParams&,
                                                                                  int64_t, bool, void*, void*);
