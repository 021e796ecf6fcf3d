// CPU kernels of the cross-entropy ops, attached to the schemas of fusewright_kernels/library/cross_entropy.py.

#include <torch/csrc/stable/library.h>

#include "fusewright/cross_entropy.h"
#include "parallel.h"
#include "tensor_rows.h"

namespace fusewright::ops {
namespace {

// The numbers of a call, in the order of the schemas.
struct Options {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// Tensors in the form the kernels take, held for as long as they run.
struct Held {
  Tensor target;
  std::optional<Tensor> weight;
};

Held hold(const Tensor& target, const std::optional<Tensor>& weight) {
  Held held{target, std::nullopt};
  if (target.scalar_type() == ScalarType::Long) held.target = torch::stable::contiguous(target);
  if (weight.has_value()) held.weight = torch::stable::contiguous(*weight);
  return held;
}

// Everything but the gradients or losses. `statistics`: (3, M) contiguous.
void set_params(CrossEntropyParams& params, const Tensor& input, const Held& held, const Tensor& statistics,
                const Options& options) {
  params.columns = input.size(1);
  params.rows = product_of_sizes(input, 0, 1) * product_of_sizes(input, 2, input.dim());
  params.input = row_view_along(input, 1);
  if (held.target.scalar_type() == ScalarType::Long) {
    params.target = static_cast<const int64_t*>(held.target.data_ptr());
  } else {
    params.probabilities = row_view_along(held.target, 1);
  }
  if (held.weight.has_value()) params.weight = static_cast<const float*>(held.weight->data_ptr());
  params.ignore_index = options.ignore_index;
  params.label_smoothing = options.label_smoothing;
  params.z_loss = static_cast<float>(options.z_loss);
  params.softcap = static_cast<float>(options.softcap);
  params.largest = static_cast<float*>(statistics.data_ptr());
  params.log_sum = params.largest + params.rows;
  params.mass = params.log_sum + params.rows;
}

// float32 (N, d1, ...), or (3, N, d1, ...).
Tensor empty_rows(const Tensor& input, bool statistics) {
  int64_t sizes[64];
  int64_t ndim = 0;
  if (statistics) sizes[ndim++] = 3;
  for (int64_t dim = 0; dim < input.dim(); ++dim) {
    if (dim != 1) sizes[ndim++] = input.size(dim);
  }
  return empty(sizes, ndim, ScalarType::Float, input);
}

std::tuple<Tensor, Tensor> forward(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t ignore_index,
                                   double label_smoothing, double z_loss, double softcap) {
  Tensor losses = empty_rows(input, false), statistics = empty_rows(input, true);
  const Held held = hold(target, weight);
  CrossEntropyForwardParams params;
  set_params(params, input, held, statistics, {ignore_index, label_smoothing, z_loss, softcap});
  params.losses = static_cast<float*>(losses.data_ptr());
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.cross_entropy_forward(params, begin, end); });
  return {losses, statistics};
}

void run_backward(const Tensor& grad_losses, const Tensor& input, const Tensor& target,
                  const std::optional<Tensor>& weight, const Tensor& statistics, const Options& options,
                  const Tensor* grad_input, const Tensor* grad_target) {
  const Held held = hold(target, weight);
  const Tensor grad = torch::stable::contiguous(grad_losses), kept = torch::stable::contiguous(statistics);
  CrossEntropyBackwardParams params;
  set_params(params, input, held, kept, options);
  params.grad_losses = static_cast<const float*>(grad.data_ptr());
  if (grad_input != nullptr) params.grad_input = row_view_along(*grad_input, 1);
  if (grad_target != nullptr) params.grad_target = row_view_along(*grad_target, 1);
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.cross_entropy_backward(params, begin, end); });
}

std::tuple<Tensor, Tensor> backward(Tensor grad_losses, Tensor input, Tensor target, std::optional<Tensor> weight,
                                    Tensor statistics, int64_t ignore_index, double label_smoothing, double z_loss,
                                    double softcap, bool need_input, bool need_target) {
  Tensor grad_input = need_input ? empty_like(input, input.scalar_type()) : no_elements(input.scalar_type(), input);
  Tensor grad_target =
      need_target ? empty_like(target, target.scalar_type()) : no_elements(target.scalar_type(), target);
  run_backward(grad_losses, input, target, weight, statistics, {ignore_index, label_smoothing, z_loss, softcap},
               need_input ? &grad_input : nullptr, need_target ? &grad_target : nullptr);
  return {grad_input, grad_target};
}

void backward_out(Tensor grad_losses, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor statistics,
                  int64_t ignore_index, double label_smoothing, double z_loss, double softcap, Tensor grad_input) {
  run_backward(grad_losses, input, target, weight, statistics, {ignore_index, label_smoothing, z_loss, softcap},
               &grad_input, nullptr);
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("cross_entropy_forward.cpu", TORCH_BOX(&fusewright::ops::forward));
  library.impl("cross_entropy_backward.cpu", TORCH_BOX(&fusewright::ops::backward));
  library.impl("cross_entropy_backward_out.cpu", TORCH_BOX(&fusewright::ops::backward_out));
}
