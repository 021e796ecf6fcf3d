// Parameters of an activation call from its tensors, the same for the CPU and the CUDA kernels.
#pragma once

#include "dropout_params.h"
#include "fusewright/activation.h"
#include "tensor_rows.h"

namespace fusewright::ops {

// Gate and up as rows; without `up`, both lie in `gate`, one behind the other.
struct Halves {
  RowView gate, up;
};

inline Halves halves(const Tensor& gate, const std::optional<Tensor>& up) {
  if (up.has_value()) return {row_view(gate, 1), row_view(*up, 1)};
  Tensor packed = gate;
  const int64_t last = gate.dim() - 1, columns = gate.size(last) / 2;
  return {row_view(torch::stable::narrow(packed, last, 0, columns), 1),
          row_view(torch::stable::narrow(packed, last, columns, columns), 1)};
}

// Sets the sizes and the views of gate and up.
template <class Params>
void set_gates(Params& params, const Tensor& gate, const std::optional<Tensor>& up) {
  const int64_t last = gate.dim() - 1;
  params.rows = product_of_sizes(gate, 0, last);
  params.columns = up.has_value() ? gate.size(last) : gate.size(last) / 2;
  const Halves both = halves(gate, up);
  params.gate = both.gate;
  params.up = both.up;
}

// Gate's shape with as many columns as the output has, and its type.
inline Tensor empty_swiglu_output(const Tensor& gate, const SwigluForwardParams& params) {
  int64_t sizes[64];
  for (int64_t dim = 0; dim < gate.dim(); ++dim) sizes[dim] = gate.size(dim);
  sizes[gate.dim() - 1] = params.columns;
  return empty(sizes, gate.dim(), gate.scalar_type(), gate);
}

struct SwigluBackwardResult {
  SwigluBackwardParams params;
  Tensor grad_gate;
  Tensor grad_up;  // 0 elements without up
};

inline SwigluBackwardResult swiglu_backward_params(const Tensor& grad_output, const Tensor& gate,
                                                   const std::optional<Tensor>& up) {
  SwigluBackwardParams params;
  set_gates(params, gate, up);
  params.grad_output = row_view(grad_output, 1);
  Tensor grad_gate = empty_like(gate, gate.scalar_type());
  Tensor grad_up = up.has_value() ? empty_like(*up, up->scalar_type()) : no_elements(gate.scalar_type(), gate);
  const Halves gradients = halves(grad_gate, up.has_value() ? std::optional<Tensor>(grad_up) : std::nullopt);
  params.grad_gate = gradients.gate;
  params.grad_up = gradients.up;
  return {params, grad_gate, grad_up};
}

inline BiasGeluForwardParams bias_gelu_forward_params(const Tensor& input, bool tanh, const Tensor& output) {
  BiasGeluForwardParams params;
  params.rows = product_of_sizes(input, 0, input.dim() - 1);
  params.columns = input.size(input.dim() - 1);
  params.tanh = tanh;
  params.input = row_view(input, 1);
  params.output = row_view(output, 1);
  return params;
}

inline BiasGeluBackwardParams bias_gelu_backward_params(const Tensor& grad_output, const Tensor& input, bool tanh,
                                                        const Tensor& grad_input) {
  BiasGeluBackwardParams params;
  params.rows = product_of_sizes(input, 0, input.dim() - 1);
  params.columns = input.size(input.dim() - 1);
  params.tanh = tanh;
  params.grad_output = row_view(grad_output, 1);
  params.input = row_view(input, 1);
  params.grad_input = row_view(grad_input, 1);
  return params;
}

// Of no elements without a bias.
inline Tensor empty_bias_gradient(const Tensor& input, const std::optional<Tensor>& bias) {
  return bias.has_value() ? empty_like(*bias, bias->scalar_type()) : no_elements(input.scalar_type(), input);
}

inline DropoutAddParams dropout_add_params(const Tensor& input, const std::optional<Tensor>& residual,
                                           const std::optional<Tensor>& seed, double dropout_p, const Tensor& output) {
  DropoutAddParams params;
  params.rows = product_of_sizes(input, 0, input.dim() - 1);
  params.columns = input.size(input.dim() - 1);
  params.input = row_view(input, 1);
  params.residual = row_view(residual, 1);
  params.output = row_view(output, 1);
  set_dropout(seed, dropout_p, &params.seed, &params.keep_threshold, &params.keep_scale);
  return params;
}

}  // namespace fusewright::ops
