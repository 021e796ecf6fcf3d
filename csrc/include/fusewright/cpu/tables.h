// Declarations of the kernels that make up one instruction set's table.
#pragma once

#include "fusewright/normalization.h"
#include "fusewright/softmax.h"

namespace fusewright::FUSEWRIGHT_ISA {

void parameter_to_float(const RowView& row, int64_t columns, float offset, bool pair_order, float* target);
void norm_forward(const NormForwardParams& params, const float* weight, const float* bias, int64_t begin, int64_t end);
void norm_backward(const NormBackwardParams& params, const float* weight, int64_t begin, int64_t end,
                   float* weight_sums, float* bias_sums);
void norm_backward_reduce(const float* partial_sums, int64_t chunks, int64_t columns, bool pair_order,
                          const RowView& gradient, int64_t begin, int64_t end);
void softmax_forward(const SoftmaxForwardParams& params, int64_t begin, int64_t end);
void softmax_backward(const SoftmaxBackwardParams& params, int64_t begin, int64_t end);

}  // namespace fusewright::FUSEWRIGHT_ISA
