// What the two recurrent kernels share beside the product: which column takes which step, and the exchange of columns.
#pragma once

#include <cmath>

#include "fusewright/cuda/epoch.cuh"
#include "recurrent_plan.cuh"

namespace fusewright::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One sample's way through its steps.
struct RecurrentSample {
  int64_t column, length;
  bool exists;  // a tile of columns may reach behind the last one

  __device__ RecurrentSample(const RecurrentStepsParams& params, int64_t column, int64_t end)
      : column(column), length(params.time), exists(column < end), params_(params) {
    if (exists && params.lengths != nullptr) length = params.lengths[column];
  }

  // A step of -1 stands for the states before the first one.
  __device__ __forceinline__ bool takes(int64_t step) const { return exists && step < length; }
  // Row of a (T, B, ...) tensor.
  __device__ __forceinline__ int64_t row(int64_t step) const {
    return (params_.reverse ? length - 1 - step : step) * params_.batch + column;
  }
  // Whether it starts a step, one of its own, from states of zero.
  __device__ __forceinline__ bool reset_before(int64_t step) const {
    return params_.resets != nullptr && params_.resets[row(step)];
  }

 private:
  const RecurrentStepsParams& params_;
};

// The columns of this block's replica, and the steps of the longest of them.
struct RecurrentColumns {
  int64_t begin, end, steps;

  __device__ RecurrentColumns(const RecurrentStepsParams& params, const RecurrentExchange& exchange) {
    begin = blockIdx.y * exchange.columns_of_replica;
    end = min(begin + exchange.columns_of_replica, params.batch);
    steps = params.time;
    if (params.lengths == nullptr) return;
    steps = 0;
    for (int64_t column = begin + threadIdx.x % warp_size; column < end; column += warp_size) {
      steps = max(steps, params.lengths[column]);
    }
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
      steps = max(steps, __shfl_xor_sync(0xFFFFFFFFu, steps, distance));
    }
  }
};

// Columns as blocks see them. Those of an epoch are written while those of the one before are read, so two buffers do:
// whoever writes has waited for all words, hence for the end of every block's reads of what it overwrites.
template <class T, int Units>
class RecurrentMail {
 public:
  __device__ RecurrentMail(const RecurrentExchange& exchange, int64_t units)
      : exchange_(exchange), groups_((units + Units - 1) / Units), words_(exchange.words + blockIdx.y * groups_) {}

  __device__ __forceinline__ T* columns(uint32_t epoch, int64_t column) const {
    const int64_t buffered = epoch % 2 * exchange_.padded_columns + column;
    return static_cast<T*>(exchange_.columns) + buffered * exchange_.depth.column_stride();
  }
  __device__ __forceinline__ T* element(uint32_t epoch, int64_t column, int part, int64_t unit) const {
    return columns(epoch, column) + part * exchange_.depth.part_stride() + unit;
  }

  // Behind a barrier of the block.
  __device__ __forceinline__ void publish(int64_t group, uint32_t epoch) const {
    if (threadIdx.x == 0) publish_epoch(words_ + group, epoch);
  }

  // Until the groups have published from whom this warp's blocks of k come.
  __device__ __forceinline__ void wait(uint32_t epoch) const {
    constexpr int groups_of_block = recurrent_k_block / Units;
    const int warp = threadIdx.x / warp_size;
    const int64_t blocks_of_part = exchange_.depth.blocks_of_part(), blocks = exchange_.depth.blocks();
    for (int64_t i = threadIdx.x % warp_size;; i += warp_size) {
      const int64_t block = warp + i / groups_of_block * recurrent_warps;
      if (block >= blocks) break;
      const int64_t group = block % blocks_of_part * groups_of_block + i % groups_of_block;
      if (group < groups_) wait_for_epoch(words_ + group, epoch);
    }
    __syncwarp();
  }

 private:
  const RecurrentExchange& exchange_;
  const int64_t groups_;
  uint32_t* const words_;
};

// Calls body(group, turn, first column, tiles of columns, whether they are the group's last) for what this block has
// to do in a step.
template <int Units, class Body>
__device__ __forceinline__ void for_each_tile(int64_t units, const RecurrentColumns& columns, Body body) {
  constexpr int width = recurrent_threads / Units;
  int turn = 0;
  for (int64_t group = blockIdx.x; group * Units < units; group += gridDim.x, ++turn) {
    for (int64_t first = columns.begin; first < columns.end; first += width) {
      const int64_t rest = columns.end - first;
      const int tiles = static_cast<int>(min(rest, int64_t{width}) + recurrent_column_tile - 1) / recurrent_column_tile;
      body(group, turn, first, tiles, rest <= width);
    }
  }
}

}  // namespace fusewright::cuda
