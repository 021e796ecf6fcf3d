// The entry that a test of mutated kernels calls, of float32 only.

#include "bias_gelu.cuh"

using namespace fusewright;

// All of (rows, columns) but the bias, (columns,), and partials, (chunks, columns), which one launch fills.
extern "C" int bias_gelu_sums(const RowView* grad_output, const RowView* input, const RowView* bias,
                              const RowView* grad_input, const RowView* partials) {
  using Columns = cuda::AdjacentColumns<4>;
  BiasGeluBackwardParams params;
  params.rows = input->outer_size[0];
  params.columns = input->inner_size[0];
  params.grad_output = *grad_output;
  params.input = *input;
  params.grad_input = *grad_input;
  const int64_t chunks = partials->outer_size[0];
  cuda::DeviceLimits limits;
  limits.multiprocessors = 1;
  const cuda::BiasGradientPlan plan =
      cuda::plan_bias_gradient(params.rows, params.columns, cuda::bias_tile_elements<Columns>, limits);
  if (plan.chunks != chunks) return cudaErrorInvalidValue;
  return cuda::launch(cuda::bias_gelu_backward_sums_kernel<float, Columns, false>,
                      cuda::grid_of(chunks * plan.column_tiles), plan.block, 0, nullptr, params, *bias,
                      plan.column_tiles, plan.chunk_rows, static_cast<float*>(partials->data));
}
