// CPU kernels of the recurrent ops, attached to the schemas of fusewright_kernels/library/recurrent.py.

#include <torch/csrc/stable/library.h>

#include "recurrent_passes.h"
#include "recurrent_team.h"
#include "worker.h"

namespace fusewright::ops {
namespace {

using Directions = std::vector<RecurrentInputs>;

// Sizes with the number of directions in front where there are two.
Tensor empty_of(int64_t directions, std::vector<int64_t> sizes, ScalarType type, const Tensor& like) {
  if (directions == 2) sizes.insert(sizes.begin(), 2);
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), type, like);
}

ForwardResults run_forward(const Directions& directions, bool save_states) {
  const RecurrentInputs& first = directions[0];
  const Tensor& input = first.input;
  const RecurrentCell cell = cell_of(first.cell);
  const int64_t count = static_cast<int64_t>(directions.size()), time = input.size(0), batch = input.size(1);
  const int64_t hidden = first.weight_hh.size(0) / gates_of(cell), state = first.weight_hh.size(1);
  const ScalarType type = input.scalar_type();
  const bool is_lstm = cell == RecurrentCell::lstm;
  const int64_t output_sizes[3] = {time, batch, count * state};
  const ForwardResults results{empty(output_sizes, 3, type, input), empty_of(count, {batch, state}, type, input),
                               is_lstm ? empty_of(count, {batch, hidden}, type, input) : no_elements(type, input),
                               save_states ? empty_of(count, {time, batch, saved_gates_of(cell) * hidden}, type, input)
                                           : no_elements(type, input),
                               save_states && is_lstm ? empty_of(count, {time, batch, hidden}, ScalarType::Float, input)
                                                      : no_elements(ScalarType::Float, input)};
  std::vector<ForwardPass> passes;
  passes.reserve(count);
  for (int64_t d = 0; d < count; ++d) passes.emplace_back(directions[d], results, d, count);
  if (batch == 0) return results;
  const CpuKernels& kernels = cpu_kernels();
  const double multiply_adds =
      static_cast<double>(batch) * static_cast<double>(gates_of(cell) * hidden * (state + input.size(2)));
  run_passes(passes, multiply_adds, Team::most_members, [&](ForwardPass& pass, Team& team, int64_t member) {
    const Scratch own(kernels.recurrent_forward_scratch(pass.params, member, team.size()));
    kernels.recurrent_forward(pass.params, team, member, own.data());
  });
  return results;
}

void run_steps(std::vector<BackwardPass>& passes) {
  const CpuKernels& kernels = cpu_kernels();
  const RecurrentParams& params = passes[0].params;
  const double multiply_adds =
      static_cast<double>(params.batch) * static_cast<double>(gates_of(params.cell) * params.hidden * params.state);
  const int64_t most_members = params.single_step() ? 1 : Team::most_members;
  run_passes(passes, multiply_adds, most_members, [&](BackwardPass& pass, Team& team, int64_t member) {
    const Scratch own(kernels.recurrent_backward_scratch(pass.params, member, team.size()));
    kernels.recurrent_backward(pass.params, team, member, own.data());
  });
}

// What a backward returns: gradients of the input, of the first states, and of each direction's five parameters.
struct BackwardResults {
  Tensor input, h0, c0;
  std::vector<std::array<Tensor, 5>> parameters;
};

BackwardResults run_backward(const Directions& directions, BackwardArguments& arguments) {
  arguments.make_contiguous();
  const RecurrentInputs& first = directions[0];
  const int64_t count = static_cast<int64_t>(directions.size()), batch = first.input.size(1);
  const ScalarType type = first.input.scalar_type();
  const auto nothing = [&] { return no_elements(type, first.input); };
  const auto state_gradient = [&](const optional<Tensor>& state) {
    if (!arguments.need_states || !state.has_value()) return nothing();
    return empty_of(count, {batch, state->size(1)}, type, first.input);
  };
  BackwardResults results{nothing(), state_gradient(first.h0), state_gradient(first.c0), {}};
  std::vector<BackwardPass> passes;
  passes.reserve(count);
  for (int64_t d = 0; d < count; ++d) passes.emplace_back(directions[d], arguments, results.h0, results.c0, d, count);
  if (batch == 0) {
    for (const BackwardPass& pass : passes) clear(pass.bias_sums);
  } else {
    run_steps(passes);
    if (arguments.need_states && passes[0].params.single_step() && passes[0].params.rows > 0) {
      for (BackwardPass& pass : passes) pass.multiply_hidden_gradients();
      run_steps(passes);
    }
  }
  if (arguments.need_input) {
    results.input = passes[0].grad_input();
    // There is no add in the stable interface.
    if (count == 2) results.input = torch::stable::subtract(results.input, passes[1].grad_input(), -1.0);
  }
  for (const BackwardPass& pass : passes) {
    if (arguments.need_weights) {
      results.parameters.push_back({pass.grad_weight_ih(), pass.grad_weight_hh(), pass.grad_bias_ih(),
                                    pass.grad_bias_hh(), pass.grad_weight_hr()});
    } else {
      results.parameters.push_back({nothing(), nothing(), nothing(), nothing(), nothing()});
    }
  }
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(Tensor input, Tensor h0, optional<Tensor> c0,
                                                                     Tensor weight_ih, Tensor weight_hh,
                                                                     optional<Tensor> bias_ih, optional<Tensor> bias_hh,
                                                                     optional<Tensor> weight_hr,
                                                                     optional<Tensor> lengths, optional<Tensor> resets,
                                                                     std::string cell, bool reverse, bool save_states) {
  Directions directions{
      {input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, resets, cell, reverse}};
  directions[0].make_contiguous();
  const ForwardResults results = run_forward(directions, save_states);
  return {results.output, results.h_n, results.c_n, results.gates, results.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_backward(
    optional<Tensor> grad_output, optional<Tensor> grad_h_n, optional<Tensor> grad_c_n, Tensor output, Tensor gates,
    Tensor cells, Tensor input, Tensor h0, optional<Tensor> c0, Tensor weight_ih, Tensor weight_hh,
    optional<Tensor> bias_ih, optional<Tensor> bias_hh, optional<Tensor> weight_hr, optional<Tensor> lengths,
    optional<Tensor> resets, std::string cell, bool reverse, bool need_input, bool need_states, bool need_weights) {
  Directions directions{
      {input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, resets, cell, reverse}};
  directions[0].make_contiguous();
  BackwardArguments arguments{grad_output, grad_h_n,   grad_c_n,    output,      gates,
                              cells,       need_input, need_states, need_weights};
  const BackwardResults results = run_backward(directions, arguments);
  const auto& [d_ih, d_hh, d_bias_ih, d_bias_hh, d_hr] = results.parameters[0];
  return {results.input, results.h0, results.c0, d_ih, d_hh, d_bias_ih, d_bias_hh, d_hr};
}

// The inputs of both directions: `forward` with the states of both, and the other's parameters.
Directions both_directions(RecurrentInputs forward, const std::array<optional<Tensor>, 5>& parameters) {
  forward.make_contiguous();
  RecurrentInputs backward = forward;
  const auto [weight_ih, weight_hh, bias_ih, bias_hh, weight_hr] = parameters;
  backward.weight_ih = *weight_ih;
  backward.weight_hh = *weight_hh;
  backward.bias_ih = bias_ih;
  backward.bias_hh = bias_hh;
  backward.weight_hr = weight_hr;
  backward.reverse = true;
  backward.make_contiguous();
  const auto pick = [](RecurrentInputs& inputs, int64_t direction) {
    inputs.h0 = torch::stable::select(inputs.h0, 0, direction);
    if (inputs.c0.has_value()) inputs.c0 = torch::stable::select(*inputs.c0, 0, direction);
  };
  pick(forward, 0);
  pick(backward, 1);
  return {forward, backward};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_forward(
    Tensor input, Tensor h0, optional<Tensor> c0, Tensor weight_ih, Tensor weight_hh, optional<Tensor> bias_ih,
    optional<Tensor> bias_hh, optional<Tensor> weight_hr, Tensor weight_ih_reverse, Tensor weight_hh_reverse,
    optional<Tensor> bias_ih_reverse, optional<Tensor> bias_hh_reverse, optional<Tensor> weight_hr_reverse,
    optional<Tensor> lengths, optional<Tensor> resets, std::string cell, bool save_states) {
  const Directions directions =
      both_directions({input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, resets, cell, false},
                      {weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse, weight_hr_reverse});
  const ForwardResults results = run_forward(directions, save_states);
  return {results.output, results.h_n, results.c_n, results.gates, results.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
bidirectional_backward(optional<Tensor> grad_output, optional<Tensor> grad_h_n, optional<Tensor> grad_c_n,
                       Tensor output, Tensor gates, Tensor cells, Tensor input, Tensor h0, optional<Tensor> c0,
                       Tensor weight_ih, Tensor weight_hh, optional<Tensor> bias_ih, optional<Tensor> bias_hh,
                       optional<Tensor> weight_hr, Tensor weight_ih_reverse, Tensor weight_hh_reverse,
                       optional<Tensor> bias_ih_reverse, optional<Tensor> bias_hh_reverse,
                       optional<Tensor> weight_hr_reverse, optional<Tensor> lengths, optional<Tensor> resets,
                       std::string cell, bool need_input, bool need_states, bool need_weights) {
  const Directions directions =
      both_directions({input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, resets, cell, false},
                      {weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse, weight_hr_reverse});
  BackwardArguments arguments{grad_output, grad_h_n,   grad_c_n,    output,      gates,
                              cells,       need_input, need_states, need_weights};
  const BackwardResults results = run_backward(directions, arguments);
  const auto& [a, b, c, d, e] = results.parameters[0];
  const auto& [a_reverse, b_reverse, c_reverse, d_reverse, e_reverse] = results.parameters[1];
  return {results.input, results.h0, results.c0, a, b, c, d, e, a_reverse, b_reverse, c_reverse, d_reverse, e_reverse};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("recurrent_forward.cpu", TORCH_BOX(&fusewright::ops::recurrent_forward));
  library.impl("recurrent_backward.cpu", TORCH_BOX(&fusewright::ops::recurrent_backward));
  library.impl("bidirectional_forward.cpu", TORCH_BOX(&fusewright::ops::bidirectional_forward));
  library.impl("bidirectional_backward.cpu", TORCH_BOX(&fusewright::ops::bidirectional_backward));
}
