// Blocks of rows whose elements are multiplied in parts (split.h), as operands of products in tiles. The same operands
// as in blocks.h: each segment of words holds one part of every element.
#pragma once

#include "fusewright/attention.h"
#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/cpu/split.h"

namespace fusewright::FUSEWRIGHT_ISA {

#if FUSEWRIGHT_HAS_TILES

// A vector of a row from column i on, zero behind its end.
template <class T>
inline Float load_columns(const Rows<T>& rows, int64_t row, int64_t i) {
  const int64_t rest = rows.width - i;
  return rest >= lanes ? load(rows.row(row) + i) : load_partial(rows.row(row) + i, rest);
}

// The parts of up to Columns columns of a block from `first` on, each a block of its own; zero behind the last.
template <int Parts, int Columns>
struct PartPlanes {
  BFloat16 part[Parts][key_block][Columns];
  int64_t count;

  template <class T>
  PartPlanes(const Rows<Split<T, Parts>>& rows, int64_t first) : count(rows.count) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < Columns; i += lanes) {
        const Float x = first + i < rows.width ? load_columns(rows, r, first + i) : Float{};
        const PartBits<Parts> bits = split<Parts>(x);
        for (int p = 0; p < Parts; ++p) store_part(&part[p][r][i], bits.part[p]);
      }
    }
  }
  Rows<BFloat16> rows(int p, int64_t width) const { return {part[p][0], Columns, count, width}; }
};

template <class T, int Parts>
inline LeftOperand left_rows(const Rows<Split<T, Parts>>& rows, void* scratch) {
  using Element = Split<T, Parts>;
  const int64_t segment = segment_words(rows.width), row_words = words<Element>(rows.width);
  BFloat16* row = static_cast<BFloat16*>(scratch);
  memset(scratch, 0, padded_rows<Element>(rows.count) * row_words * 4);
  for (int64_t r = 0; r < rows.count; ++r, row += 2 * row_words) {
    for (int64_t i = 0; i < rows.width; i += lanes) {
      const PartBits<Parts> bits = split<Parts>(load_columns(rows, r, i));
      for (int s = 0; s < segments<Element>; ++s)
        store_part(row + 2 * s * segment + i, bits.part[left_part<Element>(s)]);
    }
  }
  return {scratch, row_words * 4, 4};
}

template <class T, int Parts>
inline LeftOperand left_columns(const Rows<Split<T, Parts>>& rows, void* scratch) {
  using Element = Split<T, Parts>;
  const int64_t segment = segment_words(rows.count), row_words = words<Element>(rows.count);
  uint32_t* target = static_cast<uint32_t*>(scratch);
  for (int64_t first = 0; first < rows.width; first += tile_rows) {
    const PartPlanes<Parts, tile_rows> planes(rows, first);
    for (int s = 0; s < segments<Element>; ++s) {
      turn_columns_of_tile(planes.rows(left_part<Element>(s), tile_rows), target + first * row_words + s * segment,
                           row_words);
    }
  }
  return {scratch, row_words * 4, 4};
}

template <class T, int Parts>
inline void pack_rows_as_lanes(float* target, const Rows<Split<T, Parts>>& rows) {
  constexpr int64_t columns = 2 * tile_words;
  using Element = Split<T, Parts>;
  const int64_t segment = segment_words(rows.width);
  for (int64_t first = 0; first < rows.width; first += columns) {
    const PartPlanes<Parts, columns> planes(rows, first);
    for (int s = 0; s < segments<Element>; ++s) {
      pack_rows_as_lanes(target + (s * segment + first / 2) * query_block,
                         planes.rows(right_part<Element>(s), columns));
    }
  }
}

template <class T, int Parts>
inline void pack_width_as_lanes(float* target, const Rows<Split<T, Parts>>& rows) {
  using Element = Split<T, Parts>;
  const int64_t stride = whole_vectors(rows.width), segment = segment_words(rows.count);
  memset(target, 0, words<Element>(rows.count) * stride * sizeof(float));
  for (int64_t r = 0; r < rows.count; r += 2) {
    for (int64_t i = 0; i < rows.width; i += lanes) {
      const PartBits<Parts> first = split<Parts>(load_columns(rows, r, i));
      const PartBits<Parts> second = split<Parts>(r + 1 < rows.count ? load_columns(rows, r + 1, i) : Float{});
      for (int s = 0; s < segments<Element>; ++s) {
        const int p = right_part<Element>(s);
        store(target + (s * segment + r / 2) * stride + i, part_words(first.part[p], second.part[p]));
      }
    }
  }
}

#endif

}  // namespace fusewright::FUSEWRIGHT_ISA
