// CPU kernels of the normalisation ops, attached to the schemas of fusewright_kernels/library/normalization.py.

#include <torch/csrc/stable/library.h>

#include <memory>

#include "fusewright/cpu/kernels.h"
#include "fusewright/cpu/pair_order.h"
#include "normalization_params.h"
#include "parallel.h"
#include "row_parameters.h"

namespace fusewright::ops {
namespace {

void run_forward(const NormForwardParams& params) {
  if (params.rows == 0 || params.columns == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const bool pair_order = takes_pair_order(params);
  const FloatParameter weight(kernels, params.weight, params.columns, params.weight_offset, pair_order);
  const FloatParameter bias(kernels, params.bias, params.columns, 0.0f, pair_order);
  parallel_rows(params.rows, params.columns, [&](int64_t begin, int64_t end) {
    kernels.norm_forward(params, weight.values(), bias.values(), begin, end);
  });
}

void run_backward(const NormBackwardParams& params) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t columns = params.columns;
  const bool pair_order = takes_pair_order(params);
  const RowChunks chunks(params.rows);
  const int64_t blocks = whole_blocks(kernels, columns), sums_stride = blocks * kernels.parameter_block;
  const FloatParameter weight(kernels, params.weight, columns, params.weight_offset, pair_order);
  std::unique_ptr<float[]> weight_sums, bias_sums;
  if (params.grad_weight.data != nullptr) weight_sums.reset(new float[chunks.count * sums_stride]);
  if (params.grad_bias.data != nullptr) bias_sums.reset(new float[chunks.count * sums_stride]);
  if (columns == 0) return;
  const auto chunk_sums = [&](float* sums, int64_t chunk) {
    return sums == nullptr ? nullptr : sums + chunk * sums_stride;
  };
  parallel_rows(chunks.count, chunks.rows * columns, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernels.norm_backward(params, weight.values(), chunks.begin(chunk), chunks.end(chunk),
                            chunk_sums(weight_sums.get(), chunk), chunk_sums(bias_sums.get(), chunk));
    }
  });
  const auto reduce = [&](const float* sums, const RowView& gradient) {
    if (sums != nullptr) reduce_chunks(kernels, sums, chunks, columns, pair_order, gradient);
  };
  reduce(weight_sums.get(), params.grad_weight);
  reduce(bias_sums.get(), params.grad_bias);
}

// Statistics of a call that saves none. Without a derivative nobody looks at them, so all such calls share one tensor:
// an allocation is a seventh of a small call. Never freed, as torch may be gone when this library's statics are.
const Tensor& unsaved_statistics(const Tensor& like) {
  static const Tensor& shared = *new Tensor(no_elements(ScalarType::Float, like));
  return shared;
}

std::tuple<Tensor, Tensor> norm_forward(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                        int64_t normalized_ndim, double eps, bool center, double weight_offset,
                                        bool save_statistics) {
  NormForwardParams params = norm_forward_params(input, weight, bias, normalized_ndim, eps, center, weight_offset);
  Tensor output = empty_like(input, input.scalar_type());
  Tensor statistics = save_statistics ? empty_statistics(params, input) : unsaved_statistics(input);
  params.output = output.data_ptr();
  if (save_statistics) params.statistics = static_cast<float*>(statistics.data_ptr());
  run_forward(params);
  return {output, statistics};
}

void norm_forward_out(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t normalized_ndim,
                      double eps, bool center, double weight_offset, Tensor output) {
  NormForwardParams params = norm_forward_params(input, weight, bias, normalized_ndim, eps, center, weight_offset);
  params.output = output.data_ptr();
  run_forward(params);
}

std::tuple<Tensor, Tensor, Tensor> add_norm_forward(Tensor input, Tensor residual, std::optional<Tensor> weight,
                                                    std::optional<Tensor> bias, std::optional<Tensor> seed,
                                                    int64_t normalized_ndim, double eps, bool center,
                                                    double weight_offset, double dropout_p, ScalarType residual_type,
                                                    bool save_statistics) {
  NormForwardParams params = norm_forward_params(input, weight, bias, normalized_ndim, eps, center, weight_offset);
  params.residual = row_view(residual, normalized_ndim);
  set_dropout(seed, dropout_p, &params.seed, &params.keep_threshold, &params.keep_scale);
  Tensor output = empty_like(input, input.scalar_type());
  Tensor new_residual = empty_like(input, residual_type);
  Tensor statistics = save_statistics ? empty_statistics(params, input) : unsaved_statistics(input);
  params.output = output.data_ptr();
  params.new_residual = row_view(new_residual, normalized_ndim);
  if (save_statistics) params.statistics = static_cast<float*>(statistics.data_ptr());
  run_forward(params);
  return {output, new_residual, statistics};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad_output, Tensor input, Tensor statistics,
                                                 std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                 int64_t normalized_ndim, bool center, double weight_offset,
                                                 bool need_input, bool need_weight, bool need_bias) {
  NormBackwardResult result = norm_backward_params(
      grad_output, std::nullopt, input, statistics, weight, bias, std::nullopt, normalized_ndim, center, weight_offset,
      0.0, input.scalar_type(), std::nullopt, need_input, false, need_weight, need_bias);
  run_backward(result.params);
  return {result.grad_input, result.grad_weight, result.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    Tensor grad_output, std::optional<Tensor> grad_new_residual, Tensor new_residual, Tensor statistics,
    std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> seed, int64_t normalized_ndim,
    bool center, double weight_offset, double dropout_p, ScalarType input_type, ScalarType residual_type,
    bool need_input, bool need_residual, bool need_weight, bool need_bias) {
  NormBackwardResult result = norm_backward_params(
      grad_output, grad_new_residual, new_residual, statistics, weight, bias, seed, normalized_ndim, center,
      weight_offset, dropout_p, input_type, residual_type, need_input, need_residual, need_weight, need_bias);
  run_backward(result.params);
  return {result.grad_input, result.grad_residual, result.grad_weight, result.grad_bias};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("norm_forward.cpu", TORCH_BOX(&fusewright::ops::norm_forward));
  library.impl("norm_forward_out.cpu", TORCH_BOX(&fusewright::ops::norm_forward_out));
  library.impl("norm_backward.cpu", TORCH_BOX(&fusewright::ops::norm_backward));
  library.impl("add_norm_forward.cpu", TORCH_BOX(&fusewright::ops::add_norm_forward));
  library.impl("add_norm_backward.cpu", TORCH_BOX(&fusewright::ops::add_norm_backward));
}
