// Forward of layer and RMS normalisation, plain and fused with a residual addition, for one instruction set.

#include "fusewright/cpu/philox.h"
#include "fusewright/cpu/row_moments.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// output = ((x - shift) * rstd + correction) * weight + bias of one row; weight and bias in Order, whole pairs.
template <class Order, bool HasBias, bool Streamed, class TIn, class TOut>
struct RowNormalization {
  const TIn* x;
  TOut* output;
  RowMoments moments;
  const float* weight;
  const float* bias;

  FUSEWRIGHT_ALWAYS_INLINE void pair(int64_t i) const {
    const Pair y = normalized(Order::load(x + i), i);
    if constexpr (Streamed) {
      stream_pair(output + i, y);
    } else {
      Order::store(output + i, y);
    }
  }
  FUSEWRIGHT_ALWAYS_INLINE void partial(int64_t i, int64_t count) const {
    Order::store_partial(output + i, normalized(Order::load_partial(x + i, count), i), count);
  }
  void whole_row(int64_t columns) const {
    int64_t i = 0;
    for (; i + pair_lanes <= columns; i += pair_lanes) pair(i);
    if (i < columns) partial(i, columns - i);
  }

 private:
  FUSEWRIGHT_ALWAYS_INLINE Pair normalized(Pair value, int64_t i) const {
    return {normalized(value.first, i), normalized(value.second, i + lanes)};
  }
  FUSEWRIGHT_ALWAYS_INLINE Float normalized(Float value, int64_t i) const {
    const Float y = ((value - moments.shift) * moments.rstd + moments.correction) * load(weight + i);
    return HasBias ? y + load(bias + i) : y;
  }
};

// A row as the source of its sums, while an earlier row is normalised: reads and writes mix, and the arithmetic between
// sums and moments is over by the time the moments are needed.
template <class Source, class Normalization>
struct PipelinedSource {
  using Order = typename Source::Order;
  Source source;
  Normalization earlier;

  FUSEWRIGHT_ALWAYS_INLINE Pair pair(int64_t i) const {
    const Pair value = source.pair(i);
    earlier.pair(i);
    return value;
  }
  FUSEWRIGHT_ALWAYS_INLINE Pair partial(int64_t i, int64_t count) const {
    const Pair value = source.partial(i, count);
    earlier.partial(i, count);
    return value;
  }
};

// The sum of two rows, which is stored on the way. Its elements are those that were stored: what is normalised is what
// a backward finds. Were it the unrounded sum, the rounding error of a nearly constant row would pass for its deviation
// there.
template <class T, class TResidual, class TNew>
struct StoredSum {
  using Order = SharedOrder<T, TResidual, TNew>;
  const T* input;
  const TResidual* residual;
  TNew* sum;

  FUSEWRIGHT_ALWAYS_INLINE Pair pair(int64_t i) const {
    const Pair a = Order::load(input + i), b = Order::load(residual + i);
    Order::store(sum + i, Pair{a.first + b.first, a.second + b.second});
    return Order::load(sum + i);
  }
  FUSEWRIGHT_ALWAYS_INLINE Pair partial(int64_t i, int64_t count) const {
    const Pair a = Order::load_partial(input + i, count), b = Order::load_partial(residual + i, count);
    Order::store_partial(sum + i, Pair{a.first + b.first, a.second + b.second}, count);
    return Order::load_partial(sum + i, count);
  }
};

// How many rows the normalisation is behind the sums. Measured, 4096 rows of 1024 on Zen 4: float32 without a residual
// waits for memory, and takes 0.78 ms in turn and 1.1 ms one row behind; all else gains 10 to 40 % by being behind, and
// loses by more than one row. Each use is compiled for every instruction set, so the rare mixtures of types go without.
template <class Source>
constexpr int64_t rows_behind = 0;
template <class Order>
constexpr int64_t rows_behind<RowSource<Order, BFloat16>> = 1;
template <class Order>
constexpr int64_t rows_behind<RowSource<Order, Float16>> = 1;
template <class T>
constexpr int64_t rows_behind<StoredSum<T, T, T>> = 1;
template <>
constexpr int64_t rows_behind<StoredSum<BFloat16, float, float>> = 1;
template <>
constexpr int64_t rows_behind<StoredSum<Float16, float, float>> = 1;

// Normalises `count` rows x from row `first` of the tensor on. `source_of(r)` yields the elements of x[r] the first
// time.
template <class Order, bool Center, bool HasBias, bool Streamed, class TIn, class TOut, class SourceOf>
void normalize_block(const NormForwardParams& params, const float* weight, const float* bias, int64_t first,
                     int64_t count, const TIn* const* x, SourceOf source_of) {
  constexpr int64_t depth = rows_behind<decltype(source_of(int64_t{0}))>;
  const int64_t columns = params.columns;
  RowMoments moments[row_block];
  const auto normalization = [&](int64_t r) {
    TOut* output = static_cast<TOut*>(params.output) + (first + r) * columns;
    return RowNormalization<Order, HasBias, Streamed, TIn, TOut>{x[r], output, moments[r], weight, bias};
  };
  for (int64_t r = 0; r < count; ++r) {
    const auto source = source_of(r);
    const RowSource<Order, TIn> again{x[r]};
    if constexpr (depth == 0) {
      moments[r] = row_moments<Center, TIn>(source, source, again, columns, params.eps);
      normalization(r).whole_row(columns);
    } else if (r < depth) {
      moments[r] = row_moments<Center, TIn>(source, source, again, columns, params.eps);
    } else {
      const auto earlier = normalization(r - depth);
      const PipelinedSource<decltype(source), decltype(earlier)> pipelined{source, earlier};
      moments[r] = row_moments<Center, TIn>(source, pipelined, again, columns, params.eps);
    }
    if (params.statistics == nullptr) continue;
    params.statistics[first + r] = moments[r].rstd;
    if (Center) params.statistics[params.rows + first + r] = moments[r].mean;
  }
  for (int64_t r = count > depth ? count - depth : 0; r < count; ++r) normalization(r).whole_row(columns);
}

// normalize_block for the parameters of the call.
template <class Order, class TIn, class TOut, class SourceOf>
void normalize_rows(const NormForwardParams& params, const float* weight, const float* bias, int64_t first,
                    int64_t count, const TIn* const* x, SourceOf source_of) {
  const auto run = [&](auto center, auto has_bias) {
    if constexpr (sizeof(TOut) == sizeof(float)) {
      const int64_t tensors = params.residual.data != nullptr ? 4 : 2;
      if (writes_past_caches<TOut>(tensors, params.rows, params.columns, params.output)) {
        return normalize_block<Order, center.value, has_bias.value, true, TIn, TOut>(params, weight, bias, first, count,
                                                                                     x, source_of);
      }
    }
    normalize_block<Order, center.value, has_bias.value, false, TIn, TOut>(params, weight, bias, first, count, x,
                                                                           source_of);
  };
  if (params.center) return bias != nullptr ? run(Constant<1>{}, Constant<1>{}) : run(Constant<1>{}, Constant<0>{});
  return bias != nullptr ? run(Constant<0>{}, Constant<1>{}) : run(Constant<0>{}, Constant<0>{});
}

template <class T>
void plain_rows(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end) {
  using Order = SharedOrder<T>;
  const RowReader<T> input(params.input, params.columns);
  const T* rows[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, rows);
    normalize_rows<Order, T, T>(params, weight, bias, first, count, rows,
                                [&](int64_t r) { return RowSource<Order, T>{rows[r]}; });
  }
}

// Adds, stores and normalises; `summand(x, row)` is x, which is row `row` of the tensor, as TSummand.
template <class TSummand, class T, class TResidual, class TNew, class Summand>
void add_row_blocks(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end,
                    Summand summand) {
  using Sum = StoredSum<TSummand, TResidual, TNew>;
  using Order = SharedOrder<TSummand, T, TResidual, TNew>;
  static_assert(Order::pair_order == Sum::Order::pair_order);
  const int64_t columns = params.columns;
  const RowReader<T> input(params.input, columns);
  const RowReader<TResidual> residual(params.residual, columns);
  const T* input_rows[row_block];
  const TResidual* residual_rows[row_block];
  const TNew* sums[row_block];
  TNew* new_residual = static_cast<TNew*>(params.new_residual.data);
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, input_rows);
    residual.read(first, count, residual_rows);
    for (int64_t r = 0; r < count; ++r) sums[r] = new_residual + (first + r) * columns;
    normalize_rows<Order, TNew, T>(params, weight, bias, first, count, sums, [&](int64_t r) {
      return Sum{summand(input_rows[r], first + r), residual_rows[r], new_residual + (first + r) * columns};
    });
  }
}

template <class T, class TResidual, class TNew>
void add_rows(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end) {
  if (params.seed == nullptr) {
    return add_row_blocks<T, T, TResidual, TNew>(params, weight, bias, begin, end,
                                                 [](const T* row, int64_t) { return row; });
  }
  // Dropout is drawn in float32, in the natural order of the columns.
  const Scratch scratch(params.columns * sizeof(float));
  add_row_blocks<float, T, TResidual, TNew>(params, weight, bias, begin, end, [&](const T* row, int64_t index) {
    float* dropped = scratch.as<float>();
    widen(row, dropped, params.columns);
    apply_dropout(dropped, params.columns, index, *params.seed, params.keep_threshold, params.keep_scale);
    return dropped;
  });
}

}  // namespace

void norm_forward(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end) {
  // A weight of 1 changes no bit, and an absent one is rare.
  const Scratch ones(weight == nullptr ? whole_pairs(params.columns) * sizeof(float) : 0);
  if (weight == nullptr) {
    for (int64_t i = 0; i < whole_pairs(params.columns); ++i) ones.as<float>()[i] = 1.0f;
    weight = ones.as<float>();
  }
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
  finish_streams();
}

void parameter_to_float(const RowView& row, int64_t columns, float offset, bool pair_order, float* target) {
  with_type(row.dtype, [&](auto element) {
    using T = decltype(element);
    using Order = SharedOrder<T>;
    const RowReader<T> reader(row, columns);
    const T* source[row_block];
    reader.read(0, 1, source);
    for (int64_t begin = 0; begin < columns; begin += pair_lanes) {
      const int64_t count = columns - begin;
      Pair value = count < pair_lanes ? Order::load_partial(source[0] + begin, count) : Order::load(source[0] + begin);
      value = {value.first + offset, value.second + offset};
      if (count < pair_lanes) value = Order::first_elements(count, value, 0.0f);
      store(target + begin, value.first);
      store(target + begin + lanes, value.second);
      if (pair_order == Order::pair_order) continue;
      float loaded[pair_lanes];
      memcpy(loaded, target + begin, sizeof(loaded));
      for (int64_t i = 0; i < pair_lanes; ++i) {
        target[begin + (pair_order ? pair_position(i) : i)] = loaded[pair_order ? i : pair_position(i)];
      }
    }
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
