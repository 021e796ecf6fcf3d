// Blocks of rows (queries, keys, values and their gradients) brought to the form that product.h takes.
#pragma once

#include "fusewright/attention.h"
#include "fusewright/cpu/attention/product.h"

namespace fusewright::FUSEWRIGHT_ISA {

constexpr int64_t query_block = attention_query_block;
constexpr int64_t key_block = attention_key_block;

// How elements of T are multiplied: bfloat16 in pairs where the processor can, else everything as float32.
template <class T>
struct Multiplied {
  using Word = FloatWord;
};
#if defined(__AVX512BF16__)
template <>
struct Multiplied<BFloat16> {
  using Word = PairWord;
};
#endif

// The elements that such words hold.
template <class Word>
struct StoredAs {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct StoredAs<PairWord> {
  using type = BFloat16;
};
#endif

template <class T>
constexpr bool in_pairs = Multiplied<T>::Word::elements == 2;

template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

template <class T>
inline int64_t words(int64_t elements) {
  return in_pairs<T> ? (elements + 1) / 2 : elements;
}

inline int64_t whole_vectors(int64_t elements) { return (elements + lanes - 1) / lanes * lanes; }

// A block of rows of a tensor.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
  int64_t width;

  const T* row(int64_t index) const { return data + index * stride; }
};

inline float element(const float* source) { return *source; }
inline float element(const BFloat16* source) {
  const uint32_t word = static_cast<uint32_t>(source->bits) << 16;
  return bit_cast<float>(word);
}
inline float element(const Float16* source) { return load_partial(source, 1)[0]; }

inline void to_floats(float* target, const float* source, int64_t count) {
  memcpy(target, source, count * sizeof(float));
}
template <class T>
inline void to_floats(float* target, const T* source, int64_t count) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(target + i, load(source + i));
  if (i < count) store_partial(target + i, load_partial(source + i, count - i), count - i);
}

// x * 0 is 0 for a finite x only.
template <class T>
inline bool all_finite(const Rows<T>& rows) {
  Float zeros{};
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* row = rows.row(r);
    int64_t i = 0;
    for (; i + lanes <= rows.width; i += lanes) zeros += load(row + i) * 0.0f;
    if (i < rows.width) zeros += load_partial(row + i, rows.width - i) * 0.0f;
  }
  return sum_lanes(zeros) == 0.0f;
}

// ---- left operands: keys and values ----

// Bytes of scratch for one block of rows as a left operand.
template <class T>
inline int64_t left_scratch_bytes(int64_t width) {
  return is_float<T> ? 0 : key_block * (width + 1) * 4;
}

// Row r of the product is row r of the block, summed over its width.
template <class T>
inline LeftOperand left_rows(const Rows<T>& rows, void* scratch) {
  if constexpr (is_float<T>) {
    return {rows.data, rows.stride * 4, 4};
  } else if constexpr (in_pairs<T>) {
    if (rows.width % 2 == 0) return {rows.data, rows.stride * 2, 4};
    // The last element of an odd row is paired with zero instead of whatever lies behind it.
    const int64_t row_bytes = (rows.width + 1) * 2;
    for (int64_t r = 0; r < rows.count; ++r) {
      T* target = reinterpret_cast<T*>(static_cast<char*>(scratch) + r * row_bytes);
      memcpy(target, rows.row(r), rows.width * 2);
      target[rows.width] = T{0};
    }
    return {scratch, row_bytes, 4};
  } else {
    float* target = static_cast<float*>(scratch);
    for (int64_t r = 0; r < rows.count; ++r) to_floats(target + r * rows.width, rows.row(r), rows.width);
    return {target, rows.width * 4, 4};
  }
}

// Two rows of 16-bit elements as words: element i of `first` below that of `second`, which may be absent.
template <class T>
inline void interleave_rows(uint32_t* target, const T* first, const T* second, int64_t width) {
  if (second == nullptr) {
    for (int64_t i = 0; i < width; ++i) target[i] = first[i].bits;
  } else {
    for (int64_t i = 0; i < width; ++i) target[i] = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
  }
}

// Row r of the product is column r of the block, summed over its rows.
template <class T>
inline LeftOperand left_columns(const Rows<T>& rows, void* scratch) {
  if constexpr (is_float<T>) {
    return {rows.data, 4, rows.stride * 4};
  } else if constexpr (in_pairs<T>) {
    uint32_t* target = static_cast<uint32_t*>(scratch);
    for (int64_t r = 0; r < rows.count; r += 2) {
      const T* second = r + 1 < rows.count ? rows.row(r + 1) : nullptr;
      interleave_rows(target + r / 2 * rows.width, rows.row(r), second, rows.width);
    }
    return {scratch, 4, rows.width * 4};
  } else {
    return {left_rows(rows, scratch).data, 4, rows.width * 4};
  }
}

// ---- right operands: queries and gradients of the output, packed once per block ----

// Words along the width by lanes of rows: lane r is row r, zero behind the last.
template <class T>
inline void pack_rows_as_lanes(float* target, const Rows<T>& rows) {
  constexpr int per_word = Multiplied<T>::Word::elements;
  const int64_t steps = words<T>(rows.width);
  memset(target, 0, steps * query_block * sizeof(float));
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* row = rows.row(r);
    for (int64_t k = 0; k < rows.width / per_word; ++k) {
      if constexpr (in_pairs<T>) {
        memcpy(target + k * query_block + r, row + 2 * k, 4);
      } else {
        target[k * query_block + r] = element(row + k);
      }
    }
    if (rows.width % per_word != 0) memcpy(target + (steps - 1) * query_block + r, row + rows.width - 1, sizeof(T));
  }
}

// Words along the rows by lanes of the width, zero behind the last: row k of the result is row k of the block, or its
// rows 2k and 2k + 1 interleaved.
template <class T>
inline void pack_width_as_lanes(float* target, const Rows<T>& rows) {
  const int64_t stride = whole_vectors(rows.width);
  memset(target, 0, words<T>(query_block) * stride * sizeof(float));
  for (int64_t r = 0; r < rows.count; r += Multiplied<T>::Word::elements) {
    if constexpr (in_pairs<T>) {
      const T* second = r + 1 < rows.count ? rows.row(r + 1) : nullptr;
      interleave_rows(reinterpret_cast<uint32_t*>(target) + r / 2 * stride, rows.row(r), second, rows.width);
    } else {
      to_floats(target + r * stride, rows.row(r), rows.width);
    }
  }
}

// ---- results ----

// Rows of the tensor from columns of `sums` (width by lanes), each lane scaled.
template <class T>
inline void write_lanes_as_rows(T* target, int64_t stride, int64_t count, int64_t width, const float* sums,
                                const float* scale) {
  float row[lanes];
  for (int64_t r = 0; r < count; ++r) {
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
      for (int k = 0; k < lanes; ++k) row[k] = sums[(i + k) * query_block + r];
      store(target + r * stride + i, load(row) * scale[r]);
    }
    for (int k = 0; k < width - i; ++k) row[k] = sums[(i + k) * query_block + r];
    if (i < width) store_partial(target + r * stride + i, load(row) * scale[r], width - i);
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
