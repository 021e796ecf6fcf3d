// Entries of the recurrent kernels: plan, workspace, and the choice by element type.

#include "fusewright/cuda/vector.cuh"
#include "fusewright/cuda_api.h"
#include "recurrent_plan.cuh"

namespace fusewright::cuda {

// Defined in recurrent_forward.cuh and recurrent_backward.cuh.
template <class T>
cudaError_t recurrent_forward(const RecurrentForwardStepsParams&, const RecurrentPlan&, void*);
template <class T>
cudaError_t recurrent_backward(const RecurrentBackwardStepsParams&, const RecurrentPlan&, void*);

namespace {

cudaError_t plan_forward(const RecurrentForwardStepsParams& params, RecurrentPlan& plan) {
  switch (gates_of(params.cell)) {
    case 4:
      return plan_recurrent<4>(params, 1, plan);
    case 3:
      return plan_recurrent<3>(params, 1, plan);
    default:
      return plan_recurrent<1>(params, 1, plan);
  }
}

cudaError_t plan_backward(const RecurrentBackwardStepsParams& params, RecurrentPlan& plan) {
  return plan_recurrent<1>(params, static_cast<int>(gates_of(params.cell)), plan);
}

bool is_accepted(const RecurrentStepsParams& params) {
  // Epochs are words of 32 bits, and so are offsets within a tile of columns.
  constexpr int64_t most_steps = int64_t{1} << 31, most_units = int64_t{1} << 23;
  return (params.dtype == DataType::bfloat16 || params.dtype == DataType::float16) && params.time < most_steps &&
         params.hidden <= most_units;
}

bool has_nothing_to_do(const RecurrentStepsParams& params) { return params.batch == 0 || params.hidden == 0; }

template <class Params, class Plan>
int workspace_bytes(const Params& params, Plan make_plan, int64_t* bytes) {
  *bytes = 0;
  if (has_nothing_to_do(params)) return cudaSuccess;
  if (!is_accepted(params)) return cudaErrorInvalidValue;
  RecurrentPlan plan;
  const cudaError_t error = make_plan(params, plan);
  if (error == cudaSuccess) *bytes = plan.workspace_bytes();
  return error;
}

template <class Params, class Plan, class Run>
int run(const Params& params, void* workspace, void* stream, Plan make_plan, Run run_of_type) {
  if (has_nothing_to_do(params)) return cudaSuccess;
  if (!is_accepted(params)) return cudaErrorInvalidValue;
  RecurrentPlan plan;
  cudaError_t error = make_plan(params, plan);
  if (error == cudaSuccess) error = plan.prepare(workspace, stream);
  return error == cudaSuccess ? run_of_type(plan) : error;
}

// One block for each row, threads along it.
template <class T>
__global__ void recurrent_taken_rows_kernel(const T* input, const int64_t* lengths, T* taken, int64_t batch,
                                            int64_t rows, int64_t width) {
  for (int64_t row = block_index(); row < rows; row += static_cast<int64_t>(gridDim.x) * gridDim.y) {
    const bool is_taken = row / batch < lengths[row % batch];
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      taken[row * width + i] = is_taken ? input[row * width + i] : T{};
    }
  }
}

}  // namespace
}  // namespace fusewright::cuda

using namespace fusewright;

int fusewright_cuda_recurrent_forward_workspace(const RecurrentForwardStepsParams* params, int64_t* bytes) {
  return cuda::workspace_bytes(*params, cuda::plan_forward, bytes);
}

int fusewright_cuda_recurrent_forward(const RecurrentForwardStepsParams* params, void* workspace, void* stream) {
  return cuda::run(*params, workspace, stream, cuda::plan_forward, [&](const cuda::RecurrentPlan& plan) {
    return params->dtype == DataType::bfloat16 ? cuda::recurrent_forward<__nv_bfloat16>(*params, plan, stream)
                                               : cuda::recurrent_forward<__half>(*params, plan, stream);
  });
}

int fusewright_cuda_recurrent_backward_workspace(const RecurrentBackwardStepsParams* params, int64_t* bytes) {
  return cuda::workspace_bytes(*params, cuda::plan_backward, bytes);
}

int fusewright_cuda_recurrent_backward(const RecurrentBackwardStepsParams* params, void* workspace, void* stream) {
  return cuda::run(*params, workspace, stream, cuda::plan_backward, [&](const cuda::RecurrentPlan& plan) {
    return params->dtype == DataType::bfloat16 ? cuda::recurrent_backward<__nv_bfloat16>(*params, plan, stream)
                                               : cuda::recurrent_backward<__half>(*params, plan, stream);
  });
}

int fusewright_cuda_recurrent_taken_rows(const void* input, const int64_t* lengths, void* taken, int64_t time,
                                         int64_t batch, int64_t width, void* stream) {
  if (time * batch * width == 0) return cudaSuccess;
  return cuda::launch(cuda::recurrent_taken_rows_kernel<uint16_t>, cuda::grid_of(time * batch), dim3(256), 0, stream,
                      static_cast<const uint16_t*>(input), lengths, static_cast<uint16_t*>(taken), batch, time * batch,
                      width);
}
