// Reductions over the threads that share a row. The order of additions is fixed, so results repeat bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "fusewright/cuda/shared.cuh"

namespace fusewright::cuda {

constexpr int warp_size = 32;
constexpr int max_warps = 32;

// Value of `Lanes` for rows that a whole block shares; else a row has 8 or 32 lanes of a warp.
constexpr int whole_block = 0;

struct Sum {
  static constexpr float identity = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Drops NaN, which the sums that follow bring back.
struct Maximum {
  static constexpr float identity = -INFINITY;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <int Lanes, class Operation>
__device__ __forceinline__ float reduce_lanes(float value, Operation operation) {
  // Lanes of other rows may have left the loop, so only those of this row take part.
  const unsigned row_mask =
      Lanes == warp_size ? 0xFFFFFFFFu : ((1u << Lanes) - 1u) << (threadIdx.x % warp_size / Lanes * Lanes);
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(row_mask, value, distance));
  }
  return value;
}

// Reduces values across the threads of a row and gives each thread the results.
//
// Over a whole block it costs one barrier: successive calls alternate between two slots of shared memory, and the
// barrier of a call tells that every thread has read what the call before left in the other slot.
template <int Lanes>
class RowReducer {
 public:
  template <int Count, class Operation>
  __device__ __forceinline__ void operator()(float (&values)[Count], Operation operation) {
    if constexpr (Lanes != whole_block) {
#pragma unroll
      for (float& value : values) value = reduce_lanes<Lanes>(value, operation);
    } else {
      struct WarpResults {
        float values[2][Count][max_warps];
      };
      auto& warp_results = block_shared<WarpResults>().values;
      const int lane = threadIdx.x % warp_size;
      const int warp = threadIdx.x / warp_size;
      const int warps = blockDim.x / warp_size;
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        values[i] = reduce_lanes<warp_size>(values[i], operation);
        if (lane == 0) warp_results[slot_][i][warp] = values[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const float value = lane < warps ? warp_results[slot_][i][lane] : Operation::identity;
        values[i] = reduce_lanes<warp_size>(value, operation);
      }
      slot_ ^= 1;
    }
  }

  template <class Operation>
  __device__ __forceinline__ float operator()(float value, Operation operation) {
    float values[1] = {value};
    (*this)(values, operation);
    return values[0];
  }

 private:
  int slot_ = 0;
};

}  // namespace fusewright::cuda
