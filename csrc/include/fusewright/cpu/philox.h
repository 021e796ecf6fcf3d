// Dropout on a float32 row by Philox4x32-10, the bits of fusewright_kernels/philox.py.
#pragma once

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Blocks of four words drawn at a time: the loops over them vectorise.
constexpr int philox_blocks = 16;

// Words for blocks [first, first + philox_blocks), word w of block b at words[4 * b + w].
inline void philox_words(uint64_t key, uint64_t first, uint32_t words[4 * philox_blocks]) {
  uint32_t x0[philox_blocks], x1[philox_blocks], x2[philox_blocks], x3[philox_blocks];
  for (int b = 0; b < philox_blocks; ++b) {
    x0[b] = static_cast<uint32_t>(first + b);
    x1[b] = static_cast<uint32_t>((first + b) >> 32);
    x2[b] = 0;
    x3[b] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int b = 0; b < philox_blocks; ++b) {
      const uint64_t product0 = uint64_t{0xD2511F53} * x0[b];
      const uint64_t product1 = uint64_t{0xCD9E8D57} * x2[b];
      const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), high1 = static_cast<uint32_t>(product1 >> 32);
      x0[b] = high1 ^ x1[b] ^ key0;
      x1[b] = static_cast<uint32_t>(product1);
      x2[b] = high0 ^ x3[b] ^ key1;
      x3[b] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int b = 0; b < philox_blocks; ++b) {
    words[4 * b] = x0[b];
    words[4 * b + 1] = x1[b];
    words[4 * b + 2] = x2[b];
    words[4 * b + 3] = x3[b];
  }
}

// values[i] = kept ? values[i] * scale : 0 for a row of `columns`; a dropped NaN is gone.
inline void apply_dropout(float* values, int64_t columns, int64_t row, int64_t seed, uint64_t threshold, float scale) {
  const uint64_t blocks_per_row = static_cast<uint64_t>(columns + 3) / 4;
  const uint64_t row_first = static_cast<uint64_t>(row) * blocks_per_row;
  uint32_t words[4 * philox_blocks];
  for (int64_t begin = 0; begin < columns; begin += 4 * philox_blocks) {
    philox_words(static_cast<uint64_t>(seed), row_first + begin / 4, words);
    const int64_t count = columns - begin < 4 * philox_blocks ? columns - begin : 4 * philox_blocks;
    for (int64_t i = 0; i < count; ++i) values[begin + i] = words[i] >= threshold ? values[begin + i] * scale : 0.0f;
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
