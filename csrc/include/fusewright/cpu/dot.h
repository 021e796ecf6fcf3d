// Dot products of rows, for one or few that would not fill the lanes of a vector: lanes run along the width.
#pragma once

#include "fusewright/cpu/words.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Lane i of the result is the sum of the lanes of vectors[i]: at each step two vectors fold into the halves of one. The
// lanes of every vector are added in the same order. All is unrolled, so that the orders are constants.
template <int Half = lanes / 2>
FUSEWRIGHT_ALWAYS_INLINE Float sum_each(Float* vectors) {
  if constexpr (Half == 0) {
    return vectors[0];
  } else {
    Int low, high;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      const int within = i % (2 * Half), block = i - within;
      const int from = within < Half ? block + within : lanes + block + within - Half;
      low[i] = from;
      high[i] = from + Half;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Half; ++i) {
      const Float a = vectors[i], b = vectors[i + Half];
      vectors[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    return sum_each<Half / 2>(vectors);
  }
}

// Words of a row of `width` elements in whole vectors.
template <class T>
inline int64_t packed_row_words(int64_t width) {
  return (width + elements_per_vector<T> - 1) / elements_per_vector<T> * lanes;
}

template <class T>
inline void pack_row(float* target, const T* row, int64_t width) {
  memset(target, 0, packed_row_words<T>(width) * sizeof(float));
  if constexpr (in_pairs<T>) {
    if (width > 0) memcpy(target, row, width * sizeof(T));
  } else {
    to_floats(target, row, width);
  }
}

// scores[k] = sum over the width of row and keys.row(k), for whole vectors of keys; `row` is packed.
template <class T>
inline void dot_products(const float* row, const Rows<T>& keys, float* scores) {
  using Word = typename Multiplied<T>::Word;
  constexpr int64_t step = elements_per_vector<T>;
  const int64_t whole = keys.width / step, rest = keys.width - whole * step;
  for (int64_t first = 0; first < keys.count; first += lanes) {
    Float sums[lanes];
    // Row by row, in the order of memory: the processor's prefetching follows that.
    for (int i = 0; i < lanes; ++i) {
      // Lanes behind the last key repeat it; nobody reads their scores.
      const T* key = keys.row(first + i < keys.count ? first + i : keys.count - 1);
      Float sum{};
      for (int64_t v = 0; v < whole; ++v) {
        sum = Word::multiply_add(sum, load_words(key + v * step), load(row + v * lanes));
      }
      if (rest > 0) {
        sum = Word::multiply_add(sum, load_last_words(key + whole * step, rest), load(row + whole * lanes));
      }
      sums[i] = sum;
    }
    store(scores + first, sum_each(sums));
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
