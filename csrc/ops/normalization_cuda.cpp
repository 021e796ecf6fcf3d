// CUDA kernels of the normalisation ops, attached to the schemas of fusewright_kernels/library/normalization.py.

#include <torch/csrc/stable/library.h>

#include "cuda_call.h"
#include "normalization_params.h"

namespace fusewright::ops {
namespace {

void run_forward(const CudaCall& call, const NormForwardParams& params) {
  call.check(fusewright_cuda_norm_forward(&params, call.stream()));
}

void run_backward(const CudaCall& call, const NormBackwardParams& params, const Tensor& like) {
  int64_t bytes = 0;
  call.check(fusewright_cuda_norm_backward_workspace(&params, &bytes));
  const int64_t elements = bytes / static_cast<int64_t>(sizeof(float));
  // Freed before the kernels have run; torch's allocator hands it out again to the same stream only.
  const Tensor workspace = empty(&elements, 1, ScalarType::Float, like);
  call.check(fusewright_cuda_norm_backward(&params, static_cast<float*>(workspace.data_ptr()), call.stream()));
}

std::tuple<Tensor, Tensor> norm_forward(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                        int64_t normalized_ndim, double eps, bool center, double weight_offset,
                                        bool save_statistics) {
  const CudaCall call("norm_forward", input);
  NormForwardParams params = norm_forward_params(input, weight, bias, normalized_ndim, eps, center, weight_offset);
  Tensor output = empty_like(input, input.scalar_type());
  Tensor statistics = save_statistics ? empty_statistics(params, input) : no_elements(ScalarType::Float, input);
  params.output = output.data_ptr();
  if (save_statistics) params.statistics = static_cast<float*>(statistics.data_ptr());
  run_forward(call, params);
  return {output, statistics};
}

void norm_forward_out(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t normalized_ndim,
                      double eps, bool center, double weight_offset, Tensor output) {
  const CudaCall call("norm_forward_out", input);
  NormForwardParams params = norm_forward_params(input, weight, bias, normalized_ndim, eps, center, weight_offset);
  params.output = output.data_ptr();
  run_forward(call, params);
}

std::tuple<Tensor, Tensor, Tensor> add_norm_forward(Tensor input, Tensor residual, std::optional<Tensor> weight,
                                                    std::optional<Tensor> bias, std::optional<Tensor> seed,
                                                    int64_t normalized_ndim, double eps, bool center,
                                                    double weight_offset, double dropout_p, ScalarType residual_type,
                                                    bool save_statistics) {
  const CudaCall call("add_norm_forward", input);
  NormForwardParams params = norm_forward_params(input, weight, bias, normalized_ndim, eps, center, weight_offset);
  params.residual = row_view(residual, normalized_ndim);
  set_dropout(seed, dropout_p, &params.seed, &params.keep_threshold, &params.keep_scale);
  Tensor output = empty_like(input, input.scalar_type());
  Tensor new_residual = empty_like(input, residual_type);
  Tensor statistics = save_statistics ? empty_statistics(params, input) : no_elements(ScalarType::Float, input);
  params.output = output.data_ptr();
  params.new_residual = row_view(new_residual, normalized_ndim);
  if (save_statistics) params.statistics = static_cast<float*>(statistics.data_ptr());
  run_forward(call, params);
  return {output, new_residual, statistics};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad_output, Tensor input, Tensor statistics,
                                                 std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                 int64_t normalized_ndim, bool center, double weight_offset,
                                                 bool need_input, bool need_weight, bool need_bias) {
  const CudaCall call("norm_backward", grad_output);
  NormBackwardResult result = norm_backward_params(
      grad_output, std::nullopt, input, statistics, weight, bias, std::nullopt, normalized_ndim, center, weight_offset,
      0.0, input.scalar_type(), std::nullopt, need_input, false, need_weight, need_bias);
  run_backward(call, result.params, grad_output);
  return {result.grad_input, result.grad_weight, result.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    Tensor grad_output, std::optional<Tensor> grad_new_residual, Tensor new_residual, Tensor statistics,
    std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> seed, int64_t normalized_ndim,
    bool center, double weight_offset, double dropout_p, ScalarType input_type, ScalarType residual_type,
    bool need_input, bool need_residual, bool need_weight, bool need_bias) {
  const CudaCall call("add_norm_backward", grad_output);
  NormBackwardResult result = norm_backward_params(
      grad_output, grad_new_residual, new_residual, statistics, weight, bias, seed, normalized_ndim, center,
      weight_offset, dropout_p, input_type, residual_type, need_input, need_residual, need_weight, need_bias);
  run_backward(call, result.params, grad_output);
  return {result.grad_input, result.grad_residual, result.grad_weight, result.grad_bias};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, FUSEWRIGHT_CUDA_KEY, library) {
  library.impl("norm_forward.cuda", TORCH_BOX(&fusewright::ops::norm_forward));
  library.impl("norm_forward_out.cuda", TORCH_BOX(&fusewright::ops::norm_forward_out));
  library.impl("norm_backward.cuda", TORCH_BOX(&fusewright::ops::norm_backward));
  library.impl("add_norm_forward.cuda", TORCH_BOX(&fusewright::ops::add_norm_forward));
  library.impl("add_norm_backward.cuda", TORCH_BOX(&fusewright::ops::add_norm_backward));
}
