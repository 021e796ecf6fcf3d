// What the Hopper attention kernels share: a block of one loading and two multiplying warpgroups, and tiles of rows of
// D columns in shared memory, which come by the tensor memory accelerator through rings of two stages. Columns that the
// tensors do not have arrive as 0.
#pragma once

#include "attention_tile.cuh"
#include "fusewright/attention.h"
#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/tensor_map.cuh"
#include "fusewright/cuda/wgmma.cuh"

namespace fusewright::cuda {

constexpr int attention_stages = 2;
constexpr int attention_consumers = 2;  // warpgroups
constexpr int attention_key_tile = 128;
constexpr int attention_threads = warpgroup_size * (1 + attention_consumers);

// Arrivals that free a stage: a warp cannot speak for the reads of the others of its warpgroup.
constexpr int attention_consumer_warps = 4 * attention_consumers;

// A register file of 65536 gives the producer what it cannot do without, the consumers the rest.
constexpr int attention_producer_registers = 24;
constexpr int attention_consumer_registers = 240;

// Stage and phase of the nth use of a ring.
__device__ __forceinline__ int stage_of(int n) { return n % attention_stages; }
__device__ __forceinline__ int parity_of(int n) { return n / attention_stages % 2; }

template <int Rows, int D>
__device__ __forceinline__ void load_slabs(AttentionTile<Rows, D>& tile, const CUtensorMap& map, uint64_t* full,
                                           int row, int head, int batch) {
#pragma unroll
  for (int slab = 0; slab < AttentionTile<Rows, D>::slabs; ++slab) {
    tensor_load(tile.data + slab * AttentionTile<Rows, D>::slab_bytes, &map, full, slab * slab_columns, row, head,
                batch);
  }
}

template <int Rows, int D>
__device__ __forceinline__ void load_tile(AttentionTile<Rows, D>& tile, const CUtensorMap& map, uint64_t* full, int row,
                                          int head, int batch) {
  mbarrier_arrive_expect_bytes(full, AttentionTile<Rows, D>::bytes);
  load_slabs(tile, map, full, row, head, batch);
}

// By every thread of a warp that is done with a stage.
__device__ __forceinline__ void release_stage(uint64_t* empty) {
  if (threadIdx.x % warp_size == 0) mbarrier_arrive(empty);
}

// The number of this thread's warpgroup, from one lane, so that the compiler knows it to be uniform: products in
// divergent code would be serialised.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / warpgroup_size, 0);
}

// The map for boxes of `rows_of_box` rows of 64 columns.
inline cudaError_t encode_heads(CUtensorMap& map, const HeadsView& view, const AttentionParams& params, int64_t width,
                                int64_t length, int64_t heads, int rows_of_box) {
  return encode_tensor_map(map, {view.data,
                                 params.dtype,
                                 {width, length, heads, params.batch},
                                 {1, view.row_stride, view.head_stride, view.batch_stride},
                                 {slab_columns, rows_of_box, 1, 1}});
}

}  // namespace fusewright::cuda
