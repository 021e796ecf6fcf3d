// Which queries of a block meet which keys of a chunk, and their logits: keys by lanes of queries.
#pragma once

#include "fusewright/cpu/attention/logits.h"
#include "fusewright/cpu/lsh_attention/chunk.h"
#include "fusewright/cpu/philox.h"

namespace fusewright::FUSEWRIGHT_ISA {

// A block of queries of one chunk, one lane each; lanes behind the last have position -1 and meet nobody.
struct QueryLanes {
  int64_t batch, head, round, count;
  alignas(64) int32_t positions[query_block];
  alignas(64) int32_t buckets[query_block];

  template <class AnyChunk>
  void read(const LshAttentionParams& params, const AnyChunk& chunk, int64_t block) {
    count = chunk.count_of(block);
    memcpy(positions, chunk.positions(block), count * sizeof(int32_t));
    for (int64_t r = count; r < query_block; ++r) positions[r] = -1;
    if (params.buckets == nullptr) return;
    memcpy(buckets, chunk.buckets(block), count * sizeof(int32_t));
    for (int64_t r = count; r < query_block; ++r) buckets[r] = -1;
  }
};

inline Int load_integers(const int32_t* source) {
  Int vector;
  memcpy(&vector, source, sizeof(vector));
  return vector;
}

// In how many places of all rounds key `position` meets each of 16 queries at most, its lanes from v.
inline Int copies(const LshAttentionParams& params, const QueryLanes& queries, int64_t v, int64_t position) {
  const int32_t ring = static_cast<int32_t>(params.ring());
  const int64_t row = params.row(queries.batch, queries.head, 0);
  Int count{};
  for (int64_t round = 0; round < params.rounds; ++round) {
    const int64_t round_row = row + round * params.length;
    Int chunk{}, bucket{};
    for (int i = 0; i < lanes; ++i) {
      const int32_t query = queries.positions[v + i];
      if (query < 0) continue;
      chunk[i] = params.chunk_of[round_row + query];
      if (params.buckets != nullptr) bucket[i] = static_cast<int32_t>(params.buckets[round_row + query]);
    }
    // A bucket belongs to its round, so between rounds only chunks can meet.
    const int64_t first = params.buckets == nullptr ? 0 : round,
                  last = params.buckets == nullptr ? params.rounds : round + 1;
    for (int64_t key_round = first; key_round < last; ++key_round) {
      const int64_t key_row = row + key_round * params.length + position;
      Int meets{};
      for (int64_t offset = -params.chunks_before; offset <= params.chunks_after; ++offset) {
        // The chunks of queries whose window holds the key at this offset.
        const int64_t target = ((params.chunk_of[key_row] - offset) % ring + ring) % ring;
        meets -= chunk == static_cast<int32_t>(target);
      }
      if (params.buckets != nullptr) meets &= bucket == static_cast<int32_t>(params.buckets[key_row]);
      count += meets;
    }
  }
  return count;
}

// Scores of block `block` of a chunk become logits, -inf where a pair does not meet. Returns whether any pair can.
template <class AnyChunk>
inline bool form_logits(const LshAttentionParams& params, const QueryLanes& queries, const AnyChunk& chunk,
                        int64_t block, int64_t columns, float* scores) {
  if (params.buckets != nullptr && chunk.round() != queries.round) return false;
  const int64_t keys = chunk.count_of(block);
  for (int64_t v = 0; v < columns; v += lanes) {
    const Int query = load_integers(queries.positions + v);
    const Int nobody = query < 0;
    const Int bucket = params.buckets == nullptr ? Int{} : load_integers(queries.buckets + v);
    for (int64_t k = 0; k < keys; ++k) {
      float* const row = scores + k * query_block + v;
      if (!chunk.met(block)[k]) {
        store(row, broadcast(negative_infinity));
        continue;
      }
      const int32_t position = chunk.positions(block)[k];
      Int hidden = nobody | (params.causal ? query <= position : query == position);
      if (params.buckets != nullptr) hidden |= bucket != chunk.buckets(block)[k];
      Float logit = load(row) * chunk.factors(block)[k];
      if (params.chunk_of != nullptr) {
        const Int count = copies(params, queries, v, position);
        for (int i = 0; i < lanes; ++i) logit[i] -= count[i] > 1 ? __builtin_logf(static_cast<float>(count[i])) : 0.0f;
      }
      store(row, select(hidden, broadcast(negative_infinity), logit));
    }
  }
  return true;
}

// What each weight is multiplied by: 1 / (1 - p) where it is kept, else 0. The block's first key is at place
// `first_place` of the window.
inline void lsh_dropout_factors(const LshAttentionParams& params, const QueryLanes& queries, int64_t first_place,
                                int64_t keys, float* factors) {
  const uint64_t blocks_per_row = static_cast<uint64_t>(params.window() * params.chunk_length + 3) / 4;
  const int64_t row = params.row(queries.batch, queries.head, queries.round);
  // Lanes behind the last query weigh nothing, but nothing times NaN would be NaN.
  if (queries.count < query_block) memset(factors, 0, keys * query_block * sizeof(float));
  for (int64_t r = 0; r < queries.count; r += philox_blocks) {
    uint32_t words[4][philox_blocks];
    for (int64_t k = 0; k < keys; ++k) {
      const int64_t place = first_place + k;
      if (k == 0 || place % 4 == 0) {
        uint64_t counters[philox_blocks];
        for (int i = 0; i < philox_blocks; ++i) {
          counters[i] =
              static_cast<uint64_t>(row + queries.positions[r + i]) * blocks_per_row + static_cast<uint64_t>(place) / 4;
        }
        philox_words(params.seed, counters, words);
      }
      const uint32_t* word = words[place % 4];
      float* target = factors + k * query_block + r;
      for (int i = 0; i < philox_blocks; ++i) target[i] = word[i] >= params.keep_threshold ? params.keep_scale : 0.0f;
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
