// Sums over the pairs of a block that take part, for blocks that hold a NaN or an infinity: a product would carry it
// into the sums of rows that do not meet it.
#pragma once

#include "fusewright/cpu/attention/visibility.h"
#include "fusewright/cpu/attention/weights.h"

namespace fusewright::FUSEWRIGHT_ISA {

// sums[key] += weights[key][query] right[query], leaving out zero weights: there the other factor may be NaN.
template <class T>
inline void add_rows_that_take_part(const Block& block, const WeightRows<T>& weights, const Rows<T>& right, float* sums,
                                    int64_t stride) {
  for (int64_t k = 0; k < block.keys; ++k) {
    for (int64_t r = 0; r < block.queries; ++r) {
      const float weight = weights.at(k, r);
      if (weight == 0.0f) continue;
      for (int64_t i = 0; i < right.width; ++i) sums[k * stride + i] += weight * element(right.row(r) + i);
    }
  }
}

// grad_query[query] += ds[key][query] keys[key], likewise.
template <class T>
inline void add_keys_that_take_part(const Block& block, const WeightRows<T>& ds, const Rows<T>& keys,
                                    float* grad_query) {
  for (int64_t k = 0; k < block.keys; ++k) {
    for (int64_t r = 0; r < block.queries; ++r) {
      const float weight = ds.at(k, r);
      if (weight == 0.0f) continue;
      for (int64_t i = 0; i < keys.width; ++i) grad_query[i * query_block + r] += weight * element(keys.row(k) + i);
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
