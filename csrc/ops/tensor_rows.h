// Between torch tensors and the torch-free kernels: row views of a tensor, and fresh contiguous outputs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>
#include <tuple>

#include "fusewright/row_view.h"

namespace fusewright::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DataType data_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DataType::float32;
    case ScalarType::BFloat16:
      return DataType::bfloat16;
    case ScalarType::Half:
      return DataType::float16;
    default:
      STD_TORCH_CHECK(false, "dtype is ", static_cast<int>(type), ", expected float32, bfloat16 or float16");
  }
}

// Merges dimensions [begin, end) of a tensor where their strides allow; dimensions of size 1 vanish.
inline int32_t merge_dimensions(const Tensor& tensor, int64_t begin, int64_t end, int64_t* sizes, int64_t* strides) {
  int32_t count = 0;
  for (int64_t dim = begin; dim < end; ++dim) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 1) continue;
    if (count > 0 && strides[count - 1] == size * stride) {
      sizes[count - 1] *= size;
      strides[count - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(count < max_row_view_dims, "a tensor has more than ", max_row_view_dims, " unmergeable dimensions");
    sizes[count] = size;
    strides[count] = stride;
    ++count;
  }
  return count;
}

// The leading dimensions as rows and the last `inner_ndim` as columns.
inline RowView row_view(const Tensor& tensor, int64_t inner_ndim) {
  RowView view;
  view.data = tensor.data_ptr();
  view.dtype = data_type(tensor.scalar_type());
  const int64_t ndim = tensor.dim();
  view.outer_dims = merge_dimensions(tensor, 0, ndim - inner_ndim, view.outer_size, view.outer_stride);
  view.inner_dims = merge_dimensions(tensor, ndim - inner_ndim, ndim, view.inner_size, view.inner_stride);
  return view;
}

inline RowView row_view(const std::optional<Tensor>& tensor, int64_t inner_ndim) {
  return tensor.has_value() ? row_view(*tensor, inner_ndim) : RowView{};
}

// Rows along dimension `dim`: the others, in order, are the rows.
inline RowView row_view_along(const Tensor& tensor, int64_t dim) {
  RowView view;
  view.data = tensor.data_ptr();
  view.dtype = data_type(tensor.scalar_type());
  view.outer_dims = merge_dimensions(tensor, 0, dim, view.outer_size, view.outer_stride);
  int64_t sizes[max_row_view_dims], strides[max_row_view_dims];
  const int32_t behind = merge_dimensions(tensor, dim + 1, tensor.dim(), sizes, strides);
  STD_TORCH_CHECK(view.outer_dims + behind <= max_row_view_dims, "a tensor has more than ", max_row_view_dims,
                  " unmergeable dimensions");
  for (int32_t i = 0; i < behind; ++i) {
    view.outer_size[view.outer_dims] = sizes[i];
    view.outer_stride[view.outer_dims] = strides[i];
    ++view.outer_dims;
  }
  view.inner_dims = merge_dimensions(tensor, dim, dim + 1, view.inner_size, view.inner_stride);
  return view;
}

inline int64_t product_of_sizes(const Tensor& tensor, int64_t begin, int64_t end) {
  int64_t product = 1;
  for (int64_t dim = begin; dim < end; ++dim) product *= tensor.size(dim);
  return product;
}

// Asks for huge pages behind a large fresh CPU buffer. The C library returns such buffers to the system when they are
// freed, so every call would fault each 4 KB page in anew: measured on a virtual machine, 8000 faults took five times
// as long as the kernel that writes the pages. On memory that is mapped already, and where huge pages are off, it does
// nothing.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t huge_page = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(2 * huge_page)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge_page * huge_page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A tensor on the device of `like`. By the C function, which costs a quarter of the boxed empty op.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t ndim, ScalarType type,
                            const Tensor& like) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  // The stable interface has the dtype's number only as that of an existing tensor or by name.
  switch (type) {
    case ScalarType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    case ScalarType::Int:
      dtype = aoti_torch_dtype_int32();
      break;
    case ScalarType::Long:
      dtype = aoti_torch_dtype_int64();
      break;
    default:
      dtype = aoti_torch_dtype_float32();
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes, strides, dtype, device_type, device_index, &handle));
  Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    prefer_huge_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  }
  return tensor;
}

inline Tensor empty(const int64_t* sizes, int64_t ndim, ScalarType type, const Tensor& like) {
  int64_t strides[64];
  int64_t stride = 1;
  for (int64_t dim = ndim - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= sizes[dim] > 1 ? sizes[dim] : 1;
  }
  return empty_strided(sizes, strides, ndim, type, like);
}

inline Tensor empty_like(const Tensor& tensor, ScalarType type) {
  int64_t sizes[64];
  const int64_t ndim = tensor.dim();
  for (int64_t dim = 0; dim < ndim; ++dim) sizes[dim] = tensor.size(dim);
  return empty(sizes, ndim, type, tensor);
}

// What an op returns for a gradient that was not asked for.
inline Tensor no_elements(ScalarType type, const Tensor& like) {
  const int64_t size = 0;
  return empty(&size, 1, type, like);
}

}  // namespace fusewright::ops
