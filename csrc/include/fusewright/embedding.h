// Parameters of the embedding with positions: output = scale * weight[token] + table[row].
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

// A matrix of adjacent rows of adjacent elements, and the row that each output takes.
struct IndexedRows {
  const void* data = nullptr;  // nullptr: absent
  DataType dtype = DataType::float32;
  int64_t rows = 0;
  const int64_t* indices = nullptr;  // (M,), one that is no row gives NaN; nullptr: m modulo `period`
  int64_t period = 1;
};

struct EmbeddingForwardParams {
  int64_t columns = 0;
  float scale = 1.0f;
  IndexedRows weight, table;
  void* output = nullptr;  // (M, columns) of weight's dtype, contiguous
};

// gradient[r] = scale * sum of grad_output[order[i]], i from begins[r] to begins[r + 1].
struct EmbeddingBackwardParams {
  int64_t columns = 0;
  float scale = 1.0f;
  int64_t skipped = -1;               // this row's gradient is zero
  const void* grad_output = nullptr;  // (M, columns), contiguous
  DataType dtype = DataType::float32;
  const int64_t* order = nullptr;
  const int64_t* begins = nullptr;
  void* gradient = nullptr;  // (rows, columns), contiguous
  DataType gradient_dtype = DataType::float32;
};

}  // namespace fusewright
