// The largest element of a row.
#pragma once

#include "fusewright/cpu/rows.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Vectors in flight: pairs that a pass over a row takes in one step.
constexpr int step_pairs = 2;
constexpr int64_t step = step_pairs * pair_lanes;

template <int Step = lanes / 2>
float largest_lane(Float vector) {
  if constexpr (Step == 0) {
    return vector[0];
  } else {
    return largest_lane<Step / 2>(maximum(vector, rotate<Step>(vector)));
  }
}

// NaN is no maximum here: it reaches the sum of exponentials. -Inf for a row without elements.
template <class Order, class T>
float row_maximum(const T* x, int64_t columns) {
  const float lowest = -__builtin_inff();
  Pair best[step_pairs];
  for (Pair& pair : best) pair = {broadcast(lowest), broadcast(lowest)};
  const auto compare = [&](int a, Pair value) {
    best[a] = {maximum(value.first, best[a].first), maximum(value.second, best[a].second)};
  };
  int64_t i = 0;
  for (; i + step <= columns; i += step) {
    for (int a = 0; a < step_pairs; ++a) compare(a, Order::load(x + i + a * pair_lanes));
  }
  for (; i + pair_lanes <= columns; i += pair_lanes) compare(0, Order::load(x + i));
  const int64_t rest = columns - i;
  if (rest > 0) compare(0, Order::first_elements(rest, Order::load_partial(x + i, rest), lowest));
  return largest_lane(maximum(maximum(best[0].first, best[0].second), maximum(best[1].first, best[1].second)));
}

}  // namespace fusewright::FUSEWRIGHT_ISA
