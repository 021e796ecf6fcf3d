// Parameters of the normalisation kernels, shared by the CPU and the CUDA implementation.
// Letters: M rows, N columns (elements of the normalised shape). Outputs are contiguous.
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

// y = (x - mean) * rstd * (weight + weight_offset) + bias, x being input or dropout(input) + residual.
struct NormForwardParams {
  int64_t rows = 0;     // M
  int64_t columns = 0;  // N
  bool center = true;   // layer normalisation; false: RMS normalisation, mean taken as 0
  double eps = 0;
  float weight_offset = 0;

  RowView input;     // (M, N)
  RowView residual;  // (M, N), absent for plain normalisation
  RowView weight;    // one row of N, may be absent
  RowView bias;      // one row of N, may be absent

  void* output = nullptr;       // (M, N) in the dtype of input
  RowView new_residual;         // (M, N) contiguous, absent with residual
  float* statistics = nullptr;  // rstd[M], then mean[M] if center; nullptr: not saved

  const int64_t* seed = nullptr;  // one element, on the kernel's device; nullptr: no dropout
  uint64_t keep_threshold = 0;    // an element is kept if its philox word is at least this; up to 2^32
  float keep_scale = 1;           // 1 / (1 - dropout_p), 0 where nothing is kept
};

// grad_stream = norm'(grad_output) + grad_new_residual; grad_residual = grad_stream; grad_input = dropout(grad_stream).
// For plain normalisation the result is grad_input and the residual members are absent.
struct NormBackwardParams {
  int64_t rows = 0;
  int64_t columns = 0;
  bool center = true;
  bool fused_residual = false;  // backward of the normalisation fused with a residual addition
  float weight_offset = 0;

  RowView grad_output;                // (M, N)
  RowView grad_new_residual;          // (M, N), may be absent
  RowView stream;                     // (M, N): the normalised tensor, input or new_residual
  RowView weight;                     // one row of N, may be absent
  const float* statistics = nullptr;  // rstd[M], then mean[M] if center

  RowView grad_input;     // (M, N) contiguous, absent if not wanted
  RowView grad_residual;  // (M, N) contiguous, absent if not wanted
  RowView grad_weight;    // one contiguous row of N, absent if not wanted
  RowView grad_bias;      // one contiguous row of N, absent if not wanted

  const int64_t* seed = nullptr;
  uint64_t keep_threshold = 0;
  float keep_scale = 1;
};

}  // namespace fusewright
