// Parameters of a cross-entropy call from its tensors, the same for the CPU and the CUDA kernels.
#pragma once

#include "fusewright/cross_entropy.h"
#include "tensor_rows.h"

namespace fusewright::ops {

// The numbers of a call, in the order of the schemas.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// Tensors in the form the kernels take, held for as long as they run.
struct HeldTargets {
  Tensor target;
  std::optional<Tensor> weight;
};

inline HeldTargets hold_targets(const Tensor& target, const std::optional<Tensor>& weight) {
  HeldTargets held{target, std::nullopt};
  if (target.scalar_type() == ScalarType::Long) held.target = torch::stable::contiguous(target);
  if (weight.has_value()) held.weight = torch::stable::contiguous(*weight);
  return held;
}

// Everything but the gradients or losses. `statistics`: (3, M) contiguous.
inline void set_cross_entropy(CrossEntropyParams& params, const Tensor& input, const HeldTargets& held,
                              const Tensor& statistics, const CrossEntropyOptions& options) {
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
inline Tensor empty_loss_rows(const Tensor& input, bool statistics) {
  int64_t sizes[64];
  int64_t ndim = 0;
  if (statistics) sizes[ndim++] = 3;
  for (int64_t dim = 0; dim < input.dim(); ++dim) {
    if (dim != 1) sizes[ndim++] = input.size(dim);
  }
  return empty(sizes, ndim, ScalarType::Float, input);
}

}  // namespace fusewright::ops
