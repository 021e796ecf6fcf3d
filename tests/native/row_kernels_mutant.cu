// The entries that a test of mutated kernels calls, of float32 only.

#include "normalization_backward.cuh"
#include "normalization_forward.cuh"
#include "softmax_backward.cuh"
#include "softmax_forward.cuh"

namespace fusewright::cuda {
template cudaError_t norm_forward<float>(const NormForwardParams&, void*);
template cudaError_t softmax_forward<float>(const SoftmaxForwardParams&, void*);
}  // namespace fusewright::cuda

using namespace fusewright;

namespace {
constexpr int64_t rows = 6;
}

// (6, columns) to the same; the output's pointer only is taken.
extern "C" int norm(const RowView* input, const RowView* output) {
  NormForwardParams params;
  params.rows = rows;
  params.columns = input->inner_size[0];
  params.eps = 1e-5;
  params.input = *input;
  params.output = output->data;
  return cuda::norm_forward<float>(params, nullptr);
}

extern "C" int softmax(const RowView* input, const RowView* output) {
  return cuda::softmax_forward<float>({rows, input->inner_size[0], *input, *output}, nullptr);
}
