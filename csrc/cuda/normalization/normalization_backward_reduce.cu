#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/shared.cuh"
#include "fusewright/cuda/vector.cuh"
#include "normalization_backward_reduce.cuh"

namespace fusewright::cuda {
namespace {

constexpr int columns_of_block = 32;
constexpr int slices = 32;

// A warp reads 32 adjacent columns of a row; the warps take the rows in turn, and their sums are added in order.
__global__ void __launch_bounds__(columns_of_block* slices)
    norm_backward_reduce_kernel(const float* partials, int64_t count, int64_t columns, void* gradient, DataType dtype) {
  struct SliceSums {
    float values[slices][columns_of_block];
  };
  auto& slice_sums = block_shared<SliceSums>().values;
  const int64_t column = block_index() * columns_of_block + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < count; row += slices) sum += partials[row * columns + column];
  }
  slice_sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  float total = 0.0f;
#pragma unroll
  for (int slice = 0; slice < slices; ++slice) total += slice_sums[slice][threadIdx.x];
  with_parameter_type(dtype, [&](auto type) { store_float(static_cast<decltype(type)*>(gradient) + column, total); });
}

}  // namespace

cudaError_t norm_backward_reduce(const float* partials, int64_t count, int64_t columns, const RowView& gradient,
                                 void* stream) {
  return launch(norm_backward_reduce_kernel, grid_of(ceil_div(columns, columns_of_block)),
                dim3(columns_of_block, slices), 0, stream, partials, count, columns, gradient.data, gradient.dtype);
}

}  // namespace fusewright::cuda
