// After the backward's products: the sums of grad_query, scaled, as rows of the tensor.
#pragma once

#include "attention_backward_exact.cuh"

namespace fusewright::cuda {

constexpr int attention_backward_query_threads = 128;

// 64 queries a block. A thread holds of the sums what an accumulator of (64, D) would have.
template <class T, int D>
__global__ void __launch_bounds__(attention_backward_query_threads)
    attention_backward_query_sm90_kernel(const __grid_constant__ AttentionBackwardKernelParams params) {
  constexpr int blocks_of_tile = attention_backward_queries(D) / 64;
  const int head = blockIdx.y, batch = blockIdx.z, lane = threadIdx.x % warp_size;
  const int query = static_cast<int>(blockIdx.x) * 64 + static_cast<int>(threadIdx.x) / warp_size * 16 + lane / 4;
  const int64_t block = int64_t{params.tile_index(batch, head, 0)} * blocks_of_tile + blockIdx.x;
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

}  // namespace fusewright::cuda
