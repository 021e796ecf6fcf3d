// Entries of GELU with a bias. Its kernels are short: all element types share this source.

#include "bias_gelu.cuh"
#include "fusewright/cuda_api.h"

namespace fusewright::cuda {
namespace {

template <class T, bool Tanh>
cudaError_t forward(const BiasGeluForwardParams& params, const RowView& bias, void* stream) {
  return with_columns<T>({&params.input, &params.output, &bias}, params.columns, [&](auto columns) {
    using Columns = decltype(columns);
    return launch_element_tiles<Columns>(bias_gelu_forward_kernel<T, Columns, Tanh>, stream, params, bias);
  });
}

// Calls body(T{}, Columns{}) for the types and the accesses of a backward.
template <class Body>
cudaError_t with_backward_types(const BiasGeluBackwardParams& params, const RowView& bias, Body body) {
  return with_element_type(params.input.dtype, [&](auto element) {
    return with_columns<decltype(element)>({&params.grad_output, &params.input, &params.grad_input, &bias},
                                           params.columns, [&](auto columns) { return body(element, columns); });
  });
}

template <class Columns>
cudaError_t plan_for(const BiasGeluBackwardParams& params, BiasGradientPlan& plan) {
  DeviceLimits limits;
  const cudaError_t error = query_device(limits);
  if (error == cudaSuccess) {
    plan = plan_bias_gradient(params.rows, params.columns, bias_tile_elements<Columns>, limits);
  }
  return error;
}

template <class T, class Columns, bool Tanh>
cudaError_t backward(const BiasGeluBackwardParams& params, const RowView& bias, const RowView& grad_bias,
                     float* partials, void* stream) {
  if (bias.data == nullptr) {
    return launch_element_tiles<Columns>(bias_gelu_backward_kernel<T, Columns, Tanh>, stream, params);
  }
  BiasGradientPlan plan;
  cudaError_t error = plan_for<Columns>(params, plan);
  if (error == cudaSuccess && plan.chunks > 0) {
    error = launch(bias_gelu_backward_sums_kernel<T, Columns, Tanh>, grid_of(plan.chunks * plan.column_tiles),
                   plan.block, 0, stream, params, bias, plan.column_tiles, plan.chunk_rows, partials);
  }
  if (error != cudaSuccess) return error;
  // Without rows the sum of no chunk is 0.
  return norm_backward_reduce(partials, plan.chunks, params.columns, grad_bias, stream);
}

}  // namespace
}  // namespace fusewright::cuda

using namespace fusewright;

int fusewright_cuda_bias_gelu_forward(const BiasGeluForwardParams* params, const RowView* bias, void* stream) {
  if (params->rows == 0 || params->columns == 0) return cudaSuccess;
  if (!cuda::have_type({&params->output}, params->input.dtype)) return cudaErrorInvalidValue;
  return cuda::with_element_type(params->input.dtype, [&](auto element) {
    using T = decltype(element);
    return params->tanh ? cuda::forward<T, true>(*params, *bias, stream)
                        : cuda::forward<T, false>(*params, *bias, stream);
  });
}

int fusewright_cuda_bias_gelu_backward_workspace(const BiasGeluBackwardParams* params, const RowView* bias,
                                                 int64_t* bytes) {
  *bytes = 0;
  if (bias->data == nullptr || params->rows == 0 || params->columns == 0) return cudaSuccess;
  return cuda::with_backward_types(*params, *bias, [&](auto, auto columns) {
    cuda::BiasGradientPlan plan;
    const cudaError_t error = cuda::plan_for<decltype(columns)>(*params, plan);
    *bytes = plan.chunks * params->columns * static_cast<int64_t>(sizeof(float));
    return error;
  });
}

int fusewright_cuda_bias_gelu_backward(const BiasGeluBackwardParams* params, const RowView* bias,
                                       const RowView* grad_bias, float* workspace, void* stream) {
  if (params->columns == 0 || (params->rows == 0 && bias->data == nullptr)) return cudaSuccess;
  if (!cuda::have_type({&params->grad_output, &params->grad_input}, params->input.dtype)) return cudaErrorInvalidValue;
  return cuda::with_backward_types(*params, *bias, [&](auto element, auto columns) {
    using T = decltype(element);
    using Columns = decltype(columns);
    return params->tanh ? cuda::backward<T, Columns, true>(*params, *bias, *grad_bias, workspace, stream)
                        : cuda::backward<T, Columns, false>(*params, *bias, *grad_bias, workspace, stream);
  });
}
