// Drives every CPU kernel from plain threads, split over rows and chunks as the ops split them, for ThreadSanitizer.

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "fusewright/cpu/kernels.h"

namespace {

using fusewright::CpuKernels;
using fusewright::DataType;
using fusewright::RowView;

constexpr int64_t threads = 4;
constexpr int64_t rows = 67, columns = 131;

void in_parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back([=] { body(count * t / threads, count * (t + 1) / threads); });
  }
  for (std::thread& thread : pool) thread.join();
}

RowView matrix(std::vector<float>& values, int64_t row_count) {
  RowView view;
  view.data = values.data();
  view.dtype = DataType::float32;
  view.outer_dims = 1;
  view.outer_size[0] = row_count;
  view.outer_stride[0] = columns;
  view.inner_dims = 1;
  view.inner_size[0] = columns;
  view.inner_stride[0] = 1;
  return view;
}

void run(const CpuKernels& kernels) {
  std::vector<float> input(rows * columns), residual(input), output(input), stream(input), gradient(input);
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i % 17) - 8;
  residual = input;
  const int64_t blocks = (columns + kernels.parameter_block - 1) / kernels.parameter_block;
  const int64_t padded = blocks * kernels.parameter_block;
  std::vector<float> weight(padded, 1.0f), bias(padded, 0.5f), statistics(2 * rows), grad_weight(columns);

  fusewright::NormForwardParams forward;
  forward.rows = rows;
  forward.columns = columns;
  forward.eps = 1e-5;
  forward.input = matrix(input, rows);
  forward.output = output.data();
  forward.statistics = statistics.data();
  for (const bool fused : {false, true}) {
    const int64_t seed = 7;
    if (fused) {
      forward.residual = matrix(residual, rows);
      forward.new_residual = matrix(stream, rows);
      forward.seed = &seed;
      forward.keep_threshold = uint64_t{1} << 30;
      forward.keep_scale = 4.0f / 3;
    }
    in_parallel(rows, [&](int64_t begin, int64_t end) {
      kernels.norm_forward(forward, weight.data(), bias.data(), begin, end);
    });
  }

  constexpr int64_t rows_per_chunk = 16, chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  std::vector<float> weight_sums(chunks * padded), bias_sums(chunks * padded);
  fusewright::NormBackwardParams backward;
  backward.rows = rows;
  backward.columns = columns;
  backward.grad_output = matrix(output, rows);
  backward.stream = matrix(stream, rows);
  backward.statistics = statistics.data();
  backward.grad_input = matrix(gradient, rows);
  in_parallel(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = (chunk + 1) * rows_per_chunk;
      kernels.norm_backward(backward, weight.data(), chunk * rows_per_chunk, last < rows ? last : rows,
                            weight_sums.data() + chunk * padded, bias_sums.data() + chunk * padded);
    }
  });
  in_parallel(blocks, [&](int64_t begin, int64_t end) {
    kernels.norm_backward_reduce(weight_sums.data(), chunks, columns, false, matrix(grad_weight, 1), begin, end);
  });

  const fusewright::SoftmaxForwardParams softmax = {rows, columns, matrix(input, rows), matrix(output, rows)};
  in_parallel(rows, [&](int64_t begin, int64_t end) { kernels.softmax_forward(softmax, begin, end); });
  const fusewright::SoftmaxBackwardParams softmax_backward = {rows, columns, matrix(input, rows), matrix(output, rows),
                                                              matrix(gradient, rows)};
  in_parallel(rows, [&](int64_t begin, int64_t end) { kernels.softmax_backward(softmax_backward, begin, end); });
}

// A layer whose members wait for each other after every step.
void run_recurrent(const CpuKernels& kernels, fusewright::RecurrentCell cell, bool projected = false) {
  constexpr int64_t steps = 5, batch = 7, inputs = 20, hidden = 70, gates = 4, gradient_gates = 6;
  const int64_t state_width = projected ? 37 : hidden;
  const auto values = [](int64_t count) { return std::vector<float>(count, 0.01f); };
  std::vector<float> input = values(steps * batch * inputs), state = values(batch * hidden);
  std::vector<float> weight_ih = values(gates * hidden * inputs), weight_hh = values(gates * hidden * hidden);
  std::vector<float> bias = values(gates * hidden), output = values(steps * batch * hidden), last = state,
                     last_cell = state;
  std::vector<float> saved = values(steps * batch * gates * hidden), cells = output, carry = values(batch * 80);
  std::vector<float> bias_sums = values(gradient_gates * hidden);
  std::vector<int64_t> samples(batch), lengths(batch), active(steps), first_row(steps);
  int64_t row = 0;
  for (int64_t p = 0; p < batch; ++p) samples[p] = p, lengths[p] = p < 4 ? steps : 2;
  for (int64_t step = 0; step < steps; ++step) {
    first_row[step] = row;
    row += active[step] = step < 2 ? batch : 4;
  }
  fusewright::RecurrentParams common;
  common.cell = cell;
  common.dtype = DataType::float32;
  common.reverse = true;
  common.time = common.steps = steps;
  common.batch = batch;
  common.inputs = inputs;
  common.hidden = hidden;
  common.state = common.output_stride = state_width;
  common.rows = row;
  common.samples = samples.data();
  common.lengths = lengths.data();
  common.active = active.data();
  common.first_row = first_row.data();
  common.resets = nullptr;
  common.input = input.data();
  common.input_time_stride = batch * inputs;
  common.input_sample_stride = inputs;
  common.h0 = common.c0 = state.data();
  common.weight_ih = weight_ih.data();
  common.weight_hh = weight_hh.data();
  common.bias_ih = common.bias_hh = bias.data();
  common.weight_hr = projected ? weight_hh.data() : nullptr;
  const auto in_team = [&](const auto& scratch_bytes, const auto& take_part) {
    fusewright::Team team(threads);
    in_parallel(threads, [&](int64_t, int64_t) {
      const int64_t member = team.join();
      if (member < 0) return;
      std::vector<float> scratch(scratch_bytes(member, team.size()) / 4 + 32);
      take_part(team, member, scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4);
    });
  };
  fusewright::RecurrentForwardParams forward{common,       output.data(), last.data(), last_cell.data(),
                                             saved.data(), cells.data(),  nullptr};
  std::vector<float> shared = values(kernels.recurrent_forward_shared(forward) / 4);
  forward.shared = shared.data();
  in_team([&](int64_t member, int64_t members) { return kernels.recurrent_forward_scratch(forward, member, members); },
          [&](fusewright::Team& team, int64_t member, void* scratch) {
            kernels.recurrent_forward(forward, team, member, scratch);
          });
  std::vector<float> grad_h0 = state, grad_c0 = state;
  fusewright::RecurrentBackwardParams backward{};
  static_cast<fusewright::RecurrentParams&>(backward) = common;
  backward.output = backward.grad_output = output.data();
  backward.gates = saved.data();
  backward.cells = cells.data();
  backward.grad_h0 = grad_h0.data();
  backward.grad_c0 = grad_c0.data();
  backward.bias_sums = bias_sums.data();
  backward.carry = carry.data();
  backward.carry_stride = 80;
  const int64_t unit_gradients = fusewright::gradient_columns(cell) * hidden;
  backward.grad_gates_stride = kernels.recurrent_gradient_stride(common.dtype, unit_gradients);
  backward.grad_states_stride = kernels.recurrent_gradient_stride(common.dtype, state_width);
  std::vector<float> grad_gates = values((row + 15) * backward.grad_gates_stride);
  std::vector<float> grad_states = values((row + 15) * backward.grad_states_stride), unprojected = output;
  backward.grad_gates = grad_gates.data();
  backward.grad_states = grad_states.data();
  backward.unprojected = projected ? unprojected.data() : nullptr;
  in_team(
      [&](int64_t member, int64_t members) { return kernels.recurrent_backward_scratch(backward, member, members); },
      [&](fusewright::Team& team, int64_t member, void* scratch) {
        kernels.recurrent_backward(backward, team, member, scratch);
      });
}

}  // namespace

int main() {
  std::string names = fusewright_cpu_available();
  for (size_t begin = 0; begin < names.size();) {
    const size_t comma = std::min(names.find(',', begin), names.size());
    const std::string isa = names.substr(begin, comma - begin);
    if (fusewright_cpu_select(isa.c_str()) != 0) return 1;
    run(*fusewright_cpu_kernels());
    run_recurrent(*fusewright_cpu_kernels(), fusewright::RecurrentCell::lstm);
    run_recurrent(*fusewright_cpu_kernels(), fusewright::RecurrentCell::lstm, true);
    run_recurrent(*fusewright_cpu_kernels(), fusewright::RecurrentCell::gru);
    std::printf("%s ran\n", isa.c_str());
    begin = comma + 1;
  }
  return 0;
}
