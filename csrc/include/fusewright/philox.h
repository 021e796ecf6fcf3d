// Counter-based random bits: Philox4x32-10, the same bits on every backend.
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

// The four words of one block. The key is the seed; the counter's upper 64 bits are zero.
FUSEWRIGHT_HOST_DEVICE void philox4x32(uint64_t key, uint64_t counter, uint32_t out[4]) {
  constexpr uint64_t multiplier0 = 0xD2511F53u;
  constexpr uint64_t multiplier1 = 0xCD9E8D57u;
  uint32_t word0 = static_cast<uint32_t>(counter);
  uint32_t word1 = static_cast<uint32_t>(counter >> 32);
  uint32_t word2 = 0;
  uint32_t word3 = 0;
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = multiplier0 * word0;
    const uint64_t product1 = multiplier1 * word2;
    word0 = static_cast<uint32_t>(product1 >> 32) ^ word1 ^ key0;
    word1 = static_cast<uint32_t>(product1);
    word2 = static_cast<uint32_t>(product0 >> 32) ^ word3 ^ key1;
    word3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  out[0] = word0;
  out[1] = word1;
  out[2] = word2;
  out[3] = word3;
}

// Dropout over rows of `columns` elements: element `column` of `row` is decided by word column % 4 of this block.
FUSEWRIGHT_HOST_DEVICE uint64_t dropout_block(int64_t row, int64_t column, int64_t columns) {
  return static_cast<uint64_t>(row) * static_cast<uint64_t>((columns + 3) / 4) + static_cast<uint64_t>(column / 4);
}

}  // namespace fusewright
