// Online softmax of one block of queries over blocks of keys, queries in vector lanes.
// Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
#pragma once

#include "fusewright/cpu/attention/logits.h"
#include "fusewright/cpu/attention/weights.h"

namespace fusewright::FUSEWRIGHT_ISA {

// The reference r of a row follows its maximum only when that has grown by more than this many powers of two, so that
// the sums seldom have to be rescaled; weights then reach 2^8 and their sums stay far from overflow.
constexpr float lazy_growth = 8.0f;

// Running state of one block of queries, one lane each.
struct Softmax {
  float* maximum;  // r, in units of the scores
  float* total;
  float* output;  // DV by lanes
  bool started = false;
};

// Moves r where the maximum outgrew it.
template <class T>
inline void update_maximum(const Block& block, const float* scores, Exponent exponent, int64_t value_width,
                           Softmax& state) {
  for (int64_t v = 0; v < lane_columns<T>(block.queries); v += lanes) {
    Float largest = load(scores + v);
    for (int64_t k = 1; k < block.keys; ++k) largest = maximum(load(scores + k * query_block + v), largest);
    const Float old = load(state.maximum + v);
    const Int grown = (largest - old) * exponent.unit > lazy_growth;
    if (sum_lanes(select(grown, broadcast(1.0f), Float{})) == 0.0f) continue;
    const Float now = select(grown, largest, old);
    store(state.maximum + v, now);
    if (!state.started) continue;
    // A row that had no key so far has sums of zero and no shift to move from.
    const Int moved = grown & (old != negative_infinity);
    const Float factor = select(moved, exp2_clamped<true>(exponent.shift(old) - exponent.shift(now)), broadcast(1.0f));
    store(state.total + v, load(state.total + v) * factor);
    for (int64_t i = 0; i < value_width; ++i) {
      float* sums = state.output + i * query_block + v;
      store(sums, load(sums) * factor);
    }
  }
}

// Weights exp(logit - r) of a block, added up and stored as the right operand of the product with the values.
template <class T>
inline void weigh(const Block& block, const float* scores, Exponent exponent, bool masked, const float* dropout,
                  Softmax& state, const WeightLanes<T>& weights) {
  for (int64_t v = 0; v < lane_columns<T>(block.queries); v += lanes) {
    const Float shift = exponent.shift(load(state.maximum + v));
    Float sum{};
    weights.store(block, v, [&](int64_t k) __attribute__((always_inline)) {
      const Float score = load(scores + k * query_block + v);
      Float w = exp2_clamped<as_precise_as_float<T>>(score * exponent.unit - shift);
      if (masked) w = select(score == negative_infinity, Float{}, w);
      sum += w;
      return dropout == nullptr ? w : w * load(dropout + k * query_block + v);
    });
    store(state.total + v, load(state.total + v) + sum);
  }
}

// output += value^T weights, leaving out pairs whose weight is zero: there a value may be NaN or infinite.
template <class T>
inline void add_values_that_take_part(const Block& block, const Rows<T>& values, const WeightLanes<T>& weights,
                                      float* output) {
  for (int64_t k = 0; k < block.keys; ++k) {
    for (int64_t r = 0; r < block.queries; ++r) {
      const float weight = weights.at(block, k, r);
      if (weight == 0.0f) continue;
      for (int64_t i = 0; i < values.width; ++i) {
        output[i * query_block + r] += weight * element(values.row(k) + i);
      }
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
