// Forward of exact attention on Hopper, and its launch: what it serves is in attention.cu.
//
// A block owns 128 queries of one head. Its first warpgroup loads tiles of 128 keys and of 128 values by the tensor
// memory accelerator into rings of two stages each; the two others own 64 queries each and multiply. They take turns at
// the tensor cores, so that one's softmax runs beside the other's products, and each also issues the product of the
// next keys before that of the last values, so that its own softmax runs beside the latter.
// Shah et al., "FlashAttention-3", 2024. Exponentials are 2^x, with the scale and log2(e) in one factor.
#pragma once

#include "attention_exact_row.cuh"
#include "attention_forward.cuh"
#include "attention_packed.cuh"
#include "attention_softmax.cuh"
#include "attention_tile_sm90.cuh"
#include "fusewright/cuda/named_barrier.cuh"
#include "fusewright/cuda/shared.cuh"

namespace fusewright::cuda {

constexpr int attention_query_tile = 64 * attention_consumers;

template <int D>
struct AttentionShared {
  AttentionTile<attention_query_tile, D> query;
  AttentionTile<attention_key_tile, D> key[attention_stages];
  AttentionTile<attention_key_tile, D> value[attention_stages];
  uint64_t query_full;
  uint64_t key_full[attention_stages], key_empty[attention_stages];
  uint64_t value_full[attention_stages], value_empty[attention_stages];
};

struct AttentionSm90Params {
  CUtensorMap query_map, key_map, value_map;
  AttentionRows rows;
  AttentionPackedSequences sequences;
};

struct AttentionPackedRows {
  AttentionPackedTile place;
  AttentionRows rows;
};

// What a block works on: its first query, and where in the tensors its sequence's queries and keys begin.
struct AttentionForwardWork {
  int first_query;
  int query_begin, key_begin;
};

using AttentionKeyTilesSm90 = AttentionKeyTiles<attention_key_tile>;

// One thread. Values come one tile behind the keys, as they are wanted.
template <int D>
__device__ __forceinline__ void produce(const AttentionSm90Params& params, AttentionShared<D>& shared,
                                        const AttentionKeyTilesSm90& tiles, const AttentionForwardWork& work) {
  const int head = blockIdx.y, key_head = head / params.rows.group, batch = blockIdx.z;
  const auto load_value = [&](int n) {
    const int stage = stage_of(n);
    mbarrier_wait(&shared.value_empty[stage], parity_of(n) ^ 1);
    load_tile(shared.value[stage], params.value_map, &shared.value_full[stage], work.key_begin + tiles.key(n), key_head,
              batch);
  };
  for (int n = 0; n < tiles.count; ++n) {
    const int stage = stage_of(n);
    mbarrier_wait(&shared.key_empty[stage], parity_of(n) ^ 1);
    load_tile(shared.key[stage], params.key_map, &shared.key_full[stage], work.key_begin + tiles.key(n), key_head,
              batch);
    if (n == 0) {
      load_tile(shared.query, params.query_map, &shared.query_full, work.query_begin + work.first_query, head, batch);
    } else {
      load_value(n - 1);
    }
  }
  if (tiles.count > 0) load_value(tiles.count - 1);
}

// logits = query key^T, of one warpgroup's 64 queries.
template <class T, int D>
__device__ __forceinline__ void multiply_key(float (&logits)[64], const AttentionShared<D>& shared, int consumer,
                                             int stage) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    wgmma_rows_rows<T>(logits, wgmma_rows(shared.query.at(64 * consumer, k)), wgmma_rows(shared.key[stage].at(0, k)),
                       k > 0);
  }
  wgmma_commit();
}

// sums += weights value.
template <class T, int D>
__device__ __forceinline__ void multiply_value(float (&sums)[D / 2], const uint32_t (&weights)[32],
                                               const AttentionShared<D>& shared, int stage) {
  using Tile = AttentionTile<attention_key_tile, D>;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < attention_key_tile / 16; ++k) {
    wgmma_registers_columns<T>(sums, weights + 4 * k,
                               wgmma_columns(shared.value[stage].at(16 * k, 0), Tile::slab_bytes), true);
  }
  wgmma_commit();
}

// The tensor cores' turns. The second consumer starts by giving the first its turn.
class Turns {
 public:
  __device__ __forceinline__ explicit Turns(int consumer) : own_(1 + consumer), other_(2 - consumer) {
    if (consumer == 1) pass();
  }
  __device__ __forceinline__ void wait() const { named_barrier_sync(own_, attention_consumers * warpgroup_size); }
  __device__ __forceinline__ void pass() const { named_barrier_arrive(other_, attention_consumers * warpgroup_size); }

 private:
  int own_, other_;
};

template <class T, int D>
__device__ __forceinline__ void consume(const AttentionRows& rows, AttentionShared<D>& shared,
                                        const AttentionKeyTilesSm90& tiles, int first_query, int consumer) {
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size % 4;
  const int query = first_query + 64 * consumer + 16 * warp + lane / 4;
  const Turns turns(consumer);
  OnlineSoftmax<attention_query_tile, attention_key_tile> softmax(rows, query, lane);
  float sums[D / 2] = {};
  float logits[64];
  uint32_t weights[32];

  if (tiles.count > 0) {
    mbarrier_wait(&shared.query_full, 0);
    mbarrier_wait(&shared.key_full[0], 0);
    turns.wait();
    multiply_key<T, D>(logits, shared, consumer, 0);
    turns.pass();
    wgmma_wait<0>(logits);
    release_stage(&shared.key_empty[0]);
    softmax.add_tile(logits, tiles.key(0), first_query);
    pack<T>(logits, weights);
    for (int n = 1; n < tiles.count; ++n) {
      const int stage = stage_of(n), value_stage = stage_of(n - 1);
      mbarrier_wait(&shared.key_full[stage], parity_of(n));
      turns.wait();
      multiply_key<T, D>(logits, shared, consumer, stage);
      mbarrier_wait(&shared.value_full[value_stage], parity_of(n - 1));
      multiply_value<T, D>(sums, weights, shared, value_stage);
      turns.pass();
      wgmma_wait<1>(logits);
      release_stage(&shared.key_empty[stage]);
      softmax.add_tile(logits, tiles.key(n), first_query);
      wgmma_wait<0>(sums);
      release_stage(&shared.value_empty[value_stage]);
      softmax.rescale(sums);
      pack<T>(logits, weights);
    }
    const int last = tiles.count - 1;
    mbarrier_wait(&shared.value_full[stage_of(last)], parity_of(last));
    multiply_value<T, D>(sums, weights, shared, stage_of(last));
    wgmma_wait<0>(sums);
  }

  softmax.finish();
  const AttentionRow row = {static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y), query};
  write_row<T, D, 0>(rows, row, lane, softmax, sums);
  write_row<T, D, 1>(rows, {row.batch, row.head, query + 8}, lane, softmax, sums);
}

template <class T, int D>
__device__ __forceinline__ void attend(const AttentionSm90Params& params, const AttentionRows& rows,
                                       AttentionShared<D>& shared, const AttentionForwardWork& work) {
  const auto tiles = AttentionKeyTilesSm90::of<attention_query_tile>(rows, work.first_query);
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    release_registers<attention_producer_registers>();
    if (threadIdx.x < warp_size && elect_lane()) produce<D>(params, shared, tiles, work);
  } else {
    take_registers<attention_consumer_registers>();
    consume<T, D>(rows, shared, tiles, work.first_query, warpgroup - 1);
  }
}

template <class T, int D, bool Packed>
__global__ void __launch_bounds__(attention_threads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ AttentionSm90Params params) {
  AttentionShared<D>& shared = *dynamic_shared<AttentionShared<D>>();
  // Blocks start in the order of their number: under a causal limit the last queries see most keys.
  const int query_tile = gridDim.x - 1 - blockIdx.x;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&params.query_map);
    prefetch_tensor_map(&params.key_map);
    prefetch_tensor_map(&params.value_map);
    mbarrier_init(&shared.query_full, 1);
    for (int stage = 0; stage < attention_stages; ++stage) {
      mbarrier_init(&shared.key_full[stage], 1);
      mbarrier_init(&shared.value_full[stage], 1);
      mbarrier_init(&shared.key_empty[stage], attention_consumer_warps);
      mbarrier_init(&shared.value_empty[stage], attention_consumer_warps);
    }
    mbarrier_fence_init();
    if constexpr (Packed) {
      AttentionPackedRows& packed = block_shared<AttentionPackedRows>();
      packed.place = params.sequences.query_tile<attention_query_tile>(query_tile);
      packed.rows = params.rows;
      params.sequences.narrow<T>(packed.rows, packed.place.sequence);
    }
  }
  __syncthreads();
  if constexpr (Packed) {
    // In shared memory: the numbers of a block's own sequence would need registers.
    const auto& [place, rows] = block_shared<AttentionPackedRows>();
    const AttentionForwardWork work = {place.tile * attention_query_tile, params.sequences.query_begin(place.sequence),
                                       params.sequences.key_begin(place.sequence)};
    if (work.first_query < rows.queries) attend<T, D>(params, rows, shared, work);
  } else {
    attend<T, D>(params, params.rows, shared, {query_tile * attention_query_tile, 0, 0});
  }
}

template <class T, int D>
cudaError_t attention_forward_sm90(const AttentionForwardParams& params, int64_t shift, void* stream) {
  AttentionSm90Params kernel_params;
  kernel_params.rows = AttentionRows(params, params.output, shift);
  cudaError_t error = encode_heads(kernel_params.query_map, params.query, params, params.width, params.queries,
                                   params.heads, attention_query_tile);
  if (error == cudaSuccess) {
    error = encode_heads(kernel_params.key_map, params.key, params, params.width, params.keys, params.key_heads,
                         attention_key_tile);
  }
  if (error == cudaSuccess) {
    error = encode_heads(kernel_params.value_map, params.value, params, params.value_width, params.keys,
                         params.key_heads, attention_key_tile);
  }
  if (error != cudaSuccess) return error;
  const auto launch_tiles = [&](auto kernel, int64_t query_tiles) {
    const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>(params.heads),
                    static_cast<unsigned>(params.batch));
    return launch(kernel, grid, dim3(attention_threads), sizeof(AttentionShared<D>), stream, kernel_params);
  };
  if (params.packing.query_offsets != nullptr) {
    kernel_params.sequences = AttentionPackedSequences(params);
    return launch_tiles(attention_forward_sm90_kernel<T, D, true>,
                        kernel_params.sequences.tiles(params.queries, attention_query_tile));
  }
  return launch_tiles(attention_forward_sm90_kernel<T, D, false>, ceil_div(params.queries, attention_query_tile));
}

}  // namespace fusewright::cuda
