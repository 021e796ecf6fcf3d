// Products of few rows with weights where they lie, bound by reading those once: packing them, which many rows would
// share, would cost more than all the rest. Lanes run along the width.
#pragma once

#include "fusewright/cpu/dot.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Rows of input that are multiplied together, where there are so many, else half as many and so on.
#if defined(__AVX512F__)
constexpr int dot_inputs = 8;
#else
constexpr int dot_inputs = 4;
#endif

// Bytes from where weights are read to where they are asked for: while several rows are multiplied, the processor's own
// prefetching falls behind.
constexpr int64_t prefetch_distance = 2048;

// sums[r * lanes] = the products of row r of the inputs with a row of weights, in lanes still to be added. One row of
// weights after the other, in the order of memory: read two at a time, they come at half the speed.
template <class T, int Inputs>
FUSEWRIGHT_ALWAYS_INLINE void multiply_rows(const T* weights, const Stored<T>* inputs, int64_t input_stride,
                                            int64_t elements, Float* sums) {
  using Word = typename Multiplied<T>::Word;
  constexpr int64_t step = elements_per_vector<T>;
  const int64_t whole = elements / step * step, rest = elements - whole;
  Float sum[Inputs];
#pragma GCC unroll 8
  for (int r = 0; r < Inputs; ++r) sum[r] = Float{};
  const auto multiply = [&](Float weight, int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < Inputs; ++r) {
      Float input;
      memcpy(&input, inputs + r * input_stride + at, sizeof(input));
      sum[r] = Word::multiply_add(sum[r], weight, input);
    }
  };
  for (int64_t at = 0; at < whole; at += step) {
    if constexpr (Inputs > 2) __builtin_prefetch(weights + at + prefetch_distance / sizeof(T));
    multiply(load_words(weights + at), at);
  }
  if (rest > 0) multiply(load_last_words(weights + whole, rest), whole);
#pragma GCC unroll 8
  for (int r = 0; r < Inputs; ++r) sums[r * lanes] = sum[r];
}

// c[r][l] = the sum over the width of row r and of weight row l, for `rows` rows and lanes l of which `count` have a
// row of weights. Rows of input are zero from their width to the end of a vector. Each sum is made alike, whatever
// stands beside it.
template <class T, int Inputs = dot_inputs>
inline void dot_rows(int64_t rows, int64_t elements, const Stored<T>* inputs, int64_t input_stride, const T* weights,
                     int64_t weight_stride, int64_t count, Lanes c) {
  int64_t r = 0;
  for (; r + Inputs <= rows; r += Inputs) {
    Float sums[Inputs * lanes];
    for (int64_t l = 0; l < lanes; ++l) {
      // Lanes without a row repeat the last one; nobody reads them.
      const T* row = weights + (l < count ? l : count - 1) * weight_stride;
      multiply_rows<T, Inputs>(row, inputs + r * input_stride, input_stride, elements, sums + l);
    }
    for (int i = 0; i < Inputs; ++i) store(c.data + (r + i) * c.stride, sum_each(sums + i * lanes));
  }
  if constexpr (Inputs > 1) {
    if (r == rows) return;
    dot_rows<T, Inputs / 2>(rows - r, elements, inputs + r * input_stride, input_stride, weights, weight_stride, count,
                            {c.data + r * c.stride, c.stride});
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
