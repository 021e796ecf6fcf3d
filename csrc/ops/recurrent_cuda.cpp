// CUDA kernels of the recurrent ops, attached to the schemas of fusewright_kernels/library/recurrent.py.
//
// Nothing here waits for the device: lengths are read there, so every step of T is walked whether or not anyone takes
// it.

#include <torch/csrc/stable/library.h>

#include "cuda_call.h"
#include "recurrent_params.h"

namespace fusewright::ops {
namespace {

using std::optional;

void fill_steps(RecurrentStepsParams& params, const RecurrentInputs& inputs) {
  params.cell = cell_of(inputs.cell);
  params.dtype = data_type(inputs.input.scalar_type());
  params.reverse = inputs.reverse;
  params.time = inputs.input.size(0);
  params.batch = inputs.input.size(1);
  params.hidden = inputs.weight_hh.size(1);
  params.lengths = static_cast<const int64_t*>(data_or_null(inputs.lengths));
  params.resets = static_cast<const bool*>(data_or_null(inputs.resets));
  params.h0 = inputs.h0.data_ptr();
  params.c0 = data_or_null(inputs.c0);
}

// Zero where samples take no step, which kernels leave as it is.
Tensor steps_tensor(const RecurrentInputs& inputs, int64_t width, ScalarType type) {
  const int64_t sizes[3] = {inputs.input.size(0), inputs.input.size(1), width};
  if (!inputs.lengths.has_value()) return empty(sizes, 3, type, inputs.input);
  return torch::stable::new_zeros(inputs.input, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 3), type);
}

Tensor states_tensor(const RecurrentInputs& inputs) {
  const int64_t sizes[2] = {inputs.input.size(1), inputs.weight_hh.size(1)};
  return empty(sizes, 2, inputs.input.scalar_type(), inputs.input);
}

Tensor workspace_of(int64_t bytes, const Tensor& like) {
  const int64_t floats = (bytes + 3) / 4;
  return empty(&floats, 1, ScalarType::Float, like);
}

// (T, B, width) as rows.
Tensor rows_of(const Tensor& tensor) {
  return torch::stable::reshape(tensor, {tensor.size(0) * tensor.size(1), tensor.size(2)});
}

Tensor product(const Tensor& left, const Tensor& right) { return torch::stable::matmul(left, right); }
Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(Tensor input, Tensor h0, optional<Tensor> c0,
                                                                     Tensor weight_ih, Tensor weight_hh,
                                                                     optional<Tensor> bias_ih, optional<Tensor> bias_hh,
                                                                     optional<Tensor> weight_hr,
                                                                     optional<Tensor> lengths, optional<Tensor> resets,
                                                                     std::string cell, bool reverse, bool save_states) {
  STD_TORCH_CHECK(!weight_hr.has_value(), "weight_hr is given, expected None: projections have no CUDA kernel");
  const CudaCall call("recurrent_forward", input);
  RecurrentInputs inputs{input,   h0,        c0,      weight_ih, weight_hh, bias_ih,
                         bias_hh, weight_hr, lengths, resets,    cell,      reverse};
  inputs.make_contiguous();
  RecurrentForwardStepsParams params;
  fill_steps(params, inputs);
  const ScalarType type = input.scalar_type();
  const bool is_lstm = params.cell == RecurrentCell::lstm;
  const int64_t saved = save_states ? saved_gates_of(params.cell) * params.hidden : 0;
  Tensor output = steps_tensor(inputs, params.hidden, type);
  Tensor h_n = states_tensor(inputs);
  Tensor c_n = is_lstm ? states_tensor(inputs) : no_elements(type, input);
  Tensor gates = save_states ? steps_tensor(inputs, saved, type) : no_elements(type, input);
  Tensor cells = save_states && is_lstm ? steps_tensor(inputs, params.hidden, ScalarType::Float)
                                        : no_elements(ScalarType::Float, input);
  const Tensor from_input = product(rows_of(inputs.input), transposed(inputs.weight_ih));
  params.from_input = from_input.data_ptr();
  params.weight_hh = inputs.weight_hh.data_ptr();
  params.bias_ih = data_or_null(inputs.bias_ih);
  params.bias_hh = data_or_null(inputs.bias_hh);
  params.output = output.data_ptr();
  params.h_n = h_n.data_ptr();
  params.c_n = c_n.data_ptr();
  params.gates = gates.numel() > 0 ? gates.data_ptr() : nullptr;
  params.cells = cells.numel() > 0 ? static_cast<float*>(cells.data_ptr()) : nullptr;
  int64_t bytes = 0;
  call.check(fusewright_cuda_recurrent_forward_workspace(&params, &bytes));
  const Tensor workspace = workspace_of(bytes, input);
  call.check(fusewright_cuda_recurrent_forward(&params, workspace.data_ptr(), call.stream()));
  return {output, h_n, c_n, gates, cells};
}

// The input with zeros for what no sample takes, as it may be NaN there.
Tensor taken_input(const RecurrentInputs& inputs, const CudaCall& call) {
  if (!inputs.lengths.has_value()) return inputs.input;
  const Tensor input = torch::stable::contiguous(inputs.input);
  Tensor taken = torch::stable::empty_like(input);
  call.check(fusewright_cuda_recurrent_taken_rows(
      input.data_ptr(), static_cast<const int64_t*>(inputs.lengths->data_ptr()), taken.data_ptr(), input.size(0),
      input.size(1), input.size(2), call.stream()));
  return taken;
}

Tensor sum_of_rows(const Tensor& rows, ScalarType type) {
  const int64_t along[1] = {0};
  return torch::stable::to(
      torch::stable::sum(rows, torch::headeronly::IntHeaderOnlyArrayRef(along, 1), false, ScalarType::Float), type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_backward(
    optional<Tensor> grad_output, optional<Tensor> grad_h_n, optional<Tensor> grad_c_n, Tensor output, Tensor gates,
    Tensor cells, Tensor input, Tensor h0, optional<Tensor> c0, Tensor weight_ih, Tensor weight_hh,
    optional<Tensor> bias_ih, optional<Tensor> bias_hh, optional<Tensor> weight_hr, optional<Tensor> lengths,
    optional<Tensor> resets, std::string cell, bool reverse, bool need_input, bool need_states, bool need_weights) {
  STD_TORCH_CHECK(!weight_hr.has_value(), "weight_hr is given, expected None: projections have no CUDA kernel");
  const CudaCall call("recurrent_backward", input);
  RecurrentInputs inputs{input,   h0,        c0,      weight_ih, weight_hh, bias_ih,
                         bias_hh, weight_hr, lengths, resets,    cell,      reverse};
  inputs.make_contiguous();
  for (optional<Tensor>* tensor : {&grad_output, &grad_h_n, &grad_c_n}) {
    if (tensor->has_value()) *tensor = torch::stable::contiguous(**tensor);
  }
  output = torch::stable::contiguous(output);
  gates = torch::stable::contiguous(gates);
  cells = torch::stable::contiguous(cells);
  RecurrentBackwardStepsParams params;
  fill_steps(params, inputs);
  const ScalarType type = input.scalar_type();
  const int64_t gate_columns = gates_of(params.cell) * params.hidden;
  Tensor grad_h0 = need_states ? states_tensor(inputs) : no_elements(type, input);
  Tensor grad_c0 = need_states && c0.has_value() ? states_tensor(inputs) : no_elements(type, input);
  const Tensor grad_gates = steps_tensor(inputs, gradient_columns(params.cell) * params.hidden, type);
  const Tensor hidden_before = need_weights ? steps_tensor(inputs, params.hidden, type) : no_elements(type, input);
  const Tensor weight = torch::stable::contiguous(transposed(inputs.weight_hh));
  params.weight_hh_transposed = weight.data_ptr();
  params.output = output.data_ptr();
  params.gates = gates.data_ptr();
  params.cells = static_cast<const float*>(cells.data_ptr());
  params.grad_output = data_or_null(grad_output);
  params.grad_h_n = data_or_null(grad_h_n);
  params.grad_c_n = data_or_null(grad_c_n);
  params.grad_h0 = need_states ? grad_h0.data_ptr() : nullptr;
  params.grad_c0 = need_states ? grad_c0.data_ptr() : nullptr;
  params.grad_gates = grad_gates.data_ptr();
  params.hidden_before = need_weights ? hidden_before.data_ptr() : nullptr;
  int64_t bytes = 0;
  call.check(fusewright_cuda_recurrent_backward_workspace(&params, &bytes));
  const Tensor workspace = workspace_of(bytes, input);
  call.check(fusewright_cuda_recurrent_backward(&params, workspace.data_ptr(), call.stream()));
  // The GRU's gate gradients differ by the side that they reach.
  const Tensor rows = rows_of(grad_gates);
  const Tensor of_hidden = torch::stable::narrow(const_cast<Tensor&>(rows), 1, 0, gate_columns);
  const int64_t input_side = params.cell == RecurrentCell::gru ? gate_columns : 0;
  const Tensor of_input = torch::stable::narrow(const_cast<Tensor&>(rows), 1, input_side, gate_columns);
  Tensor grad_input = no_elements(type, input);
  Tensor grad_weight_ih = no_elements(type, input), grad_weight_hh = no_elements(type, input);
  Tensor grad_bias_ih = no_elements(type, input), grad_bias_hh = no_elements(type, input);
  if (need_input) {
    grad_input =
        torch::stable::reshape(product(of_input, inputs.weight_ih), {params.time, params.batch, inputs.input.size(2)});
  }
  if (need_weights) {
    grad_weight_ih = product(transposed(of_input), rows_of(taken_input(inputs, call)));
    grad_weight_hh = product(transposed(of_hidden), rows_of(hidden_before));
    if (bias_ih.has_value()) {
      grad_bias_ih = sum_of_rows(of_input, type);
      grad_bias_hh = sum_of_rows(of_hidden, type);
    }
  }
  return {grad_input,     grad_h0,      grad_c0,      grad_weight_ih,
          grad_weight_hh, grad_bias_ih, grad_bias_hh, no_elements(type, input)};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("recurrent_forward.cuda", TORCH_BOX(&fusewright::ops::recurrent_forward));
  library.impl("recurrent_backward.cuda", TORCH_BOX(&fusewright::ops::recurrent_backward));
}
