// Parameters of a recurrent layer from its tensors. Schemas and meaning: fusewright_kernels/library/recurrent.py.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "fusewright/recurrent.h"
#include "tensor_rows.h"

namespace fusewright::ops {

// The arguments that forward and backward share, in the schema's order.
struct RecurrentInputs {
  Tensor input, h0;
  std::optional<Tensor> c0;
  Tensor weight_ih, weight_hh;
  std::optional<Tensor> bias_ih, bias_hh, weight_hr, lengths, resets;
  std::string cell;
  bool reverse;

  // Kernels read everything but the input where it lies only if it lies in order.
  void make_contiguous() {
    const auto in_order = [](Tensor& tensor) { tensor = torch::stable::contiguous(tensor); };
    const auto in_order_if_present = [&](std::optional<Tensor>& tensor) {
      if (tensor.has_value()) in_order(*tensor);
    };
    in_order(h0);
    in_order(weight_ih);
    in_order(weight_hh);
    for (std::optional<Tensor>* tensor : {&c0, &bias_ih, &bias_hh, &weight_hr, &lengths, &resets}) {
      in_order_if_present(*tensor);
    }
    if (input.size(2) > 1 && input.stride(2) != 1) in_order(input);
  }
};

inline RecurrentCell cell_of(const std::string& name) {
  if (name == "lstm") return RecurrentCell::lstm;
  if (name == "gru") return RecurrentCell::gru;
  if (name == "rnn_tanh") return RecurrentCell::rnn_tanh;
  STD_TORCH_CHECK(name == "rnn_relu", "cell is ", name, ", expected lstm, gru, rnn_tanh or rnn_relu");
  return RecurrentCell::rnn_relu;
}

inline int64_t saved_gates_of(RecurrentCell cell) {
  return cell == RecurrentCell::lstm || cell == RecurrentCell::gru ? 4 : 0;
}

// The walk through the samples: which of them take a step, and where the rows of a step lie.
struct RecurrentWalk {
  std::vector<int64_t> samples, lengths, active, first_row;
  int64_t rows = 0;

  RecurrentWalk(const RecurrentInputs& inputs, bool reverse) {
    const int64_t time = inputs.input.size(0), batch = inputs.input.size(1);
    samples.resize(batch);
    std::iota(samples.begin(), samples.end(), int64_t{0});
    lengths.assign(batch, time);
    if (inputs.lengths.has_value()) {
      const int64_t* given = static_cast<const int64_t*>(inputs.lengths->data_ptr());
      for (int64_t b = 0; b < batch; ++b) {
        STD_TORCH_CHECK(given[b] >= 0 && given[b] <= time, "lengths holds ", given[b], ", expected 0 to ", time);
      }
      std::stable_sort(samples.begin(), samples.end(), [&](int64_t a, int64_t b) { return given[a] > given[b]; });
      for (int64_t p = 0; p < batch; ++p) lengths[p] = given[samples[p]];
    }
    const int64_t steps = batch > 0 ? lengths[0] : 0;
    active.resize(steps);
    first_row.resize(steps);
    int64_t positions = batch;
    for (int64_t step = 0; step < steps; ++step) {
      while (lengths[positions - 1] <= step) --positions;
      active[step] = positions;
      // Samples of one length leave their rows in the order of the tensors.
      first_row[step] = inputs.lengths.has_value() ? rows : (reverse ? time - 1 - step : step) * batch;
      rows += positions;
    }
  }
};

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

inline void fill(RecurrentParams& params, const RecurrentInputs& inputs, const RecurrentWalk& walk) {
  params.cell = cell_of(inputs.cell);
  STD_TORCH_CHECK((params.cell == RecurrentCell::lstm) == inputs.c0.has_value(), "c0 is ",
                  inputs.c0.has_value() ? "given" : "None", ", expected for an LSTM alone: the cell is ", inputs.cell);
  STD_TORCH_CHECK(params.cell == RecurrentCell::lstm || !inputs.weight_hr.has_value(),
                  "weight_hr is given, expected None: the cell is ", inputs.cell);
  params.dtype = data_type(inputs.input.scalar_type());
  params.reverse = inputs.reverse;
  params.time = inputs.input.size(0);
  params.steps = static_cast<int64_t>(walk.active.size());
  params.batch = inputs.input.size(1);
  params.inputs = inputs.input.size(2);
  params.hidden = inputs.weight_hh.size(0) / gates_of(params.cell);
  params.state = inputs.weight_hh.size(1);
  params.rows = walk.rows;
  params.samples = walk.samples.data();
  params.lengths = walk.lengths.data();
  params.active = walk.active.data();
  params.first_row = walk.first_row.data();
  params.resets = static_cast<const bool*>(data_or_null(inputs.resets));
  params.input = inputs.input.data_ptr();
  params.input_time_stride = inputs.input.stride(0);
  params.input_sample_stride = inputs.input.stride(1);
  params.h0 = inputs.h0.data_ptr();
  params.c0 = data_or_null(inputs.c0);
  params.weight_ih = inputs.weight_ih.data_ptr();
  params.weight_hh = inputs.weight_hh.data_ptr();
  params.bias_ih = data_or_null(inputs.bias_ih);
  params.bias_hh = data_or_null(inputs.bias_hh);
  params.weight_hr = data_or_null(inputs.weight_hr);
}

}  // namespace fusewright::ops
