// How a sequence is spread over the device, and the memory by which its blocks talk to each other.
#pragma once

#include "fusewright/recurrent.h"
#include "recurrent_product.cuh"

namespace fusewright::cuda {

// Units of a group where every group finds a multiprocessor of its own, and where they are too many for that.
constexpr int narrow_units = 8, wide_units = 16;

// What the blocks share. A replica is a set of blocks that hold the whole matrix and serve columns of their own.
struct RecurrentExchange {
  void* columns;    // 2 buffers of padded columns, of depth.column_stride() elements each; zero at first
  uint32_t* words;  // replicas by groups: the epoch of each group's columns; zero at first
  float* states;    // (B, H) in float32: what a unit keeps to itself from step to step
  RecurrentDepth depth;
  int64_t padded_columns;
  int64_t columns_of_replica;
  int slots;
};

struct RecurrentPlan {
  bool wide;
  dim3 grid;
  int64_t shared_bytes;
  int64_t exchange_bytes, words_bytes, states_bytes;
  RecurrentExchange exchange;

  int64_t workspace_bytes() const { return exchange_bytes + words_bytes + states_bytes; }
  // Lays the exchange out in a workspace, aligned to 16, and clears what is zero at first.
  cudaError_t prepare(void* workspace, void* stream) {
    char* bytes = static_cast<char*>(workspace);
    exchange.columns = bytes;
    exchange.words = reinterpret_cast<uint32_t*>(bytes + exchange_bytes);
    exchange.states = reinterpret_cast<float*>(bytes + exchange_bytes + words_bytes);
    return cudaMemsetAsync(workspace, 0, static_cast<size_t>(exchange_bytes + words_bytes),
                           static_cast<cudaStream_t>(stream));
  }
};

// Blocks of k that a warp has no registers for, of all groups of a block.
template <int Units, int Rows>
void plan_shared_memory(RecurrentPlan& plan, int64_t groups, const DeviceLimits& limits) {
  using Tile = RecurrentTile<Units, Rows>;
  const int64_t turns = ceil_div(groups, plan.grid.x);
  const int64_t per_warp = ceil_div(plan.exchange.depth.blocks(), recurrent_warps);
  const int64_t partial_bytes = Tile::partial_floats * 4, slot_bytes = Tile::slot_vectors * 16;
  const int64_t wanted = std::max<int64_t>(0, turns * per_warp - Tile::kept);
  const int64_t room = (limits.shared_bytes - partial_bytes) / slot_bytes;
  plan.exchange.slots = static_cast<int>(std::min(wanted, room));
  plan.shared_bytes = partial_bytes + plan.exchange.slots * slot_bytes;
}

// Rows: of the matrix, for each unit.
template <int Rows>
cudaError_t plan_recurrent(const RecurrentStepsParams& params, int parts, RecurrentPlan& plan) {
  DeviceLimits limits;
  const cudaError_t error = query_device(limits);
  if (error != cudaSuccess) return error;
  const int64_t multiprocessors = limits.multiprocessors;
  plan.wide = ceil_div(params.hidden, narrow_units) > multiprocessors;
  const int64_t groups = ceil_div(params.hidden, plan.wide ? wide_units : narrow_units);
  const int64_t blocks = std::min(groups, multiprocessors), tiles = ceil_div(params.batch, recurrent_column_tile);
  const int64_t most_replicas = std::min(multiprocessors / blocks, tiles);
  RecurrentExchange& exchange = plan.exchange;
  exchange.columns_of_replica = ceil_div(tiles, most_replicas) * recurrent_column_tile;
  const int64_t replicas = ceil_div(params.batch, exchange.columns_of_replica);
  exchange.depth = {parts, params.hidden};
  exchange.padded_columns = tiles * recurrent_column_tile;
  plan.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(replicas));
  plan.exchange_bytes = 2 * exchange.padded_columns * exchange.depth.column_stride() * size_of(params.dtype);
  plan.words_bytes = ceil_div(replicas * groups, 4) * 16;
  plan.states_bytes = params.batch * params.hidden * 4;
  if (plan.wide) {
    plan_shared_memory<wide_units, Rows>(plan, groups, limits);
  } else {
    plan_shared_memory<narrow_units, Rows>(plan, groups, limits);
  }
  return cudaSuccess;
}

}  // namespace fusewright::cuda
