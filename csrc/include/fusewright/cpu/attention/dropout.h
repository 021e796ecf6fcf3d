// Dropout of a block of attention weights, the bits of fusewright_kernels/philox.py.
#pragma once

#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/cpu/attention/visibility.h"
#include "fusewright/cpu/philox.h"

namespace fusewright::FUSEWRIGHT_ISA {

// What each weight of a block is multiplied by: 1 / (1 - p) where it is kept, else 0. Keys by lanes of queries.
inline void dropout_factors(const AttentionParams& params, const AttentionSequence& sequence, const Block& block,
                            float* factors) {
  const uint64_t blocks_per_row = static_cast<uint64_t>(params.keys + 3) / 4;
  const int64_t row = (block.batch * params.heads + block.head) * params.queries + sequence.query_begin + block.query;
  const int64_t column = sequence.key_begin + block.key;
  // Lanes behind the last query weigh nothing, but nothing times NaN would be NaN.
  if (block.queries < query_block) memset(factors, 0, block.keys * query_block * sizeof(float));
  for (int64_t r = 0; r < block.queries; r += philox_blocks) {
    uint32_t words[4][philox_blocks];
    for (int64_t k = 0; k < block.keys; ++k) {
      if (k == 0 || (column + k) % 4 == 0) {
        uint64_t counters[philox_blocks];
        for (int i = 0; i < philox_blocks; ++i) {
          counters[i] = static_cast<uint64_t>(row + r + i) * blocks_per_row + static_cast<uint64_t>(column + k) / 4;
        }
        philox_words(params.seed, counters, words);
      }
      const uint32_t* word = words[(column + k) % 4];
      float* target = factors + k * query_block + r;
      for (int i = 0; i < philox_blocks; ++i) target[i] = word[i] >= params.keep_threshold ? params.keep_scale : 0.0f;
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
