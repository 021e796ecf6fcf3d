// Which kernels a normalisation backward runs and over how many blocks: a function of the shape, the layout and the
// device alone, so that the order of every sum is fixed for a device.
#pragma once

#include "fusewright/cuda/launch.cuh"
#include "fusewright/normalization.h"

namespace fusewright::cuda {

// Rows whose parameter gradients one float32 sum takes in before it is added to a longer one: the error of a sum of k
// terms grows with k, that of a sum of sums with their lengths only.
constexpr int rows_per_flush = 256;

constexpr int backward_elements = 8;         // of a thread
constexpr int backward_lanes = 16;           // threads of a row in the lanes kernel
constexpr int backward_lanes_threads = 256;  // of a block of the lanes and warp kernels
constexpr int backward_shared_threads = 1024;
constexpr int backward_column_threads = 128;  // of a block of the parameters kernel

// Threads of a multiprocessor that find registers.
constexpr int backward_resident_threads = 768;

enum class ColumnLayout { vectors, strided, any };

// Kernels by row width: lanes, warp and block keep sums in registers, shared in shared memory. The wide ones are two,
// for the gradients of the stream and of the parameters.
enum class NormBackwardKernel { lanes, warp, block, shared, wide };

struct NormBackwardPlan {
  ColumnLayout layout = ColumnLayout::any;
  NormBackwardKernel kernel = NormBackwardKernel::wide;
  int threads = 0;     // of a block
  int64_t blocks = 0;  // that go over the rows; for wide rows, along the columns of the parameters kernel
  int64_t shared_bytes = 0;
  int64_t partials = 0;          // rows of the workspace for each parameter
  int64_t rows_per_partial = 0;  // for wide rows
};

// Threads that a block may have and keep its sums in registers; element by element, addresses take registers too.
constexpr int backward_block_threads(bool vectors) { return vectors ? backward_resident_threads : 512; }

inline ColumnLayout column_layout(const NormBackwardParams& params) {
  const auto operands = {&params.grad_output, &params.grad_new_residual, &params.stream,
                         &params.weight,      &params.grad_input,        &params.grad_residual};
  if (take_vectors(operands, params.columns, 16 / size_of(params.grad_output.dtype))) return ColumnLayout::vectors;
  return have_one_stride(operands) && !params.fused_residual ? ColumnLayout::strided : ColumnLayout::any;
}

inline NormBackwardPlan plan_norm_backward(const NormBackwardParams& params, const DeviceLimits& limits) {
  NormBackwardPlan plan;
  plan.layout = column_layout(params);
  const int64_t columns = params.columns;
  const bool vectors = plan.layout == ColumnLayout::vectors;
  const int64_t shared_tile = backward_shared_threads * backward_elements;
  const int64_t shared_bytes = 2 * static_cast<int64_t>(sizeof(float)) * ceil_div(columns, shared_tile) * shared_tile;

  int rows_of_block = 1;
  if (plan.layout == ColumnLayout::any) {
    plan.kernel = NormBackwardKernel::wide;
  } else if (vectors && columns <= backward_lanes * backward_elements) {
    plan.kernel = NormBackwardKernel::lanes;
    plan.threads = backward_lanes_threads;
    rows_of_block = backward_lanes_threads / backward_lanes;
  } else if (columns <= 32 * backward_elements) {
    plan.kernel = NormBackwardKernel::warp;
    plan.threads = backward_lanes_threads;
    rows_of_block = backward_lanes_threads / 32;
  } else if (columns <= backward_block_threads(vectors) * backward_elements) {
    plan.kernel = NormBackwardKernel::block;
    plan.threads = threads_for_row(columns, backward_elements);
  } else if (vectors && shared_bytes <= limits.shared_bytes) {
    plan.kernel = NormBackwardKernel::shared;
    plan.threads = backward_shared_threads;
    plan.shared_bytes = shared_bytes;
  } else {
    plan.kernel = NormBackwardKernel::wide;
    if (!vectors) plan.layout = ColumnLayout::any;
  }

  const bool sums_wanted = params.grad_weight.data != nullptr || params.grad_bias.data != nullptr;
  if (plan.kernel == NormBackwardKernel::wide) {
    const int64_t width = vectors ? 16 / size_of(params.grad_output.dtype) : 1;
    plan.threads = std::min(1024, threads_for_row(columns, vectors ? backward_elements : 1));
    plan.blocks = ceil_div(columns, width * backward_column_threads);
    // Enough threads to fill the device, and rows enough for each that the partials' traffic stays small.
    const int64_t filling = ceil_div(16 * limits.multiprocessors, plan.blocks);
    const int64_t most_partials = std::min<int64_t>(ceil_div(params.rows, 32), 65535);
    plan.rows_per_partial = ceil_div(params.rows, std::min(filling, most_partials));
    plan.partials = ceil_div(params.rows, plan.rows_per_partial);
  } else {
    // As many as run at a time. Of those that find fewer than 8 rows each, only enough for one to a multiprocessor:
    // the partials of more would cost as much traffic as they save time.
    const int64_t work = ceil_div(params.rows, rows_of_block);
    const int64_t resident =
        static_cast<int64_t>(limits.multiprocessors) * std::max(1, backward_resident_threads / plan.threads);
    const int64_t sparing = std::max<int64_t>(limits.multiprocessors, ceil_div(work, 8));
    plan.blocks = std::min({work, resident, sums_wanted ? sparing : resident});
    plan.partials = plan.blocks;
  }
  return plan;
}

// Float32 of the workspace: (partials, N) for each wanted parameter gradient, the weight's first.
inline int64_t workspace_elements(const NormBackwardParams& params, const NormBackwardPlan& plan) {
  const int64_t wanted = (params.grad_weight.data != nullptr) + (params.grad_bias.data != nullptr);
  return wanted * plan.partials * params.columns;
}

}  // namespace fusewright::cuda
