// CUDA kernels of the activation ops, attached to the schemas of fusewright_kernels/library/activation.py and
// dropout_add.py.

#include <torch/csrc/stable/library.h>

#include "activation_params.h"
#include "cuda_call.h"

namespace fusewright::ops {
namespace {

Tensor swiglu_forward(Tensor gate, std::optional<Tensor> up) {
  const CudaCall call("swiglu_forward", gate);
  SwigluForwardParams params;
  set_gates(params, gate, up);
  Tensor output = empty_swiglu_output(gate, params);
  params.output = row_view(output, 1);
  call.check(fusewright_cuda_swiglu_forward(&params, call.stream()));
  return output;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_output, Tensor gate, std::optional<Tensor> up) {
  const CudaCall call("swiglu_backward", gate);
  const SwigluBackwardResult result = swiglu_backward_params(grad_output, gate, up);
  call.check(fusewright_cuda_swiglu_backward(&result.params, call.stream()));
  return {result.grad_gate, result.grad_up};
}

Tensor bias_gelu_forward(Tensor input, std::optional<Tensor> bias, bool tanh) {
  const CudaCall call("bias_gelu_forward", input);
  Tensor output = empty_like(input, input.scalar_type());
  const BiasGeluForwardParams params = bias_gelu_forward_params(input, tanh, output);
  const RowView bias_row = row_view(bias, 1);
  call.check(fusewright_cuda_bias_gelu_forward(&params, &bias_row, call.stream()));
  return output;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool tanh) {
  const CudaCall call("bias_gelu_backward", input);
  Tensor grad_input = empty_like(input, input.scalar_type());
  Tensor grad_bias = empty_bias_gradient(input, bias);
  const BiasGeluBackwardParams params = bias_gelu_backward_params(grad_output, input, tanh, grad_input);
  const RowView bias_row = row_view(bias, 1);
  const RowView grad_bias_row = bias.has_value() ? row_view(grad_bias, 1) : RowView{};
  int64_t bytes = 0;
  call.check(fusewright_cuda_bias_gelu_backward_workspace(&params, &bias_row, &bytes));
  const int64_t elements = bytes / static_cast<int64_t>(sizeof(float));
  // Freed before the kernels have run; torch's allocator hands it out again to the same stream only.
  const Tensor workspace = empty(&elements, 1, ScalarType::Float, input);
  call.check(fusewright_cuda_bias_gelu_backward(&params, &bias_row, &grad_bias_row,
                                                static_cast<float*>(workspace.data_ptr()), call.stream()));
  return {grad_input, grad_bias};
}

Tensor dropout_add(Tensor input, std::optional<Tensor> residual, std::optional<Tensor> seed, double dropout_p) {
  const CudaCall call("dropout_add", input);
  Tensor output = empty_like(input, input.scalar_type());
  const DropoutAddParams params = dropout_add_params(input, residual, seed, dropout_p, output);
  call.check(fusewright_cuda_dropout_add(&params, call.stream()));
  return output;
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("swiglu_forward.cuda", TORCH_BOX(&fusewright::ops::swiglu_forward));
  library.impl("swiglu_backward.cuda", TORCH_BOX(&fusewright::ops::swiglu_backward));
  library.impl("bias_gelu_forward.cuda", TORCH_BOX(&fusewright::ops::bias_gelu_forward));
  library.impl("bias_gelu_backward.cuda", TORCH_BOX(&fusewright::ops::bias_gelu_backward));
  library.impl("dropout_add.cuda", TORCH_BOX(&fusewright::ops::dropout_add));
}
