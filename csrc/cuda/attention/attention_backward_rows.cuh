// Before the backward's products: what they need of each row, and cleared sums.
#pragma once

#include "attention_backward.cuh"
#include "attention_rows.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/shared.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

constexpr int attention_backward_rows_threads = 256;

struct AttentionBackwardKernelParams {
  AttentionRows rows;
  HeadsView grad_output, grad_query, grad_key, grad_value;
  const float* grad_lse;
  AttentionBackwardWorkspace workspace;
  AttentionPackedSequences sequences;
  // Of a packed sequence: where it begins, and the number of its first tile of queries.
  int query_begin, key_begin, first_tile;

  // The number among all heads of a tile of queries.
  __device__ __forceinline__ int tile_index(int batch, int head, int tile) const {
    return (batch * rows.heads + head) * workspace.query_tiles + first_tile + tile;
  }

  // As if a packed sequence were all there is.
  template <class T, int Queries>
  __device__ __forceinline__ void narrow(int sequence) {
    sequences.narrow<T>(rows, sequence);
    query_begin = sequences.query_begin(sequence);
    key_begin = sequences.key_begin(sequence);
    first_tile = sequences.first_query_tile<Queries>(sequence);
    sequences.move<T>(grad_output, query_begin);
    sequences.move<T>(grad_query, query_begin);
    sequences.move<T>(grad_key, key_begin);
    sequences.move<T>(grad_value, key_begin);
    if (grad_lse != nullptr) grad_lse += query_begin;
  }

  template <int Queries>
  __device__ __forceinline__ AttentionRowNumbers<Queries>& numbers(int tile_index) const {
    return reinterpret_cast<AttentionRowNumbers<Queries>*>(workspace.row_numbers)[tile_index];
  }
};

// What a block of a packed call works with, in shared memory.
struct AttentionPackedBackward {
  AttentionPackedTile place;
  AttentionBackwardKernelParams params;
};

// By one thread, for a tile of queries or of keys.
template <class T, int D>
__device__ __forceinline__ void restrict_to(const AttentionBackwardKernelParams& params,
                                            const AttentionPackedTile& place) {
  AttentionPackedBackward& packed = block_shared<AttentionPackedBackward>();
  packed.place = place;
  packed.params = params;
  packed.params.narrow<T, attention_backward_queries(D)>(place.sequence);
}

// A tile of queries; D / 8 lanes share a row.
template <class T, int D>
__device__ __forceinline__ void prepare_rows(const AttentionBackwardKernelParams& params, int tile) {
  constexpr int queries = attention_backward_queries(D), lanes = D / 8;
  constexpr int rows_at_once = attention_backward_rows_threads / lanes;
  constexpr float log2_e = 1.4426950408889634f;
  const AttentionRows& rows = params.rows;
  const int head = blockIdx.y, batch = blockIdx.z;
  const int tile_index = params.tile_index(batch, head, tile);
  AttentionRowNumbers<queries>& numbers = params.numbers<queries>(tile_index);
  const int lane = threadIdx.x % lanes;
  float4* sums = reinterpret_cast<float4*>(params.workspace.query_sums) + int64_t{tile_index} * (queries * D / 4);
  for (int i = threadIdx.x; i < queries * D / 4; i += attention_backward_rows_threads) {
    sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  if (threadIdx.x < 2) params.workspace.turns[2 * tile_index + threadIdx.x] = 0;

  for (int row = threadIdx.x / lanes; row < queries; row += rows_at_once) {
    const int query = tile * queries + row;
    float products = 0.0f;
    if (query < rows.queries && 8 * lane < rows.value_width) {
      Packed<T, 8> output, grad_output;
      output.load(static_cast<const T*>(rows.output.data) + rows.output.offset(batch, head, query) + 8 * lane);
      grad_output.load(static_cast<const T*>(params.grad_output.data) + params.grad_output.offset(batch, head, query) +
                       8 * lane);
      float a[8], b[8];
      output.unpack(a);
      grad_output.unpack(b);
#pragma unroll
      for (int i = 0; i < 8; ++i) products += a[i] * b[i];
    }
    products = reduce_lanes<lanes>(products, Sum());
    if (lane != 0) continue;
    float reference = 0.0f, inverse = 0.0f;
    if (query < rows.queries) {
      const int64_t place = rows.place({batch, head, query});
      // Without any key the reference is -inf and the total 0.
      if (rows.total[place] != 0.0f) {
        reference = rows.maximum[place] * log2_e;
        inverse = 1.0f / rows.total[place];
      }
      if (params.grad_lse != nullptr) products -= params.grad_lse[place];
    }
    numbers.reference[row] = reference;
    numbers.inverse[row] = inverse;
    numbers.delta[row] = products;
  }
}

// A tile a block.
template <class T, int D, bool Packed>
__global__ void __launch_bounds__(attention_backward_rows_threads)
    attention_backward_rows_sm90_kernel(const __grid_constant__ AttentionBackwardKernelParams params) {
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) *params.workspace.tickets = 0;
  if constexpr (Packed) {
    constexpr int queries = attention_backward_queries(D);
    if (threadIdx.x == 0) restrict_to<T, D>(params, params.sequences.query_tile<queries>(blockIdx.x));
    __syncthreads();
    const AttentionPackedBackward& packed = block_shared<AttentionPackedBackward>();
    if (packed.place.tile * queries < packed.params.rows.queries) prepare_rows<T, D>(packed.params, packed.place.tile);
  } else {
    prepare_rows<T, D>(params, blockIdx.x);
  }
}

}  // namespace fusewright::cuda
