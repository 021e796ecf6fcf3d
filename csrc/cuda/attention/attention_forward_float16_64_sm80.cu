#include "attention_forward_sm80.cuh"

template cudaError_t fusewright::cuda::attention_forward_sm80<__half, 64>(const AttentionForwardParams&, int64_t,
                                                                          void*);
