// Hopper's backward: a block's work and memory, and what its first warpgroup does.
#pragma once

#include "attention_backward_rows.cuh"
#include "attention_tile_sm90.cuh"
#include "fusewright/cuda/bulk_copy.cuh"
#include "fusewright/cuda/named_barrier.cuh"
#include "fusewright/cuda/turn.cuh"

namespace fusewright::cuda {

template <int D>
struct AttentionBackwardShared {
  static constexpr int queries = attention_backward_queries(D);
  AttentionTile<attention_key_tile, D> key, value;
  AttentionTile<queries, D> query[attention_stages], grad_output[attention_stages];
  // Gradients of logits. A warpgroup that writes the next knows that the other is done with the one before the last.
  AttentionTile<queries, attention_key_tile> slopes[2];
  float query_sums[attention_consumers][attention_query_sums];
  AttentionRowNumbers<queries> numbers[attention_stages];
  uint64_t keys_full;
  // Queries are wanted before their gradients, and free after them.
  uint64_t query_full[attention_stages], grad_full[attention_stages], empty[attention_stages];
  int ticket;
};

struct AttentionBackwardSm90Params {
  CUtensorMap query_map, key_map, value_map, grad_output_map;
  AttentionBackwardKernelParams kernel;
  bool ordered;
};

// What a block does: its keys, and the tiles of queries that see some of them.
struct AttentionBackwardWork {
  int first_key, key_head, batch;
  int first_tile, end_tile;

  template <int Queries>
  static __device__ __forceinline__ AttentionBackwardWork of(const AttentionRows& rows, int key_tile, int key_head,
                                                             int batch) {
    const int first_key = key_tile * attention_key_tile;
    const int last_key = min(first_key + attention_key_tile, rows.keys) - 1;
    return {first_key, key_head, batch, rows.first_query(first_key) / Queries,
            (rows.end_query(last_key) + Queries - 1) / Queries};
  }

  __device__ __forceinline__ bool empty() const { return first_tile >= end_tile; }

  // body(n, head, tile) for the nth tile, over the query heads of the group.
  template <class Body>
  __device__ __forceinline__ void for_each_tile(const AttentionRows& rows, Body body) const {
    int n = 0;
    // Unrolled, the loading thread would not have the registers for it.
#pragma unroll 1
    for (int head = key_head * rows.group; head < (key_head + 1) * rows.group; ++head) {
#pragma unroll 1
      for (int tile = first_tile; tile < end_tile; ++tile, ++n) body(n, head, tile);
    }
  }
};

// Numbers of named barriers. That the sums of a consumer's queries may be written, and that they are.
constexpr int attention_slopes_barrier = 1;
constexpr int attention_sums_empty_barrier = 2;
constexpr int attention_sums_full_barrier = attention_sums_empty_barrier + attention_consumers;
constexpr int attention_sums_threads = warpgroup_size + warp_size;

// One thread.
template <int D>
__device__ __forceinline__ void load_backward(const AttentionBackwardSm90Params& maps,
                                              const AttentionBackwardKernelParams& params,
                                              AttentionBackwardShared<D>& shared, const AttentionBackwardWork& work) {
  constexpr int queries = attention_backward_queries(D);
  using QueryTile = AttentionTile<queries, D>;
  using KeyTile = AttentionTile<attention_key_tile, D>;
  if (work.empty()) return;
  mbarrier_arrive_expect_bytes(&shared.keys_full, 2 * KeyTile::bytes);
  load_slabs(shared.key, maps.key_map, &shared.keys_full, params.key_begin + work.first_key, work.key_head, work.batch);
  load_slabs(shared.value, maps.value_map, &shared.keys_full, params.key_begin + work.first_key, work.key_head,
             work.batch);
  work.for_each_tile(params.rows, [&](int n, int head, int tile) {
    const int stage = stage_of(n);
    const auto& numbers = params.numbers<queries>(params.tile_index(work.batch, head, tile));
    mbarrier_wait(&shared.empty[stage], parity_of(n) ^ 1);
    mbarrier_arrive_expect_bytes(&shared.query_full[stage], QueryTile::bytes + sizeof(numbers));
    load_slabs(shared.query[stage], maps.query_map, &shared.query_full[stage], params.query_begin + tile * queries,
               head, work.batch);
    bulk_load(&shared.numbers[stage], &numbers, sizeof(numbers), &shared.query_full[stage]);
    load_tile(shared.grad_output[stage], maps.grad_output_map, &shared.grad_full[stage],
              params.query_begin + tile * queries, head, work.batch);
  });
}

// One warp for each consumer. In order, a tile's sums take the blocks' parts by ascending keys.
template <int D>
__device__ __forceinline__ void add_query_sums(const AttentionBackwardKernelParams& params, bool ordered,
                                               AttentionBackwardShared<D>& shared, const AttentionBackwardWork& work,
                                               int consumer) {
  constexpr int queries = attention_backward_queries(D);
  const AttentionRows& rows = params.rows;
  const bool writes = elect_lane();
  work.for_each_tile(rows, [&](int n, int head, int tile) {
    if (writes && n > 0) bulk_wait_read<0>();
    __syncwarp();
    named_barrier_arrive(attention_sums_empty_barrier + consumer, attention_sums_threads);
    named_barrier_sync(attention_sums_full_barrier + consumer, attention_sums_threads);
    if (!writes) return;
    const int part = params.tile_index(work.batch, head, tile) * attention_consumers + consumer;
    int* turns = params.workspace.turns + part;
    if (ordered) {
      const int first_key_tile = max(0, tile * queries + rows.before) / attention_key_tile;
      wait_for_turn(turns, work.first_key / attention_key_tile - first_key_tile);
    }
    bulk_reduce_add(params.workspace.query_sums + int64_t{part} * attention_query_sums, shared.query_sums[consumer],
                    sizeof(shared.query_sums[consumer]));
    bulk_commit();
    if (ordered) {
      bulk_wait<0>();
      end_turn(turns);
    }
  });
  if (writes) bulk_wait_read<0>();
}

}  // namespace fusewright::cuda
