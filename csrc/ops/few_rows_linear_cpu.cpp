// CPU kernel of a linear layer on few rows, attached to the schema of fusewright_kernels/library/linear.py.

#include <torch/csrc/stable/library.h>

#include "fusewright/few_rows_linear.h"
#include "parallel.h"
#include "tensor_rows.h"
#include "worker.h"

namespace fusewright::ops {
namespace {

Tensor few_rows_linear(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  const int64_t last = input.dim() - 1;
  const Tensor weight_rows = weight.stride(1) == 1 || weight.size(1) <= 1 ? weight : torch::stable::contiguous(weight);
  FewRowsLinearParams params;
  params.rows = product_of_sizes(input, 0, last);
  params.width = weight.size(1);
  params.columns = weight.size(0);
  int64_t sizes[64];
  for (int64_t dim = 0; dim < last; ++dim) sizes[dim] = input.size(dim);
  sizes[last] = params.columns;
  Tensor output = empty(sizes, input.dim(), input.scalar_type(), input);
  params.input = row_view(input, 1);
  params.weight = weight_rows.data_ptr();
  params.weight_stride = weight_rows.stride(0);
  std::optional<Tensor> bias_row;
  if (bias.has_value()) {
    bias_row = torch::stable::contiguous(*bias);
    params.bias = bias_row->data_ptr();
  }
  params.output = output.data_ptr();
  if (params.rows == 0 || params.columns == 0) return output;
  const CpuKernels& kernels = cpu_kernels();
  const Scratch packed(kernels.few_rows_linear_scratch(params));
  kernels.few_rows_linear_pack(params, packed.data());
  parallel_rows(params.columns, params.width * params.rows,
                [&](int64_t begin, int64_t end) { kernels.few_rows_linear(params, packed.data(), begin, end); });
  return output;
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("few_rows_linear.cpu", TORCH_BOX(&fusewright::ops::few_rows_linear));
}
