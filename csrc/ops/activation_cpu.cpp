// CPU kernels of the activation ops, attached to the schemas of fusewright_kernels/library/activation.py.

#include <torch/csrc/stable/library.h>

#include "activation_params.h"
#include "row_parameters.h"

namespace fusewright::ops {
namespace {

Tensor swiglu_forward(Tensor gate, std::optional<Tensor> up) {
  SwigluForwardParams params;
  set_gates(params, gate, up);
  Tensor output = empty_swiglu_output(gate, params);
  params.output = row_view(output, 1);
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.swiglu_forward(params, begin, end); });
  return output;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_output, Tensor gate, std::optional<Tensor> up) {
  const SwigluBackwardResult result = swiglu_backward_params(grad_output, gate, up);
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(result.params.rows, result.params.columns,
                [&](int64_t begin, int64_t end) { kernels.swiglu_backward(result.params, begin, end); });
  return {result.grad_gate, result.grad_up};
}

Tensor bias_gelu_forward(Tensor input, std::optional<Tensor> bias, bool tanh) {
  Tensor output = empty_like(input, input.scalar_type());
  const BiasGeluForwardParams params = bias_gelu_forward_params(input, tanh, output);
  const CpuKernels& kernels = cpu_kernels();
  const FloatParameter wide_bias(kernels, row_view(bias, 1), params.columns, 0.0f, takes_pair_order(params.input));
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.bias_gelu_forward(params, wide_bias.values(), begin, end); });
  return output;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool tanh) {
  Tensor grad_input = empty_like(input, input.scalar_type());
  Tensor grad_bias = empty_bias_gradient(input, bias);
  const BiasGeluBackwardParams params = bias_gelu_backward_params(grad_output, input, tanh, grad_input);
  if (params.columns == 0) return {grad_input, grad_bias};
  const CpuKernels& kernels = cpu_kernels();
  const bool pair_order = takes_pair_order(params.input);
  const FloatParameter wide_bias(kernels, row_view(bias, 1), params.columns, 0.0f, pair_order);
  const RowChunks chunks(params.rows);
  const int64_t sums_stride = whole_blocks(kernels, params.columns) * kernels.parameter_block;
  std::unique_ptr<float[]> sums;
  if (bias.has_value()) sums.reset(new float[chunks.count * sums_stride]);
  parallel_rows(chunks.count, chunks.rows * params.columns, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernels.bias_gelu_backward(params, wide_bias.values(), chunks.begin(chunk), chunks.end(chunk),
                                 sums == nullptr ? nullptr : sums.get() + chunk * sums_stride);
    }
  });
  if (bias.has_value()) reduce_chunks(kernels, sums.get(), chunks, params.columns, pair_order, row_view(grad_bias, 1));
  return {grad_input, grad_bias};
}

Tensor dropout_add(Tensor input, std::optional<Tensor> residual, std::optional<Tensor> seed, double dropout_p) {
  Tensor output = empty_like(input, input.scalar_type());
  const DropoutAddParams params = dropout_add_params(input, residual, seed, dropout_p, output);
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.dropout_add(params, begin, end); });
  return output;
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("swiglu_forward.cpu", TORCH_BOX(&fusewright::ops::swiglu_forward));
  library.impl("swiglu_backward.cpu", TORCH_BOX(&fusewright::ops::swiglu_backward));
  library.impl("bias_gelu_forward.cpu", TORCH_BOX(&fusewright::ops::bias_gelu_forward));
  library.impl("bias_gelu_backward.cpu", TORCH_BOX(&fusewright::ops::bias_gelu_backward));
  library.impl("dropout_add.cpu", TORCH_BOX(&fusewright::ops::dropout_add));
}
