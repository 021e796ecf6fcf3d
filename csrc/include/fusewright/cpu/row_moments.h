// Mean and reciprocal standard deviation of one row, in one pass over it where the data allows.
#pragma once

#include <math.h>

#include "fusewright/cpu/rows.h"

namespace fusewright::FUSEWRIGHT_ISA {

// A row enters the output as (x - shift) * rstd + correction: x - shift is exact where x is near the mean, so a
// large mean costs no accuracy. mean = shift + (mean - shift) is rounded only to be saved.
struct RowMoments {
  float shift;
  float correction;  // (shift - mean) * rstd
  float mean;
  float rstd;
};

// Elements whose sums stay in float32 lanes; each block is then added to a double. A lane sums at most 64 terms with 16
// lanes, 32 with 8 and 16 with 4, whatever N: fewer lanes average their rounding errors less, most of all in a row of
// equal values.
constexpr int64_t sum_block = 16 * lanes * lanes;
constexpr int sum_accumulators = 2;  // pairs

struct ShiftedSums {
  double first;   // sum of x - shift
  double second;  // sum of (x - shift)^2
};

// A row in memory as a source of pairs. A source of another kind may make its elements on the way.
template <class RowOrder, class T>
struct RowSource {
  using Order = RowOrder;
  const T* x;

  FUSEWRIGHT_ALWAYS_INLINE Pair pair(int64_t i) const { return Order::load(x + i); }
  // The first `count` < pair_lanes elements from i; the others are zero.
  FUSEWRIGHT_ALWAYS_INLINE Pair partial(int64_t i, int64_t count) const { return Order::load_partial(x + i, count); }
};

// Center: with the first sum; Shifted: shift is not zero. The source comes by value: what it points to might be itself,
// as far as the compiler knows, and would be read anew for every element.
template <bool Center, bool Shifted, class Source>
inline ShiftedSums shifted_sums(Source source, int64_t columns, float shift) {
  ShiftedSums total = {0, 0};
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    const int64_t end = columns - begin < sum_block ? columns : begin + sum_block;
    Pair first[sum_accumulators] = {};
    Pair second[sum_accumulators] = {};
    const auto shifted = [&](Pair x) -> Pair {
      if constexpr (Shifted) return {x.first - shift, x.second - shift};
      return x;
    };
    const auto add = [&](int a, Pair d) {
      if constexpr (Center) {
        first[a].first += d.first;
        first[a].second += d.second;
      }
      second[a].first += d.first * d.first;
      second[a].second += d.second * d.second;
    };
    int64_t i = begin;
    for (; i + sum_accumulators * pair_lanes <= end; i += sum_accumulators * pair_lanes) {
      for (int a = 0; a < sum_accumulators; ++a) add(a, shifted(source.pair(i + a * pair_lanes)));
    }
    for (; i + pair_lanes <= end; i += pair_lanes) add(0, shifted(source.pair(i)));
    const int64_t rest = end - i;
    if (rest > 0) add(0, Source::Order::first_elements(rest, shifted(source.partial(i, rest)), 0.0f));
    const auto sum = [](const Pair* pairs) {
      return sum_lanes((pairs[0].first + pairs[0].second) + (pairs[1].first + pairs[1].second));
    };
    if constexpr (Center) total.first += sum(first);
    total.second += sum(second);
  }
  return total;
}

// A first guess of the mean: the average of at most two pairs at the start of the row.
template <class Source>
inline float leading_mean(const Source& source, int64_t columns) {
  const auto sum = [](Pair pair) { return pair.first + pair.second; };
  if (columns < pair_lanes) return sum_lanes(sum(source.partial(0, columns))) / static_cast<float>(columns);
  if (columns < 2 * pair_lanes) return sum_lanes(sum(source.pair(0))) / static_cast<float>(pair_lanes);
  return sum_lanes(sum(source.pair(0)) + sum(source.pair(pair_lanes))) / static_cast<float>(2 * pair_lanes);
}

// Scalar formula: mean = sum(x) / N, rstd = 1 / sqrt(sum((x - mean)^2) / N + eps); without Center mean is 0.
//
// Centred sums are taken around a guess of the mean. The variance then loses digits only as far as the guess is off
// in units of the standard deviation; if it is off by too much, once more around the mean just found. Two-byte types
// start from 0 and bear a guess 8 standard deviations off: their inputs have 8 or 11 bits and float32 sums 24.
//
// Three sources yield the same row, whose elements are of type T: `start` for the guess, `first` for the sums around it
// and `again` for those around the mean found.
template <bool Center, class T, class Start, class First, class Again>
inline RowMoments row_moments(const Start& start, const First& first, const Again& again, int64_t columns, double eps) {
  constexpr bool wide = sizeof(T) == sizeof(float);
  constexpr double most_variances_off = wide ? 1.0 : 64.0;
  const double scale = 1.0 / static_cast<double>(columns);
  float shift = 0;
  if constexpr (Center && wide) shift = leading_mean(start, columns);
  ShiftedSums sums = shifted_sums < Center, Center && wide > (first, columns, shift);
  double offset = sums.first * scale;  // mean - shift
  double variance = sums.second * scale - offset * offset;
  if (Center && offset * offset > most_variances_off * variance && isfinite(sums.second)) {
    shift = static_cast<float>(shift + offset);
    sums = shifted_sums<Center, true>(again, columns, shift);
    offset = sums.first * scale;
    variance = sums.second * scale - offset * offset;
  }
  // Rounding can leave a constant row a variance just below zero; NaN stays NaN.
  if (variance < 0.0) variance = 0.0;
  const double rstd = 1.0 / sqrt(variance + eps);
  return {shift, static_cast<float>(-offset * rstd), static_cast<float>(shift + offset), static_cast<float>(rstd)};
}

}  // namespace fusewright::FUSEWRIGHT_ISA
