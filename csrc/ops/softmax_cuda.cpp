// CUDA kernels of the softmax ops, attached to the schemas of fusewright_kernels/library/softmax.py.

#include <torch/csrc/stable/library.h>

#include "cuda_call.h"
#include "softmax_params.h"

namespace fusewright::ops {
namespace {

Tensor softmax_forward(Tensor input, int64_t dim, ScalarType output_type) {
  const CudaCall call("softmax_forward", input);
  Tensor output = empty_like(input, output_type);
  const SoftmaxForwardParams params = softmax_forward_params(input, dim, output);
  call.check(fusewright_cuda_softmax_forward(&params, call.stream()));
  return output;
}

void softmax_forward_out(Tensor input, int64_t dim, Tensor output) {
  const CudaCall call("softmax_forward_out", input);
  const SoftmaxForwardParams params = softmax_forward_params(input, dim, output);
  call.check(fusewright_cuda_softmax_forward(&params, call.stream()));
}

Tensor softmax_backward(Tensor grad_output, Tensor output, int64_t dim, ScalarType input_type) {
  const CudaCall call("softmax_backward", output);
  Tensor grad_input = empty_like(output, input_type);
  const SoftmaxBackwardParams params = softmax_backward_params(grad_output, output, dim, grad_input);
  call.check(fusewright_cuda_softmax_backward(&params, call.stream()));
  return grad_input;
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("softmax_forward.cuda", TORCH_BOX(&fusewright::ops::softmax_forward));
  library.impl("softmax_forward_out.cuda", TORCH_BOX(&fusewright::ops::softmax_forward_out));
  library.impl("softmax_backward.cuda", TORCH_BOX(&fusewright::ops::softmax_backward));
}
