// Parameters of a rotary call from its tensors, the same for the CPU and the CUDA kernels.
#pragma once

#include "fusewright/rotary.h"
#include "heads_tensor.h"
#include "tensor_rows.h"

namespace fusewright::ops {

// Tensors in the form the kernels take, held for as long as they run, and the parameters that point into them.
struct RotaryCall {
  Tensor cos;
  Tensor sin;
  std::optional<Tensor> positions;
  RotaryParams params;
};

inline RotaryCall rotary_call(const Tensor& input, const Tensor& cos, const Tensor& sin,
                              const std::optional<Tensor>& positions, bool interleaved, bool inverse,
                              const Tensor& output) {
  RotaryCall call{torch::stable::contiguous(cos), torch::stable::contiguous(sin), std::nullopt, {}};
  if (positions.has_value()) call.positions = torch::stable::contiguous(*positions);
  RotaryParams& params = call.params;
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
  params.cos = static_cast<const float*>(call.cos.data_ptr());
  params.sin = static_cast<const float*>(call.sin.data_ptr());
  params.table_rows = cos.size(1);
  params.table_stride = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(2);
  if (call.positions.has_value()) params.positions = static_cast<const int64_t*>(call.positions->data_ptr());
  params.interleaved = interleaved;
  params.inverse = inverse;
  return call;
}

}  // namespace fusewright::ops
