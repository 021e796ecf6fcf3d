// Mean and reciprocal standard deviation of one row, in one pass over it where the data allows.
#pragma once

#include <math.h>

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// A row enters the output as (x - shift) * rstd + correction: x - shift is exact where x is near the mean, so a
// large mean costs no accuracy. mean = shift + (mean - shift) is rounded only to be saved.
struct RowMoments {
  float shift;
  float correction;  // (shift - mean) * rstd
  float mean;
  float rstd;
};

// Elements whose sums stay in float32 lanes; each block is then added to a double. It bounds the length of every
// float32 sum to block / (lanes * accumulators) terms, whatever N.
constexpr int64_t sum_block = 4096;
constexpr int sum_accumulators = 4;

struct ShiftedSums {
  double first;   // sum of x - shift
  double second;  // sum of (x - shift)^2
};

template <bool Center, class T>
inline ShiftedSums shifted_sums(const T* x, int64_t columns, float shift) {
  ShiftedSums total = {0, 0};
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Float first[sum_accumulators] = {};
    Float second[sum_accumulators] = {};
    int64_t i = begin;
    for (; i + sum_accumulators * lanes <= end; i += sum_accumulators * lanes) {
      for (int a = 0; a < sum_accumulators; ++a) {
        Float d = load(x + i + a * lanes);
        if constexpr (Center) {
          d -= shift;
          first[a] += d;
        }
        second[a] += d * d;
      }
    }
    for (; i + lanes <= end; i += lanes) {
      Float d = load(x + i);
      if constexpr (Center) {
        d -= shift;
        first[0] += d;
      }
      second[0] += d * d;
    }
    if (i < end) {
      Float d = load_partial(x + i, end - i);
      if constexpr (Center) {
        d = select(first_lanes(end - i), d - shift, Float{});
        first[1] += d;
      }
      second[1] += d * d;
    }
    if constexpr (Center) total.first += sum_lanes((first[0] + first[1]) + (first[2] + first[3]));
    total.second += sum_lanes((second[0] + second[1]) + (second[2] + second[3]));
  }
  return total;
}

// A first guess of the mean: the average of at most one block of vectors at the start of the row.
template <class T>
inline float leading_mean(const T* x, int64_t columns) {
  if (columns < lanes) return sum_lanes(load_partial(x, columns)) / static_cast<float>(columns);
  const int64_t vectors = columns / lanes < sum_accumulators ? columns / lanes : sum_accumulators;
  Float sum = {};
  for (int64_t v = 0; v < vectors; ++v) sum += load(x + v * lanes);
  return sum_lanes(sum) / static_cast<float>(vectors * lanes);
}

// Scalar formula: mean = sum(x) / N, rstd = 1 / sqrt(sum((x - mean)^2) / N + eps); without Center mean is 0.
//
// Centred sums are taken around a guess of the mean. The variance then loses digits only as far as the guess is off
// in units of the standard deviation; if it is off by more than two, once more around the mean just found.
template <bool Center, class T>
inline RowMoments row_moments(const T* x, int64_t columns, double eps) {
  const double scale = 1.0 / static_cast<double>(columns);
  float shift = Center ? leading_mean(x, columns) : 0.0f;
  ShiftedSums sums = shifted_sums<Center>(x, columns, shift);
  double offset = sums.first * scale;  // mean - shift
  double variance = sums.second * scale - offset * offset;
  if (Center && offset * offset > 4.0 * variance && isfinite(sums.second)) {
    shift = static_cast<float>(shift + offset);
    sums = shifted_sums<Center>(x, columns, shift);
    offset = sums.first * scale;
    variance = sums.second * scale - offset * offset;
  }
  // Rounding can leave a constant row a variance just below zero; NaN stays NaN.
  if (variance < 0.0) variance = 0.0;
  const double rstd = 1.0 / sqrt(variance + eps);
  return {shift, static_cast<float>(-offset * rstd), static_cast<float>(shift + offset), static_cast<float>(rstd)};
}

}  // namespace fusewright::FUSEWRIGHT_ISA
