// Forward kernels of softmax and their launch. A row is held in registers where it fits; a wider one is read twice,
// the maximum and the sum together in the first pass (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018). A row of -inf gives NaN, as in torch: -inf - (-inf) below is meant to.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/row_tile.cuh"
#include "fusewright/cuda/tile_shape.cuh"
#include "fusewright/softmax.h"
#include "softmax_across.cuh"

namespace fusewright::cuda {

// sum of exp(x - maximum) over the elements seen so far.
struct OnlineSum {
  float maximum = -INFINITY;
  float sum = 0.0f;

  // Moves the sum to a maximum that is not smaller. While only -inf was seen there is nothing to rescale, and
  // exp(-inf - (-inf)) would make it NaN.
  __device__ __forceinline__ void rescale(float new_maximum) {
    if (maximum != new_maximum) sum *= expf(maximum - new_maximum);
    maximum = new_maximum;
  }

  __device__ __forceinline__ void add(float x) {
    rescale(fmaxf(maximum, x));
    sum += exponential(x);
  }

  __device__ __forceinline__ float exponential(float x) const { return x == -INFINITY ? 0.0f : expf(x - maximum); }

  __device__ __forceinline__ void merge(OnlineSum other) {
    const float new_maximum = fmaxf(maximum, other.maximum);
    rescale(new_maximum);
    other.rescale(new_maximum);
    sum += other.sum;
  }
};

// Rows in registers.
template <class T, class Columns, int Elements, int Lanes, int Threads>
__global__ void __launch_bounds__(Threads)
    softmax_forward_tile_kernel(const __grid_constant__ SoftmaxForwardParams params) {
  const auto tile = make_row_tile<Columns, Elements, Lanes>(params.columns);
  RowReducer<Lanes> reduce;
  const int64_t row = block_index() * (blockDim.x / tile.threads) + threadIdx.x / tile.threads;
  if (row >= params.rows) return;

  float values[Elements];
  tile.template load<T>(params.input, row, values);
  float maximum = -INFINITY;
  tile.for_each([&](int i) { maximum = fmaxf(maximum, values[i]); });
  maximum = reduce(maximum, Maximum{});
  float sum = 0.0f;
  tile.for_each([&](int i) {
    values[i] = expf(values[i] - maximum);
    sum += values[i];
  });
  const float scale = 1.0f / reduce(sum, Sum{});
#pragma unroll
  for (int i = 0; i < Elements; ++i) values[i] *= scale;
  with_stream_type<T>(params.output.dtype,
                      [&](auto type) { tile.template store<decltype(type)>(params.output, row, values); });
}

// Wider rows, a block to a row.
template <class T, class Columns, int Elements>
__global__ void __launch_bounds__(1024)
    softmax_forward_wide_kernel(const __grid_constant__ SoftmaxForwardParams params) {
  const int64_t row = block_index();
  if (row >= params.rows) return;
  auto tile = make_row_tile<Columns, Elements, whole_block>(params.columns);
  RowReducer<whole_block> reduce;
  const int64_t tile_columns = static_cast<int64_t>(blockDim.x) * Elements;

  float values[Elements];
  OnlineSum online;
  for (int64_t first = 0; first < params.columns; first += tile_columns) {
    tile.move_to(first);
    tile.template load<T>(params.input, row, values);
    float tile_maximum = online.maximum;
    tile.for_each([&](int i) { tile_maximum = fmaxf(tile_maximum, values[i]); });
    online.rescale(tile_maximum);
    tile.for_each([&](int i) { online.sum += online.exponential(values[i]); });
  }
  const float maximum = reduce(online.maximum, Maximum{});
  online.rescale(maximum);
  const float scale = 1.0f / reduce(online.sum, Sum{});
  for (int64_t first = 0; first < params.columns; first += tile_columns) {
    tile.move_to(first);
    tile.template load<T>(params.input, row, values);
#pragma unroll
    for (int i = 0; i < Elements; ++i) values[i] = expf(values[i] - maximum) * scale;
    with_stream_type<T>(params.output.dtype,
                        [&](auto type) { tile.template store<decltype(type)>(params.output, row, values); });
  }
}

// Rows that lie side by side, as along any dimension but the last: a warp takes 32 adjacent rows, so that its accesses
// are adjacent, and the warps of the block share their columns.
template <class T>
__global__ void __launch_bounds__(warp_size* across_warps)
    softmax_forward_across_kernel(const __grid_constant__ SoftmaxForwardParams params) {
  struct WarpSums {
    OnlineSum values[across_warps][warp_size];
  };
  auto& warp_sums = block_shared<WarpSums>().values;
  const int64_t row = block_index() * warp_size + threadIdx.x;
  const bool inside = row < params.rows;
  const T* input = static_cast<const T*>(params.input.data) + (inside ? params.input.row_offset(row) : 0);

  OnlineSum online;
  if (inside) {
#pragma unroll 4
    for (int64_t column = threadIdx.y; column < params.columns; column += across_warps) {
      online.add(load_float(input + column * params.input.inner_stride[0]));
    }
  }
  warp_sums[threadIdx.y][threadIdx.x] = online;
  __syncthreads();
  if (!inside) return;
  OnlineSum row_sum;
  for (int warp = 0; warp < across_warps; ++warp) row_sum.merge(warp_sums[warp][threadIdx.x]);
  const float scale = 1.0f / row_sum.sum;
  with_stream_type<T>(params.output.dtype, [&](auto type) {
    using Output = decltype(type);
    Output* output = static_cast<Output*>(params.output.data) + params.output.row_offset(row);
#pragma unroll 4
    for (int64_t column = threadIdx.y; column < params.columns; column += across_warps) {
      const float x = load_float(input + column * params.input.inner_stride[0]);
      store_float(output + column * params.output.inner_stride[0], expf(x - row_sum.maximum) * scale);
    }
  });
}

template <class T, class Columns>
cudaError_t launch_softmax_forward(const SoftmaxForwardParams& params, void* stream) {
  if (params.columns > block_tile_columns<Columns>) {
    constexpr int elements = Columns::width > 1 ? 16 : 4;
    return launch(softmax_forward_wide_kernel<T, Columns, elements>, grid_of(params.rows), dim3(1024), 0, stream,
                  params);
  }
  if (params.columns > warp_tile_columns<Columns>) {
    return launch(
        softmax_forward_tile_kernel<T, Columns, block_tile_elements, whole_block, block_tile_threads<Columns>>,
        grid_of(params.rows), dim3(threads_for_row(params.columns, block_tile_elements)), 0, stream, params);
  }
  if constexpr (Columns::width > 1) {
    if (params.columns <= lanes_tile_columns) {
      return launch(softmax_forward_tile_kernel<T, Columns, lanes_tile_elements, tile_lanes, lanes_tile_threads>,
                    grid_of(ceil_div(params.rows, lanes_tile_threads / tile_lanes)), dim3(lanes_tile_threads), 0,
                    stream, params);
    }
  }
  return launch(softmax_forward_tile_kernel<T, Columns, warp_tile_elements<Columns>, warp_size, lanes_tile_threads>,
                grid_of(ceil_div(params.rows, lanes_tile_threads / warp_size)), dim3(lanes_tile_threads), 0, stream,
                params);
}

// The instantiation of one element type.
template <class T>
cudaError_t softmax_forward(const SoftmaxForwardParams& params, void* stream) {
  using Vectors = AdjacentColumns<full_vector<T>>;
  if (rows_lie_across(params.input)) {
    return launch(softmax_forward_across_kernel<T>, grid_of(ceil_div(params.rows, warp_size)),
                  dim3(warp_size, across_warps), 0, stream, params);
  }
  return take_vectors({&params.input, &params.output}, params.columns, Vectors::width)
             ? launch_softmax_forward<T, Vectors>(params, stream)
             : launch_softmax_forward<T, StridedColumns>(params, stream);
}

extern template cudaError_t softmax_forward<float>(const SoftmaxForwardParams&, void*);
extern template cudaError_t softmax_forward<__nv_bfloat16>(const SoftmaxForwardParams&, void*);
extern template cudaError_t softmax_forward<__half>(const SoftmaxForwardParams&, void*);

}  // namespace fusewright::cuda
