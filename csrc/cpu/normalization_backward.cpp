// Backward of layer and RMS normalisation, plain and fused with a residual addition, for one instruction set.
//
// With g = grad_output * weight and n = (x - mean) * rstd, over the N elements of a row:
//   grad_x = (g - mean(g) - n * mean(g * n)) * rstd     (RMS normalisation has no mean(g))
//   grad_weight = sum over rows of grad_output * n,  grad_bias = sum over rows of grad_output

#include "fusewright/cpu/pair_order.h"
#include "fusewright/cpu/philox.h"
#include "fusewright/cpu/row_moments.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Rows whose weight gradients are summed in float32 before the sum moves to the chunk's; bounds its rounding error.
constexpr int64_t rows_per_partial = 64;

// One row of the operands and its statistics.
template <class T>
struct Row {
  const T* grad;
  const T* stream;
  float mean;
  float rstd;
};

// Means over a row of g and of g * n.
struct RowProducts {
  float grad_mean;
  float product_mean;
};

// Weights and sums are in the pair order of T, in whole pairs. Elements past the row are loaded as grad = 0 and so add
// nothing to any sum.
template <bool Center, bool HasWeight, class T>
RowProducts row_products(const Row<T>& row, int64_t columns, const float* weight) {
  double grad_total = 0, product_total = 0;
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Pair grad_sum[sum_accumulators] = {}, product_sum[sum_accumulators] = {};
    const auto add = [&](Float grad, Float x, const float* w, Float& grads, Float& products) {
      const Float g = HasWeight ? grad * load(w) : grad;
      if constexpr (Center) grads += g;
      products += g * (Center ? x - row.mean : x);
    };
    const auto add_pair = [&](int a, int64_t i, Pair grad, Pair x) {
      add(grad.first, x.first, weight + i, grad_sum[a].first, product_sum[a].first);
      add(grad.second, x.second, weight + i + lanes, grad_sum[a].second, product_sum[a].second);
    };
    int64_t i = begin;
    for (; i + sum_accumulators * pair_lanes <= end; i += sum_accumulators * pair_lanes) {
      for (int a = 0; a < sum_accumulators; ++a) {
        const int64_t k = i + a * pair_lanes;
        add_pair(a, k, load_pair(row.grad + k), load_pair(row.stream + k));
      }
    }
    for (; i + pair_lanes <= end; i += pair_lanes) add_pair(0, i, load_pair(row.grad + i), load_pair(row.stream + i));
    if (i < end) add_pair(0, i, load_pair_partial(row.grad + i, end - i), load_pair_partial(row.stream + i, end - i));
    const auto sum = [](const Pair* pairs) {
      return sum_lanes((pairs[0].first + pairs[0].second) + (pairs[1].first + pairs[1].second));
    };
    if constexpr (Center) grad_total += sum(grad_sum);
    product_total += sum(product_sum);
  }
  // The product's sum lacks the factor rstd of n.
  return {static_cast<float>(grad_total / static_cast<double>(columns)),
          static_cast<float>(product_total * row.rstd / static_cast<double>(columns))};
}

// a * b, not to be contracted with the subtraction that follows: g - n * mean(g * n) of RMS normalisation cancels
// almost wholly in a row of one element, and comes out right only if g is what it was in the mean.
FUSEWRIGHT_ALWAYS_INLINE Float rounded_product(Float a, Float b) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(a * b);
#endif
#endif
  return a * b;
}

inline Pair load_floats(const float* source) { return {load(source), load(source + lanes)}; }

inline void add_floats(float* target, Pair value) {
  store(target, load(target) + value.first);
  store(target + lanes, load(target + lanes) + value.second);
}

// What a row's gradients are written to; nullptr: not wanted.
template <class T>
struct RowGradients {
  const T* added;  // to grad_stream: the gradient that came by the residual
  T* stream;
  float* weight_sums;
  float* bias_sums;
};

// grad_stream of a row and, with Sums, its contribution to the parameters' gradients. One row at a time: four share the
// loads and stores of the sums, but evict each other from the first-level cache where rows are 2 or 4 KB apart.
template <bool Center, bool HasWeight, bool Sums, bool Streamed, class T>
void row_gradients(const Row<T>& row, const RowProducts& products, const RowGradients<T>& to, int64_t columns,
                   const float* weight) {
  // Copies: the stores might change what the references lead to, as far as the compiler knows.
  const Row<T> from = row;
  const RowProducts means = products;
  const RowGradients<T> target = to;
  const auto apply = [&](Float grad, Float x, Float w, Float& weight_sum, Float& bias_sum) {
    const Float normalized = (Center ? x - from.mean : x) * from.rstd;
    if constexpr (Sums) {
      weight_sum += grad * normalized;
      bias_sum += grad;
    }
    const Float g = HasWeight ? rounded_product(grad, w) : grad;
    const Float mean = Center ? normalized * means.product_mean + means.grad_mean : normalized * means.product_mean;
    return (g - mean) * from.rstd;
  };
  const auto pair = [&](int64_t i, auto load_row, auto store_row) {
    Pair w = {}, weight_sum = {}, bias_sum = {};
    if constexpr (HasWeight) w = load_floats(weight + i);
    const Pair grad = load_row(from.grad + i), x = load_row(from.stream + i);
    Pair gradient = {apply(grad.first, x.first, w.first, weight_sum.first, bias_sum.first),
                     apply(grad.second, x.second, w.second, weight_sum.second, bias_sum.second)};
    if (target.added != nullptr) {
      const Pair added = load_row(target.added + i);
      gradient = {gradient.first + added.first, gradient.second + added.second};
    }
    if (target.stream != nullptr) store_row(target.stream + i, gradient);
    if constexpr (Sums) {
      add_floats(target.weight_sums + i, weight_sum);
      add_floats(target.bias_sums + i, bias_sum);
    }
  };
  const auto store_whole = [](T* place, Pair value) {
    if constexpr (Streamed) {
      stream_pair(place, value);
    } else {
      store_pair(place, value);
    }
  };
  int64_t i = 0;
  for (; i + pair_lanes <= columns; i += pair_lanes) {
    pair(i, [](const T* place) { return load_pair(place); }, store_whole);
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    pair(
        i, [rest](const T* place) { return load_pair_partial(place, rest); },
        [rest](T* place, Pair value) { store_pair_partial(place, value, rest); });
  }
}

// Float32 sums over few rows that flow into the chunk's sums, so that no sum has many terms.
class ParameterSums {
 public:
  ParameterSums(int64_t columns, float* weight_sums, float* bias_sums)
      : columns_(whole_pairs(columns)),
        weight_sums_(weight_sums),
        bias_sums_(bias_sums),
        scratch_(wanted() ? 2 * columns_ * sizeof(float) : 0) {
    if (weight_sums_ != nullptr) memset(weight_sums_, 0, columns_ * sizeof(float));
    if (bias_sums_ != nullptr) memset(bias_sums_, 0, columns_ * sizeof(float));
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

template <class T>
Row<T> row_of(const NormBackwardParams& params, const T* grad, const T* stream, int64_t index) {
  return {grad, stream, params.center ? params.statistics[params.rows + index] : 0.0f, params.statistics[index]};
}

// The two passes over a row, for the parameters of the call.
template <class T>
struct RowPasses {
  RowProducts (*products)(const Row<T>&, int64_t, const float*);
  void (*gradients)(const Row<T>&, const RowProducts&, const RowGradients<T>&, int64_t, const float*);
};

template <bool Center, bool HasWeight, class T>
RowPasses<T> passes_of(bool sums, bool streamed) {
  const auto products = row_products<Center, HasWeight, T>;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (streamed) {
      return {products, sums ? row_gradients<Center, HasWeight, true, true, T>
                             : row_gradients<Center, HasWeight, false, true, T>};
    }
  }
  return {products,
          sums ? row_gradients<Center, HasWeight, true, false, T> : row_gradients<Center, HasWeight, false, false, T>};
}

template <class T>
RowPasses<T> choose_passes(bool center, const float* weight, bool sums, bool streamed) {
  if (center) {
    return weight != nullptr ? passes_of<true, true, T>(sums, streamed) : passes_of<true, false, T>(sums, streamed);
  }
  return weight != nullptr ? passes_of<false, true, T>(sums, streamed) : passes_of<false, false, T>(sums, streamed);
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

// Plain normalisation, and the fused addition where every operand has the stream's type.
template <class T>
void one_type_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                       ParameterSums& sums) {
  const int64_t columns = params.columns;
  const RowReader<T> grad_output(params.grad_output, columns);
  const RowReader<T> stream(params.stream, columns);
  const RowReader<T> grad_new_residual(params.grad_new_residual, columns);
  // Both summands have the same gradient; the second is copied from the first.
  T* const summands[2] = {static_cast<T*>(params.grad_input.data), static_cast<T*>(params.grad_residual.data)};
  T* const grad_stream = summands[0] != nullptr ? summands[0] : summands[1];
  T* const copy = summands[0] != nullptr ? summands[1] : nullptr;
  const bool added = params.grad_new_residual.data != nullptr;
  const bool streamed = copy == nullptr && writes_past_caches<T>(added ? 4 : 3, params.rows, columns, grad_stream);
  const RowPasses<T> passes = choose_passes<T>(params.center, weight, sums.wanted(), streamed);
  const T* grad_rows[row_block];
  const T* stream_rows[row_block];
  const T* added_rows[row_block] = {};
  for_row_blocks(begin, end, sums, [&](int64_t first, int64_t count) {
    grad_output.read(first, count, grad_rows);
    stream.read(first, count, stream_rows);
    if (added) grad_new_residual.read(first, count, added_rows);
    for (int64_t r = 0; r < count; ++r) {
      const Row<T> row = row_of(params, grad_rows[r], stream_rows[r], first + r);
      T* const target = grad_stream == nullptr ? nullptr : grad_stream + (first + r) * columns;
      const RowProducts products = target == nullptr ? RowProducts{} : passes.products(row, columns, weight);
      passes.gradients(row, products, {added_rows[r], target, sums.weight(), sums.bias()}, columns, weight);
      if (copy != nullptr) memcpy(copy + (first + r) * columns, target, columns * sizeof(T));
    }
  });
  finish_streams();
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

// The fused addition of mixed types or with dropout. The rows pass through float32 scratch, so that the arithmetic
// exists once for every combination of types.
template <class TGrad, class TStream>
void mixed_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                    ParameterSums& sums) {
  const int64_t columns = params.columns;
  const RowReader<TGrad> grad_output(params.grad_output, columns);
  const RowReader<TStream> stream(params.stream, columns);
  const RowReader<TStream> grad_new_residual(params.grad_new_residual, columns);
  const bool wanted = params.grad_input.data != nullptr || params.grad_residual.data != nullptr;
  const Scratch scratch(3 * columns * sizeof(float));
  float* wide_grad = scratch.as<float>();
  float* wide_stream = wide_grad + columns;
  float* grad_stream = wide_stream + columns;
  const RowPasses<float> passes = choose_passes<float>(params.center, weight, sums.wanted(), false);
  const TGrad* grad_rows[row_block];
  const TStream* stream_rows[row_block];
  const TStream* extra_rows[row_block];
  for_row_blocks(begin, end, sums, [&](int64_t first, int64_t count) {
    grad_output.read(first, count, grad_rows);
    stream.read(first, count, stream_rows);
    if (params.grad_new_residual.data != nullptr) grad_new_residual.read(first, count, extra_rows);
    for (int64_t r = 0; r < count; ++r) {
      widen(grad_rows[r], wide_grad, columns);
      widen(stream_rows[r], wide_stream, columns);
      const Row<float> row = row_of<float>(params, wide_grad, wide_stream, first + r);
      const RowProducts products = passes.products(row, columns, weight);
      passes.gradients(row, products, {nullptr, wanted ? grad_stream : nullptr, sums.weight(), sums.bias()}, columns,
                       weight);
      if (!wanted) continue;
      if (params.grad_new_residual.data != nullptr) add_row(grad_stream, extra_rows[r], columns);
      scatter_to_summands(params, grad_stream, first + r);
    }
  });
}

}  // namespace

void norm_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                   float* weight_sums, float* bias_sums) {
  ParameterSums sums(params.columns, weight_sums, bias_sums);
  with_type(params.grad_output.dtype, [&](auto element) {
    using T = decltype(element);
    if (!params.fused_residual || has_one_type(params)) return one_type_backward<T>(params, weight, begin, end, sums);
    if (params.stream.dtype == DataType::float32) return mixed_backward<T, float>(params, weight, begin, end, sums);
    return mixed_backward<T, T>(params, weight, begin, end, sums);
  });
}

void norm_backward_reduce(const float* sums, int64_t chunks, int64_t columns, bool pair_order, const RowView& gradient,
                          int64_t begin, int64_t end) {
  const int64_t stride = whole_pairs(columns);
  with_type(gradient.dtype, [&](auto element) {
    using T = decltype(element);
    T* target = static_cast<T*>(gradient.data);
    for (int64_t i = begin * pair_lanes; i < end * pair_lanes; i += pair_lanes) {
      // Doubles, so that the gradient is rounded once, however many chunks there are.
      double total[pair_lanes] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* part = sums + chunk * stride + i;
        for (int k = 0; k < pair_lanes; ++k) total[k] += part[k];
      }
      float ordered[pair_lanes];
      for (int k = 0; k < pair_lanes; ++k) {
        ordered[k] = static_cast<float>(total[pair_order ? pair_position(k) : k]);
      }
      narrow(ordered, target + i, columns - i < pair_lanes ? columns - i : pair_lanes);
    }
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
