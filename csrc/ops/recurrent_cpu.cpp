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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(
    Tensor input, Tensor h0, optional<Tensor> c0, Tensor weight_ih, Tensor weight_hh, optional<Tensor> bias_ih,
    optional<Tensor> bias_hh, optional<Tensor> weight_hr, optional<Tensor> lengths, optional<Tensor> resets,
    std::string cell, bool reverse, bool save_states) {
  RecurrentInputs inputs{input,   h0,        c0,      weight_ih, weight_hh, bias_ih,
                         bias_hh, weight_hr, lengths, resets,    cell,      reverse};
  STD_TORCH_CHECK(!weight_hr.has_value(), "weight_hr is given, expected None: projections have no compiled kernel");
  inputs.make_contiguous();
  const RecurrentWalk walk(inputs, reverse);
  RecurrentForwardParams params;
  fill(params, inputs, walk);
  const int64_t time = input.size(0), batch = params.batch, hidden = params.hidden;
  const ScalarType type = input.scalar_type();
  const bool is_lstm = params.cell == RecurrentCell::lstm;
  const int64_t output_sizes[3] = {time, batch, hidden}, state_sizes[2] = {batch, hidden};
  const int64_t gate_sizes[3] = {time, batch, saved_gates_of(params.cell) * hidden};
  Tensor output = empty(output_sizes, 3, type, input);
  Tensor h_n = empty(state_sizes, 2, type, input);
  Tensor c_n = is_lstm ? empty(state_sizes, 2, type, input) : no_elements(type, input);
  Tensor gates = save_states ? empty(gate_sizes, 3, type, input) : no_elements(type, input);
  Tensor cells = save_states && is_lstm ? empty(output_sizes, 3, ScalarType::Float, input)
                                        : no_elements(ScalarType::Float, input);
  if (walk.rows < time * batch) clear(output);
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
      static_cast<double>(batch) * static_cast<double>(gates_of(params.cell) * hidden * (hidden + params.inputs));
  run_team(wanted_members(params, multiply_adds), [&](Team& team, int64_t member) {
    const Scratch own(kernels.recurrent_forward_scratch(params, member, team.size()));
    kernels.recurrent_forward(params, team, member, own.data());
  });
  return {output, h_n, c_n, gates, cells};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("recurrent_forward.cpu", TORCH_BOX(&fusewright::ops::recurrent_forward));
}
