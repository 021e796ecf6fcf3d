// Small matrix products between blocks in cache, the inner loops of attention and of recurrent layers.
//
// C[r][n] (+)= sum_k A[r][k] B[k][n] with C float32. A word is what one step of the sum takes: a float32, or a pair of
// bfloat16 where the processor multiplies those. Lanes run along n, and A's words are broadcast, so A is read where it
// lies, by any two strides: keys and values of a tensor need no packing and no padding of their width.
#pragma once

#include "fusewright/cpu/tiles.h"

namespace fusewright::FUSEWRIGHT_ISA {

struct FloatWord {
  static constexpr int elements = 1;
  static Float multiply_add(Float sum, Float a, Float b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Two products of bfloat16 added to a float32 lane; subnormals count as zero.
struct PairWord {
  static constexpr int elements = 2;
  static constexpr bool added_last = false;  // to sums of earlier products, in tiles
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

// Rows by Vectors sums in registers. Whether they are added to C is known when compiling: a branch at the end would
// pass all of them through memory.
template <class Word, bool Accumulate, int Rows, int Vectors>
inline void product_tile(LeftOperand a, const float* b, int64_t b_stride, int64_t steps, float* c, int64_t c_stride) {
  Float sum[Rows][Vectors];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Float{};
  }
  const char* a_row[Rows];
  a_row[0] = static_cast<const char*>(a.data);
#pragma GCC unroll 6
  for (int r = 1; r < Rows; ++r) a_row[r] = a_row[r - 1] + a.row_bytes;
  for (int64_t offset = 0; steps > 0; --steps, offset += a.step_bytes, b += b_stride) {
    Float b_row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) b_row[v] = load(b + v * lanes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      int32_t word;
      memcpy(&word, a_row[r] + offset, sizeof(word));
      const Float spread = bit_cast<Float>(word - Int{});
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Word::multiply_add(sum[r][v], spread, b_row[v]);
    }
  }
  // Added last, so that rounding errors grow with the number of blocks and not with the length of the sequence.
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      store(c + v * lanes, Accumulate ? load(c + v * lanes) + sum[r][v] : sum[r][v]);
    }
    c += c_stride;
  }
}

// Rows in tiles of product_rows, the remaining ones in tiles of 4, 2 and 1.
template <class Word, bool Accumulate, int Vectors, int Rows = product_rows>
inline void product_columns(int64_t rows, LeftOperand a, const float* b, int64_t b_stride, int64_t steps, float* c,
                            int64_t c_stride) {
  int64_t r = 0;
  for (; r + Rows <= rows; r += Rows) {
    product_tile<Word, Accumulate, Rows, Vectors>(a.from_row(r), b, b_stride, steps, c + r * c_stride, c_stride);
  }
  if constexpr (Rows > 1) {
    constexpr int fewer = Rows > 4 ? 4 : Rows / 2;
    if (r < rows) {
      product_columns<Word, Accumulate, Vectors, fewer>(rows - r, a.from_row(r), b, b_stride, steps, c + r * c_stride,
                                                        c_stride);
    }
  }
}

template <class Word, bool Accumulate, int Vectors = product_vectors>
inline void product_in_vectors(int64_t rows, int64_t columns, int64_t steps, LeftOperand a, Lanes b, Lanes c) {
  int64_t n = 0;
  for (; n + Vectors * lanes <= columns; n += Vectors * lanes) {
    product_columns<Word, Accumulate, Vectors>(rows, a, b.data + n, b.stride, steps, c.data + n, c.stride);
  }
  if constexpr (Vectors > 1) {
    if (n < columns) {
      product_in_vectors<Word, Accumulate, Vectors / 2>(rows, columns - n, steps, a, {b.data + n, b.stride},
                                                        {c.data + n, c.stride});
    }
  }
}

// In vector registers. `columns` is a multiple of `lanes`; `steps` counts words.
template <class Word>
inline void vector_product(int64_t rows, int64_t columns, int64_t steps, LeftOperand a, Lanes b, Lanes c,
                           bool accumulate) {
  if (accumulate) {
    product_in_vectors<Word, true>(rows, columns, steps, a, b, c);
  } else {
    product_in_vectors<Word, false>(rows, columns, steps, a, b, c);
  }
}

// In tiles where they multiply such words, see tile_product for what the operands then have to look like behind their
// ends; else in vector registers.
template <class Word>
inline void product(int64_t rows, int64_t columns, int64_t steps, LeftOperand a, Lanes b, Lanes c, bool accumulate) {
#if FUSEWRIGHT_HAS_TILES
  if constexpr (Word::elements == 2) {
    tile_product<Word::added_last>(rows, columns, whole_tiles(steps), a.data, a.row_bytes, b.data, b.stride, c.data,
                                   c.stride, accumulate);
    return;
  }
#endif
  vector_product<Word>(rows, columns, steps, a, b, c, accumulate);
}

}  // namespace fusewright::FUSEWRIGHT_ISA
