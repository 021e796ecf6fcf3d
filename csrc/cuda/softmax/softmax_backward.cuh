// Backward kernels of softmax and their launch: grad_input = y * (grad_output - sum(y * grad_output)) over a row.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/row_tile.cuh"
#include "fusewright/cuda/tile_shape.cuh"
#include "fusewright/softmax.h"
#include "softmax_across.cuh"

namespace fusewright::cuda {

// y and grad_output have one type: that of T, or float32 where the forward widened its input.
template <class T, class Tile, int Elements>
__device__ __forceinline__ void load_backward(const SoftmaxBackwardParams& params, const Tile& tile, int64_t row,
                                              float (&output)[Elements], float (&grad)[Elements]) {
  with_stream_type<T>(params.output.dtype, [&](auto type) {
    tile.template load<decltype(type)>(params.output, row, output);
    tile.template load<decltype(type)>(params.grad_output, row, grad);
  });
}

template <int Elements>
__device__ __forceinline__ float dot(const float (&a)[Elements], const float (&b)[Elements]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Elements; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T, class Tile, int Elements>
__device__ __forceinline__ void write_gradient(const SoftmaxBackwardParams& params, const Tile& tile, int64_t row,
                                               float row_dot, const float (&output)[Elements],
                                               float (&grad)[Elements]) {
#pragma unroll
  for (int i = 0; i < Elements; ++i) grad[i] = output[i] * (grad[i] - row_dot);
  tile.template store<T>(params.grad_input, row, grad);
}

// Rows in registers.
template <class T, class Columns, int Elements, int Lanes, int Threads>
__global__ void __launch_bounds__(Threads)
    softmax_backward_tile_kernel(const __grid_constant__ SoftmaxBackwardParams params) {
  const auto tile = make_row_tile<Columns, Elements, Lanes>(params.columns);
  RowReducer<Lanes> reduce;
  const int64_t row = block_index() * (blockDim.x / tile.threads) + threadIdx.x / tile.threads;
  if (row >= params.rows) return;

  float output[Elements];
  float grad[Elements];
  load_backward<T>(params, tile, row, output, grad);
  const float row_dot = reduce(dot(output, grad), Sum{});
  write_gradient<T>(params, tile, row, row_dot, output, grad);
}

// Wider rows, a block to a row in two passes.
template <class T, class Columns, int Elements>
__global__ void __launch_bounds__(1024)
    softmax_backward_wide_kernel(const __grid_constant__ SoftmaxBackwardParams params) {
  const int64_t row = block_index();
  if (row >= params.rows) return;
  auto tile = make_row_tile<Columns, Elements, whole_block>(params.columns);
  RowReducer<whole_block> reduce;
  const int64_t tile_columns = static_cast<int64_t>(blockDim.x) * Elements;

  float row_dot = 0.0f;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int64_t first = 0; first < params.columns; first += tile_columns) {
      tile.move_to(first);
      float output[Elements];
      float grad[Elements];
      load_backward<T>(params, tile, row, output, grad);
      if (pass == 0) {
        row_dot += dot(output, grad);
      } else {
        write_gradient<T>(params, tile, row, row_dot, output, grad);
      }
    }
    if (pass == 0) row_dot = reduce(row_dot, Sum{});
  }
}

// Rows side by side.
template <class T>
__global__ void __launch_bounds__(warp_size* across_warps)
    softmax_backward_across_kernel(const __grid_constant__ SoftmaxBackwardParams params) {
  struct WarpDots {
    float values[across_warps][warp_size];
  };
  auto& warp_dots = block_shared<WarpDots>().values;
  const int64_t row = block_index() * warp_size + threadIdx.x;
  const bool inside = row < params.rows;
  with_stream_type<T>(params.output.dtype, [&](auto type) {
    using Output = decltype(type);
    const int64_t read_row = inside ? row : 0;
    const Output* output = static_cast<const Output*>(params.output.data) + params.output.row_offset(read_row);
    const Output* grad = static_cast<const Output*>(params.grad_output.data) + params.grad_output.row_offset(read_row);
    const int64_t output_stride = params.output.inner_stride[0];
    const int64_t grad_stride = params.grad_output.inner_stride[0];
    float thread_dot = 0.0f;
    if (inside) {
#pragma unroll 4
      for (int64_t column = threadIdx.y; column < params.columns; column += across_warps) {
        thread_dot += load_float(output + column * output_stride) * load_float(grad + column * grad_stride);
      }
    }
    warp_dots[threadIdx.y][threadIdx.x] = thread_dot;
    __syncthreads();
    if (!inside) return;
    float row_dot = 0.0f;
    for (int warp = 0; warp < across_warps; ++warp) row_dot += warp_dots[warp][threadIdx.x];
    T* grad_input = static_cast<T*>(params.grad_input.data) + params.grad_input.row_offset(row);
#pragma unroll 4
    for (int64_t column = threadIdx.y; column < params.columns; column += across_warps) {
      const float y = load_float(output + column * output_stride);
      const float dy = load_float(grad + column * grad_stride);
      store_float(grad_input + column * params.grad_input.inner_stride[0], y * (dy - row_dot));
    }
  });
}

template <class T, class Columns>
cudaError_t launch_softmax_backward(const SoftmaxBackwardParams& params, void* stream) {
  if (params.columns > block_tile_columns<Columns>) {
    constexpr int elements = Columns::width > 1 ? 8 : 4;
    return launch(softmax_backward_wide_kernel<T, Columns, elements>, grid_of(params.rows), dim3(1024), 0, stream,
                  params);
  }
  if (params.columns > warp_tile_columns<Columns>) {
    return launch(
        softmax_backward_tile_kernel<T, Columns, block_tile_elements, whole_block, block_tile_threads<Columns>>,
        grid_of(params.rows), dim3(threads_for_row(params.columns, block_tile_elements)), 0, stream, params);
  }
  if constexpr (Columns::width > 1) {
    if (params.columns <= lanes_tile_columns) {
      return launch(softmax_backward_tile_kernel<T, Columns, lanes_tile_elements, tile_lanes, lanes_tile_threads>,
                    grid_of(ceil_div(params.rows, lanes_tile_threads / tile_lanes)), dim3(lanes_tile_threads), 0,
                    stream, params);
    }
  }
  return launch(softmax_backward_tile_kernel<T, Columns, warp_tile_elements<Columns>, warp_size, lanes_tile_threads>,
                grid_of(ceil_div(params.rows, lanes_tile_threads / warp_size)), dim3(lanes_tile_threads), 0, stream,
                params);
}

// The instantiation of one element type.
template <class T>
cudaError_t softmax_backward(const SoftmaxBackwardParams& params, void* stream) {
  using Vectors = AdjacentColumns<full_vector<T>>;
  if (rows_lie_across(params.output)) {
    return launch(softmax_backward_across_kernel<T>, grid_of(ceil_div(params.rows, warp_size)),
                  dim3(warp_size, across_warps), 0, stream, params);
  }
  return take_vectors({&params.output, &params.grad_output, &params.grad_input}, params.columns, Vectors::width)
             ? launch_softmax_backward<T, Vectors>(params, stream)
             : launch_softmax_backward<T, StridedColumns>(params, stream);
}

extern template cudaError_t softmax_backward<float>(const SoftmaxBackwardParams&, void*);
extern template cudaError_t softmax_backward<__nv_bfloat16>(const SoftmaxBackwardParams&, void*);
extern template cudaError_t softmax_backward<__half>(const SoftmaxBackwardParams&, void*);

}  // namespace fusewright::cuda
