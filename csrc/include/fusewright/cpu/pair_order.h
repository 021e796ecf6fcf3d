// Which normalisations of bfloat16 take elements, and with them weights and sums, in pair order; see cpu/vector.h.
// Known to the kernels and to their callers, who prepare the weights.
#pragma once

#include "fusewright/normalization.h"

namespace fusewright {

// Rows of one type pass through registers as they are. Mixed types, and dropout, which is drawn in float32, take the
// natural order.
FUSEWRIGHT_HOST_DEVICE bool takes_pair_order(const NormForwardParams& params) {
  if (params.input.dtype != DataType::bfloat16) return false;
  if (params.residual.data == nullptr) return true;
  return params.seed == nullptr && params.residual.dtype == DataType::bfloat16 &&
         params.new_residual.dtype == DataType::bfloat16;
}

// Whether the backward of the fused addition is that of the plain normalisation with one more summand.
FUSEWRIGHT_HOST_DEVICE bool has_one_type(const NormBackwardParams& params) {
  const DataType type = params.stream.dtype;
  return params.seed == nullptr && params.grad_output.dtype == type &&
         (params.grad_input.data == nullptr || params.grad_input.dtype == type) &&
         (params.grad_residual.data == nullptr || params.grad_residual.dtype == type);
}

FUSEWRIGHT_HOST_DEVICE bool takes_pair_order(const NormBackwardParams& params) {
  return params.stream.dtype == DataType::bfloat16 && (!params.fused_residual || has_one_type(params));
}

}  // namespace fusewright
