// Dropout by Philox4x32-10, the bits of fusewright_kernels/philox.py.
#pragma once

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Blocks of four words drawn at a time: the loops over them vectorise.
constexpr int philox_blocks = 16;

// Word w of the block with counter counters[b] at words[w][b].
inline void philox_words(uint64_t key, const uint64_t counters[philox_blocks], uint32_t words[4][philox_blocks]) {
  for (int b = 0; b < philox_blocks; ++b) {
    words[0][b] = static_cast<uint32_t>(counters[b]);
    words[1][b] = static_cast<uint32_t>(counters[b] >> 32);
    words[2][b] = 0;
    words[3][b] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int b = 0; b < philox_blocks; ++b) {
      const uint64_t product0 = uint64_t{0xD2511F53} * words[0][b];
      const uint64_t product1 = uint64_t{0xCD9E8D57} * words[2][b];
      const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), high1 = static_cast<uint32_t>(product1 >> 32);
      words[0][b] = high1 ^ words[1][b] ^ key0;
      words[1][b] = static_cast<uint32_t>(product1);
      words[2][b] = high0 ^ words[3][b] ^ key1;
      words[3][b] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// values[i] = kept ? values[i] * scale : 0 for a row of `columns`; a dropped NaN is gone.
inline void apply_dropout(float* values, int64_t columns, int64_t row, int64_t seed, uint64_t threshold, float scale) {
  const uint64_t blocks_per_row = static_cast<uint64_t>(columns + 3) / 4;
  const uint64_t row_first = static_cast<uint64_t>(row) * blocks_per_row;
  uint64_t counters[philox_blocks];
  uint32_t words[4][philox_blocks];
  for (int64_t begin = 0; begin < columns; begin += 4 * philox_blocks) {
    for (int b = 0; b < philox_blocks; ++b) counters[b] = row_first + begin / 4 + b;
    philox_words(static_cast<uint64_t>(seed), counters, words);
    const int64_t count = columns - begin < 4 * philox_blocks ? columns - begin : 4 * philox_blocks;
    for (int64_t i = 0; i < count; ++i) {
      float& value = values[begin + i];
      value = words[i % 4][i / 4] >= threshold ? value * scale : 0.0f;
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
