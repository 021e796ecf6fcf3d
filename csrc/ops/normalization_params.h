// Parameters of a normalisation call from its tensors, the same for the CPU and the CUDA kernels.
#pragma once

#include "dropout_params.h"
#include "fusewright/normalization.h"
#include "tensor_rows.h"

namespace fusewright::ops {

// Everything about a forward but its outputs.
inline NormForwardParams norm_forward_params(const Tensor& input, const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& bias, int64_t normalized_ndim, double eps,
                                             bool center, double weight_offset) {
  NormForwardParams params;
  const int64_t rows_ndim = input.dim() - normalized_ndim;
  params.rows = product_of_sizes(input, 0, rows_ndim);
  params.columns = product_of_sizes(input, rows_ndim, input.dim());
  params.center = center;
  params.eps = eps;
  params.weight_offset = static_cast<float>(weight_offset);
  params.input = row_view(input, normalized_ndim);
  params.weight = row_view(weight, normalized_ndim);
  params.bias = row_view(bias, normalized_ndim);
  return params;
}

inline Tensor empty_statistics(const NormForwardParams& params, const Tensor& like) {
  const int64_t sizes[2] = {params.center ? 2 : 1, params.rows};
  return empty(sizes, 2, ScalarType::Float, like);
}

struct NormBackwardResult {
  NormBackwardParams params;
  Tensor grad_input;
  Tensor grad_residual;  // 0 elements for plain normalisation
  Tensor grad_weight;
  Tensor grad_bias;
};

// One row of N for the gradient of a parameter, in the parameter's shape, or no elements.
inline Tensor empty_parameter_gradient(bool wanted, const std::optional<Tensor>& parameter, const Tensor& like,
                                       RowView* view) {
  const ScalarType type = parameter.has_value() ? parameter->scalar_type() : like.scalar_type();
  if (!wanted) return no_elements(type, like);
  STD_TORCH_CHECK(parameter.has_value(), "the gradient of an absent parameter was asked for");
  Tensor gradient = empty_like(*parameter, type);
  *view = row_view(gradient, gradient.dim());
  return gradient;
}

inline Tensor empty_row_gradient(bool wanted, const Tensor& stream, ScalarType type, int64_t normalized_ndim,
                                 RowView* view) {
  if (!wanted) return no_elements(type, stream);
  Tensor gradient = empty_like(stream, type);
  *view = row_view(gradient, normalized_ndim);
  return gradient;
}

// Parameters and outputs of a backward. `grad_new_residual`, `seed` and `residual_type` belong to the fused addition.
inline NormBackwardResult norm_backward_params(const Tensor& grad_output,
                                               const std::optional<Tensor>& grad_new_residual, const Tensor& stream,
                                               const Tensor& statistics, const std::optional<Tensor>& weight,
                                               const std::optional<Tensor>& bias, const std::optional<Tensor>& seed,
                                               int64_t normalized_ndim, bool center, double weight_offset,
                                               double dropout_p, ScalarType input_type,
                                               std::optional<ScalarType> residual_type, bool need_input,
                                               bool need_residual, bool need_weight, bool need_bias) {
  NormBackwardParams params;
  const int64_t rows_ndim = stream.dim() - normalized_ndim;
  params.rows = product_of_sizes(stream, 0, rows_ndim);
  params.columns = product_of_sizes(stream, rows_ndim, stream.dim());
  params.center = center;
  params.fused_residual = residual_type.has_value();
  params.weight_offset = static_cast<float>(weight_offset);
  params.grad_output = row_view(grad_output, normalized_ndim);
  params.grad_new_residual = row_view(grad_new_residual, normalized_ndim);
  params.stream = row_view(stream, normalized_ndim);
  params.weight = row_view(weight, normalized_ndim);
  params.statistics = static_cast<const float*>(statistics.data_ptr());
  set_dropout(seed, dropout_p, &params.seed, &params.keep_threshold, &params.keep_scale);
  Tensor grad_input = empty_row_gradient(need_input, stream, input_type, normalized_ndim, &params.grad_input);
  Tensor grad_residual = empty_row_gradient(need_residual, stream, residual_type.value_or(input_type), normalized_ndim,
                                            &params.grad_residual);
  Tensor grad_weight = empty_parameter_gradient(need_weight, weight, stream, &params.grad_weight);
  Tensor grad_bias = empty_parameter_gradient(need_bias, bias, stream, &params.grad_bias);
  return {params, grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace fusewright::ops
