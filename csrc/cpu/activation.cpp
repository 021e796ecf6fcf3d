// SwiGLU, GELU with a bias, and dropout with a residual addition, for one instruction set.

#include "fusewright/activation.h"

#include "fusewright/cpu/gelu.h"
#include "fusewright/cpu/philox.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Rows whose bias gradient is summed in float32 before the sum moves to the chunk's; bounds its rounding error.
constexpr int64_t rows_per_partial = 64;

template <class T>
constexpr bool precise = sizeof(T) == sizeof(float);

// Calls body(offset, load, store) for the pairs of a row: load(T*) and store(T*, Pair) take as many elements as there
// are.
template <class T, class Body>
FUSEWRIGHT_ALWAYS_INLINE void for_pairs(int64_t columns, Body body) {
  int64_t i = 0;
  for (; i + pair_lanes <= columns; i += pair_lanes) {
    body(i, [](const T* place) { return load_pair(place); }, [](T* place, Pair value) { store_pair(place, value); });
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    body(
        i, [rest](const T* place) { return load_pair_partial(place, rest); },
        [rest](T* place, Pair value) { store_pair_partial(place, value, rest); });
  }
}

// function of each half of the pairs.
template <class Function, class... Pairs>
FUSEWRIGHT_ALWAYS_INLINE Pair each(Function function, Pairs... pairs) {
  return {function(pairs.first...), function(pairs.second...)};
}

template <class T>
void swiglu_rows(const SwigluForwardParams& params, int64_t begin, int64_t end) {
  const int64_t columns = params.columns;
  const RowReader<T> gate(params.gate, columns), up(params.up, columns);
  const RowWriter<T> output(params.output, columns);
  const T *g[row_block], *u[row_block];
  T* y[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    gate.read(first, count, g);
    up.read(first, count, u);
    output.rows(first, count, y);
    for (int64_t r = 0; r < count; ++r) {
      for_pairs<T>(columns, [&](int64_t i, auto load_row, auto store_row) {
        const auto apply = [](Float a, Float b) { return a * sigmoid<precise<T>>(a) * b; };
        store_row(y[r] + i, each(apply, load_row(g[r] + i), load_row(u[r] + i)));
      });
    }
    output.commit(first, count);
  }
}

// grad_gate = grad * up * (s + gate * s'), grad_up = grad * gate * s, s = sigmoid(gate)
template <class T>
void swiglu_backward_rows(const SwigluBackwardParams& params, int64_t begin, int64_t end) {
  const int64_t columns = params.columns;
  const RowReader<T> grad_output(params.grad_output, columns), gate(params.gate, columns), up(params.up, columns);
  const RowWriter<T> grad_gate(params.grad_gate, columns), grad_up(params.grad_up, columns);
  const T *d[row_block], *g[row_block], *u[row_block];
  T *dg[row_block], *du[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    grad_output.read(first, count, d);
    gate.read(first, count, g);
    up.read(first, count, u);
    grad_gate.rows(first, count, dg);
    grad_up.rows(first, count, du);
    for (int64_t r = 0; r < count; ++r) {
      for_pairs<T>(columns, [&](int64_t i, auto load_row, auto store_row) {
        const Pair grad = load_row(d[r] + i), a = load_row(g[r] + i), b = load_row(u[r] + i);
        const auto of_gate = [](Float dy, Float x, Float factor) {
          const SigmoidSlope s = sigmoid_slope<precise<T>>(x);
          return dy * factor * (s.value + x * s.slope);
        };
        const auto of_up = [](Float dy, Float x) { return dy * x * sigmoid<precise<T>>(x); };
        store_row(dg[r] + i, each(of_gate, grad, a, b));
        store_row(du[r] + i, each(of_up, grad, a));
      });
    }
    grad_gate.commit(first, count);
    grad_up.commit(first, count);
  }
}

// `bias` in the pair order of T and in whole pairs, or nullptr.
inline Pair bias_at(const float* bias, int64_t i) {
  return bias == nullptr ? Pair{} : Pair{load(bias + i), load(bias + i + lanes)};
}

constexpr auto plus = [](Float a, Float b) { return a + b; };

template <class T, bool Tanh>
void bias_gelu_rows(const BiasGeluForwardParams& params, const float* bias, int64_t begin, int64_t end) {
  const RowReader<T> input(params.input, params.columns);
  const RowWriter<T> output(params.output, params.columns);
  const T* x[row_block];
  T* y[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, x);
    output.rows(first, count, y);
    for (int64_t r = 0; r < count; ++r) {
      for_pairs<T>(params.columns, [&](int64_t i, auto load_row, auto store_row) {
        const Pair z = each(plus, load_row(x[r] + i), bias_at(bias, i));
        store_row(y[r] + i, each([](Float value) { return gelu<Tanh, precise<T>>(value); }, z));
      });
    }
    output.commit(first, count);
  }
}

template <class T, bool Tanh>
void bias_gelu_backward_rows(const BiasGeluBackwardParams& params, const float* bias, int64_t begin, int64_t end,
                             float* bias_sums) {
  const int64_t columns = params.columns, padded = whole_pairs(columns);
  const RowReader<T> grad_output(params.grad_output, columns), input(params.input, columns);
  const RowWriter<T> grad_input(params.grad_input, columns);
  const Scratch partial(bias_sums == nullptr ? 0 : padded * sizeof(float));
  float* const sums = partial.as<float>();
  if (bias_sums != nullptr) {
    memset(sums, 0, padded * sizeof(float));
    memset(bias_sums, 0, padded * sizeof(float));
  }
  const T *d[row_block], *x[row_block];
  T* dx[row_block];
  int64_t summed = 0;
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    grad_output.read(first, count, d);
    input.read(first, count, x);
    grad_input.rows(first, count, dx);
    for (int64_t r = 0; r < count; ++r) {
      for_pairs<T>(columns, [&](int64_t i, auto load_row, auto store_row) {
        const Pair z = each(plus, load_row(x[r] + i), bias_at(bias, i));
        const auto of = [](Float grad, Float value) { return grad * gelu_slope<Tanh, precise<T>>(value); };
        const Pair gradient = each(of, load_row(d[r] + i), z);
        store_row(dx[r] + i, gradient);
        if (sums != nullptr) {
          store(sums + i, load(sums + i) + gradient.first);
          store(sums + i + lanes, load(sums + i + lanes) + gradient.second);
        }
      });
    }
    grad_input.commit(first, count);
    summed += count;
    if (sums != nullptr && (summed >= rows_per_partial || first + count == end)) {
      for (int64_t i = 0; i < padded; ++i) bias_sums[i] += sums[i];
      memset(sums, 0, padded * sizeof(float));
      summed = 0;
    }
  }
}

template <class T>
void dropout_add_rows(const DropoutAddParams& params, int64_t begin, int64_t end) {
  const int64_t columns = params.columns;
  const RowReader<T> input(params.input, columns), residual(params.residual, columns);
  const RowWriter<T> output(params.output, columns);
  const Scratch scratch(columns * sizeof(float));
  float* const dropped = scratch.as<float>();
  const T *x[row_block], *base[row_block];
  T* y[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, x);
    if (params.residual.data != nullptr) residual.read(first, count, base);
    output.rows(first, count, y);
    for (int64_t r = 0; r < count; ++r) {
      widen(x[r], dropped, columns);
      if (params.seed != nullptr) {
        apply_dropout(dropped, columns, first + r, *params.seed, params.keep_threshold, params.keep_scale);
      }
      if (params.residual.data == nullptr) {
        narrow(dropped, y[r], columns);
        continue;
      }
      int64_t i = 0;
      for (; i + lanes <= columns; i += lanes) store(y[r] + i, load(dropped + i) + load(base[r] + i));
      if (i < columns) {
        const int64_t rest = columns - i;
        store_partial(y[r] + i, load_partial(dropped + i, rest) + load_partial(base[r] + i, rest), rest);
      }
    }
    output.commit(first, count);
  }
}

}  // namespace

void swiglu_forward(const SwigluForwardParams& params, int64_t begin, int64_t end) {
  with_type(params.gate.dtype, [&](auto element) { swiglu_rows<decltype(element)>(params, begin, end); });
}

void swiglu_backward(const SwigluBackwardParams& params, int64_t begin, int64_t end) {
  with_type(params.gate.dtype, [&](auto element) { swiglu_backward_rows<decltype(element)>(params, begin, end); });
}

void bias_gelu_forward(const BiasGeluForwardParams& params, const float* bias, int64_t begin, int64_t end) {
  with_type(params.input.dtype, [&](auto element) {
    using T = decltype(element);
    return params.tanh ? bias_gelu_rows<T, true>(params, bias, begin, end)
                       : bias_gelu_rows<T, false>(params, bias, begin, end);
  });
}

void bias_gelu_backward(const BiasGeluBackwardParams& params, const float* bias, int64_t begin, int64_t end,
                        float* bias_sums) {
  with_type(params.input.dtype, [&](auto element) {
    using T = decltype(element);
    return params.tanh ? bias_gelu_backward_rows<T, true>(params, bias, begin, end, bias_sums)
                       : bias_gelu_backward_rows<T, false>(params, bias, begin, end, bias_sums);
  });
}

void dropout_add(const DropoutAddParams& params, int64_t begin, int64_t end) {
  with_type(params.input.dtype, [&](auto element) { dropout_add_rows<decltype(element)>(params, begin, end); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
