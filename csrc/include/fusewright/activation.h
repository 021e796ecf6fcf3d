// Parameters of the activations of feed-forward layers. Letters: M rows, F columns (features).
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

// output = gate * sigmoid(gate) * up
struct SwigluForwardParams {
  int64_t rows = 0;
  int64_t columns = 0;
  RowView gate;
  RowView up;
  RowView output;
};

struct SwigluBackwardParams {
  int64_t rows = 0;
  int64_t columns = 0;
  RowView grad_output;
  RowView gate;
  RowView up;
  RowView grad_gate;
  RowView grad_up;
};

// output = z * P(Z < z) for z = input + bias and a normal Z
struct BiasGeluForwardParams {
  int64_t rows = 0;
  int64_t columns = 0;
  bool tanh = false;  // Hendrycks and Gimpel's approximation
  RowView input;
  RowView output;
};

struct BiasGeluBackwardParams {
  int64_t rows = 0;
  int64_t columns = 0;
  bool tanh = false;
  RowView grad_output;
  RowView input;
  RowView grad_input;
};

// Bfloat16 rows pass in pair order, see cpu/vector.h; so do the bias and its gradient's sums.
FUSEWRIGHT_HOST_DEVICE bool takes_pair_order(const RowView& input) { return input.dtype == DataType::bfloat16; }

// output = dropout(input) + residual
struct DropoutAddParams {
  int64_t rows = 0;
  int64_t columns = 0;
  RowView input;
  RowView residual;  // may be absent
  RowView output;
  const int64_t* seed = nullptr;  // one element; nullptr: no dropout
  uint64_t keep_threshold = 0;    // an element is kept if its philox word is at least this; up to 2^32
  float keep_scale = 1;           // 1 / (1 - dropout_p), 0 where nothing is kept
};

}  // namespace fusewright
