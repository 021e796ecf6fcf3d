// Forward of layer and RMS normalisation, plain and fused with a residual addition, for one instruction set.

#include "fusewright/cpu/philox.h"
#include "fusewright/cpu/row_moments.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// output = ((x - shift) * rstd + correction) * weight + bias; weight and bias in the pair order of TIn, whole pairs.
template <bool Shifted, bool HasWeight, bool HasBias, class TIn, class TOut>
void normalize(const TIn* x, TOut* output, int64_t columns, const RowMoments& row, const float* weight,
               const float* bias) {
  static_assert(has_pair_order<TIn> == has_pair_order<TOut> || !has_pair_order<TIn>);
  const auto apply = [&](Float value, const float* w, const float* b) {
    Float y = (Shifted ? value - row.shift : value) * row.rstd + row.correction;
    if constexpr (HasWeight && HasBias) return y * load(w) + load(b);
    if constexpr (HasWeight) return y * load(w);
    if constexpr (HasBias) return y + load(b);
    return y;
  };
  const auto apply_pair = [&](Pair value, int64_t i) -> Pair {
    return {apply(value.first, weight + i, bias + i), apply(value.second, weight + i + lanes, bias + i + lanes)};
  };
  const auto put = [&](int64_t i, Pair value, int64_t count) {
    if constexpr (has_pair_order<TIn> == has_pair_order<TOut>) {
      count == pair_lanes ? store_pair(output + i, value) : store_pair_partial(output + i, value, count);
    } else {
      const Float halves[2] = {value.first, value.second};
      for (int h = 0; h < 2 && h * lanes < count; ++h) {
        const int64_t rest = count - h * lanes;
        TOut* target = output + i + h * lanes;
        rest >= lanes ? store(target, halves[h]) : store_partial(target, halves[h], rest);
      }
    }
  };
  int64_t i = 0;
  for (; i + pair_lanes <= columns; i += pair_lanes) put(i, apply_pair(load_pair(x + i), i), pair_lanes);
  if (i < columns) put(i, apply_pair(load_pair_partial(x + i, columns - i), i), columns - i);
}

template <class TIn, class TOut>
using Normalize = void (*)(const TIn*, TOut*, int64_t, const RowMoments&, const float*, const float*);

template <bool Shifted, class TIn, class TOut>
Normalize<TIn, TOut> choose_normalize(const float* weight, const float* bias) {
  if (weight != nullptr && bias != nullptr) return normalize<Shifted, true, true, TIn, TOut>;
  if (weight != nullptr) return normalize<Shifted, true, false, TIn, TOut>;
  if (bias != nullptr) return normalize<Shifted, false, true, TIn, TOut>;
  return normalize<Shifted, false, false, TIn, TOut>;
}

void save_statistics(const NormForwardParams& params, int64_t row, const RowMoments& moments) {
  if (params.statistics == nullptr) return;
  params.statistics[row] = moments.rstd;
  if (params.center) params.statistics[params.rows + row] = moments.mean;
}

template <class T>
RowMoments moments_of(const NormForwardParams& params, const T* x) {
  return params.center ? row_moments<true>(x, params.columns, params.eps)
                       : row_moments<false>(x, params.columns, params.eps);
}

template <class T>
void plain_rows(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end) {
  const int64_t columns = params.columns;
  const RowReader<T> input(params.input, columns);
  const auto normalize_row = choose_normalize<false, T, T>(weight, bias);
  const auto normalize_shifted_row = choose_normalize<true, T, T>(weight, bias);
  T* output = static_cast<T*>(params.output);
  const T* rows[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, rows);
    for (int64_t r = 0; r < count; ++r) {
      const RowMoments moments = moments_of(params, rows[r]);
      const auto normalize = moments.shift == 0.0f ? normalize_row : normalize_shifted_row;
      normalize(rows[r], output + (first + r) * columns, columns, moments, weight, bias);
      save_statistics(params, first + r, moments);
    }
  }
}

// new_residual[i] = sum[i] + residual[i], and sum[i] the value as it was stored: what is normalised is what a backward
// finds. Were it the unrounded sum, the rounding error of a nearly constant row would pass for its deviation there.
template <class TResidual, class TNew>
void add_residual(float* sum, const TResidual* residual, TNew* new_residual, int64_t columns) {
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) {
    const Float value = load(sum + i) + load(residual + i);
    store(new_residual + i, value);
    store(sum + i, load(new_residual + i));
  }
  if (i < columns) {
    const int64_t count = columns - i;
    const Float value = load_partial(sum + i, count) + load_partial(residual + i, count);
    store_partial(new_residual + i, value, count);
    store_partial(sum + i, load_partial(new_residual + i, count), count);
  }
}

template <class T, class TResidual, class TNew>
void add_rows(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end) {
  const int64_t columns = params.columns;
  const RowReader<T> input(params.input, columns);
  const RowReader<TResidual> residual(params.residual, columns);
  const Scratch scratch(columns * sizeof(float));
  float* sum = scratch.as<float>();
  const auto normalize_row = choose_normalize<true, float, T>(weight, bias);
  T* output = static_cast<T*>(params.output);
  TNew* new_residual = static_cast<TNew*>(params.new_residual.data);
  const T* input_rows[row_block];
  const TResidual* residual_rows[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, input_rows);
    residual.read(first, count, residual_rows);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      widen(input_rows[r], sum, columns);
      if (params.seed != nullptr) {
        apply_dropout(sum, columns, row, *params.seed, params.keep_threshold, params.keep_scale);
      }
      add_residual(sum, residual_rows[r], new_residual + row * columns, columns);
      const RowMoments moments = moments_of(params, sum);
      normalize_row(sum, output + row * columns, columns, moments, weight, bias);
      save_statistics(params, row, moments);
    }
  }
}

}  // namespace

void norm_forward(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end) {
  with_type(params.input.dtype, [&](auto input_element) {
    using T = decltype(input_element);
    if (params.residual.data == nullptr) return plain_rows<T>(params, weight, bias, begin, end);
    // Residual streams are in the input's type or in float32; Python refuses anything else.
    const bool wide_in = params.residual.dtype == DataType::float32;
    const bool wide_out = params.new_residual.dtype == DataType::float32;
    if (wide_in && wide_out) return add_rows<T, float, float>(params, weight, bias, begin, end);
    if (wide_in) return add_rows<T, float, T>(params, weight, bias, begin, end);
    if (wide_out) return add_rows<T, T, float>(params, weight, bias, begin, end);
    return add_rows<T, T, T>(params, weight, bias, begin, end);
  });
}

void parameter_to_float(const RowView& row, int64_t columns, float offset, bool pair_order, float* target) {
  with_type(row.dtype, [&](auto element) {
    using T = decltype(element);
    const RowReader<T> reader(row, columns);
    const T* source[row_block];
    reader.read(0, 1, source);
    for (int64_t begin = 0; begin < columns; begin += pair_lanes) {
      const int64_t count = columns - begin < pair_lanes ? columns - begin : pair_lanes;
      float values[pair_lanes] = {};
      widen(source[0] + begin, values, count);
      for (int64_t i = 0; i < pair_lanes; ++i) {
        const float value = i < count ? values[i] + offset : 0.0f;
        target[begin + (pair_order ? pair_position(i) : i)] = value;
      }
    }
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
