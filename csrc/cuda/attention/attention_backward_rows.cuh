// Before the backward's products: what they need of each row, and cleared sums.
#pragma once

#include "attention_backward.cuh"
#include "attention_rows.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

constexpr int attention_backward_rows_threads = 256;

struct AttentionBackwardKernelParams {
  AttentionRows rows;
  HeadsView grad_output, grad_query, grad_key, grad_value;
  const float* grad_lse;
  AttentionBackwardWorkspace workspace;

  // The number among all heads of a tile of queries.
  __device__ __forceinline__ int tile_index(int batch, int head, int tile) const {
    return (batch * rows.heads + head) * workspace.query_tiles + tile;
  }

  template <int Queries>
  __device__ __forceinline__ AttentionRowNumbers<Queries>& numbers(int tile_index) const {
    return reinterpret_cast<AttentionRowNumbers<Queries>*>(workspace.row_numbers)[tile_index];
  }
};

// A tile of queries a block; D / 8 lanes share a row.
template <class T, int D>
__global__ void __launch_bounds__(attention_backward_rows_threads)
    attention_backward_rows_sm90_kernel(const __grid_constant__ AttentionBackwardKernelParams params) {
  constexpr int queries = attention_backward_queries(D), lanes = D / 8;
  constexpr int rows_at_once = attention_backward_rows_threads / lanes;
  constexpr float log2_e = 1.4426950408889634f;
  const AttentionRows& rows = params.rows;
  const int tile = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const int tile_index = params.tile_index(batch, head, tile);
  AttentionRowNumbers<queries>& numbers = params.numbers<queries>(tile_index);
  const int lane = threadIdx.x % lanes;
  float4* sums = reinterpret_cast<float4*>(params.workspace.query_sums) + int64_t{tile_index} * (queries * D / 4);
  for (int i = threadIdx.x; i < queries * D / 4; i += attention_backward_rows_threads) {
    sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  if (threadIdx.x < 2) params.workspace.turns[2 * tile_index + threadIdx.x] = 0;
  if (threadIdx.x == 0 && tile_index == 0) *params.workspace.tickets = 0;

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

}  // namespace fusewright::cuda
