// The softmax of attention over tiles of logits in the registers of a warpgroup or a warp: thread by thread two rows,
// of which four adjacent lanes hold a quarter each.
#pragma once

#include <cmath>

#include "attention_rows.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

// 2^x; results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_flushed(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
#endif
}

// Two weights in one register, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t packed_pair(float first, float second) {
  Packed<T, 2> pair;
  const float values[2] = {first, second};
  pair.pack(values);
  return pair.words[0];
}

// Weights as the left operand of a product; the layouts agree, so no lane needs another's.
template <class T, int Count>
__device__ __forceinline__ void pack(const float (&weights)[Count], uint32_t (&packed)[Count / 2]) {
#pragma unroll
  for (int i = 0; i < Count / 2; ++i) packed[i] = packed_pair<T>(weights[2 * i], weights[2 * i + 1]);
}

// Of tiles of `Keys` keys. A tile is masked where pairs of it with the `Queries` queries from a given one do not take
// part.
template <int Queries, int Keys>
class OnlineSoftmax {
 public:
  __device__ __forceinline__ OnlineSoftmax(const AttentionRows& rows, int query, int lane)
      : rows_(rows), query_(query), column_(2 * (lane % 4)) {}

  // Turns the products of a tile of keys from `first_key` on into weights, and adds them to the totals.
  __device__ __forceinline__ void add_tile(float (&logits)[Keys / 2], int first_key, int first_query) {
    if (rows_.cuts(first_query, Queries, first_key, Keys)) hide(logits, first_key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float larger = maximum_[r];
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j) {
        larger = fmaxf(larger, fmaxf(logits[4 * j + 2 * r], logits[4 * j + 2 * r + 1]));
      }
      larger = fmaxf(larger, __shfl_xor_sync(0xFFFFFFFFu, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(0xFFFFFFFFu, larger, 2));
      // Where no key was seen there is nothing to subtract, and -inf - (-inf) would be NaN.
      const float reference = larger == -INFINITY ? 0.0f : larger * rows_.scale_log2;
      factor_[r] = exp2_flushed(maximum_[r] * rows_.scale_log2 - reference);
      maximum_[r] = larger;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& logit = logits[4 * j + 2 * r + c];
          logit = exp2_flushed(logit * rows_.scale_log2 - reference);
          sum += logit;
        }
      }
      total_[r] = total_[r] * factor_[r] + sum;
    }
  }

  // Moves sums of weighted values to the last tile's reference.
  template <int Count>
  __device__ __forceinline__ void rescale(float (&sums)[Count]) const {
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[i] *= factor_[i / 2 % 2];
  }

  // Until here a thread's total is that of its own columns.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total_[r] += __shfl_xor_sync(0xFFFFFFFFu, total_[r], 1);
      total_[r] += __shfl_xor_sync(0xFFFFFFFFu, total_[r], 2);
    }
  }

  // What logits were compared with, -inf without any key; and in the exponent's unit, 0 without any.
  __device__ __forceinline__ float reference(int r) const { return maximum_[r] * rows_.scale; }
  __device__ __forceinline__ float scaled_reference(int r) const {
    return maximum_[r] == -INFINITY ? 0.0f : maximum_[r] * rows_.scale_log2;
  }
  __device__ __forceinline__ float total(int r) const { return total_[r]; }

 private:
  __device__ __forceinline__ void hide(float (&logits)[Keys / 2], int first_key) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int begin = rows_.first_key(query_ + 8 * r) - first_key - column_;
      const int end = rows_.end_key(query_ + 8 * r) - first_key - column_;
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * j + c < begin || 8 * j + c >= end) logits[4 * j + 2 * r + c] = -INFINITY;
        }
      }
    }
  }

  const AttentionRows& rows_;
  int query_;
  int column_;
  float maximum_[2] = {-INFINITY, -INFINITY};  // of products, without the scale
  float total_[2] = {};
  float factor_[2] = {};
};

}  // namespace fusewright::cuda
