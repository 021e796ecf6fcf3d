// Entries of the normalisation kernels: what they accept, and the choice by element type.

#include "fusewright/cuda_api.h"
#include "normalization_backward.cuh"
#include "normalization_backward_reduce.cuh"
#include "normalization_forward.cuh"

namespace fusewright::cuda {
namespace {

bool is_accepted(const NormForwardParams& params) {
  const DataType dtype = params.input.dtype;
  const bool fused = params.residual.data != nullptr;
  return is_stream_of(params.residual, dtype) && is_stream_of(params.new_residual, dtype) &&
         fused == (params.new_residual.data != nullptr);
}

bool is_accepted(const NormBackwardParams& params) {
  const DataType dtype = params.grad_output.dtype;
  return is_stream_of(params.stream, dtype) && is_stream_of(params.grad_new_residual, dtype) &&
         is_stream_of(params.grad_residual, dtype) &&
         (params.grad_input.data == nullptr || params.grad_input.dtype == dtype);
}

cudaError_t forward(const NormForwardParams& params, void* stream) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  if (!is_accepted(params)) return cudaErrorInvalidValue;
  switch (params.input.dtype) {
    case DataType::float32:
      return norm_forward<float>(params, stream);
    case DataType::bfloat16:
      return norm_forward<__nv_bfloat16>(params, stream);
    case DataType::float16:
      return norm_forward<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t backward_partials(const NormBackwardParams& params, const NormBackwardPlan& plan,
                              const NormBackwardPartials& partials, void* stream) {
  switch (params.grad_output.dtype) {
    case DataType::float32:
      return norm_backward<float>(params, plan, partials, stream);
    case DataType::bfloat16:
      return norm_backward<__nv_bfloat16>(params, plan, partials, stream);
    case DataType::float16:
      return norm_backward<__half>(params, plan, partials, stream);
  }
  return cudaErrorInvalidValue;
}

// The gradient of a parameter that no row contributes to. Zero bits are zero in every element type.
cudaError_t clear(const RowView& gradient, int64_t columns, void* stream) {
  if (gradient.data == nullptr || columns == 0) return cudaSuccess;
  return cudaMemsetAsync(gradient.data, 0, columns * size_of(gradient.dtype), static_cast<cudaStream_t>(stream));
}

cudaError_t backward(const NormBackwardParams& params, float* workspace, void* stream) {
  if (params.rows == 0 || params.columns == 0) {
    const cudaError_t error = clear(params.grad_weight, params.columns, stream);
    return error != cudaSuccess ? error : clear(params.grad_bias, params.columns, stream);
  }
  if (!is_accepted(params)) return cudaErrorInvalidValue;
  DeviceLimits limits;
  cudaError_t error = query_device(limits);
  if (error != cudaSuccess) return error;
  const NormBackwardPlan plan = plan_norm_backward(params, limits);
  const int64_t partials_elements = plan.partials * params.columns;
  NormBackwardPartials partials;
  float* next = workspace;
  if (params.grad_weight.data != nullptr) {
    partials.weight = next;
    next += partials_elements;
  }
  if (params.grad_bias.data != nullptr) partials.bias = next;
  error = backward_partials(params, plan, partials, stream);
  if (error == cudaSuccess && partials.weight != nullptr) {
    error = norm_backward_reduce(partials.weight, plan.partials, params.columns, params.grad_weight, stream);
  }
  if (error == cudaSuccess && partials.bias != nullptr) {
    error = norm_backward_reduce(partials.bias, plan.partials, params.columns, params.grad_bias, stream);
  }
  return error;
}

}  // namespace
}  // namespace fusewright::cuda

const char* fusewright_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int fusewright_cuda_norm_forward(const fusewright::NormForwardParams* params, void* stream) {
  return fusewright::cuda::forward(*params, stream);
}

int fusewright_cuda_norm_backward(const fusewright::NormBackwardParams* params, float* workspace, void* stream) {
  return fusewright::cuda::backward(*params, workspace, stream);
}

int fusewright_cuda_norm_backward_workspace(const fusewright::NormBackwardParams* params, int64_t* bytes) {
  using namespace fusewright::cuda;
  *bytes = 0;
  if (params->rows == 0 || params->columns == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = query_device(limits);
  if (error != cudaSuccess) return error;
  *bytes = workspace_elements(*params, plan_norm_backward(*params, limits)) * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}
