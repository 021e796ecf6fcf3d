// Losses and statistics of cross-entropy.

#include "../softmax/softmax_across.cuh"
#include "cross_entropy_online.cuh"
#include "fusewright/cuda_api.h"

namespace fusewright::cuda {
namespace {

template <class Columns>
constexpr int forward_elements = Columns::width > 1 ? 2 * Columns::width : 4;
constexpr int forward_most_threads = 512;
// Threads of a block that works on several rows, a warp to each.
constexpr int forward_warps_threads = 128;
// A wider row has a block to itself.
constexpr int64_t most_warp_columns = 1024;

template <class T, class Columns, int Lanes, int Threads, bool Spread>
__global__ void __launch_bounds__(Threads)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyForwardParams params) {
  auto tile = make_row_tile<Columns, forward_elements<Columns>, Lanes>(params.columns);
  RowReducer<Lanes> reduce;
  const int64_t row = block_index() * (blockDim.x / tile.threads) + threadIdx.x / tile.threads;
  if (row >= params.rows) return;
  const RowTarget target(params, row);
  if (target.ignored || target.outside) {
    if (tile.thread == 0) write_without_logits(params, row, target);
    return;
  }
  OnlineRow online = scan_row<T, Spread>(params, tile, row);
  online.template move_to<Spread>(reduce(online.maximum, Maximum{}));
  if constexpr (Spread) {
    float sums[3] = {online.sum, online.mass, online.score};
    reduce(sums, Sum{});
    online.sum = sums[0];
    online.mass = sums[1];
    online.score = sums[2];
  } else {
    online.sum = reduce(online.sum, Sum{});
  }
  if (tile.thread == 0) finish<T, Spread>(params, row, target, online);
}

// Rows side by side, as where classes are not in the last dimension.
template <class T, bool Spread>
__global__ void __launch_bounds__(warp_size* across_warps)
    cross_entropy_forward_across_kernel(const __grid_constant__ CrossEntropyForwardParams params) {
  struct WarpRows {
    OnlineRow values[across_warps][warp_size];
  };
  auto& warp_rows = block_shared<WarpRows>().values;
  const int64_t row = block_index() * warp_size + threadIdx.x;
  const bool inside = row < params.rows;
  const RowTarget target(params, inside ? row : 0);
  const bool counts = inside && !target.ignored && !target.outside;

  OnlineRow online;
  if (counts) {
    RowTile<StridedColumns, forward_elements<StridedColumns>> tile;
    tile.thread = threadIdx.y;
    tile.threads = across_warps;
    tile.columns = params.columns;
    online = scan_row<T, Spread>(params, tile, row);
  }
  warp_rows[threadIdx.y][threadIdx.x] = online;
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
  if (!counts) return write_without_logits(params, row, target);
  for (int warp = 1; warp < across_warps; ++warp) online.template merge<Spread>(warp_rows[warp][threadIdx.x]);
  finish<T, Spread>(params, row, target, online);
}

template <class T, class Columns, bool Spread>
cudaError_t launch_forward(const CrossEntropyForwardParams& params, void* stream) {
  if (rows_lie_across(params.input)) {
    return launch(cross_entropy_forward_across_kernel<T, Spread>, grid_of(ceil_div(params.rows, warp_size)),
                  dim3(warp_size, across_warps), 0, stream, params);
  }
  if (params.columns <= most_warp_columns) {
    return launch(cross_entropy_forward_kernel<T, Columns, warp_size, forward_warps_threads, Spread>,
                  grid_of(ceil_div(params.rows, forward_warps_threads / warp_size)), dim3(forward_warps_threads), 0,
                  stream, params);
  }
  const int threads = std::min(forward_most_threads, threads_for_row(params.columns, forward_elements<Columns>));
  return launch(cross_entropy_forward_kernel<T, Columns, whole_block, forward_most_threads, Spread>,
                grid_of(params.rows), dim3(threads), 0, stream, params);
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_cross_entropy_forward(const fusewright::CrossEntropyForwardParams* params, void* stream) {
  using namespace fusewright::cuda;
  if (params->rows == 0 || params->columns == 0) return cudaSuccess;
  const fusewright::RowView weight = weight_row(*params);
  return with_cross_entropy_types(
      *params, {&params->input, &params->probabilities, &weight}, [&](auto element, auto columns, auto spread) {
        return launch_forward<decltype(element), decltype(columns), decltype(spread)::value>(*params, stream);
      });
}
