// Dropout with a residual addition: output = dropout(input) + residual. Short: all element types share this source.

#include "fusewright/activation.h"
#include "fusewright/cuda/element_tile.cuh"
#include "fusewright/cuda_api.h"

namespace fusewright::cuda {
namespace {

template <class T, class Columns>
__global__ void __launch_bounds__(element_tile_threads)
    dropout_add_kernel(const __grid_constant__ DropoutAddParams params) {
  constexpr int elements = element_tile_elements<Columns>;
  const auto tile = make_element_tile<Columns, elements>(params.columns);
  if (tile.row >= params.rows) return;
  float values[elements];
  tile.template load<T>(params.input, tile.row, values);
  if (params.seed != nullptr) {
    tile.dropout(params.seed, params.keep_threshold, params.keep_scale, tile.row, values);
  }
  if (params.residual.data != nullptr) {
    float residual[elements];
    tile.template load<T>(params.residual, tile.row, residual);
#pragma unroll
    for (int i = 0; i < elements; ++i) values[i] += residual[i];
  }
  tile.template store<T>(params.output, tile.row, values);
}

cudaError_t dropout_add(const DropoutAddParams& params, void* stream) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  const auto operands = {&params.input, &params.residual, &params.output};
  if (!have_type(operands, params.input.dtype)) return cudaErrorInvalidValue;
  return with_element_type(params.input.dtype, [&](auto element) {
    using T = decltype(element);
    return with_columns<T>(operands, params.columns, [&](auto columns) {
      using Columns = decltype(columns);
      return launch_element_tiles<Columns>(dropout_add_kernel<T, Columns>, stream, params);
    });
  });
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_dropout_add(const fusewright::DropoutAddParams* params, void* stream) {
  return fusewright::cuda::dropout_add(*params, stream);
}
