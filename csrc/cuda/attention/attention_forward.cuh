// The launches that attention.cu chooses from.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "fusewright/attention.h"

namespace fusewright::cuda {

// Columns of the kernels for these tensors, 0 if there are none so wide.
inline int attention_kernel_width(const AttentionParams& params) {
  const int64_t widest = std::max(params.width, params.value_width);
  return widest <= 64 ? 64 : widest <= 128 ? 128 : 0;
}

// The instantiation of one element type and number of columns. `shift`: key j stands j - i - shift behind query i's own
// place.
template <class T, int D>
cudaError_t attention_forward_sm90(const AttentionForwardParams& params, int64_t shift, void* stream);
template <class T, int D>
cudaError_t attention_forward_sm80(const AttentionForwardParams& params, int64_t shift, void* stream);

extern template cudaError_t attention_forward_sm90<__nv_bfloat16, 64>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm90<__nv_bfloat16, 128>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm90<__half, 64>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm90<__half, 128>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm80<__nv_bfloat16, 64>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm80<__nv_bfloat16, 128>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm80<__half, 64>(const AttentionForwardParams&, int64_t, void*);
extern template cudaError_t attention_forward_sm80<__half, 128>(const AttentionForwardParams&, int64_t, void*);

}  // namespace fusewright::cuda
