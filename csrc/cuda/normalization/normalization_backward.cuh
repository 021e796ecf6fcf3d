// Backward kernels of layer and RMS normalisation and their launch.
//
// With n = (x - mean) * rstd and g = grad_output * (weight + weight_offset), averaged over the row,
//   grad_stream = (g - n * average(g * n) - average(g)) * rstd + grad_new_residual,
// where RMS normalisation lacks average(g). grad_weight = sum over rows of grad_output * n, grad_bias of grad_output.
//
// A fixed number of blocks goes over the rows. Each keeps the sums of the parameter gradients in registers or shared
// memory, adds them every rows_per_flush rows to its own row of the workspace (so no float32 sum grows long), and
// norm_backward_reduce adds the workspace's rows. Every order is fixed and nothing is atomic: results repeat bit for
// bit.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/row_tile.cuh"
#include "fusewright/normalization.h"
#include "normalization_backward_plan.cuh"

namespace fusewright::cuda {

// One row's operands, n and grad_output, for a stream of type Stream.
template <class T, class Stream, class Tile, int Elements>
__device__ __forceinline__ void load_backward_as(const NormBackwardParams& params, const Tile& tile, int64_t row,
                                                 float rstd, float mean, float (&normalized)[Elements],
                                                 float (&grad)[Elements]) {
  tile.template load<Stream>(params.stream, row, normalized);
  tile.template load<T>(params.grad_output, row, grad);
#pragma unroll
  for (int i = 0; i < Elements; ++i) normalized[i] = (normalized[i] - mean) * rstd;
}

template <class T, class Tile, int Elements>
__device__ __forceinline__ void load_backward(const NormBackwardParams& params, const Tile& tile, int64_t row,
                                              float rstd, float mean, float (&normalized)[Elements],
                                              float (&grad)[Elements]) {
  with_stream_type<T>(params.stream.dtype, [&](auto type) {
    load_backward_as<T, decltype(type)>(params, tile, row, rstd, mean, normalized, grad);
  });
}

template <class Tile, int Elements>
__device__ __forceinline__ void multiply_by_weight(const NormBackwardParams& params, const Tile& tile,
                                                   float (&grad)[Elements]) {
  if (params.weight.data == nullptr) return;
  const float offset = params.weight_offset;
  tile.with_parameter(params.weight, grad, [offset](float value, float weight) { return value * (weight + offset); });
}

// What a row's averages are made of: sums of g * n and of g. Elements beyond the row have g = 0, and add nothing.
template <class Tile, int Elements>
__device__ __forceinline__ void add_row_sums(const Tile& tile, const float (&normalized)[Elements],
                                             const float (&grad)[Elements], float (&row_sums)[2]) {
  float products = 0.0f, grads = 0.0f;
  tile.for_each([&](int i) {
    products += grad[i] * normalized[i];
    grads += grad[i];
  });
  row_sums[0] += products;
  row_sums[1] += grads;
}

// Writes grad_residual and grad_input; `grad` holds g and is overwritten.
template <class T, bool Fused, class Tile, int Elements>
__device__ __forceinline__ void write_gradients(const NormBackwardParams& params, const Tile& tile, int64_t row,
                                                float rstd, const float (&row_sums)[2],
                                                const float (&normalized)[Elements], float (&grad)[Elements]) {
  const float columns = static_cast<float>(params.columns);
  const float product_average = row_sums[0] / columns;
  const float grad_average = params.center ? row_sums[1] / columns : 0.0f;
#pragma unroll
  for (int i = 0; i < Elements; ++i) grad[i] = (grad[i] - normalized[i] * product_average - grad_average) * rstd;
  if constexpr (Fused) {
    if (params.grad_new_residual.data != nullptr) {
      with_stream_type<T>(params.grad_new_residual.dtype, [&](auto type) {
        float added[Elements];
        tile.template load<decltype(type)>(params.grad_new_residual, row, added);
#pragma unroll
        for (int i = 0; i < Elements; ++i) grad[i] += added[i];
      });
    }
    if (params.grad_residual.data != nullptr) {
      with_stream_type<T>(params.grad_residual.dtype,
                          [&](auto type) { tile.template store<decltype(type)>(params.grad_residual, row, grad); });
    }
    if (params.grad_input.data == nullptr) return;
    if (params.seed != nullptr) tile.dropout(params.seed, params.keep_threshold, params.keep_scale, row, grad);
  }
  tile.template store<T>(params.grad_input, row, grad);
}

// This block's row of one parameter's workspace.
class PartialSums {
 public:
  __device__ PartialSums(float* partials, int64_t columns)
      : row_(partials == nullptr ? nullptr : partials + static_cast<int64_t>(blockIdx.x) * columns) {}

  __device__ __forceinline__ bool wanted() const { return row_ != nullptr; }

  // `first` tells that nothing was added to the column before; the workspace comes with undefined contents.
  __device__ __forceinline__ void add(int64_t column, float sum, bool first) const {
    row_[column] = first ? sum : row_[column] + sum;
  }

 private:
  float* row_;
};

// Sums in the registers of the threads that share a row, for a whole block.
template <class Tile, int Elements>
__device__ __forceinline__ void flush_block(const Tile& tile, const PartialSums& partials, bool first,
                                            float (&sums)[Elements]) {
  if (!partials.wanted()) return;
#pragma unroll
  for (int vector = 0; vector < Tile::vectors; ++vector) {
    if (!tile.holds(vector)) continue;
#pragma unroll
    for (int i = 0; i < Tile::width; ++i) {
      partials.add(tile.column(vector) + i, sums[vector * Tile::width + i], first);
    }
  }
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
}

// The same where a block works on several rows at a time: sums over the lanes with the same columns, then over warps.
template <int Lanes, int Threads, class Tile, int Elements>
__device__ __forceinline__ void flush_lanes(const Tile& tile, const PartialSums& partials, bool first,
                                            float (&sums)[Elements]) {
  if (!partials.wanted()) return;
  struct WarpSums {
    float values[Threads / warp_size][Lanes * Elements];
  };
  auto& warp_sums = block_shared<WarpSums>().values;
  const int warp = threadIdx.x / warp_size;
#pragma unroll
  for (int vector = 0; vector < Tile::vectors; ++vector) {
#pragma unroll
    for (int i = 0; i < Tile::width; ++i) {
      float& sum = sums[vector * Tile::width + i];
#pragma unroll
      for (int distance = Lanes; distance < warp_size; distance *= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
      }
      if (threadIdx.x % warp_size < Lanes) warp_sums[warp][tile.column(vector) + i] = sum;
      sum = 0.0f;
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < tile.count; column += Threads) {
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < Threads / warp_size; ++other) sum += warp_sums[other][column];
    partials.add(column, sum, first);
  }
  // The next flush writes what this one has read.
  __syncthreads();
}

// Rows in registers. `weight_partials` and `bias_partials` are (gridDim.x, N), nullptr if not wanted.
// Told of the 1 block, the compiler uses the registers there are; of itself it keeps to 128 and spills a few.
template <class T, class Columns, int Elements, int Lanes, int Threads, bool Fused>
__global__ void __launch_bounds__(Threads, 1)
    norm_backward_tile_kernel(const __grid_constant__ NormBackwardParams params, float* weight_partials,
                              float* bias_partials) {
  auto tile = make_row_tile<Columns, Elements, Lanes>(params.columns);
  RowReducer<Lanes> reduce;
  const PartialSums weight_workspace(weight_partials, params.columns);
  const PartialSums bias_workspace(bias_partials, params.columns);
  const bool stream_gradient_wanted = params.grad_input.data != nullptr || params.grad_residual.data != nullptr;
  const int rows_of_block = Lanes == whole_block ? 1 : Threads / Lanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows_of_block;
  const int row_of_block = Lanes == whole_block ? 0 : threadIdx.x / Lanes;

  float weight_sums[Elements] = {};
  float bias_sums[Elements] = {};
  bool first_flush = true;
  int rows_since_flush = 0;
  // Uniform over the block, as a flush is a matter of the whole block.
  for (int64_t block_row = static_cast<int64_t>(blockIdx.x) * rows_of_block; block_row < params.rows;
       block_row += step) {
    tile.forget_addresses();
    const int64_t row = block_row + row_of_block;
    if (row < params.rows) {
      const float rstd = params.statistics[row];
      const float mean = params.center ? params.statistics[params.rows + row] : 0.0f;
      float normalized[Elements];
      float grad[Elements];
      load_backward<T>(params, tile, row, rstd, mean, normalized, grad);
#pragma unroll
      for (int i = 0; i < Elements; ++i) {
        weight_sums[i] += grad[i] * normalized[i];
        bias_sums[i] += grad[i];
      }
      if (stream_gradient_wanted) {
        multiply_by_weight(params, tile, grad);
        float row_sums[2] = {};
        add_row_sums(tile, normalized, grad, row_sums);
        reduce(row_sums, Sum{});
        write_gradients<T, Fused>(params, tile, row, rstd, row_sums, normalized, grad);
      }
    }
    if (++rows_since_flush == rows_per_flush || block_row + step >= params.rows) {
      if constexpr (Lanes == whole_block) {
        flush_block(tile, weight_workspace, first_flush, weight_sums);
        flush_block(tile, bias_workspace, first_flush, bias_sums);
      } else {
        flush_lanes<Lanes, Threads>(tile, weight_workspace, first_flush, weight_sums);
        flush_lanes<Lanes, Threads>(tile, bias_workspace, first_flush, bias_sums);
      }
      first_flush = false;
      rows_since_flush = 0;
    }
  }
}

// Wider rows, a tile at a time in two passes, with the sums in shared memory. The second pass finds the row in L1 or
// L2. Each thread reaches only its own sums, element after element across the threads, so without barrier or bank
// conflict.
template <class T, class Columns, int Elements, bool Fused>
__global__ void __launch_bounds__(1024) norm_backward_shared_kernel(const __grid_constant__ NormBackwardParams params,
                                                                    float* weight_partials, float* bias_partials) {
  float* shared_sums = dynamic_shared<float>();
  auto tile = make_row_tile<Columns, Elements, whole_block>(params.columns);
  RowReducer<whole_block> reduce;
  const int tile_columns = blockDim.x * Elements;
  const int tiles = static_cast<int>((params.columns + tile_columns - 1) / tile_columns);
  float* weight_sums = shared_sums + threadIdx.x;
  float* bias_sums = weight_sums + tiles * tile_columns;
  const PartialSums weight_workspace(weight_partials, params.columns);
  const PartialSums bias_workspace(bias_partials, params.columns);
  const int passes = params.grad_input.data != nullptr || params.grad_residual.data != nullptr ? 2 : 1;

  bool first_flush = true;
  int rows_since_flush = 0;
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const float rstd = params.statistics[row];
    const float mean = params.center ? params.statistics[params.rows + row] : 0.0f;
    float row_sums[2] = {};
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int tile_index = 0; tile_index < tiles; ++tile_index) {
        tile.move_to(tile_index * tile_columns);
        float normalized[Elements];
        float grad[Elements];
        load_backward<T>(params, tile, row, rstd, mean, normalized, grad);
        if (pass == 0) {
#pragma unroll
          for (int i = 0; i < Elements; ++i) {
            const int index = tile_index * tile_columns + i * blockDim.x;
            weight_sums[index] = grad[i] * normalized[i] + (rows_since_flush == 0 ? 0.0f : weight_sums[index]);
            bias_sums[index] = grad[i] + (rows_since_flush == 0 ? 0.0f : bias_sums[index]);
          }
        }
        multiply_by_weight(params, tile, grad);
        if (pass == 0) {
          add_row_sums(tile, normalized, grad, row_sums);
        } else {
          write_gradients<T, Fused>(params, tile, row, rstd, row_sums, normalized, grad);
        }
      }
      if (pass == 0) reduce(row_sums, Sum{});
    }
    if (++rows_since_flush == rows_per_flush || row + gridDim.x >= params.rows) {
      for (int tile_index = 0; tile_index < tiles; ++tile_index) {
        tile.move_to(tile_index * tile_columns);
#pragma unroll
        for (int i = 0; i < Elements; ++i) {
          if (!tile.holds(i / Columns::width)) continue;
          const int64_t column = tile.first + tile.column(i / Columns::width) + i % Columns::width;
          const int index = tile_index * tile_columns + i * blockDim.x;
          if (weight_workspace.wanted()) weight_workspace.add(column, weight_sums[index], first_flush);
          if (bias_workspace.wanted()) bias_workspace.add(column, bias_sums[index], first_flush);
        }
      }
      first_flush = false;
      rows_since_flush = 0;
    }
  }
}

// Rows wider still, or of any strides: the gradients of the stream, a block to a row in two passes over it.
template <class T, class Columns, int Elements, bool Fused>
__global__ void __launch_bounds__(1024) norm_backward_wide_kernel(const __grid_constant__ NormBackwardParams params) {
  const int64_t row = block_index();
  if (row >= params.rows) return;
  auto tile = make_row_tile<Columns, Elements, whole_block>(params.columns);
  RowReducer<whole_block> reduce;
  const int64_t tile_columns = static_cast<int64_t>(blockDim.x) * Elements;
  const float rstd = params.statistics[row];
  const float mean = params.center ? params.statistics[params.rows + row] : 0.0f;
  float row_sums[2] = {};
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int64_t first = 0; first < params.columns; first += tile_columns) {
      tile.move_to(first);
      float normalized[Elements];
      float grad[Elements];
      load_backward<T>(params, tile, row, rstd, mean, normalized, grad);
      multiply_by_weight(params, tile, grad);
      if (pass == 0) {
        add_row_sums(tile, normalized, grad, row_sums);
      } else {
        write_gradients<T, Fused>(params, tile, row, rstd, row_sums, normalized, grad);
      }
    }
    if (pass == 0) reduce(row_sums, Sum{});
  }
}

// Their parameter gradients: a thread owns a vector of columns and goes down `rows_per_partial` rows.
// Partials are (gridDim.y, N).
template <class T, class Columns>
__global__ void __launch_bounds__(backward_column_threads)
    norm_backward_parameters_kernel(const __grid_constant__ NormBackwardParams params, int64_t rows_per_partial,
                                    float* weight_partials, float* bias_partials) {
  constexpr int elements = Columns::width;
  auto tile = make_row_tile<Columns, elements, whole_block>(params.columns);
  tile.move_to(static_cast<int64_t>(blockIdx.x) * backward_column_threads * elements);
  if (!tile.holds(0)) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows_per_partial;
  const int64_t end = min(params.rows, begin + rows_per_partial);

  float weight_totals[elements] = {};
  float bias_totals[elements] = {};
  with_stream_type<T>(params.stream.dtype, [&](auto type) {
    for (int64_t flush_begin = begin; flush_begin < end; flush_begin += rows_per_flush) {
      float weight_sums[elements] = {};
      float bias_sums[elements] = {};
      const int64_t flush_end = min(end, flush_begin + rows_per_flush);
      for (int64_t row = flush_begin; row < flush_end; ++row) {
        const float rstd = params.statistics[row];
        const float mean = params.center ? params.statistics[params.rows + row] : 0.0f;
        float normalized[elements];
        float grad[elements];
        load_backward_as<T, decltype(type)>(params, tile, row, rstd, mean, normalized, grad);
#pragma unroll
        for (int i = 0; i < elements; ++i) {
          weight_sums[i] += grad[i] * normalized[i];
          bias_sums[i] += grad[i];
        }
      }
#pragma unroll
      for (int i = 0; i < elements; ++i) {
        weight_totals[i] += weight_sums[i];
        bias_totals[i] += bias_sums[i];
      }
    }
  });
  const int64_t first = static_cast<int64_t>(blockIdx.y) * params.columns + tile.first + tile.column(0);
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    if (weight_partials != nullptr) weight_partials[first + i] = weight_totals[i];
    if (bias_partials != nullptr) bias_partials[first + i] = bias_totals[i];
  }
}

struct NormBackwardPartials {
  float* weight = nullptr;
  float* bias = nullptr;
};

// Rows that fit a tile, in one kernel.
template <class T, class Columns, bool Fused>
cudaError_t launch_norm_backward_tile(const NormBackwardParams& params, const NormBackwardPlan& plan,
                                      const NormBackwardPartials& partials, void* stream) {
  constexpr bool vectors = Columns::width > 1;
  const auto launch_kernel = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(plan.threads), plan.shared_bytes, stream,
                  params, partials.weight, partials.bias);
  };
  if constexpr (vectors) {
    if (plan.kernel == NormBackwardKernel::lanes) {
      return launch_kernel(
          norm_backward_tile_kernel<T, Columns, backward_elements, backward_lanes, backward_lanes_threads, Fused>);
    }
    if (plan.kernel == NormBackwardKernel::shared) {
      return launch_kernel(norm_backward_shared_kernel<T, Columns, backward_elements, Fused>);
    }
  }
  if (plan.kernel == NormBackwardKernel::warp) {
    return launch_kernel(
        norm_backward_tile_kernel<T, Columns, backward_elements, warp_size, backward_lanes_threads, Fused>);
  }
  return launch_kernel(
      norm_backward_tile_kernel<T, Columns, backward_elements, whole_block, backward_block_threads(vectors), Fused>);
}

template <class T, class Columns, int Elements, bool Fused>
cudaError_t launch_norm_backward_wide(const NormBackwardParams& params, const NormBackwardPlan& plan,
                                      const NormBackwardPartials& partials, void* stream) {
  if (params.grad_input.data != nullptr || params.grad_residual.data != nullptr) {
    const cudaError_t error = launch(norm_backward_wide_kernel<T, Columns, Elements, Fused>, grid_of(params.rows),
                                     dim3(plan.threads), 0, stream, params);
    if (error != cudaSuccess) return error;
  }
  if (partials.weight == nullptr && partials.bias == nullptr) return cudaSuccess;
  return launch(norm_backward_parameters_kernel<T, Columns>,
                dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.partials)),
                dim3(backward_column_threads), 0, stream, params, plan.rows_per_partial, partials.weight,
                partials.bias);
}

// The instantiation of one element type: everything but the sum over the partials.
template <class T>
cudaError_t norm_backward(const NormBackwardParams& params, const NormBackwardPlan& plan,
                          const NormBackwardPartials& partials, void* stream) {
  using Vectors = AdjacentColumns<full_vector<T>>;
  const bool wide = plan.kernel == NormBackwardKernel::wide;
  if (plan.layout == ColumnLayout::vectors && params.fused_residual) {
    return wide ? launch_norm_backward_wide<T, Vectors, backward_elements, true>(params, plan, partials, stream)
                : launch_norm_backward_tile<T, Vectors, true>(params, plan, partials, stream);
  }
  if (plan.layout == ColumnLayout::vectors) {
    return wide ? launch_norm_backward_wide<T, Vectors, backward_elements, false>(params, plan, partials, stream)
                : launch_norm_backward_tile<T, Vectors, false>(params, plan, partials, stream);
  }
  if (!wide) return launch_norm_backward_tile<T, StridedColumns, false>(params, plan, partials, stream);
  return params.fused_residual ? launch_norm_backward_wide<T, AnyColumns, 1, true>(params, plan, partials, stream)
                               : launch_norm_backward_wide<T, AnyColumns, 1, false>(params, plan, partials, stream);
}

extern template cudaError_t norm_backward<float>(const NormBackwardParams&, const NormBackwardPlan&,
                                                 const NormBackwardPartials&, void*);
extern template cudaError_t norm_backward<__nv_bfloat16>(const NormBackwardParams&, const NormBackwardPlan&,
                                                         const NormBackwardPartials&, void*);
extern template cudaError_t norm_backward<__half>(const NormBackwardParams&, const NormBackwardPlan&,
                                                  const NormBackwardPartials&, void*);

}  // namespace fusewright::cuda
