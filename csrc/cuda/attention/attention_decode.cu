// Entry of attention over a cache: what it accepts, and the choice by element type and width.

#include "attention_decode.cuh"
#include "attention_forward.cuh"
#include "fusewright/cuda_api.h"

namespace fusewright::cuda {
namespace {

constexpr int64_t most_blocks = 65535;  // along y and z

int64_t capacity_of(const AttentionDecodeParams& params) {
  return params.page_size == 0 ? params.keys : params.page_size * params.block_table_stride;
}

bool has_aligned_rows(const HeadsView& view) {
  return is_aligned(view.data, 16) && view.batch_stride % 8 == 0 && view.head_stride % 8 == 0 &&
         view.row_stride % 8 == 0;
}

bool is_accepted(const AttentionDecodeParams& params) {
  const bool plain = params.mask.kind == MaskKind::none && params.block_mask == nullptr && params.keep_threshold == 0;
  const bool sizes = params.batch >= 1 && params.batch <= most_blocks && params.key_heads >= 1 &&
                     params.heads % params.key_heads == 0 && params.queries >= 1 &&
                     params.heads * params.queries <= most_blocks && capacity_of(params) < int64_t{1} << 30;
  return plain && sizes && (params.dtype == DataType::bfloat16 || params.dtype == DataType::float16) &&
         params.width >= 8 && params.width % 8 == 0 && params.value_width >= 8 && params.value_width % 8 == 0 &&
         attention_kernel_width(params) != 0 && has_aligned_rows(params.query) && has_aligned_rows(params.key) &&
         has_aligned_rows(params.value) && has_aligned_rows(params.output);
}

template <class T>
cudaError_t of_width(const AttentionDecodeParams& params, const AttentionDecodeKernelParams& kernel_params,
                     void* stream) {
  return attention_kernel_width(params) == 64 ? attention_decode<T, 64>(kernel_params, params.batch, stream)
                                              : attention_decode<T, 128>(kernel_params, params.batch, stream);
}

}  // namespace
}  // namespace fusewright::cuda

int64_t fusewright_cuda_attention_decode_workspace(const fusewright::AttentionDecodeParams* params) {
  using namespace fusewright::cuda;
  const int64_t parts = attention_decode_parts(*params, capacity_of(*params));
  return params->batch * params->heads * params->queries * parts * (params->value_width + 2) * 4;
}

int fusewright_cuda_attention_decode(const fusewright::AttentionDecodeParams* params, const int64_t* lengths,
                                     void* workspace, void* stream) {
  using namespace fusewright::cuda;
  if (!is_accepted(*params) || !is_aligned(workspace, 16)) return cudaErrorInvalidValue;
  AttentionDecodeKernelParams kernel_params = {};
  kernel_params.query = params->query;
  kernel_params.key = params->key;
  kernel_params.value = params->value;
  kernel_params.output = params->output;
  kernel_params.lengths = lengths;
  kernel_params.block_table = params->block_table;
  kernel_params.block_table_stride = params->block_table_stride;
  kernel_params.page_size = static_cast<int>(params->page_size);
  kernel_params.alibi_slopes = params->alibi_slopes;
  kernel_params.alibi_batch_stride = params->alibi_batch_stride;
  kernel_params.sinks = params->sinks;
  kernel_params.maximum = params->maximum;
  kernel_params.total = params->total;
  kernel_params.heads = static_cast<int>(params->heads);
  kernel_params.group = static_cast<int>(params->heads / params->key_heads);
  kernel_params.queries = static_cast<int>(params->queries);
  kernel_params.width = static_cast<int>(params->width);
  kernel_params.value_width = static_cast<int>(params->value_width);
  kernel_params.parts = static_cast<int>(attention_decode_parts(*params, capacity_of(*params)));
  // A window as long as any sequence is none.
  const int64_t longest = int64_t{1} << 30;
  kernel_params.window_left = params->window_left >= longest ? -1 : static_cast<int>(params->window_left);
  kernel_params.scale = params->scale;
  kernel_params.softcap = params->softcap;
  const int64_t rows = params->batch * params->heads * params->queries * kernel_params.parts;
  kernel_params.part_sums = static_cast<float*>(workspace);
  kernel_params.part_references = kernel_params.part_sums + rows * params->value_width;
  kernel_params.part_totals = kernel_params.part_references + rows;
  return params->dtype == fusewright::DataType::bfloat16 ? of_width<__nv_bfloat16>(*params, kernel_params, stream)
                                                         : of_width<__half>(*params, kernel_params, stream);
}
