// Blocks of rows (queries, keys, values and their gradients) brought to the form that product.h takes.
#pragma once

#include "fusewright/attention.h"
#include "fusewright/cpu/words.h"

namespace fusewright::FUSEWRIGHT_ISA {

constexpr int64_t query_block = attention_query_block;
constexpr int64_t key_block = attention_key_block;

// Lanes that a block of queries takes. In tiles two vectors at a time, so that as words of a left operand they fill a
// tile.
template <class T>
inline int64_t lane_columns(int64_t queries) {
  return in_tiles<T> ? (queries + 2 * tile_words - 1) / (2 * tile_words) * (2 * tile_words) : whole_vectors(queries);
}

// x * 0 is 0 for a finite x only. With a factor, whether all are so much below infinity.
template <class T>
inline bool all_finite(const Rows<T>& rows, float factor = 1.0f) {
  Float zeros{};
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* row = rows.row(r);
    int64_t i = 0;
    for (; i + lanes <= rows.width; i += lanes) zeros += load(row + i) * factor * 0.0f;
    if (i < rows.width) zeros += load_partial(row + i, rows.width - i) * factor * 0.0f;
  }
  return sum_lanes(zeros) == 0.0f;
}

// ---- left operands: keys and values ----

// Bytes of scratch for one block of rows as a left operand.
template <class T>
inline int64_t left_scratch_bytes(int64_t width) {
  if (is_float<T>) return 0;
  const int64_t as_rows = key_block * padded_words<T>(width), as_columns = padded_rows<T>(width) * words<T>(key_block);
  return (as_rows > as_columns ? as_rows : as_columns) * 4;
}

// Whether bfloat16 rows can be multiplied where they lie: no word and no tile reaches behind the end of a row or block.
template <class T>
inline bool left_rows_in_place(const Rows<T>& rows) {
  if (in_tiles<T>) return rows.width % (2 * tile_words) == 0 && rows.count % tile_rows == 0;
  return rows.width % 2 == 0;
}

// Row r of the product is row r of the block, summed over its width.
template <class T>
inline LeftOperand left_rows(const Rows<T>& rows, void* scratch) {
  if constexpr (is_float<T>) {
    return {rows.data, rows.stride * 4, 4};
  } else if constexpr (in_pairs<T>) {
    if (left_rows_in_place(rows)) return {rows.data, rows.stride * 2, 4};
    const int64_t row_bytes = padded_words<T>(rows.width) * 4;
    memset(scratch, 0, padded_rows<T>(rows.count) * row_bytes);
    for (int64_t r = 0; r < rows.count; ++r) {
      memcpy(static_cast<char*>(scratch) + r * row_bytes, rows.row(r), rows.width * 2);
    }
    return {scratch, row_bytes, 4};
  } else {
    float* target = static_cast<float*>(scratch);
    for (int64_t r = 0; r < rows.count; ++r) to_floats(target + r * rows.width, rows.row(r), rows.width);
    return {target, rows.width * 4, 4};
  }
}

#if FUSEWRIGHT_HAS_TILES
// Up to 16 columns as rows of words, each a pair of rows, in whole tiles and zero behind the last.
inline void turn_columns_of_tile(const Rows<BFloat16>& rows, uint32_t* target, int64_t row_words) {
  for (int64_t word = 0; word < segment_words(rows.count); word += tile_words) {
    uint32_t block[tile_words][tile_rows] = {};
    for (int64_t w = 0; w < tile_words; ++w) {
      const int64_t row = 2 * (word + w);
      if (row >= rows.count) break;
      interleave_rows(block[w], rows.row(row), row + 1 < rows.count ? rows.row(row + 1) : nullptr, rows.width);
    }
    transpose_words(block[0], tile_rows, target + word, row_words);
  }
}

// Column i of the block as row i of words.
inline LeftOperand left_columns_in_tiles(const Rows<BFloat16>& rows, void* scratch) {
  constexpr int64_t row_words = key_block / 2;
  uint32_t* target = static_cast<uint32_t*>(scratch);
  for (int64_t first = 0; first < rows.width; first += tile_rows) {
    const int64_t width = rows.width - first < tile_rows ? rows.width - first : tile_rows;
    turn_columns_of_tile({rows.data + first, rows.stride, rows.count, width}, target + first * row_words, row_words);
  }
  return {scratch, row_words * 4, 4};
}
#endif

// Row r of the product is column r of the block, summed over its rows.
template <class T>
inline LeftOperand left_columns(const Rows<T>& rows, void* scratch) {
#if FUSEWRIGHT_HAS_TILES
  if constexpr (in_tiles<T>) return left_columns_in_tiles(rows, scratch);
#endif
  if constexpr (is_float<T>) {
    return {rows.data, 4, rows.stride * 4};
  } else if constexpr (in_pairs<T>) {
    uint32_t* target = static_cast<uint32_t*>(scratch);
    for (int64_t r = 0; r < rows.count; r += 2) {
      const T* second = r + 1 < rows.count ? rows.row(r + 1) : nullptr;
      interleave_rows(target + r / 2 * rows.width, rows.row(r), second, rows.width);
    }
    return {scratch, 4, rows.width * 4};
  } else {
    return {left_rows(rows, scratch).data, 4, rows.width * 4};
  }
}

// ---- right operands: queries and gradients of the output, packed once per block ----

// Words along the width by lanes of rows: lane r is row r, zero behind the last.
template <class T>
inline void pack_rows_as_lanes(float* target, const Rows<T>& rows) {
  constexpr int per_word = Multiplied<T>::Word::elements;
  const int64_t steps = words<T>(rows.width), whole_words = rows.width / per_word;
  memset(target, 0, padded_words<T>(rows.width) * query_block * sizeof(float));
  // Whole squares are turned in registers; where elements are widened on the way there are none.
  constexpr bool in_squares = in_pairs<T> || is_float<T>;
  const int64_t square_rows = in_squares ? rows.count / lanes * lanes : 0;
  const int64_t square_words = in_squares ? whole_words / lanes * lanes : 0;
  for (int64_t r = 0; r < square_rows; r += lanes) {
    for (int64_t k = 0; k < square_words; k += lanes) {
      Float square[lanes];
      for (int i = 0; i < lanes; ++i) memcpy(&square[i], rows.row(r + i) + k * per_word, sizeof(Float));
      transpose(square);
      for (int i = 0; i < lanes; ++i) store(target + (k + i) * query_block + r, square[i]);
    }
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* row = rows.row(r);
    for (int64_t k = r < square_rows ? square_words : 0; k < whole_words; ++k) {
      if constexpr (in_pairs<T>) {
        memcpy(target + k * query_block + r, row + 2 * k, 4);
      } else {
        target[k * query_block + r] = element(row + k);
      }
    }
    if (rows.width % per_word != 0) memcpy(target + (steps - 1) * query_block + r, row + rows.width - 1, sizeof(T));
  }
}

// Words along the rows by lanes of the width, zero behind the last: row k of the result is row k of the block, or its
// rows 2k and 2k + 1 interleaved.
template <class T>
inline void pack_width_as_lanes(float* target, const Rows<T>& rows) {
  const int64_t stride = whole_vectors(rows.width);
  memset(target, 0, words<T>(query_block) * stride * sizeof(float));
  for (int64_t r = 0; r < rows.count; r += Multiplied<T>::Word::elements) {
    if constexpr (in_pairs<T>) {
      const T* second = r + 1 < rows.count ? rows.row(r + 1) : nullptr;
      interleave_rows(reinterpret_cast<uint32_t*>(target) + r / 2 * stride, rows.row(r), second, rows.width);
    } else {
      to_floats(target + r * stride, rows.row(r), rows.width);
    }
  }
}

// ---- results ----

// Rows of the tensor from columns of `sums` (width by lanes), each lane scaled.
template <class T>
inline void write_lanes_as_rows(T* target, int64_t stride, int64_t count, int64_t width, const float* sums,
                                const float* scale) {
  const int64_t square_rows = count / lanes * lanes, square_width = width / lanes * lanes;
  for (int64_t r = 0; r < square_rows; r += lanes) {
    for (int64_t i = 0; i < square_width; i += lanes) {
      Float square[lanes];
      for (int k = 0; k < lanes; ++k) square[k] = load(sums + (i + k) * query_block + r);
      transpose(square);
      for (int k = 0; k < lanes; ++k) store(target + (r + k) * stride + i, square[k] * scale[r + k]);
    }
  }
  float row[lanes];
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = r < square_rows ? square_width : 0; i < width; i += lanes) {
      const int64_t left = width - i < lanes ? width - i : lanes;
      for (int64_t k = 0; k < left; ++k) row[k] = sums[(i + k) * query_block + r];
      if (left == lanes) {
        store(target + r * stride + i, load(row) * scale[r]);
      } else {
        store_partial(target + r * stride + i, load(row) * scale[r], left);
      }
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
