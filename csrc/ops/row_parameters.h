// Parameters that all rows of a call share, as CPU kernels take them, and their gradients, which are sums over rows.
#pragma once

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "tensor_rows.h"

namespace fusewright::ops {

inline int64_t whole_blocks(const CpuKernels& kernels, int64_t columns) {
  return (columns + kernels.parameter_block - 1) / kernels.parameter_block;
}

// A parameter as the kernels take it: itself where it is float32 in whole blocks, in order and without an offset.
class FloatParameter {
 public:
  FloatParameter(const CpuKernels& kernels, const RowView& view, int64_t columns, float offset, bool pair_order) {
    if (view.data == nullptr) return;
    if (view.dtype == DataType::float32 && view.unit_inner_stride() && offset == 0.0f && !pair_order &&
        columns % kernels.parameter_block == 0) {
      values_ = static_cast<const float*>(view.data);
      return;
    }
    converted_.reset(new float[whole_blocks(kernels, columns) * kernels.parameter_block]);
    kernels.parameter_to_float(view, columns, offset, pair_order, converted_.get());
    values_ = converted_.get();
  }
  const float* values() const { return values_; }

 private:
  const float* values_ = nullptr;
  std::unique_ptr<float[]> converted_;
};

// Chunks of rows with one partial sum each. Their number depends on the shape alone, so a gradient has the same bits
// for every number of threads; it feeds 64 threads and keeps the partial sums below an eighth of the input.
struct RowChunks {
  static constexpr int64_t most = 64;
  static constexpr int64_t least_rows = 16;

  explicit RowChunks(int64_t all_rows)
      : all(all_rows), rows(std::max(least_rows, (all_rows + most - 1) / most)), count((all_rows + rows - 1) / rows) {}
  int64_t begin(int64_t chunk) const { return chunk * rows; }
  int64_t end(int64_t chunk) const { return std::min(all, (chunk + 1) * rows); }

  int64_t all;
  int64_t rows;
  int64_t count;
};

// gradient = the chunks' sums, added in order; each chunk's are whole blocks of parameters.
inline void reduce_chunks(const CpuKernels& kernels, const float* sums, const RowChunks& chunks, int64_t columns,
                          bool pair_order, const RowView& gradient) {
  parallel_rows(whole_blocks(kernels, columns), chunks.count * kernels.parameter_block,
                [&](int64_t begin, int64_t end) {
                  kernels.norm_backward_reduce(sums, chunks.count, columns, pair_order, gradient, begin, end);
                });
}

}  // namespace fusewright::ops
