// Matrix products in tile registers: AMX where the processor has it, a scalar model of it elsewhere.
//
// A tile holds 16 rows of 16 words. The model (the instruction set `amx_model`) runs the same blocking, packing and
// tails on a machine without tiles, so that they are tested everywhere; nobody would choose it for speed.
#pragma once

#include "fusewright/cpu/vector.h"

#if defined(__AVX512BF16__) && (defined(__AMX_BF16__) || defined(FUSEWRIGHT_TILE_MODEL))
#define FUSEWRIGHT_HAS_TILES 1
#else
#define FUSEWRIGHT_HAS_TILES 0
#endif

namespace fusewright::FUSEWRIGHT_ISA {

constexpr bool has_tiles = FUSEWRIGHT_HAS_TILES;
constexpr int64_t tile_rows = 16;
constexpr int64_t tile_words = 16;

inline int64_t whole_tiles(int64_t count) { return (count + tile_words - 1) / tile_words * tile_words; }

#if FUSEWRIGHT_HAS_TILES

// Tile numbers must be literals, hence macros: 0 to 3 hold sums, 4 and 5 left operands, 6 and 7 right ones.
#if defined(FUSEWRIGHT_TILE_MODEL)

static thread_local float tile_model[8][tile_rows][tile_words];

inline void model_load(int tile, const void* data, int64_t stride) {
  for (int r = 0; r < tile_rows; ++r) memcpy(tile_model[tile][r], static_cast<const char*>(data) + r * stride, 64);
}
inline void model_store(int tile, void* data, int64_t stride) {
  for (int r = 0; r < tile_rows; ++r) memcpy(static_cast<char*>(data) + r * stride, tile_model[tile][r], 64);
}
// sum[r][n] += left[r][k] right[k][n] over pairs k.
inline void model_multiply(int sum, int left, int right) {
  for (int r = 0; r < tile_rows; ++r) {
    for (int k = 0; k < tile_words; ++k) {
      const Float pair = broadcast(tile_model[left][r][k]);
      const Float total =
          bit_cast<Float>(_mm512_dpbf16_ps(bit_cast<__m512>(load(tile_model[sum][r])), bit_cast<__m512bh>(pair),
                                           bit_cast<__m512bh>(load(tile_model[right][k]))));
      store(tile_model[sum][r], total);
    }
  }
}
#define FUSEWRIGHT_TILE_ZERO(tile) memset(tile_model[tile], 0, sizeof(tile_model[tile]))
#define FUSEWRIGHT_TILE_LOAD(tile, data, stride) model_load(tile, data, stride)
#define FUSEWRIGHT_TILE_STORE(tile, data, stride) model_store(tile, data, stride)
#define FUSEWRIGHT_TILE_MULTIPLY(sum, left, right) model_multiply(sum, left, right)

struct TileSession {};

#else

#define FUSEWRIGHT_TILE_ZERO(tile) _tile_zero(tile)
#define FUSEWRIGHT_TILE_LOAD(tile, data, stride) _tile_loadd(tile, data, stride)
#define FUSEWRIGHT_TILE_STORE(tile, data, stride) _tile_stored(tile, data, stride)
#define FUSEWRIGHT_TILE_MULTIPLY(sum, left, right) _tile_dpbf16ps(sum, left, right)

// Tiles of one thread while a task runs. Released at its end: other libraries keep their own configuration, and a
// thread that sleeps with live tiles costs the system their saving.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    _tile_loadconfig(&configuration);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

#endif

inline void add_tile(const float* sums, float* c, int64_t c_stride) {
  for (int r = 0; r < tile_rows; ++r) store(c + r * c_stride, load(c + r * c_stride) + load(sums + r * tile_words));
}

// Sums of 16 * RowTiles rows and 16 * ColumnTiles columns: up to four tiles of sums fed by two on either side, so that
// a product never waits for the one before it. Sums that are added to C start from it in the tiles or, where AddLast,
// are added when they are done: then C's rounding does not meet every step.
template <int RowTiles, int ColumnTiles, bool AddLast>
inline void tile_block(const char* a, int64_t a_row_bytes, const float* b, int64_t b_stride, int64_t steps, float* c,
                       int64_t c_stride, bool accumulate) {
  constexpr bool two_rows = RowTiles == 2, two_columns = ColumnTiles == 2;
  const int64_t b_bytes = b_stride * 4, c_bytes = c_stride * 4;
  float* const lower = c + tile_rows * c_stride;
  if (accumulate && !AddLast) {
    FUSEWRIGHT_TILE_LOAD(0, c, c_bytes);
    if constexpr (two_columns) FUSEWRIGHT_TILE_LOAD(1, c + tile_words, c_bytes);
    if constexpr (two_rows) FUSEWRIGHT_TILE_LOAD(2, lower, c_bytes);
    if constexpr (two_rows && two_columns) FUSEWRIGHT_TILE_LOAD(3, lower + tile_words, c_bytes);
  } else {
    FUSEWRIGHT_TILE_ZERO(0);
    if constexpr (two_columns) FUSEWRIGHT_TILE_ZERO(1);
    if constexpr (two_rows) FUSEWRIGHT_TILE_ZERO(2);
    if constexpr (two_rows && two_columns) FUSEWRIGHT_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < steps; k += tile_words) {
    FUSEWRIGHT_TILE_LOAD(4, a + k * 4, a_row_bytes);
    FUSEWRIGHT_TILE_LOAD(6, b + k * b_stride, b_bytes);
    FUSEWRIGHT_TILE_MULTIPLY(0, 4, 6);
    if constexpr (two_columns) {
      FUSEWRIGHT_TILE_LOAD(7, b + k * b_stride + tile_words, b_bytes);
      FUSEWRIGHT_TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (two_rows) {
      FUSEWRIGHT_TILE_LOAD(5, a + tile_rows * a_row_bytes + k * 4, a_row_bytes);
      FUSEWRIGHT_TILE_MULTIPLY(2, 5, 6);
    }
    if constexpr (two_rows && two_columns) FUSEWRIGHT_TILE_MULTIPLY(3, 5, 7);
  }
  if (accumulate && AddLast) {
    float sums[tile_rows * tile_words];
    FUSEWRIGHT_TILE_STORE(0, sums, tile_words * 4);
    add_tile(sums, c, c_stride);
    if constexpr (two_columns) {
      FUSEWRIGHT_TILE_STORE(1, sums, tile_words * 4);
      add_tile(sums, c + tile_words, c_stride);
    }
    if constexpr (two_rows) {
      FUSEWRIGHT_TILE_STORE(2, sums, tile_words * 4);
      add_tile(sums, lower, c_stride);
    }
    if constexpr (two_rows && two_columns) {
      FUSEWRIGHT_TILE_STORE(3, sums, tile_words * 4);
      add_tile(sums, lower + tile_words, c_stride);
    }
    return;
  }
  FUSEWRIGHT_TILE_STORE(0, c, c_bytes);
  if constexpr (two_columns) FUSEWRIGHT_TILE_STORE(1, c + tile_words, c_bytes);
  if constexpr (two_rows) FUSEWRIGHT_TILE_STORE(2, lower, c_bytes);
  if constexpr (two_rows && two_columns) FUSEWRIGHT_TILE_STORE(3, lower + tile_words, c_bytes);
}

template <int RowTiles, bool AddLast>
inline void tile_columns(int64_t columns, const char* a, int64_t a_row_bytes, const float* b, int64_t b_stride,
                         int64_t steps, float* c, int64_t c_stride, bool accumulate) {
  int64_t n = 0;
  for (; n + 2 * tile_words <= columns; n += 2 * tile_words) {
    tile_block<RowTiles, 2, AddLast>(a, a_row_bytes, b + n, b_stride, steps, c + n, c_stride, accumulate);
  }
  if (n < columns)
    tile_block<RowTiles, 1, AddLast>(a, a_row_bytes, b + n, b_stride, steps, c + n, c_stride, accumulate);
}

// C (+)= A B in whole tiles: both operands are zero from their last row, word or column to the end of the tile, and C
// has room for whole tiles. Words of a row of A lie next to each other.
template <bool AddLast>
inline void tile_product(int64_t rows, int64_t columns, int64_t steps, const void* a, int64_t a_row_bytes,
                         const float* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  const char* left = static_cast<const char*>(a);
  int64_t r = 0;
  for (; r + tile_rows < rows; r += 2 * tile_rows) {
    tile_columns<2, AddLast>(columns, left + r * a_row_bytes, a_row_bytes, b, b_stride, steps, c + r * c_stride,
                             c_stride, accumulate);
  }
  if (r < rows) {
    tile_columns<1, AddLast>(columns, left + r * a_row_bytes, a_row_bytes, b, b_stride, steps, c + r * c_stride,
                             c_stride, accumulate);
  }
}

#else

struct TileSession {};

#endif

}  // namespace fusewright::FUSEWRIGHT_ISA
