// The last step of a normalisation backward: a parameter's gradient from the sums of each block.
#pragma once

#include <cuda_runtime.h>

#include "fusewright/row_view.h"

namespace fusewright::cuda {

// gradient[n] = sum over p of partials[p, n], (partials, N) float32 to one contiguous row of the gradient's type.
cudaError_t norm_backward_reduce(const float* partials, int64_t count, int64_t columns, const RowView& gradient,
                                 void* stream);

}  // namespace fusewright::cuda
