// A row's loss from one pass over its logits, maximum and sums together (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018).
#pragma once

#include "cross_entropy_row.cuh"

namespace fusewright::cuda {

// Of the elements so far, relative to the largest: the sum of exponentials, and with q what the row wants of all
// classes, sum(q) and sum(q * (x - largest)). All terms of a sum have one sign, so that moving them to another maximum
// cancels nothing.
struct OnlineRow {
  float maximum = -INFINITY;
  float sum = 0.0f;
  float mass = 0.0f;
  float score = 0.0f;

  // -inf - (-inf) would be NaN.
  __device__ __forceinline__ float pivot() const { return maximum == -INFINITY ? 0.0f : maximum; }

  template <bool Spread>
  __device__ __forceinline__ void move_to(float new_maximum) {
    if (maximum == new_maximum) return;
    const float before = pivot();
    sum *= exponential(maximum - new_maximum);
    maximum = new_maximum;
    if constexpr (Spread) score += mass * (before - pivot());
  }

  template <bool Spread>
  __device__ __forceinline__ void merge(OnlineRow other) {
    const float new_maximum = fmaxf(maximum, other.maximum);
    move_to<Spread>(new_maximum);
    other.template move_to<Spread>(new_maximum);
    sum += other.sum;
    mass += other.mass;
    score += other.score;
  }
};

// Of the tile's thread. Each tile is summed on its own, as the error of a float32 sum grows with its length.
template <class T, bool Spread, class Columns, int Elements>
__device__ __forceinline__ OnlineRow scan_row(const CrossEntropyParams& params, RowTile<Columns, Elements>& tile,
                                              int64_t row) {
  OnlineRow online;
  const int64_t tile_columns = static_cast<int64_t>(tile.threads) * Elements;
#pragma unroll 1
  for (int64_t first = 0; first < params.columns; first += tile_columns) {
    tile.move_to(first);
    float values[Elements];
    tile.template load<T>(params.input, row, values);
    cap_logits(params.softcap, values);
    float maximum = online.maximum;
    tile.for_each([&](int i) { maximum = fmaxf(maximum, values[i]); });
    online.template move_to<Spread>(maximum);
    const float pivot = online.pivot();
    float sum = 0.0f;
    tile.for_each([&](int i) { sum += exponential(values[i] - pivot); });
    online.sum += sum;
    if constexpr (Spread) {
      float wanted[Elements];
      load_spread(params, tile, row, wanted);
      float mass = 0.0f, score = 0.0f;
      tile.for_each([&](int i) {
        mass += wanted[i];
        score += wanted[i] * (values[i] - pivot);
      });
      online.mass += mass;
      online.score += score;
    }
  }
  return online;
}

__device__ __forceinline__ void write_row(const CrossEntropyForwardParams& params, int64_t row, float largest,
                                          float log_sum, float mass, float loss) {
  params.largest[row] = largest;
  params.log_sum[row] = log_sum;
  params.mass[row] = mass;
  params.losses[row] = loss;
}

// A row that is ignored, or whose class is none.
__device__ __forceinline__ void write_without_logits(const CrossEntropyForwardParams& params, int64_t row,
                                                     const RowTarget& target) {
  write_row(params, row, 0.0f, 0.0f, 0.0f, target.outside ? NAN : 0.0f);
}

// The row's loss from its sums; one thread's work.
template <class T, bool Spread>
__device__ __forceinline__ void finish(const CrossEntropyForwardParams& params, int64_t row, const RowTarget& target,
                                       const OnlineRow& online) {
  const float pivot = online.pivot(), log_sum = logf(online.sum);
  double mass = 0.0, loss = 0.0;
  if constexpr (Spread) {
    mass = online.mass;
    loss = mass * log_sum - online.score;
  }
  if (target.by_class) {
    const T* input = static_cast<const T*>(params.input.data) + params.input.row_offset(row);
    float logit[1] = {load_float(input + params.input.column_offset(target.column))};
    cap_logits(params.softcap, logit);
    const double share = share_of_target(params, target.column);
    mass += share;
    // As one product: with a logit of -inf both terms are infinite.
    loss += share * (static_cast<double>(log_sum) - (static_cast<double>(logit[0]) - pivot));
  }
  const double log_sum_exp = static_cast<double>(pivot) + log_sum;
  if (params.z_loss > 0.0f) loss += params.z_loss * log_sum_exp * log_sum_exp;
  write_row(params, row, pivot, log_sum, static_cast<float>(mass), static_cast<float>(loss));
}

}  // namespace fusewright::cuda
