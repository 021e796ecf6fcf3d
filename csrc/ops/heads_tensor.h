// (B, heads, length, width) tensors of attention: views for the kernels, and fresh tensors in the same layout.
#pragma once

#include "fusewright/attention.h"
#include "tensor_rows.h"

namespace fusewright::ops {

inline HeadsView heads_view(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4 && (tensor.stride(3) == 1 || tensor.size(3) <= 1 || tensor.numel() == 0),
                  "attention takes (B, H, T, D) tensors of unit last stride");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Empty (sizes[0..3]), in memory as (B, T, H, D) if `like` is, else contiguous; library.in_layout_of does the same.
inline Tensor empty_in_layout_of(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t width) {
  const bool length_first = like.stride(1) < like.stride(2);
  const auto extent = [](int64_t size) { return size > 1 ? size : 1; };
  const int64_t sizes[4] = {batch, heads, length, width};
  const int64_t row = extent(width), matrix = extent(heads) * extent(length) * row;
  const int64_t length_first_strides[4] = {matrix, row, extent(heads) * row, 1};
  const int64_t heads_first_strides[4] = {matrix, extent(length) * row, row, 1};
  return empty_strided(sizes, length_first ? length_first_strides : heads_first_strides, 4, like.scalar_type(), like);
}

}  // namespace fusewright::ops
