// Entries of the attention kernels: what they accept, and the choice by element type and width.

#include "attention_forward.cuh"
#include "fusewright/cuda/tensor_map.cuh"
#include "fusewright/cuda_api.h"

namespace fusewright::cuda {
namespace {

bool takes_tensor_map(const HeadsView& view, const AttentionParams& params, int64_t length, int64_t heads) {
  return cuda::takes_tensor_map({view.data,
                                 params.dtype,
                                 {params.width, length, heads, params.batch},
                                 {1, view.row_stride, view.head_stride, view.batch_stride},
                                 {}});
}

bool is_accepted(const AttentionForwardParams& params) {
  constexpr int64_t most_blocks = 65535;  // along y and z
  constexpr int64_t longest = int64_t{1} << 29;
  const bool plain = params.mask.kind == MaskKind::none && params.block_mask == nullptr &&
                     params.alibi_slopes == nullptr && params.sinks == nullptr && params.softcap == 0.0f &&
                     params.keep_threshold == 0;
  const bool sizes = params.batch >= 1 && params.batch <= most_blocks && params.heads >= 1 &&
                     params.heads <= most_blocks && params.key_heads >= 1 && params.heads % params.key_heads == 0 &&
                     params.queries >= 1 && params.queries <= longest && params.keys >= 1 && params.keys <= longest;
  // A negative scale would make the smallest product the largest logit.
  return plain && sizes && params.scale > 0.0f && params.scale < INFINITY &&
         (params.dtype == DataType::bfloat16 || params.dtype == DataType::float16) &&
         params.width == params.value_width && (params.width == 64 || params.width == 128) &&
         takes_tensor_map(params.query, params, params.queries, params.heads) &&
         takes_tensor_map(params.key, params, params.keys, params.key_heads) &&
         takes_tensor_map(params.value, params, params.keys, params.key_heads);
}

template <class T>
cudaError_t forward_of_width(const AttentionForwardParams& params, int64_t shift, void* stream) {
#if defined(FUSEWRIGHT_CUDA_SM90)
  return params.width == 64 ? attention_forward_sm90<T, 64>(params, shift, stream)
                            : attention_forward_sm90<T, 128>(params, shift, stream);
#else
  return cudaErrorNotSupported;
#endif
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_attention_forward(const fusewright::AttentionForwardParams* params, int64_t shift, void* stream) {
  using namespace fusewright::cuda;
  if (!is_accepted(*params)) return cudaErrorInvalidValue;
  return params->dtype == fusewright::DataType::bfloat16 ? forward_of_width<__nv_bfloat16>(*params, shift, stream)
                                                         : forward_of_width<__half>(*params, shift, stream);
}
