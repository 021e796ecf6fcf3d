// Gradients of cross-entropy from the statistics that the forward kept: every element on its own.

#include "../softmax/softmax_across.cuh"
#include "cross_entropy_row.cuh"
#include "fusewright/cuda_api.h"

namespace fusewright::cuda {
namespace {

// grad_target = grad * (1 - label_smoothing) * weight * (lse - logit)
template <class Tile, int Elements>
__device__ __forceinline__ void write_target_gradient(const CrossEntropyBackwardParams& params, const Tile& tile,
                                                      int64_t row, float grad, const float (&logits)[Elements]) {
  const float scale = grad * static_cast<float>(1.0 - params.label_smoothing);
  const float largest = params.largest[row], log_sum = params.log_sum[row];
  float gradient[Elements];
#pragma unroll
  for (int i = 0; i < Elements; ++i) gradient[i] = (log_sum - (logits[i] - largest)) * scale;
  if (params.weight != nullptr) {
    float weight[Elements];
    tile.load_contiguous(params.weight, 0, weight);
#pragma unroll
    for (int i = 0; i < Elements; ++i) gradient[i] *= weight[i];
  }
  with_parameter_type(params.grad_target.dtype,
                      [&](auto type) { tile.template store<decltype(type)>(params.grad_target, row, gradient); });
}

// A thread reads its elements before it writes them: grad_input may be input itself.
template <class T, bool Spread, class Tile>
__device__ __forceinline__ void write_gradients(const CrossEntropyBackwardParams& params, const Tile& tile,
                                                int64_t row) {
  constexpr int elements = Tile::vectors * Tile::width;
  const RowTarget target(params, row);
  float values[elements] = {};
  if (target.ignored) {
    tile.template store<T>(params.grad_input, row, values);
    return;
  }
  tile.template load<T>(params.input, row, values);
  cap_logits(params.softcap, values);
  const float grad = target.outside ? NAN : params.grad_losses[row];
  if constexpr (Spread) {
    if (params.grad_target.data != nullptr) write_target_gradient(params, tile, row, grad, values);
    if (params.grad_input.data == nullptr) return;
  }

  const float largest = params.largest[row], log_sum = params.log_sum[row];
  const float total = params.mass[row] + 2.0f * params.z_loss * (largest + log_sum);
  const float of_target =
      target.by_class && !target.outside ? static_cast<float>(share_of_target(params, target.column)) : 0.0f;
  float wanted[elements] = {};
  if constexpr (Spread) load_spread(params, tile, row, wanted);
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    const int64_t column = tile.first + tile.column(i / tile.width) + i % tile.width;
    const float q = wanted[i] + (column == target.column ? of_target : 0.0f);
    const float gradient = (exponential((values[i] - largest) - log_sum) * total - q) * grad;
    values[i] = params.softcap == 0.0f ? gradient : gradient * softcap_slope(params.softcap, values[i]);
  }
  tile.template store<T>(params.grad_input, row, values);
}

template <class T, class Columns, bool Spread>
__global__ void __launch_bounds__(element_tile_threads)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyBackwardParams params) {
  const auto tile = make_element_tile<Columns, element_tile_elements<Columns>>(params.columns);
  if (tile.row < params.rows) write_gradients<T, Spread>(params, tile, tile.row);
}

// Rows side by side: a warp has 32 of them, and the warps of a block their columns.
constexpr int64_t across_tile_columns = across_warps * element_tile_elements<StridedColumns>;

template <class T, bool Spread>
__global__ void __launch_bounds__(warp_size* across_warps)
    cross_entropy_backward_across_kernel(const __grid_constant__ CrossEntropyBackwardParams params) {
  const int64_t tiles = tiles_of_row(params.columns, across_tile_columns);
  const int64_t row = block_index() / tiles * warp_size + threadIdx.x;
  if (row >= params.rows) return;
  RowTile<StridedColumns, element_tile_elements<StridedColumns>> tile;
  tile.thread = threadIdx.y;
  tile.threads = across_warps;
  tile.columns = params.columns;
  tile.move_to(block_index() % tiles * across_tile_columns);
  write_gradients<T, Spread>(params, tile, row);
}

template <class T, class Columns, bool Spread>
cudaError_t launch_backward(const CrossEntropyBackwardParams& params, void* stream) {
  if (rows_lie_across(params.input)) {
    const int64_t blocks = ceil_div(params.rows, warp_size) * ceil_div(params.columns, across_tile_columns);
    return launch(cross_entropy_backward_across_kernel<T, Spread>, grid_of(blocks), dim3(warp_size, across_warps), 0,
                  stream, params);
  }
  return launch_element_tiles<Columns>(cross_entropy_backward_kernel<T, Columns, Spread>, stream, params);
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_cross_entropy_backward(const fusewright::CrossEntropyBackwardParams* params, void* stream) {
  using namespace fusewright::cuda;
  if (params->rows == 0 || params->columns == 0) return cudaSuccess;
  if (!have_type({&params->grad_input}, params->input.dtype)) return cudaErrorInvalidValue;
  if (params->grad_input.data == nullptr && params->grad_target.data == nullptr) return cudaSuccess;
  const fusewright::RowView weight = weight_row(*params);
  return with_cross_entropy_types(
      *params, {&params->input, &params->probabilities, &params->grad_input, &params->grad_target, &weight},
      [&](auto element, auto columns, auto spread) {
        return launch_backward<decltype(element), decltype(columns), decltype(spread)::value>(*params, stream);
      });
}
