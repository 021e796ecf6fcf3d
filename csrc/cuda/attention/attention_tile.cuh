// Tiles of rows of D columns in shared memory, and the tiles of keys that a block goes through.
#pragma once

#include "attention_rows.cuh"
#include "fusewright/cuda/slab.cuh"

namespace fusewright::cuda {

// Aligned to the pattern of the swizzle.
template <int Rows, int D>
struct alignas(1024) AttentionTile {
  static constexpr int slabs = D / slab_columns;
  static constexpr int slab_bytes = Rows * slab_row_bytes;
  static constexpr int bytes = slabs * slab_bytes;
  unsigned char data[bytes];

  // Row `row`, at the start of columns [16 * k, 16 * k + 16).
  __device__ __forceinline__ const unsigned char* at(int row, int k) const {
    constexpr int products_of_slab = slab_columns / 16;
    return data + k / products_of_slab * slab_bytes + row * slab_row_bytes + k % products_of_slab * 32;
  }

  // Where the eight elements [8 * chunk, 8 * chunk + 8) of a slab's row lie in the swizzle.
  __device__ __forceinline__ unsigned char* chunk_at(int slab, int row, int chunk) {
    return data + slab * slab_bytes + row * slab_row_bytes + (chunk ^ row % swizzle_rows) * 16;
  }
};

// Tiles of `Keys` keys that the queries of a block see, the last first.
template <int Keys>
struct AttentionKeyTiles {
  int first;  // of the lowest index
  int count;

  // For `Queries` queries from the first on.
  template <int Queries>
  static __device__ __forceinline__ AttentionKeyTiles of(const AttentionRows& rows, int first_query) {
    const int last_query = min(first_query + Queries, rows.queries) - 1;
    const int begin = rows.first_key(first_query) / Keys;
    const int end = (rows.end_key(last_query) + Keys - 1) / Keys;
    return {begin, max(0, end - begin)};
  }

  // The first key of tile n in the order of work.
  __device__ __forceinline__ int key(int n) const { return (first + count - 1 - n) * Keys; }
};

}  // namespace fusewright::cuda
