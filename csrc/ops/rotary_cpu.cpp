// CPU kernel of the rotary embedding ops, attached to the schemas of fusewright_kernels/library/rotary.py.

#include <torch/csrc/stable/library.h>

#include "fusewright/rotary.h"
#include "heads_tensor.h"
#include "parallel.h"
#include "tensor_rows.h"

namespace fusewright::ops {
namespace {

void run(const Tensor& input, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
         bool interleaved, bool inverse, const Tensor& output) {
  const Tensor cos_rows = torch::stable::contiguous(cos), sin_rows = torch::stable::contiguous(sin);
  std::optional<Tensor> position_rows;
  if (positions.has_value()) position_rows = torch::stable::contiguous(*positions);
  RotaryParams params;
  params.rows = product_of_sizes(input, 0, 3);
  params.columns = input.size(3);
  params.pairs = cos.size(2);
  params.heads = input.size(1);
  params.length = input.size(2);
  // Rows in the order of memory.
  params.heads_inside = input.stride(1) < input.stride(2);
  const auto view = [&](const Tensor& tensor) {
    return row_view(params.heads_inside ? torch::stable::transpose(tensor, 1, 2) : tensor, 1);
  };
  params.input = view(input);
  params.output = view(output);
  params.cos = static_cast<const float*>(cos_rows.data_ptr());
  params.sin = static_cast<const float*>(sin_rows.data_ptr());
  params.table_rows = cos.size(1);
  params.table_stride = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(2);
  if (position_rows.has_value()) params.positions = static_cast<const int64_t*>(position_rows->data_ptr());
  params.interleaved = interleaved;
  params.inverse = inverse;
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.rotary_forward(params, begin, end); });
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
