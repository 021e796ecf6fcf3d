// Entries of SwiGLU. Its kernels are short: all element types share this source.

#include "fusewright/cuda_api.h"
#include "swiglu.cuh"

using namespace fusewright;

int fusewright_cuda_swiglu_forward(const SwigluForwardParams* params, void* stream) {
  if (params->rows == 0 || params->columns == 0) return cudaSuccess;
  const auto operands = {&params->gate, &params->up, &params->output};
  if (!cuda::have_type(operands, params->gate.dtype)) return cudaErrorInvalidValue;
  return cuda::with_element_type(params->gate.dtype, [&](auto element) {
    using T = decltype(element);
    return cuda::with_columns<T>(operands, params->columns, [&](auto columns) {
      using Columns = decltype(columns);
      return cuda::launch_element_tiles<Columns>(cuda::swiglu_forward_kernel<T, Columns>, stream, *params);
    });
  });
}

int fusewright_cuda_swiglu_backward(const SwigluBackwardParams* params, void* stream) {
  if (params->rows == 0 || params->columns == 0) return cudaSuccess;
  const auto operands = {&params->grad_output, &params->gate, &params->up, &params->grad_gate, &params->grad_up};
  if (!cuda::have_type(operands, params->gate.dtype)) return cudaErrorInvalidValue;
  return cuda::with_element_type(params->gate.dtype, [&](auto element) {
    using T = decltype(element);
    return cuda::with_columns<T>(operands, params->columns, [&](auto columns) {
      using Columns = decltype(columns);
      return cuda::launch_element_tiles<Columns>(cuda::swiglu_backward_kernel<T, Columns>, stream, *params);
    });
  });
}
