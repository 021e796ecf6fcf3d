// Hashing by random rotations: the bucket of x is the number of the largest among x R and -x R. A block rotates its
// rows by some columns at a time and keeps the largest coordinate of each row in registers; rotated vectors are never
// in memory.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/lsh_attention.h"
#include "lsh_hash_product.cuh"

namespace fusewright::cuda {

// Among equals the first coordinate wins, and a coordinate before a negative. A NaN is never the largest.
struct LargestCoordinate {
  float size = -1.0f;
  int32_t number = 0;

  __device__ __forceinline__ void include(float other_size, int32_t other_number) {
    if (other_size > size || (other_size == size && other_number < number)) {
      size = other_size;
      number = other_number;
    }
  }

  // Over `Lanes` adjacent lanes, all of the warp's at once.
  template <int Lanes>
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2) {
      include(__shfl_xor_sync(0xFFFFFFFFu, size, distance), __shfl_xor_sync(0xFFFFFFFFu, number, distance));
    }
  }
};

// hash_rows vectors in one round a block; rounds of the same vectors go together, which then come from the cache.
template <class T>
__global__ void __launch_bounds__(hash_threads) lsh_hash_kernel(const __grid_constant__ LshDigitParams params) {
  using Product = HashProduct<T>;
  const int64_t round = block_index() % params.rounds, tile = block_index() / params.rounds;
  const int64_t tiles = (params.length + hash_rows - 1) / hash_rows;
  const int64_t head = tile / tiles, first_row = tile % tiles * hash_rows;
  if (head >= params.batch * params.heads) return;

  Product product(params, head / params.heads, head % params.heads, round, first_row);
  LargestCoordinate largest[Product::thread_rows];
  for (int64_t first = 0; first < params.columns; first += hash_columns) {
    product.clear();
    for (int64_t k = 0; k < params.width; k += Product::depth) {
      // What the product before reads is overwritten.
      __syncthreads();
      if (first == 0 || params.width > Product::depth) product.fetch_rows(k);
      product.fetch_rotations(k, first);
      __syncthreads();
      product.multiply();
    }
#pragma unroll
    for (int i = 0; i < Product::thread_rows; ++i) {
#pragma unroll
      for (int j = 0; j < Product::thread_columns; ++j) {
        const int64_t column = first + product.column(j);
        const float value = product.sum(i, j);
        if (column < params.columns) {
          largest[i].include(fabsf(value), static_cast<int32_t>(value < 0.0f ? params.columns + column : column));
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < Product::thread_rows; ++i) {
    largest[i].template reduce<Product::row_lanes>();
    const int64_t row = first_row + product.row(i);
    if (threadIdx.x % Product::row_lanes != 0 || row >= params.length) continue;
    int64_t& bucket = params.buckets[(head * params.rounds + round) * params.length + row];
    const int64_t digit = largest[i].number * params.place_value;
    if (params.key_padding != nullptr && params.key_padding[head / params.heads * params.length + row]) {
      bucket = params.place_value * 2 * params.columns;
    } else {
      bucket = params.first_digit ? digit : bucket + digit;
    }
  }
}

template <class T>
cudaError_t lsh_hash(const LshDigitParams& params, void* stream) {
  const int64_t tiles = params.batch * params.heads * ceil_div(params.length, hash_rows);
  return launch(lsh_hash_kernel<T>, grid_of(tiles * params.rounds), dim3(hash_threads), 0, stream, params);
}

extern template cudaError_t lsh_hash<float>(const LshDigitParams&, void*);
extern template cudaError_t lsh_hash<__nv_bfloat16>(const LshDigitParams&, void*);
extern template cudaError_t lsh_hash<__half>(const LshDigitParams&, void*);

}  // namespace fusewright::cuda
