// CPU kernels of the activation ops, attached to the schemas of fusewright_kernels/library/activation.py.

#include <torch/csrc/stable/library.h>

#include "dropout_params.h"
#include "fusewright/activation.h"
#include "row_parameters.h"

namespace fusewright::ops {
namespace {

// Gate and up as rows; without `up`, both lie in `gate`, one behind the other.
struct Halves {
  RowView gate, up;
};

Halves halves(const Tensor& gate, const std::optional<Tensor>& up) {
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

Tensor swiglu_forward(Tensor gate, std::optional<Tensor> up) {
  SwigluForwardParams params;
  set_gates(params, gate, up);
  int64_t sizes[64];
  for (int64_t dim = 0; dim < gate.dim(); ++dim) sizes[dim] = gate.size(dim);
  sizes[gate.dim() - 1] = params.columns;
  Tensor output = empty(sizes, gate.dim(), gate.scalar_type(), gate);
  params.output = row_view(output, 1);
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.swiglu_forward(params, begin, end); });
  return output;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_output, Tensor gate, std::optional<Tensor> up) {
  SwigluBackwardParams params;
  set_gates(params, gate, up);
  params.grad_output = row_view(grad_output, 1);
  Tensor grad_gate = empty_like(gate, gate.scalar_type());
  Tensor grad_up = up.has_value() ? empty_like(*up, up->scalar_type()) : no_elements(gate.scalar_type(), gate);
  const Halves gradients = halves(grad_gate, up.has_value() ? std::optional<Tensor>(grad_up) : std::nullopt);
  params.grad_gate = gradients.gate;
  params.grad_up = gradients.up;
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.swiglu_backward(params, begin, end); });
  return {grad_gate, grad_up};
}

Tensor bias_gelu_forward(Tensor input, std::optional<Tensor> bias, bool tanh) {
  Tensor output = empty_like(input, input.scalar_type());
  BiasGeluForwardParams params;
  params.rows = product_of_sizes(input, 0, input.dim() - 1);
  params.columns = input.size(input.dim() - 1);
  params.tanh = tanh;
  params.input = row_view(input, 1);
  params.output = row_view(output, 1);
  const CpuKernels& kernels = cpu_kernels();
  const FloatParameter wide_bias(kernels, row_view(bias, 1), params.columns, 0.0f, takes_pair_order(params.input));
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.bias_gelu_forward(params, wide_bias.values(), begin, end); });
  return output;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool tanh) {
  Tensor grad_input = empty_like(input, input.scalar_type());
  Tensor grad_bias =
      bias.has_value() ? empty_like(*bias, bias->scalar_type()) : no_elements(input.scalar_type(), input);
  BiasGeluBackwardParams params;
  params.rows = product_of_sizes(input, 0, input.dim() - 1);
  params.columns = input.size(input.dim() - 1);
  params.tanh = tanh;
  params.grad_output = row_view(grad_output, 1);
  params.input = row_view(input, 1);
  params.grad_input = row_view(grad_input, 1);
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
  DropoutAddParams params;
  params.rows = product_of_sizes(input, 0, input.dim() - 1);
  params.columns = input.size(input.dim() - 1);
  params.input = row_view(input, 1);
  params.residual = row_view(residual, 1);
  params.output = row_view(output, 1);
  set_dropout(seed, dropout_p, &params.seed, &params.keep_threshold, &params.keep_scale);
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
