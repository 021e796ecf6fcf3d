// Small matrix products between blocks in cache, the inner loops of attention.
//
// C[r][n] (+)= sum_k A[r][k] B[k][n] with C float32. A word is what one step of the sum takes: a float32, or a pair of
// bfloat16 where the processor multiplies those. Lanes run along n, and A's words are broadcast, so A is read where it
// lies, by any two strides: keys and values of a tensor need no packing and no padding of their width.
#pragma once

#include "fusewright/cpu/attention/tiles.h"

namespace fusewright::FUSEWRIGHT_ISA {

struct FloatWord {
  static constexpr int elements = 1;
  static Float multiply_add(Float sum, Float a, Float b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Two products of bfloat16 added to a float32 lane; subnormals count as zero.
struct PairWord {
  static constexpr int elements = 2;
  static Float multiply_add(Float sum, Float a, Float b) {
    return bit_cast<Float>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
};
#endif

// Words of A: row r, step k at data + r * row_bytes + k * step_bytes.
struct LeftOperand {
  const void* data;
  int64_t row_bytes;
  int64_t step_bytes;

  LeftOperand from_row(int64_t row) const {
    return {static_cast<const char*>(data) + row * row_bytes, row_bytes, step_bytes};
  }
};

// Rows of lanes, float32 sums or words: row k at data + k * stride, 4 bytes each.
struct Lanes {
  float* data;
  int64_t stride;
};

#if defined(__AVX512F__)
constexpr int product_rows = 6, product_vectors = 4;  // 24 sums of 32 registers
#else
constexpr int product_rows = 6, product_vectors = 2;  // 12 sums of 16 registers
#endif

template <class Word, int Rows, int Vectors>
inline void product_tile(LeftOperand a, const float* b, int64_t b_stride, int64_t steps, float* c, int64_t c_stride,
                         bool accumulate) {
  Float sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Float{};
  }
  const char* a_row[Rows];
  for (int r = 0; r < Rows; ++r) a_row[r] = static_cast<const char*>(a.data) + r * a.row_bytes;
  for (int64_t k = 0; k < steps; ++k) {
    Float b_row[Vectors];
    for (int v = 0; v < Vectors; ++v) b_row[v] = load(b + k * b_stride + v * lanes);
    for (int r = 0; r < Rows; ++r) {
      int32_t word;
      memcpy(&word, a_row[r] + k * a.step_bytes, sizeof(word));
      const Float spread = bit_cast<Float>(word - Int{});
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Word::multiply_add(sum[r][v], spread, b_row[v]);
    }
  }
  // Added last, so that rounding errors grow with the number of blocks and not with the length of the sequence.
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      float* target = c + r * c_stride + v * lanes;
      store(target, accumulate ? load(target) + sum[r][v] : sum[r][v]);
    }
  }
}

// The remaining rows, fewer than product_rows.
template <class Word, int Vectors, int Rows = product_rows - 1>
inline void product_last_rows(int64_t rows, LeftOperand a, const float* b, int64_t b_stride, int64_t steps, float* c,
                              int64_t c_stride, bool accumulate) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      product_tile<Word, Rows, Vectors>(a, b, b_stride, steps, c, c_stride, accumulate);
    } else {
      product_last_rows<Word, Vectors, Rows - 1>(rows, a, b, b_stride, steps, c, c_stride, accumulate);
    }
  }
}

template <class Word, int Vectors>
inline void product_columns(int64_t rows, LeftOperand a, const float* b, int64_t b_stride, int64_t steps, float* c,
                            int64_t c_stride, bool accumulate) {
  int64_t r = 0;
  for (; r + product_rows <= rows; r += product_rows) {
    product_tile<Word, product_rows, Vectors>(a.from_row(r), b, b_stride, steps, c + r * c_stride, c_stride,
                                              accumulate);
  }
  product_last_rows<Word, Vectors>(rows - r, a.from_row(r), b, b_stride, steps, c + r * c_stride, c_stride, accumulate);
}

template <class Word, int Vectors = product_vectors - 1>
inline void product_last_columns(int64_t vectors, int64_t rows, LeftOperand a, const float* b, int64_t b_stride,
                                 int64_t steps, float* c, int64_t c_stride, bool accumulate) {
  if constexpr (Vectors > 0) {
    if (vectors == Vectors) {
      product_columns<Word, Vectors>(rows, a, b, b_stride, steps, c, c_stride, accumulate);
    } else {
      product_last_columns<Word, Vectors - 1>(vectors, rows, a, b, b_stride, steps, c, c_stride, accumulate);
    }
  }
}

// In vector registers. `columns` is a multiple of `lanes`; `steps` counts words.
template <class Word>
inline void vector_product(int64_t rows, int64_t columns, int64_t steps, LeftOperand a, Lanes b, Lanes c,
                           bool accumulate) {
  constexpr int64_t tile_columns = product_vectors * lanes;
  int64_t n = 0;
  for (; n + tile_columns <= columns; n += tile_columns) {
    product_columns<Word, product_vectors>(rows, a, b.data + n, b.stride, steps, c.data + n, c.stride, accumulate);
  }
  product_last_columns<Word>((columns - n) / lanes, rows, a, b.data + n, b.stride, steps, c.data + n, c.stride,
                             accumulate);
}

// In tiles where they multiply such words, see tile_product for what the operands then have to look like behind their
// ends; else in vector registers.
template <class Word>
inline void product(int64_t rows, int64_t columns, int64_t steps, LeftOperand a, Lanes b, Lanes c, bool accumulate) {
#if FUSEWRIGHT_HAS_TILES
  if constexpr (Word::elements == 2) {
    tile_product(rows, columns, whole_tiles(steps), a.data, a.row_bytes, b.data, b.stride, c.data, c.stride,
                 accumulate);
    return;
  }
#endif
  vector_product<Word>(rows, columns, steps, a, b, c, accumulate);
}

}  // namespace fusewright::FUSEWRIGHT_ISA
