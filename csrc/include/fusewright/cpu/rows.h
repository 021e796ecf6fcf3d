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

// Pairs of elements in an order that several types share: the pair order where all have it, else the natural one.
template <class... Types>
struct SharedOrder {
  static constexpr bool pair_order = (has_pair_order<Types> && ...);

  template <class T>
  FUSEWRIGHT_ALWAYS_INLINE static Pair load(const T* source) {
    if constexpr (pair_order) return load_pair(source);
    return {FUSEWRIGHT_ISA::load(source), FUSEWRIGHT_ISA::load(source + lanes)};
  }

  template <class T>
  FUSEWRIGHT_ALWAYS_INLINE static void store(T* target, Pair value) {
    if constexpr (pair_order) return store_pair(target, value);
    FUSEWRIGHT_ISA::store(target, value.first);
    FUSEWRIGHT_ISA::store(target + lanes, value.second);
  }

  // The first 0 < `count` < pair_lanes elements; the others are zero.
  template <class T>
  FUSEWRIGHT_ALWAYS_INLINE static Pair load_partial(const T* source, int64_t count) {
    if constexpr (pair_order) return load_pair_partial(source, count);
    if (count < lanes) return {FUSEWRIGHT_ISA::load_partial(source, count), Float{}};
    return {FUSEWRIGHT_ISA::load(source), FUSEWRIGHT_ISA::load_partial(source + lanes, count - lanes)};
  }

  template <class T>
  FUSEWRIGHT_ALWAYS_INLINE static void store_partial(T* target, Pair value, int64_t count) {
    if constexpr (pair_order) return store_pair_partial(target, value, count);
    if (count < lanes) return FUSEWRIGHT_ISA::store_partial(target, value.first, count);
    FUSEWRIGHT_ISA::store(target, value.first);
    FUSEWRIGHT_ISA::store_partial(target + lanes, value.second, count - lanes);
  }

  // value in the first `count` elements, `other` in the rest.
  FUSEWRIGHT_ALWAYS_INLINE static Pair first_elements(int64_t count, Pair value, float other) {
    const int64_t in_second = pair_order ? count / 2 : count - lanes;
    const Float rest = broadcast(other);
    return {select(first_lanes(count - (in_second > 0 ? in_second : 0)), value.first, rest),
            select(first_lanes(in_second), value.second, rest)};
  }
};

// Calls whose tensors fill the caches many times over write past them: what they write would be gone before anybody
// reads it, and memory need not be read before it is written. Measured, 4096 rows of 1024 float32 on Zen 4: the
// backward of layer normalisation, 48 MB, 2.5 to 1.8 ms. Two-byte rows wait for arithmetic and not for memory.
constexpr int64_t least_streamed_bytes = int64_t{48} << 20;

// Whether `count` tensors of `rows` x `columns` are enough, and `target`, one of them, lies as streamed stores need it.
template <class T>
inline bool writes_past_caches(int64_t count, int64_t rows, int64_t columns, const void* target) {
  const int64_t row_bytes = columns * sizeof(T);
  return sizeof(T) == sizeof(float) && count * rows * row_bytes >= least_streamed_bytes &&
         row_bytes % vector_bytes == 0 && reinterpret_cast<uintptr_t>(target) % vector_bytes == 0;
}

FUSEWRIGHT_ALWAYS_INLINE void stream_pair(float* target, Pair value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(target, bit_cast<__m512>(value.first));
  _mm512_stream_ps(target + lanes, bit_cast<__m512>(value.second));
#elif defined(__AVX2__)
  _mm256_stream_ps(target, bit_cast<__m256>(value.first));
  _mm256_stream_ps(target + lanes, bit_cast<__m256>(value.second));
#else
  store_pair(target, value);
#endif
}

// Streamed stores are ordered with nothing else: to call before others may read them.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
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
