// Parameters of the recurrent kernels. Schemas and meaning: fusewright_kernels/library/recurrent.py.
// Letters: T steps, B batch, I input width, H units, G gates, P width of the hidden state: H, or that of its
// projection.
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"
#include "fusewright/team.h"

namespace fusewright {

enum class RecurrentCell { lstm, gru, rnn_tanh, rnn_relu };

FUSEWRIGHT_HOST_DEVICE constexpr int64_t gates_of(RecurrentCell cell) {
  return cell == RecurrentCell::lstm ? 4 : cell == RecurrentCell::gru ? 3 : 1;
}

// Columns of gate gradients, in widths of the hidden state.
FUSEWRIGHT_HOST_DEVICE constexpr int64_t gradient_columns(RecurrentCell cell) {
  return cell == RecurrentCell::lstm ? 4 : cell == RecurrentCell::gru ? 6 : 1;
}

// What forward and backward share. Kernels walk steps 0, 1, ... of every sample, its last time first if reversed, and
// take samples by position: the longest first, so that those which take a step are the first ones. A row is one step of
// one position; rows of the steps lie one behind the other.
struct RecurrentParams {
  RecurrentCell cell;
  DataType dtype;
  bool reverse;
  int64_t time;   // T of the tensors
  int64_t steps;  // of the longest sample
  int64_t batch, inputs;
  int64_t hidden, state;     // H, P
  int64_t rows;              // of all steps
  const int64_t* samples;    // (B,): the sample at a position
  const int64_t* lengths;    // (B,): the steps of the sample at a position
  const int64_t* active;     // (steps,): positions that take a step
  const int64_t* first_row;  // (steps,)
  const bool* resets;        // (T, B) or nullptr

  const void* input;  // (T, B, I), unit last stride
  int64_t input_time_stride, input_sample_stride;
  // Contiguous, as everything below.
  const void *h0, *c0;                // (B, P), (B, H)
  const void *weight_ih, *weight_hh;  // (G * H, I) and (G * H, P)
  const void *bias_ih, *bias_hh;      // (G * H,) or nullptr
  const void* weight_hr;              // (P, H), an LSTM's projection, or nullptr
  // Elements between rows of the output and of its gradient, which are parts of wider ones where there are two
  // directions. The cells' and the gates' lie next to each other.
  int64_t output_stride;

  FUSEWRIGHT_HOST_DEVICE bool projected() const { return weight_hr != nullptr; }

  // A cell's call. Not for lack of rows: how a row is computed does not depend on its batch.
  FUSEWRIGHT_HOST_DEVICE bool single_step() const { return time == 1; }

  FUSEWRIGHT_HOST_DEVICE int64_t time_of(int64_t step, int64_t position) const {
    return reverse ? lengths[position] - 1 - step : step;
  }
  // Whether the position starts the step from states of zero. The step must be one of its own.
  FUSEWRIGHT_HOST_DEVICE bool reset_before(int64_t step, int64_t position) const {
    return resets != nullptr && resets[time_of(step, position) * batch + samples[position]];
  }
  // Row of (T, B) tensors that a step of a position reads or writes.
  FUSEWRIGHT_HOST_DEVICE int64_t tensor_row(int64_t step, int64_t position) const {
    return time_of(step, position) * batch + samples[position];
  }
};

struct RecurrentForwardParams : RecurrentParams {
  void* output;     // (T, B, P)
  void *h_n, *c_n;  // (B, P), (B, H)
  void* gates;      // (T, B, S * H) or nullptr
  float* cells;     // (T, B, H) or nullptr
  void* shared;     // scratch of all members, of recurrent_forward_shared bytes
};

struct RecurrentBackwardParams : RecurrentParams {
  const void* output;
  const void* gates;
  const float* cells;
  const void *grad_output, *grad_h_n, *grad_c_n;  // (T, B, P), (B, P), (B, H), each may be nullptr
  void *grad_h0, *grad_c0;                        // (B, P), (B, H), nullptr if nobody wants them
  // Gradients of the gates before their activation, row by row, in bfloat16 where products take that, else float32:
  // gradient_columns * H columns. A GRU's stand there twice, as the hidden state and as the input reaches them, for its
  // new gate's differ and products want those of either side next to each other.
  void* grad_gates;
  int64_t grad_gates_stride;
  float* bias_sums;  // the sum of those rows
  // Of a projection, row by row and in the type of grad_gates: the gradients of its results, and what it projects.
  void* grad_states;  // (rows, grad_states_stride)
  int64_t grad_states_stride;
  void* unprojected;  // (rows, H), nullptr if nobody wants it
  // What a later call reads again: the LSTM's gradient of the cell state before the step last taken, the GRU's of the
  // hidden state past weight_hh. (B, carry_stride), the hidden width in whole sixteens.
  float* carry;
  int64_t carry_stride;
  // For a single step: the rows of gate gradients times weight_hh, (rows, P) in their type. A call without it takes the
  // step, one with it finishes the gradients of the first states; packing weight_hh for one product would not pay.
  const void* hidden_gradients;
};

// ---- CUDA ----
// The steps alone: products over all steps at once are torch's. Samples stand in their own order, with lengths and
// resets where the device has them. Everything is contiguous; what is written at steps that a sample does not take is
// zero before and stays so.

struct RecurrentStepsParams {
  RecurrentCell cell;
  DataType dtype;  // bfloat16 or float16
  bool reverse;
  int64_t time, batch, hidden;
  const int64_t* lengths;  // (B,) or nullptr
  const bool* resets;      // (T, B) or nullptr
  const void *h0, *c0;     // (B, H)
};

struct RecurrentForwardStepsParams : RecurrentStepsParams {
  const void* from_input;         // (T, B, G * H): the input times weight_ih, without biases
  const void* weight_hh;          // (G * H, H)
  const void *bias_ih, *bias_hh;  // (G * H,) or nullptr
  void* output;                   // (T, B, H)
  void *h_n, *c_n;                // (B, H)
  void* gates;                    // (T, B, S * H) or nullptr
  float* cells;                   // (T, B, H) or nullptr
};

struct RecurrentBackwardStepsParams : RecurrentStepsParams {
  const void* weight_hh_transposed;  // (H, G * H)
  const void *output, *gates;        // as the forward wrote them
  const float* cells;
  const void *grad_output, *grad_h_n, *grad_c_n;  // each may be nullptr
  void *grad_h0, *grad_c0;                        // (B, H), nullptr if nobody wants them
  void* grad_gates;     // (T, B, gradient_columns * H), as in RecurrentBackwardParams but by time and sample
  void* hidden_before;  // (T, B, H): the state that each step began with; nullptr if nobody wants it
};

// target (left columns, right_width) = left^T right, all float32 with unit last stride, target contiguous.
struct TransposedProductParams {
  int64_t rows;
  const float* left;
  int64_t left_stride;
  const float* right;
  int64_t right_stride, right_width;
  float* target;
};

}  // namespace fusewright
