// Backward of exact attention on Hopper: what it serves is in attention.cu.
//
// A block owns 128 keys of one key head and goes through the tiles of queries that see them, of every query head of the
// group, so that the gradients of keys and values stay in registers. Its first warpgroup loads, and adds the block's
// part of the gradient of a tile's queries to memory; the two others own 64 keys each. Logits and weight gradients lie
// as (keys, queries), which makes them the left operands of two products as they are; the gradients of logits also go
// through shared memory, since the queries' gradient sums over both warpgroups' keys.
// Shah et al., "FlashAttention-3", 2024.
#pragma once

#include "attention_backward_exact.cuh"
#include "attention_backward_load_sm90.cuh"
#include "attention_backward_slopes.cuh"
#include "fusewright/cuda/shared.cuh"

namespace fusewright::cuda {

// products = a b^T, of a warpgroup's 64 keys or values with all queries or gradients of a tile.
template <class T, int D, int Queries>
__device__ __forceinline__ void multiply_rows(float (&products)[Queries / 2],
                                              const AttentionTile<attention_key_tile, D>& a, int consumer,
                                              const AttentionTile<Queries, D>& b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    wgmma_rows_rows<T>(products, wgmma_rows(a.at(64 * consumer, k)), wgmma_rows(b.at(0, k)), k > 0);
  }
  wgmma_commit();
}

// sums += a b, of (64 keys, queries) in registers with the tile's rows.
template <class T, int D, int Queries>
__device__ __forceinline__ void multiply_columns(float (&sums)[D / 2], const uint32_t (&a)[Queries / 4],
                                                 const AttentionTile<Queries, D>& b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Queries / 16; ++k) {
    wgmma_registers_columns<T>(sums, a + 4 * k, wgmma_columns(b.at(16 * k, 0), AttentionTile<Queries, D>::slab_bytes),
                               true);
  }
  wgmma_commit();
}

// The consumer's part of slopes key: its 64 queries, or where a tile has no more its 64 columns.
template <class T, int D>
__device__ __forceinline__ void multiply_slopes(float (&sums)[32], const AttentionBackwardShared<D>& shared,
                                                int consumer, int n) {
  constexpr bool by_rows = attention_backward_queries(D) == 128;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < attention_key_tile / 16; ++k) {
    wgmma_rows_columns<T>(sums, wgmma_rows(shared.slopes[n % 2].at(by_rows ? 64 * consumer : 0, k)),
                          wgmma_columns(shared.key.at(16 * k, by_rows ? 0 : slab_columns / 16 * consumer),
                                        AttentionTile<attention_key_tile, D>::slab_bytes),
                          k > 0);
  }
  wgmma_commit();
}

// Row r of the gradients of the thread's key and value.
template <class T, int D, int r>
__device__ __forceinline__ void write_key_row(const AttentionBackwardKernelParams& params, const AttentionRow& row,
                                              int lane, float (&key_sums)[D / 2], float (&value_sums)[D / 2]) {
  if (row.index >= params.rows.keys) return;
  const bool finite = is_finite_row<r>(key_sums, lane) && is_finite_row<r>(value_sums, lane);
  if (!finite) sum_queries_exactly<T, D, r>(params, row, lane, key_sums, value_sums);
  if (params.grad_key.data != nullptr) {
    store_row<T, r>(params.grad_key, row, lane, key_sums, params.rows.scale, params.rows.width);
  }
  if (params.grad_value.data != nullptr) {
    store_row<T, r>(params.grad_value, row, lane, value_sums, 1.0f, params.rows.value_width);
  }
}

template <class T, int D>
__device__ __forceinline__ void differentiate_keys(const AttentionBackwardKernelParams& params,
                                                   AttentionBackwardShared<D>& shared,
                                                   const AttentionBackwardWork& work, int consumer) {
  constexpr int queries = attention_backward_queries(D);
  const AttentionRows& rows = params.rows;
  const int lane = threadIdx.x % warp_size, column = 2 * (lane % 4);
  const int warp = threadIdx.x / warp_size % 4;
  const int key = work.first_key + 64 * consumer + 16 * warp + lane / 4;
  float key_sums[D / 2] = {}, value_sums[D / 2] = {};

  if (!work.empty()) mbarrier_wait(&shared.keys_full, 0);
  work.for_each_tile(rows, [&](int n, int, int tile) {
    const int stage = stage_of(n), first_query = tile * queries;
    const bool cut = rows.cuts(first_query, queries, work.first_key, attention_key_tile);
    float weights[queries / 2], slopes[queries / 2], query_sums[32];
    uint32_t packed_weights[queries / 4], packed_slopes[queries / 4];
    mbarrier_wait(&shared.query_full[stage], parity_of(n));
    multiply_rows<T>(weights, shared.key, consumer, shared.query[stage]);
    mbarrier_wait(&shared.grad_full[stage], parity_of(n));
    multiply_rows<T>(slopes, shared.value, consumer, shared.grad_output[stage]);
    wgmma_wait<1>(weights);
    weigh(weights, shared.numbers[stage], rows.scale_log2, column);
    if (cut) hide_pairs(weights, rows, key, first_query, column);
    pack<T>(weights, packed_weights);
    wgmma_wait<0>(slopes);
    differentiate(slopes, weights, shared.numbers[stage], column);
    if (cut) hide_pairs(slopes, rows, key, first_query, column);
    pack<T>(slopes, packed_slopes);
    multiply_columns<T>(value_sums, packed_weights, shared.grad_output[stage]);
    store_slopes(shared.slopes[n % 2], packed_slopes, consumer);
    fence_async_proxy();
    named_barrier_sync(attention_slopes_barrier, attention_consumers * warpgroup_size);
    multiply_slopes<T>(query_sums, shared, consumer, n);
    multiply_columns<T>(key_sums, packed_slopes, shared.query[stage]);
    wgmma_wait<1>(query_sums);
    named_barrier_sync(attention_sums_empty_barrier + consumer, attention_sums_threads);
    float4* sums = reinterpret_cast<float4*>(shared.query_sums[consumer]) + threadIdx.x % warpgroup_size;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums[j * warpgroup_size] =
          make_float4(query_sums[4 * j], query_sums[4 * j + 1], query_sums[4 * j + 2], query_sums[4 * j + 3]);
    }
    fence_async_proxy();
    named_barrier_arrive(attention_sums_full_barrier + consumer, attention_sums_threads);
    wgmma_wait<0>(value_sums);
    wgmma_wait<0>(key_sums);
    release_stage(&shared.empty[stage]);
  });

  const AttentionRow row = {work.batch, work.key_head, key};
  write_key_row<T, D, 0>(params, row, lane, key_sums, value_sums);
  write_key_row<T, D, 1>(params, {row.batch, row.head, key + 8}, lane, key_sums, value_sums);
}

template <class T, int D>
__device__ __forceinline__ void differentiate_tile(const AttentionBackwardSm90Params& all,
                                                   const AttentionBackwardKernelParams& params,
                                                   AttentionBackwardShared<D>& shared, int key_tile, int key_head,
                                                   int batch) {
  const auto work = AttentionBackwardWork::of<attention_backward_queries(D)>(params.rows, key_tile, key_head, batch);
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    release_registers<attention_producer_registers>();
    const int warp = threadIdx.x / warp_size;
    if (warp == 0) {
      if (elect_lane()) load_backward<D>(all, params, shared, work);
    } else if (warp <= attention_consumers) {
      add_query_sums<D>(params, all.ordered, shared, work, warp - 1);
    }
  } else {
    take_registers<attention_consumer_registers>();
    differentiate_keys<T, D>(params, shared, work, warpgroup - 1);
  }
}

template <class T, int D, bool Packed>
__global__ void __launch_bounds__(attention_threads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ AttentionBackwardSm90Params params) {
  AttentionBackwardShared<D>& shared = *dynamic_shared<AttentionBackwardShared<D>>();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&params.query_map);
    prefetch_tensor_map(&params.key_map);
    prefetch_tensor_map(&params.value_map);
    prefetch_tensor_map(&params.grad_output_map);
    mbarrier_init(&shared.keys_full, 1);
    for (int stage = 0; stage < attention_stages; ++stage) {
      mbarrier_init(&shared.query_full[stage], 1);
      mbarrier_init(&shared.grad_full[stage], 1);
      mbarrier_init(&shared.empty[stage], attention_consumer_warps);
    }
    mbarrier_fence_init();
    if (params.ordered) shared.ticket = take_ticket(params.kernel.workspace.tickets);
  }
  __syncthreads();
  // Under a causal limit the first keys are seen by most queries: the longest work starts first.
  int key_tile = blockIdx.x, key_head = blockIdx.y, batch = blockIdx.z;
  if (params.ordered) {
    const int key_tiles = gridDim.x, key_heads = gridDim.y;
    key_tile = shared.ticket % key_tiles;
    key_head = shared.ticket / key_tiles % key_heads;
    batch = shared.ticket / key_tiles / key_heads;
  }
  if constexpr (Packed) {
    if (threadIdx.x == 0) {
      restrict_to<T, D>(params.kernel, params.kernel.sequences.key_tile<attention_key_tile>(key_tile));
    }
    __syncthreads();
    const AttentionPackedBackward& packed = block_shared<AttentionPackedBackward>();
    if (packed.place.tile * attention_key_tile >= packed.params.rows.keys) return;
    differentiate_tile<T, D>(params, packed.params, shared, packed.place.tile, key_head, batch);
  } else {
    differentiate_tile<T, D>(params, params.kernel, shared, key_tile, key_head, batch);
  }
}

}  // namespace fusewright::cuda
