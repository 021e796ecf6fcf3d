// Parameters of a linear layer on few rows, as in decoding: output = input weight^T + bias.
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

struct FewRowsLinearParams {
  int64_t rows = 0;     // M
  int64_t width = 0;    // input features
  int64_t columns = 0;  // output features

  RowView input;                 // (M, width)
  const void* weight = nullptr;  // (columns, width) of input's dtype, rows of adjacent elements
  int64_t weight_stride = 0;     // elements from one row of the weight to the next
  const void* bias = nullptr;    // (columns,) of input's dtype, adjacent elements; nullptr: none
  void* output = nullptr;        // (M, columns) of input's dtype, contiguous
};

}  // namespace fusewright
