// CUDA kernels of the attention ops, attached to the schemas of fusewright_kernels/library.py.

#include <torch/csrc/stable/library.h>

#include "attention_params.h"
#include "cuda_call.h"

namespace fusewright::ops {
namespace {

using std::optional;

// What the kernels serve is csrc/cuda/attention/attention.cu's to say; attention/backend_native.py asks for no other.
std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value, optional<Tensor> mask,
                                             optional<Tensor> block_mask, optional<Tensor> alibi_slopes,
                                             optional<Tensor> sinks, optional<Tensor> seed,
                                             optional<Tensor> cu_seqlens_q, optional<Tensor> cu_seqlens_k,
                                             int64_t block_size, double scale, double softcap, double dropout_p,
                                             int64_t window_left, int64_t window_right, bool bottom_right) {
  STD_TORCH_CHECK(!cu_seqlens_q.has_value() && dropout_p == 0, "attention_forward: packed sequences or dropout");
  const CudaCall call("attention_forward", query);
  AttentionForwardParams params;
  fill(params, {query, key, value, mask, block_mask, alibi_slopes, sinks, std::nullopt, std::nullopt, std::nullopt,
                block_size, scale, softcap, 0, window_left, window_right, bottom_right});
  const int64_t statistics_sizes[4] = {2, params.batch, params.heads, params.queries};
  Tensor output = empty_in_layout_of(query, params.batch, params.heads, params.queries, params.value_width);
  Tensor statistics = empty(statistics_sizes, 4, ScalarType::Float, query);
  params.output = heads_view(output);
  params.maximum = static_cast<float*>(statistics.data_ptr());
  params.total = params.maximum + params.batch * params.heads * params.queries;
  const int64_t shift = bottom_right ? params.keys - params.queries : 0;
  call.check(fusewright_cuda_attention_forward(&params, shift, call.stream()));
  return {output, statistics};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("attention_forward.cuda", TORCH_BOX(&fusewright::ops::attention_forward));
}
