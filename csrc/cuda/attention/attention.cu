// Entries of the attention kernels: what they accept, and the choice by element type and width.

#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/tensor_map.cuh"
#include "fusewright/cuda_api.h"

namespace fusewright::cuda {
namespace {

bool takes_tensor_map(const HeadsView& view, const AttentionParams& params, int64_t width, int64_t length,
                      int64_t heads) {
  return cuda::takes_tensor_map({view.data,
                                 params.dtype,
                                 {width, length, heads, params.batch},
                                 {1, view.row_stride, view.head_stride, view.batch_stride},
                                 {}});
}

// Whether every row of 16-bit elements can be read 16 bytes at a time. The stride of a dimension of one is never used.
bool has_aligned_rows(const HeadsView& view, const AttentionParams& params, int64_t length, int64_t heads) {
  const auto aligned = [](int64_t size, int64_t stride) { return size == 1 || stride % 8 == 0; };
  return is_aligned(view.data, 16) && aligned(length, view.row_stride) && aligned(heads, view.head_stride) &&
         aligned(params.batch, view.batch_stride);
}

bool take_tensor_maps(const AttentionParams& params) {
  return takes_tensor_map(params.query, params, params.width, params.queries, params.heads) &&
         takes_tensor_map(params.key, params, params.width, params.keys, params.key_heads) &&
         takes_tensor_map(params.value, params, params.value_width, params.keys, params.key_heads);
}

bool is_accepted(const AttentionParams& params) {
  constexpr int64_t most_blocks = 65535;  // along y and z
  constexpr int64_t longest = int64_t{1} << 29;
  const bool plain = params.mask.kind == MaskKind::none && params.block_mask == nullptr &&
                     params.alibi_slopes == nullptr && params.sinks == nullptr && params.softcap == 0.0f &&
                     params.keep_threshold == 0;
  const bool sizes = params.batch >= 1 && params.batch <= most_blocks && params.heads >= 1 &&
                     params.heads <= most_blocks && params.key_heads >= 1 && params.heads % params.key_heads == 0 &&
                     params.queries >= 1 && params.queries <= longest && params.keys >= 1 && params.keys <= longest;
  const bool packing = params.packing.query_offsets == nullptr || (params.batch == 1 && params.packing.count < longest);
  // A negative scale would make the smallest product the largest logit.
  return plain && sizes && packing && params.scale > 0.0f && params.scale < INFINITY &&
         (params.dtype == DataType::bfloat16 || params.dtype == DataType::float16) && params.width >= 8 &&
         params.width % 8 == 0 && params.value_width >= 8 && params.value_width % 8 == 0 &&
         attention_kernel_width(params) != 0 && has_aligned_rows(params.query, params, params.queries, params.heads) &&
         has_aligned_rows(params.key, params, params.keys, params.key_heads) &&
         has_aligned_rows(params.value, params, params.keys, params.key_heads);
}

bool is_accepted_backward(const AttentionBackwardParams& params) {
  // The kernels count tiles in 32 bits; their workspace would have to be larger than any memory.
  const int64_t tiles = params.batch * params.heads * (ceil_div(params.queries, 64) + params.packing.count + 1);
  return is_accepted(params) && take_tensor_maps(params) && tiles < int64_t{1} << 30 &&
         takes_tensor_map(params.output, params, params.value_width, params.queries, params.heads) &&
         takes_tensor_map(params.grad_output, params, params.value_width, params.queries, params.heads);
}

template <class T>
cudaError_t forward_of_width(const AttentionForwardParams& params, int64_t shift, bool on_hopper, void* stream) {
#if defined(FUSEWRIGHT_CUDA_SM90)
  if (on_hopper && take_tensor_maps(params)) {
    return attention_kernel_width(params) == 64 ? attention_forward_sm90<T, 64>(params, shift, stream)
                                                : attention_forward_sm90<T, 128>(params, shift, stream);
  }
#endif
  if (params.packing.query_offsets != nullptr) return cudaErrorNotSupported;
  return attention_kernel_width(params) == 64 ? attention_forward_sm80<T, 64>(params, shift, stream)
                                              : attention_forward_sm80<T, 128>(params, shift, stream);
}

template <class T>
cudaError_t backward_of_width(const AttentionBackwardParams& params, int64_t shift, bool ordered, void* workspace,
                              void* stream) {
#if defined(FUSEWRIGHT_CUDA_SM90)
  return attention_kernel_width(params) == 64
             ? attention_backward_sm90<T, 64>(params, shift, ordered, workspace, stream)
             : attention_backward_sm90<T, 128>(params, shift, ordered, workspace, stream);
#else
  return cudaErrorNotSupported;
#endif
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_attention_forward(const fusewright::AttentionForwardParams* params, int64_t shift, void* stream) {
  using namespace fusewright::cuda;
  if (!is_accepted(*params)) return cudaErrorInvalidValue;
  DeviceLimits device;
  const cudaError_t error = query_device(device);
  if (error != cudaSuccess) return error;
  const bool on_hopper = device.generation == 9;
  return params->dtype == fusewright::DataType::bfloat16
             ? forward_of_width<__nv_bfloat16>(*params, shift, on_hopper, stream)
             : forward_of_width<__half>(*params, shift, on_hopper, stream);
}

int fusewright_cuda_attention_backward(const fusewright::AttentionBackwardParams* params, int64_t shift, bool ordered,
                                       void* workspace, void* stream) {
  using namespace fusewright::cuda;
  if (!is_accepted_backward(*params) || !is_aligned(workspace, 16)) return cudaErrorInvalidValue;
  return params->dtype == fusewright::DataType::bfloat16
             ? backward_of_width<__nv_bfloat16>(*params, shift, ordered, workspace, stream)
             : backward_of_width<__half>(*params, shift, ordered, workspace, stream);
}

int64_t fusewright_cuda_attention_backward_workspace(const fusewright::AttentionBackwardParams* params) {
  return fusewright::cuda::AttentionBackwardWorkspace::bytes(*params);
}
