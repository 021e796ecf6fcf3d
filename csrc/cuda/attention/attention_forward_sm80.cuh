// Forward of exact attention on any device since sm_80, and its launch: what it serves is in attention.cu.
//
// A block of four warps owns 128 queries of one head, each warp 32 of them, so that what it reads of keys and values
// from shared memory serves two products. They come in tiles of 64, by asynchronous copies: a tile's values while its
// logits are formed, the next keys beside its softmax and its sums. Two blocks on a multiprocessor cover each other's
// waits.
// Dao, "FlashAttention-2", 2023.
#pragma once

#include "attention_exact_row.cuh"
#include "attention_forward.cuh"
#include "attention_softmax.cuh"
#include "attention_tile.cuh"
#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/mma.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/shared.cuh"

namespace fusewright::cuda {

constexpr int attention_sm80_threads = 128;
constexpr int attention_sm80_query_tile = 128;
constexpr int attention_sm80_key_tile = 64;

// Queries of a warp, in blocks of the rows that one product has.
constexpr int attention_sm80_row_blocks = 2;
constexpr int attention_sm80_block_rows = 16;

template <int D>
struct AttentionSharedSm80 {
  AttentionTile<attention_sm80_query_tile, D> query;
  AttentionTile<attention_sm80_key_tile, D> key, value;
  // The block's first key and value: registers are short.
  const void *first_key, *first_value;
};

// By all threads: the tile's rows from `first` on, of which the last is before `end`. Others are 0, and so are columns
// from `width` on.
template <class T, int Rows, int D>
__device__ __forceinline__ void load_rows(AttentionTile<Rows, D>& tile, const void* rows, int64_t row_stride, int first,
                                          int end, int width) {
  constexpr int chunks = D / 8, rows_at_once = attention_sm80_threads / chunks;
  const int chunk = threadIdx.x % chunks;
  const T* source = static_cast<const T*>(rows) + 8 * chunk;
#pragma unroll
  for (int i = 0; i < Rows / rows_at_once; ++i) {
    const int row = threadIdx.x / chunks + i * rows_at_once;
    copy_async(tile.chunk_at(chunk / 8, row, chunk % 8), source + (first + row) * row_stride,
               first + row < end && 8 * chunk < width);
  }
}

// What product n adds to.
__device__ __forceinline__ float (&product_of(float* accumulators, int n))[4] {
  return reinterpret_cast<float (&)[4]>(accumulators[4 * n]);
}

// logits = query key^T, of one warp's queries.
template <class T, int D>
__device__ __forceinline__ void multiply_key_sm80(
    float (&logits)[attention_sm80_row_blocks][attention_sm80_key_tile / 2], AttentionSharedSm80<D>& shared, int warp,
    int lane) {
#pragma unroll
  for (auto& rows : logits) {
#pragma unroll
    for (float& logit : rows) logit = 0.0f;
  }
  // Operands that an unrolled loop asks for ahead do not fit beside 128 columns of sums.
  constexpr int unrolled = D == 64 ? 4 : 1;
#pragma unroll unrolled
  for (int k = 0; k < D / 16; ++k) {
    const int slab = k / 4, chunk = k % 4 * 2;
    uint32_t queries[attention_sm80_row_blocks][4];
#pragma unroll
    for (int m = 0; m < attention_sm80_row_blocks; ++m) {
      const int row = (warp * attention_sm80_row_blocks + m) * attention_sm80_block_rows + lane % 16;
      load_matrices<false>(queries[m], shared.query.chunk_at(slab, row, chunk + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < attention_sm80_key_tile / 16; ++n) {
      uint32_t keys[4];
      load_matrices<false>(keys, shared.key.chunk_at(slab, 16 * n + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < attention_sm80_row_blocks; ++m) {
        mma<T>(product_of(logits[m], 2 * n), queries[m], {keys[0], keys[1]});
        mma<T>(product_of(logits[m], 2 * n + 1), queries[m], {keys[2], keys[3]});
      }
    }
  }
}

// sums += weights value.
template <class T, int D>
__device__ __forceinline__ void multiply_value_sm80(
    float (&sums)[attention_sm80_row_blocks][D / 2],
    const uint32_t (&weights)[attention_sm80_row_blocks][attention_sm80_key_tile / 4], AttentionSharedSm80<D>& shared,
    int lane) {
#pragma unroll
  for (int k = 0; k < attention_sm80_key_tile / 16; ++k) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t values[4];
      load_matrices<true>(values, shared.value.chunk_at(n / 4, 16 * k + lane % 16, n % 4 * 2 + lane / 16));
#pragma unroll
      for (int m = 0; m < attention_sm80_row_blocks; ++m) {
        const auto& rows = reinterpret_cast<const uint32_t (&)[4]>(weights[m][4 * k]);
        mma<T>(product_of(sums[m], 2 * n), rows, {values[0], values[1]});
        mma<T>(product_of(sums[m], 2 * n + 1), rows, {values[2], values[3]});
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(attention_sm80_threads, 2)
    attention_forward_sm80_kernel(const __grid_constant__ AttentionRows rows) {
  using Softmax = OnlineSoftmax<attention_sm80_block_rows, attention_sm80_key_tile>;
  AttentionSharedSm80<D>& shared = *dynamic_shared<AttentionSharedSm80<D>>();
  // Blocks start in the order of their number: under a causal limit the last queries see most keys.
  const int first_query = (gridDim.x - 1 - blockIdx.x) * attention_sm80_query_tile;
  const auto tiles = AttentionKeyTiles<attention_sm80_key_tile>::of<attention_sm80_query_tile>(rows, first_query);
  const int batch = blockIdx.z, head = blockIdx.y, key_head = head / rows.group;
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  const int first_query_of_warp = first_query + warp * attention_sm80_row_blocks * attention_sm80_block_rows;
  const int query = first_query_of_warp + lane / 4;
  Softmax softmax[attention_sm80_row_blocks] = {{rows, query, lane}, {rows, query + attention_sm80_block_rows, lane}};
  float sums[attention_sm80_row_blocks][D / 2] = {};

  if (tiles.count > 0) {
    const T* queries = static_cast<const T*>(rows.query.data) + rows.query.offset(batch, head, 0);
    const T* keys = static_cast<const T*>(rows.key.data) + rows.key.offset(batch, key_head, 0);
    if (threadIdx.x == 0) {
      shared.first_key = keys;
      shared.first_value = static_cast<const T*>(rows.value.data) + rows.value.offset(batch, key_head, 0);
    }
    load_rows<T>(shared.query, queries, rows.query.row_stride, first_query, rows.queries, rows.width);
    load_rows<T>(shared.key, keys, rows.key.row_stride, tiles.key(0), rows.keys, rows.width);
  }
  for (int n = 0; n < tiles.count; ++n) {
    // The keys are there, and nobody reads the last values any more.
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    load_rows<T>(shared.value, shared.first_value, rows.value.row_stride, tiles.key(n), rows.keys, rows.value_width);
    copy_async_commit();
    float logits[attention_sm80_row_blocks][attention_sm80_key_tile / 2];
    multiply_key_sm80<T, D>(logits, shared, warp, lane);
    // The values are there, and nobody reads the keys any more.
    copy_async_wait<0>();
    __syncthreads();
    if (n + 1 < tiles.count) {
      load_rows<T>(shared.key, shared.first_key, rows.key.row_stride, tiles.key(n + 1), rows.keys, rows.width);
    }
    uint32_t weights[attention_sm80_row_blocks][attention_sm80_key_tile / 4];
#pragma unroll
    for (int m = 0; m < attention_sm80_row_blocks; ++m) {
      softmax[m].add_tile(logits[m], tiles.key(n), first_query_of_warp + m * attention_sm80_block_rows);
      softmax[m].rescale(sums[m]);
      pack<T>(logits[m], weights[m]);
    }
    multiply_value_sm80<T, D>(sums, weights, shared, lane);
  }

#pragma unroll
  for (int m = 0; m < attention_sm80_row_blocks; ++m) {
    const AttentionRow row = {batch, head, query + m * attention_sm80_block_rows};
    softmax[m].finish();
    write_row<T, D, 0>(rows, row, lane, softmax[m], sums[m]);
    write_row<T, D, 1>(rows, {batch, head, row.index + 8}, lane, softmax[m], sums[m]);
  }
}

template <class T, int D>
cudaError_t attention_forward_sm80(const AttentionForwardParams& params, int64_t shift, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.queries, attention_sm80_query_tile)),
                  static_cast<unsigned>(params.heads), static_cast<unsigned>(params.batch));
  return launch(attention_forward_sm80_kernel<T, D>, grid, dim3(attention_sm80_threads), sizeof(AttentionSharedSm80<D>),
                stream, AttentionRows(params, params.output, shift));
}

}  // namespace fusewright::cuda
