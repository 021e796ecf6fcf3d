// What the recurrent kernels share: which units a member of the team owns, and the packed matrices of a product.
#pragma once

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/words.h"
#include "fusewright/recurrent.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Rows that pass through a product and then through the gates while both are in cache.
constexpr int64_t recurrent_row_block = 48;

// Vectors of a panel: a packed matrix is panels of this many vectors of columns, word by word.
constexpr int64_t panel_vectors = 4;
constexpr int64_t panel_columns = panel_vectors * lanes;

// Words that are summed before they are added to the sums before, so that rounding errors do not grow with the width:
// few for float32, whose own rounding is all there is, more for pairs of bfloat16, which are rounded far coarser.
template <class T>
inline int64_t words_per_sum(int64_t steps) {
  if (in_pairs<T>) return 256;
  const int64_t half = (steps + 1) / 2;
  return half < 32 ? 32 : half > 128 ? 128 : half;
}

// A unit is one element of a state; `lanes` of them make a block. Blocks [begin, end) are a member's own.
struct Blocks {
  int64_t begin, end;

  int64_t count() const { return end - begin; }
};

inline int64_t unit_blocks(int64_t width) { return (width + lanes - 1) / lanes; }

// Elements of a block of a state of `width`.
inline int64_t elements_of(int64_t block, int64_t width) {
  const int64_t rest = width - block * lanes;
  return rest < lanes ? rest : lanes;
}

inline Blocks blocks_of(int64_t width, int64_t member, int64_t members) {
  const int64_t blocks = unit_blocks(width);
  return {blocks * member / members, blocks * (member + 1) / members};
}

inline int64_t panels(int64_t vectors) { return (vectors + panel_vectors - 1) / panel_vectors; }

// Elements of a row that is a left operand: whole vectors to write, whole words or tiles to read, and a cache line more
// so that rows do not fall into the same places of the cache.
template <class T>
inline int64_t state_stride(int64_t elements) {
  const int64_t unit = in_tiles<T> ? 2 * tile_words : 2 * lanes;
  return (elements + unit - 1) / unit * unit + 32;
}

template <class T>
inline int64_t panel_floats(int64_t vectors, int64_t elements) {
  return panels(vectors) * padded_words<T>(elements) * panel_columns;
}

// Vector `vector` of a packed matrix from up to `lanes` rows of a row-major one: lane l is row l, from `first` on;
// lanes behind the last row are zero.
template <class T>
inline void pack_rows(float* packed, int64_t vector, int64_t elements, const T* first, int64_t row_stride,
                      int64_t rows) {
  constexpr int64_t step = elements_per_vector<T>;
  const int64_t padded = padded_words<T>(elements);
  float* target = packed + vector / panel_vectors * padded * panel_columns + vector % panel_vectors * lanes;
  int64_t word = 0;
  if (rows == lanes) {
    for (; (word / lanes + 1) * step <= elements; word += lanes) {
      const T* source = first + word / lanes * step;
      Float block[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) block[r] = load_words(source + r * row_stride);
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) store(target + (word + k) * panel_columns, block[k]);
    }
  }
  for (; word < padded; word += lanes) {
    const int64_t at = word / lanes * step, rest = elements - at;
    Float block[lanes] = {};
    for (int64_t r = 0; r < rows && rest > 0; ++r) {
      const T* row = first + r * row_stride + at;
      block[r] = rest >= step ? load_words(row) : load_last_words(row, rest);
    }
    transpose(block);
    for (int64_t k = 0; k < lanes && word + k < padded; ++k) store(target + (word + k) * panel_columns, block[k]);
  }
}

// Columns [first, first + count) of a row-major matrix as vectors of a packed one, whose words run down its rows; the
// lanes behind the last column are zero. row(k) is row k of `elements`.
template <class T, class Row>
inline void pack_columns(float* packed, int64_t elements, int64_t first, int64_t count, Row row) {
  const int64_t padded = padded_words<T>(elements);
  for (int64_t panel = 0; panel * panel_columns < count; ++panel) {
    float* target = packed + panel * padded * panel_columns;
    const int64_t at = first + panel * panel_columns, rest = count - panel * panel_columns;
    const int64_t width = rest < panel_columns ? rest : panel_columns;
    if (width < panel_columns) memset(target, 0, padded * panel_columns * sizeof(float));
    for (int64_t word = 0; word < padded; ++word, target += panel_columns) {
      if constexpr (in_pairs<T>) {
        if (2 * word >= elements) {
          memset(target, 0, panel_columns * sizeof(float));
        } else {
          const T* second = 2 * word + 1 < elements ? row(2 * word + 1) + at : nullptr;
          interleave_rows(reinterpret_cast<uint32_t*>(target), row(2 * word) + at, second, width);
        }
      } else {
        to_floats(target, row(word) + at, width);
      }
    }
  }
}

// c = a * (`vectors` vectors of a packed matrix from vector `first` on, a multiple of panel_vectors).
template <class T>
inline void panel_product(int64_t rows, int64_t elements, LeftOperand a, float* packed, int64_t first, int64_t vectors,
                          Lanes c) {
  const int64_t padded = padded_words<T>(elements), steps = words<T>(elements), run = words_per_sum<T>(steps);
  for (int64_t vector = 0; vector < vectors; vector += panel_vectors) {
    float* panel = packed + (first + vector) / panel_vectors * padded * panel_columns;
    const int64_t rest = vectors - vector, columns = (rest < panel_vectors ? rest : panel_vectors) * lanes;
    for (int64_t k = 0; k < steps; k += run) {
      const int64_t count = steps - k < run ? steps - k : run;
      const LeftOperand a_block{static_cast<const char*>(a.data) + k * 4, a.row_bytes, a.step_bytes};
      product<typename Multiplied<T>::Word>(rows, columns, count, a_block, {panel + k * panel_columns, panel_columns},
                                            {c.data + vector * lanes, c.stride}, k > 0);
    }
  }
}

// ---- a vector of units, of which the last may be partial ----

template <class T>
inline Float load_units(const T* source, int64_t count) {
  return count >= lanes ? load(source) : load_partial(source, count);
}
template <class T>
inline void store_units(T* target, Float value, int64_t count) {
  if (count >= lanes) return store(target, value);
  store_partial(target, value, count);
}

// The value as T holds it.
template <class T>
inline Float rounded(Float value) {
  if constexpr (is_float<T>) {
    return value;
  } else {
    T buffer[lanes];
    store(buffer, value);
    return load(buffer);
  }
}

// Numbers of gates, of saved values and of summed biases of a unit; and `group`, blocks of units whose gates make whole
// panels.
template <RecurrentCell Cell>
struct CellShape;
template <>
struct CellShape<RecurrentCell::lstm> {
  static constexpr int64_t gates = 4, saved = 4, biases = 4, group = 1;
};
// The new gate's biases are two, for the reset gate stands between them.
template <>
struct CellShape<RecurrentCell::gru> {
  static constexpr int64_t gates = 3, saved = 4, biases = 4, group = 4;
};
template <>
struct CellShape<RecurrentCell::rnn_tanh> {
  static constexpr int64_t gates = 1, saved = 0, biases = 1, group = 4;
};
template <>
struct CellShape<RecurrentCell::rnn_relu> : CellShape<RecurrentCell::rnn_tanh> {};

template <RecurrentCell Value>
struct CellConstant {
  static constexpr RecurrentCell value = Value;
};

// Calls body with a CellConstant.
template <class Body>
inline void with_cell(RecurrentCell cell, Body body) {
  switch (cell) {
    case RecurrentCell::lstm:
      return body(CellConstant<RecurrentCell::lstm>{});
    case RecurrentCell::gru:
      return body(CellConstant<RecurrentCell::gru>{});
    case RecurrentCell::rnn_tanh:
      return body(CellConstant<RecurrentCell::rnn_tanh>{});
    case RecurrentCell::rnn_relu:
      return body(CellConstant<RecurrentCell::rnn_relu>{});
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
