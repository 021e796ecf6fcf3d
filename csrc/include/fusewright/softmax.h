// Parameters of the softmax kernels, shared by the CPU and the CUDA implementation.
// Rows run along the softmax dimension; every operand may have any strides.
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

// y = exp(x - max(x)) / sum(exp(x - max(x)))
struct SoftmaxForwardParams {
  int64_t rows = 0;
  int64_t columns = 0;
  RowView input;
  RowView output;
};

// dx = y * (dy - sum(y * dy))
struct SoftmaxBackwardParams {
  int64_t rows = 0;
  int64_t columns = 0;
  RowView grad_output;
  RowView output;
  RowView grad_input;
};

}  // namespace fusewright
