// CUDA kernels of the attention ops, attached to the schemas of fusewright_kernels/library.py.

#include <torch/csrc/stable/library.h>

#include "attention_params.h"
#include "cuda_call.h"

namespace fusewright::ops {
namespace {

using std::optional;

// Those of packed sequences, as the kernels read them.
class Offsets {
 public:
  Offsets(const optional<Tensor>& queries, const optional<Tensor>& keys) {
    if (!queries.has_value()) return;
    queries_ = torch::stable::contiguous(*queries);
    keys_ = torch::stable::contiguous(*keys);
  }

  bool given() const { return queries_.has_value(); }

  AttentionPacking packing(bool bottom_right) const {
    AttentionPacking packing;
    if (!given()) return packing;
    packing.query_offsets = queries_->data_ptr();
    packing.key_offsets = keys_->data_ptr();
    packing.wide_query_offsets = queries_->scalar_type() == ScalarType::Long;
    packing.wide_key_offsets = keys_->scalar_type() == ScalarType::Long;
    packing.bottom_right = bottom_right;
    packing.count = queries_->size(0) - 1;
    return packing;
  }

 private:
  optional<Tensor> queries_, keys_;
};

// What the kernels serve is csrc/cuda/attention/attention.cu's to say; attention/backend_native.py asks for no other.
std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value, optional<Tensor> mask,
                                             optional<Tensor> block_mask, optional<Tensor> alibi_slopes,
                                             optional<Tensor> sinks, optional<Tensor> seed,
                                             optional<Tensor> cu_seqlens_q, optional<Tensor> cu_seqlens_k,
                                             int64_t block_size, double scale, double softcap, double dropout_p,
                                             int64_t window_left, int64_t window_right, bool bottom_right) {
  STD_TORCH_CHECK(dropout_p == 0, "attention_forward: dropout");
  const Offsets offsets(cu_seqlens_q, cu_seqlens_k);
  const CudaCall call("attention_forward", query);
  AttentionForwardParams params;
  fill(params, {query, key, value, mask, block_mask, alibi_slopes, sinks, std::nullopt, std::nullopt, std::nullopt,
                block_size, scale, softcap, 0, window_left, window_right, bottom_right});
  params.packing = offsets.packing(bottom_right);
  const int64_t statistics_sizes[4] = {2, params.batch, params.heads, params.queries};
  Tensor output = empty_in_layout_of(query, params.batch, params.heads, params.queries, params.value_width);
  Tensor statistics = empty(statistics_sizes, 4, ScalarType::Float, query);
  params.output = heads_view(output);
  params.maximum = static_cast<float*>(statistics.data_ptr());
  params.total = params.maximum + params.batch * params.heads * params.queries;
  const int64_t shift = bottom_right && !offsets.given() ? params.keys - params.queries : 0;
  call.check(fusewright_cuda_attention_forward(&params, shift, call.stream()));
  return {output, statistics};
}

std::tuple<Tensor, Tensor> attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths,
                                            optional<Tensor> block_table, optional<Tensor> alibi_slopes,
                                            optional<Tensor> sinks, double scale, double softcap, int64_t window_left) {
  const Tensor length_per_sequence = torch::stable::contiguous(lengths);
  const optional<Tensor> table = block_table.has_value() ? torch::stable::contiguous(*block_table) : block_table;
  const optional<Tensor> sink_per_head = sinks.has_value() ? torch::stable::contiguous(*sinks) : sinks;
  const CudaCall call("attention_decode", query);
  AttentionInputs inputs{query, key_cache, value_cache};
  inputs.alibi_slopes = alibi_slopes;
  inputs.sinks = sink_per_head;
  inputs.scale = scale;
  inputs.softcap = softcap;
  inputs.window_left = window_left;
  AttentionDecodeParams params;
  fill(params, inputs);
  if (table.has_value()) {
    params.block_table = static_cast<const int64_t*>(table->data_ptr());
    params.block_table_stride = table->size(1);
    params.page_size = key_cache.size(2);
  }
  const int64_t statistics_sizes[4] = {2, params.batch, params.heads, params.queries};
  Tensor output = empty_in_layout_of(query, params.batch, params.heads, params.queries, params.value_width);
  Tensor statistics = empty(statistics_sizes, 4, ScalarType::Float, query);
  params.output = heads_view(output);
  params.maximum = static_cast<float*>(statistics.data_ptr());
  params.total = params.maximum + params.batch * params.heads * params.queries;
  const int64_t words = fusewright_cuda_attention_decode_workspace(&params) / 4;
  const Tensor workspace = empty(&words, 1, ScalarType::Float, query);
  call.check(fusewright_cuda_attention_decode(&params, static_cast<const int64_t*>(length_per_sequence.data_ptr()),
                                              workspace.data_ptr(), call.stream()));
  return {output, statistics};
}

// `tensor`, or a copy where rows of it are not what the kernels load: the gradient of a sum is expanded, others may be
// parts of wider tensors.
Tensor with_aligned_rows(const Tensor& tensor) {
  constexpr int64_t alignment = 16;
  if (tensor.stride(3) != 1) return torch::stable::contiguous(tensor);
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0;
  for (int dim = 0; dim < 3; ++dim) {
    const int64_t bytes = tensor.stride(dim) * static_cast<int64_t>(tensor.element_size());
    aligned &= tensor.size(dim) == 1 || (bytes > 0 && bytes % alignment == 0);
  }
  return aligned ? tensor : torch::stable::clone(tensor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const optional<Tensor>& grad_lse,
                                                            const Tensor& output, const Tensor& statistics,
                                                            const AttentionInputs& inputs, bool need_query,
                                                            bool need_key, bool need_value, bool ordered) {
  STD_TORCH_CHECK(inputs.dropout_p == 0, "attention_backward: dropout");
  const Tensor& query = inputs.query;
  const Tensor output_rows = with_aligned_rows(output), grad_rows = with_aligned_rows(grad_output);
  const Tensor lse_grad = grad_lse.has_value() ? torch::stable::contiguous(*grad_lse) : statistics;
  const Offsets offsets(inputs.cu_seqlens_q, inputs.cu_seqlens_k);
  const CudaCall call("attention_backward", query);
  AttentionBackwardParams params;
  fill(params, inputs);
  params.packing = offsets.packing(inputs.bottom_right);
  params.maximum = static_cast<float*>(statistics.data_ptr());
  params.total = params.maximum + params.batch * params.heads * params.queries;
  params.output = heads_view(output_rows);
  params.grad_output = heads_view(grad_rows);
  if (grad_lse.has_value()) params.grad_lse = static_cast<const float*>(lse_grad.data_ptr());
  const auto gradient = [&](bool needed, const Tensor& input, HeadsView& view) {
    if (!needed) return no_elements(query.scalar_type(), query);
    Tensor result = empty_in_layout_of(input, input.size(0), input.size(1), input.size(2), input.size(3));
    view = heads_view(result);
    return result;
  };
  Tensor grad_query = gradient(need_query, query, params.grad_query);
  Tensor grad_key = gradient(need_key, inputs.key, params.grad_key);
  Tensor grad_value = gradient(need_value, inputs.value, params.grad_value);
  const int64_t words = fusewright_cuda_attention_backward_workspace(&params) / 4;
  const Tensor workspace = empty(&words, 1, ScalarType::Float, query);
  const int64_t shift = inputs.bottom_right && !offsets.given() ? params.keys - params.queries : 0;
  call.check(fusewright_cuda_attention_backward(&params, shift, ordered, workspace.data_ptr(), call.stream()));
  return {grad_query, grad_key, grad_value, no_elements(query.scalar_type(), query),
          no_elements(query.scalar_type(), query)};
}

// One op for each order of the sums of grad_query.
template <bool Ordered>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, optional<Tensor> grad_lse, Tensor output, Tensor statistics, Tensor query, Tensor key,
    Tensor value, optional<Tensor> mask, optional<Tensor> block_mask, optional<Tensor> alibi_slopes,
    optional<Tensor> sinks, optional<Tensor> seed, optional<Tensor> cu_seqlens_q, optional<Tensor> cu_seqlens_k,
    int64_t block_size, double scale, double softcap, double dropout_p, int64_t window_left, int64_t window_right,
    bool bottom_right, bool need_query, bool need_key, bool need_value, bool, bool) {
  const AttentionInputs inputs{query,   key,       value,        mask,         block_mask,  alibi_slopes,
                               sinks,   seed,      cu_seqlens_q, cu_seqlens_k, block_size,  scale,
                               softcap, dropout_p, window_left,  window_right, bottom_right};
  return backward(grad_output, grad_lse, output, statistics, inputs, need_query, need_key, need_value, Ordered);
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("attention_forward.cuda", TORCH_BOX(&fusewright::ops::attention_forward));
  library.impl("attention_decode.cuda", TORCH_BOX(&fusewright::ops::attention_decode));
  library.impl("attention_backward.cuda", TORCH_BOX(&fusewright::ops::attention_backward<false>));
  library.impl("attention_backward_ordered.cuda", TORCH_BOX(&fusewright::ops::attention_backward<true>));
}
