// A strided tensor seen as rows: how every row-wise kernel (normalisation, softmax) receives its operands.
// Plain C++ without torch; the same struct is passed by value to CUDA kernels.
#pragma once

#include <cstdint>

// Always inlined: the same inline function in CPU sources of different instruction sets could otherwise be merged
// into the copy that the machine cannot run.
#if defined(__CUDACC__)
#define FUSEWRIGHT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSEWRIGHT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fusewright {

enum class DataType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// More dimensions than this, after merging the mergeable, are refused in Python before a kernel is chosen.
constexpr int max_row_view_dims = 12;

// Element (row, column) lies at data + offset(outer index of row) + offset(inner index of column), in elements.
// Dimensions run from slowest to fastest. Sizes and strides are those of the tensor with adjacent dimensions merged
// where their strides allow, so the common contiguous tensor has one outer and one inner dimension.
struct RowView {
  void* data = nullptr;  // nullptr: the operand is absent
  DataType dtype = DataType::float32;
  int32_t outer_dims = 0;
  int32_t inner_dims = 0;
  int64_t outer_size[max_row_view_dims];
  int64_t outer_stride[max_row_view_dims];
  int64_t inner_size[max_row_view_dims];
  int64_t inner_stride[max_row_view_dims];

  // Offset of the first element of a row.
  FUSEWRIGHT_HOST_DEVICE int64_t row_offset(int64_t row) const {
    int64_t offset = 0;
    for (int dim = outer_dims - 1; dim > 0; --dim) {
      offset += (row % outer_size[dim]) * outer_stride[dim];
      row /= outer_size[dim];
    }
    return outer_dims > 0 ? offset + row * outer_stride[0] : offset;
  }

  // Offset of a column within its row.
  FUSEWRIGHT_HOST_DEVICE int64_t column_offset(int64_t column) const {
    int64_t offset = 0;
    for (int dim = inner_dims - 1; dim > 0; --dim) {
      offset += (column % inner_size[dim]) * inner_stride[dim];
      column /= inner_size[dim];
    }
    return inner_dims > 0 ? offset + column * inner_stride[0] : offset;
  }

  // Whether the elements of a row are adjacent in memory.
  FUSEWRIGHT_HOST_DEVICE bool unit_inner_stride() const {
    return inner_dims == 0 || (inner_dims == 1 && inner_stride[0] == 1);
  }
};

}  // namespace fusewright
