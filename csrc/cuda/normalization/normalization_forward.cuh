// Forward kernels of layer and RMS normalisation, plain or fused with dropout and a residual addition, and their
// launch. A row is read once and held: in registers up to block_tile_columns, in shared memory above, and re-read where
// it fits neither. Statistics are float32 and two-pass, which stays exact where the mean is far above the spread.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/row_tile.cuh"
#include "fusewright/cuda/tile_shape.cuh"
#include "fusewright/normalization.h"

namespace fusewright::cuda {

// The tensor to be normalised, dropout(input) + residual if Fused, else input. Fused also writes it if asked to.
template <class T, bool Fused, class Tile, int Elements>
__device__ __forceinline__ void load_stream(const NormForwardParams& params, const Tile& tile, int64_t row,
                                            bool write_new_residual, float (&values)[Elements]) {
  if constexpr (!Fused) {
    tile.template load<T>(params.input, row, values);
  } else {
    float residual[Elements];
    with_stream_type<T>(params.residual.dtype, [&](auto type) {
      tile.template load<T>(params.input, row, values);
      tile.template load<decltype(type)>(params.residual, row, residual);
    });
    if (params.seed != nullptr) tile.dropout(params.seed, params.keep_threshold, params.keep_scale, row, values);
#pragma unroll
    for (int i = 0; i < Elements; ++i) values[i] += residual[i];
    // What is normalised is what is stored and what a backward will read.
    with_stream_type<T>(params.new_residual.dtype, [&](auto type) {
#pragma unroll
      for (int i = 0; i < Elements; ++i) values[i] = round_to<decltype(type)>(values[i]);
      if (write_new_residual) tile.template store<decltype(type)>(params.new_residual, row, values);
    });
  }
}

// output = (values - mean) * rstd * (weight + weight_offset) + bias
template <class T, class Tile, int Elements>
__device__ __forceinline__ void write_normalized(const NormForwardParams& params, const Tile& tile, int64_t row,
                                                 float mean, float rstd, float (&values)[Elements]) {
#pragma unroll
  for (int i = 0; i < Elements; ++i) values[i] = (values[i] - mean) * rstd;
  if (params.weight.data != nullptr) {
    const float offset = params.weight_offset;
    tile.with_parameter(params.weight, values,
                        [offset](float value, float weight) { return value * (weight + offset); });
  }
  if (params.bias.data != nullptr) {
    tile.with_parameter(params.bias, values, [](float value, float bias) { return value + bias; });
  }
  tile.store_contiguous(static_cast<T*>(params.output), row, values);
}

__device__ __forceinline__ void write_statistics(const NormForwardParams& params, int64_t row, float mean, float rstd) {
  if (params.statistics == nullptr) return;
  params.statistics[row] = rstd;
  if (params.center) params.statistics[params.rows + row] = mean;
}

// Rows in registers: `Lanes` threads, or the whole block, hold a row of up to threads * Elements columns.
template <class T, class Columns, int Elements, int Lanes, int Threads, bool Fused>
__global__ void __launch_bounds__(Threads) norm_forward_tile_kernel(const __grid_constant__ NormForwardParams params) {
  const auto tile = make_row_tile<Columns, Elements, Lanes>(params.columns);
  RowReducer<Lanes> reduce;
  const float columns = static_cast<float>(params.columns);
  const int64_t row = block_index() * (blockDim.x / tile.threads) + threadIdx.x / tile.threads;
  if (row >= params.rows) return;

  float values[Elements];
  load_stream<T, Fused>(params, tile, row, true, values);

  float mean = 0.0f;
  if (params.center) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Elements; ++i) sum += values[i];
    mean = reduce(sum, Sum{}) / columns;
  }
  float square_sum = 0.0f;
  tile.for_each([&](int i) { square_sum += (values[i] - mean) * (values[i] - mean); });
  const float rstd = rsqrtf(reduce(square_sum, Sum{}) / columns + static_cast<float>(params.eps));

  if (tile.thread == 0) write_statistics(params, row, mean, rstd);
  write_normalized<T>(params, tile, row, mean, rstd, values);
}

// Rows wider than a block's registers, or of any strides, a tile at a time in two passes for the statistics and one for
// the output. With `staged` the first pass leaves the row in shared memory; each thread reads back only what it wrote,
// so no barrier is needed. Without it every pass reads the operands again, which for such rows mostly come from L2.
template <class T, class Columns, int Elements, bool Fused>
__global__ void __launch_bounds__(1024)
    norm_forward_wide_kernel(const __grid_constant__ NormForwardParams params, bool staged) {
  // The sum of residual and input may be a float32 stream.
  using Staged = std::conditional_t<Fused, float, T>;
  Staged* stage = dynamic_shared<Staged>();
  constexpr int mean_pass = 0, variance_pass = 1, output_pass = 2;
  const int first_pass = params.center ? mean_pass : variance_pass;
  auto tile = make_row_tile<Columns, Elements, whole_block>(params.columns);
  RowReducer<whole_block> reduce;
  const int64_t tile_columns = static_cast<int64_t>(blockDim.x) * Elements;
  const float columns = static_cast<float>(params.columns);

  const int64_t row = block_index();
  if (row >= params.rows) return;

  float mean = 0.0f;
  float rstd = 0.0f;
#pragma unroll 1
  for (int pass = first_pass; pass <= output_pass; ++pass) {
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t first = 0; first < params.columns; first += tile_columns) {
      tile.move_to(first);
      float values[Elements];
      if (staged && pass != first_pass) {
        tile.load_contiguous(stage, 0, values);
      } else {
        load_stream<T, Fused>(params, tile, row, pass == first_pass, values);
        if (staged) tile.store_contiguous(stage, 0, values);
      }
      if (pass == output_pass) {
        write_normalized<T>(params, tile, row, mean, rstd, values);
      } else {
        float tile_sum = 0.0f;
        tile.for_each([&](int i) {
          const float centered = values[i] - mean;
          tile_sum += pass == mean_pass ? values[i] : centered * centered;
        });
        sum += tile_sum;
      }
    }
    if (pass == mean_pass) {
      mean = reduce(sum, Sum{}) / columns;
    } else if (pass == variance_pass) {
      rstd = rsqrtf(reduce(sum, Sum{}) / columns + static_cast<float>(params.eps));
    }
  }
  if (threadIdx.x == 0) write_statistics(params, row, mean, rstd);
}

template <class T, class Columns, int Elements, bool Fused>
cudaError_t launch_norm_forward_wide(const NormForwardParams& params, void* stream) {
  DeviceLimits limits;
  const cudaError_t error = query_device(limits);
  if (error != cudaSuccess) return error;
  const int64_t row_bytes = params.columns * static_cast<int64_t>(Fused ? sizeof(float) : sizeof(T));
  const bool staged = row_bytes <= limits.shared_bytes;
  return launch(norm_forward_wide_kernel<T, Columns, Elements, Fused>, grid_of(params.rows),
                dim3(std::min(1024, threads_for_row(params.columns, Elements))), staged ? row_bytes : 0, stream, params,
                staged);
}

template <class T, class Columns, bool Fused>
cudaError_t launch_norm_forward_tile(const NormForwardParams& params, void* stream) {
  if (params.columns > warp_tile_columns<Columns>) {
    return launch(
        norm_forward_tile_kernel<T, Columns, block_tile_elements, whole_block, block_tile_threads<Columns>, Fused>,
        grid_of(params.rows), dim3(threads_for_row(params.columns, block_tile_elements)), 0, stream, params);
  }
  if constexpr (Columns::width > 1) {
    if (params.columns <= lanes_tile_columns) {
      return launch(norm_forward_tile_kernel<T, Columns, lanes_tile_elements, tile_lanes, lanes_tile_threads, Fused>,
                    grid_of(ceil_div(params.rows, lanes_tile_threads / tile_lanes)), dim3(lanes_tile_threads), 0,
                    stream, params);
    }
  }
  return launch(norm_forward_tile_kernel<T, Columns, warp_tile_elements<Columns>, warp_size, lanes_tile_threads, Fused>,
                grid_of(ceil_div(params.rows, lanes_tile_threads / warp_size)), dim3(lanes_tile_threads), 0, stream,
                params);
}

// The instantiation of one element type.
template <class T>
cudaError_t norm_forward(const NormForwardParams& params, void* stream) {
  using Vectors = AdjacentColumns<full_vector<T>>;
  const bool fused = params.residual.data != nullptr;
  const auto operands = {&params.input, &params.residual, &params.new_residual, &params.weight, &params.bias};
  if (take_vectors(operands, params.columns, Vectors::width) && is_aligned(params.output, 16)) {
    if (params.columns <= block_tile_columns<Vectors>) {
      return fused ? launch_norm_forward_tile<T, Vectors, true>(params, stream)
                   : launch_norm_forward_tile<T, Vectors, false>(params, stream);
    }
    return fused ? launch_norm_forward_wide<T, Vectors, 8, true>(params, stream)
                 : launch_norm_forward_wide<T, Vectors, 8, false>(params, stream);
  }
  if (fused) return launch_norm_forward_wide<T, AnyColumns, 1, true>(params, stream);
  if (params.columns <= block_tile_columns<StridedColumns> && have_one_stride(operands)) {
    return launch_norm_forward_tile<T, StridedColumns, false>(params, stream);
  }
  return launch_norm_forward_wide<T, AnyColumns, 1, false>(params, stream);
}

extern template cudaError_t norm_forward<float>(const NormForwardParams&, void*);
extern template cudaError_t norm_forward<__nv_bfloat16>(const NormForwardParams&, void*);
extern template cudaError_t norm_forward<__half>(const NormForwardParams&, void*);

}  // namespace fusewright::cuda
