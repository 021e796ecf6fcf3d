// Access to rows of a strided tensor: in place where elements are adjacent, gathered in blocks where they are not.
#pragma once

#include <stdlib.h>

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Rows that kernels take at a time. Sixteen rows of a transposed tensor share each cache line of 32 or 64 bytes.
constexpr int64_t row_block = 16;

// Aligned scratch memory of one task.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(bytes > 0 ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {
    // Nothing can be thrown through a parallel region, and no kernel can go on without its scratch.
    if (bytes > 0 && data_ == nullptr) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

// Calls visit(column, offset) for every column of a row, in order.
template <class Visit>
inline void for_each_column(const RowView& view, int64_t columns, Visit visit) {
  if (view.inner_dims <= 1) {
    const int64_t stride = view.inner_dims == 1 ? view.inner_stride[0] : 0;
    for (int64_t column = 0; column < columns; ++column) visit(column, column * stride);
    return;
  }
  const int last = view.inner_dims - 1;
  const int64_t run = view.inner_size[last];
  for (int64_t column = 0; column < columns; column += run) {
    const int64_t base = view.column_offset(column);
    for (int64_t i = 0; i < run; ++i) visit(column + i, base + i * view.inner_stride[last]);
  }
}

// Rows of a tensor as pointers to adjacent elements.
template <class T>
class RowReader {
 public:
  RowReader(const RowView& view, int64_t columns)
      : view_(view),
        columns_(columns),
        in_place_(view.unit_inner_stride()),
        gathered_(in_place_ || view.data == nullptr ? 0 : row_block * columns * sizeof(T)) {}

  // Points rows[0..count) at `count` <= row_block rows from `first`.
  void read(int64_t first, int64_t count, const T* rows[row_block]) const {
    const T* data = static_cast<const T*>(view_.data);
    int64_t offsets[row_block];
    for (int64_t r = 0; r < count; ++r) offsets[r] = view_.row_offset(first + r);
    if (in_place_) {
      for (int64_t r = 0; r < count; ++r) rows[r] = data + offsets[r];
      return;
    }
    T* gathered = gathered_.template as<T>();
    for_each_column(view_, columns_, [&](int64_t column, int64_t offset) {
      for (int64_t r = 0; r < count; ++r) gathered[r * columns_ + column] = data[offsets[r] + offset];
    });
    for (int64_t r = 0; r < count; ++r) rows[r] = gathered + r * columns_;
  }

 private:
  const RowView& view_;
  int64_t columns_;
  bool in_place_;
  Scratch gathered_;
};

// The same for results: rows to write to, and their way into the tensor.
template <class T>
class RowWriter {
 public:
  RowWriter(const RowView& view, int64_t columns)
      : view_(view),
        columns_(columns),
        in_place_(view.unit_inner_stride()),
        staged_(in_place_ || view.data == nullptr ? 0 : row_block * columns * sizeof(T)) {}

  void rows(int64_t first, int64_t count, T* rows[row_block]) const {
    T* data = static_cast<T*>(view_.data);
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = in_place_ ? data + view_.row_offset(first + r) : staged_.template as<T>() + r * columns_;
    }
  }

  // Puts the rows that rows() gave out in their place.
  void commit(int64_t first, int64_t count) const {
    if (in_place_) return;
    T* data = static_cast<T*>(view_.data);
    const T* staged = staged_.template as<T>();
    int64_t offsets[row_block];
    for (int64_t r = 0; r < count; ++r) offsets[r] = view_.row_offset(first + r);
    for_each_column(view_, columns_, [&](int64_t column, int64_t offset) {
      for (int64_t r = 0; r < count; ++r) data[offsets[r] + offset] = staged[r * columns_ + column];
    });
  }

 private:
  const RowView& view_;
  int64_t columns_;
  bool in_place_;
  Scratch staged_;
};

// Calls body(T{}) with the element type of `dtype`.
template <class Body>
inline void with_type(DataType dtype, Body body) {
  switch (dtype) {
    case DataType::float32:
      return body(float{});
    case DataType::bfloat16:
      return body(BFloat16{});
    case DataType::float16:
      return body(Float16{});
  }
}

// target = source as float32, `columns` adjacent elements.
template <class T>
inline void widen(const T* source, float* target, int64_t columns) {
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) store(target + i, load(source + i));
  if (i < columns) store_partial(target + i, load_partial(source + i, columns - i), columns - i);
}

// target = source rounded to T.
template <class T>
inline void narrow(const float* source, T* target, int64_t columns) {
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) store(target + i, load(source + i));
  if (i < columns) store_partial(target + i, load_partial(source + i, columns - i), columns - i);
}

}  // namespace fusewright::FUSEWRIGHT_ISA
