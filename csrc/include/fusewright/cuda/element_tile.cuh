// Tiles of kernels whose elements know nothing of each other: a block is as many threads wide as a row needs, and its
// other threads take the next rows.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/row_tile.cuh"

namespace fusewright::cuda {

constexpr int element_tile_threads = 256;
constexpr int element_tile_least_width = 8;

// Two accesses of 16 bytes to every operand are in flight for each thread.
template <class Columns>
constexpr int element_tile_elements = Columns::width > 1 ? 2 * Columns::width : 4;

// Threads along a row and rows of a block.
inline dim3 element_tile_block(int64_t columns, int64_t elements, int widest) {
  int wide = element_tile_least_width;
  while (wide < widest && wide * elements < columns) wide *= 2;
  return dim3(wide, element_tile_threads / wide);
}

template <class Columns, int Elements>
struct ElementTile : RowTile<Columns, Elements> {
  int64_t row;
};

__device__ __forceinline__ int64_t tiles_of_row(int64_t columns, int64_t tile_columns) {
  return (columns + tile_columns - 1) / tile_columns;
}

// Blocks run along the columns first.
template <class Columns, int Elements>
__device__ __forceinline__ ElementTile<Columns, Elements> make_element_tile(int64_t columns) {
  ElementTile<Columns, Elements> tile;
  tile.thread = threadIdx.x;
  tile.threads = blockDim.x;
  tile.columns = columns;
  const int64_t tile_columns = static_cast<int64_t>(blockDim.x) * Elements;
  const int64_t tiles = tiles_of_row(columns, tile_columns);
  tile.row = block_index() / tiles * blockDim.y + threadIdx.y;
  tile.move_to(block_index() % tiles * tile_columns);
  return tile;
}

// A kernel over tiles of Columns.
template <class Columns, class Params, class... More>
cudaError_t launch_element_tiles(void (*kernel)(Params, More...), void* stream, const Params& params,
                                 const More&... more) {
  constexpr int elements = element_tile_elements<Columns>;
  const dim3 block = element_tile_block(params.columns, elements, element_tile_threads);
  const int64_t tiles = ceil_div(params.columns, static_cast<int64_t>(block.x) * elements);
  return launch(kernel, grid_of(ceil_div(params.rows, block.y) * tiles), block, 0, stream, params, more...);
}

// Calls body(T{}) with the element type.
template <class Body>
cudaError_t with_element_type(DataType dtype, Body body) {
  switch (dtype) {
    case DataType::float32:
      return body(float{});
    case DataType::bfloat16:
      return body(__nv_bfloat16{});
    case DataType::float16:
      return body(__half{});
  }
  return cudaErrorInvalidValue;
}

// Calls body(Columns{}) with the accesses that every operand allows.
template <class T, class Body>
cudaError_t with_columns(std::initializer_list<const RowView*> operands, int64_t columns, Body body) {
  using Vectors = AdjacentColumns<full_vector<T>>;
  return take_vectors(operands, columns, Vectors::width) ? body(Vectors{}) : body(StridedColumns{});
}

inline bool have_type(std::initializer_list<const RowView*> views, DataType dtype) {
  return std::all_of(views.begin(), views.end(),
                     [&](const RowView* view) { return view->data == nullptr || view->dtype == dtype; });
}

}  // namespace fusewright::cuda
