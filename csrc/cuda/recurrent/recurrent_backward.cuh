// Backward of a recurrent layer through its steps, in one kernel whose blocks all run at the same time. Gradients of
// the weights and of the input are products over all steps at once and not made here.
//
// A block owns groups of units. Of every step, the last first, it multiplies its columns of weight_hh by the gate
// gradients of the step behind, of all units; that gives the gradients of its units' states, then of its gates, which
// it publishes. Epoch e tells of the gate gradients of the step at which e steps were done; of epoch 0 they are zero.
#pragma once

#include "recurrent_walk.cuh"

namespace fusewright::cuda {

// params.cell of a plain RNN may be either.
template <class T, RecurrentCell Cell, int Units>
struct RecurrentBackwardUnit {
  static constexpr int gates = static_cast<int>(gates_of(Cell));
  static constexpr int parts = static_cast<int>(gradient_columns(Cell));
  static constexpr bool is_lstm = Cell == RecurrentCell::lstm, is_gru = Cell == RecurrentCell::gru;
  using Product = RecurrentProduct<T, Units, 1>;
  using Mail = RecurrentMail<T, Units>;

  const RecurrentBackwardStepsParams& params;
  const RecurrentSample sample;
  const int64_t unit;
  // From step to step: the LSTM's gradient of the cell state, the GRU's of the hidden state past weight_hh.
  float* const carry;

  __device__ RecurrentBackwardUnit(const RecurrentBackwardStepsParams& params, const RecurrentExchange& exchange,
                                   int64_t group, int64_t first_column, int64_t end)
      : params(params),
        sample(params, first_column + threadIdx.x / Units, end),
        unit(group * Units + threadIdx.x % Units),
        carry(exchange.states + sample.column * params.hidden + unit) {}

  __device__ __forceinline__ bool takes(int64_t step) const { return unit < params.hidden && sample.takes(step); }

  static __device__ __forceinline__ float load(const void* tensor, int64_t at) {
    return load_float(static_cast<const T*>(tensor) + at);
  }
  static __device__ __forceinline__ float load_or_zero(const void* tensor, int64_t at) {
    return tensor == nullptr ? 0.0f : load(tensor, at);
  }
  static __device__ __forceinline__ void store(void* tensor, int64_t at, float value) {
    store_float(static_cast<T*>(tensor) + at, value);
  }

  // What does not depend on the other units.
  __device__ __forceinline__ void fetch(int64_t step) {
    if (!takes(step)) return;
    const int64_t of_sample = sample.column * params.hidden + unit;
    is_last_ = step + 1 == sample.length;
    if (is_last_) {
      hidden_ = load_or_zero(params.grad_h_n, of_sample);
      if constexpr (is_lstm) carried_ = load_or_zero(params.grad_c_n, of_sample);
    } else {
      is_reset_ = sample.reset_before(step + 1);
      if constexpr (is_lstm || is_gru) carried_ = *carry;
    }
    if (step < 0) return;
    const int64_t row = sample.row(step), at = row * params.hidden + unit;
    grad_output_ = load_or_zero(params.grad_output, at);
    if constexpr (is_lstm || is_gru) {
#pragma unroll
      for (int i = 0; i < 4; ++i) saved_[i] = load(params.gates, (row * 4 + i) * params.hidden + unit);
    } else {
      saved_[0] = load(params.output, at);
    }
    const bool from_zero = sample.reset_before(step);
    const int64_t before = step == 0 ? of_sample : sample.row(step - 1) * params.hidden + unit;
    if constexpr (is_lstm) {
      cell_ = params.cells[at];
      cell_before_ = from_zero ? 0.0f : step == 0 ? load(params.c0, before) : params.cells[before];
    }
    if (is_gru || params.hidden_before != nullptr) {
      hidden_before_ = from_zero ? 0.0f : load(step == 0 ? params.h0 : params.output, before);
    }
  }

  // The gate gradients of a step, from the product of those of the step behind.
  __device__ __forceinline__ void take(const Product& product) {
    gather(product);
    const float dh = hidden_ + grad_output_;
    if constexpr (is_lstm) {
      const float i = saved_[0], f = saved_[1], g = saved_[2], o = saved_[3];
      const float tanh_cell = tanhf(cell_);
      const float dc = carried_ + dh * o * (1.0f - tanh_cell * tanh_cell);
      gradients_[0] = dc * g * i * (1.0f - i);
      gradients_[1] = dc * cell_before_ * f * (1.0f - f);
      gradients_[2] = dc * i * (1.0f - g * g);
      gradients_[3] = dh * tanh_cell * o * (1.0f - o);
      *carry = dc * f;
    } else if constexpr (is_gru) {
      const float r = saved_[0], z = saved_[1], n = saved_[2], n_hidden = saved_[3];
      const float dn = dh * (1.0f - z) * (1.0f - n * n);
      gradients_[0] = gradients_[3] = dn * n_hidden * r * (1.0f - r);
      gradients_[1] = gradients_[4] = dh * (hidden_before_ - n) * z * (1.0f - z);
      gradients_[2] = dn * r;
      gradients_[5] = dn;
      *carry = dh * z;
    } else if (params.cell == RecurrentCell::rnn_tanh) {
      gradients_[0] = dh * (1.0f - saved_[0] * saved_[0]);
    } else {
      gradients_[0] = saved_[0] <= 0.0f ? 0.0f : dh;
    }
  }

  __device__ __forceinline__ void hand_on(const Mail& mail, uint32_t epoch) const {
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
      store_float(mail.element(epoch, sample.column, gate, unit), gradients_[gate]);
    }
  }

  __device__ __forceinline__ void write(int64_t step) const {
    const int64_t row = sample.row(step);
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      store(params.grad_gates, (row * parts + part) * params.hidden + unit, gradients_[part]);
    }
    if (params.hidden_before != nullptr) store(params.hidden_before, row * params.hidden + unit, hidden_before_);
  }

  __device__ __forceinline__ void write_first_states(const Product& product) {
    gather(product);
    const int64_t at = sample.column * params.hidden + unit;
    store(params.grad_h0, at, hidden_);
    if constexpr (is_lstm) store(params.grad_c0, at, carried_);
  }

 private:
  // The gradients of the states behind the step.
  __device__ __forceinline__ void gather(const Product& product) {
    if (is_last_) return;
    hidden_ = is_reset_ ? 0.0f : product.sum(0) + (is_gru ? carried_ : 0.0f);
    if (is_reset_) carried_ = 0.0f;
  }

  float saved_[4];  // the gates, a plain RNN's output
  float cell_, cell_before_, hidden_before_, grad_output_;
  float hidden_, carried_ = 0.0f;
  float gradients_[parts];
  bool is_last_, is_reset_;
};

template <class T, RecurrentCell Cell, int Units>
__global__ void __launch_bounds__(recurrent_threads, 1)
    recurrent_backward_kernel(const __grid_constant__ RecurrentBackwardStepsParams params,
                              const __grid_constant__ RecurrentExchange exchange) {
  using Unit = RecurrentBackwardUnit<T, Cell, Units>;
  const RecurrentColumns columns(params, exchange);
  const RecurrentMail<T, Units> mail(exchange, params.hidden);
  typename Unit::Product product(static_cast<const T*>(params.weight_hh_transposed), params.hidden, exchange.depth,
                                 exchange.slots);
  const int64_t first_step = params.grad_h0 != nullptr ? -1 : 0;
  for (int64_t step = columns.steps - 1; step >= first_step; --step) {
    const uint32_t epoch = static_cast<uint32_t>(columns.steps - 1 - step);
    bool waited = false;
    for_each_tile<Units>(params.hidden, columns, [&](int64_t group, int turn, int64_t first, int tiles, bool last) {
      Unit unit(params, exchange, group, first, columns.end);
      unit.fetch(step);
      if (!waited) mail.wait(epoch);
      waited = true;
      product.multiply(group, turn, mail.columns(epoch, first), tiles);
      __syncthreads();
      const bool takes = unit.takes(step);
      if (takes && step < 0) {
        unit.write_first_states(product);
      } else if (takes) {
        unit.take(product);
        unit.hand_on(mail, epoch + 1);
      }
      // Tells also that the partial sums have been read.
      __syncthreads();
      if (last) mail.publish(group, epoch + 1);
      if (takes && step >= 0) unit.write(step);
    });
  }
}

template <class T, RecurrentCell Cell>
cudaError_t recurrent_backward_of_cell(const RecurrentBackwardStepsParams& params, const RecurrentPlan& plan,
                                       void* stream) {
  const auto kernel =
      plan.wide ? recurrent_backward_kernel<T, Cell, wide_units> : recurrent_backward_kernel<T, Cell, narrow_units>;
  return launch_cooperative(kernel, plan.grid, dim3(recurrent_threads), plan.shared_bytes, stream, params,
                            plan.exchange);
}

template <class T>
cudaError_t recurrent_backward(const RecurrentBackwardStepsParams& params, const RecurrentPlan& plan, void* stream) {
  switch (params.cell) {
    case RecurrentCell::lstm:
      return recurrent_backward_of_cell<T, RecurrentCell::lstm>(params, plan, stream);
    case RecurrentCell::gru:
      return recurrent_backward_of_cell<T, RecurrentCell::gru>(params, plan, stream);
    default:
      return recurrent_backward_of_cell<T, RecurrentCell::rnn_tanh>(params, plan, stream);
  }
}

}  // namespace fusewright::cuda
