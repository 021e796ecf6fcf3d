// Products with weights where they lie, for a single step: packing them, which many steps share, would cost more than
// all the rest. Lanes run along the width.
#pragma once

#include "fusewright/cpu/dot.h"
#include "fusewright/cpu/recurrent/layer.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Rows of input that a tile takes, where there are so many; its sums are as many as a vector has lanes.
#if defined(__AVX512F__)
constexpr int dot_inputs = 4;
#else
constexpr int dot_inputs = 2;
#endif

// Lane i * Inputs + r of the result is the sum over the width of weights[i] and row r. Each is summed alike in a tile
// of any shape.
template <class T, int Inputs>
FUSEWRIGHT_ALWAYS_INLINE Float dot_tile(const T* const* weights, const Stored<T>* inputs, int64_t input_stride,
                                        int64_t elements) {
  using Word = typename Multiplied<T>::Word;
  constexpr int count = lanes / Inputs;
  constexpr int64_t step = elements_per_vector<T>;
  const int64_t whole = elements / step * step, rest = elements - whole;
  Float sums[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) sums[i] = Float{};
  const auto multiply = [&](const Float* weight, int64_t at) {
#pragma GCC unroll 4
    for (int r = 0; r < Inputs; ++r) {
      Float input;
      memcpy(&input, inputs + r * input_stride + at, sizeof(input));
#pragma GCC unroll 16
      for (int i = 0; i < count; ++i) sums[i * Inputs + r] = Word::multiply_add(sums[i * Inputs + r], weight[i], input);
    }
  };
  Float weight[count];
  for (int64_t at = 0; at < whole; at += step) {
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) weight[i] = load_words(weights[i] + at);
    multiply(weight, at);
  }
  if (rest > 0) {
    for (int i = 0; i < count; ++i) weight[i] = load_last_words(weights[i] + whole, rest);
    multiply(weight, whole);
  }
  return sum_each(sums);
}

// c[r][l] = the sum over the width of row r and of weight row l, for lanes l of which `count` have a row. Rows of input
// are zero from their width to the end of a vector.
template <class T>
inline void dot_rows(int64_t rows, int64_t elements, const Stored<T>* inputs, int64_t input_stride, const T* weights,
                     int64_t count, Lanes c) {
  const T* row_of_lane[lanes];
  // Lanes without a row repeat the last one; nobody reads them.
  for (int64_t l = 0; l < lanes; ++l) row_of_lane[l] = weights + (l < count ? l : count - 1) * elements;
  int64_t r = 0;
  for (; r + dot_inputs <= rows; r += dot_inputs) {
    constexpr int per_tile = lanes / dot_inputs;
    for (int l = 0; l < lanes; l += per_tile) {
      const Float sums = dot_tile<T, dot_inputs>(row_of_lane + l, inputs + r * input_stride, input_stride, elements);
      for (int i = 0; i < lanes; ++i) c.data[(r + i % dot_inputs) * c.stride + l + i / dot_inputs] = sums[i];
    }
  }
  for (; r < rows; ++r) {
    store(c.data + r * c.stride, dot_tile<T, 1>(row_of_lane, inputs + r * input_stride, input_stride, elements));
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
