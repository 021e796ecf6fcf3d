// The entries that a test of mutated recurrent kernels calls: an LSTM's forward in bfloat16, without biases or lengths,
// and its backward for the gradient of the output. The faults are in the sources; `planted` says which of them acts.

#include "recurrent_backward.cuh"
#include "recurrent_forward.cuh"

using namespace fusewright;

extern "C" int planted;
int planted = 0;

extern "C" int64_t workspace_bytes(int64_t batch, int64_t hidden) {
  RecurrentStepsParams params = {};
  params.dtype = DataType::bfloat16;
  params.batch = batch;
  params.hidden = hidden;
  cuda::RecurrentPlan plan;
  cuda::plan_recurrent<1>(params, 4, plan);
  return plan.workspace_bytes();
}

extern "C" int forward(const void* from_input, const void* h0, const void* c0, const void* weight, void* output,
                       void* h_n, void* c_n, void* gates, float* cells, void* workspace, int64_t time, int64_t batch,
                       int64_t hidden) {
  RecurrentForwardStepsParams params = {};
  params.cell = RecurrentCell::lstm;
  params.dtype = DataType::bfloat16;
  params.time = time;
  params.batch = batch;
  params.hidden = hidden;
  params.h0 = h0;
  params.c0 = c0;
  params.from_input = from_input;
  params.weight_hh = weight;
  params.output = output;
  params.h_n = h_n;
  params.c_n = c_n;
  params.gates = gates;
  params.cells = cells;
  cuda::RecurrentPlan plan;
  cudaError_t error = cuda::plan_recurrent<4>(params, 1, plan);
  if (error == cudaSuccess) error = plan.prepare(workspace, nullptr);
  if (error != cudaSuccess) return error;
  return cuda::recurrent_forward_of_cell<__nv_bfloat16, RecurrentCell::lstm>(params, plan, nullptr);
}

extern "C" int backward(const void* grad_output, const void* output, const void* gates, const float* cells,
                        const void* h0, const void* c0, const void* weight_transposed, void* grad_h0, void* grad_c0,
                        void* grad_gates, void* workspace, int64_t time, int64_t batch, int64_t hidden) {
  RecurrentBackwardStepsParams params = {};
  params.cell = RecurrentCell::lstm;
  params.dtype = DataType::bfloat16;
  params.time = time;
  params.batch = batch;
  params.hidden = hidden;
  params.h0 = h0;
  params.c0 = c0;
  params.weight_hh_transposed = weight_transposed;
  params.output = output;
  params.gates = gates;
  params.cells = cells;
  params.grad_output = grad_output;
  params.grad_h0 = grad_h0;
  params.grad_c0 = grad_c0;
  params.grad_gates = grad_gates;
  cuda::RecurrentPlan plan;
  cudaError_t error = cuda::plan_recurrent<1>(params, 4, plan);
  if (error == cudaSuccess) error = plan.prepare(workspace, nullptr);
  if (error != cudaSuccess) return error;
  return cuda::recurrent_backward_of_cell<__nv_bfloat16, RecurrentCell::lstm>(params, plan, nullptr);
}
