// Parameters of dropout from a call's arguments.
#pragma once

#include <cmath>

#include "tensor_rows.h"

namespace fusewright::ops {

inline void set_dropout(const std::optional<Tensor>& seed, double dropout_p, const int64_t** seed_pointer,
                        uint64_t* keep_threshold, float* keep_scale) {
  if (!seed.has_value() || dropout_p == 0.0) return;
  *seed_pointer = static_cast<const int64_t*>(seed->data_ptr());
  // nearbyint rounds half to even, as Python's round in philox.py
  *keep_threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
  *keep_scale = dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f;
}

}  // namespace fusewright::ops
