// After the backward's products: the sums of grad_query, scaled, as rows of the tensor.
#pragma once

#include "attention_backward_exact.cuh"

namespace fusewright::cuda {

constexpr int attention_backward_query_threads = 128;
// Of a multiprocessor: left to itself the compiler aims at more of them, and spills for it.
constexpr int attention_backward_query_blocks = 4;

// 64 queries of a tile. A thread holds of the sums what an accumulator of (64, D) would have.
template <class T, int D>
__device__ __forceinline__ void write_queries(const AttentionBackwardKernelParams& params, int block_of_head) {
  constexpr int blocks_of_tile = attention_backward_queries(D) / 64;
  const int head = blockIdx.y, batch = blockIdx.z, lane = threadIdx.x % warp_size;
  const int query = block_of_head * 64 + static_cast<int>(threadIdx.x) / warp_size * 16 + lane / 4;
  const int64_t block = int64_t{params.tile_index(batch, head, 0)} * blocks_of_tile + block_of_head;
  const float4* source =
      reinterpret_cast<const float4*>(params.workspace.query_sums + block * (D / 64) * attention_query_sums);
  float sums[D / 2];
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    const float4 part = source[j * attention_backward_query_threads + threadIdx.x];
    sums[4 * j] = part.x;
    sums[4 * j + 1] = part.y;
    sums[4 * j + 2] = part.z;
    sums[4 * j + 3] = part.w;
  }
  const auto write = [&](auto place) {
    constexpr int r = decltype(place)::value;
    const AttentionRow row = {batch, head, query + 8 * r};
    if (row.index >= params.rows.queries) return;
    if (!is_finite_row<r>(sums, lane)) sum_keys_exactly<T, D, r>(params, row, lane, sums);
    store_row<T, r>(params.grad_query, row, lane, sums, params.rows.scale, params.rows.width);
  };
  write(std::integral_constant<int, 0>());
  write(std::integral_constant<int, 1>());
}

// 64 queries a block.
template <class T, int D, bool Packed>
__global__ void __launch_bounds__(attention_backward_query_threads, attention_backward_query_blocks)
    attention_backward_query_sm90_kernel(const __grid_constant__ AttentionBackwardKernelParams params) {
  if constexpr (Packed) {
    constexpr int queries = attention_backward_queries(D), blocks_of_tile = queries / 64;
    const int tile = static_cast<int>(blockIdx.x) / blocks_of_tile;
    if (threadIdx.x == 0) restrict_to<T, D>(params, params.sequences.query_tile<queries>(tile));
    __syncthreads();
    const AttentionPackedBackward& packed = block_shared<AttentionPackedBackward>();
    if (packed.place.tile * queries >= packed.params.rows.queries) return;
    write_queries<T, D>(packed.params, packed.place.tile * blocks_of_tile + blockIdx.x % blocks_of_tile);
  } else {
    write_queries<T, D>(params, blockIdx.x);
  }
}

}  // namespace fusewright::cuda
