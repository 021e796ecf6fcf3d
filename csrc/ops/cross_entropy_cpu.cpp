// CPU kernels of the cross-entropy ops, attached to the schemas of fusewright_kernels/library/cross_entropy.py.

#include <torch/csrc/stable/library.h>

#include "cross_entropy_params.h"
#include "parallel.h"

namespace fusewright::ops {
namespace {

std::tuple<Tensor, Tensor> forward(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t ignore_index,
                                   double label_smoothing, double z_loss, double softcap) {
  Tensor losses = empty_loss_rows(input, false), statistics = empty_loss_rows(input, true);
  const HeldTargets held = hold_targets(target, weight);
  CrossEntropyForwardParams params;
  set_cross_entropy(params, input, held, statistics, {ignore_index, label_smoothing, z_loss, softcap});
  params.losses = static_cast<float*>(losses.data_ptr());
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(params.rows, params.columns,
                [&](int64_t begin, int64_t end) { kernels.cross_entropy_forward(params, begin, end); });
  return {losses, statistics};
}

void run_backward(const Tensor& grad_losses, const Tensor& input, const Tensor& target,
                  const std::optional<Tensor>& weight, const Tensor& statistics, const CrossEntropyOptions& options,
                  const Tensor* grad_input, const Tensor* grad_target) {
  const HeldTargets held = hold_targets(target, weight);
  const Tensor grad = torch::stable::contiguous(grad_losses), kept = torch::stable::contiguous(statistics);
  CrossEntropyBackwardParams params;
  set_cross_entropy(params, input, held, kept, options);
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
