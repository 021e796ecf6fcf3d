// Softmax along the rows of a strided tensor, forward and backward, for one instruction set.

#include "fusewright/cpu/exp.h"
#include "fusewright/cpu/row_maximum.h"
#include "fusewright/cpu/row_moments.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Float32 scratch and results keep their natural order.
using InOrder = SharedOrder<float>;

template <class TOut>
Float exponential(Float x) {
  return sizeof(TOut) == sizeof(float) ? exp_nonpositive(x) : exp_nonpositive_for_two_bytes(x);
}

// values[i] = exp(x[i] - maximum), precise enough for TOut; returns their sum. `values` has room for `columns`
// elements.
template <class Order, class TOut, class T>
double exponentials(const T* x, float* values, float maximum, int64_t columns) {
  double total = 0;
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Pair sum[step_pairs] = {};
    const auto add = [&](int a, Pair value) -> Pair {
      const Pair e = {exponential<TOut>(value.first - maximum), exponential<TOut>(value.second - maximum)};
      sum[a].first += e.first;
      sum[a].second += e.second;
      return e;
    };
    int64_t i = begin;
    for (; i + step <= end; i += step) {
      for (int a = 0; a < step_pairs; ++a) {
        const int64_t k = i + a * pair_lanes;
        InOrder::store(values + k, add(a, Order::load(x + k)));
      }
    }
    for (; i + pair_lanes <= end; i += pair_lanes) InOrder::store(values + i, add(0, Order::load(x + i)));
    const int64_t rest = end - i;
    if (rest > 0) {
      // The exponential of -Inf adds nothing to the sum.
      const Pair value = Order::first_elements(rest, Order::load_partial(x + i, rest), -__builtin_inff());
      const Pair e = add(0, value);
      if constexpr (Order::pair_order) {
        InOrder::store(values + i, e);
      } else {
        InOrder::store_partial(values + i, e, rest);
      }
    }
    total += sum_lanes((sum[0].first + sum[0].second) + (sum[1].first + sum[1].second));
  }
  return total;
}

// y = values / sum. The reciprocal is carried in two parts, which gives the rounding of a division for one more FMA.
template <class Order, class T>
void scale_row(const float* values, T* y, int64_t columns, double sum) {
  const double reciprocal = 1.0 / sum;
  const float high = static_cast<float>(reciprocal);
  const float low = static_cast<float>(reciprocal - high);
  const auto scale = [&](Pair e) -> Pair { return {e.first * high + e.first * low, e.second * high + e.second * low}; };
  int64_t i = 0;
  for (; i + pair_lanes <= columns; i += pair_lanes) Order::store(y + i, scale(InOrder::load(values + i)));
  const int64_t rest = columns - i;
  if (rest == 0) return;
  if constexpr (Order::pair_order) {
    Order::store_partial(y + i, scale(InOrder::load(values + i)), rest);
  } else {
    Order::store_partial(y + i, scale(InOrder::load_partial(values + i, rest)), rest);
  }
}

template <class TIn, class TOut>
void forward_rows(const SoftmaxForwardParams& params, int64_t begin, int64_t end) {
  using Order = SharedOrder<TIn, TOut>;
  const int64_t columns = params.columns;
  const RowReader<TIn> input(params.input, columns);
  const RowWriter<TOut> output(params.output, columns);
  // A float32 output holds the exponentials itself until they are scaled.
  constexpr bool wide_output = sizeof(TOut) == sizeof(float);
  const Scratch scratch(wide_output ? 0 : whole_pairs(columns) * sizeof(float));
  const TIn* x[row_block];
  TOut* y[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, x);
    output.rows(first, count, y);
    for (int64_t r = 0; r < count; ++r) {
      float* values = scratch.as<float>();
      if constexpr (wide_output) values = y[r];
      const float maximum = row_maximum<Order>(x[r], columns);
      scale_row<Order>(values, y[r], columns, exponentials<Order, TOut>(x[r], values, maximum, columns));
    }
    output.commit(first, count);
  }
}

template <class T>
double dot(const T* grad, const T* y, int64_t columns) {
  double total = 0;
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Pair sum[step_pairs] = {};
    const auto add = [&](int a, Pair g, Pair v) {
      sum[a].first += g.first * v.first;
      sum[a].second += g.second * v.second;
    };
    int64_t i = begin;
    for (; i + step <= end; i += step) {
      for (int a = 0; a < step_pairs; ++a) {
        const int64_t k = i + a * pair_lanes;
        add(a, load_pair(grad + k), load_pair(y + k));
      }
    }
    for (; i + pair_lanes <= end; i += pair_lanes) add(0, load_pair(grad + i), load_pair(y + i));
    if (i < end) add(0, load_pair_partial(grad + i, end - i), load_pair_partial(y + i, end - i));
    total += sum_lanes((sum[0].first + sum[0].second) + (sum[1].first + sum[1].second));
  }
  return total;
}

// grad_input = y * (grad - dot(grad, y))
template <class TY, class TX>
void backward_rows(const SoftmaxBackwardParams& params, int64_t begin, int64_t end) {
  using Order = SharedOrder<TY, TX>;
  const int64_t columns = params.columns;
  const RowReader<TY> grad_output(params.grad_output, columns);
  const RowReader<TY> output(params.output, columns);
  const RowWriter<TX> grad_input(params.grad_input, columns);
  const TY* grad[row_block];
  const TY* y[row_block];
  TX* x[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    grad_output.read(first, count, grad);
    output.read(first, count, y);
    grad_input.rows(first, count, x);
    for (int64_t r = 0; r < count; ++r) {
      const float product = static_cast<float>(dot(grad[r], y[r], columns));
      const auto gradient = [&](Pair g, Pair v) -> Pair {
        return {v.first * (g.first - product), v.second * (g.second - product)};
      };
      int64_t i = 0;
      for (; i + pair_lanes <= columns; i += pair_lanes) {
        Order::store(x[r] + i, gradient(Order::load(grad[r] + i), Order::load(y[r] + i)));
      }
      const int64_t rest = columns - i;
      if (rest > 0) {
        const Pair last = gradient(Order::load_partial(grad[r] + i, rest), Order::load_partial(y[r] + i, rest));
        Order::store_partial(x[r] + i, last, rest);
      }
    }
    grad_input.commit(first, count);
  }
}

}  // namespace

void softmax_forward(const SoftmaxForwardParams& params, int64_t begin, int64_t end) {
  with_type(params.input.dtype, [&](auto input_element) {
    with_type(params.output.dtype, [&](auto output_element) {
      forward_rows<decltype(input_element), decltype(output_element)>(params, begin, end);
    });
  });
}

void softmax_backward(const SoftmaxBackwardParams& params, int64_t begin, int64_t end) {
  with_type(params.output.dtype, [&](auto output_element) {
    with_type(params.grad_input.dtype, [&](auto input_element) {
      backward_rows<decltype(output_element), decltype(input_element)>(params, begin, end);
    });
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
