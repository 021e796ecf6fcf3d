// Parameters of a softmax call from its tensors, the same for the CPU and the CUDA kernels.
#pragma once

#include "fusewright/softmax.h"
#include "tensor_rows.h"

namespace fusewright::ops {

inline int64_t rows_along(const Tensor& tensor, int64_t dim) {
  return product_of_sizes(tensor, 0, dim) * product_of_sizes(tensor, dim + 1, tensor.dim());
}

inline SoftmaxForwardParams softmax_forward_params(const Tensor& input, int64_t dim, const Tensor& output) {
  SoftmaxForwardParams params;
  params.rows = rows_along(input, dim);
  params.columns = input.size(dim);
  params.input = row_view_along(input, dim);
  params.output = row_view_along(output, dim);
  return params;
}

inline SoftmaxBackwardParams softmax_backward_params(const Tensor& grad_output, const Tensor& output, int64_t dim,
                                                     const Tensor& grad_input) {
  SoftmaxBackwardParams params;
  params.rows = rows_along(output, dim);
  params.columns = output.size(dim);
  params.grad_output = row_view_along(grad_output, dim);
  params.output = row_view_along(output, dim);
  params.grad_input = row_view_along(grad_input, dim);
  return params;
}

}  // namespace fusewright::ops
