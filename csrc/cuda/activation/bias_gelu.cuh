// Kernels of GELU with a bias and their launch: output = z * factor(z), z = input + bias.
//
// The bias's gradient is a sum over rows. A block sums a chunk of rows, whose number depends on the shape and the
// device alone; norm_backward_reduce adds the chunks. Every order is fixed, so results repeat bit for bit.
#pragma once

#include "../normalization/normalization_backward_reduce.cuh"
#include "fusewright/activation.h"
#include "fusewright/cuda/activations.cuh"
#include "fusewright/cuda/element_tile.cuh"

namespace fusewright::cuda {

// values += bias, where there is one.
template <class Tile, int Elements>
__device__ __forceinline__ void add_bias(const Tile& tile, const RowView& bias, float (&values)[Elements]) {
  if (bias.data == nullptr) return;
  tile.with_parameter(bias, values, [](float value, float added) { return value + added; });
}

template <bool Tanh, int Elements>
__device__ __forceinline__ void multiply_by_slope(const float (&z)[Elements], float (&grad)[Elements]) {
#pragma unroll
  for (int i = 0; i < Elements; ++i) {
    const GeluFactor factor = gelu_factor<Tanh>(z[i]);
    grad[i] *= factor.value + z[i] * factor.slope;
  }
}

template <class T, class Columns, bool Tanh>
__global__ void __launch_bounds__(element_tile_threads)
    bias_gelu_forward_kernel(const __grid_constant__ BiasGeluForwardParams params,
                             const __grid_constant__ RowView bias) {
  constexpr int elements = element_tile_elements<Columns>;
  const auto tile = make_element_tile<Columns, elements>(params.columns);
  if (tile.row >= params.rows) return;
  float z[elements];
  tile.template load<T>(params.input, tile.row, z);
  add_bias(tile, bias, z);
#pragma unroll
  for (int i = 0; i < elements; ++i) z[i] *= gelu_factor<Tanh>(z[i]).value;
  tile.template store<T>(params.output, tile.row, z);
}

// Without a bias, whose gradient would be wanted.
template <class T, class Columns, bool Tanh>
__global__ void __launch_bounds__(element_tile_threads)
    bias_gelu_backward_kernel(const __grid_constant__ BiasGeluBackwardParams params) {
  constexpr int elements = element_tile_elements<Columns>;
  const auto tile = make_element_tile<Columns, elements>(params.columns);
  if (tile.row >= params.rows) return;
  float z[elements], grad[elements];
  tile.template load<T>(params.input, tile.row, z);
  tile.template load<T>(params.grad_output, tile.row, grad);
  multiply_by_slope<Tanh>(z, grad);
  tile.template store<T>(params.grad_input, tile.row, grad);
}

// Tiles of the sums: one vector of 16-bit elements, two of float32.
template <class Columns>
constexpr int bias_tile_elements = Columns::width > 1 ? 8 : 4;

// Rows whose gradients one thread adds up: bounds the rounding error of a sum.
constexpr int64_t most_rows_of_thread = 256;
// Rows below which a chunk's sums cost too much traffic.
constexpr int64_t least_rows_of_chunk = 32;

// Blocks of a multiprocessor that find registers. Left alone, ptxas aims at four and spills.
constexpr int resident_sum_blocks = 3;

struct BiasGradientPlan {
  dim3 block;
  int64_t column_tiles = 0;
  int64_t chunk_rows = 0;
  int64_t chunks = 0;
};

inline BiasGradientPlan plan_bias_gradient(int64_t rows, int64_t columns, int64_t elements,
                                           const DeviceLimits& limits) {
  BiasGradientPlan plan;
  plan.block = element_tile_block(columns, elements, warp_size);
  plan.column_tiles = ceil_div(columns, plan.block.x * elements);
  const int64_t filling = ceil_div(rows * plan.column_tiles, resident_sum_blocks * limits.multiprocessors);
  plan.chunk_rows = std::clamp<int64_t>(filling, least_rows_of_chunk, most_rows_of_thread * plan.block.y);
  plan.chunks = ceil_div(rows, plan.chunk_rows);
  return plan;
}

// The gradient of input, and partials (chunks, N) of that of the bias.
template <class T, class Columns, bool Tanh>
__global__ void __launch_bounds__(element_tile_threads, resident_sum_blocks)
    bias_gelu_backward_sums_kernel(const __grid_constant__ BiasGeluBackwardParams params,
                                   const __grid_constant__ RowView bias, int64_t column_tiles, int64_t chunk_rows,
                                   float* partials) {
  constexpr int elements = bias_tile_elements<Columns>;
  struct RowSums {
    float values[elements][element_tile_threads];
  };
  auto& row_sums = block_shared<RowSums>().values;
  RowTile<Columns, elements> tile;
  tile.thread = threadIdx.x;
  tile.threads = blockDim.x;
  tile.columns = params.columns;
  tile.move_to(block_index() % column_tiles * blockDim.x * elements);
  const int64_t chunk = block_index() / column_tiles;
  const int64_t end = min(params.rows, (chunk + 1) * chunk_rows);

  float sums[elements] = {};
#pragma unroll 1
  for (int64_t row = chunk * chunk_rows + threadIdx.y; row < end; row += blockDim.y) {
    tile.forget_addresses();
    float z[elements], grad[elements];
    tile.template load<T>(params.input, row, z);
    tile.template load<T>(params.grad_output, row, grad);
    add_bias(tile, bias, z);
    multiply_by_slope<Tanh>(z, grad);
    tile.template store<T>(params.grad_input, row, grad);
#pragma unroll
    for (int i = 0; i < elements; ++i) sums[i] += grad[i];
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int i = 0; i < elements; ++i) row_sums[i][thread] = sums[i];
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int other = threadIdx.x + blockDim.x; other < element_tile_threads; other += blockDim.x) {
#pragma unroll
    for (int i = 0; i < elements; ++i) sums[i] += row_sums[i][other];
  }
  tile.template store_contiguous<float>(partials, chunk, sums);
}

}  // namespace fusewright::cuda
