// CPU kernels of the softmax ops, attached to the schemas of fusewright_kernels/library/softmax.py.

#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "softmax_params.h"

namespace fusewright::ops {
namespace {

void run_forward(const SoftmaxForwardParams& params) {
  if (params.columns == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.softmax_forward(params, begin, end); });
}

Tensor softmax_forward(Tensor input, int64_t dim, ScalarType output_type) {
  Tensor output = empty_like(input, output_type);
  run_forward(softmax_forward_params(input, dim, output));
  return output;
}

void softmax_forward_out(Tensor input, int64_t dim, Tensor output) {
  run_forward(softmax_forward_params(input, dim, output));
}

Tensor softmax_backward(Tensor grad_output, Tensor output, int64_t dim, ScalarType input_type) {
  Tensor grad_input = empty_like(output, input_type);
  const SoftmaxBackwardParams params = softmax_backward_params(grad_output, output, dim, grad_input);
  if (params.columns == 0) return grad_input;
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.softmax_backward(params, begin, end); });
  return grad_input;
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("softmax_forward.cpu", TORCH_BOX(&fusewright::ops::softmax_forward));
  library.impl("softmax_forward_out.cpu", TORCH_BOX(&fusewright::ops::softmax_forward_out));
  library.impl("softmax_backward.cpu", TORCH_BOX(&fusewright::ops::softmax_backward));
}
