// Backward of layer and RMS normalisation, plain and fused with a residual addition, for one instruction set.
//
// With g = grad_output * weight and n = (x - mean) * rstd, over the N elements of a row:
//   grad_x = (g - mean(g) - n * mean(g * n)) * rstd     (RMS normalisation has no mean(g))
//   grad_weight = sum over rows of grad_output * n,  grad_bias = sum over rows of grad_output

#include "fusewright/cpu/philox.h"
#include "fusewright/cpu/row_moments.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Rows taken together: their weight gradients meet in registers before they touch the sums, and weight is read once.
constexpr int row_group = 4;

// Rows whose weight gradients are summed in float32 before the sum moves to the chunk's; bounds its rounding error.
constexpr int64_t rows_per_partial = 64;

template <int Rows, class T>
struct RowGroup {
  const T* grad[Rows];
  const T* stream[Rows];
  float mean[Rows];
  float rstd[Rows];
};

// Means over each row of g and of g * n.
template <int Rows>
struct RowProducts {
  float grad_mean[Rows];
  float product_mean[Rows];
};

template <bool Center, bool HasWeight, int Rows, class T>
RowProducts<Rows> row_products(const RowGroup<Rows, T>& group, int64_t columns, const float* weight) {
  double grad_total[Rows] = {}, product_total[Rows] = {};
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Float grad_sum[Rows] = {}, product_sum[Rows] = {};
    const auto add = [&](int r, Float grad, Float x, Float w) {
      const Float g = HasWeight ? grad * w : grad;
      const Float centered = Center ? x - group.mean[r] : x;
      if constexpr (Center) grad_sum[r] += g;
      product_sum[r] += g * centered;
    };
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      const Float w = HasWeight ? load(weight + i) : Float{};
      for (int r = 0; r < Rows; ++r) add(r, load(group.grad[r] + i), load(group.stream[r] + i), w);
    }
    if (i < end) {
      const int64_t count = end - i;
      const Float w = HasWeight ? load_partial(weight + i, count) : Float{};
      // Lanes past the row hold grad = 0 and so add nothing.
      for (int r = 0; r < Rows; ++r) {
        add(r, load_partial(group.grad[r] + i, count), load_partial(group.stream[r] + i, count), w);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      grad_total[r] += sum_lanes(grad_sum[r]);
      product_total[r] += sum_lanes(product_sum[r]);
    }
  }
  RowProducts<Rows> products;
  for (int r = 0; r < Rows; ++r) {
    products.grad_mean[r] = static_cast<float>(grad_total[r] / static_cast<double>(columns));
    // The sum lacks the factor rstd of n.
    products.product_mean[r] = static_cast<float>(product_total[r] * group.rstd[r] / static_cast<double>(columns));
  }
  return products;
}

template <bool Center, bool HasWeight, bool Sums, int Rows, class T>
void row_gradients(const RowGroup<Rows, T>& group, const RowProducts<Rows>& products, T* const* output,
                   int64_t columns, const float* weight, float* weight_sums, float* bias_sums) {
  const auto apply = [&](int r, Float grad, Float x, Float w, Float& weight_sum, Float& bias_sum) {
    const Float normalized = (Center ? x - group.mean[r] : x) * group.rstd[r];
    if constexpr (Sums) {
      weight_sum += grad * normalized;
      bias_sum += grad;
    }
    Float g = HasWeight ? grad * w : grad;
    if constexpr (Center) g -= products.grad_mean[r];
    return (g - normalized * products.product_mean[r]) * group.rstd[r];
  };
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) {
    const Float w = HasWeight ? load(weight + i) : Float{};
    Float weight_sum = {}, bias_sum = {};
    for (int r = 0; r < Rows; ++r) {
      const Float gradient = apply(r, load(group.grad[r] + i), load(group.stream[r] + i), w, weight_sum, bias_sum);
      if (output != nullptr) store(output[r] + i, gradient);
    }
    if constexpr (Sums) {
      store(weight_sums + i, load(weight_sums + i) + weight_sum);
      store(bias_sums + i, load(bias_sums + i) + bias_sum);
    }
  }
  if (i < columns) {
    const int64_t count = columns - i;
    const Float w = HasWeight ? load_partial(weight + i, count) : Float{};
    Float weight_sum = {}, bias_sum = {};
    for (int r = 0; r < Rows; ++r) {
      const Float gradient = apply(r, load_partial(group.grad[r] + i, count), load_partial(group.stream[r] + i, count),
                                   w, weight_sum, bias_sum);
      if (output != nullptr) store_partial(output[r] + i, gradient, count);
    }
    if constexpr (Sums) {
      store_partial(weight_sums + i, load_partial(weight_sums + i, count) + weight_sum, count);
      store_partial(bias_sums + i, load_partial(bias_sums + i, count) + bias_sum, count);
    }
  }
}

// Float32 sums over few rows that flow into the chunk's sums, so that no sum has many terms.
class ParameterSums {
 public:
  ParameterSums(int64_t columns, float* weight_sums, float* bias_sums)
      : columns_(columns),
        weight_sums_(weight_sums),
        bias_sums_(bias_sums),
        scratch_(wanted() ? 2 * columns * sizeof(float) : 0) {
    if (weight_sums_ != nullptr) memset(weight_sums_, 0, columns * sizeof(float));
    if (bias_sums_ != nullptr) memset(bias_sums_, 0, columns * sizeof(float));
    clear();
  }

  bool wanted() const { return weight_sums_ != nullptr || bias_sums_ != nullptr; }
  float* weight() const { return scratch_.as<float>(); }
  float* bias() const { return scratch_.as<float>() + columns_; }

  void flush() {
    if (weight_sums_ != nullptr) accumulate(weight(), weight_sums_);
    if (bias_sums_ != nullptr) accumulate(bias(), bias_sums_);
    clear();
  }

 private:
  void clear() {
    if (wanted()) memset(scratch_.as<float>(), 0, 2 * columns_ * sizeof(float));
  }
  void accumulate(const float* source, float* target) const {
    for (int64_t i = 0; i < columns_; ++i) target[i] += source[i];
  }

  int64_t columns_;
  float* weight_sums_;
  float* bias_sums_;
  Scratch scratch_;
};

template <bool Center, bool HasWeight, int Rows, class T>
void group_backward(const RowGroup<Rows, T>& group, T* const* output, int64_t columns, const float* weight,
                    const ParameterSums& sums) {
  RowProducts<Rows> products = {};
  if (output != nullptr) products = row_products<Center, HasWeight>(group, columns, weight);
  if (sums.wanted()) {
    row_gradients<Center, HasWeight, true>(group, products, output, columns, weight, sums.weight(), sums.bias());
  } else {
    row_gradients<Center, HasWeight, false>(group, products, output, columns, weight, nullptr, nullptr);
  }
}

// Backward of `count` rows in memory. output is nullptr if only the parameters' gradients are wanted.
template <bool Center, bool HasWeight, class T>
void rows_backward(const NormBackwardParams& params, const T* const* grad, const T* const* stream, T* const* output,
                   int64_t first, int64_t count, const float* weight, const ParameterSums& sums) {
  const auto take = [&](auto group, int64_t r) {
    constexpr int rows = sizeof(group.rstd) / sizeof(float);
    for (int k = 0; k < rows; ++k) {
      group.grad[k] = grad[r + k];
      group.stream[k] = stream[r + k];
      group.rstd[k] = params.statistics[first + r + k];
      group.mean[k] = Center ? params.statistics[params.rows + first + r + k] : 0.0f;
    }
    group_backward<Center, HasWeight>(group, output == nullptr ? nullptr : output + r, params.columns, weight, sums);
  };
  int64_t r = 0;
  for (; r + row_group <= count; r += row_group) take(RowGroup<row_group, T>{}, r);
  for (; r < count; ++r) take(RowGroup<1, T>{}, r);
}

template <class T>
void any_rows_backward(const NormBackwardParams& params, const T* const* grad, const T* const* stream,
                       T* const* output, int64_t first, int64_t count, const float* weight,
                       const ParameterSums& sums) {
  if (params.center && weight != nullptr) {
    rows_backward<true, true>(params, grad, stream, output, first, count, weight, sums);
  } else if (params.center) {
    rows_backward<true, false>(params, grad, stream, output, first, count, weight, sums);
  } else if (weight != nullptr) {
    rows_backward<false, true>(params, grad, stream, output, first, count, weight, sums);
  } else {
    rows_backward<false, false>(params, grad, stream, output, first, count, weight, sums);
  }
}

// Calls body(first, count) for blocks of [begin, end) and moves the sums on in time.
template <class Body>
void for_row_blocks(int64_t begin, int64_t end, ParameterSums& sums, Body body) {
  int64_t summed = 0;
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    body(first, count);
    summed += count;
    if (summed >= rows_per_partial || first + count == end) {
      sums.flush();
      summed = 0;
    }
  }
}

template <class T>
void plain_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                    ParameterSums& sums) {
  const int64_t columns = params.columns;
  const RowReader<T> grad_output(params.grad_output, columns);
  const RowReader<T> stream(params.stream, columns);
  T* grad_input = static_cast<T*>(params.grad_input.data);
  const T* grad_rows[row_block];
  const T* stream_rows[row_block];
  T* output_rows[row_block];
  for_row_blocks(begin, end, sums, [&](int64_t first, int64_t count) {
    grad_output.read(first, count, grad_rows);
    stream.read(first, count, stream_rows);
    for (int64_t r = 0; r < count; ++r) output_rows[r] = grad_input + (first + r) * columns;
    any_rows_backward<T>(params, grad_rows, stream_rows, grad_input == nullptr ? nullptr : output_rows, first, count,
                      weight, sums);
  });
}

// Writes one row of grad_stream to the gradients of the two summands.
void scatter_to_summands(const NormBackwardParams& params, float* grad_stream, int64_t row) {
  const int64_t columns = params.columns;
  const auto write = [&](const RowView& target) {
    if (target.data == nullptr) return;
    with_type(target.dtype, [&](auto element) {
      using T = decltype(element);
      narrow(grad_stream, static_cast<T*>(target.data) + row * columns, columns);
    });
  };
  write(params.grad_residual);
  if (params.seed != nullptr && params.grad_input.data != nullptr) {
    apply_dropout(grad_stream, columns, row, *params.seed, params.keep_threshold, params.keep_scale);
  }
  write(params.grad_input);
}

// grad_stream[i] += row[i]
template <class T>
void add_row(float* grad_stream, const T* row, int64_t columns) {
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) store(grad_stream + i, load(grad_stream + i) + load(row + i));
  if (i < columns) {
    const int64_t rest = columns - i;
    store_partial(grad_stream + i, load_partial(grad_stream + i, rest) + load_partial(row + i, rest), rest);
  }
}

// The rows pass through float32 scratch, so that the arithmetic exists once for every combination of types.
template <class TGrad, class TStream>
void add_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                  ParameterSums& sums) {
  const int64_t columns = params.columns;
  const RowReader<TGrad> grad_output(params.grad_output, columns);
  const RowReader<TStream> stream(params.stream, columns);
  const RowReader<TStream> grad_new_residual(params.grad_new_residual, columns);
  const bool wanted = params.grad_input.data != nullptr || params.grad_residual.data != nullptr;
  const Scratch scratch(3 * row_group * columns * sizeof(float));
  const TGrad* grad_rows[row_block];
  const TStream* stream_rows[row_block];
  const TStream* extra_rows[row_block];
  float* wide_grad[row_group];
  float* wide_stream[row_group];
  float* grad_stream[row_group];
  for (int r = 0; r < row_group; ++r) {
    wide_grad[r] = scratch.as<float>() + 3 * r * columns;
    wide_stream[r] = wide_grad[r] + columns;
    grad_stream[r] = wide_stream[r] + columns;
  }
  for_row_blocks(begin, end, sums, [&](int64_t first, int64_t count) {
    grad_output.read(first, count, grad_rows);
    stream.read(first, count, stream_rows);
    if (params.grad_new_residual.data != nullptr) grad_new_residual.read(first, count, extra_rows);
    for (int64_t r = 0; r < count; r += row_group) {
      const int64_t group = count - r < row_group ? count - r : row_group;
      for (int64_t k = 0; k < group; ++k) {
        widen(grad_rows[r + k], wide_grad[k], columns);
        widen(stream_rows[r + k], wide_stream[k], columns);
      }
      any_rows_backward<float>(params, wide_grad, wide_stream, wanted ? grad_stream : nullptr, first + r, group, weight,
                               sums);
      if (!wanted) continue;
      for (int64_t k = 0; k < group; ++k) {
        if (params.grad_new_residual.data != nullptr) add_row(grad_stream[k], extra_rows[r + k], columns);
        scatter_to_summands(params, grad_stream[k], first + r + k);
      }
    }
  });
}

}  // namespace

void norm_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                   float* weight_sums, float* bias_sums) {
  ParameterSums sums(params.columns, weight_sums, bias_sums);
  with_type(params.grad_output.dtype, [&](auto element) {
    using T = decltype(element);
    if (!params.fused_residual) return plain_backward<T>(params, weight, begin, end, sums);
    if (params.stream.dtype == DataType::float32) return add_backward<T, float>(params, weight, begin, end, sums);
    return add_backward<T, T>(params, weight, begin, end, sums);
  });
}

void norm_backward_reduce(const float* partial_sums, int64_t chunks, int64_t columns, const RowView& gradient,
                          int64_t begin, int64_t end) {
  // Doubles, so that the gradient is rounded once, however many chunks there are.
  typedef double Double __attribute__((vector_size(lanes * sizeof(double))));
  with_type(gradient.dtype, [&](auto element) {
    using T = decltype(element);
    T* target = static_cast<T*>(gradient.data);
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      Double total = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += __builtin_convertvector(load(partial_sums + chunk * columns + i), Double);
      }
      store(target + i, __builtin_convertvector(total, Float));
    }
    for (; i < end; ++i) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial_sums[chunk * columns + i];
      store_partial(target + i, broadcast(static_cast<float>(total)), 1);
    }
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
