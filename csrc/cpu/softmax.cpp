// Softmax along the rows of a strided tensor, forward and backward, for one instruction set.

#include "fusewright/cpu/exp.h"
#include "fusewright/cpu/row_moments.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// The row as float32 into `values`; returns its maximum. A NaN may or may not be the maximum: it reaches the sum.
template <class T>
float widen_and_maximum(const T* x, float* values, int64_t columns) {
  const Float lowest = broadcast(-__builtin_inff());
  Float best[2] = {lowest, lowest};
  int64_t i = 0;
  for (; i + 2 * lanes <= columns; i += 2 * lanes) {
    for (int a = 0; a < 2; ++a) {
      const Float value = load(x + i + a * lanes);
      store(values + i + a * lanes, value);
      best[a] = maximum(value, best[a]);
    }
  }
  for (; i < columns; i += lanes) {
    const int64_t count = columns - i < lanes ? columns - i : lanes;
    const Float value = load_partial(x + i, count);
    store_partial(values + i, value, count);
    best[0] = maximum(select(first_lanes(count), value, lowest), best[0]);
  }
  return maximum_lanes(maximum(best[0], best[1]));
}

// values = exp(values - maximum); returns their sum.
double exponentials(float* values, float maximum, int64_t columns) {
  double total = 0;
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Float sum = {};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      const Float e = exp_nonpositive(load(values + i) - maximum);
      store(values + i, e);
      sum += e;
    }
    if (i < end) {
      const Float e = exp_nonpositive(load_partial(values + i, end - i) - maximum);
      store_partial(values + i, e, end - i);
      sum += select(first_lanes(end - i), e, Float{});
    }
    total += sum_lanes(sum);
  }
  return total;
}

// y = values / sum. The reciprocal is carried in two parts, which gives the rounding of a division for one more FMA.
template <class T>
void scale_row(const float* values, T* y, int64_t columns, double sum) {
  const double reciprocal = 1.0 / sum;
  const float high = static_cast<float>(reciprocal);
  const float low = static_cast<float>(reciprocal - high);
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) {
    const Float e = load(values + i);
    store(y + i, e * high + e * low);
  }
  if (i < columns) {
    const Float e = load_partial(values + i, columns - i);
    store_partial(y + i, e * high + e * low, columns - i);
  }
}

template <class TIn, class TOut>
void forward_rows(const SoftmaxForwardParams& params, int64_t begin, int64_t end) {
  const int64_t columns = params.columns;
  const RowReader<TIn> input(params.input, columns);
  const RowWriter<TOut> output(params.output, columns);
  const Scratch scratch(columns * sizeof(float));
  float* values = scratch.as<float>();
  const TIn* x[row_block];
  TOut* y[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, x);
    output.rows(first, count, y);
    for (int64_t r = 0; r < count; ++r) {
      const float maximum = widen_and_maximum(x[r], values, columns);
      scale_row(values, y[r], columns, exponentials(values, maximum, columns));
    }
    output.commit(first, count);
  }
}

template <class TGrad, class TOut>
double dot(const TGrad* grad, const TOut* y, int64_t columns) {
  double total = 0;
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Float sum[2] = {};
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      for (int a = 0; a < 2; ++a) sum[a] += load(grad + i + a * lanes) * load(y + i + a * lanes);
    }
    for (; i < end; i += lanes) {
      const int64_t count = end - i < lanes ? end - i : lanes;
      sum[0] += load_partial(grad + i, count) * load_partial(y + i, count);
    }
    total += sum_lanes(sum[0] + sum[1]);
  }
  return total;
}

// grad_input = y * (grad - dot(grad, y))
template <class TY, class TX>
void backward_rows(const SoftmaxBackwardParams& params, int64_t begin, int64_t end) {
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
      int64_t i = 0;
      for (; i + lanes <= columns; i += lanes) {
        store(x[r] + i, load(y[r] + i) * (load(grad[r] + i) - product));
      }
      if (i < columns) {
        const int64_t rest = columns - i;
        store_partial(x[r] + i, load_partial(y[r] + i, rest) * (load_partial(grad[r] + i, rest) - product), rest);
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
