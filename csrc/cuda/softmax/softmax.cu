// Entries of the softmax kernels: what they accept, and the choice by element type.

#include "fusewright/cuda_api.h"
#include "softmax_backward.cuh"
#include "softmax_forward.cuh"

namespace fusewright::cuda {
namespace {

cudaError_t forward(const SoftmaxForwardParams& params, void* stream) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  if (!is_stream_of(params.output, params.input.dtype)) return cudaErrorInvalidValue;
  switch (params.input.dtype) {
    case DataType::float32:
      return softmax_forward<float>(params, stream);
    case DataType::bfloat16:
      return softmax_forward<__nv_bfloat16>(params, stream);
    case DataType::float16:
      return softmax_forward<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t backward(const SoftmaxBackwardParams& params, void* stream) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  if (!is_stream_of(params.output, params.grad_input.dtype) || params.grad_output.dtype != params.output.dtype) {
    return cudaErrorInvalidValue;
  }
  switch (params.grad_input.dtype) {
    case DataType::float32:
      return softmax_backward<float>(params, stream);
    case DataType::bfloat16:
      return softmax_backward<__nv_bfloat16>(params, stream);
    case DataType::float16:
      return softmax_backward<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fusewright::cuda

int fusewright_cuda_softmax_forward(const fusewright::SoftmaxForwardParams* params, void* stream) {
  return fusewright::cuda::forward(*params, stream);
}

int fusewright_cuda_softmax_backward(const fusewright::SoftmaxBackwardParams* params, void* stream) {
  return fusewright::cuda::backward(*params, stream);
}
