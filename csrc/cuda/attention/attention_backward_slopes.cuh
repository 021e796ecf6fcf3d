// Weights and slopes, the gradients of logits, of a tile in the registers of a warpgroup: rows are keys, columns
// queries. A thread has key and key + 8, and of the queries those at `column` + 8 j + c.
#pragma once

#include "attention_backward.cuh"
#include "attention_rows.cuh"
#include "attention_softmax.cuh"
#include "attention_tile_sm90.cuh"
#include "fusewright/cuda/mma.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

// Two queries' numbers.
__device__ __forceinline__ void load_pair(const float* numbers, float (&values)[2]) {
  Packed<float, 2> pair;
  pair.load(numbers);
  pair.unpack(values);
}

// The softmax's weights from the products of queries and keys.
template <int Half>
__device__ __forceinline__ void weigh(float (&products)[Half], const AttentionRowNumbers<2 * Half>& numbers,
                                      float scale_log2, int column) {
#pragma unroll
  for (int j = 0; j < Half / 4; ++j) {
    float reference[2], inverse[2];
    load_pair(numbers.reference + column + 8 * j, reference);
    load_pair(numbers.inverse + column + 8 * j, inverse);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& product = products[4 * j + i];
      product = exp2_flushed(product * scale_log2 - reference[i % 2]) * inverse[i % 2];
    }
  }
}

// Slopes from the gradients of the weights.
template <int Half>
__device__ __forceinline__ void differentiate(float (&gradients)[Half], const float (&weights)[Half],
                                              const AttentionRowNumbers<2 * Half>& numbers, int column) {
#pragma unroll
  for (int j = 0; j < Half / 4; ++j) {
    float delta[2];
    load_pair(numbers.delta + column + 8 * j, delta);
#pragma unroll
    for (int i = 0; i < 4; ++i) gradients[4 * j + i] = weights[4 * j + i] * (gradients[4 * j + i] - delta[i % 2]);
  }
}

// Pairs that do not take part have 0, whatever came out.
template <int Half>
__device__ __forceinline__ void hide_pairs(float (&values)[Half], const AttentionRows& rows, int key, int first_query,
                                           int column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = rows.first_query(key + 8 * r) - first_query - column;
    const int end = rows.end_query(key + 8 * r) - first_query - column;
#pragma unroll
    for (int j = 0; j < Half / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (8 * j + c < begin || 8 * j + c >= end) values[4 * j + 2 * r + c] = 0.0f;
      }
    }
  }
}

// A warpgroup's slopes, packed, as rows of queries: its 64 keys are slab `consumer` of the tile.
template <int Queries>
__device__ __forceinline__ void store_slopes(AttentionTile<Queries, attention_key_tile>& tile,
                                             const uint32_t (&slopes)[Queries / 4], int consumer) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size % 4;
  // Each lane names a row of a matrix of 8 queries and 8 keys; of four, the second and fourth are of key + 8.
  const int query = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
#pragma unroll
  for (int k = 0; k < Queries / 16; ++k) {
    const uint32_t (&matrices)[4] = *reinterpret_cast<const uint32_t (*)[4]>(slopes + 4 * k);
    store_matrices<true>(matrices, tile.chunk_at(consumer, 16 * k + query, chunk));
  }
}

}  // namespace fusewright::cuda
