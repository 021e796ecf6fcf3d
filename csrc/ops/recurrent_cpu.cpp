// CPU kernels of the recurrent ops, attached to the schemas of fusewright_kernels/library/recurrent.py.

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "parallel.h"
#include "recurrent_params.h"
#include "worker.h"

namespace fusewright::ops {
namespace {

using std::optional;

// A step of less work than this for every member takes less time than waiting for the others.
constexpr double multiply_adds_per_member = 3e4;

// Threads that a layer of `multiply_adds` for one step keeps busy.
int64_t wanted_members(const RecurrentParams& params, double multiply_adds) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t by_work = static_cast<int64_t>(multiply_adds / multiply_adds_per_member);
  // Fewer units than this for a member leave most lanes empty.
  const int64_t by_units = params.hidden / 16;
  return std::max<int64_t>(1, std::min({threads, by_work, by_units, Team::most_members}));
}

// Calls body(team, member) on up to `members` threads at once.
template <class Body>
void run_team(int64_t members, const Body& body) {
  Team team(members);
  const auto take_part = [&](int64_t, int64_t) {
    const int64_t member = team.join();
    if (member >= 0) body(team, member);
  };
  if (members == 1) return take_part(0, 1);
  torch::stable::parallel_for(0, members, 1, take_part);
}

// Memory of a whole team. Scratch of one thread, which its calls share, is each member's own.
Tensor shared_scratch(int64_t bytes, const Tensor& like) {
  const int64_t floats = (bytes + 3) / 4;
  return empty(&floats, 1, ScalarType::Float, like);
}

void clear(const Tensor& tensor) {
  std::memset(tensor.data_ptr(), 0, tensor.numel() * static_cast<int64_t>(tensor.element_size()));
}

// Zeros the rows of a (T, B, ...) tensor at steps that samples do not take.
void clear_behind_ends(const RecurrentParams& params, const Tensor& tensor) {
  if (tensor.numel() == 0 || params.rows == tensor.size(0) * params.batch) return;
  const int64_t time = tensor.size(0), row_bytes = tensor.size(2) * static_cast<int64_t>(tensor.element_size());
  char* const data = static_cast<char*>(tensor.data_ptr());
  for (int64_t p = 0; p < params.batch; ++p) {
    for (int64_t t = params.lengths[p]; t < time; ++t) {
      std::memset(data + (t * params.batch + params.samples[p]) * row_bytes, 0, row_bytes);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(Tensor input, Tensor h0, optional<Tensor> c0,
                                                                     Tensor weight_ih, Tensor weight_hh,
                                                                     optional<Tensor> bias_ih, optional<Tensor> bias_hh,
                                                                     optional<Tensor> weight_hr,
                                                                     optional<Tensor> lengths, optional<Tensor> resets,
                                                                     std::string cell, bool reverse, bool save_states) {
  RecurrentInputs inputs{input,   h0,        c0,      weight_ih, weight_hh, bias_ih,
                         bias_hh, weight_hr, lengths, resets,    cell,      reverse};
  inputs.make_contiguous();
  const RecurrentWalk walk(inputs, reverse);
  RecurrentForwardParams params;
  fill(params, inputs, walk);
  const int64_t time = input.size(0), batch = params.batch, hidden = params.hidden;
  const ScalarType type = input.scalar_type();
  const bool is_lstm = params.cell == RecurrentCell::lstm;
  const int64_t output_sizes[3] = {time, batch, params.state}, state_sizes[2] = {batch, params.state};
  const int64_t cells_sizes[3] = {time, batch, hidden}, cell_sizes[2] = {batch, hidden};
  const int64_t gate_sizes[3] = {time, batch, saved_gates_of(params.cell) * hidden};
  Tensor output = empty(output_sizes, 3, type, input);
  Tensor h_n = empty(state_sizes, 2, type, input);
  Tensor c_n = is_lstm ? empty(cell_sizes, 2, type, input) : no_elements(type, input);
  Tensor gates = save_states ? empty(gate_sizes, 3, type, input) : no_elements(type, input);
  Tensor cells =
      save_states && is_lstm ? empty(cells_sizes, 3, ScalarType::Float, input) : no_elements(ScalarType::Float, input);
  for (const Tensor& tensor : {output, gates, cells}) clear_behind_ends(params, tensor);
  params.output = output.data_ptr();
  params.h_n = h_n.data_ptr();
  params.c_n = c_n.data_ptr();
  params.gates = gates.numel() > 0 ? gates.data_ptr() : nullptr;
  params.cells = cells.numel() > 0 ? static_cast<float*>(cells.data_ptr()) : nullptr;
  if (batch == 0) return {output, h_n, c_n, gates, cells};
  const CpuKernels& kernels = cpu_kernels();
  const Tensor shared = shared_scratch(kernels.recurrent_forward_shared(params), input);
  params.shared = shared.data_ptr();
  const double multiply_adds =
      static_cast<double>(batch) * static_cast<double>(gates_of(params.cell) * hidden * (params.state + params.inputs));
  run_team(wanted_members(params, multiply_adds), [&](Team& team, int64_t member) {
    const Scratch own(kernels.recurrent_forward_scratch(params, member, team.size()));
    kernels.recurrent_forward(params, team, member, own.data());
  });
  return {output, h_n, c_n, gates, cells};
}

// Rows of `width` elements of `like`'s type, one for each row of the walk: source(step, position) is where to copy it
// from, or nullptr for zeros.
template <class Source>
Tensor gather_rows(const RecurrentParams& params, int64_t width, const Tensor& like, const Source& source) {
  const int64_t sizes[2] = {params.rows, width};
  Tensor gathered = empty(sizes, 2, like.scalar_type(), like);
  char* const target = static_cast<char*>(gathered.data_ptr());
  const int64_t row_bytes = width * static_cast<int64_t>(like.element_size());
  parallel_rows(params.steps, params.batch * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      for (int64_t p = 0; p < params.active[step]; ++p) {
        char* row = target + (params.first_row[step] + p) * row_bytes;
        if (const void* from = source(step, p)) {
          std::memcpy(row, from, row_bytes);
        } else {
          std::memset(row, 0, row_bytes);
        }
      }
    }
  });
  return gathered;
}

const void* row_of(const void* data, int64_t row, int64_t row_bytes) {
  return static_cast<const char*>(data) + row * row_bytes;
}

// The hidden state that each row's step began with.
Tensor hidden_before(const RecurrentParams& params, const Tensor& output) {
  const int64_t row_bytes = params.state * static_cast<int64_t>(output.element_size());
  return gather_rows(params, params.state, output, [&](int64_t step, int64_t p) -> const void* {
    if (params.reset_before(step, p)) return nullptr;
    if (step == 0) return row_of(params.h0, params.samples[p], row_bytes);
    return row_of(output.data_ptr(), params.tensor_row(step - 1, p), row_bytes);
  });
}

// The input of each row.
Tensor input_rows(const RecurrentParams& params, const RecurrentInputs& inputs) {
  if (!inputs.lengths.has_value()) {
    return torch::stable::reshape(inputs.input, {params.rows, params.inputs});
  }
  const int64_t element = static_cast<int64_t>(inputs.input.element_size());
  return gather_rows(params, params.inputs, inputs.input, [&](int64_t step, int64_t p) {
    const int64_t at =
        params.time_of(step, p) * params.input_time_stride + params.samples[p] * params.input_sample_stride;
    return row_of(params.input, at, element);
  });
}

Tensor columns(Tensor tensor, int64_t first, int64_t count) { return torch::stable::narrow(tensor, 1, first, count); }

Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// In the type of the factors, whatever a surrounding autocast would make of them.
Tensor product(const Tensor& left, const Tensor& right) {
  return as_type(torch::stable::matmul(left, as_type(right, left.scalar_type())), left.scalar_type());
}

// The sums over rows of `left` by `right`, in the type of the parameter. In float32 by a kernel of our own: torch's
// adds up the rows one by one, which over 340 of them is 5.4u off where a layer that adds up its steps is 2.5u off.
Tensor product_over_rows(const Tensor& left, const Tensor& right, ScalarType type) {
  const Tensor factor = torch::stable::contiguous(as_type(right, left.scalar_type()));
  const int64_t rows = left.size(0), width = left.size(1);
  constexpr int64_t few_rows = 128;
  if (left.scalar_type() != ScalarType::Float || rows <= few_rows) {
    return as_type(product(torch::stable::transpose(left, 0, 1), factor), type);
  }
  const int64_t sizes[2] = {width, factor.size(1)};
  Tensor sums = empty(sizes, 2, ScalarType::Float, left);
  const TransposedProductParams params{rows,
                                       static_cast<const float*>(left.data_ptr()),
                                       left.stride(0),
                                       static_cast<const float*>(factor.data_ptr()),
                                       factor.size(1),
                                       factor.size(1),
                                       static_cast<float*>(sums.data_ptr())};
  const CpuKernels& kernels = cpu_kernels();
  constexpr int64_t block = 48;
  parallel_rows((width + block - 1) / block, block * rows * factor.size(1), [&](int64_t begin, int64_t end) {
    kernels.transposed_product(params, begin * block, std::min(end * block, width));
  });
  return as_type(sums, type);
}

void run_backward(const RecurrentBackwardParams& params) {
  const CpuKernels& kernels = cpu_kernels();
  const double multiply_adds =
      static_cast<double>(params.batch) * static_cast<double>(gates_of(params.cell) * params.hidden * params.state);
  run_team(params.single_step() ? 1 : wanted_members(params, multiply_adds), [&](Team& team, int64_t member) {
    const Scratch own(kernels.recurrent_backward_scratch(params, member, team.size()));
    kernels.recurrent_backward(params, team, member, own.data());
  });
}

// The gradient of the input from that of its rows.
Tensor input_gradient(const RecurrentParams& params, const RecurrentInputs& inputs, const Tensor& rows) {
  const int64_t time = inputs.input.size(0);
  if (!inputs.lengths.has_value()) return torch::stable::reshape(rows, {time, params.batch, params.inputs});
  const int64_t sizes[3] = {time, params.batch, params.inputs};
  Tensor gradient = empty(sizes, 3, rows.scalar_type(), rows);
  clear(gradient);
  const int64_t row_bytes = params.inputs * static_cast<int64_t>(rows.element_size());
  parallel_rows(params.steps, params.batch * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      for (int64_t p = 0; p < params.active[step]; ++p) {
        std::memcpy(static_cast<char*>(gradient.data_ptr()) + params.tensor_row(step, p) * row_bytes,
                    row_of(rows.data_ptr(), params.first_row[step] + p, row_bytes), row_bytes);
      }
    }
  });
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_backward(
    optional<Tensor> grad_output, optional<Tensor> grad_h_n, optional<Tensor> grad_c_n, Tensor output, Tensor gates,
    Tensor cells, Tensor input, Tensor h0, optional<Tensor> c0, Tensor weight_ih, Tensor weight_hh,
    optional<Tensor> bias_ih, optional<Tensor> bias_hh, optional<Tensor> weight_hr, optional<Tensor> lengths,
    optional<Tensor> resets, std::string cell, bool reverse, bool need_input, bool need_states, bool need_weights) {
  RecurrentInputs inputs{input,   h0,        c0,      weight_ih, weight_hh, bias_ih,
                         bias_hh, weight_hr, lengths, resets,    cell,      reverse};
  inputs.make_contiguous();
  for (optional<Tensor>* tensor : {&grad_output, &grad_h_n, &grad_c_n}) {
    if (tensor->has_value()) *tensor = torch::stable::contiguous(**tensor);
  }
  output = torch::stable::contiguous(output);
  gates = torch::stable::contiguous(gates);
  cells = torch::stable::contiguous(cells);
  const RecurrentWalk walk(inputs, reverse);
  RecurrentBackwardParams params;
  fill(params, inputs, walk);
  const ScalarType type = input.scalar_type();
  const CpuKernels& kernels = cpu_kernels();
  const int64_t hidden = params.hidden;
  const bool is_gru = params.cell == RecurrentCell::gru;
  const int64_t state_sizes[2] = {params.batch, params.state}, cell_sizes[2] = {params.batch, hidden};
  Tensor grad_h0 = need_states ? empty(state_sizes, 2, type, input) : no_elements(type, input);
  Tensor grad_c0 = need_states && c0.has_value() ? empty(cell_sizes, 2, type, input) : no_elements(type, input);
  params.output = output.data_ptr();
  params.gates = gates.data_ptr();
  params.cells = static_cast<const float*>(cells.data_ptr());
  params.grad_output = data_or_null(grad_output);
  params.grad_h_n = data_or_null(grad_h_n);
  params.grad_c_n = data_or_null(grad_c_n);
  params.grad_h0 = need_states ? grad_h0.data_ptr() : nullptr;
  params.grad_c0 = need_states ? grad_c0.data_ptr() : nullptr;
  const bool in_bfloat16 = kernels.recurrent_gradient_type(params.dtype) == DataType::bfloat16;
  const ScalarType gradient_type = in_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  const auto gradient_rows = [&](int64_t columns) {
    constexpr int64_t rows_read_behind = 15;
    const int64_t sizes[2] = {walk.rows + rows_read_behind, kernels.recurrent_gradient_stride(params.dtype, columns)};
    return empty(sizes, 2, gradient_type, input);
  };
  Tensor grad_gates = gradient_rows(gradient_columns(params.cell) * hidden);
  Tensor grad_states = params.projected() ? gradient_rows(params.state) : no_elements(gradient_type, input);
  const int64_t unit_sizes[2] = {walk.rows, hidden};
  const bool need_unprojected = need_weights && params.projected();
  Tensor unprojected =
      need_unprojected ? empty(unit_sizes, 2, gradient_type, input) : no_elements(gradient_type, input);
  const int64_t bias_size = gradient_columns(params.cell) * hidden;
  Tensor bias_sums = empty(&bias_size, 1, ScalarType::Float, input);
  params.grad_gates = grad_gates.data_ptr();
  params.grad_gates_stride = grad_gates.size(1);
  params.grad_states = params.projected() ? grad_states.data_ptr() : nullptr;
  params.grad_states_stride = params.projected() ? grad_states.size(1) : 0;
  params.unprojected = need_unprojected ? unprojected.data_ptr() : nullptr;
  params.bias_sums = static_cast<float*>(bias_sums.data_ptr());
  params.carry_stride = (hidden + 15) / 16 * 16;
  const int64_t carry_sizes[2] = {params.batch, params.carry_stride};
  const Tensor carry = empty(carry_sizes, 2, ScalarType::Float, input);
  params.carry = static_cast<float*>(carry.data_ptr());
  params.hidden_gradients = nullptr;
  const int64_t gate_columns = gates_of(params.cell) * hidden;
  const Tensor rows = torch::stable::narrow(grad_gates, 0, 0, walk.rows);
  const Tensor of_hidden = columns(rows, 0, gate_columns);
  const Tensor of_input = columns(rows, is_gru ? gate_columns : 0, gate_columns);
  if (params.batch == 0) {
    clear(bias_sums);
  } else {
    run_backward(params);
    if (need_states && params.single_step() && walk.rows > 0) {
      const Tensor hidden_gradients = product(of_hidden, inputs.weight_hh);
      params.hidden_gradients = hidden_gradients.data_ptr();
      run_backward(params);
    }
  }
  Tensor grad_input = no_elements(type, input);
  Tensor grad_weight_ih = no_elements(type, input), grad_weight_hh = no_elements(type, input);
  Tensor grad_bias_ih = no_elements(type, input), grad_bias_hh = no_elements(type, input);
  Tensor grad_weight_hr = no_elements(type, input);
  if (need_input) {
    grad_input = input_gradient(params, inputs, as_type(product(of_input, inputs.weight_ih), type));
  }
  if (need_weights) {
    grad_weight_ih = product_over_rows(of_input, input_rows(params, inputs), type);
    grad_weight_hh = product_over_rows(of_hidden, hidden_before(params, output), type);
    if (params.projected()) {
      const Tensor of_states = columns(torch::stable::narrow(grad_states, 0, 0, walk.rows), 0, params.state);
      grad_weight_hr = product_over_rows(of_states, unprojected, type);
    }
    if (bias_ih.has_value()) {
      const auto bias = [&](int64_t first) {
        return torch::stable::clone(as_type(torch::stable::narrow(bias_sums, 0, first, gate_columns), type));
      };
      grad_bias_ih = bias(is_gru ? gate_columns : 0);
      grad_bias_hh = bias(0);
    }
  }
  return {grad_input, grad_h0, grad_c0, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("recurrent_forward.cpu", TORCH_BOX(&fusewright::ops::recurrent_forward));
  library.impl("recurrent_backward.cpu", TORCH_BOX(&fusewright::ops::recurrent_backward));
}
