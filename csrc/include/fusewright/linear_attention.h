// Parameters of the linear attention kernels. Schemas and meaning: fusewright_kernels/library/linear_attention.py.
// Letters: B batch, H heads, T length, D and DV head dimensions.
#pragma once

#include "fusewright/attention.h"

namespace fusewright {

enum class FeatureMap { elu, identity };

struct LinearAttentionParams {
  int64_t batch, heads, queries, keys, width, value_width;
  DataType dtype;
  HeadsView query, key, value;
  const bool* key_padding = nullptr;     // (B, S)
  const float* initial_state = nullptr;  // (B, H, D, DV + 1)
  bool causal;
  float eps;
  FeatureMap feature_map;
  float* normalizer;  // (B, H, T)

  int64_t state_columns() const { return value_width + 1; }
  int64_t state(int64_t b, int64_t h) const { return (b * heads + h) * width * state_columns(); }
};

struct LinearForwardParams : LinearAttentionParams {
  HeadsView output;
  float* final_state;  // (B, H, D, DV + 1)
};

struct LinearBackwardParams : LinearAttentionParams {
  HeadsView output, grad_output, grad_query, grad_key, grad_value;
  const float* grad_final_state = nullptr;  // (B, H, D, DV + 1)
  float* grad_initial_state = nullptr;      // likewise
};

// Positions that meet as a matrix; behind them only their sums are left.
constexpr int64_t linear_chunk = 64;

}  // namespace fusewright
