// One direction of a recurrent layer, forward and backward: its tensors, and what its kernels are told of them.
//
// A layer with two directions has one tensor of each kind for both, with the direction in front, but for its output,
// where they lie next to each other.
#pragma once

#include "recurrent_rows.h"

namespace fusewright::ops {

using std::optional;

struct ForwardResults {
  Tensor output, h_n, c_n, gates, cells;
};

struct BackwardArguments {
  optional<Tensor> grad_output, grad_h_n, grad_c_n;
  Tensor output, gates, cells;
  bool need_input, need_states, need_weights;

  void make_contiguous() {
    for (optional<Tensor>* tensor : {&grad_output, &grad_h_n, &grad_c_n}) {
      if (tensor->has_value()) *tensor = torch::stable::contiguous(**tensor);
    }
    for (Tensor* tensor : {&output, &gates, &cells}) *tensor = torch::stable::contiguous(*tensor);
  }
};

// Where the part of one of `directions` begins; nullptr if there is nothing.
inline void* part_of(const Tensor& tensor, int64_t direction, int64_t directions) {
  if (tensor.numel() == 0) return nullptr;
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  return static_cast<char*>(tensor.data_ptr()) + bytes / directions * direction;
}
inline const void* part_of(const optional<Tensor>& tensor, int64_t direction, int64_t directions) {
  return tensor.has_value() ? part_of(*tensor, direction, directions) : nullptr;
}

// The same of a tensor by rows in which the directions lie next to each other.
inline void* columns_of(const Tensor& tensor, int64_t direction, int64_t directions) {
  const int64_t bytes = tensor.size(2) * static_cast<int64_t>(tensor.element_size());
  return static_cast<char*>(tensor.data_ptr()) + bytes / directions * direction;
}

struct ForwardPass {
  RecurrentInputs inputs;
  RecurrentWalk walk;
  RecurrentForwardParams params;
  Tensor shared;  // memory of the whole team

  ForwardPass(const RecurrentInputs& given, const ForwardResults& results, int64_t direction, int64_t directions)
      : inputs(given), walk(inputs, inputs.reverse) {
    fill(params, inputs, walk);
    params.output_stride = directions * params.state;
    params.output = columns_of(results.output, direction, directions);
    params.h_n = part_of(results.h_n, direction, directions);
    params.c_n = part_of(results.c_n, direction, directions);
    params.gates = part_of(results.gates, direction, directions);
    params.cells = static_cast<float*>(part_of(results.cells, direction, directions));
    const int64_t floats = (cpu_kernels().recurrent_forward_shared(params) + 3) / 4;
    shared = empty(&floats, 1, ScalarType::Float, inputs.input);
    params.shared = shared.data_ptr();
    const int64_t element = static_cast<int64_t>(inputs.input.element_size());
    // Those of all directions at once, as they lie in one row.
    if (direction == 0) clear_behind_ends(params, params.output, params.output_stride * element);
    clear_behind_ends(params, params.gates, saved_gates_of(params.cell) * params.hidden * element);
    clear_behind_ends(params, params.cells, params.hidden * static_cast<int64_t>(sizeof(float)));
  }
};

struct BackwardPass {
  RecurrentInputs inputs;
  RecurrentWalk walk;
  RecurrentBackwardParams params;
  Tensor grad_gates, bias_sums, grad_states, unprojected, carry, hidden_gradients;

  BackwardPass(const RecurrentInputs& given, const BackwardArguments& arguments, const Tensor& grad_h0,
               const Tensor& grad_c0, int64_t direction, int64_t directions)
      : inputs(given), walk(inputs, inputs.reverse) {
    fill(params, inputs, walk);
    params.output_stride = directions * params.state;
    params.output = columns_of(arguments.output, direction, directions);
    params.gates = part_of(arguments.gates, direction, directions);
    params.cells = static_cast<const float*>(part_of(arguments.cells, direction, directions));
    params.grad_output =
        arguments.grad_output.has_value() ? columns_of(*arguments.grad_output, direction, directions) : nullptr;
    params.grad_h_n = part_of(arguments.grad_h_n, direction, directions);
    params.grad_c_n = part_of(arguments.grad_c_n, direction, directions);
    params.grad_h0 = part_of(grad_h0, direction, directions);
    params.grad_c0 = part_of(grad_c0, direction, directions);
    const Tensor& like = inputs.input;
    grad_gates = gradient_rows(gradient_columns(params.cell) * params.hidden);
    params.grad_gates = grad_gates.data_ptr();
    params.grad_gates_stride = grad_gates.size(1);
    const int64_t bias_size = gradient_columns(params.cell) * params.hidden;
    bias_sums = empty(&bias_size, 1, ScalarType::Float, like);
    params.bias_sums = static_cast<float*>(bias_sums.data_ptr());
    params.grad_states = params.unprojected = nullptr;
    params.grad_states_stride = 0;
    if (params.projected()) {
      grad_states = gradient_rows(params.state);
      params.grad_states = grad_states.data_ptr();
      params.grad_states_stride = grad_states.size(1);
      if (arguments.need_weights) {
        const int64_t sizes[2] = {walk.rows, params.hidden};
        unprojected = empty(sizes, 2, grad_gates.scalar_type(), like);
        params.unprojected = unprojected.data_ptr();
      }
    }
    params.carry_stride = (params.hidden + 15) / 16 * 16;
    const int64_t carry_sizes[2] = {params.batch, params.carry_stride};
    carry = empty(carry_sizes, 2, ScalarType::Float, like);
    params.carry = static_cast<float*>(carry.data_ptr());
    params.hidden_gradients = nullptr;
  }

  // Gate gradients as the hidden state and as the input reaches them.
  Tensor of_hidden() const { return columns(rows(grad_gates), 0, gate_columns()); }
  Tensor of_input() const {
    return columns(rows(grad_gates), params.cell == RecurrentCell::gru ? gate_columns() : 0, gate_columns());
  }

  // Lets the next run finish the gradients of the first states, for a single step.
  void multiply_hidden_gradients() {
    hidden_gradients = product(of_hidden(), inputs.weight_hh);
    params.hidden_gradients = hidden_gradients.data_ptr();
  }

  Tensor grad_input() const {
    const Tensor of_rows = product(of_input(), inputs.weight_ih);
    return input_gradient(params, inputs, as_type(of_rows, inputs.input.scalar_type()));
  }

  Tensor grad_weight_ih() const {
    return product_over_rows(of_input(), input_rows(params, inputs), inputs.input.scalar_type());
  }
  Tensor grad_weight_hh() const {
    return product_over_rows(of_hidden(), hidden_before(params, inputs.input), inputs.input.scalar_type());
  }
  Tensor grad_weight_hr() const {
    if (!params.projected()) return no_elements(inputs.input.scalar_type(), inputs.input);
    return product_over_rows(columns(rows(grad_states), 0, params.state), unprojected, inputs.input.scalar_type());
  }
  Tensor grad_bias_ih() const { return grad_bias(params.cell == RecurrentCell::gru ? gate_columns() : 0); }
  Tensor grad_bias_hh() const { return grad_bias(0); }

 private:
  int64_t gate_columns() const { return gates_of(params.cell) * params.hidden; }

  // Rows of gradients that products read, which do so some rows behind the last.
  Tensor gradient_rows(int64_t columns) const {
    constexpr int64_t rows_read_behind = 15;
    const CpuKernels& kernels = cpu_kernels();
    const bool in_bfloat16 = kernels.recurrent_gradient_type(params.dtype) == DataType::bfloat16;
    const int64_t sizes[2] = {walk.rows + rows_read_behind, kernels.recurrent_gradient_stride(params.dtype, columns)};
    return empty(sizes, 2, in_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float, inputs.input);
  }

  Tensor rows(Tensor gradients) const { return torch::stable::narrow(gradients, 0, 0, walk.rows); }

  Tensor grad_bias(int64_t first) const {
    const ScalarType type = inputs.input.scalar_type();
    if (!inputs.bias_ih.has_value()) return no_elements(type, inputs.input);
    return torch::stable::clone(as_type(columns_of_bias(first), type));
  }
  Tensor columns_of_bias(int64_t first) const {
    Tensor sums = bias_sums;
    return torch::stable::narrow(sums, 0, first, gate_columns());
  }
};

}  // namespace fusewright::ops
