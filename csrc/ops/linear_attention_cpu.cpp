// CPU kernels of linear attention, attached to the schemas of fusewright_kernels/library/linear_attention.py.

#include <torch/csrc/stable/library.h>

#include "heads_tensor.h"
#include "parallel.h"
#include "worker.h"

namespace fusewright::ops {
namespace {

using std::optional;

// Tensors that the parameters point to.
struct Held {
  optional<Tensor> padding, initial_state;
};

void fill(LinearAttentionParams& params, Held& held, const Tensor& query, const Tensor& key, const Tensor& value,
          const optional<Tensor>& key_padding_mask, const optional<Tensor>& initial_state, bool is_causal, double eps,
          int64_t feature_map, const Tensor& normalizer) {
  params.batch = query.size(0);
  params.heads = query.size(1);
  params.queries = query.size(2);
  params.keys = key.size(2);
  params.width = query.size(3);
  params.value_width = value.size(3);
  params.dtype = data_type(query.scalar_type());
  params.query = heads_view(query);
  params.key = heads_view(key);
  params.value = heads_view(value);
  if (key_padding_mask.has_value()) {
    held.padding = torch::stable::contiguous(*key_padding_mask);
    params.key_padding = static_cast<const bool*>(held.padding->data_ptr());
  }
  if (initial_state.has_value()) {
    held.initial_state = torch::stable::contiguous(*initial_state);
    params.initial_state = static_cast<const float*>(held.initial_state->data_ptr());
  }
  params.causal = is_causal;
  params.eps = static_cast<float>(eps);
  params.feature_map = feature_map == 0 ? FeatureMap::elu : FeatureMap::identity;
  params.normalizer = static_cast<float*>(normalizer.data_ptr());
}

// Multiply-adds of a product of features and values for every position.
double work_of(const LinearAttentionParams& params) {
  return static_cast<double>(params.batch * params.heads * (params.queries + params.keys)) *
         static_cast<double>(params.width * (params.value_width + linear_chunk));
}

template <class Body>
void for_each_head(const LinearAttentionParams& params, double work, int64_t scratch_bytes, const Body& body) {
  for_each_task(params.batch * params.heads, work, scratch_bytes,
                [&](int64_t task, void* scratch) { body(task / params.heads, task % params.heads, scratch); });
}

Tensor like_state(const Tensor& query, const Tensor& value) {
  const int64_t sizes[4] = {query.size(0), query.size(1), query.size(3), value.size(3) + 1};
  return empty(sizes, 4, ScalarType::Float, query);
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_forward(Tensor query, Tensor key, Tensor value,
                                                            optional<Tensor> key_padding_mask,
                                                            optional<Tensor> initial_state, bool is_causal, double eps,
                                                            int64_t feature_map) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  Tensor output = empty_in_layout_of(query, batch, heads, queries, value.size(3));
  const int64_t rows[3] = {batch, heads, queries};
  Tensor normalizer = empty(rows, 3, ScalarType::Float, query), final_state = like_state(query, value);
  LinearForwardParams params;
  Held held;
  fill(params, held, query, key, value, key_padding_mask, initial_state, is_causal, eps, feature_map, normalizer);
  params.output = heads_view(output);
  params.final_state = static_cast<float*>(final_state.data_ptr());
  const CpuKernels& kernels = cpu_kernels();
  for_each_head(params, work_of(params), kernels.linear_forward_scratch(params),
                [&](int64_t b, int64_t h, void* scratch) { kernels.linear_forward(params, b, h, scratch); });
  return {output, normalizer, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    Tensor grad_output, optional<Tensor> grad_final_state, Tensor output, Tensor normalizer, Tensor query, Tensor key,
    Tensor value, optional<Tensor> key_padding_mask, optional<Tensor> initial_state, bool is_causal, double eps,
    int64_t feature_map, bool need_query, bool need_key, bool need_value, bool need_state) {
  const Tensor unit_grad = grad_output.stride(3) == 1 ? grad_output : torch::stable::contiguous(grad_output);
  const Tensor state_grad = grad_final_state.has_value() ? torch::stable::contiguous(*grad_final_state) : unit_grad;
  const auto like = [&](bool wanted, const Tensor& input) {
    return wanted ? empty_in_layout_of(input, input.size(0), input.size(1), input.size(2), input.size(3))
                  : no_elements(query.scalar_type(), query);
  };
  Tensor grad_query = like(need_query, query), grad_key = like(need_key, key), grad_value = like(need_value, value);
  Tensor grad_state = need_state ? like_state(query, value) : no_elements(query.scalar_type(), query);
  LinearBackwardParams params;
  Held held;
  fill(params, held, query, key, value, key_padding_mask, initial_state, is_causal, eps, feature_map, normalizer);
  params.output = heads_view(output);
  params.grad_output = heads_view(unit_grad);
  if (need_query) params.grad_query = heads_view(grad_query);
  if (need_key) params.grad_key = heads_view(grad_key);
  if (need_value) params.grad_value = heads_view(grad_value);
  if (grad_final_state.has_value()) params.grad_final_state = static_cast<const float*>(state_grad.data_ptr());
  if (need_state) params.grad_initial_state = static_cast<float*>(grad_state.data_ptr());
  const CpuKernels& kernels = cpu_kernels();
  for_each_head(params, 3 * work_of(params), kernels.linear_backward_scratch(params),
                [&](int64_t b, int64_t h, void* scratch) { kernels.linear_backward(params, b, h, scratch); });
  return {grad_query, grad_key, grad_value, grad_state};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("linear_attention_forward.cpu", TORCH_BOX(&fusewright::ops::linear_attention_forward));
  library.impl("linear_attention_backward.cpu", TORCH_BOX(&fusewright::ops::linear_attention_backward));
}
