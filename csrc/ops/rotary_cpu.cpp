// CPU kernel of the rotary embedding ops, attached to the schemas of fusewright_kernels/library/rotary.py.

#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "rotary_params.h"

namespace fusewright::ops {
namespace {

void run(const Tensor& input, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
         bool interleaved, bool inverse, const Tensor& output) {
  const RotaryCall call = rotary_call(input, cos, sin, positions, interleaved, inverse, output);
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(call.params.rows, call.params.columns,
                [&](int64_t begin, int64_t end) { kernels.rotary_forward(call.params, begin, end); });
}

Tensor forward(Tensor input, Tensor cos, Tensor sin, std::optional<Tensor> positions, bool interleaved, bool inverse) {
  Tensor output = empty_in_layout_of(input, input.size(0), input.size(1), input.size(2), input.size(3));
  run(input, cos, sin, positions, interleaved, inverse, output);
  return output;
}

void in_place(Tensor input, Tensor cos, Tensor sin, std::optional<Tensor> positions, bool interleaved, bool inverse) {
  run(input, cos, sin, positions, interleaved, inverse, input);
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("rotary_forward.cpu", TORCH_BOX(&fusewright::ops::forward));
  library.impl("rotary_in_place.cpu", TORCH_BOX(&fusewright::ops::in_place));
}
