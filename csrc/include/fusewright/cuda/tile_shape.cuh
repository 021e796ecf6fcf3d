// Shapes of the tiles in which kernels hold a row in registers, by row width. Few suffice, which keeps the build short:
// 8 lanes of a warp for short rows, then a warp, then a block of as many warps as the row needs.
#pragma once

#include "fusewright/cuda/row_tile.cuh"

namespace fusewright::cuda {

// For vectors only: element by element, a warp serves the shortest rows as well.
constexpr int tile_lanes = 8;
constexpr int lanes_tile_elements = 16;
constexpr int64_t lanes_tile_columns = tile_lanes * lanes_tile_elements;

// Threads of a block that works on several rows.
constexpr int lanes_tile_threads = 128;

// Element by element, addresses take registers too, so a thread of a warp and a block hold half as much.
template <class Columns>
constexpr int warp_tile_elements = Columns::width > 1 ? 32 : 16;
template <class Columns>
constexpr int64_t warp_tile_columns = warp_size * warp_tile_elements<Columns>;

constexpr int block_tile_elements = 16;
template <class Columns>
constexpr int block_tile_threads = Columns::width > 1 ? 1024 : 512;
template <class Columns>
constexpr int64_t block_tile_columns = block_tile_threads<Columns> * block_tile_elements;

}  // namespace fusewright::cuda
