// Forward of a recurrent layer: the steps of all samples in one kernel, whose blocks all run at the same time.
//
// A block owns groups of units with all their gates. Of every step it multiplies its rows of weight_hh by the hidden
// state of all units, applies the gates, and publishes its units' new state; what the backward needs is written behind
// that, and the input of a step is fetched before the wait for it. Epoch e tells of the state after e - 1 steps.
#pragma once

#include "recurrent_walk.cuh"

namespace fusewright::cuda {

// params.cell of a plain RNN may be either.
template <class T, RecurrentCell Cell, int Units>
struct RecurrentForwardUnit {
  static constexpr int gates = static_cast<int>(gates_of(Cell));
  static constexpr bool is_lstm = Cell == RecurrentCell::lstm, is_gru = Cell == RecurrentCell::gru;
  using Product = RecurrentProduct<T, Units, gates>;
  using Mail = RecurrentMail<T, Units>;

  const RecurrentForwardStepsParams& params;
  const RecurrentSample sample;
  const int64_t unit;
  float* const cell;  // the cell state between steps
  float saved[4];
  float h, c;

  __device__ RecurrentForwardUnit(const RecurrentForwardStepsParams& params, const RecurrentExchange& exchange,
                                  int64_t group, int64_t first_column, int64_t end)
      : params(params),
        sample(params, first_column + threadIdx.x / Units, end),
        unit(group * Units + threadIdx.x % Units),
        cell(exchange.states + sample.column * params.hidden + unit) {}

  __device__ __forceinline__ bool exists() const { return unit < params.hidden && sample.exists; }
  __device__ __forceinline__ bool takes(int64_t step) const { return unit < params.hidden && sample.takes(step); }

  static __device__ __forceinline__ float load(const void* tensor, int64_t at) {
    return load_float(static_cast<const T*>(tensor) + at);
  }
  static __device__ __forceinline__ void store(void* tensor, int64_t at, float value) {
    store_float(static_cast<T*>(tensor) + at, value);
  }

  // The states before the first step; those of a sample without steps are its last.
  __device__ __forceinline__ void begin(const Mail& mail) {
    if (!exists()) return;
    const int64_t at = sample.column * params.hidden + unit;
    h = load(params.h0, at);
    c = is_lstm ? load(params.c0, at) : 0.0f;
    if (!sample.takes(0)) {
      write_last();
    } else if (sample.reset_before(0)) {
      h = c = 0.0f;
    }
    hand_on(mail, 1);
  }

  // What does not depend on the other units.
  __device__ __forceinline__ void fetch(const Mail& mail, int64_t step) {
    if (!takes(step)) return;
    const int64_t row = sample.row(step) * gates * params.hidden + unit;
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) from_input_[gate] = load(params.from_input, row + gate * params.hidden);
    if constexpr (is_lstm) state_ = *cell;
    if constexpr (is_gru) state_ = load_float(mail.element(static_cast<uint32_t>(step + 1), sample.column, 0, unit));
    resets_next_ = sample.takes(step + 1) && sample.reset_before(step + 1);
    new_gate_hidden_bias_ = 0.0f;
    if (params.bias_ih == nullptr) return;
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
      const int64_t at = gate * params.hidden + unit;
      from_input_[gate] += load(params.bias_ih, at);
      const float hidden_bias = load(params.bias_hh, at);
      if (is_gru && gate == 2) {
        new_gate_hidden_bias_ = hidden_bias;
      } else {
        from_input_[gate] += hidden_bias;
      }
    }
  }

  // The new states from the product of the old ones.
  __device__ __forceinline__ void take(const Product& product) {
    if constexpr (is_lstm) {
      saved[0] = sigmoid(from_input_[0] + product.sum(0));
      saved[1] = sigmoid(from_input_[1] + product.sum(1));
      saved[2] = tanhf(from_input_[2] + product.sum(2));
      saved[3] = sigmoid(from_input_[3] + product.sum(3));
      c = saved[1] * state_ + saved[0] * saved[2];
      h = saved[3] * tanhf(c);
    } else if constexpr (is_gru) {
      saved[0] = sigmoid(from_input_[0] + product.sum(0));
      saved[1] = sigmoid(from_input_[1] + product.sum(1));
      saved[3] = product.sum(2) + new_gate_hidden_bias_;
      saved[2] = tanhf(from_input_[2] + saved[0] * saved[3]);
      h = saved[2] + saved[1] * (state_ - saved[2]);
    } else {
      h = from_input_[0] + product.sum(0);
      if (params.cell == RecurrentCell::rnn_tanh) {
        h = tanhf(h);
      } else if (h <= 0.0f) {  // NaN stays
        h = 0.0f;
      }
    }
  }

  // The states with which the next step begins.
  __device__ __forceinline__ void hand_on(const Mail& mail, uint32_t epoch, bool reset = false) const {
    store_float(mail.element(epoch, sample.column, 0, unit), reset ? 0.0f : h);
    if constexpr (is_lstm) *cell = reset ? 0.0f : c;
  }
  __device__ __forceinline__ void hand_on_next(const Mail& mail, int64_t step) const {
    hand_on(mail, static_cast<uint32_t>(step + 2), resets_next_);
  }

  __device__ __forceinline__ void write(int64_t step) const {
    const int64_t row = sample.row(step), at = row * params.hidden + unit;
    store(params.output, at, h);
    if ((is_lstm || is_gru) && params.gates != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store(params.gates, (row * 4 + i) * params.hidden + unit, saved[i]);
    }
    if (is_lstm && params.cells != nullptr) params.cells[at] = c;
    if (!sample.takes(step + 1)) write_last();
  }

 private:
  __device__ __forceinline__ void write_last() const {
    const int64_t at = sample.column * params.hidden + unit;
    store(params.h_n, at, h);
    if constexpr (is_lstm) store(params.c_n, at, c);
  }

  float from_input_[gates];  // with the biases
  float new_gate_hidden_bias_;
  float state_;  // the LSTM's cell state, the GRU's hidden state
  bool resets_next_;
};

template <class T, RecurrentCell Cell, int Units>
__global__ void __launch_bounds__(recurrent_threads, 1)
    recurrent_forward_kernel(const __grid_constant__ RecurrentForwardStepsParams params,
                             const __grid_constant__ RecurrentExchange exchange) {
  using Unit = RecurrentForwardUnit<T, Cell, Units>;
  const RecurrentColumns columns(params, exchange);
  const RecurrentMail<T, Units> mail(exchange, params.hidden);
  typename Unit::Product product(static_cast<const T*>(params.weight_hh), params.hidden, exchange.depth,
                                 exchange.slots);
  for_each_tile<Units>(params.hidden, columns, [&](int64_t group, int, int64_t first, int, bool last) {
    Unit(params, exchange, group, first, columns.end).begin(mail);
    if (!last) return;
    __syncthreads();
    mail.publish(group, 1);
  });
  for (int64_t step = 0; step < columns.steps; ++step) {
    const uint32_t epoch = static_cast<uint32_t>(step + 1);
    bool waited = false;
    for_each_tile<Units>(params.hidden, columns, [&](int64_t group, int turn, int64_t first, int tiles, bool last) {
      Unit unit(params, exchange, group, first, columns.end);
      unit.fetch(mail, step);
      if (!waited) mail.wait(epoch);
      waited = true;
      product.multiply(group, turn, mail.columns(epoch, first), tiles);
      __syncthreads();
      const bool takes = unit.takes(step);
      if (takes) {
        unit.take(product);
        unit.hand_on_next(mail, step);
      }
      // Tells also that the partial sums have been read.
      __syncthreads();
      if (last) mail.publish(group, epoch + 1);
      if (takes) unit.write(step);
    });
  }
}

template <class T, RecurrentCell Cell>
cudaError_t recurrent_forward_of_cell(const RecurrentForwardStepsParams& params, const RecurrentPlan& plan,
                                      void* stream) {
  const auto kernel =
      plan.wide ? recurrent_forward_kernel<T, Cell, wide_units> : recurrent_forward_kernel<T, Cell, narrow_units>;
  return launch_cooperative(kernel, plan.grid, dim3(recurrent_threads), plan.shared_bytes, stream, params,
                            plan.exchange);
}

template <class T>
cudaError_t recurrent_forward(const RecurrentForwardStepsParams& params, const RecurrentPlan& plan, void* stream) {
  switch (params.cell) {
    case RecurrentCell::lstm:
      return recurrent_forward_of_cell<T, RecurrentCell::lstm>(params, plan, stream);
    case RecurrentCell::gru:
      return recurrent_forward_of_cell<T, RecurrentCell::gru>(params, plan, stream);
    default:
      return recurrent_forward_of_cell<T, RecurrentCell::rnn_tanh>(params, plan, stream);
  }
}

}  // namespace fusewright::cuda
