// The launches that attention.cu chooses from.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fusewright/attention.h"

namespace fusewright::cuda {

// The instantiation of one element type and width. `shift`: key j stands j - i - shift behind query i's own place.
template <class T, int D>
cudaError_t attention_forward_sm90(const AttentionForwardParams& params, int64_t shift, void* stream);

extern template cudaError_t attention_forward_sm90<__nv_bfloat16, 64>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm90<__nv_bfloat16, 128>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm90<__half, 64>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm90<__half, 128>(const AttentionForwardParams&, int64_t, void*);

}  // namespace fusewright::cuda
