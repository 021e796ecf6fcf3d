// The product of a step: a block's rows of the recurrent matrix, which stay on its multiprocessor for the whole
// sequence, by the columns that the blocks exchange.
//
// The matrix is operand A of mma.sync, so that a tile has as few as 8 samples. Sums run over k in blocks of 32; a warp
// takes every eighth of these, and the eight partial sums meet in shared memory. Of a block of k a lane holds 8
// adjacent elements of a row, one 16-byte load: within a sum, k may come in any order that both operands share.
#pragma once

#include <cstdint>

#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/mma.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/shared.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

constexpr int recurrent_threads = 256;
constexpr int recurrent_warps = recurrent_threads / warp_size;
constexpr int recurrent_k_block = 32;
constexpr int recurrent_column_tile = 8;

// The sums run over `parts` segments of `width` elements. In the matrix these are adjacent, in exchanged columns each
// fills whole blocks of k.
struct RecurrentDepth {
  int parts;
  int64_t width;

  __host__ __device__ int64_t blocks_of_part() const { return (width + recurrent_k_block - 1) / recurrent_k_block; }
  __host__ __device__ int64_t blocks() const { return parts * blocks_of_part(); }
  __host__ __device__ int64_t part_stride() const { return blocks_of_part() * recurrent_k_block; }
  __host__ __device__ int64_t column_stride() const { return parts * part_stride(); }
};

// A group of `Units` units, each of which owns `Rows` rows of the matrix; threads are units by columns.
template <int Units, int Rows>
struct RecurrentTile {
  static constexpr int columns = recurrent_threads / Units;
  static constexpr int column_tiles = columns / recurrent_column_tile;
  // Half a tile of A is 8 units' rows of one kind.
  static constexpr int halves = Units / 8 * Rows;
  static constexpr int tiles = (halves + 1) / 2;
  // Blocks of k whose rows a warp keeps in registers, up to 64 of them: 96 spill.
  static constexpr int kept = 8 / tiles;
  static constexpr int partial_stride = columns + 4;
  static constexpr int partial_floats = recurrent_warps * halves * 8 * partial_stride;
  // Shared memory for one block of k of every warp.
  static constexpr int slot_vectors = recurrent_warps * halves * warp_size;

  // Blocks of k at hand while others are fetched.
  static constexpr int in_flight = kept < 4 ? kept : 4;
  static_assert(kept % in_flight == 0);
};

template <class T, int Units, int Rows>
class RecurrentProduct {
  using Tile = RecurrentTile<Units, Rows>;

 public:
  // Row r of unit u is row r * units + u of `matrix`. Groups are blockIdx.x, blockIdx.x + gridDim.x, ...; `slots`
  // blocks of k of every warp find room in shared memory, what is left is read from `matrix` at every step.
  __device__ RecurrentProduct(const T* matrix, const int64_t& units, const RecurrentDepth& depth, int slots)
      : matrix_(matrix),
        units_(units),
        depth_(depth),
        blocks_(static_cast<int>(depth.blocks())),
        slots_(slots),
        in_vectors_(depth.width % 8 == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0),
        lane_(threadIdx.x % warp_size),
        warp_(threadIdx.x / warp_size),
        partials_(dynamic_shared<float>()),
        shared_(reinterpret_cast<uint4*>(partials_ + Tile::partial_floats)) {
#pragma unroll
    for (int i = 0; i < Tile::kept; ++i) {
#pragma unroll
      for (int half = 0; half < Tile::halves; ++half) kept_[i][half] = fetch(blockIdx.x, block_of(i), half);
    }
    int slot = 0;
    for (int64_t group = blockIdx.x; group * Units < units && slot < slots; group += gridDim.x) {
      const int first = group == blockIdx.x ? Tile::kept : 0;
      for (int i = first; block_of(i) < blocks_ && slot < slots; ++i, ++slot) {
        for (int half = 0; half < Tile::halves; ++half) {
          shared_[slot_index(slot, half)] = fetch(group, block_of(i), half);
        }
      }
    }
  }

  // The block of k that is this warp's i-th.
  __device__ __forceinline__ int block_of(int i) const { return warp_ + i * recurrent_warps; }

  // Partial sums of a group of this block, the `turn`-th, by `column_tiles` tiles of columns; to be read by sum() after
  // a barrier.
  __device__ __forceinline__ void multiply(int64_t group, int turn, const T* columns, int column_tiles) {
    float sums[Tile::tiles][Tile::column_tiles][4] = {};
    const int stride = static_cast<int>(depth_.column_stride());
    const T* const own = columns + lane_ / 4 * stride + lane_ % 4 * 8;
    const auto column = [&](int n, int block) {
      return *reinterpret_cast<const uint4*>(own + n * recurrent_column_tile * stride + block * recurrent_k_block);
    };
    if (turn == 0) multiply_kept(sums, column, column_tiles);
    const int per_warp = (blocks_ - warp_ + recurrent_warps - 1) / recurrent_warps;
    int slot = turn * per_warp - (turn == 0 ? 0 : min(Tile::kept, per_warp));
    for (int i = turn == 0 ? Tile::kept : 0; block_of(i) < blocks_; ++i, ++slot) {
      uint4 rows[Tile::halves];
#pragma unroll
      for (int half = 0; half < Tile::halves; ++half) {
        rows[half] = slot < slots_ ? shared_[slot_index(slot, half)] : fetch(group, block_of(i), half);
      }
#pragma unroll
      for (int n = 0; n < Tile::column_tiles; ++n) {
        if (n < column_tiles) multiply_block(sums, n, rows, column(n, block_of(i)));
      }
    }
    if (warp_ >= blocks_) return;
#pragma unroll
    for (int half = 0; half < Tile::halves; ++half) {
      float* row = partials_ + ((warp_ * Tile::halves + half) * 8 + lane_ / 4) * Tile::partial_stride;
#pragma unroll
      for (int n = 0; n < Tile::column_tiles; ++n) {
        if (n < column_tiles) {
          Packed<float, 2> pair;
          pair.pack(sums[half / 2][n] + half % 2 * 2);
          pair.store(row + n * recurrent_column_tile + lane_ % 4 * 2);
        }
      }
    }
  }

  // The sum of row `row` of the unit and column that this thread stands for.
  __device__ __forceinline__ float sum(int row) const {
    const int unit = threadIdx.x % Units, column = threadIdx.x / Units;
    const int half = unit / 8 * Rows + row, warps = min(blocks_, recurrent_warps);
    const float* partial = partials_ + (half * 8 + unit % 8) * Tile::partial_stride + column;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < recurrent_warps; ++warp) {
      if (warp < warps) total += partial[warp * Tile::halves * 8 * Tile::partial_stride];
    }
    return total;
  }

 private:
  __device__ __forceinline__ int slot_index(int slot, int half) const {
    return ((slot * recurrent_warps + warp_) * Tile::halves + half) * warp_size + lane_;
  }

  // This lane's 8 elements of a block of k of half a tile; zero behind the last unit and behind the end of a part.
  __device__ __forceinline__ uint4 fetch(int64_t group, int block, int half) const {
    const int64_t unit = group * Units + half / Rows * 8 + lane_ / 4;
    const int64_t blocks_of_part = depth_.blocks_of_part();
    const int64_t part = block / blocks_of_part;
    const int64_t k = (block - part * blocks_of_part) * recurrent_k_block + lane_ % 4 * 8;
    uint4 elements = make_uint4(0, 0, 0, 0);
    if (unit >= units_ || block >= blocks_ || k >= depth_.width) return elements;
    const T* source = matrix_ + (half % Rows * units_ + unit) * depth_.parts * depth_.width + part * depth_.width + k;
    if (in_vectors_) return *reinterpret_cast<const uint4*>(source);
    const int64_t count = min(depth_.width - k, int64_t{8});
    const auto element = [&](int i) {
      return i < count ? static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(source)[i]) : 0u;
    };
    elements.x = element(0) | element(1) << 16;
    elements.y = element(2) | element(3) << 16;
    elements.z = element(4) | element(5) << 16;
    elements.w = element(6) | element(7) << 16;
    return elements;
  }

  static __device__ __forceinline__ void multiply_block(float (&sums)[Tile::tiles][Tile::column_tiles][4], int n,
                                                        const uint4 (&rows)[Tile::halves], const uint4& column) {
    const uint32_t first[2] = {column.x, column.y}, second[2] = {column.z, column.w};
#pragma unroll
    for (int tile = 0; tile < Tile::tiles; ++tile) {
      const uint4 low = rows[2 * tile];
      uint4 high = make_uint4(0, 0, 0, 0);
      if (2 * tile + 1 < Tile::halves) high = rows[2 * tile + 1];
      const uint32_t a_first[4] = {low.x, high.x, low.y, high.y}, a_second[4] = {low.z, high.z, low.w, high.w};
      mma<T>(sums[tile][n], a_first, first);
      mma<T>(sums[tile][n], a_second, second);
    }
  }

  // Fetches the columns of the next few blocks of k, which come from the second cache, while these are multiplied.
  template <class Column>
  __device__ __forceinline__ void multiply_kept(float (&sums)[Tile::tiles][Tile::column_tiles][4], Column column,
                                                int column_tiles) const {
    constexpr int in_flight = Tile::in_flight, turns = Tile::kept / in_flight;
    uint4 next[in_flight];
    const auto fetch_columns = [&](int n, int turn) {
#pragma unroll
      for (int i = 0; i < in_flight; ++i) {
        const int block = block_of(turn * in_flight + i);
        if (block < blocks_) next[i] = column(n, block);
      }
    };
    fetch_columns(0, 0);
#pragma unroll
    for (int n = 0; n < Tile::column_tiles; ++n) {
#pragma unroll
      for (int turn = 0; turn < turns; ++turn) {
        if (n >= column_tiles) continue;
        uint4 now[in_flight];
#pragma unroll
        for (int i = 0; i < in_flight; ++i) now[i] = next[i];
        if (turn + 1 < turns) {
          fetch_columns(n, turn + 1);
        } else if (n + 1 < column_tiles) {
          fetch_columns(n + 1, 0);
        }
#pragma unroll
        for (int i = 0; i < in_flight; ++i) {
          const int of_warp = turn * in_flight + i;
          if (block_of(of_warp) < blocks_) multiply_block(sums, n, kept_[of_warp], now[i]);
        }
      }
    }
  }

  const T* const matrix_;
  const int64_t& units_;
  const RecurrentDepth& depth_;
  const int blocks_, slots_;
  const bool in_vectors_;
  const int lane_, warp_;
  float* const partials_;  // warps by halves by 8 units by columns
  uint4* const shared_;    // slots by warps by halves by lanes
  uint4 kept_[Tile::kept][Tile::halves];
};

}  // namespace fusewright::cuda
