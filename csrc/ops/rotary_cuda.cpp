// CUDA kernel of the rotary embedding ops, attached to the schemas of fusewright_kernels/library/rotary.py.

#include <torch/csrc/stable/library.h>

#include "cuda_call.h"
#include "rotary_params.h"

namespace fusewright::ops {
namespace {

void run(const char* op, const Tensor& input, const Tensor& cos, const Tensor& sin,
         const std::optional<Tensor>& positions, bool interleaved, bool inverse, const Tensor& output) {
  const CudaCall call(op, input);
  const RotaryCall rotary = rotary_call(input, cos, sin, positions, interleaved, inverse, output);
  call.check(fusewright_cuda_rotary(&rotary.params, call.stream()));
}

Tensor forward(Tensor input, Tensor cos, Tensor sin, std::optional<Tensor> positions, bool interleaved, bool inverse) {
  Tensor output = empty_in_layout_of(input, input.size(0), input.size(1), input.size(2), input.size(3));
  run("rotary_forward", input, cos, sin, positions, interleaved, inverse, output);
  return output;
}

void in_place(Tensor input, Tensor cos, Tensor sin, std::optional<Tensor> positions, bool interleaved, bool inverse) {
  run("rotary_in_place", input, cos, sin, positions, interleaved, inverse, input);
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("rotary_forward.cuda", TORCH_BOX(&fusewright::ops::forward));
  library.impl("rotary_in_place.cuda", TORCH_BOX(&fusewright::ops::in_place));
}
